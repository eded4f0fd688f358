"""Classifier-free guidance, and the conditional prediction alone. What all methods share is in `scales.py`."""

from dataclasses import dataclass

from guidance.contract import Branch, Guide, Guided
from guidance.methods.scales import Neutral, Scale, Scaled, strength
from solvers.denoiser import Path
from solvers.noise import Noise
from solvers.ranges import Ranged


@dataclass(frozen=True)
class Plain(Ranged):
    """No guidance: the conditional prediction alone. `scale` is ignored."""

    scale: Scale = 1.0
    space = "any"
    neutral = Neutral({}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond")}
        return Guided(preds["cond"])


@dataclass(frozen=True)
class CFG(Scaled):
    """Classifier-free guidance, out = u + scale * (c - u) (https://arxiv.org/abs/2207.12598).

    The scale is diffusers' `guidance_scale`: 1 is plain conditional, 0 unconditional. Both are always evaluated.
    """

    scale: Scale = 7.5
    space = "any"
    neutral = Neutral({"scale": 1.0}, "none")

    @classmethod
    def from_original(cls, s: float) -> "CFG":
        """CFG of the paper's own scale s: out = c + s (c - u)."""
        return cls(1 + s)

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        c, u = preds["cond"], preds["uncond"]
        return Guided(u + strength(self.scale, at, path.x) * (c - u))


@dataclass(frozen=True)
class FromCond(CFG):
    """The same, as out = c + (scale - 1) (c - u): other bits, those of a pipeline that writes it so (Z-Image)."""

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        c, u = preds["cond"], preds["uncond"]
        return Guided(c + (strength(self.scale, at, path.x) - 1) * (c - u))
