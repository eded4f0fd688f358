"""Samplers: functions that carry a path from one noise level down to the next.

    step(predict, path, now, then, noise=None) -> Path

Each is written in (x0, eps) and divides by no alpha and by no sigma at `then`, so that one function serves VP, VE and
flow models from pure noise (alpha = 0) to data (sigma = 0). What a step remembers is in the path, batch-first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from solvers.denoiser import Memory, Path, Predict, Prediction, along, widen
from solvers.noise import Noise, log_snr

Step = Callable[..., Path]  # step(predict, path, now, then, noise=None)
Generators = torch.Generator | Sequence[torch.Generator] | None


def renoise(prediction: Prediction, then: Noise) -> Tensor:
    """alpha x0 + sigma eps at another level: the exact step if x0 and eps stood still."""
    return then.alpha * prediction.x0 + then.sigma * prediction.eps


def end(path: Path, x: Tensor, then: Noise, prediction: Prediction, memory: Memory | None = None) -> Path:
    """The path at `then`, where every step ends: CFG++'s shift is added here, once, and the memory is merged."""
    kept = {**path.memory, **(prediction.memory if memory is None else memory)}
    if prediction.shift is None:
        return Path(x, prediction.x0, kept)
    return Path(x + then.alpha * prediction.shift, prediction.x0 + prediction.shift, kept)


def euler(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """DDIM, which is Euler's method in any of the coordinates (https://arxiv.org/abs/2010.02502)."""
    p = predict(path, now)
    return end(path, renoise(p, then), then, p)


def heun(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """Algorithm 1 of EDM (https://arxiv.org/abs/2206.00364), on the straight path of a flow.

    With w = x / (alpha + sigma) and tau = sigma / (alpha + sigma) the probability flow is dw/dtau = u = eps - x0, which
    the trapezoid rule follows; nothing divides by alpha. The last step, to sigma = 0, is Euler's.

    Each stage's shift s equals guidance of x0 by s / (1 - k'/k), k = sigma/alpha, in both stages. In tau, that
    makes the shift of the whole step (s1 + (tau/tau') s2) / 2.
    """
    p = predict(path, now)
    first = renoise(p, then)
    if then.sigma == 0:
        return end(path, first, then, p)
    q = predict(replace(path, x=first + then.alpha * _shift(p)), then)
    t, t_then = _tau(now), _tau(then)
    bend = (q.eps - q.x0) - (p.eps - p.x0)
    x = first + (then.alpha + then.sigma) * (t_then - t) / 2 * bend
    shift = (_shift(p) + t / t_then * _shift(q)) / 2
    return end(path, x + then.alpha * (shift - _shift(q)), then, q, p.memory)  # `end` adds q's own


def dpmpp_2m(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """DPM-Solver++(2M) (https://arxiv.org/abs/2211.01095): x0 is extrapolated in lambda = log(alpha / sigma),

    x' = (sigma'/sigma) x + alpha' (1 - e^-h) (x0 + h / (2 h_last) (x0 - x0_last)),      h = lambda' - lambda,

    first order on the first step and on the last, to sigma = 0.
    """
    p = predict(path, now)
    x, at = renoise(p, then), log_snr(now)
    if "dpmpp.x0" in path.memory and then.sigma > 0:
        half = (log_snr(then) - at) / 2 / (at - path.memory["dpmpp.lambda"])  # (B,)
        weight = then.alpha - now.alpha * then.sigma / now.sigma
        x = x + along(weight * half, x) * (p.x0 - path.memory["dpmpp.x0"])
    own = {"dpmpp.x0": p.x0, "dpmpp.lambda": at.to(x).expand(len(x))}
    return end(path, x, then, p, {**p.memory, **own})


def transition(prediction: Prediction, now: Noise, then: Noise, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and deviation () of a stochastic step: eta = 0 is DDIM, eta = 1 is DDPM.

    std^2 = eta^2 sigma'^2 (1 - r^2),    r = (alpha sigma') / (alpha' sigma),
    mean  = alpha' x0 + sqrt(sigma'^2 - std^2) eps     (https://arxiv.org/abs/2010.02502, eq. 12 and 16, for any alpha).
    """
    r = now.alpha * then.sigma / (then.alpha * now.sigma)
    fresh = eta**2 * (1 - r**2).clamp(min=0)
    return renoise(prediction, Noise(then.alpha, then.sigma * (1 - fresh).sqrt())), then.sigma * fresh.sqrt()


def ancestral(
    predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None, *, eta: float = 1.0
) -> Path:
    """DDPM, or DDIM with `eta` (https://arxiv.org/abs/2006.11239); `partial(ancestral, eta=0.5)` is a step too."""
    if noise is None:
        raise ValueError("ancestral steps are stochastic: pass noise of the shape of path.x, or use sample()")
    p = predict(path, now)
    mean, std = transition(p, now, then, eta)
    return end(path, mean + std * noise, then, p)


SAMPLERS: dict[str, Step] = {f.__name__: f for f in (euler, heun, dpmpp_2m, ancestral)}
ORDERS = {"euler": 1, "heun": 2, "dpmpp_2m": 2, "ancestral": 1}  # global; in distribution for a stochastic step
STOCHASTIC: set[Step] = {ancestral}


def is_stochastic(step: Any) -> bool:
    """Whether a step takes noise; `partial` is looked through."""
    return is_stochastic(step.func) if isinstance(step, partial) else step in STOCHASTIC


def gaussian(x: Tensor, generator: Generators = None) -> Tensor:
    """Noise like x, from one generator or from one per sample, on any device."""
    one_each = list(generator) if isinstance(generator, Sequence) else generator
    return randn_tensor(x.shape, one_each, device=x.device, dtype=x.dtype)


def sample(
    step: Step, predict: Predict, path: Path, levels: Sequence[Noise], generator: Generators = None
) -> Iterator[Path]:
    """The path at every level after the first: `*_, last = sample(...)` for the end alone.

    Noise is drawn only for stochastic steps. Starts from any path, memory included.
    """
    path = replace(path, x=widen(path.x))
    for now, then in pairwise(levels):
        noise = gaussian(path.x, generator) if is_stochastic(step) else None
        path = step(predict, path, now, then, noise)
        yield path


def _shift(p: Prediction) -> Tensor:
    return torch.zeros((), device=p.x0.device) if p.shift is None else p.shift


def _tau(at: Noise) -> Tensor:
    return at.sigma / (at.alpha + at.sigma)
