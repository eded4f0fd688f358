"""Guidance methods that need nothing but a network's answers.

A scale is a float, a (B,) tensor, or a function of `Noise` that gives either; never of a step index.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from guidance.contract import Branch, Guidance, Guide, Guided
from solvers.denoiser import Path, along
from solvers.noise import Noise

Scale = float | Tensor | Callable[[Noise], float | Tensor]


def strength(scale: Scale, at: Noise, x: Tensor) -> float | Tensor:
    """The scale at a noise level, shaped to multiply x (B, ...).

    Raises ValueError for a tensor that is neither () nor (B,).
    """
    value = scale(at) if callable(scale) else scale
    if not isinstance(value, Tensor):
        return value
    if value.shape not in ((), x.shape[:1]):
        raise ValueError(f"a scale of shape {tuple(value.shape)} for {len(x)} samples; pass a float or a (B,) tensor")
    return along(value, x)


@dataclass(frozen=True)
class Plain:
    """No guidance: the conditional prediction alone. `scale` is ignored."""

    scale: Scale = 1.0
    space = "any"

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond")}
        return Guided(preds["cond"])


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance, out = u + scale * (c - u) (https://arxiv.org/abs/2207.12598).

    The scale is diffusers' `guidance_scale`: 1 is plain conditional, 0 unconditional. Both are always evaluated.
    """

    scale: Scale = 7.5
    space = "any"

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        c, u = preds["cond"], preds["uncond"]
        return Guided(u + strength(self.scale, at, path.x) * (c - u))


GUIDANCE: dict[str, Callable[..., Guidance]] = {"none": Plain, "cfg": CFG}
