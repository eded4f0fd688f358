"""The baselines of every search, which draw independent samples: best-of-N, and importance weighting."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import log
from typing import Annotated

from guidance.search.population import STEP, Kind, Population, noises, runs
from guidance.search.problem import Problem, Saved, State
from guidance.search.smc import Particles, reweight
from solvers.ranges import Many, Range, Ranged


@dataclass(frozen=True)
class BestOfN(Ranged):
    """Independent samples, of which the best is taken: the baseline of every search.

    particles: samples drawn at a time; runs follow one another while the budget lasts.
    """

    particles: Many = 8


@dataclass(frozen=True)
class Importance(Ranged):
    """Independent samples with weights exp(lambda r(x0)), self-normalised.

    particles: samples drawn at a time; runs follow one another while the budget lasts.
    """

    particles: Many = 8
    inverse_temperature: Annotated[float, Range(0, 1_000_000)] = 10.0


def best_of_n(problem: Problem, config: BestOfN, saved: Saved | None = None) -> Iterator[State]:
    """Best-of-N. Costs S NFEs and one reward call a sample, and takes eta = 0 too."""
    return _independent("best-of-n", problem, config.particles, 0.0, saved)


def importance(problem: Problem, config: Importance, saved: Saved | None = None) -> Iterator[State]:
    """Importance weighting, at the cost of best-of-N."""
    return _independent("importance", problem, config.particles, config.inverse_temperature, saved)


def _independent(
    name: str, problem: Problem, size: int, inverse_temperature: float, saved: Saved | None
) -> Iterator[State]:
    step = partial(_plain_step, problem, inverse_temperature)
    return runs(problem, Kind(name, step, sorted({size, 1}, reverse=True), problem.cost(), 1), saved)


def _plain_step(problem: Problem, inverse_temperature: float, population: Population) -> Particles:
    i, rows, particles = population.step, population.rows, population.particles
    said = problem.predicted(particles.path, i, rows)
    moved = replace(particles, path=problem.move(particles.path, said, i, noises(problem, population, STEP, i)))
    if i < problem.steps - 1:
        return moved
    reward = problem.score(moved.path.x, rows)
    return reweight(replace(moved, cache={"reward": reward}), inverse_temperature * reward)


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n: how far, in KL, the best of n draws can be from the law that they are drawn by; exactly so
    if no two rewards tie (https://arxiv.org/abs/2401.01879)."""
    return log(n) - (n - 1) / n
