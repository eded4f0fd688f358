"""Adaptive projected guidance (https://arxiv.org/abs/2410.02416)."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from guidance.contract import Branch, Guide, Guided
from guidance.methods.scales import Neutral, Scale, Scaled, Usual, along_direction, dot, strength
from solvers.denoiser import Path
from solvers.noise import Noise
from solvers.ranges import Positive, Range, Share

SDXL_LATENT = 4 * 128 * 128  # elements of the latent that the default radius is for


@dataclass(frozen=True)
class APG(Scaled):
    """CFG of the clean estimates, whose difference g = x0_c - x0_u has momentum, a bounded norm, and loses the part
    that is parallel to x0_c and saturates:

    m = g + momentum * m_last,    m = m min(1, r / ||m||),    out = x0_c + (scale - 1) (m_orthogonal + eta m_parallel).

    r = radius sqrt(elements / 65536), so that `radius` is the paper's for a latent of SDXL; None is no bound. The
    defaults are the paper's for SDXL. eta = 1, momentum = 0, radius = None is CFG.
    """

    scale: Scale = 15.0
    eta: Share = 0.0
    momentum: Annotated[float, Range(-1, 1)] = -0.5
    radius: Positive | None = 15.0
    space = "x0"
    usual = Usual(1, 60, "CFG's convention, and about twice CFG's number, as 15 for 7.5")
    neutral = Neutral({"scale": 1.0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        c, u = preds.to("cond", "x0"), preds.to("uncond", "x0")
        update = c - u
        if self.momentum and "apg.update" in path.memory:
            update = update + self.momentum * path.memory["apg.update"]
        bounded = self._bounded(update)
        parallel = along_direction(bounded, c)
        steer = bounded - parallel + self.eta * parallel
        out = c + (strength(self.scale, at, path.x) - 1) * steer
        return Guided(out, memory={"apg.update": update} if self.momentum else {})

    def _bounded(self, update: Tensor) -> Tensor:
        if self.radius is None:
            return update
        radius = self.radius * (update[0].numel() / SDXL_LATENT) ** 0.5
        norm = dot(update, update).sqrt()
        return torch.where(norm > radius, radius / norm, 1.0).to(update.dtype) * update
