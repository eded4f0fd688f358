"""Regularisers that keep an optimised noise Gaussian: K(noise) (B,), minus the log density of some statistic of it.

`REGULARIZERS` is the list. Each is computed in float64, whatever the noise is in, and summed over a sample's elements.
"""

from collections.abc import Callable
from functools import cache
from math import lgamma, log, pi, sqrt

import torch
from torch import Tensor

from difftune.errors import UserError

CAP = -log(2)  # of a log probability 2 e^l, where the bound says nothing: there is no gradient above it
BLOCK = 4  # consecutive elements that DNO takes for one vector
PERMUTATIONS = 100  # of all elements, over which DNO averages
BAND = 16  # frequencies that `spectral` judges together


def chi_log_density(radius: Tensor, dimension: int) -> Tensor:
    """log p(r) = (D - 1) log r - r^2 / 2 - (D / 2 - 1) log 2 - log Gamma(D / 2): the norm of D unit normals."""
    return (dimension - 1) * radius.log() - radius**2 / 2 - (dimension / 2 - 1) * log(2) - lgamma(dimension / 2)


def chi(noise: Tensor) -> Tensor:
    """-log p(|eps|), least at |eps| = sqrt(D - 1): ReNO's own (https://arxiv.org/abs/2406.04312).

    In float64: |eps|^2 alone exceeds float16 at D = 65536. It does not see how the elements hang together.
    """
    flat = noise.double().flatten(1)
    return -chi_log_density(flat.norm(dim=1), flat.shape[1])


def dno(noise: Tensor) -> Tensor:
    """-(l_mean + l_cov), of consecutive blocks and, averaged, of random permutations
    (https://arxiv.org/abs/2405.18881).

    Of m blocks b in R^4: l_mean = min(-m |mean|^2 / 8, -log 2), and with C = sum b b^T / m,
    l_cov = min(-m max(sqrt(1 + |C - I|) - 1 - sqrt(4 / m), 0)^2 / 2, -log 2). Typical noise lies on the plateau, where
    the gradient is 0. Raises ValueError for a number of elements that 4 does not divide.
    """
    flat = noise.double().flatten(1)
    if flat.shape[1] % BLOCK:
        raise UserError(f"regularizer 'dno' takes blocks of {BLOCK}, and the noise has {flat.shape[1]} elements")
    shuffled = flat[:, _permutations(flat.shape[1]).to(flat.device)]  # (B, P, D)
    return -(_concentration(flat[:, None]) + _concentration(shuffled)).squeeze(1)


def _concentration(values: Tensor) -> Tensor:
    """l_mean + l_cov of values (B, P, D), averaged over P: (B, 1)."""
    blocks = values.unflatten(2, (-1, BLOCK))
    m = blocks.shape[2]
    return (mean_bound(blocks) + covariance_bound(blocks, m)).mean(dim=1, keepdim=True)


def mean_bound(blocks: Tensor) -> Tensor:
    """min(-m |mean|^2 / (2 k), -log 2) of m blocks in R^k (..., m, k)."""
    m, k = blocks.shape[-2:]
    return (-m * blocks.mean(dim=-2).square().sum(dim=-1) / (2 * k)).clamp(max=CAP)


def covariance_bound(blocks: Tensor, m: int) -> Tensor:
    """min(-m max(sqrt(1 + |C - I|) - 1 - sqrt(k / m), 0)^2 / 2, -log 2), |.| the spectral norm."""
    k = blocks.shape[-1]
    away = blocks.transpose(-2, -1) @ blocks / m - torch.eye(k, dtype=blocks.dtype, device=blocks.device)
    excess = (1 + torch.linalg.matrix_norm(away, 2)).sqrt() - 1 - sqrt(k / m)
    return (-m * excess.clamp(min=0) ** 2 / 2).clamp(max=CAP)


@cache
def _permutations(size: int) -> Tensor:
    """(P, D), the same in every run: the loss is a function."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(size, generator=generator) for _ in range(PERMUTATIONS)])


def spectral(noise: Tensor) -> Tensor:
    """`chi`, and the power in bands of 16 neighbouring frequencies: minus their log density, to second order.

    Of unit normal noise (B, C, h, w), the orthonormal DFT of a channel has |Y|^2 ~ Exp(1) and E|Y| = sqrt(pi) / 2 at
    every frequency, so that with B in a band

        K = chi + sum over bands of B (mean |Y|^2 - 1)^2 / 2 + B (mean |Y| - sqrt(pi) / 2)^2 / (2 - pi / 2),

    whose second part is 1 per band in expectation. A pattern of the right norm is far from it (the statistics are those
    of https://arxiv.org/abs/2602.08646). Raises ValueError for a noise too small to have a band.
    """
    size = noise.shape[-2:]
    order = _frequencies(*size).to(noise.device)
    if len(order) < BAND:
        raise UserError(f"regularizer 'spectral' needs {BAND} frequencies: a noise of {size[0]} x {size[1]} has none")
    spectrum = torch.fft.rfft2(noise.double(), norm="ortho").flatten(2)[..., order]
    power = (spectrum.real**2 + spectrum.imag**2).unflatten(2, (-1, BAND))
    square = BAND * (power.mean(dim=3) - 1) ** 2 / 2
    absolute = BAND * ((power + 1e-30).sqrt().mean(dim=3) - sqrt(pi) / 2) ** 2 / (2 - pi / 2)
    return chi(noise) + (square + absolute).sum(dim=(1, 2))


@cache
def _frequencies(h: int, w: int) -> Tensor:
    """The places in a flat rfft2 of the independent complex frequencies, lowest first, in whole bands."""
    rows, columns = torch.meshgrid(torch.fft.fftfreq(h), torch.fft.rfftfreq(w), indexing="ij")
    paired = (torch.arange(w // 2 + 1) == 0) | (torch.arange(w // 2 + 1) * 2 == w)  # conjugates of each other
    independent = ~paired[None] | ((rows > 0) & (rows < 0.5))
    kept = independent.flatten().nonzero().squeeze(1)
    radius = (rows**2 + columns**2).flatten()[kept]
    ordered = kept[radius.argsort(stable=True)]
    return ordered[: len(ordered) // BAND * BAND]


REGULARIZERS: dict[str, Callable[[Tensor], Tensor]] = {f.__name__: f for f in (chi, dno, spectral)}
