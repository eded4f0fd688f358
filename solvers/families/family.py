"""The record of a family of pipelines, and the arguments of its network."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor

from solvers.denoiser import Cond
from solvers.errors import UserError
from solvers.families.after import After
from solvers.families.latents import Latents
from solvers.families.patches import Patch

TEXT_INPUTS = ("hidden_states", "encoder_hidden_states", "timestep")


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


def thousandth(network: Any, timestep: Tensor) -> Tensor:
    """The time in [0, 1] that a network is told, of a scheduler's timestep."""
    return timestep / 1000


def remaining(network: Any, timestep: Tensor) -> Tensor:
    """The time of a network that counts from 0 at noise to 1."""
    return 1 - timestep / 1000


@dataclass(frozen=True)
class Family:
    """A family of pipelines.

    `batch_first` names the network's arguments that have a row per sample, dotted where nested
    ("added_cond_kwargs.text_embeds"); the last part of such a name is its key in a `Cond`. A value may be a list.
    The first name is that of the latents. `model_output(out, sample, rows, scheduler)` is what the pipeline gives its
    scheduler for the guided prediction `out`; `rows` are the arguments of the network's call.
    """

    name: str
    pipelines: tuple[str, ...]  # class names
    denoisers: tuple[str, ...]  # pipeline components, in the order in which they are used
    batched: bool  # the pipeline evaluates all branches in one forward, else one after the other
    order: tuple[str, ...]  # of the branches, as the pipeline stacks or calls them
    batch_first: tuple[str, ...]
    encode: Encode | None = None  # None: for `attach` only
    call: Callable[[Any, Tensor, Tensor, Cond], Tensor] | None = None  # (network, x, timestep, cond) -> like x
    gathered: Callable[[Mapping[str, Any]], dict[str, Any]] = dict  # the network's arguments, of lists: as batches
    scattered: Callable[[Mapping[str, Any]], dict[str, Any]] = dict  # that undone
    answered: Callable[[Tensor], Any] = lambda out: out  # a raw output, of a batch
    prediction: Callable[[Any, Tensor], Tensor] = lambda out, x: out  # the part of a raw output that predicts
    model_output: Callable[[Tensor, Tensor, Mapping[str, Any], Any], Tensor] = lambda out, sample, rows, scheduler: out
    latents: Latents = field(default_factory=Latents)
    grid: Callable[[Mapping[str, Any]], tuple[int, int]] | None = None  # of a network that reads tokens: see `packed`
    options: Callable[[Any, tuple[int, int], int], dict[str, Any]] = lambda pipe, latent, steps: {}  # of set_timesteps
    asked: Callable[[int], dict[str, Any]] = lambda steps: {}  # what the pipeline must be told beside its steps
    size: Callable[[Any], Any] = lambda network: network.config.sample_size  # of a latent: side, or (rows, columns)
    factor: Callable[[Any], int] = lambda pipe: pipe.vae_scale_factor  # pixels along a side of the VAE's latents
    boundary: Callable[[Any], float | None] = lambda pipe: None  # the timestep below which the second denoiser serves
    patch: int = 1  # both sides of a latent are multiples of it
    draws_float32: bool = False  # noise is drawn in float32, else in the network's dtype
    upcast_vae: bool = False  # a float16 VAE that says `force_upcast` runs in float32
    after: After | None = None
    time: Callable[[Any, Tensor], Tensor] = lambda network, timestep: timestep  # that it is told at a scheduler's
    residuals: tuple[str, ...] = ()  # those of a ControlNet among `batch_first`, as the pipeline has it; else a UNet's
    extra: str = ""  # the argument that marks an additional, conditional call within a step
    embeds: str = "guidance_embeds"  # the network's setting that says that it is told a guidance scale
    unguided: float = 1.0  # the pipeline's guidance scale without guidance: s = 0 where out = c + s (c - u)
    prepare: str = "guidance_scale > 1"  # how a user has the pipeline prepare the unconditional branch
    uncond_call: Callable[[int], dict[str, Any]] = lambda batch: {}  # arguments for that, of so many prompts
    patches: Mapping[str, Patch] = field(default_factory=dict)

    def patched(self, network: Any, name: str) -> AbstractContextManager[Any]:
        """A context in which the network runs with a named change; settings follow the name, as in "nag:2.5:0.25"."""
        kind, *settings = name.split(":")
        return self.known_patch(kind)(unwrap_module(network), *settings)

    def known_patch(self, kind: str) -> Patch:
        """Raises ValueError, listing the known, for another name."""
        if kind not in self.patches:
            raise UserError(f"family {self.name} has no patch {kind!r}; known: {', '.join(self.patches) or 'none'}")
        return self.patches[kind]


def keywords(batch_first: Sequence[str], cond: Cond) -> dict[str, Any]:
    """`cond` as keyword arguments of the network: "text_embeds" becomes added_cond_kwargs={"text_embeds": ...}.

    Raises ValueError for a key that `batch_first` does not name.
    """
    places = {name.rpartition(".")[2]: name.rpartition(".")[0] for name in batch_first}
    if unknown := sorted(cond.keys() - places.keys()):
        raise UserError(f"the network takes no {', '.join(unknown)}; known: {', '.join(places)}")
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


def guidance_told(network: Any, setting: str, scale: float | None) -> bool:
    """Whether the network is told a guidance scale, as `setting` of its config says.

    Raises ValueError if the scale is missing, or is given to a network that has no use for it.
    """
    told = bool(network.config.get(setting))
    if told != (scale is not None):
        remedy = "pass" if scale is None else "do not pass"
        value = network.config.get(setting)
        raise UserError(f"{type(network).__name__} has {setting}={value}: {remedy} embedded_guidance")
    return told


def shifted(pipe: Any, latent: tuple[int, int], steps: int) -> dict[str, Any]:
    """set_timesteps(mu=...) where the scheduler shifts its levels by the image's size."""
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return {}
    patch = pipe.transformer.config.patch_size
    return {"mu": shift(config, (latent[0] // patch) * (latent[1] // patch), 1.16)}


def shift(config: Any, tokens: int, highest: float) -> float:
    """The shift of a schedule, linear in the number of tokens, by the scheduler's own settings."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", highest)
    slope = (high - low) / (many - few)
    return tokens * slope + (low - slope * few)


transformer_family = partial(Family, denoisers=("transformer",), batched=True, order=("uncond", "cond"))


sequential_family = partial(transformer_family, batched=False, order=("cond", "uncond"))
TRUE_CFG: dict[str, Any] = {  # of pipelines that guide where both are given
    "prepare": "true_cfg_scale > 1 and a negative prompt",
    "uncond_call": lambda batch: {"true_cfg_scale": 2.0, "negative_prompt": [""] * batch},
}
