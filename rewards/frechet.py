"""The Fréchet distance between two sets of features, as if both were Gaussian (https://arxiv.org/abs/1706.08500)."""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean (D,) and covariance (D, D) of a set, in float64."""

    mean: Tensor
    covariance: Tensor


def moments(features: Tensor, shrinkage: float = 0.0) -> Moments:
    """Of features (N, D), the covariance with N - 1.

    shrinkage in [0, 1] moves the covariance towards a multiple of the identity of the same trace, which a set of few
    features wants: (1 - shrinkage) S + shrinkage tr(S) / D I.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"moments want features (N, D) of at least 2 items, not {tuple(features.shape)}")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage is {shrinkage}: it must be in [0, 1]")
    x = features.double()
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / (len(x) - 1)
    sphere = torch.eye(x.shape[1], dtype=x.dtype, device=x.device) * covariance.trace() / x.shape[1]
    return Moments(mean, (1 - shrinkage) * covariance + shrinkage * sphere)


def frechet(a: Tensor, b: Tensor, shrinkage: float = 0.0) -> Tensor:
    """The distance () between features (N, D) and (M, D), in float64: 0 for equal sets, symmetric, never negative."""
    return frechet_of(moments(a, shrinkage), moments(b, shrinkage))


def frechet_of(a: Moments, b: Moments) -> Tensor:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), () in float64.

    tr (S_a S_b)^(1/2) is the sum of the singular values of S_a^(1/2) S_b^(1/2): nothing complex, no square root of a
    matrix that is not symmetric.
    """
    overlap = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return ((a.mean - b.mean) ** 2).sum() + spread.clamp(min=0)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
