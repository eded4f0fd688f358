"""The Fréchet distance between two sets of features, as if both were Gaussian (https://arxiv.org/abs/1706.08500).

A set that changes by one item keeps `Running` statistics: adding, removing or replacing an item costs O(D^2), whatever
the size of the set. The distance itself is O(D^3).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rewards.errors import RewardError


class Moments(NamedTuple):
    """Mean (..., D) and covariance (..., D, D) of a set, or of a batch of sets, in float64."""

    mean: Tensor
    covariance: Tensor


class Running(NamedTuple):
    """A set of N features as it changes: N, its mean (D,), and the scatter sum (x - mean)(x - mean)^T (D, D)."""

    n: int
    mean: Tensor
    scatter: Tensor


def moments(features: Tensor, shrinkage: float = 0.0) -> Moments:
    """Mean and covariance (with N - 1) of features (N, D).

    shrinkage in [0, 1] moves the covariance towards a multiple of the identity of the same trace, which a set of few
    features wants: (1 - shrinkage) S + shrinkage tr(S) / D I.
    """
    return moments_of(running(features), shrinkage)


def running(features: Tensor) -> Running:
    """Mean and scatter of features (N, D), in float64. Raises ValueError unless it is a set of at least 2 items."""
    if features.ndim != 2 or len(features) < 2:
        raise RewardError(f"moments want features (N, D) of at least 2 items, not {tuple(features.shape)}")
    x = features.double()
    mean = x.mean(0)
    return Running(len(x), mean, (x - mean).T @ (x - mean))


def added(of: Running, item: Tensor) -> Running:
    """`of` with one more item (D,) (Welford's update, https://doi.org/10.1080/00401706.1962.10490022)."""
    item, n = item.double(), of.n + 1
    mean = of.mean + (item - of.mean) / n
    return Running(n, mean, of.scatter + torch.outer(item - of.mean, item - mean))


def removed(of: Running, item: Tensor) -> Running:
    """`of` without an item (D,) that is in it, which is not checked. Raises ValueError if nothing would be left."""
    if of.n < 2:
        raise RewardError(f"a set of {of.n} items cannot lose one")
    item, n = item.double(), of.n - 1
    mean = of.mean - (item - of.mean) / n
    return Running(n, mean, of.scatter - torch.outer(item - of.mean, item - mean))


def replaced(of: Running, old: Tensor, new: Tensor) -> Running:
    """`of` with the item `new` (D,) in the place of `old` (D,)."""
    return added(removed(of, old), new)


def moments_of(of: Running, shrinkage: float = 0.0) -> Moments:
    """The moments of a running set; `shrinkage` as in `moments`. Raises ValueError for less than 2 items."""
    if of.n < 2:
        raise RewardError(f"moments want at least 2 items, not {of.n}")
    if not 0 <= shrinkage <= 1:
        raise RewardError(f"shrinkage is {shrinkage}: it must be in [0, 1]")
    return Moments(of.mean, _shrunk(of.scatter / (of.n - 1), shrinkage))


def frames(features: Tensor, shrinkage: float = 0.0) -> Moments:
    """The moments of every item of features (B, N, D): N frames, patches or places of one item are its set."""
    if features.ndim != 3 or features.shape[1] < 2:
        raise RewardError(f"frames are features (B, N, D) of at least 2 places, not {tuple(features.shape)}")
    x = features.double()
    mean = x.mean(1, keepdim=True)
    return Moments(mean[:, 0], _shrunk((x - mean).mT @ (x - mean) / (x.shape[1] - 1), shrinkage))


def frechet(a: Tensor, b: Tensor, shrinkage: float = 0.0) -> Tensor:
    """The distance () between features (N, D) and (M, D), in float64: 0 for equal sets, symmetric, never negative."""
    return frechet_of(moments(a, shrinkage), moments(b, shrinkage))


def frechet_of(a: Moments, b: Moments, root: Tensor | None = None) -> Tensor:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), () in float64; (...) for batches of sets.

    tr (S_a S_b)^(1/2) is the sum of the singular values of S_a^(1/2) S_b^(1/2): nothing complex, no square root of a
    matrix that is not symmetric. root: S_b^(1/2), if many sets are held against one (`square_root`).
    """
    root = square_root(b.covariance) if root is None else root
    overlap = torch.linalg.svdvals(square_root(a.covariance) @ root).sum(-1)
    spread = _trace(a.covariance) + _trace(b.covariance) - 2 * overlap
    return ((a.mean - b.mean) ** 2).sum(-1) + spread.clamp(min=0)


def square_root(covariance: Tensor) -> Tensor:
    """The symmetric square root of (..., D, D), differentiable once, whatever its rank."""
    return _SquareRoot.apply(covariance)


class _SquareRoot(torch.autograd.Function):
    """P with P P = S. From dP P + P dP = dS, dP_ij = dS_ij / (p_i + p_j) in the eigenbasis, 0 where p_i = p_j = 0.

    eigh's own gradient divides by p_i^2 - p_j^2, which is 0 in the null space of a set of few items, shrunk or not.
    """

    @staticmethod
    def forward(ctx: Any, covariance: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(covariance)
        rounding = values.shape[-1] * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
        p = torch.where(values > rounding, values, 0.0).sqrt()
        ctx.save_for_backward(p, vectors)
        return vectors * p[..., None, :] @ vectors.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        p, vectors = ctx.saved_tensors
        sums = p[..., :, None] + p[..., None, :]
        return vectors @ (vectors.mT @ gradient @ vectors / sums.masked_fill(sums == 0, torch.inf)) @ vectors.mT


def _shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    size = covariance.shape[-1]
    sphere = torch.eye(size, dtype=covariance.dtype, device=covariance.device) * _trace(covariance)[..., None, None]
    return (1 - shrinkage) * covariance + shrinkage * sphere / size


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
