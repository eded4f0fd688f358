r"""Noise levels.

Everything rests on one equation,

    x = alpha * x0 + sigma * eps,        eps ~ N(0, I),

and on nothing else: VE has alpha = 1, VP has alpha^2 + sigma^2 = 1, flows have alpha + sigma = 1.
"""

from collections.abc import Callable
from functools import lru_cache
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


def numbers(at: Noise) -> tuple[float, float] | None:
    """(alpha, sigma) as Python floats, by which what depends on the level alone can be kept; None for a level that
    differs by sample, has a gradient or is not in float64."""
    plain = not any(value.ndim or value.requires_grad or value.dtype != torch.float64 for value in at)
    return (at.alpha.item(), at.sigma.item()) if plain else None


def flow(t: float | Tensor) -> Noise:
    """Straight path of rectified flow, t in [0, 1] (https://arxiv.org/abs/2209.03003)."""
    return noise(1 - t, t)


def cosine(t: float | Tensor) -> Noise:
    """Variance-preserving cosine path, t in [0, 1] (https://arxiv.org/abs/2102.09672)."""
    angle = torch.as_tensor(t, dtype=torch.float64) * (torch.pi / 2)
    return Noise(torch.cos(angle), torch.sin(angle))


def angle(a: float | Tensor) -> Noise:
    """TrigFlow's level (cos a, sin a), a in [0, pi / 2] (https://arxiv.org/abs/2410.11081); pure noise from there."""
    a = torch.as_tensor(a, dtype=torch.float64).cpu()
    noisy = a >= torch.pi / 2
    return Noise(a.cos().masked_fill(noisy, 0.0), a.sin().masked_fill(noisy, 1.0))


def vp(alpha_bar: float | Tensor) -> Noise:
    """Variance-preserving level of signal power alpha_bar = alpha^2 (diffusers' `alphas_cumprod`)."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
    return Noise(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def grid(schedule: Callable[[Tensor], Noise], steps: int, start: float = 1.0, stop: float = 0.0) -> list[Noise]:
    """The `steps + 1` levels between two times, noisiest first."""
    return [schedule(t) for t in torch.linspace(start, stop, steps + 1, dtype=torch.float64)]


def normalised(prediction_type: str, at: Noise) -> tuple[float | Tensor, Noise]:
    """(s, the level divided by s) with s = sqrt(alpha^2 + sigma^2), or alpha + sigma for a flow: the coordinates that a
    network of that `prediction_type` is trained in. Computed once for each level, as a float, where it can be."""
    values = numbers(at)
    return _divided(prediction_type, at) if values is None else _kept(prediction_type, *values)


def _divided(prediction_type: str, at: Noise) -> tuple[Tensor, Noise]:
    scale = at.alpha + at.sigma if prediction_type == "flow" else torch.hypot(at.alpha, at.sigma)
    return scale, Noise(at.alpha / scale, at.sigma / scale)


@lru_cache(maxsize=2**12)
def _kept(prediction_type: str, alpha: float, sigma: float) -> tuple[float, Noise]:
    with torch.inference_mode(False), torch.device("cpu"):  # it serves a run that is differentiated, on any device
        scale, own = _divided(prediction_type, noise(alpha, sigma))
    return float(scale), own


def log_snr(at: Noise) -> Tensor:
    """lambda = log(alpha / sigma), half of the log signal-to-noise ratio: -inf at pure noise, inf at data."""
    return at.alpha.log() - at.sigma.log()
