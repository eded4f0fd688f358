"""Search on ShapeEval-hard: `tiny-clip` is raised, the oracle is held out, all at equal network evaluations."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import bench_search
import numpy as np
from bench_search import ANYTIME, Reader, Run, Setting
from benching import table

from difftune.evaluation import shapeeval
from difftune.evaluation.intervals import BOOTSTRAP_SEED
from evidence.rows import Claim, Results, Row, Section, above, paired, said
from rewards.world import grammar

REWARD = "tiny-clip"
METHODS = ("best-of-n", "dts-star", "fk", "tds", "svdd", "fkc")
PAPERS = {  # page, and what the paper claims
    "dts-star": ("search/trees.md", "best-of-N's reward with a fifth of the evaluations"),
    "fk": ("search/steering.md", "a higher reward than best-of-N with as many particles"),
    "tds": ("search/steering.md", "exact as particles grow, where guidance by a gradient is biased"),
    "svdd": ("search/steering.md", "a higher reward than best-of-N"),
    "fkc": ("search/fkc.md", "CFG's own target distribution, which CFG's sampler misses"),
}
RESAMPLES = 2000


class Size(NamedTuple):
    """How much is searched. An image costs two evaluations a step."""

    prompts: int = 40  # of ShapeEval-hard, as many of each category
    block: int = 8  # prompts of a file
    seeds: tuple[int, ...] = (0, 1, 2)
    budgets: tuple[int, ...] = (250, 1000, 10_000)  # evaluations of each prompt
    methods: tuple[str, ...] = METHODS
    setting: Setting = Setting(scale=3.0)


QUICK = Size(prompts=4, block=2, seeds=(0,), budgets=(20, 40), setting=Setting(steps=5, scale=3.0))


def prompts_of(size: Size) -> list[str]:
    """The prompts, a category after another in turn, so that each block has all of them."""
    each = -(-size.prompts // len(grammar.HARD_CATEGORIES))
    entries = shapeeval.entries_of(each, "shapeeval-hard")
    kinds = [[e["prompt"] for e in entries if e["category"] == kind] for kind in grammar.HARD_CATEGORIES]
    return [prompt for row in zip(*kinds, strict=True) for prompt in row][: size.prompts]


def runs_of(method: str, seed: int, size: Size) -> list[Run]:
    """The runs that give all budgets: one of a method whose shorter runs begin its longer ones."""
    name = "samples" if method == "best-of-n" else method
    if name in ANYTIME:
        return [Run(name, REWARD, seed, max(size.budgets), None)]
    return [Run(name, REWARD, seed, budget, None) for budget in size.budgets]


def blocks(size: Size) -> list[tuple[int, list[str]]]:
    prompts = prompts_of(size)
    return [(first, prompts[first : first + size.block]) for first in range(0, len(prompts), size.block)]


def row_of(run: Run, first: int, prompts: Sequence[str], size: Size) -> Row:
    settings = {"run": list(run), "prompts": list(prompts), "setting": list(size.setting)}
    name = f"search/{run.method}-{run.nfe}-{run.seed}-{first:03d}"
    return Row(name, settings, ("tiny", "tiny-clip"), partial(bench_search.measured, run, prompts, size.setting))


def rows_of_run(run: Run, size: Size) -> list[Row]:
    return [row_of(run, first, prompts, size) for first, prompts in blocks(size)]


def rows(size: Size) -> list[Row]:
    """Seed after seed, so that a part of them is already a result."""
    runs = [run for seed in size.seeds for method in size.methods for run in runs_of(method, seed, size)]
    return [row for run in runs for row in rows_of_run(run, size)]


# ------------------------------------------------------------------------------------------------ reading


def reader_of(method: str, size: Size, results: Results) -> Reader | None:
    """What a method found of all prompts; None unless it was measured in full."""
    found = {}
    for run in (run for seed in size.seeds for run in runs_of(method, seed, size)):
        parts = results.all_of(rows_of_run(run, size))
        if parts is None:
            return None
        found[run] = joined(parts)
    return Reader(found, size.seeds, {"nfe": size.budgets, "calls": ()}, size.setting)


def joined(parts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The blocks of a run as one entry; one that was refused is refused as a whole."""
    refused = [part for part in parts if "refused" in part]
    if refused:
        return refused[0]
    return {"points": [p for part in parts for p in part["points"]], "seconds": sum(p["seconds"] for p in parts)}


def rewards_of(reader: Reader, method: str, budget: int) -> list[tuple[float, float]] | None:
    """Each prompt's reward and oracle, mean over seeds; None for a method that cannot begin."""
    found = reader.per_prompt(method, REWARD, "nfe", budget)
    return None if found is None else [tuple(answer) for answer in found]


def curves(reader: Reader, method: str, budget: int, ticks: int) -> np.ndarray:
    """(P, ticks): each prompt's best reward after each share of the budget, mean over seeds; -inf before the first."""
    (name,) = {run.method for run in reader.found}
    entries = [entry for run, entry in reader.found.items() if run.method == name]
    grid = [budget * (i + 1) / ticks for i in range(ticks)]
    each = [[[best(points, nfe) for nfe in grid] for points in entry["points"]] for entry in entries]
    return np.asarray(each).mean(0)


def best(points: Sequence[Sequence[float]], nfe: float) -> float:
    return max((p[2] for p in points if p[0] <= nfe), default=-math.inf)


@dataclass(frozen=True)
class Share:
    """The evaluations after which one method has another's final reward, over the other's budget; inf: not in it."""

    score: float
    low: float
    high: float

    def __str__(self) -> str:
        score, low, high = (f"{v:.2f}" if v < math.inf else "above 1" for v in (self.score, self.low, self.high))
        return f"{score} [{low}, {high}]"


def share(fast: np.ndarray, slow: np.ndarray) -> Share:
    """The share of its evaluations at which the mean of `fast` (P, ticks) reaches the last mean of `slow` (P, ticks),
    with a 95 % interval over prompts: all of it is done again with resampled prompts."""

    def reached(index: Any) -> float:
        means, target = fast[index].mean(0), slow[index, -1].mean()
        hits = np.flatnonzero(means >= target)
        return (hits[0] + 1) / fast.shape[1] if len(hits) else math.inf

    count = len(fast)
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(count, size=(RESAMPLES, max(count - 1, 1)))
    found = np.sort([reached(index) for index in draws])
    low, high = found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]
    return Share(reached(np.arange(count)), float(low), float(high))


# ------------------------------------------------------------------------------------------------ what is said


def section(size: Size, results: Results) -> Section:
    readers = {method: reader_of(method, size, results) for method in size.methods}
    known = {method: reader for method, reader in readers.items() if reader is not None}
    claims = list(claims_of(known, size)) if "best-of-n" in known else []
    return Section("Search", rows(size), claims, "\n\n".join(texts(known, size)) if known else "")


def claims_of(known: Mapping[str, Reader], size: Size) -> Iterator[Claim]:
    budget = max(size.budgets)
    base = rewards_of(known["best-of-n"], "best-of-n", budget)
    for method, (page, paper) in PAPERS.items():
        if method not in known or base is None:
            continue
        found, command = rewards_of(known[method], method, budget), f"difftune search {method}"
        if found is None:
            yield Claim(method, page, paper, f"cannot begin at {budget} evaluations", None, command)
            continue
        change = paired([r for r, _ in found], [r for r, _ in base])
        ours = f"{said(change, 4)} of {REWARD} to best-of-N at {budget} evaluations"
        holds = above(change)
        if method == "dts-star":
            shares = {n: share_at(known, n) for n in size.budgets[-2:]}
            ours = f"{'; '.join(f'{s} of the {n}' for n, s in shares.items())} evaluations; {ours}"
            last = shares[budget]
            holds = True if last.high <= 0.2 else False if last.low > 0.2 else None
        yield Claim(method, page, paper, ours, holds, command)


def share_at(known: Mapping[str, Reader], budget: int, ticks: int = 100) -> Share:
    """DTS*'s share of a budget of best-of-N."""
    fast, slow = (curves(known[method], method, budget, ticks) for method in ("dts-star", "best-of-n"))
    return share(fast, slow)


def texts(known: Mapping[str, Reader], size: Size) -> Iterator[str]:
    """The tables: reward and oracle of every method at every budget, and differences to best-of-N."""
    yield (
        f"{size.prompts} prompts of ShapeEval-hard, seeds {', '.join(map(str, size.seeds))}, {size.setting.steps} "
        f"steps under CFG {size.setting.scale:g}, so that an image costs {2 * size.setting.steps} evaluations. "
        f"Intervals are 95 %, over prompts, each its mean over seeds; differences are paired."
    )
    head = ["method", "evaluations", REWARD, "oracle, held out", "difference to best-of-N", "oracle's difference"]
    lines = []
    for budget in size.budgets:
        base = rewards_of(known["best-of-n"], "best-of-n", budget) if "best-of-n" in known else None
        lines += [line(method, budget, rewards_of(reader, method, budget), base) for method, reader in known.items()]
    yield table(head, lines)
    if {"best-of-n", "dts-star"} <= known.keys():
        rows = [[n, share_at(known, n)] for n in size.budgets[-2:]]
        yield table(["best-of-N's evaluations", "share after which dts-star has its reward"], rows)


def line(method: str, budget: int, found: Any, base: Any) -> list[Any]:
    if found is None:
        return [method, budget, "cannot begin", "", "", ""]
    columns = list(zip(*found, strict=True))
    cells = [bench_search.interval(column, judge) for column, judge in zip(columns, (REWARD, "oracle"), strict=True)]
    if method == "best-of-n" or base is None:
        return [method, budget, *cells, "", ""]
    pairs = zip(columns, zip(*base, strict=True), strict=True)
    return [method, budget, *cells, *(said(paired(a, b), 4) for a, b in pairs)]
