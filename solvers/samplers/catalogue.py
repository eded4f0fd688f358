"""Samplers: functions that carry a path from one noise level down to the next.

    step(predict, path, now, then, noise=None) -> Path

`SAMPLERS` is the list, `ORDERS` says how fast each converges, `STOCHASTIC` which take noise. Each is written in
(x0, eps) and divides by no alpha and by no sigma at `then`, so that one function serves VP, VE and flow models from
pure noise (alpha = 0) to data (sigma = 0). What a step remembers is in the path, batch-first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from solvers.denoiser import Path, Predict, widen
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.samplers.multistep import ab2, deis, dpmpp_2m, sde_dpmpp_2m, unipc_1, unipc_2
from solvers.samplers.singlestep import dpm_2, dpm_3, edm_heun, heun, midpoint, rk4
from solvers.samplers.step import Step, drawn, end, renoise, transition

Generators = torch.Generator | Sequence[torch.Generator] | None


def euler(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """DDIM, which is Euler's method in any of the coordinates (https://arxiv.org/abs/2010.02502)."""
    p = predict(replace(path, then=then), now)
    return end(path, renoise(p, then), then, p)


def ancestral(
    predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None, *, eta: float = 1.0
) -> Path:
    """DDPM, or DDIM with `eta` (https://arxiv.org/abs/2006.11239); `partial(ancestral, eta=0.5)` is a step too."""
    noise = drawn(noise)
    p = predict(path, now)
    mean, std = transition(p, now, then, eta)
    return end(path, mean + std * noise, then, p)


SAMPLERS: dict[str, Step] = {
    f.__name__: f
    for f in (
        *(euler, heun, edm_heun, midpoint, rk4, dpm_2, dpm_3),
        *(dpmpp_2m, deis, ab2, unipc_1, unipc_2),
        *(ancestral, sde_dpmpp_2m),
    )
}
ORDERS = {  # global; in distribution for a stochastic step
    "euler": 1,
    "heun": 2,
    "edm_heun": 2,
    "midpoint": 2,
    "rk4": 4,
    "dpm_2": 2,
    "dpm_3": 3,
    "dpmpp_2m": 2,
    "deis": 2,
    "ab2": 2,
    "unipc_1": 2,
    "unipc_2": 3,
    "ancestral": 1,
    "sde_dpmpp_2m": 2,
}
STOCHASTIC: set[Step] = {ancestral, sde_dpmpp_2m}


def is_stochastic(step: Any) -> bool:
    """Whether a step takes noise; `partial` is looked through."""
    return is_stochastic(step.func) if isinstance(step, partial) else step in STOCHASTIC


def unit_normal(shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Unit normal numbers (B, ...), those that a diffusers pipeline draws: by one generator, or each sample's by its
    own; by a generator on the CPU, the same for every device. UserError for one of another device."""
    one_each = list(generator) if isinstance(generator, Sequence) else [generator]
    first = one_each[0]
    if first is not None and first.device.type not in (device.type, "cpu"):
        raise UserError(f"a generator on {first.device} draws no numbers for {device}: give one there, or on the CPU")
    own = device if first is None or first.device.type == device.type else first.device
    if len(one_each) == 1:
        return torch.randn(tuple(shape), generator=first, device=own, dtype=dtype).to(device)
    drawn = [torch.randn((1, *shape[1:]), generator=g, device=own, dtype=dtype) for g in one_each[: shape[0]]]
    return torch.cat(drawn).to(device)


def gaussian(x: Tensor, generator: Generators = None) -> Tensor:
    """Noise like x, from one generator or from one per sample, on any device."""
    return unit_normal(x.shape, generator, x.device, x.dtype)


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
