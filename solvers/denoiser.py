"""The five nouns that every solver, guidance method and recipe is written in."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from solvers.errors import UserError
from solvers.noise import Noise, noise, numbers

Cond = Mapping[str, Tensor]  # what a network is conditioned on; every value is batch-first
Memory = Mapping[str, Tensor]  # what survives a step; every value is batch-first, keys carry their owner ("apg.update")

SPACES = ("eps", "v", "x0", "flow")


class Prediction(NamedTuple):
    """A prediction at (x, at): x = alpha * x0 + sigma * eps holds."""

    x0: Tensor  # (B, ...)
    eps: Tensor  # (B, ...)
    shift: Tensor | None = None  # CFG++ only: x0(guided) - x0(unguided)
    memory: Memory = {}


@runtime_checkable
class Denoiser(Protocol):
    """A diffusion model; `prediction_type` is the space of its raw output: eps, v, x0 or flow."""

    @property
    def prediction_type(self) -> str: ...
    def __call__(self, x: Tensor, at: Noise, cond: Cond) -> Prediction: ...
    def patched(self, name: str) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class Path:
    """A batch of trajectories part-way from noise to data.

    All that survives from one step to the next is here and is batch-first, so `path[index]` is a complete
    resampling of the batch. `then` is no part of that: within a step of Euler's method it is the level where the step
    ends, which a guidance method may look ahead to; within any other step, and between steps, it is None.
    """

    x: Tensor  # (B, ...)
    x0: Tensor | None = None  # (B, ...), the last clean estimate
    memory: Memory = field(default_factory=dict)
    then: Noise | None = None

    def __getitem__(self, index: Tensor | slice) -> "Path":
        x0 = None if self.x0 is None else self.x0[index]
        return Path(self.x[index], x0, {k: v[index] for k, v in self.memory.items()}, self.then)

    def detach(self) -> "Path":
        """The same numbers, without a gradient."""
        x0 = None if self.x0 is None else self.x0.detach()
        return Path(self.x.detach(), x0, {k: v.detach() for k, v in self.memory.items()}, self.then)


class Shape(NamedTuple):
    """The layout of a path's tensors, and what it holds beside them."""

    has_x0: bool = False
    keys: tuple[str, ...] = ()
    then: Noise | None = None


def pack(path: Path) -> tuple[list[Tensor], Shape]:
    """A path's tensors, x first."""
    x0 = [] if path.x0 is None else [path.x0]
    return [path.x, *x0, *path.memory.values()], Shape(path.x0 is not None, tuple(path.memory), path.then)


def unpack(tensors: Sequence[Tensor], shape: Shape) -> Path:
    x0 = tensors[1] if shape.has_x0 else None
    return Path(tensors[0], x0, dict(zip(shape.keys, tensors[1 + shape.has_x0 :], strict=True)), shape.then)


class Predict(Protocol):
    """A denoiser bound to its conditions, guided or not: what a solver calls."""

    @property
    def tensors(self) -> Sequence[Tensor]: ...  # the conditions and parameters that the prediction depends on
    def __call__(self, path: Path, at: Noise) -> Prediction: ...


def lines(space: str, at: Noise) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(p, q, m, n) with x0 = p * x + q * out and eps = m * x + n * out, for an output in `space`.

    eps at alpha = 0 gives no x0 and x0 at sigma = 0 gives no eps: those lines are infinite there.
    """
    alpha, sigma = at
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if space == "eps":
        return 1 / alpha, -sigma / alpha, zero, one
    if space == "x0":
        return zero, one, 1 / sigma, -alpha / sigma
    if space == "v":  # v = (alpha * eps - sigma * x0), exact for any alpha, sigma
        power = alpha**2 + sigma**2
        return alpha / power, -sigma / power, sigma / power, alpha / power
    if space == "flow":  # u = eps - x0
        total = alpha + sigma
        return 1 / total, -sigma / total, 1 / total, alpha / total
    raise UserError(f"no prediction type {space!r}; known: {', '.join(SPACES)}")


def target(space: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The output in `space` that stands for x0 and eps, as a perfect network gives it: the inverse of `lines`."""
    return {
        "eps": lambda: eps,
        "x0": lambda: x0,
        "v": lambda: alpha * eps - sigma * x0,
        "flow": lambda: eps - x0,
    }[space]()


def factors(space: str, at: Noise) -> Sequence[Any]:
    """`lines` as Python floats, which multiply a tensor to the same bits and are computed once for each level; as
    tensors where a float would not do."""
    values = numbers(at)
    return lines(space, at) if values is None else _factors(space, *values)


@lru_cache(maxsize=2**12)
def _factors(space: str, alpha: float, sigma: float) -> tuple[float, ...]:
    return tuple(float(factor) for factor in lines(space, noise(alpha, sigma)))


def predicted(space: str, x: Tensor, at: Noise, out: Tensor, memory: Memory | None = None) -> Prediction:
    """The prediction that a raw output in `space` stands for, in float32 or better; x0 and eps each directly."""
    p, q, m, n = factors(space, at)
    x, out = widen(x), widen(out)
    return Prediction(p * x + q * out, m * x + n * out, memory=memory or {})


def widen(x: Tensor) -> Tensor:
    """x in float32 or better."""
    return x if x.dtype == torch.float64 else x.float()


def along(value: Tensor, x: Tensor) -> Tensor:
    """A per-sample value (B,) or scalar (), shaped to multiply x (B, ...)."""
    return value.to(x.device).view(-1, *[1] * (x.ndim - 1)) if value.ndim else value
