"""CFG with a changed unconditional prediction: CFG-Zero* and tangential damping."""

from dataclasses import dataclass
from math import isclose

import torch
from torch import Tensor

from guidance.contract import Branch, Guide, Guided
from guidance.methods.scales import Neutral, Scale, Scaled, chosen, dot, root, strength
from solvers.denoiser import Path
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.ranges import Whole


@dataclass(frozen=True)
class CFGZeroStar(Scaled):
    """CFG-Zero*, for flow models (https://arxiv.org/abs/2503.18886): CFG whose u is scaled to fit c, and no first step:

    out = s u + scale (c - s u),    s = <c, u> / ||u||^2 per sample; the first `zero_steps` steps stay where they are.

    A zeroed step evaluates nothing, and exists only on a flow's path (alpha + sigma = 1); set zero_steps=0 elsewhere.
    """

    scale: Scale = 7.5
    zero_steps: Whole = 1
    space = "flow"
    neutral = Neutral({"scale": 1.0, "zero_steps": 0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        steps = path.memory.get("cfg_zero.step", torch.zeros(len(path.x), device=path.x.device))
        active = self._active(steps, at)
        preds = yield {"cond": Branch("cond", active), "uncond": Branch("uncond", active)}
        c, u = (chosen(active, preds[name], torch.zeros_like(preds[name])) for name in ("cond", "uncond"))
        scaled = projection_weight(c, u).to(u.dtype) * u
        out = scaled + strength(self.scale, at, path.x) * (c - scaled)
        return Guided(out, memory={"cfg_zero.step": steps + 1} if self.zero_steps else {})

    def _active(self, steps: Tensor, at: Noise) -> Tensor | None:
        """The rows (B,) that are past their zeroed steps; None for all."""
        active = steps >= self.zero_steps
        if bool(active.all()):
            return None
        if not isclose(float(at.alpha + at.sigma), 1, abs_tol=1e-6):
            raise UserError("CFGZeroStar's zeroed step is for flow models alone; set zero_steps=0")
        return active


def projection_weight(c: Tensor, u: Tensor) -> Tensor:
    """<c, u> / (||u||^2 + 1e-8) of each sample, in float64."""
    return dot(c, u) / (dot(u, u) + 1e-8)


@dataclass(frozen=True)
class TCFG(Scaled):
    """Tangential damping CFG (https://arxiv.org/abs/2503.18137): out = u' + scale (c - u'), u' = <u, v> v,

    where v is the first right singular vector of the two rows [c; u] of a sample, in eps: what of u is not common to
    both is dropped.
    """

    scale: Scale = 7.5
    space = "eps"
    neutral = Neutral({"scale": 1.0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        c, u = preds["cond"], preds["uncond"]
        damped = common(c, u)
        return Guided(damped + strength(self.scale, at, path.x) * (c - damped))


def common(c: Tensor, u: Tensor) -> Tensor:
    """u's projection on the first right singular vector of [c; u], from the 2 x 2 Gram matrix."""
    cc, cu, uu = (dot(a, b) for a, b in ((c, c), (c, u), (u, u)))
    # (p, q) is the top eigenvector of [[cc, cu], [cu, uu]], in the one of its two forms that does not cancel
    half = (cc - uu) / 2
    radius = root(half**2 + cu**2)
    p = torch.where(half >= 0, half + radius, cu)
    q = torch.where(half >= 0, cu, radius - half)
    power = p**2 * cc + 2 * p * q * cu + q**2 * uu
    weight = (p * cu + q * uu) / torch.where(power > 0, power, 1.0)
    return (weight * p).to(c.dtype) * c + (weight * q).to(u.dtype) * u
