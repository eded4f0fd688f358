"""What all methods share: scales, neutral settings, measures of a sample.

A scale is a float, a (B,) tensor, or a function of `Noise` that gives either; never of a step index.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import isclose
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from solvers.denoiser import Cond, along
from solvers.errors import Caution, UserError
from solvers.noise import Noise
from solvers.ranges import NotNegative, Range, Ranged

Scale = float | Tensor | Callable[[Noise], float | Tensor]


class Neutral(NamedTuple):
    """The settings of a method that do nothing: `dataclasses.replace(method, **settings)` is the method `equals`."""

    settings: Mapping[str, Any]
    equals: str  # "none", "uncond" or "cfg" (of the same scale)


class Usual(NamedTuple):
    """The scales that a method is used at, and in which convention they are."""

    low: float
    high: float
    says: str


class UnusualScale(Caution):
    """A scale beyond those that a method is used at: that of another convention, as a rule."""


_converting: ContextVar[bool] = ContextVar("converting", default=False)


class Scaled(Ranged):
    """A method with a `scale`; one beyond `usual` is told once for each method, as a warning."""

    usual: ClassVar[Usual] = Usual(0, 30, "1 is no guidance, 7.5 is usual, and a paper's c + s (c - u) is scale 1 + s")

    def __post_init__(self) -> None:
        super().__post_init__()
        scale, usual = vars(self)["scale"], self.usual
        if isinstance(scale, int | float) and not usual.low <= scale <= usual.high and not _converting.get():
            _warn_once(type(self), float(scale))


_told: set[type] = set()


def _warn_once(kind: type[Scaled], scale: float) -> None:
    if kind not in _told:
        _told.add(kind)
        low, high, says = kind.usual
        about = f"{kind.__name__} was given scale {scale:g}, and is used from {low:g} to {high:g}: {says}"
        warnings.warn(about, UnusualScale, stacklevel=4)  # of whoever makes the method


@contextmanager
def converting() -> Iterator[None]:
    """Inside, no scale counts as unusual: it was converted from another convention."""
    token = _converting.set(True)
    try:
        yield
    finally:
        _converting.reset(token)


def strength(scale: Scale, at: Noise, x: Tensor) -> float | Tensor:
    """The scale at a noise level, shaped to multiply x (B, ...).

    Raises ValueError for a tensor that is neither () nor (B,), and for what is not a scale.
    """
    value = scale(at) if callable(scale) else scale
    if isinstance(value, int | float):
        return value
    if not isinstance(value, Tensor):
        raise UserError(f"a scale is a float, a (B,) tensor or a function of Noise, not {type(value).__name__}")
    if value.shape not in ((), x.shape[:1]):
        raise UserError(f"a scale of shape {tuple(value.shape)} for {len(x)} samples; pass a float or a (B,) tensor")
    return along(value, x)


def nonzero(scale: float | Tensor, x: Tensor) -> Tensor | None:
    """The rows (B,) of x that a `strength` acts on; None if it is all of them."""
    rows = torch.as_tensor(scale != 0, device=x.device).view(-1).expand(len(x))
    return None if bool(rows.all()) else rows


def chosen(rows: Tensor | None, there: Tensor, elsewhere: Tensor) -> Tensor:
    """`there` in the rows (B,), all for None, and `elsewhere` in the others."""
    return there if rows is None else torch.where(along(rows, there), there, elsewhere)


def ratio(at: Noise) -> float:
    """k = sigma / alpha, the noise level of EDM and k-diffusion; infinite at pure noise of a flow."""
    return float(at.sigma / at.alpha)


def time(at: Noise) -> float:
    """sigma / (alpha + sigma), which is a flow's time: 0 at data, 1 at pure noise, finite for every level."""
    return float(at.sigma / (at.alpha + at.sigma))


def step_of(times: Sequence[float], at: Noise, owner: str) -> int:
    """Which of the `times` the level is; ValueError if it is none of them."""
    for i, known in enumerate(times):
        if isclose(known, time(at), rel_tol=0, abs_tol=1e-5):
            return i
    raise UserError(
        f"{owner} was made for {len(times)} noise levels, and k = {ratio(at):.4g} is none of them: sample with the"
        " same scheduler and steps"
    )


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample in float64, shaped to multiply a (B, ...)."""
    return along((a.double() * b.double()).flatten(1).sum(1), a)


def root(power: Tensor) -> Tensor:
    """The square root, 0 for what is not positive; its gradient is 0 there, where that of `sqrt` is not finite."""
    positive = power > 0
    return torch.where(positive, torch.where(positive, power, 1.0).sqrt(), 0.0)


def along_direction(a: Tensor, b: Tensor) -> Tensor:
    """The part of a (B, ...) that is parallel to b, per sample: <a, b> / ||b||^2 b, and 0 if b is 0."""
    power = dot(b, b)
    return (dot(a, b) / torch.where(power > 0, power, 1.0)).to(b.dtype) * b


def rows_for(cond: str | Cond, x: Tensor) -> str | Cond:
    """A condition with a row for each sample of x: tensors of one row serve all of them."""
    if isinstance(cond, str):
        return cond
    return {name: value.expand(len(x), *value.shape[1:]) if len(value) == 1 else value for name, value in cond.items()}


@dataclass(frozen=True)
class Between(Ranged):
    """A schedule: `scale` where low < sigma / alpha <= high, `outside` elsewhere."""

    scale: float | Tensor
    low: NotNegative = 0.0
    high: Annotated[float, Range(0, infinite=True)] = float("inf")
    outside: float = 1.0

    def __call__(self, at: Noise) -> float | Tensor:
        return self.scale if self.low < ratio(at) <= self.high else self.outside
