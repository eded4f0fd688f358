"""The parts of every sampler: the end of a step, and its share of noise."""

from collections.abc import Callable

import torch
from torch import Tensor

from solvers.denoiser import Memory, Path, Prediction
from solvers.errors import UserError
from solvers.noise import Noise

Step = Callable[..., Path]  # step(predict, path, now, then, noise=None)


def renoise(prediction: Prediction, then: Noise) -> Tensor:
    """alpha x0 + sigma eps at another level: the exact step if x0 and eps stood still."""
    return then.alpha * prediction.x0 + then.sigma * prediction.eps


def end(path: Path, x: Tensor, then: Noise, prediction: Prediction, memory: Memory | None = None) -> Path:
    """The path at `then`, where every step ends: CFG++'s shift is added here, once, and the memory is merged."""
    kept = {**path.memory, **(prediction.memory if memory is None else memory)}
    if prediction.shift is None:
        return Path(x, prediction.x0, kept)
    return Path(x + then.alpha * prediction.shift, prediction.x0 + prediction.shift, kept)


def shrinkage(now: Noise, then: Noise) -> Tensor:
    """k' / k = e^-h: the ratio k = sigma / alpha at `then` over that at `now`; 0 from pure noise and to data."""
    return now.alpha * then.sigma / (then.alpha * now.sigma)


def transition(prediction: Prediction, now: Noise, then: Noise, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and deviation () of a stochastic step: eta = 0 is DDIM, eta = 1 is DDPM.

    std^2 = eta^2 sigma'^2 (1 - r^2),    r = (alpha sigma') / (alpha' sigma),
    mean  = alpha' x0 + sqrt(sigma'^2 - std^2) eps     (https://arxiv.org/abs/2010.02502, eq. 12 and 16, for any alpha).
    """
    fresh = eta**2 * (1 - shrinkage(now, then) ** 2).clamp(min=0)
    return renoise(prediction, Noise(then.alpha, then.sigma * (1 - fresh).sqrt())), then.sigma * fresh.sqrt()


def drawn(noise: Tensor | None) -> Tensor:
    """The noise of a stochastic step. Raises ValueError if the caller passed none."""
    if noise is None:
        raise UserError("this step is stochastic: pass noise of the shape of path.x, or use sample()")
    return noise


def shift_of(p: Prediction) -> Tensor:
    """The shift, or zeros that take no memory."""
    return torch.zeros((), dtype=p.x0.dtype, device=p.x0.device).expand_as(p.x0) if p.shift is None else p.shift
