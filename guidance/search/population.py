r"""Populations: K particles for each group, run from noise to data, run after run while the budget lasts.

A particle method is a `Kind`: how a population moves from one level to the next, and what a particle costs. This loop
does the rest: which groups can pay for another run, the best sample so far, finished samples with their weights,
saving and resuming between any two steps. The weights of finished runs carry each run's estimate of Z, so that samples
of several runs together estimate the target too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from guidance.codec import apart, decode, encode
from guidance.search.problem import Best, Graph, Problem, Saved, Spent, State, Weighted
from guidance.search.smc import Particles, populate, resample
from solvers.denoiser import Path, Prediction
from solvers.errors import UserError

SAID = "said"  # what predictions are cached under
STEP, RESAMPLING = 1, 2  # what a draw is for, in the keys of randomness
UNPAID = 4  # particles if neither the settings nor a budget say how many


@dataclass(frozen=True)
class Population:
    """A run part-way: K particles for each of A groups; row a * K + k is particle k of group `groups[a]`."""

    particles: Particles
    groups: Tensor  # (A,) int64: those that could pay for the run
    offsets: Tensor  # (A,) int64: samples that each group had begun before, which is part of the keys of its noise
    step: int = 0  # the level that the particles are at
    parents: tuple[Tensor, ...] = ()  # (A, K) for each step behind: where in its group each particle came from
    values: tuple[Tensor, ...] = ()  # (A, K) for each step behind: cache["reward"], NaN before there is one

    @property
    def rows(self) -> Tensor:
        """(A * K,): the group of each row."""
        return self.groups.repeat_interleave(self.particles.size)


class Kind(NamedTuple):
    """A particle method for one problem and its settings.

    step: moves a population by one level, its `parents` included; from the last level but one it also sets
    cache["reward"], the reward of the finished sample. sizes: K of a run, in the order in which they are tried.
    """

    name: str
    step: Callable[[Population], Particles]
    sizes: Sequence[int]
    nfe: int  # the most of a particle
    reward_calls: int


class Record(NamedTuple):
    """The results of finished runs."""

    begun: Tensor  # (G,) int64: samples begun
    best: Best
    weighted: Weighted
    graph: Graph

    @classmethod
    def empty(cls, problem: Problem) -> "Record":
        none, number = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
        x0 = torch.zeros((0, *problem.shape), dtype=problem.dtype, device=problem.device)
        return cls(
            torch.zeros(len(problem.seeds), dtype=torch.int64),
            problem.nothing_yet(),
            Weighted(x0, none, number, number),
            Graph(none, none, none, number),
        )


def size_for(problem: Problem, particles: int | None, nfe: int, reward_calls: int) -> int:
    """K of a run: `particles`, or else as many as the budgets pay for at once."""
    if particles is not None:
        return particles
    budgets = ((problem.nfe_budget, nfe), (problem.reward_budget, reward_calls))
    paid = [budget // cost for budget, cost in budgets if budget is not None and cost]
    return max(1, min(paid)) if paid else UNPAID


def runs(problem: Problem, kind: Kind, saved: Saved | None = None) -> Iterator[State]:
    """The state after each step of each run: runs follow one another while a group can pay; one without a budget.

    Raises ValueError, before anything runs, if the budget does not pay for one run, and for a saved search whose
    runs have other sizes.
    """
    if saved is not None:
        return _states(problem, kind, *restored(problem, kind, saved))
    record = Record.empty(problem)
    return _states(problem, kind, record, next_run(problem, kind, record))


def _states(problem: Problem, kind: Kind, record: Record, population: Population | None) -> Iterator[State]:
    population = population or next_run(problem, kind, record)
    if population is None:  # resumed at its end
        yield state_of(problem, kind, record, None)
    while population:
        if not population.step:
            record = record._replace(begun=record.begun.index_add(0, population.groups, counts(population)))
        population = stepped(kind, population)
        if population.step == problem.steps:
            record, population = finished(record, population), None
        yield state_of(problem, kind, record, population)
        population = population or next_run(problem, kind, record)


def next_run(problem: Problem, kind: Kind, record: Record) -> Population | None:
    """Particles at the first level, for all groups that can pay for them; None if no group can."""
    first = not bool(record.begun.any())
    if not first and problem.nfe_budget is None and problem.reward_budget is None:
        return None
    for size in kind.sizes:
        groups = problem.affords(size * kind.nfe, size * kind.reward_calls).nonzero()[:, 0]
        if len(groups):
            offsets = record.begun[groups]
            pairs = zip(groups.tolist(), offsets.tolist(), strict=True)
            starts = [problem.start(g, o + k).x for g, o in pairs for k in range(size)]
            return Population(populate(Path(torch.cat(starts)), len(groups)), groups, offsets)
    if first:
        least = min(kind.sizes)
        needed = {"nfe_budget": least * kind.nfe, "reward_budget": least * kind.reward_calls}
        had = {"nfe_budget": problem.nfe_budget, "reward_budget": problem.reward_budget}
        less = [name for name, number in had.items() if number is not None and number < needed[name]]
        raise UserError(
            f"{kind.name} with {least} particle{'s' * (least > 1)} costs up to {needed['nfe_budget']} network"
            f" evaluations and {needed['reward_budget']} reward calls, more than was given: raise "
            + " and ".join(f"{name} from {had[name]} to {needed[name]} or more" for name in less)
        )
    return None


def counts(population: Population) -> Tensor:
    return torch.full_like(population.groups, population.particles.size)


def stepped(kind: Kind, population: Population) -> Population:
    """The population one level on."""
    before = population.particles
    identity = torch.arange(before.size).expand(before.groups, -1)
    after = kind.step(replace(population, particles=replace(before, parents=identity)))
    unknown = torch.full((len(population.rows),), torch.nan, dtype=torch.float64)
    values = after.cache.get("reward", unknown).view(after.groups, -1)
    return replace(
        population,
        particles=after,
        step=population.step + 1,
        parents=(*population.parents, after.parents),
        values=(*population.values, values),
    )


def finished(record: Record, population: Population) -> Record:
    """The record with a run that has arrived."""
    particles, rows = population.particles, population.rows
    reward = particles.cache["reward"]
    weight = (particles.log_mass[:, None] + particles.log_weights).flatten()
    new = Weighted(particles.path.x, rows, weight, reward)
    weighted = Weighted(*(torch.cat(pair) for pair in zip(record.weighted, new, strict=True)))
    best = record.best.improved(particles.path.x, reward, rows)
    return record._replace(best=best, weighted=weighted, graph=grown(record.graph, population))


def grown(graph: Graph, population: Population) -> Graph:
    """The graph with the lineages of a population: a node for each particle at each level behind."""
    rows, before = population.rows, len(graph.parent)
    size, count = population.particles.size, len(rows)
    first = torch.arange(population.particles.groups).repeat_interleave(size) * size
    parents = [torch.full((count,), -1)]
    for i, places in enumerate(population.parents):
        parents.append(before + i * count + first + places.flatten())
    unknown = torch.full((count,), torch.nan, dtype=torch.float64)
    levels = torch.arange(len(parents)).repeat_interleave(count)
    new = Graph(
        torch.cat(parents),
        levels,
        rows.repeat(len(parents)),
        torch.cat([unknown, *(value.flatten() for value in population.values)]),
    )
    return Graph(*(torch.cat(pair) for pair in zip(graph, new, strict=True)))


def state_of(problem: Problem, kind: Kind, record: Record, population: Population | None) -> State:
    spent = Spent(*(value.clone() for value in problem.spent))
    return State(
        *record.best,
        *spent,
        weighted=lambda: record.weighted,
        graph=lambda: record.graph if population is None else grown(record.graph, population),
        saved=lambda: saved_of(kind, record, population, spent),
    )


# ------------------------------------------------------------------------------------------------ saving


class Rest(NamedTuple):
    """The state of a run part-way that is saved beside the path of its particles."""

    groups: Tensor
    offsets: Tensor
    particles: Mapping[str, Tensor]
    cache: Mapping[str, Tensor]
    parents: Tensor | None = None  # (steps behind, A, K)
    values: Tensor | None = None


OWN = ("log_weights", "log_mass", "parents", "roots")  # of `Particles`


def saved_of(kind: Kind, record: Record, population: Population | None, spent: Spent) -> Saved:
    """All that `runs` goes on from."""
    tensors = encode({**record._asdict(), "spent": spent}).tensors
    info = {"step": None if population is None else population.step, "sizes": list(kind.sizes)}
    if population is not None:
        particles = population.particles
        behind = [torch.stack(row) if row else None for row in (population.parents, population.values)]
        own = {name: getattr(particles, name) for name in OWN}
        rest = Rest(population.groups, population.offsets, own, particles.cache, *behind)
        tensors |= encode(particles.path).tensors | encode(rest).tensors
    return Saved(apart(tensors), info)


def restored(problem: Problem, kind: Kind, saved: Saved) -> tuple[Record, Population | None]:
    """Restore what `saved_of` saved, the problem's counters too."""
    if (before := saved.info["sizes"]) != list(kind.sizes):
        raise UserError(
            f"the saved {kind.name} has runs of {max(before)} particles, and this one of {max(kind.sizes)}: a "
            "population cannot grow, begin anew; with particles set, a larger budget means more runs"
        )
    tensors = {name: placed(problem, name, value) for name, value in saved.tensors.items()}
    for name, account in problem.spent._asdict().items():
        account.copy_(tensors[f"spent.{name}"])
    record, step = decode(Record, tensors), saved.info["step"]
    if step is None:
        return record, None
    rest: Rest = decode(Rest, tensors)
    particles = Particles(decode(Path, tensors), **rest.particles, cache=rest.cache)
    behind = [() if row is None else tuple(row) for row in (rest.parents, rest.values)]
    return record, Population(particles, rest.groups, rest.offsets, step, *behind)


def placed(problem: Problem, name: str, value: Tensor) -> Tensor:
    """On the problem's device, if it is what the network works on; the rest stays on the CPU."""
    latents = name in ("x", "x0", "best.x0", "weighted.x0") or name.startswith(("memory.", f"cache.{SAID}."))
    return value.to(problem.device if latents else "cpu")


# ------------------------------------------------------------------------------------------------ what steps share


class Remembered(NamedTuple):
    """The part of a prediction that is cached under `SAID`."""

    said: Prediction


def remembered(prediction: Prediction) -> dict[str, Tensor]:
    """A prediction as cache entries, which follow their particles when they are resampled."""
    return encode(Remembered(prediction)).tensors


def recalled(cache: Mapping[str, Tensor]) -> Prediction:
    """The prediction that `remembered` put into a cache."""
    found: Remembered = decode(Remembered, cache)
    return found.said


def noises(problem: Problem, population: Population, *key: int, n: int = 1) -> Tensor:
    """(A * K * n, ...) unit normal: n for each particle, by its group's seed and its number in the group."""
    pairs = zip(population.groups.tolist(), population.offsets.tolist(), strict=True)
    places = range(population.particles.size)
    return torch.cat([problem.noise(g, o + k, *key, n=n) for g, o in pairs for k in places])


def generators(problem: Problem, population: Population, *key: int) -> list[torch.Generator]:
    """A generator for each group of a population: for what its particles do together."""
    pairs = zip(population.groups.tolist(), population.offsets.tolist(), strict=True)
    return [problem.generator(g, o, *key) for g, o in pairs]


class Resampled(Protocol):
    """Settings that say how particles are resampled."""

    @property
    def resampling(self) -> str: ...
    @property
    def threshold(self) -> float | None: ...


def resampled(problem: Problem, config: Resampled, population: Population, particles: Particles) -> Particles:
    """The particles, resampled in each group if the settings' threshold asks for it."""
    drawn = generators(problem, population, RESAMPLING, population.step)
    return resample(particles, drawn, config.resampling, config.threshold)


def clean_end(problem: Problem) -> bool:
    """Whether the last step goes to data without noise: then the last estimate is the sample, and so is its reward."""
    last = problem.levels[-1]
    return bool(last.sigma == 0) and bool(last.alpha == 1)
