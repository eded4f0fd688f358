"""What differs between families of pipelines, in one table: `LatentModel` and `attach` read it, nothing else knows.

A new family is one entry of `FAMILIES`. `attach` needs what the pipeline calls its denoiser with and what it does to
the guided prediction; `LatentModel` needs `encode` and `call` besides, and says so of a family that has none.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from solvers.denoiser import Cond
from solvers.errors import InputError
from solvers.families.patches import SELF_ATTENTION_PATCHES, SKIPPED, SKIPPED_JOINT, SKIPPED_SD3, UNET_PATCHES, Patch


class Encode(Protocol):
    """The conditions of a batch. `size` is the image's (height, width); `embedded_guidance` is the guidance scale that
    a network distilled from guided predictions is told."""

    def __call__(
        self,
        pipe: Any,
        prompts: list[str],
        negatives: list[str] | None,
        size: tuple[int, int],
        embedded_guidance: float | None,
    ) -> dict[str, Cond]: ...  # {"cond": Cond, "uncond": Cond}


@dataclass(frozen=True)
class After:
    """What a pipeline does to its guided prediction before the scheduler's step, when it evaluated several branches."""

    name: str
    active: Callable[[Any, int], bool]  # (pipe, extra calls of the denoiser in this step)
    apply: Callable[[Any, Tensor, Tensor, Sequence[Tensor]], Tensor]  # (pipe, guided, cond, answers to the extra calls)
    remedy: str  # how to call the pipeline without it, or what else to do


@dataclass(frozen=True)
class Family:
    """A family of pipelines.

    `batch_first` names the network's arguments that have a row per sample, dotted where nested
    ("added_cond_kwargs.text_embeds"); the last part of such a name is its key in a `Cond`. A value may be a list.
    The first name is that of the latents.
    """

    name: str
    pipelines: tuple[str, ...]  # class names
    denoisers: tuple[str, ...]  # pipeline components, in the order in which they are used
    batched: bool  # the pipeline evaluates all branches in one forward, else one after the other
    order: tuple[str, ...]  # of the branches, as the pipeline stacks or calls them
    batch_first: tuple[str, ...]
    encode: Encode | None = None  # None: for `attach` only
    call: Callable[[Any, Tensor, Tensor, Cond], Tensor] | None = None  # (network, x, timestep, cond) -> like x
    prediction: Callable[[Tensor, Tensor], Tensor] = lambda out, x: out  # the part of a raw output that predicts
    grid: Callable[[Mapping[str, Any]], tuple[int, int]] | None = None  # of a network that reads tokens: see `packed`
    options: Callable[[Any, tuple[int, int], int], dict[str, Any]] = lambda pipe, latent, steps: {}  # of set_timesteps
    size: Callable[[Any], Any] = lambda network: network.config.sample_size  # of a latent: side, or (rows, columns)
    patch: int = 1  # both sides of a latent are multiples of it
    draws_float32: bool = False  # noise is drawn in float32, else in the network's dtype
    upcast_vae: bool = False  # a float16 VAE that says `force_upcast` runs in float32
    after: After | None = None
    extra: str = ""  # the argument that marks an additional, conditional call within a step
    embeds: str = "guidance_embeds"  # the network's setting that says that it is told a guidance scale
    prepare: str = "guidance_scale > 1"  # how a user has the pipeline prepare the unconditional branch
    patches: Mapping[str, Patch] = field(default_factory=dict)

    def patched(self, network: Any, name: str) -> AbstractContextManager[Any]:
        """A context in which the network runs with a named change; settings follow the name, as in "nag:2.5:0.25"."""
        kind, *settings = name.split(":")
        return self.known_patch(kind)(unwrap_module(network), *settings)

    def known_patch(self, kind: str) -> Patch:
        """Raises ValueError, listing the known, for another name."""
        if kind not in self.patches:
            raise InputError(f"family {self.name} has no patch {kind!r}; known: {', '.join(self.patches) or 'none'}")
        return self.patches[kind]


def keywords(batch_first: Sequence[str], cond: Cond) -> dict[str, Any]:
    """`cond` as keyword arguments of the network: "text_embeds" becomes added_cond_kwargs={"text_embeds": ...}.

    Raises ValueError for a key that `batch_first` does not name.
    """
    places = {name.rpartition(".")[2]: name.rpartition(".")[0] for name in batch_first}
    if unknown := sorted(cond.keys() - places.keys()):
        raise InputError(f"the network takes no {', '.join(unknown)}; known: {', '.join(places)}")
    arguments: dict[str, Any] = {}
    for key, value in cond.items():
        (arguments.setdefault(places[key], {}) if places[key] else arguments)[key] = value
    return arguments


def call_network(batch_first: Sequence[str], network: Any, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """The network's raw output, for networks called as network(x, timestep=timestep, **conditions)."""
    return network(x, timestep=timestep, **keywords(batch_first, cond), return_dict=False)[0]


def call_transformer(batch_first: Sequence[str], network: Any, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """The prediction of a transformer that takes a timestep per sample, in latents' layout."""
    return predicting_half(call_network(batch_first, network, x, timestep.to(x.device).expand(len(x)), cond), x)


def predicting_half(out: Tensor, x: Tensor) -> Tensor:
    """`out` (B, C, ...) without the learned variance, where it has twice as many channels as x."""
    return out.chunk(2, dim=1)[0] if out.shape[1] == 2 * x.shape[1] else out


def packed(x: Tensor) -> Tensor:
    """(B, C, h, w) as tokens (B, h w / 4, 4 C), one for every 2x2 patch."""
    batch, channels, rows, columns = x.shape
    patches = x.reshape(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows * columns // 4, 4 * channels)


def unpacked(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """`packed` undone: tokens of a grid of (rows, columns) patches as (B, C, 2 rows, 2 columns)."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, *grid, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, 2 * grid[0], 2 * grid[1])


def encode_sd(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """Hidden states of the text encoder, (B, L, D)."""
    cond, uncond = pipe.encode_prompt(prompts, pipe._execution_device, 1, True, negative_prompt=negatives)
    more = guidance_embedding(pipe.unet, embedded_guidance, cond)
    return {"cond": {"encoder_hidden_states": cond, **more}, "uncond": {"encoder_hidden_states": uncond, **more}}


def encode_sdxl(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """Hidden states of both text encoders (B, L, D), the pooled embedding (B, P), and the time ids (B, 6).

    Without negatives, the unconditional embeddings are zeros where the pipeline has `force_zeros_for_empty_prompt`.
    """
    cond, uncond, pooled, unpooled = pipe.encode_prompt(prompts, negative_prompt=negatives)
    texts = {"cond": (cond, pooled), "uncond": (uncond, unpooled)}
    more = guidance_embedding(pipe.unet, embedded_guidance, cond)
    return {
        branch: {
            "encoder_hidden_states": hidden,
            "text_embeds": pooled.to(hidden.device),
            "time_ids": time_ids(pipe, size, branch).to(hidden).repeat(len(hidden), 1),
            **more,
        }
        for branch, (hidden, pooled) in texts.items()
    }


AESTHETIC_SCORES = {"cond": 6.0, "uncond": 2.5}  # diffusers' defaults for the SDXL refiner


def time_ids(pipe: Any, size: tuple[int, int], branch: str) -> Tensor:
    """SDXL's micro-conditioning (1, 6): original size, crop corner, target size; (1, 5) for a refiner."""
    aesthetic = pipe.config.get("requires_aesthetics_score", False)
    return torch.tensor([[*size, 0.0, 0.0, *((AESTHETIC_SCORES[branch],) if aesthetic else size)]])


def guidance_told(network: Any, setting: str, scale: float | None) -> bool:
    """Whether the network is told a guidance scale, as `setting` of its config says.

    Raises ValueError where the scale is missing, or is given to a network that has no use for it.
    """
    told = bool(network.config.get(setting))
    if told != (scale is not None):
        remedy = "pass" if scale is None else "do not pass"
        value = network.config.get(setting)
        raise InputError(f"{type(network).__name__} has {setting}={value}: {remedy} embedded_guidance")
    return told


def guidance_embedding(unet: Any, scale: float | None, like: Tensor) -> Cond:
    """{"timestep_cond": (B, D)} for a UNet distilled over guidance scales (LCM), nothing for any other.

    Its entries are sin and cos of 1000 (w - 1) / 10000^(i / (D/2 - 1)), as in diffusers
    (https://arxiv.org/abs/2310.04378). Raises ValueError where w = `scale` is missing, or is given to a network that
    has no use for it.
    """
    width = unet.config.get("time_cond_proj_dim")
    if not guidance_told(unet, "time_cond_proj_dim", scale) or scale is None:
        return {}
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = torch.tensor(scale - 1) * 1000.0 * rates
    waves = nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))
    return {"timestep_cond": waves.to(like).repeat(len(like), 1)}


UNET = (
    "sample",
    "encoder_hidden_states",
    "timestep_cond",
    "class_labels",
    "attention_mask",
    "encoder_attention_mask",
    "added_cond_kwargs.text_embeds",
    "added_cond_kwargs.time_ids",
    "added_cond_kwargs.image_embeds",  # a list: one entry per IP-Adapter
    "down_block_additional_residuals",  # a tuple: one entry per ControlNet output
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",  # a tuple: T2I-Adapter
    "cross_attention_kwargs.negative_hidden_states",  # of NASA and NAG, for their patches
    "cross_attention_kwargs.negative_scale",
)


def encode_sd3(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """Hidden states of the three text encoders (B, L, D), and the pooled ones of two (B, P)."""
    guidance_told(pipe.transformer, "guidance_embeds", embedded_guidance)
    cond, uncond, pooled, unpooled = pipe.encode_prompt(prompts, None, None, negative_prompt=negatives)
    return {
        "cond": {"encoder_hidden_states": cond, "pooled_projections": pooled},
        "uncond": {"encoder_hidden_states": uncond, "pooled_projections": unpooled},
    }


def encode_flux(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """T5's hidden states (B, L, D), CLIP's pooled one (B, P), and the embedded guidance scale (B,) where it is told."""
    told = guidance_told(pipe.transformer, "guidance_embeds", embedded_guidance)
    more = {"guidance": torch.full([len(prompts)], embedded_guidance, device=pipe._execution_device)} if told else {}
    conds: dict[str, Cond] = {}
    for branch, texts in {"cond": prompts, "uncond": negatives or [""] * len(prompts)}.items():
        hidden, pooled, _ = pipe.encode_prompt(texts, None)
        conds[branch] = {"encoder_hidden_states": hidden, "pooled_projections": pooled, **more}
    return conds


def call_flux(network: Any, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """FLUX reads tokens, with the place of each, and a timestep in [0, 1]."""
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    places = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).to(x)  # (tokens, 3)
    texts = x.new_zeros(cond["encoder_hidden_states"].shape[1], 3)
    timestep = timestep.to(x).expand(len(x)) / 1000
    out = network(packed(x), timestep=timestep, **cond, img_ids=places, txt_ids=texts, return_dict=False)[0]
    return unpacked(out, (rows, columns))


def encode_pixart(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """T5's hidden states (B, L, D), their mask (B, L), and for alpha at 1024 pixels size (B, 2) and ratio (B, 1)."""
    guidance_told(pipe.transformer, "guidance_embeds", embedded_guidance)
    cond, mask, uncond, unmask = pipe.encode_prompt(prompts, True, negatives or "", clean_caption=True)
    more = {}
    if pipe.transformer.use_additional_conditions:
        more["resolution"] = torch.tensor([size]).repeat(len(cond), 1).to(cond)
        more["aspect_ratio"] = torch.tensor([[size[0] / size[1]]]).repeat(len(cond), 1).to(cond)
    return {
        "cond": {"encoder_hidden_states": cond, "encoder_attention_mask": mask, **more},
        "uncond": {"encoder_hidden_states": uncond, "encoder_attention_mask": unmask, **more},
    }


def encode_sana(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """Gemma's hidden states (B, L, D) and their mask (B, L); the prompt follows the pipeline's own instruction."""
    guidance_told(pipe.transformer, "guidance_embeds", embedded_guidance)
    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    cond, mask, uncond, unmask = pipe.encode_prompt(
        prompts, True, negatives or "", complex_human_instruction=instruction
    )
    return {
        "cond": {"encoder_hidden_states": cond, "encoder_attention_mask": mask},
        "uncond": {"encoder_hidden_states": uncond, "encoder_attention_mask": unmask},
    }


def call_sana(network: Any, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    return call_transformer(SANA, network, x, timestep * network.config.timestep_scale, cond)


def shifted(pipe: Any, latent: tuple[int, int], steps: int) -> dict[str, Any]:
    """set_timesteps(mu=...) where the scheduler shifts its levels by the image's size."""
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return {}
    patch = pipe.transformer.config.patch_size
    return {"mu": shift(config, (latent[0] // patch) * (latent[1] // patch), 1.16)}


def shifted_flux(pipe: Any, latent: tuple[int, int], steps: int) -> dict[str, Any]:
    """FLUX's levels before the shift are 1, ..., 1/N; a scheduler of another kind lays out its own."""
    config = pipe.scheduler.config
    sigmas = {} if config.get("use_flow_sigmas") else {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    return {**sigmas, "mu": shift(config, latent[0] * latent[1] // 4, 1.15)}


def shift(config: Any, tokens: int, highest: float) -> float:
    """The shift of a schedule, linear in the number of tokens, by the scheduler's own settings."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", highest)
    slope = (high - low) / (many - few)
    return tokens * slope + (low - slope * few)


def rescaled(out: Tensor, cond: Tensor, phi: float | Tensor) -> Tensor:
    """phi * out * std(cond) / std(out) + (1 - phi) * out (https://arxiv.org/abs/2305.08891), as diffusers rounds it."""
    axes = list(range(1, out.ndim))
    matched = out * (cond.std(dim=axes, keepdim=True) / out.std(dim=axes, keepdim=True))
    return phi * matched + (1 - phi) * out


def norm_matched(out: Tensor, cond: Tensor) -> Tensor:
    """(B, C, h, w) whose tokens have the norms of those of `cond`, 0 / 0 included, as in the pipeline."""
    tokens, like = packed(out), packed(cond)
    matched = tokens * (torch.norm(like, dim=-1, keepdim=True) / torch.norm(tokens, dim=-1, keepdim=True))
    return unpacked(matched, (out.shape[-2] // 2, out.shape[-1] // 2))


RESCALE = After(
    "guidance_rescale",
    lambda pipe, extra: vars(pipe).get("_guidance_rescale", 0.0) > 0,  # img2img and inpaint have none
    lambda pipe, out, cond, extra: rescaled(out, cond, pipe.guidance_rescale),
    "call the pipeline with guidance_rescale=0",
)
SKIP_LAYERS = After(
    "skip_guidance_layers",
    lambda pipe, extra: extra > 0,
    lambda pipe, out, cond, extra: out + (cond - extra[0]) * pipe._skip_layer_guidance_scale,
    "call the pipeline without skip_guidance_layers",
)
NORM = After(
    "rule that gives each token the norm of the conditional prediction",
    lambda pipe, extra: True,
    lambda pipe, out, cond, extra: norm_matched(out, cond),
    "it cannot be switched off; use another method",
)

CONTROLNET = (
    "sample",
    "encoder_hidden_states",
    "controlnet_cond",  # a list for several ControlNets
    "control_type",
    "timestep_cond",
    "class_labels",
    "attention_mask",
    "added_cond_kwargs.text_embeds",
    "added_cond_kwargs.time_ids",
)

_TASKS = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
_SD = [f"StableDiffusion{task}Pipeline" for task in _TASKS]
_SDXL = [f"StableDiffusionXL{task}Pipeline" for task in (*_TASKS, *(f"ControlNetUnion{task}" for task in _TASKS[:3]))]

TEXT = ("hidden_states", "encoder_hidden_states", "timestep")
SD3 = (*TEXT, "pooled_projections", "joint_attention_kwargs.ip_adapter_image_embeds")
FLUX = (*SD3, "guidance")
PIXART = (*TEXT, "encoder_attention_mask", "added_cond_kwargs.resolution", "added_cond_kwargs.aspect_ratio")
SANA = (*TEXT, "encoder_attention_mask")
WAN = (*TEXT, "encoder_hidden_states_image")
QWEN = (*TEXT, "encoder_hidden_states_mask", "guidance")

_unet = partial(
    Family,
    denoisers=("unet",),
    batched=True,
    order=("uncond", "cond"),
    batch_first=UNET,
    call=partial(call_network, UNET),
    after=RESCALE,
    embeds="time_cond_proj_dim",
    patches=UNET_PATCHES,
)
_transformer = partial(Family, denoisers=("transformer",), batched=True, order=("uncond", "cond"))
_in_sequence = partial(
    _transformer, batched=False, order=("cond", "uncond"), prepare="true_cfg_scale > 1 and a negative prompt"
)

FAMILIES: dict[str, Family] = {
    "sd": _unet(name="sd", pipelines=tuple(_SD), encode=encode_sd),
    "sdxl": _unet(name="sdxl", pipelines=tuple(_SDXL), encode=encode_sdxl, upcast_vae=True),
    "sd3": _transformer(
        name="sd3",
        patches=SKIPPED_SD3,
        pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        batch_first=SD3,
        encode=encode_sd3,
        call=partial(call_transformer, SD3),
        options=shifted,
        patch=2,
        after=SKIP_LAYERS,
        extra="skip_layers",
    ),
    "flux": _in_sequence(
        name="flux",
        patches=SKIPPED_JOINT,
        pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
        batch_first=FLUX,
        encode=encode_flux,
        call=call_flux,
        grid=lambda arguments: (int(arguments["img_ids"][-1, 1]) + 1, int(arguments["img_ids"][-1, 2]) + 1),
        options=shifted_flux,
        size=lambda network: 128,  # FluxPipeline.default_sample_size: the network has none
        patch=2,
    ),
    "pixart": _transformer(
        name="pixart",
        patches=SELF_ATTENTION_PATCHES,
        pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        batch_first=PIXART,
        encode=encode_pixart,
        call=partial(call_transformer, PIXART),
        prediction=predicting_half,
        patch=2,
    ),
    "sana": _transformer(
        name="sana",
        patches=SELF_ATTENTION_PATCHES,
        pipelines=("SanaPipeline",),
        batch_first=SANA,
        encode=encode_sana,
        call=call_sana,
        prediction=lambda out, x: predicting_half(out.float(), x),
        draws_float32=True,
    ),
    "wan": _in_sequence(
        name="wan",
        patches=SKIPPED,
        pipelines=("WanPipeline",),
        denoisers=("transformer", "transformer_2"),
        batch_first=WAN,
        prepare="guidance_scale > 1",
    ),
    "qwen": _in_sequence(
        name="qwen",
        patches=SKIPPED_JOINT,
        pipelines=("QwenImagePipeline",),
        batch_first=QWEN,
        grid=lambda arguments: tuple(arguments["img_shapes"][0][0][1:]),
        after=NORM,
    ),
}


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family that lists the pipeline's class; ValueError, naming the class and the known ones, where none does."""
    name = type(pipe).__name__
    for family in FAMILIES.values():
        if name in family.pipelines:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.pipelines)
    raise InputError(f"no family for {name}; known pipelines: {known}")
