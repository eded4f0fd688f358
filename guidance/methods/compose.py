"""Methods around methods: a guidance interval, and a rescaled prediction."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from guidance.contract import Branch, Guidance, Guide, Guided, within
from guidance.methods.ahead import CFGMP
from guidance.methods.cfg import CFG
from guidance.methods.cfgpp import CFGpp
from guidance.methods.conditions import NullTextInversion
from guidance.methods.linear_ag import LinearAG
from guidance.methods.negative import NAG, NASA
from guidance.methods.project import CFGZeroStar
from guidance.methods.scales import Neutral, Scale, ratio, strength, time
from solvers.denoiser import Path
from solvers.errors import UserError
from solvers.families.after import rescaled
from solvers.noise import Noise
from solvers.ranges import NotNegative, Range, Ranged


@dataclass(frozen=True)
class Interval(Ranged):
    """Uses the inner method where low < sigma/alpha <= high, and the plain conditional prediction elsewhere
    (https://arxiv.org/abs/2404.07724).

    The bounds are noise levels sigma/alpha (EDM's sigma); the defaults are the paper's for SDXL. Each network call is
    tested by its own level, so a Heun corrector just below `low` is unguided. Around CFG, a run of T steps costs T
    evaluations, and one more for each step inside the interval.
    """

    method: Guidance = field(default_factory=CFG)
    low: NotNegative = 0.28
    high: Annotated[float, Range(0, infinite=True)] = 5.42
    neutral = Neutral({"low": 0.0, "high": 0.0}, "none")

    @classmethod
    def of_steps(
        cls, levels: Sequence[Noise], start: float = 0.0, stop: float = 1.0, method: Guidance | None = None
    ) -> "Interval":
        """The interval of the steps int(start N) <= i < int(stop N) of a run of N steps down the `levels`, which are
        `LatentModel(pipe).levels(N, height, width)` of a pipeline."""
        if not 0 <= start <= stop <= 1:
            raise UserError(f"steps from {start} to {stop} of a run: give 0 <= start <= stop <= 1")
        steps = len(levels) - 1
        return cls.between_steps(levels, int(start * steps), int(stop * steps), method)

    @classmethod
    def between_steps(cls, levels: Sequence[Noise], first: int, end: int, method: Guidance | None = None) -> "Interval":
        """The interval of the steps first <= i < end, counted from 0, of a run down the `levels`.

        Its bounds lie between the levels of neighbouring steps, in the middle in sigma / (alpha + sigma).
        """
        steps = len(levels) - 1
        if not 0 <= first <= end <= steps:
            raise UserError(f"steps from {first} to {end} of a run of {steps}: give 0 <= first <= end <= {steps}")
        high, low = (float("inf") if i == 0 else _between(levels[i - 1], levels[i]) for i in (first, end))
        bounds = {"low": 0.0, "high": 0.0} if first == end else {"low": 0.0 if end == steps else low, "high": high}
        return cls(method or CFG(), **bounds)

    def __post_init__(self):
        super().__post_init__()
        if self.low > self.high:
            raise UserError(f"the interval from low={self.low} to high={self.high} is empty: low must be at most high")
        reasons: dict[type, str | None] = {
            CFGpp: "it needs the unconditional prediction at every step; drop the Interval and give CFGpp "
            "scale=Between(scale, low, high, outside=0)",
            LinearAG: "its fit needs every step of the run; drop the Interval",
            NullTextInversion: "its embeddings were fitted for one constant scale; drop the Interval",
            CFGZeroStar: None if _no_zero_step(self.method) else "its zeroed step is the run's first; set zero_steps=0",
        }
        refuse(self, reasons)

    @property
    def space(self) -> str:
        return self.method.space

    def guide(self, path: Path, at: Noise) -> Guide:
        if self.low < ratio(at) <= self.high:
            return (yield from self.method.guide(path, at))
        preds = yield {"cond": Branch("cond")}
        return Guided(preds["cond"])


@dataclass(frozen=True)
class Rescale(Ranged):
    """The method's prediction with the conditional one's standard deviation (https://arxiv.org/abs/2305.08891):

    out = phi out std(c) / std(out) + (1 - phi) out,    per sample, of what the network emits (v in the paper).

    phi = 0 is off. Under CFG++ it is the prediction of the clean data that is rescaled.
    """

    method: Guidance = field(default_factory=CFG)
    phi: Annotated[Scale, Range(0, 1)] = 0.7
    space = "output"
    neutral = Neutral({"phi": 0.0}, "cfg")

    def __post_init__(self):
        super().__post_init__()
        nothing = "it has no conditional prediction of its own to compare with"
        moved = "its prediction also carries the latents back to where it moved them"
        refuse(self, {Rescale: "once is enough", NASA: nothing, NAG: nothing, CFGMP: moved})

    def guide(self, path: Path, at: Noise) -> Guide:
        made, preds = yield from within(self.method, path, at)
        phi = strength(self.phi, at, path.x)
        if made.data is not None:
            return made._replace(data=matched(made.data, preds["cond"], phi))
        return made._replace(out=matched(made.out, preds["cond"], phi))


def _between(now: Noise, then: Noise) -> float:
    """sigma / alpha in the middle of two levels' times."""
    middle = (time(now) + time(then)) / 2
    return middle / (1 - middle)


def matched(out: Tensor, cond: Tensor, phi: float | Tensor) -> Tensor:
    """`rescaled`, except that a constant prediction (CFG-Zero*'s zeroed step) is returned unchanged."""
    spread = out.std(dim=list(range(1, out.ndim)), keepdim=True) > 0
    return torch.where(spread, rescaled(out, cond, phi), out)


def refuse(outer: Any, reasons: dict[type, str | None]) -> None:
    """UserError if `reasons` gives a reason against the type of any method inside `outer`, at any depth."""
    for inner in inside(outer):
        if reason := reasons.get(type(inner)):
            raise UserError(f"{type(outer).__name__} cannot hold {type(inner).__name__}: {reason}")


def inside(method: Any) -> Iterator[Any]:
    """The methods that a method holds, from the outermost inwards."""
    while "method" in vars(method):
        method = method.method
        yield method


def moves(method: Any) -> bool:
    """Whether a method, or one that it holds, moves the latents, so that its prediction carries the move too."""
    return any(getattr(m, "moves_latents", False) for m in (method, *inside(method)))


def _no_zero_step(method: Any) -> bool:
    return all(m.zero_steps == 0 for m in (method, *inside(method)) if isinstance(m, CFGZeroStar))
