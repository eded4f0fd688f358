"""The Vendi score: how many different items a set holds (https://arxiv.org/abs/2210.02410)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.errors import RewardError


class Directions(NamedTuple):
    """A set of N features as it changes: N, and the sum of u u^T (D, D) over their directions u = x / |x|."""

    n: int
    second: Tensor


def vendi(features: Tensor) -> Tensor:
    """The score () of features (N, D) under cosine similarity, in float64: 1 for copies, N for orthogonal ones."""
    if features.ndim != 2 or len(features) == 0:
        raise RewardError(f"vendi wants features (N, D), not {tuple(features.shape)}")
    x = F.normalize(features.double(), dim=1)
    return vendi_of(x @ x.T)


def vendi_of(similarity: Tensor) -> Tensor:
    """exp(-sum_i l_i log l_i) of the eigenvalues l of K / N, K (N, N) symmetric with ones on its diagonal."""
    return _effective(similarity.double() / len(similarity))


def directions(features: Tensor) -> Directions:
    """The sum of the outer products of the features (N, D) at unit length, in float64."""
    x = F.normalize(features.double(), dim=1)
    return Directions(len(x), x.T @ x)


def replaced(of: Directions, old: Tensor, new: Tensor) -> Directions:
    """`of` with the item `new` (D,) in the place of `old` (D,), in O(D^2)."""
    u, v = (F.normalize(x.double(), dim=0) for x in (old, new))
    return Directions(of.n, of.second - torch.outer(u, u) + torch.outer(v, v))


def vendi_of_directions(of: Directions) -> Tensor:
    """`vendi` in O(D^3), whatever N: K = X X^T and X^T X have the same eigenvalues above 0."""
    return _effective(of.second / of.n)


def _effective(matrix: Tensor) -> Tensor:
    return torch.special.entr(torch.linalg.eigvalsh(matrix).clamp(min=0)).sum().exp()
