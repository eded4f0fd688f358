"""Noise optimisation against searches of the same cost, over ShapeEval: `tiny-clip` is raised, the oracle is held out.

    python scripts/bench_reno.py [turbo tiny] [--methods reno ...] [--prompts 10] [--part I/N] [--quick]
        [--output_dir FOLDER]

turbo       tiny-turbo in one step, 50 iterations
tiny        tiny in 20 steps under CFG, 20 iterations

none        the first noise's image
reno        ReNO, one reward call an iteration; of a reward that is smoothed, `shifts` calls
best-calls  best of as many fresh noises as ReNO called the reward
best-time   best of as many fresh noises as fit into ReNO's time for the same prompts, counted in whole batches; on a
            CPU time is this process's own, whatever else runs
neighbours, spsa, cma   without a gradient, with as many reward calls (the next whole iteration)
neighbours-time   neighbours for ReNO's time
dts-star    DTS* (widening 1, growth 0.5), with as many reward calls; of `tiny` alone, for a tree branches at steps

Prompts are run eight at a time, and every such run is a line of --output_dir/results.jsonl; one that is there is not
made again, so that a bench can go on. --part 1/4 makes the first quarter of the runs. What is there is then told as a
table: the oracle's score by category with 95 % intervals over prompts, the paired difference of `reno` to each other,
the mean reward, reward calls and seconds of a prompt.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import torch
from benching import Store, clock, hardware, table
from torch import Tensor

from difftune import models
from difftune.evaluation import intervals, shapeeval
from difftune.reno.optimizer import ReNO
from guidance.guided import guided
from guidance.methods.catalogue import CFG
from guidance.search.catalogue import SEARCHES
from guidance.search.problem import Problem, RowCounter
from rewards.registry import load
from rewards.world import grammar
from solvers.latent import LatentModel

BATCH = 8
FRESH = 1_000_000  # seeds of best-of-n's noises begin here
MANY = 1_000_000  # iterations of what is stopped by the clock
JUDGE = "tiny-clip"  # what fresh noises and searches are chosen by; the reward of all tables
SEARCHED = ("neighbours", "spsa", "cma")


@dataclass(frozen=True)
class Part:
    """One model and its budget."""

    model: str
    steps: int
    scale: float | None  # of CFG
    iterations: int
    prompts: int | None = None  # of each category; None: all
    listed: str = "shapeeval"  # where the prompts stand
    reward: str = "tiny-clip"  # what ReNO follows
    options: tuple[tuple[str, Any], ...] = ()  # of ReNO

    def reno(self, reward: str | None = None, **more: Any) -> ReNO:
        own = {"num_inference_steps": self.steps, "guidance": None if self.scale is None else CFG(self.scale)}
        return ReNO(pipeline(self.model), {reward or self.reward: 1.0}, progress=False, **own, **more)


PARTS = {"turbo": Part("tiny-turbo", 1, None, 50), "tiny": Part("tiny", 20, 3.0, 20)}


@cache
def pipeline(name: str) -> Any:
    pipe = models.load(name).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Run:
    """Some prompts under one method."""

    part: str
    method: str
    first: int
    entries: list[dict[str, str]]

    @property
    def prompts(self) -> list[str]:
        return [entry["prompt"] for entry in self.entries]

    def key(self, method: str | None = None) -> str:
        return f"{self.part}-{method or self.method}-{self.first:04d}"


# ------------------------------------------------------------------------------------------------ methods
def found(images: Tensor, rewards: Tensor, calls: float) -> dict[str, Any]:
    return {"images": images.float().cpu(), "rewards": rewards.tolist(), "calls": calls}


def none(part: Part, run: Run, store: Store) -> dict[str, Any]:
    result = part.reno(JUDGE).optimize(run.prompts, 1, run.first)
    return found(result.images, result.rewards, 1)


def reno(part: Part, run: Run, store: Store) -> dict[str, Any]:
    result = part.reno(**dict(part.options)).optimize(run.prompts, part.iterations, run.first)
    return found(result.images, result.rewards, float(result.reward_calls.double().mean()))


def searched(part: Part, run: Run, store: Store) -> dict[str, Any]:
    candidates = {"cma": 8}.get(run.method, 4)
    settings = part.reno(JUDGE, optimizer=f"{run.method}[candidates={candidates}]")
    result = settings.optimize(run.prompts, 1 + ceil((part.iterations - 1) / candidates), run.first)
    return found(result.images, result.rewards, float(result.reward_calls.double().mean()))


def best_of(part: Part, run: Run, goes_on: Callable[[int], bool]) -> dict[str, Any]:
    """The best of fresh noises, one more of each prompt as long as `goes_on(how many there were)`."""
    settings, best, count = part.reno(JUDGE), None, 0
    while goes_on(count):
        result = settings.optimize(run.prompts, 1, FRESH + count * FRESH + run.first)
        gain = torch.ones(len(result.rewards), dtype=torch.bool) if best is None else result.rewards > best[1]
        old = (result.images, result.rewards) if best is None else best
        best = (torch.where(gain.to(old[0].device)[:, None, None, None], result.images, old[0]),
                torch.where(gain, result.rewards, old[1]))  # fmt: skip
        count += 1
    assert best is not None
    return found(*best, count)


def best_calls(part: Part, run: Run, store: Store) -> dict[str, Any]:
    return best_of(part, run, lambda count: count < part.iterations)


def best_time(part: Part, run: Run, store: Store) -> dict[str, Any]:
    """Until ReNO's time for these prompts is over; what began in it counts, in favour of best-of-n."""
    seconds, began = renos_seconds(run, store), clock()
    return best_of(part, run, lambda count: count == 0 or clock() - began < seconds)


def renos_seconds(run: Run, store: Store) -> float:
    """What ReNO took for the same prompts."""
    reno = store.read().get(run.key("reno"))
    if reno is None:
        raise SystemExit(f"{run.method} needs {run.key('reno')} in {store.file}: run the method reno first")
    return reno["seconds"]


def neighbours_time(part: Part, run: Run, store: Store) -> dict[str, Any]:
    """Rounds of four neighbours until ReNO's time for these prompts is over; the round that began in it counts."""
    seconds, began = renos_seconds(run, store), clock()
    rounds = part.reno(JUDGE, optimizer="neighbours[candidates=4]").iterate(run.prompts, MANY, run.first)
    best = next(live.best for live in rounds if clock() - began >= seconds)
    return found(best.images, best.rewards, float(best.reward_calls.double().mean()))


@torch.no_grad()
def dts_star(part: Part, run: Run, store: Store) -> dict[str, Any]:
    """DTS* with branches at five levels."""
    model, reward = LatentModel(pipeline(part.model)), load(JUDGE)
    conds, method = model.encode(run.prompts), CFG(part.scale or 1.0)

    def predict(groups: Tensor) -> Any:
        chosen = {name: {k: v[groups] for k, v in cond.items()} for name, cond in conds.items()}
        return guided(model.denoiser, method, chosen, counter=RowCounter())

    def score(x0: Tensor, groups: Tensor) -> Tensor:
        return reward(model.decode(x0), [run.prompts[i] for i in groups.tolist()])

    problem = Problem(
        model.levels(part.steps),
        predict,
        score,
        model.shape(),
        seeds=[run.first + i for i in range(len(run.entries))],
        costs=[2] * part.steps,
        reward_budget=part.iterations,
        device=model.device,
    )
    entry = SEARCHES[run.method]
    *_, state = entry.search(problem, entry.config(branches=min(5, part.steps)))
    return found(model.decode(state.x0), state.reward, float(state.reward_calls.double().mean()))


METHODS: dict[str, Callable[[Part, Run, Store], dict[str, Any]]] = {
    "none": none,
    "reno": reno,
    "best-calls": best_calls,
    "best-time": best_time,
    **dict.fromkeys(SEARCHED, searched),
    "dts-star": dts_star,
    "neighbours-time": neighbours_time,
}


def has(part: str, method: str) -> bool:
    """Whether the method runs there: a tree needs steps at which it can branch."""
    return method != "dts-star" or PARTS[part].steps > 1


# ------------------------------------------------------------------------------------------------ runs
def measured(part: Part, run: Run, store: Store) -> dict[str, Any]:
    """One run, judged by the oracle; its seconds are those of the method alone."""
    began = clock()
    made = METHODS[run.method](part, run, store)
    seconds = clock() - began
    return {"prompts": run.prompts, **judged(made.pop("images"), run.prompts), **made, "seconds": seconds}


@torch.no_grad()
def judged(images: Tensor, prompts: Sequence[str]) -> dict[str, list[Any]]:
    """The oracle's word on each picture, and the judge's score."""
    holds = [r.holds for r in shapeeval.judge_images(images, prompts, range(len(prompts)))]
    return {"holds": holds, "scores": load(JUDGE)(images, prompts).tolist()}


def runs(part: str, settings: Part, methods: Sequence[str]) -> Iterator[Run]:
    entries = shapeeval.entries_of(settings.prompts, settings.listed)
    for first in range(0, len(entries), BATCH):
        for method in methods:
            yield Run(part, method, first, entries[first : first + BATCH])


def warm(part: Part) -> None:
    """The first call of a process loads and compiles what later ones find."""
    part.reno().optimize(["a red circle"], 2)


# ------------------------------------------------------------------------------------------------ tables
def told(part: str, store: Store, methods: Sequence[str]) -> str:
    """What is there of a part, as Markdown."""
    results = {method: results_of(part, store, method) for method in methods}
    lines = []
    for method, found in ((m, f) for m, f in results.items() if f):
        scores = shapeeval.scores([r for r, *_ in found])
        cells = [str(scores[name]) if name in scores else "" for name in CATEGORIES]
        means = [sum(row[i] for row in found) / len(found) for i in (1, 2, 3)]
        numbers = [f"{means[0]:.4f}", f"{means[1]:.1f}", f"{means[2]:.2f}"]
        lines.append([method, len(found), *cells, *numbers])
    columns = ["method", "prompts", *CATEGORIES, "reward", "calls", "seconds"]
    return "\n".join([f"## {part}", "", table(columns, lines), "", *differences(results)])


CATEGORIES = ("overall", *grammar.CATEGORIES)


def differences(results: dict[str, list[tuple[intervals.Result, float, float, float]]]) -> Iterator[str]:
    """`reno` minus each other method, paired by prompt."""
    own = [r for r, *_ in results.get("reno", [])]
    for method, found in results.items():
        if method != "reno" and own and found:
            change = intervals.differences(own, [r for r, *_ in found])["overall"]
            yield f"reno minus {method}: {change}, {'counts' if change.excludes_zero else 'does not count'}"


def results_of(part: str, store: Store, method: str) -> list[tuple[intervals.Result, float, float, float]]:
    """(the oracle's word, reward, reward calls, seconds) of each prompt."""
    kinds = {entry["prompt"]: entry["category"] for entry in shapeeval.entries_of()}
    rows = []
    for _, run in sorted((k, run) for k, run in store.read().items() if k.rpartition("-")[0] == f"{part}-{method}"):
        for prompt, holds, reward in zip(run["prompts"], run["holds"], run["scores"], strict=True):
            each = run["seconds"] / len(run["prompts"])
            rows.append((intervals.Result(prompt, kinds[prompt], 0, holds), reward, run["calls"], each))
    return rows


def smaller(part: Part) -> Part:
    """One prompt of each category, three iterations, at most three steps: a smoke test."""
    return replace(part, prompts=1, iterations=3, steps=min(3, part.steps))


def main(
    parts: Sequence[str], methods: Sequence[str], prompts: int | None, part: str, quick: bool, output_dir: str
) -> None:
    store, (index, of) = Store(Path(output_dir) / "results.jsonl"), map(int, part.split("/"))
    print(hardware())
    for name in parts or PARTS:
        settings = smaller(PARTS[name]) if quick else replace(PARTS[name], prompts=prompts)
        chosen = [method for method in methods if has(name, method)]
        if left := sorted(set(methods) - set(chosen)):
            print(f"{name}: without {', '.join(left)}")
        todo = list(runs(name, settings, chosen))
        firsts = sorted({run.first for run in todo})
        mine = {first for i, first in enumerate(firsts) if i * of // len(firsts) == index - 1}
        done = store.read()
        left_over = [run for run in todo if run.first in mine and run.key() not in done]
        if left_over:
            warm(settings)
        for run in left_over:
            store.write(run.key(), measured(settings, run, store))
            print(run.key(), flush=True)
        print(told(name, store, chosen), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="turbo, tiny; both by default")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--prompts", type=int, help="of each category; all without it")
    parser.add_argument("--part", default="1/1", help="I/N: the I-th of N parts of the prompts")
    parser.add_argument("--quick", action="store_true", help="one prompt of each category, three iterations")
    parser.add_argument("--output_dir", default="runs/bench_reno")
    main(**vars(parser.parse_args()))
