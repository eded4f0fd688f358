"""The error of a network's prediction on noised latents: what preferences are trained on if there is no sampler.

    x_t = alpha_t x0 + sigma_t eps,    L(x0, eps, t) = mean over the elements of (target - network(x_t, t, c))^2,

the target being what the network emits: eps, v = alpha eps - sigma x0, x0, or a flow's eps - x0. Up to a constant, L is
minus twice the log-probability, per element, of the target under unit variance.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.denoiser import Cond, along, lines, target, widen
from solvers.latent import LatentModel, NetworkDenoiser
from solvers.noise import Noise


class Draws(NamedTuple):
    """A noise level and noise for each sample."""

    alpha: Tensor  # (B,)
    sigma: Tensor  # (B,)
    timestep: Tensor  # (B,), as the network wants to hear it
    eps: Tensor  # (B, ...)

    def rows(self, index: Any) -> "Draws":
        """The draws of some samples: rows([0, 1, 0, 1]) for two pairs whose members share theirs."""
        return Draws(*(tensor[index] for tensor in self))


def draw(model: LatentModel, seeds: Sequence[str], among: Sequence[Noise] | None = None) -> Draws:
    """One noise level and one eps for each seed, whatever the others are.

    The level is uniform over the timesteps that the network was trained on, or over `among`; for a flow, sigma is
    uniform in (0, 1), and the timestep 1000 times that.
    """
    generators = [torch.Generator().manual_seed(random.Random(seed).getrandbits(63)) for seed in seeds]
    u = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])
    eps = torch.stack([torch.randn(model.shape(), generator=generator) for generator in generators])
    alpha, sigma, t = levels(model, u) if among is None else some_levels(model, u, served(model, among))
    return Draws(*(value.float().to(model.device) for value in (alpha, sigma, t, eps)))


def levels(model: LatentModel, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, sigma and timestep (B,) at the quantiles u (B,) in [0, 1) of the levels of the network's training."""
    scheduler, low = model.pipe.scheduler, model.denoiser.low
    count = scheduler.config["num_train_timesteps"]
    if model.denoiser.prediction_type == "flow":
        least = 0.0 if low is None else low.below / count
        u = least + (1 - least) * u
        return 1 - u, u, count * u
    t = (u * count).long()
    power = scheduler.alphas_cumprod.double().cpu()[t]
    return power.sqrt(), (1 - power).sqrt(), t


def served(model: LatentModel, among: Sequence[Noise]) -> list[Noise]:
    """The levels at which the trained network serves: of Wan 2.2, whose first expert is trained, those above its
    boundary."""
    denoiser = model.denoiser
    return [at for at in among if denoiser.serving(denoiser.clock(at)) is denoiser.network]


def some_levels(model: LatentModel, u: Tensor, among: Sequence[Noise]) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, sigma and timestep (B,) at the quantiles u (B,) in [0, 1) of the uniform distribution over some levels.

    They are in the coordinates that the network was trained in, and the timesteps as exact as the network's clock.
    """
    denoiser = model.denoiser
    own = [denoiser.own(at.sigma, at)[1] for at in among]
    rows = (u * len(among)).long()
    alpha, sigma = (torch.stack([level[k] for level in own]).double().cpu()[rows] for k in (0, 1))
    return alpha, sigma, torch.stack([torch.as_tensor(denoiser.clock(at)) for at in own]).double().cpu()[rows]


def draw_levels(model: LatentModel, seeds: Sequence[str], among: Sequence[Noise], rows: Sequence[int]) -> Draws:
    """The levels `among` which `rows` names, one for each seed, and one eps for each seed, whatever the others are."""
    generators = [torch.Generator().manual_seed(random.Random(seed).getrandbits(63)) for seed in seeds]
    eps = torch.stack([torch.randn(model.shape(), generator=generator) for generator in generators])
    places = (torch.tensor(rows, dtype=torch.float64) + 0.5) / len(among)  # in the middle of each level's share
    return Draws(*(value.float().to(model.device) for value in (*some_levels(model, places, among), eps)))


class Said(NamedTuple):
    """A network's prediction for noised images."""

    out: Tensor  # (B, ...), as it comes
    x0: Tensor  # (B, ...), the clean images that this stands for
    error: Tensor  # (B,), as `denoising_errors` has it


def said_at(denoiser: NetworkDenoiser, x0: Tensor, draws: Draws, cond: Cond) -> Said:
    """What the network says of x0 (B, C, h, w), noised; no guidance."""
    at = Noise(along(draws.alpha, x0), along(draws.sigma, x0))
    x, out = noised_output(denoiser, x0, draws, cond)
    p, q, _, _ = lines(denoiser.prediction_type, at)
    error = (out - target(denoiser.prediction_type, x0, draws.eps, *at)).square().flatten(1).mean(1)
    return Said(out, p * x + q * out, error)


def denoising_errors(denoiser: NetworkDenoiser, x0: Tensor, draws: Draws, cond: Cond) -> Tensor:
    """L (B,) in float32: the squared error of the network's output, a mean over the elements of each sample.

    x0, draws.eps (B, C, h, w); no guidance. Nothing is divided by alpha or sigma, so pure noise is no exception.
    """
    alpha, sigma = along(draws.alpha, x0), along(draws.sigma, x0)
    _, out = noised_output(denoiser, x0, draws, cond)
    return (out - target(denoiser.prediction_type, x0, draws.eps, alpha, sigma)).square().flatten(1).mean(1)


def noised_output(denoiser: NetworkDenoiser, x0: Tensor, draws: Draws, cond: Cond) -> tuple[Tensor, Tensor]:
    """x = alpha x0 + sigma eps, and the network's output there, in float32 or better."""
    alpha, sigma = along(draws.alpha, x0), along(draws.sigma, x0)
    x, dtype = alpha * x0 + sigma * draws.eps, denoiser.network.dtype
    cond = {key: value.to(dtype) if value.is_floating_point() else value for key, value in cond.items()}
    assert denoiser.family.call is not None  # LatentModel refuses a family without
    out = denoiser.family.call(denoiser.network, x.to(dtype), draws.timestep, cond)
    return x, widen(out)
