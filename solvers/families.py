"""What differs between families of pipelines, in one table: `LatentModel` and `attach` read it, nothing else knows.

A new family is one entry of `FAMILIES`: an `encode` for its conditions, and `pack` and `unpack` where its network does
not take or give latents as they are (FLUX's tokens, the learned variance in PixArt's output).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from solvers.denoiser import Cond


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
    encode: Encode
    call: Callable[[Any, Tensor, Tensor, Cond], Tensor]  # (network, packed x, timestep, cond) -> raw output
    pack: Callable[[Tensor], Tensor] = lambda x: x  # (B, C, h, w) -> what the network takes
    unpack: Callable[[Tensor, Tensor], Tensor] = lambda out, x: out  # (raw output, x) -> (B, C, h, w), x's shape
    timestep_scale: float = 1.0  # of the scheduler's timesteps, as the network takes them
    upcast_vae: bool = False  # a float16 VAE that says `force_upcast` runs in float32
    patches: Mapping[str, Callable[[Any], AbstractContextManager[Any]]] = field(default_factory=dict)


def keywords(batch_first: Sequence[str], cond: Cond) -> dict[str, Any]:
    """`cond` as keyword arguments of the network: "text_embeds" becomes added_cond_kwargs={"text_embeds": ...}.

    Raises ValueError for a key that `batch_first` does not name.
    """
    places = {name.rpartition(".")[2]: name.rpartition(".")[0] for name in batch_first}
    if unknown := sorted(cond.keys() - places.keys()):
        raise ValueError(f"the network takes no {', '.join(unknown)}; known: {', '.join(places)}")
    arguments: dict[str, Any] = {}
    for key, value in cond.items():
        (arguments.setdefault(places[key], {}) if places[key] else arguments)[key] = value
    return arguments


def call_network(batch_first: Sequence[str], network: Any, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """The network's raw output, for networks called as network(x, timestep, **conditions)."""
    return network(x, timestep, **keywords(batch_first, cond), return_dict=False)[0]


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


def guidance_embedding(unet: Any, scale: float | None, like: Tensor) -> Cond:
    """{"timestep_cond": (B, D)} for a UNet distilled over guidance scales (LCM), nothing for any other.

    Its entries are sin and cos of 1000 (w - 1) / 10000^(i / (D/2 - 1)), as in diffusers (https://arxiv.org/abs/2310.04378).
    Raises ValueError where w = `scale` is missing, or is given to a network that has no use for it.
    """
    width = unet.config.get("time_cond_proj_dim")
    if (width is None) != (scale is None):
        remedy = "pass" if scale is None else "do not pass"
        raise ValueError(f"{type(unet).__name__} has time_cond_proj_dim={width}: {remedy} embedded_guidance")
    if width is None or scale is None:
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
)


_TASKS = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
_SD = [f"StableDiffusion{task}Pipeline" for task in _TASKS]
_SDXL = [f"StableDiffusionXL{task}Pipeline" for task in (*_TASKS, *(f"ControlNetUnion{task}" for task in _TASKS[:3]))]

_unet = partial(
    Family,
    denoisers=("unet",),
    batched=True,
    order=("uncond", "cond"),
    batch_first=UNET,
    call=partial(call_network, UNET),
)

FAMILIES: dict[str, Family] = {
    "sd": _unet(name="sd", pipelines=tuple(_SD), encode=encode_sd),
    "sdxl": _unet(name="sdxl", pipelines=tuple(_SDXL), encode=encode_sdxl, upcast_vae=True),
}


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family that lists the pipeline's class; ValueError, naming the class and the known ones, where none does."""
    name = type(pipe).__name__
    for family in FAMILIES.values():
        if name in family.pipelines:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.pipelines)
    raise ValueError(f"no family for {name}; known pipelines: {known}")
