"""A scale that follows how large the guidance is: MAMBO-G."""

from dataclasses import dataclass

import torch

from guidance.contract import Branch, Guide, Guided
from guidance.methods.scales import Neutral, Scale, Scaled, Usual, dot, root, strength
from solvers.denoiser import Path
from solvers.noise import Noise
from solvers.ranges import NotNegative


@dataclass(frozen=True)
class MamboG(Scaled):
    """MAMBO-G (https://arxiv.org/abs/2508.03442): CFG whose scale falls where the gap is large against the prediction.
    Of what the network emits and per sample,

    out = u + w (c - u),    w = 1 + (scale - 1) exp(-alpha ||c - u|| / ||u||).

    alpha = 0 is CFG. A high scale is damped where the gap is large against the prediction, as at the first steps.
    """

    scale: Scale = 10.0
    alpha: NotNegative = 8.0
    space = "output"
    usual = Usual(0, 60, "CFG's convention; 10 is usual, since it is damped by exp(-alpha ||c - u|| / ||u||)")
    neutral = Neutral({"scale": 1.0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        c, u = preds["cond"], preds["uncond"]
        gap = c - u
        rho = root(dot(gap, gap) / dot(u, u))
        damping = torch.exp(-(self.alpha * rho).nan_to_num(0.0)).to(u.dtype)  # 0 / 0 and 0 * inf: nothing to damp
        return Guided(u + (1 + (strength(self.scale, at, path.x) - 1) * damping) * gap)
