"""Every recipe end to end on the embedded models: what it raises, what that costs, and what it does to the rest.

    python scripts/bench_recipes.py [--recipes alignprop ddpo] [--seeds 0 1 2] [--quick] [--against] [--folder FOLDER]

A run is `difftune train RECIPE --config tiny-RECIPE --seed SEED` in a process of its own, which is stopped by SIGTERM
when it has taken `--cap` seconds. The model before and the LoRA after draw the same seeds of the same held-out prompts,
those of ShapeEval: the reward trained on, the oracle, the Vendi score of each prompt's pictures, how far their latents
moved (root mean square), and two more judges: `coverage`, and `tiny-classifier` of the prompts of one object. Intervals
are 95 %, of the paired difference, over prompts.

Costs are counted while training: a row through the network is one forward-equivalent, its way back two. The forwards of
the decoder and of the reward are not among them. Seconds are this process's own on a CPU, whatever else runs, with what
it takes to load the model; so are those of the cap, from the first forward on.

Each finished run is a line of FOLDER/results.jsonl: what stands there is not run again, a run that was cut off begins
anew. `--against` trains alignprop for three minutes and ddpo for ten times its forward-equivalents, both on saturation,
and measures their checkpoints on the way.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benching
import numpy as np
import torch
import yaml
from benching import Store, clock
from forwards import Forwards, counted
from safetensors.torch import load_file, save_file
from torch import Tensor

from difftune import models
from difftune.cli.config_file import EXAMPLES
from difftune.cli.program import cli
from difftune.evaluation import intervals, shapeeval
from difftune.files import checkpoint, records
from difftune.files.output import write
from difftune.lookup import guidance_named
from difftune.pipelines.opened import open_pipeline
from difftune.recipes import RECIPES
from difftune.training.run_folder import CONFIG, METRICS
from rewards.compose import parse_rewards, weighted
from rewards.registry import load
from rewards.sets.vendi import vendi
from rewards.world.classifier import load_classifier
from solvers.latent import LatentModel

THRICE = ("alignprop", "d3po", "pso", "dragon", "ddpo", "grpo", "nft", "adjoint-matching")  # seeds 0, 1, 2; others 0
CAP, GRACE = 480, 1200  # seconds of a run, and of what is measured around it
BUSY = 10  # how much longer a run may take by the clock on the wall, on a machine with other work
QUICK = ("--max_train_steps", "2", "--num_inference_steps", "3")
JUDGES = ("reward", "oracle", "vendi", "coverage", "classifier")
EVAL_SEED, POINTS = 1000, 12  # of the held-out noises; checkpoints that are measured of a run of `--against`
SAME = ("--reward", "saturation", "--guidance", "none")  # for both recipes of `--against`


@dataclass(frozen=True)
class Job:
    """A run, and how much is measured of it."""

    recipe: str
    seed: int
    folder: Path
    flags: tuple[str, ...] = ()
    cap: float = CAP  # seconds
    forwards: float = float("inf")  # forward-equivalents after which it is stopped
    per_category: int = 10
    images: int = 4
    points: int = 1  # checkpoints that are measured, the last one included
    steps: int | None = None  # of the sampler, where it is measured; None: as in training
    beside: float | None = None  # CFG's scale, under which the last checkpoint is measured too


# ------------------------------------------------------------------------------------------------ training


@contextmanager
def written_with_cost(forwards: Forwards) -> Iterator[None]:
    """Each line of metrics.jsonl tells what was spent until then: forwards, and seconds by `clock`."""
    append: Callable[..., None] = records.append
    began = clock()

    def priced(path: Path, record: Mapping[str, Any]) -> None:
        append(path, {**record, "forward_equivalents": forwards.total, "process_seconds": clock() - began})

    records.append = priced
    try:
        yield
    finally:
        records.append = append


def trained(job: Job) -> bool:
    """Run the command; whether it came to its end before it was stopped. Seconds are one thread's."""
    torch.set_num_threads(1)
    command = ["train", job.recipe, "--config", example_of(job.recipe), "--seed", str(job.seed)]
    command += ["--output_dir", str(job.folder), *job.flags]
    alarm = Alarm(job.cap)
    forwards = Forwards(limit=job.forwards, clock=alarm)
    try:
        with counted(forwards), written_with_cost(forwards), redirect_stdout(sys.stderr):
            cli.main(command, prog_name="difftune")
    except SystemExit as stop:
        if stop.code != 128 + signal.SIGTERM:
            raise
        return False
    finally:
        alarm.cancel()
    return True


class Alarm(threading.Thread):
    """Asks this process to end, by SIGTERM, once it has taken so many seconds by `clock` since the alarm began."""

    def __init__(self, cap: float):
        super().__init__(daemon=True)
        self.cap, self.cancelled = cap, threading.Event()

    def run(self) -> None:
        began = clock()
        while (left := self.cap - (clock() - began)) > 0:
            if self.cancelled.wait(max(left, 0.05)):  # one thread takes no more than passes on the wall
                return
        os.kill(os.getpid(), signal.SIGTERM)

    def cancel(self) -> None:
        self.cancelled.set()


def example_of(recipe: str) -> str:
    """The example of a recipe on an embedded model; SystemExit if there is none."""
    names = [path.stem for path in sorted(EXAMPLES.glob("tiny*.yaml")) if recipe in path.stem.split("-")]
    if not names:
        raise SystemExit(f"difftune/examples has no tiny-{recipe}.yaml")
    return names[0]


# ------------------------------------------------------------------------------------------------ measuring


def measured(job: Job, settings: Mapping[str, Any], lora: Path | None) -> dict[str, Tensor]:
    """{"reward", "oracle", "coverage" (N,), "classifier" (of the pictures of one object), "latents" (N, C, h, w),
    "vendi" (P,)} of N pictures of P held-out prompts."""
    pipe = open_pipeline(settings["model"], None if lora is None else str(lora))
    options = {k.removeprefix("guidance."): v for k, v in settings.items() if k.startswith("guidance.")}
    guidance = guidance_named(settings["guidance"], settings.get("guidance_scale"), options)
    entries, steps = shapeeval.entries_of(job.per_category), settings["num_inference_steps"]
    found = shapeeval.evaluate(pipe, guidance, entries, job.images, steps, EVAL_SEED)
    with torch.no_grad():
        reward = weighted(parse_rewards(settings["reward"]))
        parts = list(zip(found.made.images.split(60), chunks([r.prompt for r in found.results], 60), strict=True))
        features = torch.cat([load_classifier().features(x) for x, _ in parts])
        single = [i for i, r in enumerate(found.results) if r.category == "one_object"]
        return {
            "reward": torch.cat([reward(x, texts) for x, texts in parts]),
            "oracle": torch.tensor([float(r.holds) for r in found.results]),
            "coverage": torch.cat([load("coverage")(x, texts) for x, texts in parts]),
            "classifier": load("tiny-classifier")(found.made.images[single], [found.results[i].prompt for i in single]),
            "latents": torch.cat([LatentModel(pipe).encode_images(x) for x, _ in parts]).contiguous(),
            "vendi": torch.stack([vendi(x) for x in features.split(job.images)]),
        }


def chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    yield from (items[i : i + size] for i in range(0, len(items), size))


def before(job: Job, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the model does untrained: measured once for all runs that sample alike."""
    alike = {k: v for k, v in settings.items() if k.startswith("guidance")}
    alike |= {k: settings[k] for k in ("model", "num_inference_steps", "reward")}
    known = benching.weights(*(name for name, model in models.MODELS.items() if model.base is None))
    if settings["model"] in models.MODELS:
        known += benching.weights(settings["model"])
    key = json.dumps([alike, job.per_category, job.images, EVAL_SEED, JUDGES, known], sort_keys=True)
    file = job.folder.parent / f"before-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    if not file.exists():
        part = file.with_suffix(".part")
        save_file(measured(job, settings, None), part)
        part.rename(file)
    return load_file(file)


def compared(job: Job, now: Mapping[str, Tensor], then: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Per prompt: the means before and after of each measure, and the drift."""
    means = {
        f"{name}_{when}": of[name].reshape(-1, 1 if name == "vendi" else job.images).mean(1).tolist()
        for name in JUDGES
        for when, of in (("before", then), ("after", now))
    }
    drift = (now["latents"] - then["latents"]).flatten(1).square().mean(1).sqrt()
    return means | {"drift": drift.reshape(-1, job.images).mean(1).tolist()}


def run(job: Job, results: Path) -> None:
    """Train, measure, and write the line; in a process of its own, on one thread."""
    torch.set_num_threads(1)
    shutil.rmtree(job.folder, ignore_errors=True)
    ended = trained(job)
    settings = yaml.safe_load((job.folder / CONFIG).read_text())
    sampled = settings if job.steps is None else {**settings, "num_inference_steps": job.steps}
    spent = {line["step"]: line for line in records.records(job.folder / METRICS)}
    paths = chosen(checkpoint.checkpoints(job.folder), job.points)
    then, points = before(job, sampled), []
    for path in paths:
        step = int(path.name.rpartition("-")[2])
        cost = {"seconds": spent[step]["process_seconds"]}
        cost["forward_equivalents"] = spent[step]["forward_equivalents"]
        points.append({"step": step, **cost, **compared(job, measured(job, sampled, path), then)})
    curve = [[line["forward_equivalents"], line.get("reward_mean")] for line in spent.values()]
    found = {"recipe": job.recipe, "seed": job.seed, "ended": ended, "settings": settings}
    if job.beside is not None:
        other = under_cfg(sampled, job.beside)
        found["beside"] = compared(job, measured(job, other, paths[-1]), before(job, other))
    Store(results).write(job.folder.name, {**found, "points": points, "curve": curve})


def under_cfg(settings: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The settings with CFG in the place of their guidance."""
    kept = {k: v for k, v in settings.items() if not k.startswith("guidance")}
    return {**kept, "guidance": "cfg", "guidance_scale": scale}


def chosen(paths: Sequence[Path], count: int) -> list[Path]:
    """`count` of the checkpoints, evenly, with the last."""
    if not paths:
        raise SystemExit("the run saved no checkpoint: it was stopped before its first step")
    return [paths[i] for i in sorted({round(i) for i in np.linspace(len(paths) - 1, 0, count, endpoint=count > 1)})]


# ------------------------------------------------------------------------------------------------ the table


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """A markdown row for each recipe, over its seeds."""
    head = ["recipe", "reward", "seeds", "reward before", "reward after", "difference", "oracle"]
    head += ["difference of the oracle", "Vendi", "difference of Vendi", "difference of coverage"]
    head += ["difference of tiny-classifier", "drift", "seconds", "forward-equivalents"]
    recipes = list(dict.fromkeys(line["recipe"] for line in lines))
    return benching.table(head, [row([line for line in lines if line["recipe"] == recipe]) for recipe in recipes])


def row(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    last = [line["points"][-1] for line in lines]
    mean = {name: np.mean([point[name] for point in last], axis=0) for name in last[0]}  # over seeds
    stopped = sum(not line["ended"] for line in lines)
    return [
        lines[0]["recipe"] + (f" ({stopped} stopped at the cap)" if stopped else ""),
        ", ".join(name.removesuffix("=1.0") for name in lines[0]["settings"]["reward"]),
        str(len(lines)),
        f"{mean['reward_before'].mean():.4f}",
        f"{mean['reward_after'].mean():.4f}",
        change(mean, "reward", 4),
        f"{mean['oracle_before'].mean():.3f} to {mean['oracle_after'].mean():.3f}",
        change(mean, "oracle", 3),
        f"{mean['vendi_before'].mean():.3f} to {mean['vendi_after'].mean():.3f}",
        change(mean, "vendi", 3),
        change(mean, "coverage", 3),
        change(mean, "classifier", 3),
        f"{mean['drift'].mean():.3f}",
        f"{mean['seconds']:.0f}",
        f"{mean['forward_equivalents']:.0f}",
    ]


def change(mean: Mapping[str, Any], name: str, digits: int) -> str:
    """The paired difference with its interval over prompts."""
    e = intervals.estimate((mean[f"{name}_after"] - mean[f"{name}_before"]).tolist(), bounds=(-1.0, 1.0))
    return f"{e.score:+.{digits}f} [{e.low:+.{digits}f}, {e.high:+.{digits}f}]"


def reached(line: Mapping[str, Any], level: float) -> list[str]:
    """When a run's held-out reward first was at the level, among the checkpoints that were measured."""
    for point in line["points"]:
        if np.mean(point["reward_after"]) >= level:
            return [f"{point['forward_equivalents']:.0f}", f"{point['seconds']:.0f}"]
    return ["not reached"] * 2


def duel(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """Forward-equivalents and seconds of alignprop and ddpo to the best held-out reward of each."""
    rows: list[list[str]] = []
    for owner, line in lines.items():
        level = max(float(np.mean(point["reward_after"])) for point in line["points"])
        rows += [[f"{level:.4f}, the best of {owner}", name, *reached(of, level)] for name, of in lines.items()]
    start = float(np.mean(next(iter(lines.values()))["points"][0]["reward_before"]))
    head = ["held-out reward", "of", "forward-equivalents", "seconds"]
    return f"{benching.table(head, rows)}\n\nBefore training the held-out reward is {start:.4f}."


# ------------------------------------------------------------------------------------------------ the command


def follow(job: Job, results: Path) -> None:
    """Run the job, unless its line is there, in a process of its own that is ended where it hangs."""
    if job.folder.name in Store(results).read():
        return
    alone(job, run, job, results)


def alone(job: Job, work: Callable[..., object], *given: Any) -> bool:
    """Whether a function came to its end in a process of its own, which is ended where it hangs."""
    print(f"{job.folder.name}: training", file=sys.stderr, flush=True)
    process = multiprocessing.get_context("spawn").Process(target=work, args=given)
    process.start()
    process.join(BUSY * job.cap + GRACE)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode:
        print(f"{job.folder.name}: failed with {process.exitcode}", file=sys.stderr, flush=True)
    return process.exitcode == 0


def jobs(given: argparse.Namespace) -> list[Job]:
    sizes: dict[str, Any] = {"cap": given.cap}
    if given.quick:
        sizes |= {"cap": 120, "per_category": 1, "images": 2, "flags": QUICK}
    found = []
    for recipe in given.recipes:
        seeds = given.seeds or ([0, 1, 2] if recipe in THRICE and not given.quick else [0])
        found += [Job(recipe, seed, given.folder / f"{recipe}-{seed}", **sizes) for seed in seeds]
    return found


def against(given: argparse.Namespace) -> None:
    """AlignProp for three minutes, DDPO for ten times its forward-equivalents, and their table."""
    flags = (*SAME, "--max_train_steps", "1000000", "--checkpointing_steps", "5")
    results = given.folder / "results.jsonl"
    sizes: dict[str, Any] = {"points": POINTS, "flags": flags, "per_category": 1 if given.quick else 5}
    cap, most = (20, 240) if given.quick else (180, 3 * 3600)
    follow(Job("alignprop", 0, given.folder / "against-alignprop", cap=cap, **sizes), results)
    spent = Store(results).read()["against-alignprop"]["points"][-1]["forward_equivalents"]
    follow(Job("ddpo", 0, given.folder / "against-ddpo", cap=most, forwards=10 * spent, **sizes), results)
    print(duel({name: Store(results).read()[f"against-{name}"] for name in ("alignprop", "ddpo")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipes", nargs="*", default=list(RECIPES), help=f"Of {', '.join(RECIPES)}; all if left out."
    )
    parser.add_argument("--seeds", nargs="*", type=int, help=f"0 1 2 of {', '.join(THRICE)} and 0 of the rest.")
    parser.add_argument("--cap", type=float, default=CAP, help="Seconds after which a run is stopped.")
    parser.add_argument("--quick", action="store_true", help="Two steps of each: whether it works.")
    parser.add_argument("--against", action="store_true", help="AlignProp against DDPO instead.")
    parser.add_argument("--folder", type=Path, help="runs/bench_recipes, or runs/bench_recipes_quick.")
    given = parser.parse_args()
    if unknown := set(given.recipes) - set(RECIPES):
        parser.error(f"no recipe {', '.join(sorted(unknown))}: there are {', '.join(RECIPES)}")
    given.folder = given.folder or Path("runs/bench_recipes_quick" if given.quick else "runs/bench_recipes")
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.against:
        return against(given)
    for job in jobs(given):
        follow(job, given.folder / "results.jsonl")
    lines = [line for job in jobs(given) if (line := Store(given.folder / "results.jsonl").read().get(job.folder.name))]
    if not lines:
        parser.exit(1, "no run came to its end\n")
    write(given.folder / "table.md", table(lines) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
