"""Adaptive guidance: fewer unconditional evaluations (https://arxiv.org/abs/2312.12487)."""

import warnings
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from guidance.contract import Branch, Guide, Guided, Preds
from guidance.methods.scales import Neutral, Scale, Scaled, chosen, dot, strength
from solvers.denoiser import Path
from solvers.errors import Caution
from solvers.noise import Noise
from solvers.ranges import Range, Whole


@dataclass(frozen=True)
class AdaptiveGuidance(Scaled):
    """CFG until the cosine of a sample's two predictions reaches `threshold`; from then on it is conditional only.

    of: the predictions that are compared, "output", what the network emits, or "eps", as the paper has it, whose
    networks emit eps. On a flow the two eps are alike whenever there is much noise, so that the velocities tell more.

    The step at which a sample reaches the threshold has evaluated both; `crossing` says what it uses: "cond", the
    conditional prediction (the paper), or "cfg". A sample costs T + (steps that evaluated both), and stays conditional
    once it has crossed. threshold >= 1 is plain CFG. min_cfg_steps: the earliest step that may cross, counted from 1.
    At pure noise (alpha = 0) both eps equal x, so by them no sample crosses there. The default threshold is the paper's
    for 20 steps; another model needs another one. A Caution says so if it leaves no step guided.
    """

    scale: Scale = 7.5
    threshold: Annotated[float, Range(infinite=True)] = 0.991
    crossing: Literal["cond", "cfg"] = "cond"
    min_cfg_steps: Whole = 1
    of: Literal["output", "eps"] = "output"
    space = "any"
    neutral = Neutral({"threshold": 1.0}, "cfg")

    def guide(self, path: Path, at: Noise) -> Guide:
        nobody = torch.zeros(len(path.x), device=path.x.device)
        settled = path.memory.get("ag.settled", nobody.bool())
        steps = path.memory.get("ag.steps", nobody) + 1
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond", rows=~settled)}
        crossed = settled | self._crosses(preds, at) & (steps >= self.min_cfg_steps)
        if self.crossing == "cond" and bool((crossed & (steps == 1)).all()):
            warnings.warn(UNGUIDED.format(self), Caution, stacklevel=2)
        c = preds["cond"]
        u = chosen(~(crossed if self.crossing == "cond" else settled), preds["uncond"], c)
        out = u + strength(self.scale, at, path.x) * (c - u)  # c itself in the rows where u was set to c
        return Guided(out, memory={"ag.settled": crossed, "ag.steps": steps})

    def _crosses(self, preds: Preds, at: Noise) -> Tensor:
        """Whether each sample crosses now, (B,); False for the rows that were not evaluated."""
        if self.threshold >= 1 or (self.of == "eps" and at.alpha == 0):
            return torch.zeros(len(preds["cond"]), dtype=torch.bool, device=preds["cond"].device)
        return cosine(preds.to("cond", self.of), preds.to("uncond", self.of)) >= self.threshold


UNGUIDED = (
    "AdaptiveGuidance guides no step: the two predictions agree to its threshold={0.threshold:g} at the first one"
    " already; raise the threshold or min_cfg_steps={0.min_cfg_steps}"
)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """cos(a, b) of each sample, (B,), in float64."""
    return (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).flatten()
