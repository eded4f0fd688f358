"""Feynman-Kac steering: particles of p(x0) exp(lambda r(x0)), resampled by the rewards of their estimates.

p is the law of the sampler with the guidance inside it, whichever that is. Of each of K particles, from noise to data:

    x_t ~ the sampler's step from x_s
    at the steps that have a potential:
        R   = r(x0 estimated at x_s); at the last step r(x0) of the finished sample
        w  *= G(R, earlier R)                                             (`POTENTIALS`)
        resample by w, if the effective number of particles is below the threshold; never after the last step

The last G is such that the product of G along each path is exp(lambda r(x0)). The run around it (start, levels,
repeated runs) is `population.py`; the weights are `smc.py`.

    for state in fk(problem, FK(inverse_temperature=10)): ...
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import floor
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from guidance.search.population import STEP, Kind, Population, noises, resampled, runs, size_for
from guidance.search.problem import Problem, Saved, State, estimate
from guidance.search.smc import Particles, check_resampling, reweight
from solvers.errors import UserError
from solvers.ranges import Many, Positive, Range, Ranged, Share


class Potential(NamedTuple):
    """log G of a Feynman-Kac potential from the reward R of now, and what each particle remembers of those before.

    The product of G along a path must be exp(lambda r(x0)): if it does not telescope by itself, the last potential
    pays back what was applied, exp(lambda r(x0)) / product.
    """

    start: float  # of the memory
    update: Callable[[Tensor, Tensor], Tensor]  # (memory, R) -> memory
    log: Callable[[Tensor, Tensor], Tensor]  # (memory before, memory after) -> log G / lambda


POTENTIALS: dict[str, Potential] = {
    "difference": Potential(0.0, lambda memory, now: now, lambda before, after: after - before),
    "max": Potential(-torch.inf, torch.maximum, lambda before, after: after),
    "sum": Potential(0.0, torch.add, lambda before, after: after),
}


@dataclass(frozen=True)
class FK(Ranged):
    """Feynman-Kac steering: particles follow the sampler, and are resampled by the rewards of their estimates.

    particles: K of a run; None takes what the budget pays for. potential: "difference", exp(lambda (R_t - R_s)) from
    the last step s that had one; "max", exp(lambda max R); "sum", exp(lambda sum R). start, stop, every: the steps with
    a potential, as shares of the run; the last step always has one. threshold: resample below that share of K in
    effective sample size; None at every potential. https://arxiv.org/abs/2501.06848
    """

    particles: Many | None = None
    inverse_temperature: Annotated[float, Range(0, 1_000_000)] = 10.0
    potential: Literal["difference", "max", "sum"] = "difference"
    start: Share = 0.2
    stop: Share = 0.8
    every: Positive = 0.2
    threshold: Share | None = 0.5
    resampling: str = "systematic"

    def __post_init__(self):
        super().__post_init__()
        check_resampling(self.resampling, self.threshold)
        if self.start > self.stop:
            raise UserError(f"potentials from {self.start} to {self.stop} of the run: start must be at most stop")


def scheduled(config: FK, steps: int) -> list[int]:
    """The steps with a potential: at 100 steps, 20, 40, 60, 80 and the last, 99."""
    count = floor((config.stop - config.start) / config.every + 1e-9) + 1
    chosen = {round(steps * (config.start + config.every * i)) for i in range(count)}
    return sorted({i for i in chosen if i < steps - 1} | {steps - 1})


def fk(problem: Problem, config: FK, saved: Saved | None = None) -> Iterator[State]:
    """Feynman-Kac steering. Costs S NFEs a particle, and a reward call for each potential."""
    problem.needs_noise("fk")
    due = scheduled(config, problem.steps)
    size = size_for(problem, config.particles, problem.cost(), len(due))
    step = partial(_fk_step, problem, config, due)
    return runs(problem, Kind("fk", step, [size], problem.cost(), len(due)), saved)


def _fk_step(problem: Problem, config: FK, due: list[int], population: Population) -> Particles:
    """From level i to i + 1: move, and if a potential is due, weigh by it and resample."""
    i, rows, particles = population.step, population.rows, population.particles
    said = problem.predicted(particles.path, i, rows)
    path = problem.move(particles.path, said, i, noises(problem, population, STEP, i))
    moved = replace(particles, path=path)
    if i not in due:
        return moved
    last = i == problem.steps - 1
    reward = problem.score(path.x if last else estimate(said), rows)
    potential, cache = POTENTIALS[config.potential], particles.cache
    before = cache.get("memory", torch.full_like(reward, potential.start))
    after = potential.update(before, reward)
    applied = cache.get("applied", torch.zeros_like(reward))  # log of the product of the potentials so far
    log_g = config.inverse_temperature * potential.log(before, after)
    if last:
        log_g = config.inverse_temperature * reward - applied  # the whole path's product is exp(lambda r(x0))
    cache = {"reward": reward, "memory": after, "applied": applied + log_g}
    weighted = reweight(replace(moved, cache=cache), log_g)
    return weighted if last else resampled(problem, config, population, weighted)
