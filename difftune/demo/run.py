"""The main job on the embedded models, offline: guidance swapped, a LoRA trained, a noise optimised, all judged.

Everything is judged by the oracle, which no stage trains on, and by the reward that was raised.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftune.configs.noise import RenoConfig
from difftune.configs.recipes import AlignPropConfig
from difftune.demo import report
from difftune.errors import UserError
from difftune.evaluation.intervals import Result, differences
from difftune.evaluation.shapeeval import Evaluation, entries_of, evaluate, judge_images, scores
from difftune.files import output, records
from difftune.files.claim import claimed
from difftune.files.pictures import read_picture
from difftune.lookup import guidance_named
from difftune.pipelines.generate import pixels
from difftune.pipelines.opened import open_pipeline
from difftune.recipes import train_in_folder
from difftune.reno import run_folder as reno_folder
from rewards.compose import weighted

MARK = ".difftune-demo"  # what tells a demo's folder from any other
EARLIER = ".earlier"  # where the files of the demo before lie meanwhile
WRITTEN = (MARK, "alignprop", "reno", "report.html", "metrics.json")


@dataclass(frozen=True)
class Budget:
    """The size of each stage; all of it in under six minutes on two cores."""

    model: str = "tiny"
    turbo: str = "tiny-turbo"
    reward: str = "tiny-clip"
    guidance_scale: float = 3.0
    steps: int = 25  # of the sampler
    prompts_per_category: int = 10
    images_per_prompt: int = 1
    train_steps: int = 40
    train_batch: int = 8
    reno_prompts_per_category: int = 2
    reno_steps: int = 1
    reno_iterations: int = 30


def run_demo(output_dir: str | Path = "runs/demo", seed: int = 0, budget: Budget | None = None) -> dict[str, Any]:
    """All stages; writes report.html and metrics.json, and returns what metrics.json holds."""
    budget, began = budget or Budget(), time.perf_counter()
    with _replaced(output_dir) as folder:
        guided, before = _guidance(budget, seed)
        aligned = _alignprop(budget, seed, folder, before)
        noises = _reno(budget, seed, folder)
        stages = {"guidance": guided, "alignprop": aligned, "reno": noises}
        metrics = {name: stage["metrics"] for name, stage in stages.items()}
        metrics["seconds_total"] = round(time.perf_counter() - began, 1)
        output.write(folder / "report.html", report.render(stages, metrics, asdict(budget), seed))
        output.write_json(folder / "metrics.json", metrics)
    return metrics


@contextmanager
def _replaced(output_dir: str | Path) -> Iterator[Path]:
    """The folder, empty and ours alone; an earlier demo comes back if this one fails, or was killed.

    Raises UserError for a folder that is not a demo's, and where another process has it.
    """
    with claimed(output_dir) as claim:
        claim.clear()
        folder = claim.path
        _bring_back(folder)
        held = claim.held()
        if held and MARK not in held:
            raise UserError(f"{folder} holds another run ({held[0]}): nothing was written, choose another --output_dir")
        with output.written(folder):
            (folder / EARLIER).mkdir()
            for name in held:
                (folder / name).rename(folder / EARLIER / name)
        claim.note(*WRITTEN)
        try:
            claim.write(MARK, "")
            yield folder
        except BaseException:
            claim.clear()
            _bring_back(folder)
            raise
        claim.end(EARLIER)


def _bring_back(folder: Path) -> None:
    """Put back the files of the demo before the one that was cleared."""
    if (folder / EARLIER).is_dir():
        with output.written(folder):
            for path in (folder / EARLIER).iterdir():
                path.rename(folder / path.name)
            (folder / EARLIER).rmdir()


# ------------------------------------------------------------------------------------------------ stages


def _guidance(b: Budget, seed: int) -> tuple[dict[str, Any], Evaluation]:
    """The same prompts and seeds without guidance and with it."""
    _say("guidance: none against cfg")
    pipe, entries = open_pipeline(b.model), entries_of(b.prompts_per_category)
    settings: dict[str, dict[str, Any]] = {"none": {}, "cfg": {"scale": b.guidance_scale}}
    made = {
        name: evaluate(pipe, guidance_named(name, None, options), entries, b.images_per_prompt, b.steps, seed)
        for name, options in settings.items()
    }
    metrics = {
        name: {"shapeeval": _overall(e.results), "nfe": e.made.nfe, "seconds": e.made.seconds}
        for name, e in made.items()
    }
    none, cfg = made["none"], made["cfg"]
    return {
        "metrics": metrics,
        "table": _compared(none.results, cfg.results),
        "pictures": _pairs(none.results, none.made.images, cfg.results, cfg.made.images),
        "commands": [_eval_command(b, seed, "none"), _eval_command(b, seed, "cfg")],
    }, cfg


def _alignprop(b: Budget, seed: int, folder: Path, before: Evaluation) -> dict[str, Any]:
    """A LoRA trained on the reward, judged on prompts that it was not trained on."""
    _say("alignprop: a LoRA trained on the reward")
    config = AlignPropConfig(
        model=b.model,
        reward=[b.reward],
        output_dir=str(folder / "alignprop"),
        guidance_scale=b.guidance_scale,
        num_inference_steps=b.steps,
        max_train_steps=b.train_steps,
        train_batch_size=b.train_batch,
        seed=seed,
    )
    trained = train_in_folder(config)
    method = guidance_named("cfg", b.guidance_scale)
    pipe = open_pipeline(b.model, config.output_dir)
    after = evaluate(pipe, method, entries_of(b.prompts_per_category), b.images_per_prompt, b.steps, seed)
    curve = [record["reward_mean"] for record in records.records(folder / "alignprop" / "metrics.jsonl")]
    metrics = {
        "reward_before": _reward(b.reward, before.made.images, before.results),
        "reward_after": _reward(b.reward, after.made.images, after.results),
        "oracle_before": _overall(before.results),
        "oracle_after": _overall(after.results),
        "optimizer_steps": len(curve),
        "seconds": trained["seconds"],
    }
    return {
        "metrics": metrics,
        "table": _compared(before.results, after.results),
        "pictures": _pairs(before.results, before.made.images, after.results, after.made.images),
        "curve": {"y": curve, "x_label": "optimiser step", "y_label": f"training reward ({b.reward})"},
        "commands": [command("train alignprop", config), _eval_command(b, seed, "cfg", config.output_dir)],
    }


def _reno(b: Budget, seed: int, folder: Path) -> dict[str, Any]:
    """The noise of a few prompts optimised on the reward."""
    _say("reno: the initial noise optimised on the reward")
    prompts = [entry["prompt"] for entry in entries_of(b.reno_prompts_per_category)]
    config = RenoConfig(
        prompt=prompts,
        model=b.turbo,
        reward=[b.reward],
        output_dir=str(folder / "reno"),
        num_inference_steps=b.reno_steps,
        iterations=b.reno_iterations,
        seed=seed,
    )
    found = reno_folder.optimize_in_folder(config)
    before, after = (_read(folder / "reno", when, len(prompts)) for when in ("before", "after"))
    seeds = [entry["seed"] for entry in found["prompts"]]
    was, now = judge_images(before, prompts, seeds), judge_images(after, prompts, seeds)
    totals = [[record["total"] for record in entry["history"]] for entry in found["prompts"]]
    metrics = {
        "reward_before": found["reward_before"],
        "reward_after": found["reward_after"],
        "oracle_before": _overall(was),
        "oracle_after": _overall(now),
        "iterations": found["iterations"],
        "seconds": found["seconds"],
    }
    curve = [sum(column) / len(column) for column in zip(*totals, strict=True)]
    return {
        "metrics": metrics,
        "table": _compared(was, now),
        "pictures": _pairs(was, before, now, after),
        "curve": {"y": curve, "x_label": "iteration", "y_label": f"reward ({b.reward}), mean over prompts"},
        "commands": [command("optimize", config)],
    }


# ------------------------------------------------------------------------------------------------ parts


def command(name: str, config: Any) -> str:
    """The command line that gives this Config: a flag for every field that is not at its default."""
    defaults = type(config)(prompt=[]) if isinstance(config, RenoConfig) else type(config)()
    words = ["difftune", *name.split()]
    for f in fields(config):
        value = getattr(config, f.name)
        if value != getattr(defaults, f.name) or f.name in ("model", "reward", "output_dir", "seed"):
            words += [f"--{f.name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _eval_command(b: Budget, seed: int, guidance: str, lora: str | None = None) -> str:
    words = ["difftune", "eval", "--model", b.model, *(["--lora", lora] if lora else []), "--guidance", guidance]
    words += ["--guidance_scale", str(b.guidance_scale)] if guidance == "cfg" else []
    words += ["--steps", str(b.steps), "--images_per_prompt", str(b.images_per_prompt)]
    return shlex.join([*words, "--prompts_per_category", str(b.prompts_per_category), "--seed", str(seed)])


def _compared(before: Sequence[Result], after: Sequence[Result]) -> list[dict[str, Any]]:
    """One row for the whole and for each category: before, after, the paired difference."""
    was, now, change = scores(before), scores(after), differences(after, before)
    return [{"name": name, "before": was[name], "after": now[name], "difference": change[name]} for name in now]


def _pairs(before: Sequence[Result], images: Tensor, after: Sequence[Result], images_after: Tensor) -> list[dict]:
    """Each prompt's first picture before and after, with the oracle's word."""
    pairs: dict[str, dict] = {}
    for was, picture, now, later in zip(before, pixels(images), after, pixels(images_after), strict=True):
        pair = {"prompt": was.prompt, "before": (picture, was.holds), "after": (later, now.holds)}
        pairs.setdefault(was.prompt, pair)
    return list(pairs.values())


@torch.no_grad()
def _reward(name: str, images: Tensor, results: Sequence[Result]) -> float:
    """The mean reward of images (N, 3, H, W)."""
    return weighted({name: 1.0})(images, [r.prompt for r in results]).mean().item()


def _overall(results: Sequence[Result]) -> float:
    return scores(results)["overall"].score


def _read(folder: Path, when: str, count: int) -> Tensor:
    return torch.stack([read_picture(folder / f"{i:03d}-{when}.png") for i in range(count)])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
