"""Noise optimisation of `tiny-turbo` on ShapeEval-hard at equal time, and how ReNO's defaults were chosen.

Methods follow one another on a block of prompts: ReNO first, whose time the others have. The noise hypernetwork is
trained first; its time is that of a picture.
"""

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import bench_recipes
import bench_reno
from bench_recipes import Job
from bench_reno import JUDGE, Part, Run
from benching import Store, clock, table

from difftune.evaluation.intervals import Estimate, estimate
from difftune.files import checkpoint, records
from difftune.pipelines.noise_lora import moved_noises
from difftune.pipelines.opened import open_pipeline
from difftune.reno.paper import learning_rate
from difftune.training.run_folder import METRICS
from evidence.rows import Claim, Results, Row, Section, above, paired, said

SMOOTH = "smooth[reward=tiny-clip,shifts=4,pixels=3]"
MODELS = ("tiny-turbo", "tiny-clip")
METHODS = ("none", "reno", "best-time", "neighbours-time", "hypernoise", "best-hypernoise")
TITLES = {"best-time": "best-of-N, ReNO's time", "neighbours-time": "neighbours, ReNO's time"}
TITLES |= {"best-hypernoise": "best-of-N, hypernoise's time"}
RATE = learning_rate(4 * 8 * 8)  # of the default, for the latents of `tiny-turbo`
VARIANTS: dict[str, tuple[tuple[str, Any], ...]] = {  # of ReNO's regulariser and rate; the first is the default
    "chi .01": (),
    "chi .01, half the rate": (("learning_rate", RATE / 2),),
    "chi .01, twice the rate": (("learning_rate", RATE * 2),),
    "chi .1": (("regularization_weight", 0.1),),
    "spectral .01": (("regularizer", "spectral"),),
    "spectral .1": (("regularizer", "spectral"), ("regularization_weight", 0.1)),
    "dno .01": (("regularizer", "dno"),),
    "none": (("regularization_weight", 0.0),),
}


class Size(NamedTuple):
    """How much is optimised."""

    part: Part = Part("tiny-turbo", 1, None, 50, None, "shapeeval-hard", SMOOTH)
    seeds: tuple[int, ...] = (0, 1, 2)
    cap: float = 480  # seconds of the hypernetwork's training
    flags: tuple[str, ...] = ("--reward", SMOOTH, "--max_train_steps", "100000", "--checkpointing_steps", "20")
    chosen_on: tuple[int, ...] = (10,)  # seeds of the choice of defaults, on which nothing else is reported
    variants: int | None = 10  # prompts of each category of ShapeEval, on which nothing else is reported either


QUICK_PART = Part("tiny-turbo", 1, None, 3, 1, "shapeeval-hard", SMOOTH)
QUICK_FLAGS = ("--reward", SMOOTH, "--max_train_steps", "2", "--train_batch_size", "2")
QUICK = Size(QUICK_PART, (0,), 900, QUICK_FLAGS, (10,), 1)


@dataclass(frozen=True)
class Noise:
    """The rows of a size, with the results that some of them read."""

    size: Size
    results: Results

    def runs(self, part: Part, seed: int) -> list[Run]:
        """The blocks of prompts, the noises of each seed apart."""
        return [replace(run, first=run.first + 1000 * seed) for run in bench_reno.runs("turbo", part, ["reno"])]

    def row(self, method: str, run: Run) -> Row:
        """One method on one block of prompts."""
        settings = {"method": method, "part": repr(self.size.part), "first": run.first, "prompts": run.prompts}
        if "hypernoise" in method:
            settings |= {"flags": self.size.flags, "cap": self.size.cap}
        measure = partial(self.measured, method, replace(run, method=method))
        return Row(f"noise/{method}-{run.first:05d}", settings, MODELS, measure, f"noise-{run.first}")

    def measured(self, method: str, run: Run) -> dict[str, Any]:
        warm(self.size.part)
        if method == "hypernoise":
            return moved(self.size.part, run, self.results.measured(self.trained())["folder"])
        return bench_reno.measured(self.size.part, self.known_as(method, run), self.store(method, run))

    def known_as(self, method: str, run: Run) -> Run:
        return replace(run, method="best-time") if method == "best-hypernoise" else run

    def store(self, method: str, run: Run) -> Store:
        """The store in which a method that has another's time looks for it."""
        store = Store(self.results.folder / f"noise/times-{method}-{run.first:05d}.jsonl")
        if method.endswith("-time") or method == "best-hypernoise":
            other = "reno" if method.endswith("-time") else "hypernoise"
            store.file.unlink(missing_ok=True)
            store.write(run.key("reno"), {"seconds": self.results.measured(self.row(other, run))["seconds"]})
        return store

    def trained(self) -> Row:
        """The hypernetwork, in a folder of its own."""
        settings = {"flags": self.size.flags, "cap": self.size.cap}
        return Row("noise/hypernetwork", settings, MODELS, self.train)

    def train(self) -> dict[str, Any]:
        folder = (self.results.folder / "noise/hypernetwork").resolve()
        shutil.rmtree(folder, ignore_errors=True)
        job = Job("hypernoise", 0, folder, self.size.flags, self.size.cap)
        if not bench_recipes.alone(job, bench_recipes.trained, job):
            raise SystemExit("the training of the hypernetwork failed")
        if not checkpoint.checkpoints(folder):
            raise SystemExit("the training of the hypernetwork was stopped before its first update")
        last = checkpoint.checkpoints(folder)[-1]
        lines = list(records.records(folder / METRICS))
        return {"folder": str(last), "updates": lines[-1]["step"], "seconds": sum(line["seconds"] for line in lines)}

    # ------------------------------------------------------------------------------------------ ReNO's defaults

    def variant(self, name: str, run: Run) -> Row:
        part = replace(self.choice, options=VARIANTS[name])
        settings = {"part": repr(part), "first": run.first, "prompts": run.prompts}
        place = f"noise/variant-{list(VARIANTS).index(name)}-{run.first:05d}"
        return Row(place, settings, MODELS, partial(chosen, part, run), f"variant-{run.first}")

    def variants(self, name: str) -> list[Row]:
        return [self.variant(name, run) for seed in self.size.chosen_on for run in self.runs(self.choice, seed)]

    @property
    def choice(self) -> Part:
        return replace(self.size.part, prompts=self.size.variants, listed="shapeeval")

    def of_method(self, method: str) -> list[Row]:
        return [self.row(method, run) for seed in self.size.seeds for run in self.runs(self.size.part, seed)]

    def rows(self) -> list[Row]:
        """Block after block, so that a part of them is already a result."""
        blocks = zip(*(self.of_method(method) for method in METHODS), strict=True)
        choice = zip(*(self.variants(name) for name in VARIANTS), strict=True)
        return [self.trained(), *chain.from_iterable(blocks), *chain.from_iterable(choice)]


def chosen(part: Part, run: Run) -> dict[str, Any]:
    warm(part)
    return bench_reno.measured(part, run, Store(Path("unused")))


@cache
def warm(part: Part) -> None:
    """Once a process, before what is timed."""
    bench_reno.warm(part)


@cache
def hypernetwork(folder: str, model: str) -> Any:
    return open_pipeline(model, folder)


def moved(part: Part, run: Run, folder: str) -> dict[str, Any]:
    """The pictures of noises that the hypernetwork has moved; the time of reading it is not counted."""
    seeds, pipe = [run.first + i for i in range(len(run.prompts))], hypernetwork(folder, part.model)
    moved_noises(pipe, run.prompts[:1], seeds[:1], part.steps)
    began = clock()
    noises = moved_noises(pipe, run.prompts, seeds, part.steps)
    result = part.reno(JUDGE).optimize(run.prompts, 1, start=noises)
    seconds = clock() - began
    return {"prompts": run.prompts, **bench_reno.judged(result.images, run.prompts), "calls": 1, "seconds": seconds}


# ------------------------------------------------------------------------------------------------ what is said


@dataclass(frozen=True)
class Told:
    """A method's results: of each prompt, mean over seeds, the oracle's word and the judge's score; costs of one."""

    holds: list[float]
    scores: list[float]
    calls: float
    seconds: float


def told(found: Sequence[Mapping[str, Any]]) -> Told:
    holds, scores = defaultdict(list), defaultdict(list)
    for part in found:
        for prompt, word, score in zip(part["prompts"], part["holds"], part["scores"], strict=True):
            holds[prompt].append(float(word))
            scores[prompt].append(score)
    seconds = sum(part["seconds"] for part in found) / sum(len(part["prompts"]) for part in found)
    calls = sum(part["calls"] for part in found) / len(found)
    return Told([mean(v) for v in holds.values()], [mean(v) for v in scores.values()], calls, seconds)


def section(size: Size, results: Results) -> Section:
    noise = Noise(size, results)
    known = {m: told(found) for m in METHODS if (found := results.all_of(noise.of_method(m)))}
    choice = {name: told(found) for name in VARIANTS if (found := results.all_of(noise.variants(name)))}
    texts = [methods_text(size, known)] if known else []
    texts += [choice_text(size, choice)] if choice else []
    return Section("Noise optimisation", noise.rows(), list(claims_of(known)), "\n\n".join(texts))


def claims_of(known: Mapping[str, Told]) -> Iterator[Claim]:
    """What is claimed of each method, of the oracle, which is held out."""

    def change(a: str, b: str) -> Estimate:
        return paired(known[a].holds, known[b].holds)

    if {"reno", "none"} <= known.keys():
        ours, paper = change("reno", "none"), "few-step models follow prompts better (GenEval .49 to .63, SD-Turbo)"
        said_ = f"oracle, held out: {said(ours)} to the first noise"
        yield Claim("ReNO", "reno.md", paper, said_, above(ours), "difftune optimize")
    if {"reno", "best-time"} <= known.keys():
        ours, paper = change("reno", "best-time"), "better than best-of-N (GenEval .63 and .60, SD-Turbo)"
        said_ = f"oracle, held out: {said(ours)} to best-of-N in the same time"
        yield Claim("ReNO against best-of-N", "reno.md", paper, said_, above(ours), "difftune optimize")
    if {"hypernoise", "none"} <= known.keys():
        ours, paper = change("hypernoise", "none"), "most of ReNO's gain in one pass (GenEval .49 to .57, SD-Turbo)"
        said_ = f"oracle, held out: {said(ours)} to the first noise"
        if "best-hypernoise" in known:
            said_ += f", {said(change('hypernoise', 'best-hypernoise'))} to best-of-N in the same time"
        yield Claim("HyperNoise", "recipes/hypernoise.md", paper, said_, above(ours), "difftune train hypernoise")
    if {"neighbours-time", "best-time"} <= known.keys():
        ours, paper = change("neighbours-time", "best-time"), "a search around a noise goes on where random draws stop"
        said_ = f"oracle, held out: {said(ours)} to best-of-N in the same time"
        command = "difftune optimize --optimizer neighbours"
        yield Claim("neighbours", "reno.md", paper, said_, above(ours), command)


def methods_text(size: Size, known: Mapping[str, Told]) -> str:
    """The table of methods, each beside the first noise and beside best-of-N in its time."""
    prompts = len(next(iter(known.values())).holds)
    lead = (
        f"{prompts} prompts of ShapeEval-hard, `tiny-turbo` in one step, seeds {', '.join(map(str, size.seeds))}; ReNO "
        f"follows `{SMOOTH}` for {size.part.iterations} iterations, all others `{JUDGE}`, the judge of the table. "
        "Seconds are those of a picture on one thread. Intervals are 95 %, over prompts, each its mean over seeds, and "
        "paired."
    )
    rows = []
    for name, found in known.items():
        of = "best-hypernoise" if name == "hypernoise" else "best-time"
        cells = [estimate(found.holds), said(paired(found.holds, known["none"].holds)) if "none" in known else ""]
        cells.append(said(paired(found.holds, known[of].holds)) if of in known and name in RIVALS else "")
        costs = [f"{mean(found.scores):.4f}", f"{found.calls:.1f}", f"{found.seconds:.2f}"]
        rows.append([TITLES.get(name, name), *cells, *costs])
    head = ["method", "oracle", "to the first noise", "to best-of-N in its time", JUDGE, "reward calls", "seconds"]
    return f"{lead}\n\n{table(head, rows)}"


RIVALS = ("reno", "neighbours-time", "hypernoise")


def choice_text(size: Size, choice: Mapping[str, Told]) -> str:
    """The table of ReNO's variants, each beside the default, paired."""
    first = next(iter(VARIANTS))
    rows = []
    for name, found in choice.items():
        changes = ["", ""]
        if first in choice and name != first:
            pairs = ((found.holds, choice[first].holds), (found.scores, choice[first].scores))
            changes = [said(paired(a, b)) for a, b in pairs]
        rows.append([name, estimate(found.holds), changes[0], f"{mean(found.scores):.4f}", changes[1]])
    lead = (
        f"ReNO's regulariser and rate, with the smoothed reward, on {len(next(iter(choice.values())).holds)} prompts "
        f"of ShapeEval and seeds {', '.join(map(str, size.chosen_on))}, which nothing else is reported on; the first "
        "row is the default, and the others are paired with it:"
    )
    head = ["regulariser, weight and rate", "oracle", "to the default", JUDGE, "to the default "]
    return f"{lead}\n\n{table(head, rows)}"
