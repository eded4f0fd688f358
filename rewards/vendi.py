"""The Vendi score: how many different items a set holds (https://arxiv.org/abs/2210.02410)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def vendi(features: Tensor) -> Tensor:
    """The score () of features (N, D) under cosine similarity, in float64: 1 for copies, N for orthogonal ones."""
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"vendi wants features (N, D), not {tuple(features.shape)}")
    x = F.normalize(features.double(), dim=1)
    return vendi_of(x @ x.T)


def vendi_of(similarity: Tensor) -> Tensor:
    """exp(-sum_i l_i log l_i) of the eigenvalues l of K / N, K (N, N) symmetric with ones on its diagonal."""
    values = torch.linalg.eigvalsh(similarity.double() / len(similarity))
    return torch.special.entr(values.clamp(min=0)).sum().exp()
