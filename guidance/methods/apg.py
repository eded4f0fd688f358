"""Adaptive projected guidance (https://arxiv.org/abs/2410.02416), and its mix with CFG in HunyuanImage."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from guidance.contract import Branch, Guide, Guided
from guidance.methods.scales import Neutral, Scale, Scaled, Usual, along_direction, chosen, dot, root, strength
from solvers.denoiser import Path
from solvers.noise import Noise
from solvers.ranges import Positive, Range, Share, Whole

SDXL_LATENT = 4 * 128 * 128  # elements of the latent that the default radius is for
HUNYUAN_LATENT = 64 * 64 * 64  # the same of the mix


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
        steer = projected(bounded(update, self.radius, SDXL_LATENT), c, self.eta)
        out = c + (strength(self.scale, at, path.x) - 1) * steer
        return Guided(out, memory={"apg.update": update} if self.momentum else {})


def bounded(update: Tensor, radius: float | None, elements: int) -> Tensor:
    """`update` (B, ...) cut down to a norm, `radius` for a latent of so many elements; None is no bound."""
    if radius is None:
        return update
    radius = radius * (update[0].numel() / elements) ** 0.5
    norm = root(dot(update, update))
    return (radius / norm.clamp(min=radius)).to(update.dtype) * update


def projected(update: Tensor, c: Tensor, eta: float) -> Tensor:
    """`update` (B, ...) with `eta` of its part along c."""
    parallel = along_direction(update, c)
    return update - parallel + eta * parallel


@dataclass(frozen=True)
class APGMix(Scaled):
    """CFG in the first steps, then projected guidance from the unconditional prediction, as HunyuanImage 2.1 has it:

    out = u + cfg_scale d,  then  out = u + scale (m_orthogonal + eta m_parallel),    d = c - u,

    m = d + momentum * m_last, cut down to the norm r = radius sqrt(elements / 262144), parts along c; of what the
    network emits. The momentum runs from the first step on. With eta = 0 the result less u is at right angles to c;
    eta = 1, momentum = 0, radius = None is CFG of `scale`. `APG` is the paper's own form, from c and in x0.
    """

    scale: Scale = 10.0
    cfg_scale: Scale = 3.5
    cfg_steps: Whole = 6
    eta: Share = 0.0
    momentum: Annotated[float, Range(-1, 1)] = -0.5
    radius: Positive | None = 10.0
    space = "output"
    usual = Usual(1, 60, "it multiplies the projected part from u; CFG's scale of the first steps is cfg_scale")
    neutral = Neutral({"scale": 1.0, "cfg_scale": 1.0, "eta": 1.0, "momentum": 0.0, "radius": None}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        steps = path.memory.get("apg_mix.step", torch.zeros(len(path.x), device=path.x.device))
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        c, u = preds["cond"], preds["uncond"]
        update = c - u
        if "apg_mix.update" in path.memory:
            update = update + self.momentum * path.memory["apg_mix.update"]
        steer = projected(bounded(update, self.radius, HUNYUAN_LATENT), c, self.eta)
        late = u + strength(self.scale, at, path.x) * steer
        out = chosen(steps >= self.cfg_steps, late, u + strength(self.cfg_scale, at, path.x) * (c - u))
        return Guided(out, memory={"apg_mix.step": steps + 1, "apg_mix.update": update})
