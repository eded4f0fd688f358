"""Search on `tiny`: the reward that each method reaches, and what the oracle says, at equal cost.

    python scripts/bench_search.py [--quick] [--methods dts-star ...] [--rewards tiny-clip oracle] [--seeds 0 1 2]
        [--budgets 250 500 1000] [--calls [5 10 20]] [--prompts 40] [--output FILE]
    python scripts/bench_search.py --mixture [--budgets 2000 10000] [--seeds 0 1 2 3 4]

Two tables, of equal network evaluations and of equal reward calls a prompt, over ShapeEval's hard prompts (two objects,
counting, position, attribute binding; as many of each), with `tiny-clip` as reward, which keeps the oracle out, and
with the oracle as reward; then the best reward so far against the evaluations, and how many DTS* needs for what
best-of-N has in the end. CFG counts two evaluations. Intervals are 95 %, over prompts, each its mean over seeds.
`--calls` without numbers leaves that table out.

dts, dts-star and independent samples do not depend on the budget, so one run gives all budgets, and one run of
independent samples gives three rows: cfg (their mean), best-of-n (the best), importance (their mean, weighted by
e^(lambda r)). The others run once for each budget. All prompts of a run advance in one batch. Every run is a line of
--output, and one that is there is not run again.

`--mixture` measures sampling instead, without a network: eight modes of equal weight, a reward that gives them the
weights e^(1.5 i), and how far the weighted samples of each method are from these, in total variation.
"""

import argparse
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path as File
from typing import Any, NamedTuple

import benching
import torch
from benching import Store, hardware, heading, row
from torch import Tensor

from difftune import models
from difftune.evaluation import intervals, shapeeval
from difftune.evaluation.intervals import Estimate
from guidance.guided import guided
from guidance.methods.cfg import CFG
from guidance.search.baselines import BestOfN, Importance
from guidance.search.catalogue import SEARCHES
from guidance.search.dts import DTS
from guidance.search.fk import FK
from guidance.search.fkc import FKC
from guidance.search.problem import Problem, RowCounter, State
from guidance.search.selection import SVDD
from guidance.search.tds import TDS
from rewards.registry import REWARDS, load
from rewards.world.grammar import COMPOSITIONAL
from solvers.exact import Mixture, bind
from solvers.latent import LatentModel
from solvers.noise import noise

METHODS = ("cfg", "importance", "best-of-n", "fkc", "fk", "tds", "svdd", "dts", "dts-star", "dts-star-paper")
INDEPENDENT = ("cfg", "importance", "best-of-n")  # one run, three ways to answer
ANYTIME = ("samples", "dts", "dts-star", "dts-star-paper")  # without a budget: a shorter run begins a longer one
COSTS = {"nfe": 0, "calls": 1}  # where a point holds the cost of that kind

Point = tuple[int, int, float, float]  # evaluations and reward calls so far; the reward and the oracle of the best


class Setting(NamedTuple):
    """What all runs share."""

    steps: int = 25
    scale: float = 5.0  # of CFG
    inverse_temperature: float = 10.0  # of all methods that tilt by the reward; fkc only chooses by it
    exploration: float | None = None  # of dts-star; None is its own
    widening: float = 1.0  # of both trees: with the paper's 2 and 0.8, the first 36 rollouts are best-of-N
    growth: float = 0.5
    micro_batch: int = 64


class Run(NamedTuple):
    """One line of the file, before it is measured."""

    method: str
    reward: str
    seed: int
    nfe: int | None  # a prompt's budgets; an anytime method has both, and runs until both are spent
    calls: int | None


# ------------------------------------------------------------------------------------------------ running
@cache
def pipe() -> Any:
    made = models.load("tiny")
    made.set_progress_bar_config(disable=True)
    return made


def budgets_of(run: Run, cost: int) -> dict[str, Any]:
    """What stops a run by itself; dts and dts-star are stopped by `improvements`."""
    if run.method == "samples":
        return {"reward_budget": max((run.nfe or 0) // cost, run.calls or 0)}
    return {} if run.method in ANYTIME else {"nfe_budget": run.nfe, "reward_budget": run.calls}


def problem_of(run: Run, prompts: Sequence[str], setting: Setting) -> Problem:
    """The prompts under CFG, searched together; the seed of each depends on its own words alone."""
    latent, reward = LatentModel(pipe()), load(run.reward)
    conds = latent.encode(prompts)

    def predict(groups: Tensor) -> Any:
        own = {name: {key: value[groups] for key, value in cond.items()} for name, cond in conds.items()}
        return guided(latent.denoiser, CFG(setting.scale), own, counter=RowCounter())

    def score(x: Tensor, groups: Tensor) -> Tensor:
        return reward(latent.decode(x), [prompts[g] for g in groups.tolist()])

    return Problem(
        latent.levels(setting.steps),
        predict,
        score,
        latent.shape(),
        [shapeeval.image_seed(run.seed, prompt, 0) for prompt in prompts],
        costs=(2,) * setting.steps,
        micro_batch=setting.micro_batch,
        **budgets_of(run, 2 * setting.steps),
    )


def config_of(method: str, setting: Setting) -> Any:
    kind = SEARCHES[method].config
    known = {field.name for field in dataclasses.fields(kind)}
    options: dict[str, Any] = {} if method == "fkc" else {"inverse_temperature": setting.inverse_temperature}
    options |= {"widening": setting.widening, "growth": setting.growth}
    if method.startswith("dts-star") and setting.exploration is not None:
        options["exploration"] = setting.exploration
    return kind(**{name: value for name, value in options.items() if name in known})


def measured(run: Run, prompts: Sequence[str], setting: Setting) -> dict[str, Any]:
    """The points of each prompt: of every improvement, of every sample for "samples", of the end for the others."""
    problem, began = problem_of(run, prompts, setting), time.perf_counter()
    name = "best-of-n" if run.method == "samples" else run.method
    try:
        states = SEARCHES[name].search(problem, config_of(name, setting))
        found = samples(problem, states) if run.method == "samples" else improvements(states, run, len(prompts))
    except ValueError as error:  # the reward has no gradient, or the budget is under one run
        return {"refused": str(error)}
    points = [judged(prompt, part, run.reward) for prompt, part in zip(prompts, found, strict=True)]
    if run.method not in ANYTIME:
        points = [part[-1:] for part in points]
    return {"seconds": round(time.perf_counter() - began, 2), "points": points}


class Found(NamedTuple):
    """A point whose sample nobody has judged yet."""

    nfe: int
    calls: int
    reward: float
    x0: Tensor


def improvements(states: Iterator[State], run: Run, prompts: int) -> list[list[Found]]:
    """For each prompt: every sample that was the best when it came, and the last state again, for its costs."""
    found: list[list[Found]] = [[] for _ in range(prompts)]
    state = None
    for state in states:
        for g in range(prompts):
            if not found[g] or float(state.reward[g]) > found[g][-1].reward:
                found[g] += point(state, g)
        if run.method in ANYTIME and state.nfe.min() >= (run.nfe or 0) and state.reward_calls.min() >= (run.calls or 0):
            break
    assert state is not None  # a search raises before it ends without a state
    return [part + point(state, g) for g, part in enumerate(found)]


def point(state: State, g: int) -> list[Found]:
    """Where prompt g stands; nowhere before its first sample."""
    if state.reward[g] == -math.inf:
        return []
    return [Found(int(state.nfe[g]), int(state.reward_calls[g]), float(state.reward[g]), state.x0[g].clone())]


def samples(problem: Problem, states: Iterator[State]) -> list[list[Found]]:
    """For each prompt: all independent samples, in the order in which they were drawn."""
    *_, last = states
    all_of_them, cost = last.weighted(), problem.cost()
    found: list[list[Found]] = [[] for _ in problem.seeds]
    for x0, g, reward in zip(all_of_them.x0, all_of_them.groups.tolist(), all_of_them.reward.tolist(), strict=True):
        n = len(found[g]) + 1
        found[g].append(Found(n * cost, n, reward, x0))
    return found


@torch.no_grad()
def judged(prompt: str, found: Sequence[Found], reward: str) -> list[Point]:
    """The points with the oracle's word on each."""
    x0 = torch.stack([f.x0 for f in found])
    images = LatentModel(pipe()).decode(x0)
    oracle = [f.reward for f in found] if reward == "oracle" else load("oracle")(images, [prompt] * len(found)).tolist()
    return [(f.nfe, f.calls, f.reward, o) for f, o in zip(found, oracle, strict=True)]


# ------------------------------------------------------------------------------------------------ the file
def key_of(run: Run, prompts: Sequence[str], setting: Setting) -> str:
    return json.dumps([*run, len(prompts), *setting, weights()])


def weights() -> str:
    """A digest of the models that all runs are of."""
    return benching.weights("tiny", "tiny-clip")


def measure_all(runs: Sequence[Run], prompts: Sequence[str], setting: Setting, file: File) -> dict[Run, Any]:
    store, found = Store(file), {}
    for run in runs:
        found[run] = store.measured(key_of(run, prompts, setting), lambda run=run: measured(run, prompts, setting))
        print(*run, found[run].get("refused") or f"{found[run]['seconds']} s", flush=True)
    return found


def planned(args: argparse.Namespace) -> list[Run]:
    """The runs that the rows need. A longest run of an anytime method holds the shorter ones."""
    wanted = dict.fromkeys("samples" if m in INDEPENDENT else m for m in args.methods)
    runs: list[Run] = []
    for reward, method, seed in itertools.product(args.rewards, wanted, args.seeds):
        if method in ANYTIME:
            runs.append(Run(method, reward, seed, max(args.budgets), max(args.calls, default=None)))
        else:
            runs += [Run(method, reward, seed, budget, None) for budget in args.budgets]
            runs += [Run(method, reward, seed, None, budget) for budget in args.calls]
    return runs


# ------------------------------------------------------------------------------------------------ reading
class Answer(NamedTuple):
    """The reward and the oracle of what a method answers."""

    reward: float
    oracle: float


def answer(method: str, points: Sequence[Point], kind: str, budget: int, setting: Setting) -> Answer | None:
    """What a prompt's points say at a budget; None before there is a sample."""
    paid = [Answer(*p[2:]) for p in points if p[COSTS[kind]] <= budget]
    if not paid:
        return None
    if method in ("cfg", "importance"):
        beta = setting.inverse_temperature if method == "importance" else 0.0
        share = (beta * torch.tensor([a.reward for a in paid], dtype=torch.float64)).softmax(0)
        return Answer(*(share @ torch.tensor(paid, dtype=torch.float64)).tolist())
    return max(paid, key=lambda a: a.reward)


class Reader(NamedTuple):
    """The measured runs, as the tables ask for them."""

    found: Mapping[Run, Any]
    seeds: Sequence[int]
    budgets: Mapping[str, Sequence[int]]
    setting: Setting

    def points(self, method: str, reward: str, kind: str, budget: int) -> list[Any]:
        """Each seed's points of each prompt, or a run that was refused."""
        name = "samples" if method in INDEPENDENT else method
        longest = {other: max(budgets, default=None) for other, budgets in self.budgets.items()}
        spent = longest if name in ANYTIME else {"nfe": None, "calls": None} | {kind: budget}
        return [self.found[Run(name, reward, seed, **spent)] for seed in self.seeds]

    def per_prompt(self, method: str, reward: str, kind: str, budget: int) -> list[Answer] | None:
        """Each prompt's mean over seeds; None if a run was refused or a prompt has no sample yet."""
        entries = self.points(method, reward, kind, budget)
        if any("refused" in entry for entry in entries):
            return None
        answers = [[answer(method, p, kind, budget, self.setting) for p in entry["points"]] for entry in entries]
        if any(a is None for each in answers for a in each):
            return None
        return [Answer(*mean) for mean in torch.tensor(answers, dtype=torch.float64).mean(0).tolist()]


def interval(values: Sequence[float], reward: str) -> Estimate:
    low, high = REWARDS[reward].range or (0.0, 1.0)
    return intervals.estimate(values, (low, high))


def table(reader: Reader, methods: Sequence[str], reward: str, kind: str) -> Iterator[str]:
    """A row for each method, its reward and its oracle at each budget."""
    judges = dict.fromkeys((reward, "oracle"))
    unit = {"nfe": "NFE", "calls": "reward calls"}[kind]
    columns = [f"{judge}, {budget} {unit}" for budget in reader.budgets[kind] for judge in judges]
    yield heading(["method", *columns])
    for method in methods:
        found = [reader.per_prompt(method, reward, kind, budget) for budget in reader.budgets[kind]]
        yield row([method, *(cell(f, judge, reward) for f in found for judge in judges)])


def cell(found: Sequence[Answer] | None, judge: str, reward: str) -> str:
    if found is None:
        return "-"
    return str(interval([a.reward if judge == reward else a.oracle for a in found], judge))


def curve(reader: Reader, methods: Sequence[str], reward: str, ticks: int = 20) -> Iterator[str]:
    """The best reward so far, mean over prompts and seeds, against the evaluations."""
    longest = max(reader.budgets["nfe"])
    yield heading(["NFE", *methods])
    for tick in range(1, ticks + 1):
        means = [mean_at(reader, method, reward, longest * tick // ticks) for method in methods]
        yield row([longest * tick // ticks, *("-" if m is None else f"{m:.4f}" for m in means)])


def mean_at(reader: Reader, method: str, reward: str, nfe: int) -> float | None:
    found = reader.per_prompt(method, reward, "nfe", nfe)
    return None if found is None else sum(a.reward for a in found) / len(found)


def verdict(reader: Reader, reward: str) -> str:
    """How many evaluations DTS* needs for best-of-N's reward at its largest budget."""
    longest = max(reader.budgets["nfe"])
    target = mean_at(reader, "best-of-n", reward, longest)
    if target is None:
        return "best-of-n has no sample for every prompt: give a larger budget"
    reached = (n for n in range(1, longest + 1) if (mean_at(reader, "dts-star", reward, n) or -math.inf) >= target)
    needed = next(reached, None)
    if needed is None:
        return f"{reward}: dts-star does not reach best-of-n's {target:.4f} at {longest} NFE within as many"
    times = f"{longest / needed:.2f} times fewer"
    return f"{reward}: dts-star reaches best-of-n's {target:.4f} at {longest} NFE after {needed}: {times}"


def settings_of(methods: Sequence[str], setting: Setting) -> Iterator[str]:
    """A line for each method that has settings, with all that it ran with."""
    for method in methods:
        name = {"cfg": "best-of-n"}.get(method, method)
        yield f"{method}: {config_of(name, setting)}"


# ------------------------------------------------------------------------------------------------ an exact mixture
RING = torch.tensor([[4 * math.cos(math.pi * i / 4), 4 * math.sin(math.pi * i / 4)] for i in range(8)])
TILT = (1.5 * torch.arange(8.0)).softmax(0)
SAMPLED: dict[str, tuple[str, Any]] = {
    "best-of-n, without weights": ("best-of-n", BestOfN(100)),
    "importance": ("importance", Importance(100, 1.0)),
    "fkc": ("fkc", FKC(start=0.0, stop=1.0, clamp=None, centred=False, inverse_temperature=1.0)),
    "fk": ("fk", FK(inverse_temperature=1.0)),
    "tds": ("tds", TDS(inverse_temperature=1.0)),
    "svdd": ("svdd", SVDD(inverse_temperature=1.0)),
    "dts": ("dts", DTS(1.0, parallel=10)),
    "dts, narrow": ("dts", DTS(1.0, parallel=10, widening=1.0, growth=0.5)),
    "dts, uniform": ("dts", DTS(1.0, "uniform", parallel=10)),
    "dts, uniform and narrow": ("dts", DTS(1.0, "uniform", parallel=10, widening=1.0, growth=0.5)),
}


def ring(seeds: Sequence[int], budget: int, steps: int = 20) -> Problem:
    base = Mixture(RING, 0.3)
    tilted = dataclasses.replace(base, weights=TILT)
    ramp = torch.linspace(10 ** (1 / 7), 0.02 ** (1 / 7), steps, dtype=torch.float64)
    levels = [noise(1.0, k) for k in [*(ramp**7).tolist(), 0.0]]

    def reward(x: Tensor, groups: Tensor) -> Tensor:
        return tilted.log_prob(x) - base.log_prob(x)

    return Problem(levels, lambda groups: bind(base, {}), reward, (2,), seeds, nfe_budget=budget)


def variations(name: str, seeds: Sequence[int], budget: int) -> Tensor:
    """For each seed: the total variation between the modes' weights and those that the method gives them."""
    method, config = SAMPLED[name]
    *_, state = SEARCHES[method].search(ring(seeds, budget), config)
    found, distances = state.weighted(), []
    for group in range(len(seeds)):
        mine = found.groups == group
        nearest = torch.cdist(found.x0[mine].float(), RING).argmin(1)
        shares = torch.zeros(8, dtype=torch.float64).index_add(0, nearest, found.log_weight[mine].double().softmax(0))
        distances.append(float((shares - TILT).abs().sum() / 2))
    return torch.tensor(distances)


def mixture_table(seeds: Sequence[int], budgets: Sequence[int]) -> Iterator[str]:
    yield heading(["method", *(f"{budget} NFE" for budget in budgets)])
    for name in SAMPLED:
        found = [variations(name, seeds, budget) for budget in budgets]
        yield row([name, *(f"{float(f.mean()):.3f} +- {float(f.std()) / len(f) ** 0.5:.3f}" for f in found)])


def hard_prompts(count: int) -> list[str]:
    """ShapeEval's first prompts of its four compositional categories."""
    each = shapeeval.entries_of(-(-count // len(COMPOSITIONAL)))
    by_kind = [[e["prompt"] for e in each if e["category"] == name] for name in COMPOSITIONAL]
    return [prompt for kinds in zip(*by_kind, strict=True) for prompt in kinds][:count]


def main(args: argparse.Namespace) -> None:
    if args.mixture:
        print(*mixture_table(args.seeds, args.budgets), sep="\n")
        return
    setting = Setting(**{name: value for name, value in vars(args).items() if name in Setting._fields})
    prompts, file = hard_prompts(args.prompts), File(args.output)
    print(f"{len(prompts)} prompts, {setting}, {hardware()}, {file}")
    print(f"weights {weights()}", *settings_of(args.methods, setting), sep="\n", flush=True)
    found = measure_all(planned(args), prompts, setting, file)
    reader = Reader(found, args.seeds, {"nfe": args.budgets, "calls": args.calls}, setting)
    for kind, reward in itertools.product([kind for kind in COSTS if reader.budgets[kind]], args.rewards):
        print(f"\nEqual {kind}, reward {reward}:\n", *table(reader, args.methods, reward, kind), sep="\n")
    shown = [m for m in ("best-of-n", "dts", "dts-star") if m in args.methods]
    for reward in args.rewards if shown else []:
        print(f"\nBest so far, reward {reward}:\n", *curve(reader, shown, reward), sep="\n")
        if {"best-of-n", "dts-star"} <= set(shown):
            print(verdict(reader, reward))


MIXTURE = {"budgets": [2000, 10_000], "seeds": [0, 1, 2, 3, 4]}
QUICK = {"prompts": 4, "steps": 5, "budgets": [20, 40], "calls": [2, 4], "seeds": [0]}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="everything, as small as can be")
    parser.add_argument("--mixture", action="store_true", help="sampling of eight modes, without a network")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--rewards", nargs="+", default=("tiny-clip", "oracle"), choices=("tiny-clip", "oracle"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", type=int, default=[250, 500, 1000], help="evaluations a prompt")
    parser.add_argument("--calls", nargs="*", type=int, default=[5, 10, 20], help="reward calls a prompt")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--steps", type=int, default=Setting._field_defaults["steps"])
    parser.add_argument("--scale", type=float, default=Setting._field_defaults["scale"])
    parser.add_argument("--inverse_temperature", type=float, default=Setting._field_defaults["inverse_temperature"])
    parser.add_argument("--exploration", type=float, default=None, help="of dts-star; its own by default")
    parser.add_argument("--widening", type=float, default=Setting._field_defaults["widening"], help="of dts, dts-star")
    parser.add_argument("--growth", type=float, default=Setting._field_defaults["growth"], help="of dts, dts-star")
    parser.add_argument("--output", default="runs/bench_search.jsonl")
    first = parser.parse_args()
    parser.set_defaults(**(QUICK if first.quick else MIXTURE if first.mixture else {}))
    main(parser.parse_args())
