"""Rewards of a whole set of images, as it changes by one item: what DRAGON raises (https://arxiv.org/abs/2504.15217).

Each is a frozen dataclass with three methods, over statistics that it makes itself:

    begin(features (N, D)) -> statistics        replaced(statistics, index, old (D,), new (D,)) -> statistics
    value(statistics) -> Tensor ()              higher is better

so that a candidate for one place in the set costs no look at the rest of it. `SETS` is the list.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rewards.errors import RewardError
from rewards.sets import frechet, mmd, vendi


class SetReward(Protocol):
    """A reward of features (N, D); `Frechet`, `MMD`, `Vendi` and `Mean` are."""

    def begin(self, features: Tensor) -> Any: ...
    def replaced(self, of: Any, index: int, old: Tensor, new: Tensor) -> Any: ...
    def value(self, of: Any) -> Tensor: ...


@dataclass(frozen=True)
class Frechet:
    """Minus the Fréchet distance to exemplars (M, D), in (-inf, 0]: mean and covariance of the set near theirs.

    Both covariances are shrunk by `shrinkage` in [0, 1], which sets of fewer items than dimensions want.
    """

    exemplars: Tensor  # (M, D)
    shrinkage: float = 0.1
    target: frechet.Moments = field(init=False, repr=False)
    root: Tensor = field(init=False, repr=False)  # of the target's covariance

    def __post_init__(self) -> None:
        target = frechet.moments(self.exemplars, self.shrinkage)
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "root", frechet.square_root(target.covariance))

    def begin(self, features: Tensor) -> frechet.Running:
        return frechet.running(features)

    def replaced(self, of: frechet.Running, index: int, old: Tensor, new: Tensor) -> frechet.Running:
        return frechet.replaced(of, old, new)

    def value(self, of: frechet.Running) -> Tensor:
        return -frechet.frechet_of(frechet.moments_of(of, self.shrinkage), self.target, self.root)


@dataclass(frozen=True)
class MMD:
    """Minus the unbiased MMD^2 to exemplars (M, D), by KID's cubic kernel: 0 on average for equal distributions."""

    exemplars: Tensor  # (M, D)
    kernel: mmd.Kernel = mmd.cubic

    def begin(self, features: Tensor) -> mmd.Sums:
        return mmd.sums(features, self.exemplars, self.kernel)

    def replaced(self, of: mmd.Sums, index: int, old: Tensor, new: Tensor) -> mmd.Sums:
        return mmd.replaced(of, index, new, self.kernel)

    def value(self, of: mmd.Sums) -> Tensor:
        return -mmd.mmd_of(of)


@dataclass(frozen=True)
class Vendi:
    """The Vendi score, in [1, N]: how many different items the set holds. It needs no exemplars."""

    def begin(self, features: Tensor) -> vendi.Directions:
        return vendi.directions(features)

    def replaced(self, of: vendi.Directions, index: int, old: Tensor, new: Tensor) -> vendi.Directions:
        return vendi.replaced(of, old, new)

    def value(self, of: vendi.Directions) -> Tensor:
        return vendi.vendi_of_directions(of)


class Total(NamedTuple):
    """The sum of N scores."""

    n: int
    total: Tensor  # ()


@dataclass(frozen=True)
class Mean:
    """The mean of features (N, 1), which are scores of single items."""

    def begin(self, features: Tensor) -> Total:
        return Total(len(features), features.double().sum())

    def replaced(self, of: Total, index: int, old: Tensor, new: Tensor) -> Total:
        return Total(of.n, of.total + new.double().sum() - old.double().sum())

    def value(self, of: Total) -> Tensor:
        return of.total / of.n


def greedy_swap(reward: SetReward, pairs: Tensor, start: Tensor, sweeps: int = 3) -> Tensor:
    """Which item of every pair (P, 2, D) is to be in the set, (P,) of 0 and 1, so that the set's reward R is high.

    From `start` (P,), a sweep goes over the pairs and swaps one if that raises R of the set; it ends after a sweep that
    swaps nothing, or after `sweeps`. R never falls, every pair has one item in the set and one outside, and for `Mean`
    one sweep finds the better of every pair. It stops at a set that no single swap improves (DRAGON,
    https://arxiv.org/abs/2504.15217). Raises ValueError unless pairs are (P, 2, D) and sweeps at least 1.
    """
    if pairs.ndim != 3 or pairs.shape[1] != 2 or start.shape != pairs.shape[:1] or sweeps < 1:
        raise RewardError(
            f"greedy_swap wants pairs (P, 2, D), start (P,) and 1 sweep or more, not {tuple(pairs.shape)}, "
            f"{tuple(start.shape)} and {sweeps}"
        )
    chosen = start.tolist()
    of = reward.begin(pairs[range(len(pairs)), chosen])
    best = float(reward.value(of))
    for _ in range(sweeps):
        before = list(chosen)
        for i, pair in enumerate(pairs):
            candidate = reward.replaced(of, i, pair[chosen[i]], pair[1 - chosen[i]])
            value = float(reward.value(candidate))
            if value > best + ROUNDING * abs(best):
                of, best, chosen[i] = candidate, value, 1 - chosen[i]
        if chosen == before:
            break
    return torch.tensor(chosen)


ROUNDING = 1e-12  # of a value that was updated many times; a swap must gain more

SETS: dict[str, type] = {"frechet": Frechet, "mmd": MMD, "vendi": Vendi, "mean": Mean}
