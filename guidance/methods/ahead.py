"""Methods that ask the network elsewhere than where the sampler stands: Rectified-CFG++ and CFG-MP."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guidance.contract import Branch, Guide, Guided, Preds, Request
from guidance.methods.scales import Neutral, Scale, Scaled, Usual, chosen, dot, nonzero, strength, time
from solvers.denoiser import Path
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.ranges import Share, Whole


def end_of_step(method: Any, path: Path) -> Noise:
    """The level where the step ends. UserError in a step that is not one of Euler's method, which does not tell it."""
    if path.then is None:
        raise UserError(
            f"{type(method).__name__} looks ahead to where the step ends, which only Euler's method tells: use the"
            " sampler euler, or on a pipeline FlowMatchEulerDiscreteScheduler without stochastic_sampling,"
            " EulerDiscreteScheduler, DDIMScheduler or DPMSolverMultistepScheduler with solver_order=1"
        )
    return path.then


@dataclass(frozen=True)
class RectifiedCFGpp(Scaled):
    """Rectified-CFG++ (https://arxiv.org/abs/2510.07631): the gap of the two predictions is taken where the conditional
    one leads. Of the velocities,

    x_p = x + (t' - t) u_c(x, t),    out = u_c(x, t) + scale (u_c(x_p, t') - u_u(x_p, t')).

    The scale multiplies the gap: it is CFG's less 1. A step to data (t' = 0), where both predictions of an exact model
    agree, is conditional. 3 evaluations a step, 1 in the last. For steps of Euler's method.
    """

    scale: Scale = 4.5
    looks_ahead = True
    space = "flow"
    usual = Usual(0, 15, "it multiplies the gap, c + s (c - u): it is CFG's scale less 1")
    neutral = Neutral({"scale": 0.0}, "none")

    @classmethod
    def from_cfg_scale(cls, scale: float) -> "RectifiedCFGpp":
        """The method that is CFG of `scale` in the limit of many steps."""
        return cls(scale - 1)

    def guide(self, path: Path, at: Noise) -> Guide:
        then = end_of_step(self, path)
        preds = yield {"cond": Branch("cond")}
        s = strength(self.scale, at, path.x)
        rows = nonzero(s, path.x)
        if then.sigma == 0:
            return Guided(preds["cond"])
        ahead = then.alpha * preds.to("cond", "x0") + then.sigma * preds.to("cond", "eps")
        preds = yield {f"{name}2": Branch(name, rows, x=ahead, at=then) for name in ("cond", "uncond")}
        gap = chosen(rows, preds["cond2"] - preds["uncond2"], torch.zeros_like(preds["cond"]))
        return Guided(preds["cond"] + s * gap)


@dataclass(frozen=True)
class CFGMP(Scaled):
    """CFG-MP (https://arxiv.org/abs/2601.21892): CFG from latents that were moved to where the two predictions are
    closer. Before a step the latents z are moved, `repeats` times, by

    y = z - h u_u(z, t),    z = y + h u_c(y, t),    h = (t' - t) / 2,

    which goes down the gap of the two predictions, h (u_c - u_u) + O(h^2); from t = 0.95 upwards the two halves are in
    the other order. Then Euler's step of CFG starts from z. Only where t = sigma / (alpha + sigma) is above `above`.

    anderson: Anderson acceleration of the repeats with a window of one step, which is CFG-MP+.
    2 + 2 repeats evaluations a step where it moves, and CFG's 2 elsewhere. For steps of Euler's method. Its prediction
    carries the move, so that the clean estimate of such a step is not the network's own.
    """

    scale: Scale = 4.5
    repeats: Whole = 3
    above: Share = 0.6
    anderson: bool = False
    looks_ahead = True
    moves_latents = True
    space = "flow"
    neutral = Neutral({"scale": 1.0, "repeats": 0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        then = end_of_step(self, path)
        if not self.repeats or time(at) <= self.above:
            preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
            return Guided(self._cfg(preds, path.x, at))
        size, way = at.alpha + at.sigma, time(then) - time(at)
        start = z = path.x / size
        last: tuple[Tensor, Tensor] | None = None
        for i in range(self.repeats):
            moved = yield from self._repeat(path.x if i == 0 else size * z, at, way / 2, i)
            residual = moved / size - z
            z, last = z + self._accelerated(residual, z, last), (z, residual)
        preds = yield {name: Branch(name, x=size * z, at=at) for name in ("cond", "uncond")}
        return Guided(self._cfg(preds, path.x, at) + (z - start) / way)

    def _cfg(self, preds: Preds, x: Tensor, at: Noise) -> Tensor:
        return preds["uncond"] + strength(self.scale, at, x) * (preds["cond"] - preds["uncond"])

    def _repeat(self, x: Tensor, at: Noise, h: float, i: int) -> Any:
        """x after both halves, in its own coordinates; the first evaluation of all is at the point itself."""
        size = at.alpha + at.sigma
        halves = (("uncond", -h), ("cond", h)) if time(at) < LATE else (("cond", h), ("uncond", -h))
        for name, way in halves:
            branch = Branch(name) if i == 0 and name == halves[0][0] else Branch(name, x=x, at=at)
            request: Request = {f"{name}{i}": branch}
            preds = yield request
            x = x + size * way * preds[f"{name}{i}"]
        return x

    def _accelerated(self, residual: Tensor, z: Tensor, last: tuple[Tensor, Tensor] | None) -> Tensor:
        """What is added to z: the residual f, or f - g (dz + df), g = <df, f> / (<df, df> + RIDGE), per sample."""
        if last is None or not self.anderson:
            return residual
        dz, df = z - last[0], residual - last[1]
        g = dot(df, residual) / (dot(df, df) + RIDGE)
        return residual - g.to(residual.dtype) * (dz + df)


LATE = 0.95  # from this time on, close to pure noise, the conditional half comes first
RIDGE = 1e-4
