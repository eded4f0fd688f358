r"""Particle methods for p(x0) exp(lambda r(x0)): Feynman-Kac steering, TDS and DAS, and the two baselines.

All run over any prediction, so with any guidance inside: p is the law of the sampler with that guidance.

    for state in fk(problem, FK(inverse_temperature=10)): ...
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import floor, log
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from guidance.search.population import (
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
from guidance.search.smc import Particles, check_resampling, resample, reweight
from solvers.errors import InputError

STEP, RESAMPLING = 1, 2  # what a draw is for, in the keys of randomness


# ------------------------------------------------------------------------------------------------ steering


class Potential(NamedTuple):
    """log G of a Feynman-Kac potential from the reward R of now, and what each particle remembers of those before.

    The product of G along a path must be exp(lambda r(x0)): where it does not telescope by itself, the last potential
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
class FK:
    """Feynman-Kac steering: particles follow the sampler, and are resampled by the rewards of their estimates.

    particles: K of a run; None takes what the budget pays for. potential: "difference", exp(lambda (R_t - R_s)) from
    the last step s that had one; "max", exp(lambda max R); "sum", exp(lambda sum R). start, stop, every: the steps with
    a potential, as shares of the run; the last step always has one. threshold: resample below that share of K in
    effective sample size; None at every potential. https://arxiv.org/abs/2501.06848
    """

    particles: int | None = None
    inverse_temperature: float = 10.0
    potential: Literal["difference", "max", "sum"] = "difference"
    start: float = 0.2
    stop: float = 0.8
    every: float = 0.2
    threshold: float | None = 0.5
    resampling: str = "systematic"

    def __post_init__(self):
        check_particles(self.particles)
        check_temperature(self.inverse_temperature)
        check_resampling(self.resampling, self.threshold)
        if self.potential not in POTENTIALS:
            raise InputError(f"no potential {self.potential!r}; known: {', '.join(POTENTIALS)}")
        if not (0 <= self.start <= self.stop <= 1 and self.every > 0):
            raise InputError(
                f"potentials from {self.start} to {self.stop} of the run, every {self.every}: "
                "give 0 <= start <= stop <= 1 and every > 0"
            )


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
        log_g = final(config, reward, after) - applied
    cache = {"reward": reward, "memory": after, "applied": applied + log_g}
    weighted = reweight(replace(moved, cache=cache), log_g)
    return weighted if last else _resampled(problem, config, population, weighted)


def final(config: FK, reward: Tensor, memory: Tensor) -> Tensor:
    """What all potentials of a path must multiply to: lambda r(x0), whatever the rewards before were."""
    return config.inverse_temperature * reward


def _resampled(problem: Problem, config: "FK | TDS", population: Population, particles: Particles) -> Particles:
    drawn = generators(problem, population, RESAMPLING, population.step)
    return resample(particles, drawn, config.resampling, config.threshold)


# ------------------------------------------------------------------------------------------------ twisted proposals


@dataclass(frozen=True)
class TDS:
    """Twisted diffusion sampling: the reward's gradient moves the proposals, and the weights correct for it exactly.

    With the twist phi_i(x) = exp(lambda_i r(x0(x))), proposals are N(mean + std^2 grad log phi_i, std^2), and weights
    p(x'|x) phi_{i+1}(x') / (phi_i(x) proposal(x'|x)); their product telescopes to exp(lambda r).
    https://arxiv.org/abs/2306.17775. tempering: the gamma of DAS, lambda_i = lambda min((1 + gamma)^i - 1, 1) after i
    steps (https://arxiv.org/abs/2501.05803); None does not temper. At 100 steps DAS takes 0.008.
    """

    particles: int | None = None
    inverse_temperature: float = 10.0
    tempering: float | None = None
    threshold: float | None = 0.5
    resampling: str = "systematic"

    def __post_init__(self):
        check_particles(self.particles)
        check_temperature(self.inverse_temperature)
        check_resampling(self.resampling, self.threshold)
        if self.tempering is not None and self.tempering <= 0:
            raise InputError(f"tempering is {self.tempering}: it must be above 0, or None for none")


def tempered(config: TDS, i: int) -> float:
    """lambda_i, the inverse temperature of the twist after i steps."""
    share = 1.0 if config.tempering is None else min((1 + config.tempering) ** i - 1, 1.0)
    return config.inverse_temperature * share


def tds(problem: Problem, config: TDS, saved: Saved | None = None) -> Iterator[State]:
    """TDS, or DAS if tempered. Costs S NFEs, S reward calls and S backward passes a particle; one more reward call
    where the last level still holds noise."""
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
    particles = _resampled(problem, config, population, particles)
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


# ------------------------------------------------------------------------------------------------ selection


@dataclass(frozen=True)
class SVDD:
    """Each of K particles is replaced, at each level, by one of its own candidates drawn by exp(lambda r(x0)).

    candidates: M of each particle, x_T among the levels. inverse_temperature: infinite takes the best candidate, as the
    published code does. https://arxiv.org/abs/2408.08252
    """

    particles: int | None = None
    candidates: int = 4
    inverse_temperature: float = 10.0

    def __post_init__(self):
        check_particles(self.particles)
        check_temperature(self.inverse_temperature, torch.inf)
        check_candidates(self.candidates)


@dataclass(frozen=True)
class Beam:
    """Beam search: of the K M candidates of a group, the K of the highest r(x0) go on.

    particles: K, the beams; None takes what the budget pays for. candidates: M of each beam.
    """

    particles: int | None = None
    candidates: int = 4

    def __post_init__(self):
        check_particles(self.particles)
        check_candidates(self.candidates)


Choose = Callable[[Tensor, Population, int], Tensor]  # rewards (A, K, M), level -> places (A, K) in K * M


def svdd(problem: Problem, config: SVDD, saved: Saved | None = None) -> Iterator[State]:
    """SVDD. Costs M S NFEs and M S reward calls a particle; M reward calls more where the last level holds noise."""
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
    extra = problem.levels[0].sigma * noises(problem, population, STEP, -1, n=m - 1)
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


# ------------------------------------------------------------------------------------------------ baselines


@dataclass(frozen=True)
class BestOfN:
    """Independent samples, of which the best is taken: the baseline of every search.

    particles: samples drawn at a time; runs follow one another while the budget lasts.
    """

    particles: int = 8

    def __post_init__(self):
        check_particles(self.particles)


@dataclass(frozen=True)
class Importance:
    """Independent samples with weights exp(lambda r(x0)), self-normalised.

    particles: samples drawn at a time; runs follow one another while the budget lasts.
    """

    particles: int = 8
    inverse_temperature: float = 10.0

    def __post_init__(self):
        check_particles(self.particles)
        check_temperature(self.inverse_temperature)


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


# ------------------------------------------------------------------------------------------------ at the door


def check_particles(particles: int | None) -> None:
    if particles is not None and particles < 1:
        raise InputError(f"particles is {particles}: there must be at least 1")


def check_temperature(inverse_temperature: float, most: float = 1e6) -> None:
    if not 0 <= inverse_temperature <= most:
        raise InputError(f"inverse_temperature is {inverse_temperature}: it must be between 0 and {most:g}")


def check_candidates(candidates: int) -> None:
    if candidates < 1:
        raise InputError(f"candidates is {candidates}: there must be at least 1")


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n: how far, in KL, the best of n draws can be from the law that they are drawn by; exactly so
    where no two rewards tie (https://arxiv.org/abs/2401.01879)."""
    return log(n) - (n - 1) / n
