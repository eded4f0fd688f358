"""Maximum mean discrepancy between two sets of features, and KID (https://arxiv.org/abs/1801.01401)."""

import math
from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from rewards.errors import RewardError

Kernel = Callable[[Tensor, Tensor], Tensor]  # (N, D), (M, D) -> (N, M)


def cubic(a: Tensor, b: Tensor) -> Tensor:
    """KID's kernel (a . b / D + 1)^3."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian(bandwidth: float) -> Kernel:
    """exp(-|a - b|^2 / (2 bandwidth^2))."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        return torch.exp(-squares.clamp(min=0) / (2 * bandwidth**2))

    return kernel


class Sums(NamedTuple):
    """The sums of MMD^2 of two sets, in float64: replacing an item needs no other pairs again."""

    a: Tensor  # (N, D)
    b: Tensor  # (M, D)
    aa: Tensor  # sum of k over pairs of different items of a, ()
    bb: Tensor  # the same of b
    ab: Tensor  # sum of k over all pairs of an item of a and one of b


def sums(a: Tensor, b: Tensor, kernel: Kernel = cubic) -> Sums:
    """The sums of the kernel over all pairs of features (N, D) and (M, D).

    Raises ValueError unless both are sets of at least 2 items of one width.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise RewardError(
            f"MMD wants features (N, D) and (M, D) of 2 items or more, not {tuple(a.shape)} and {tuple(b.shape)}"
        )
    a, b = a.double(), b.double()
    kaa, kbb = kernel(a, a), kernel(b, b)
    return Sums(a, b, kaa.sum() - kaa.trace(), kbb.sum() - kbb.trace(), kernel(a, b).sum())


def replaced(of: Sums, index: int, item: Tensor, kernel: Kernel = cubic) -> Sums:
    """`of` with item `index` of the first set replaced by `item` (D,), in time O(N + M)."""
    new = item.double()[None]
    old, rest = of.a[index : index + 1], torch.cat([of.a[:index], of.a[index + 1 :]])
    aa = of.aa + 2 * (kernel(new, rest) - kernel(old, rest)).sum()
    ab = of.ab + (kernel(new, of.b) - kernel(old, of.b)).sum()
    return Sums(torch.cat([of.a[:index], new, of.a[index + 1 :]]), of.b, aa, of.bb, ab)


def mmd_of(of: Sums) -> Tensor:
    """The unbiased MMD^2, (), in float64: it may be negative."""
    n, m = len(of.a), len(of.b)
    return of.aa / (n * (n - 1)) + of.bb / (m * (m - 1)) - 2 * of.ab / (n * m)


def mmd(a: Tensor, b: Tensor, kernel: Kernel = cubic) -> Tensor:
    """MMD^2 between features (N, D) and (M, D), (), in float64: unbiased, so that equal distributions average to 0.

    mean k(a, a') + mean k(b, b') - 2 mean k(a, b), the first two over different items
    (https://jmlr.org/papers/v13/gretton12a.html).
    """
    return mmd_of(sums(a, b, kernel))


def kid(a: Tensor, b: Tensor, subsets: int = 100, size: int = 100, generator: torch.Generator | None = None) -> Tensor:
    """Kernel Inception Distance: the mean of MMD^2 over `subsets` random subsets of `size` items of both sets, ().

    Every subset has the same n, so that KIDs of sets of different sizes compare. Raises ValueError if a set is smaller
    than `size`.
    """
    if min(len(a), len(b)) < size:
        raise RewardError(f"KID draws subsets of {size} items, a set has {min(len(a), len(b))}: give a smaller size")
    draws = [[torch.randperm(len(x), generator=generator)[:size] for x in (a, b)] for _ in range(subsets)]
    return torch.stack([mmd(a[i.to(a.device)], b[j.to(b.device)]) for i, j in draws]).mean()


def witness(x: Tensor, a: Tensor, exemplars: Tensor, kernel: Kernel = cubic) -> Tensor:
    """The per-item form, (B,): mean k(x, exemplars) - mean k(x, a), high where a lacks what the exemplars have."""
    x, a, exemplars = x.double(), a.double(), exemplars.double()
    return kernel(x, exemplars).mean(1) - kernel(x, a).mean(1)


def permutation_test(
    a: Tensor, b: Tensor, kernel: Kernel = cubic, permutations: int = 999, generator: torch.Generator | None = None
) -> float:
    """The p value of "features (N, D) and (M, D) are of one distribution", by MMD^2 over splits of their union.

    The share of the splits into N and M items whose MMD^2 is at least the observed one. Where there are no more than
    `permutations` + 1 splits, all are looked at, else `permutations` random ones and the observed: either way
    P(p <= level) <= level for every level and any N and M (https://jmlr.org/papers/v13/gretton12a.html, 5.1;
    https://arxiv.org/abs/1603.05766). Equal MMD^2, up to rounding, count as at least. O((N + M)^2) for each split.
    Raises ValueError for what `mmd` refuses, and unless permutations is at least 1.
    """
    if permutations < 1:
        raise RewardError(f"permutations is {permutations}: it must be at least 1")
    sums(a, b, kernel)
    union = torch.cat([a, b]).double()
    k = kernel(union, union).fill_diagonal_(0)
    splits = _splits(len(a), len(union), permutations, generator)
    found = torch.cat([_split_mmd(k, part.to(k.device)) for part in splits.split(256)])
    return float((found >= found[0] - 1e-10 * k.abs().max()).double().mean())


def _splits(n: int, total: int, permutations: int, generator: torch.Generator | None) -> Tensor:
    """The items of `total` that are in the first set, as a mask (P, total), the observed split first."""
    if math.comb(total, n) <= permutations + 1:
        chosen = torch.tensor(list(combinations(range(total), n)))
    else:
        drawn = [torch.randperm(total, generator=generator)[:n] for _ in range(permutations)]
        chosen = torch.stack([torch.arange(n), *drawn])
    return torch.zeros(len(chosen), total, dtype=torch.float64).scatter_(1, chosen, 1.0)


def _split_mmd(k: Tensor, first: Tensor) -> Tensor:
    """MMD^2 of every split (P, N + M), of the kernel's matrix with zeros on its diagonal."""
    second = 1 - first
    n, m = float(first[0].sum()), float(second[0].sum())
    within = ((first @ k) * first).sum(1) / (n * (n - 1)) + ((second @ k) * second).sum(1) / (m * (m - 1))
    return within - 2 * ((first @ k) * second).sum(1) / (n * m)
