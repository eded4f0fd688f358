"""Means with 95 % intervals that keep the images of a prompt together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from scipy.special import ndtri

from difftune.errors import UserError
from rewards.world import grammar

Z95 = float(ndtri(0.975))  # a quantile of the standard normal
RESAMPLES = 10_000
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Result:
    """The oracle's word on one image."""

    prompt: str
    category: str
    seed: int
    holds: bool


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    score: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves out 0, as that of a difference that counts does."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.score:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: Sequence[float] | np.ndarray, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Estimate:
    """The mean of independent `values` in `bounds`, with a percentile bootstrap interval.

    Each resample draws n - 1 of the n values, which makes the bootstrap's variance the unbiased one (Rao & Wu 1988).
    Where all values agree a bootstrap has no width: then see `_unanimous`. bounds: None for values without any, of
    which a single one says nothing about others, and several that agree say that there is no spread.
    """
    x = np.asarray(values, np.float64)
    if len(x) == 0:
        raise UserError("an interval needs at least one prompt")
    if np.ptp(x) == 0 and bounds is None:
        return Estimate(float(x[0]), *((-inf, inf) if len(x) == 1 else (float(x[0]), float(x[0]))))
    if np.ptp(x) == 0 and bounds is not None:
        return _unanimous(float(x[0]), len(x), bounds)
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(len(x), size=(RESAMPLES, len(x) - 1))
    low, high = np.quantile(x[draws].mean(1), (0.025, 0.975))
    return Estimate(float(x.mean()), float(low), float(high))


def _unanimous(value: float, n: int, bounds: tuple[float, float]) -> Estimate:
    """The interval of n values that agree: a share of at most w of all others differs, and may lie at either bound.

    w = z^2 / (n + z^2) is the upper end of Wilson's interval (1927) for a share of which none was seen among n, so that
    at a score of 0 or 1 this is Wilson's interval itself.
    """
    w = Z95**2 / (n + Z95**2)
    return Estimate(value, value - (value - bounds[0]) * w, value + (bounds[1] - value) * w)


def differences(results: Sequence[Result], baseline: Sequence[Result]) -> dict[str, Estimate]:
    """This minus the baseline, paired: over the (prompt, seed) that both have."""
    before = {(r.prompt, r.seed): r.holds for r in baseline}
    paired = [r for r in results if (r.prompt, r.seed) in before]
    if not paired:
        raise UserError("the baseline shares no prompt and seed with this run: evaluate both with the same --seed")
    return {name: estimate(by_prompt(group, before), bounds=(-1.0, 1.0)) for name, group in by_category(paired)}


def by_category(results: Sequence[Result]) -> Iterable[tuple[str, list[Result]]]:
    yield "overall", list(results)
    for name in grammar.ALL_CATEGORIES:
        if group := [r for r in results if r.category == name]:
            yield name, group


def by_prompt(results: Sequence[Result], before: Mapping[tuple[str, int], bool] | None = None) -> list[float]:
    """Per prompt, the mean over its images of `holds`, less what held before."""
    values: dict[str, list[float]] = {}
    for r in results:
        values.setdefault(r.prompt, []).append(float(r.holds) - (float(before[r.prompt, r.seed]) if before else 0.0))
    return [float(np.mean(v)) for v in values.values()]
