"""Feedback guidance: a scale from how well the conditional model explains the sample so far."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Annotated, Any

import torch
from torch import Tensor

from guidance.contract import Branch, Guide, Guided
from guidance.methods.scales import Neutral, Scale, Scaled, Usual, dot, strength, time
from solvers.denoiser import Memory, Path, along
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.ranges import NotNegative, Range, Share

HIGHEST = 3.0  # of the log-posterior


@dataclass(frozen=True)
class FBG(Scaled):
    """Feedback guidance (https://arxiv.org/abs/2506.06085): each sample's scale follows how well the conditional model
    has explained it so far. Of the clean estimates D,

    out = D_u + lambda (D_c - D_u),    lambda = p / (p - (1 - prior)),    p = e^l,    l = 0 at first.

    After each step from (x, k) to (x', k'), k = sigma / alpha and x / alpha for x, per sample:

    l' = l - tau / (2 V) (||x' - mu_c||^2 - ||x' - mu_u||^2) + delta,    mu = r^2 x + (1 - r^2) D,    r = k' / k,

    V = k'^2 (1 - r^2), in [log((1 - prior) largest / (largest - 1)), 3], where lambda is `largest` at the lower end.
    While the conditional model explains the sample no better than the unconditional one, l falls and lambda rises.

    delta and tau are made for the levels of one run: `FBG.of_levels(LatentModel(pipe).levels(steps, height, width))`.
    scale: lambda + scale - 1 in place of lambda, which inside an interval (`Between`) is the paper's hybrid. The
    feedback is written for steps of one evaluation.
    """

    scale: Scale = 1.0
    prior: Annotated[float, Range(0, 1, above=True)] = 0.95
    largest: Annotated[float, Range(1, above=True)] = 10.0
    delta: Annotated[float, Range()] | None = None
    tau: NotNegative | None = None
    space = "x0"
    usual = Usual(1, 15, "lambda + scale - 1 guides, and lambda is the method's own: 1 adds nothing to it")
    neutral = Neutral({"prior": 1.0, "scale": 1.0}, "none")

    @classmethod
    def of_levels(cls, levels: Sequence[Noise], t0: Share = 0.5, t1: Share = 0.4, **settings: Any) -> "FBG":
        """The method with the paper's constants for a run of N steps down the levels:

        delta = log((1 - prior) 3 / 2) / ((1 - t0) N),    tau = |2 V delta / 10|, V that of the step at t1,

        t counting from 1 at the first step down to 0. At t0 lambda would be 3 if nothing was learnt on the way.
        """
        made, steps = cls(**settings), len(levels) - 1
        if made.prior == 1 or t0 == 1:
            raise UserError(f"FBG has no offset for prior={made.prior:g} and t0={t0:g}: both must be below 1")
        first = min(int((1 - t1) * steps), max(steps - 2, 0))
        _, spread = transition(time(levels[first]), time(levels[first + 1]))
        delta = log(1.5 * (1 - made.prior)) / ((1 - t0) * steps)
        return cls(**{"delta": delta, "tau": abs(2 * spread * delta / 10), **settings})

    def guide(self, path: Path, at: Noise) -> Guide:
        if self.prior < 1 and (self.delta is None or self.tau is None):
            raise UserError(
                "FBG needs delta and tau, which are those of one run: make it by FBG.of_levels(levels), on a pipeline"
                " with levels = LatentModel(pipe).levels(steps, height, width)"
            )
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        c, u = preds["cond"], preds["uncond"]
        likelihood = self._likelihood(path, at)
        p = likelihood.exp()
        weight = along(p / (p - (1 - self.prior)), u).to(u.dtype) + strength(self.scale, at, path.x) - 1
        return Guided(u + weight * (c - u), memory=_noted(path, at, c, u, likelihood))

    def _likelihood(self, path: Path, at: Noise) -> Tensor:
        """l (B,), from what the last step noted."""
        if "fbg.log" not in path.memory or self.prior == 1:
            return torch.zeros(len(path.x), dtype=torch.float64, device=path.x.device)
        noted = {name: path.memory[f"fbg.{name}"] for name in ("x", "cond", "uncond", "time", "log")}
        now, then = float(noted["time"][0].detach()), time(at)
        if then >= now:  # a step that is repeated from a higher level tells nothing
            return noted["log"]
        share, spread = transition(now, then)
        x = path.x / at.alpha - scaled(now, then) * noted["x"]
        gains = [(x - (1 - share) * noted[name]).double() for name in ("cond", "uncond")]
        gap = (dot(gains[0], gains[0]) - dot(gains[1], gains[1])).flatten()
        assert self.delta is not None and self.tau is not None
        risen = noted["log"] - (self.tau / (2 * spread) * gap if spread else 0.0) + self.delta
        return risen.clamp(log((1 - self.prior) * self.largest / (self.largest - 1)), HIGHEST)


def transition(now: float, then: float) -> tuple[float, float]:
    """(r^2, V) of a step between two times sigma / (alpha + sigma): r = k' / k and V = k'^2 (1 - r^2)."""
    k = then / (1 - then)
    share = (k * (1 - now) / now) ** 2
    return share, k**2 * (1 - share)


def scaled(now: float, then: float) -> float:
    """r^2 / (1 - now), which makes of x / (alpha + sigma) the r^2 x of `FBG`; finite at pure noise."""
    return (then / ((1 - then) * now)) ** 2 * (1 - now)


def _noted(path: Path, at: Noise, c: Tensor, u: Tensor, likelihood: Tensor) -> Memory:
    """What the next step looks back to."""
    told = torch.full_like(likelihood, time(at))
    x = path.x / (at.alpha + at.sigma)
    return {"fbg.x": x, "fbg.cond": c, "fbg.uncond": u, "fbg.time": told, "fbg.log": likelihood}
