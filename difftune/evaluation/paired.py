"""Two runs on the same prompts: the mean difference, a test that it is 0, how often the later one wins; and several
such tests at once.

The prompt is the unit, since the images of a prompt are correlated: `now` and `then` hold one mean for each prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from difftune.evaluation.intervals import BOOTSTRAP_SEED, RESAMPLES, Estimate, estimate
from difftune.evaluation.win_rate import WinRate, win_rate

LEVEL = 0.05  # a difference counts if its interval excludes 0 and its p value is at most this
EXACT = 20  # prompts up to which all flips of signs are counted


@dataclass(frozen=True)
class Change:
    """How the prompts' means have changed."""

    difference: Estimate
    p: float  # of "the difference of a prompt is as likely to be -d as d"
    wins: WinRate  # the prompts that became better


def compare_prompts(
    now: Sequence[float],
    then: Sequence[float],
    bounds: tuple[float, float] | None = None,
    higher_is_better: bool = True,
) -> Change:
    """The change from `then` to `now`, paired by prompt; a prompt that stayed the same is a win for half.

    bounds: of a prompt's difference, if it has any.
    """
    change = np.asarray(now, np.float64) - np.asarray(then, np.float64)
    better = change if higher_is_better else -change
    wins = win_rate(int((better > 0).sum()), int((better == 0).sum()), len(change))
    return Change(estimate(change, bounds), sign_flip_p(change), wins)


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """The two-sided p value of a mean difference under random signs: P(|sum of +-d| >= |sum of d|).

    All 2^n signs are counted for n <= 20. Else 10,000 are drawn, and the one that was observed counts among them, so
    that p is at least 1 / 10,001 and valid (Phipson & Smyth 2010, https://arxiv.org/abs/1603.05766).
    """
    d = np.asarray(differences, np.float64)
    least = abs(d.sum()) * (1 - 1e-12)  # equal sums are equal whatever the order of their terms
    if len(d) <= EXACT:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= least).mean())
    random = np.random.default_rng(BOOTSTRAP_SEED)
    parts = [random.choice([-1.0, 1.0], size=(100, len(d))) @ d for _ in range(RESAMPLES // 100)]
    return float((1 + (np.abs(np.concatenate(parts)) >= least).sum()) / (1 + RESAMPLES))


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """The p values adjusted for their number, by Holm (1979, https://www.jstor.org/stable/4615733): at a level of 5 %,
    the chance that any true null hypothesis is rejected is at most 5 %.

    In rising order, p_i becomes the largest of min(1, (n - j) p_j) over j <= i, counted from 0.
    """
    found, largest = dict[str, float](), 0.0
    for i, name in enumerate(sorted(ps, key=lambda name: ps[name])):
        largest = max(largest, min(1.0, (len(ps) - i) * ps[name]))
        found[name] = largest
    return {name: found[name] for name in ps}
