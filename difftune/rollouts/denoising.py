"""The error of a network's prediction on noised latents: what preferences are trained on where there is no sampler.

    x_t = alpha_t x0 + sigma_t eps,    L(x0, eps, t) = mean over the elements of (target - network(x_t, t, c))^2,

the target being what the network emits: eps, v = alpha eps - sigma x0, x0, or a flow's eps - x0. Up to a constant, L is
minus twice the log-probability, per element, of the target under unit variance.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.denoiser import Cond, along, widen
from solvers.latent import LatentModel, NetworkDenoiser


class Draws(NamedTuple):
    """A noise level and noise for each sample."""

    alpha: Tensor  # (B,)
    sigma: Tensor  # (B,)
    timestep: Tensor  # (B,), as the network wants to hear it
    eps: Tensor  # (B, ...)

    def rows(self, index: Any) -> "Draws":
        """The draws of some samples: rows([0, 1, 0, 1]) for two pairs whose members share theirs."""
        return Draws(*(tensor[index] for tensor in self))


def draw(model: LatentModel, seeds: Sequence[str], timesteps: Sequence[int] | None = None) -> Draws:
    """One t and one eps for each seed, whatever the others are.

    t is uniform over the timesteps that the network was trained on, or over `timesteps`; uniform in (0, 1), times 1000,
    for a flow.
    """
    generators = [torch.Generator().manual_seed(random.Random(seed).getrandbits(63)) for seed in seeds]
    u = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
    eps = torch.stack([torch.randn(model.shape(), generator=generator) for generator in generators])
    alpha, sigma, t = levels(model, u, timesteps)
    return Draws(*(value.float().to(model.device) for value in (alpha, sigma, t, eps)))


def levels(model: LatentModel, u: Tensor, timesteps: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, sigma and t (B,) at the quantiles u (B,) in [0, 1) of the distribution of t."""
    scheduler = model.pipe.scheduler
    count = scheduler.config["num_train_timesteps"]
    if timesteps is not None:
        t = torch.tensor(timesteps)[(u * len(timesteps)).long()]
    else:
        t = (u * count).long()
    if model.denoiser.prediction_type == "flow":
        sigma = u if timesteps is None else t / count
        return 1 - sigma, sigma, count * sigma
    power = scheduler.alphas_cumprod.double().cpu()[t]
    return power.sqrt(), (1 - power).sqrt(), t


def denoising_errors(denoiser: NetworkDenoiser, x0: Tensor, draws: Draws, cond: Cond) -> Tensor:
    """L (B,) in float32: the squared error of the network's output, a mean over the elements of each sample.

    x0, draws.eps (B, C, h, w); no guidance. Nothing is divided by alpha or sigma, so pure noise is no exception.
    """
    alpha, sigma = along(draws.alpha, x0), along(draws.sigma, x0)
    x, dtype = alpha * x0 + sigma * draws.eps, denoiser.network.dtype
    cond = {key: value.to(dtype) if value.is_floating_point() else value for key, value in cond.items()}
    assert denoiser.family.call is not None  # LatentModel refuses a family without
    out = denoiser.family.call(denoiser.network, x.to(dtype), draws.timestep, cond)
    return (widen(out) - target(denoiser.prediction_type, x0, draws.eps, alpha, sigma)).square().flatten(1).mean(1)


def target(space: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a perfect network of that prediction type emits."""
    return {
        "eps": lambda: eps,
        "x0": lambda: x0,
        "v": lambda: alpha * eps - sigma * x0,
        "flow": lambda: eps - x0,
    }[space]()
