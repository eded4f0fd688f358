"""Selection among candidates: each particle tries several moves, and the best of them go on (SVDD, beam search)."""

from collections.abc import Callable, Iterator, Mapping
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
    generators,
    noises,
    recalled,
    remembered,
    runs,
    size_for,
)
from guidance.search.problem import Problem, Saved, State, estimate
from guidance.search.smc import Particles
from solvers.ranges import Many, Range, Ranged


@dataclass(frozen=True)
class SVDD(Ranged):
    """Each of K particles is replaced, at each level, by one of its own candidates drawn by exp(lambda r(x0)).

    candidates: M of each particle, x_T among the levels. inverse_temperature: infinite takes the best candidate, as the
    published code does. https://arxiv.org/abs/2408.08252
    """

    particles: Many | None = None
    candidates: Many = 4
    inverse_temperature: Annotated[float, Range(0, infinite=True)] = 10.0


@dataclass(frozen=True)
class Beam(Ranged):
    """Beam search: of the K M candidates of a group, the K of the highest r(x0) go on.

    particles: K, the beams; None takes what the budget pays for. candidates: M of each beam.
    """

    particles: Many | None = None
    candidates: Many = 4


Choose = Callable[[Tensor, Population, int], Tensor]  # rewards (A, K, M), level -> places (A, K) in K * M


def svdd(problem: Problem, config: SVDD, saved: Saved | None = None) -> Iterator[State]:
    """SVDD. Costs M S NFEs and M S reward calls a particle; M reward calls more if the last level holds noise."""
    return _selection("svdd", problem, config, partial(_own_candidate, problem, config), saved)


def beam(problem: Problem, config: Beam, saved: Saved | None = None) -> Iterator[State]:
    """Beam search, at the cost of SVDD."""
    return _selection("beam", problem, config, _top, saved)


def _selection(
    name: str, problem: Problem, config: SVDD | Beam, choose: Choose, saved: Saved | None
) -> Iterator[State]:
    problem.needs_noise(name)
    m = config.candidates
    nfe, calls = m * problem.cost(), m * (problem.steps + (not clean_end(problem)))
    size = size_for(problem, config.particles, nfe, calls)
    return runs(problem, Kind(name, partial(_select_step, problem, m, choose), [size], nfe, calls), saved)


def _select_step(problem: Problem, m: int, choose: Choose, population: Population) -> Particles:
    """From level i to i + 1: candidates are evaluated where they are, and a chosen one keeps its prediction."""
    i, particles = population.step, population.particles
    if i == 0:
        particles = _first_candidates(problem, m, choose, population)
    said = recalled(particles.cache)
    if i == problem.steps - 1 and clean_end(problem):  # all candidates are the estimate, whose reward is known
        path = problem.move(particles.path, said, i, torch.zeros_like(particles.path.x))
        return replace(particles, path=path, cache={"reward": particles.cache["reward"]})
    many = torch.arange(len(population.rows)).repeat_interleave(m)
    noise = noises(problem, population, STEP, i, n=m)
    path = problem.move(particles.path[many], _rows(particles.cache, many), i, noise)
    return _chosen(problem, m, choose, replace(population, particles=replace(particles, path=path)), i + 1)


def _first_candidates(problem: Problem, m: int, choose: Choose, population: Population) -> Particles:
    """x_T is drawn like all that follows: one of M, the first of them being the particle that was started."""
    particles = population.particles
    extra = problem.begun(noises(problem, population, STEP, -1, n=m - 1))
    x = particles.path.x
    candidates = torch.cat([x[:, None], extra.view(len(x), m - 1, *x.shape[1:])], 1).flatten(0, 1)
    path = replace(particles.path, x=candidates)
    return _chosen(problem, m, choose, replace(population, particles=replace(particles, path=path)), 0)


def _chosen(problem: Problem, m: int, choose: Choose, population: Population, level: int) -> Particles:
    """K of K * M candidates in each group; `population` holds all of them in its path."""
    particles, rows = population.particles, population.rows.repeat_interleave(m)
    if level < problem.steps:
        said = problem.predicted(particles.path, level, rows)
        reward, cache = problem.score(estimate(said), rows), remembered(said)
    else:
        reward, cache = problem.score(particles.path.x, rows), {}
    places = choose(reward.view(particles.groups, particles.size, m), population, level)
    index = (places + particles.size * m * torch.arange(particles.groups)[:, None]).flatten()
    cache = {name: value[index.to(value.device)] for name, value in {**cache, "reward": reward}.items()}
    return replace(particles, path=particles.path[index.to(particles.path.x.device)], cache=cache, parents=places // m)


def _rows(cache: Mapping[str, Tensor], index: Tensor):
    return recalled({name: value[index.to(value.device)] for name, value in cache.items()})


def _own_candidate(problem: Problem, config: SVDD, reward: Tensor, population: Population, level: int) -> Tensor:
    """One of each particle's own candidates, by exp(lambda r); the best for an infinite lambda."""
    groups, size, m = reward.shape
    first = m * torch.arange(size).expand(groups, -1)
    if config.inverse_temperature == torch.inf:
        return first + reward.argmax(2)
    drawn = [torch.rand(size, generator=g, dtype=torch.float64) for g in generators(problem, population, 3, level)]
    shares = (config.inverse_temperature * reward).softmax(2).cumsum(2)
    own = torch.searchsorted(shares, torch.stack(drawn)[..., None], right=True)[..., 0]
    return first + own.clamp(max=m - 1)


def _top(reward: Tensor, population: Population, level: int) -> Tensor:
    """The best K of all candidates of a group; the earlier in a tie."""
    return reward.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, : reward.shape[1]]
