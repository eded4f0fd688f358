r"""Noise levels.

Everything rests on one equation,

    x = alpha * x0 + sigma * eps,        eps ~ N(0, I),

and on nothing else: VE has alpha = 1, VP has alpha^2 + sigma^2 = 1, flows have alpha + sigma = 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Noise(NamedTuple):
    """One noise level: two 0-dim float64 CPU tensors, which neither promote float32 data nor synchronise a GPU."""

    alpha: Tensor  # ()
    sigma: Tensor  # ()


def noise(alpha: float | Tensor, sigma: float | Tensor) -> Noise:
    """The level (alpha, sigma), kept in float64."""
    return Noise(torch.as_tensor(alpha, dtype=torch.float64), torch.as_tensor(sigma, dtype=torch.float64))


def flow(t: float | Tensor) -> Noise:
    """Straight path of rectified flow, t in [0, 1] (https://arxiv.org/abs/2209.03003)."""
    return noise(1 - t, t)


def cosine(t: float | Tensor) -> Noise:
    """Variance-preserving cosine path, t in [0, 1] (https://arxiv.org/abs/2102.09672)."""
    angle = torch.as_tensor(t, dtype=torch.float64) * (torch.pi / 2)
    return Noise(torch.cos(angle), torch.sin(angle))


def vp(alpha_bar: float | Tensor) -> Noise:
    """Variance-preserving level of signal power alpha_bar = alpha^2 (diffusers' `alphas_cumprod`)."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
    return Noise(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def grid(schedule: Callable[[Tensor], Noise], steps: int, start: float = 1.0, stop: float = 0.0) -> list[Noise]:
    """The `steps + 1` levels between two times, noisiest first."""
    return [schedule(t) for t in torch.linspace(start, stop, steps + 1, dtype=torch.float64)]


def log_snr(at: Noise) -> Tensor:
    """lambda = log(alpha / sigma), half of the log signal-to-noise ratio: -inf at pure noise, inf at data."""
    return at.alpha.log() - at.sigma.log()
