"""Denoisers with closed forms, for tests, documents and demonstrations.

For data N(mu, s^2) and x = alpha x0 + sigma eps, the variance of x is v = alpha^2 s^2 + sigma^2, and

    E[x0 | x] = mu + alpha s^2 / v (x - alpha mu),        E[eps | x] = sigma / v (x - alpha mu),

each computed by itself, so that both are finite at pure noise (alpha = 0) and at data (sigma = 0).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import log, pi
from typing import Any

import torch
from torch import Tensor

from solvers.denoiser import Cond, Denoiser, Path, Prediction, widen
from solvers.errors import UserError
from solvers.noise import Noise, noise

DATA = noise(1.0, 0.0)


class Exact:
    """The base of the closed forms: no network, hence nothing to patch."""

    def patched(self, name: str) -> AbstractContextManager[Any]:
        raise UserError(f"no patch {name!r} of {type(self).__name__}: a closed form has no layers to change")


@dataclass(frozen=True)
class Gaussian(Exact):
    """Exact denoiser of N(mean, std^2)."""

    mean: Tensor  # (...), broadcast against x
    std: Tensor | float  # () or (...)
    prediction_type: str = "flow"

    def __call__(self, x: Tensor, at: Noise, cond: Cond) -> Prediction:
        gap, variance = self._around(x, at)
        return Prediction(self.mean + at.alpha * self.std**2 / variance * gap, at.sigma / variance * gap)

    def flow(self, x: Tensor, now: Noise, then: Noise) -> Tensor:
        """The place to which the probability flow carries x: alpha' mu + sqrt(v'/v) (x - alpha mu)."""
        (gap, variance), (_, variance_then) = self._around(x, now), self._around(x, then)
        return then.alpha * self.mean + (variance_then / variance) ** 0.5 * gap

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        mean = self.mean.expand(n, *self.mean.shape)
        return mean + self.std * _randn(mean, generator)

    def log_prob(self, x: Tensor, at: Noise = DATA) -> Tensor:
        """log density (B,) of x at a noise level; its gradient is -eps / sigma."""
        gap, variance = self._around(x, at)
        variance = torch.as_tensor(variance).to(x).expand_as(x)
        return -(gap**2 / variance + variance.log() + log(2 * pi)).flatten(1).sum(1) / 2

    def _around(self, x: Tensor, at: Noise) -> tuple[Tensor, Tensor]:
        return widen(x) - at.alpha * self.mean, at.alpha**2 * self.std**2 + at.sigma**2


@dataclass(frozen=True)
class Mixture(Exact):
    """Exact denoiser of a mixture of isotropic Gaussians.

    `cond["label"]` (B,) picks one component for each sample; negative, or without it, all take part.
    """

    means: Tensor  # (K, ...)
    stds: Tensor | float  # (K,) or the same for all
    weights: Tensor | None = None  # (K,), need not sum to one
    prediction_type: str = "flow"

    def __call__(self, x: Tensor, at: Noise, cond: Cond) -> Prediction:
        gap, variance, joint = self._components(x, at, cond.get("label"))
        share = joint.softmax(1)[..., None]  # (B, K, 1)
        stds = self._stds(x)[:, None]
        x0 = share * (self.means.to(gap).flatten(1) + at.alpha * stds**2 / variance[:, None] * gap)
        eps = share * (at.sigma / variance[:, None] * gap)
        return Prediction(x0.sum(1).view(x.shape), eps.sum(1).view(x.shape))

    def sample(self, n: int, generator: torch.Generator | None = None, label: int | None = None) -> Tensor:
        """n draws, of one component or of all."""
        k = len(self.means)
        weights = self._log_weights(self.means).exp().cpu() if label is None else torch.eye(k)[label]
        chosen = torch.multinomial(weights, n, replacement=True, generator=generator).to(self.means.device)
        means = self.means[chosen]
        return means + self._stds(means)[chosen].view(n, *[1] * (means.ndim - 1)) * _randn(means, generator)

    def log_prob(self, x: Tensor, at: Noise = DATA, label: Tensor | None = None) -> Tensor:
        """log density (B,) of x at a noise level; its gradient is -eps / sigma."""
        return self._components(x, at, label)[2].logsumexp(1)

    def _components(self, x: Tensor, at: Noise, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x - alpha mu_k (B, K, D), variances (K,), and log w_k N(x; k) (B, K)."""
        flat = widen(x).flatten(1)
        gap = flat[:, None] - at.alpha * self.means.to(flat).flatten(1)
        variance = at.alpha**2 * self._stds(flat) ** 2 + at.sigma**2
        joint = -(gap**2).sum(-1) / (2 * variance) - gap.shape[-1] / 2 * (2 * pi * variance).log()
        if label is None:
            return gap, variance, joint + self._log_weights(flat)
        label = label.to(flat.device).view(-1, 1)
        others = (label >= 0) & (torch.arange(len(self.means), device=flat.device) != label)
        log_weights = self._log_weights(flat).where(label < 0, torch.zeros((), dtype=flat.dtype, device=flat.device))
        return gap, variance, (joint + log_weights).masked_fill(others, -torch.inf)

    def _stds(self, like: Tensor) -> Tensor:
        return torch.as_tensor(self.stds).to(like).expand(len(self.means))

    def _log_weights(self, like: Tensor) -> Tensor:
        weights = torch.ones(len(self.means)) if self.weights is None else self.weights
        return (weights / weights.sum()).log().to(like)


@dataclass(frozen=True)
class Bound:
    """A denoiser bound to its conditions, unguided."""

    denoise: Denoiser
    cond: Cond
    tensors: Sequence[Tensor] = field(default_factory=tuple)

    def __call__(self, path: Path, at: Noise) -> Prediction:
        return self.denoise(path.x, at, self.cond)


def bind(denoise: Denoiser, cond: Cond, tensors: Sequence[Tensor] = ()) -> Bound:
    """The unguided `Predict`; `tensors` are the parameters that gradients should reach, beside the conditions."""
    return Bound(denoise, cond, (*cond.values(), *tensors))


def _randn(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
