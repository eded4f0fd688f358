"""Means with 95 % intervals that keep the images of a prompt together."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from difftune.errors import UserError
from rewards.world import grammar

Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile


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
        """Whether a difference counts."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.score:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927): never empty, also at 0 and 1."""
    p, z2 = successes / trials, Z95**2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def estimate(values: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0)) -> Estimate:
    """The mean of independent `values` in `bounds`, with a percentile bootstrap interval.

    Each resample draws n - 1 of the n values, which makes the bootstrap's variance the unbiased one (Rao & Wu 1988).
    Where all values agree a bootstrap has no width: then see `_unanimous`.
    """
    x = np.asarray(values, np.float64)
    if len(x) == 0:
        raise UserError("an interval needs at least one prompt")
    if np.ptp(x) == 0:
        return _unanimous(float(x[0]), len(x), bounds)
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(len(x), size=(RESAMPLES, len(x) - 1))
    low, high = np.quantile(x[draws].mean(1), (0.025, 0.975))
    return Estimate(float(x.mean()), float(low), float(high))


def _unanimous(value: float, n: int, bounds: tuple[float, float]) -> Estimate:
    """n values that agree: of all others at most a share w differs, Wilson's bound for 0 of n, and may lie at a bound.

    At a score of 0 or 1 this is Wilson's interval itself.
    """
    w = wilson(0, n)[1]
    return Estimate(value, value - (value - bounds[0]) * w, value + (bounds[1] - value) * w)


def differences(results: Sequence[Result], baseline: Sequence[Result]) -> dict[str, Estimate]:
    """This minus the baseline, paired: over the (prompt, seed) that both have."""
    before = {(r.prompt, r.seed): r.holds for r in baseline}
    paired = [r for r in results if (r.prompt, r.seed) in before]
    if not paired:
        raise UserError("the baseline shares no prompt and seed with this run: evaluate both with the same --seed")
    return {name: estimate(_by_prompt(group, before), bounds=(-1.0, 1.0)) for name, group in _groups(paired)}


def _groups(results: Sequence[Result]) -> Iterable[tuple[str, list[Result]]]:
    yield "overall", list(results)
    for name in grammar.ALL_CATEGORIES:
        if group := [r for r in results if r.category == name]:
            yield name, group


def _by_prompt(results: Sequence[Result], before: Mapping[tuple[str, int], bool] | None = None) -> list[float]:
    """Per prompt, the mean over its images of `holds`, less what held before."""
    values: dict[str, list[float]] = {}
    for r in results:
        values.setdefault(r.prompt, []).append(float(r.holds) - (float(before[r.prompt, r.seed]) if before else 0.0))
    return [float(np.mean(v)) for v in values.values()]
