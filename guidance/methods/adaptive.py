"""Adaptive guidance: fewer unconditional evaluations (https://arxiv.org/abs/2312.12487)."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from guidance.contract import Branch, Guide, Guided, Preds
from guidance.methods.scales import Neutral, Scale, Scaled, chosen, dot, strength
from solvers.denoiser import Path
from solvers.noise import Noise
from solvers.ranges import Range, Whole


@dataclass(frozen=True)
class AdaptiveGuidance(Scaled):
    """CFG until cos(eps_c, eps_u) of a sample reaches `threshold`; from then on that sample is conditional only.

    The step that crosses has evaluated both; it uses `crossing`: the conditional prediction (the paper) or CFG. So a
    sample costs T + (steps that evaluated both). The latch never reopens. threshold >= 1 is off, which is CFG.
    min_cfg_steps: the earliest step that may cross, counted from 1. At pure noise (alpha = 0) both eps are x itself,
    so a sample never crosses there. The default threshold is the paper's for 20 steps; it does not carry over between
    models.
    """

    scale: Scale = 7.5
    threshold: Annotated[float, Range(infinite=True)] = 0.991
    crossing: Literal["cond", "cfg"] = "cond"
    min_cfg_steps: Whole = 1
    space = "any"
    neutral = Neutral({"threshold": 1.0}, "cfg")

    def guide(self, path: Path, at: Noise) -> Guide:
        nobody = torch.zeros(len(path.x), device=path.x.device)
        settled = path.memory.get("ag.settled", nobody.bool())
        steps = path.memory.get("ag.steps", nobody) + 1
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond", rows=~settled)}
        crossed = settled | self._crosses(preds, at) & (steps >= self.min_cfg_steps)
        c = preds["cond"]
        u = chosen(~(crossed if self.crossing == "cond" else settled), preds["uncond"], c)
        out = u + strength(self.scale, at, path.x) * (c - u)  # c itself where u is
        return Guided(out, memory={"ag.settled": crossed, "ag.steps": steps})

    def _crosses(self, preds: Preds, at: Noise) -> Tensor:
        """(B,), False in the rows that were not evaluated."""
        if self.threshold >= 1 or at.alpha == 0:
            return torch.zeros(len(preds["cond"]), dtype=torch.bool, device=preds["cond"].device)
        return cosine(preds.to("cond", "eps"), preds.to("uncond", "eps")) >= self.threshold


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """cos(a, b) of each sample, (B,), in float64."""
    return (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).flatten()
