"""Twisted diffusion sampling, and DAS, which tempers it: the reward's gradient moves the particles' proposals."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from guidance.search.population import (
    STEP,
    Kind,
    Population,
    clean_end,
    noises,
    recalled,
    remembered,
    resampled,
    runs,
    size_for,
)
from guidance.search.problem import Problem, Saved, State
from guidance.search.smc import Particles, check_resampling, reweight
from solvers.ranges import Many, Positive, Range, Ranged, Share


@dataclass(frozen=True)
class TDS(Ranged):
    """Twisted diffusion sampling: the reward's gradient moves the proposals, and the weights correct for it exactly.

    With the twist phi_i(x) = exp(lambda_i r(x0(x))), proposals are N(mean + std^2 lambda_{i+1} grad r(x0(x)), std^2),
    and weights p(x'|x) phi_{i+1}(x') / (phi_i(x) proposal(x'|x)); their product telescopes to exp(lambda r).
    https://arxiv.org/abs/2306.17775.
    tempering: the gamma of DAS, lambda_i = lambda min((1 + gamma)^i - 1, 1) after i
    steps (https://arxiv.org/abs/2501.05803); None does not temper. At 100 steps DAS takes 0.008.
    """

    particles: Many | None = None
    inverse_temperature: Annotated[float, Range(0, 1_000_000)] = 10.0
    tempering: Positive | None = None
    threshold: Share | None = 0.5
    resampling: str = "systematic"

    def __post_init__(self):
        super().__post_init__()
        check_resampling(self.resampling, self.threshold)


def tempered(config: TDS, i: int) -> float:
    """lambda_i, the inverse temperature of the twist after i steps."""
    share = 1.0 if config.tempering is None else min((1 + config.tempering) ** i - 1, 1.0)
    return config.inverse_temperature * share


def tds(problem: Problem, config: TDS, saved: Saved | None = None) -> Iterator[State]:
    """TDS, or DAS if tempered. Costs S NFEs, S reward calls and S backward passes a particle; one more reward call
    if the last level still holds noise."""
    problem.needs_noise("tds")
    calls = problem.steps + (not clean_end(problem))
    size = size_for(problem, config.particles, problem.cost(), calls)
    return runs(problem, Kind("tds", partial(_tds_step, problem, config), [size], problem.cost(), calls), saved)


def _tds_step(problem: Problem, config: TDS, population: Population) -> Particles:
    i, rows, particles = population.step, population.rows, population.particles
    said, reward, gradient = problem.graded(particles.path, i, rows)
    twist = tempered(config, i) * reward
    owed = particles.cache.get("owed", torch.zeros_like(twist))  # log p / proposal - log phi, of the step before
    cache = {**remembered(said), "said.gradient": gradient, "reward": reward, "twist": twist}
    particles = reweight(replace(particles, cache=cache), twist + owed)
    particles = resampled(problem, config, population, particles)
    return _proposed(problem, config, population, particles)


def _proposed(problem: Problem, config: TDS, population: Population, particles: Particles) -> Particles:
    """The particles moved by a twisted proposal; what their next weight owes is in the cache."""
    i, cache = population.step, particles.cache
    said, last = recalled(cache), i == problem.steps - 1
    noise = noises(problem, population, STEP, i)
    drift = torch.zeros_like(noise)
    if not last:  # the last step may be free of noise, where there is no density to correct by
        std = problem.kernel(said, i)[1]
        drift = std.to(noise) * tempered(config, i + 1) * cache["said.gradient"]  # in units of std
    path = problem.move(particles.path, said, i, noise + drift)
    owed = log_ratio(drift, noise) - cache["twist"]
    if not last:
        return replace(particles, path=path, cache={"reward": cache["reward"], "owed": owed})
    reward = cache["reward"] if clean_end(problem) else problem.score(path.x, population.rows)
    final = replace(particles, path=path, cache={"reward": reward})
    return reweight(final, config.inverse_temperature * reward + owed)


def log_ratio(drift: Tensor, noise: Tensor) -> Tensor:
    """log N(z + d; 0, I) - log N(z + d; d, I) = -<d, z> - |d|^2 / 2, (B,) in float64 on the CPU."""
    drift, noise = drift.double().flatten(1), noise.double().flatten(1)
    return -(drift * (noise + drift / 2)).sum(1).cpu()
