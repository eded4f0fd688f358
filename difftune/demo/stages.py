"""The demo's stages: each makes pictures two ways from the same noises, and says what the difference is.

Everything is judged by the oracle, which no stage trains on, and by the reward of `Budget.judge`.
"""

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftune.configs.noise import RenoConfig
from difftune.configs.search import SearchConfig
from difftune.demo.budget import Budget
from difftune.evaluation.intervals import Estimate, Result, differences, estimate
from difftune.evaluation.shapeeval import Evaluation, entries_of, evaluate, judge_images, scores
from difftune.files import records
from difftune.files.pictures import read_picture
from difftune.lookup import guidance_named
from difftune.models import load as load_model
from difftune.pipelines.generate import pixels
from difftune.pipelines.opened import open_pipeline
from difftune.recipes import RECIPES, train_in_folder
from difftune.reno import run_folder as reno_folder
from difftune.search_runs import run_folder as search_folder
from rewards.registry import load

TRAINED = "training"  # the folder of the second stage's run
SHOWN = 60  # prompts of a stage in the report, at most


@dataclass(frozen=True)
class Judged:
    """Pictures of a stage, one way: the oracle's word and the reward of each."""

    results: list[Result]
    rewards: Tensor  # (N,)
    images: Tensor  # (N, 3, H, W)

    @property
    def oracle(self) -> float:
        return scores(self.results)["overall"].score

    @property
    def reward(self) -> float:
        return float(self.rewards.mean())


@dataclass(frozen=True)
class Stage:
    """What a stage found, for the report, the metrics and the screen."""

    title: str
    about: str
    heads: tuple[str, str]  # what the two ways are called
    before: Judged
    after: Judged
    metrics: dict[str, Any]
    said: str  # one line
    commands: list[str]
    curve: dict[str, Any] | None = None

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row for the whole and for each category: before, after, the paired difference."""
        before, after = self.before.results, self.after.results
        was, now, change = scores(before), scores(after), differences(after, before)
        return [{"name": name, "before": was[name], "after": now[name], "difference": change[name]} for name in now]

    @property
    def pictures(self) -> list[dict[str, Any]]:
        """Of at most `SHOWN` prompts, spread over the list: the first picture before and after, and if it holds."""
        found: dict[str, dict[str, Any]] = {}
        ways = [zip(way.results, pixels(way.images), strict=True) for way in (self.before, self.after)]
        for (was, picture), (now, later) in zip(*ways, strict=True):
            pair = {"prompt": was.prompt, "before": (picture, was.holds), "after": (later, now.holds)}
            found.setdefault(was.prompt, pair)
        return list(found.values())[:: -(-len(found) // SHOWN)]


# ------------------------------------------------------------------------------------------------ the stages


def guidance(b: Budget, seed: int, folder: Path) -> Stage:
    """The same prompts and noises without guidance and with it."""
    pipe, entries = open_pipeline(b.model), entries_of(b.prompts_per_category)
    ways: dict[str, dict[str, Any]] = {"none": {}, "cfg": {"scale": b.guidance_scale}}
    made = {
        name: evaluate(pipe, guidance_named(name, None, options), entries, b.guidance_images, b.steps, seed)
        for name, options in ways.items()
    }
    before, after = (judged_of(b, e) for e in made.values())
    oracle, _ = changes(before, after)
    costs = {name: {"nfe": e.made.nfe, "seconds": e.made.seconds} for name, e in made.items()}
    sizes = ["--steps", b.steps, "--images_per_prompt", b.guidance_images]
    sizes += ["--prompts_per_category", b.prompts_per_category]
    return Stage(
        "Guidance: a plugin swapped in a diffusers pipeline",
        f"The same prompts and noises, without guidance and with classifier-free guidance at scale {b.guidance_scale}, "
        f"{b.steps} steps, model {b.model}.",
        ("none", "cfg"),
        before,
        after,
        {
            "none": {"shapeeval": before.oracle, **costs["none"]},
            "cfg": {"shapeeval": after.oracle, **costs["cfg"]},
            "oracle_difference": asdict(oracle),
        },
        f"guidance: cfg against none, oracle {verdict(oracle)}",
        [
            eval_command(b.model, sizes, seed, ["none"]),
            eval_command(b.model, sizes, seed, ["cfg", "--guidance_scale", b.guidance_scale]),
        ],
    )


def training(b: Budget, seed: int, folder: Path) -> Stage:
    """A LoRA of the few-step model trained on the reward, judged on prompts that it was not trained on."""
    config = RECIPES[b.recipe].config(
        model=b.turbo,
        reward=[b.judge],
        output_dir=str(folder / TRAINED),
        guidance=b.train_guidance,
        num_inference_steps=b.train_sampler_steps,
        max_train_steps=b.train_steps,
        train_batch_size=b.train_batch,
        seed=seed,
        **b.recipe_options,
    )
    method, entries = guidance_named(b.train_guidance), entries_of(b.held_out_prompts_per_category)
    each, steps = b.held_out_images, b.train_sampler_steps
    before = judged_of(b, evaluate(open_pipeline(b.turbo), method, entries, each, steps, seed))
    seconds = train_in_folder(config, show=print)["seconds"]
    after = judged_of(b, evaluate(open_pipeline(b.turbo, config.output_dir), method, entries, each, steps, seed))
    curve = [record["reward_mean"] for record in records.records(folder / TRAINED / "metrics.jsonl")]
    oracle, reward = changes(before, after)
    title = RECIPES[b.recipe].title
    options = ["--steps", steps, "--images_per_prompt", each]
    options += ["--prompts_per_category", b.held_out_prompts_per_category]
    return Stage(
        f"{title}: a LoRA trained on a reward",
        f"Gradients of {b.judge} flow through the whole sampler (steps: {steps}, guidance: {b.train_guidance}) into a "
        f"LoRA of {b.turbo}. Before and after on ShapeEval with the same noises; its captions are not among the "
        "training prompts.",
        ("before", "after"),
        before,
        after,
        {"recipe": b.recipe, **both(before, after), "optimizer_steps": len(curve), "seconds": seconds},
        f"{b.recipe}: {len(curve)} updates, oracle {verdict(oracle)}; reward {verdict(reward)}",
        [command(f"train {b.recipe}", config)]
        + [eval_command(b.turbo, options, seed, [b.train_guidance], lora) for lora in (None, config.output_dir)],
        {"y": curve, "x_label": "optimiser step", "y_label": f"training reward ({b.judge})"},
    )


def reno(b: Budget, seed: int, folder: Path) -> Stage:
    """The noise of a few prompts optimised on the smoothed reward; the oracle is held out."""
    prompts = [entry["prompt"] for entry in entries_of(b.reno_prompts_per_category)]
    config = RenoConfig(
        prompt=prompts,
        model=b.turbo,
        reward=[b.smoothed],
        output_dir=str(folder / "reno"),
        num_inference_steps=b.reno_steps,
        iterations=b.reno_iterations,
        held_out="oracle",
        animation="none",
        seed=seed,
    )
    found = reno_folder.optimize_in_folder(config, show=print)
    seeds = [entry["seed"] for entry in found["prompts"]]
    before, after = (
        judged_pictures(b, read_all(folder / "reno", when, len(prompts)), prompts, seeds)
        for when in ("before", "after")
    )
    totals = [[record["total"] for record in entry["history"]] for entry in found["prompts"]]
    oracle, reward = changes(before, after)
    return Stage(
        "ReNO: the initial noise optimised at inference",
        f"The weights of {b.turbo} stay as they are; the noise of each prompt follows the gradient of {b.smoothed}. "
        "Before is the first noise, after is the one of the best reward.",
        ("before", "after"),
        before,
        after,
        {**both(before, after), "iterations": found["iterations"], "seconds": found["seconds"]},
        f"reno: {found['iterations']} iterations, oracle {verdict(oracle)}; reward {verdict(reward)}",
        [command("optimize", config)],
        {
            "y": [sum(column) / len(column) for column in zip(*totals, strict=True)],
            "x_label": "iteration",
            "y_label": f"reward ({b.smoothed}), mean over prompts",
        },
    )


def search(b: Budget, seed: int, folder: Path) -> Stage:
    """A search on hard prompts against best-of-N, at as many network evaluations."""
    began, pipe = time.perf_counter(), load_model(b.model)
    prompts = [entry["prompt"] for entry in entries_of(b.search_prompts_per_category, "shapeeval-hard")]
    configs = [
        SearchConfig(
            method=method,
            prompt=prompts,
            model=b.model,
            reward=[b.judge],
            output_dir=str(folder / method),
            nfe_budget=b.search_nfe,
            seed=seed,
            num_inference_steps=b.search_sampler_steps,
            guidance_scale=b.guidance_scale,
        )
        for method in ("best-of-n", b.search_method)
    ]
    found = [search_folder.begin_search(config, None, pipe, None).run() for config in configs]
    seeds = [seed + i for i in range(len(prompts))]
    before, after = (judged_pictures(b, each.images, prompts, seeds) for each in found)
    oracle, reward = changes(before, after)
    facts = {"method": b.search_method, "baseline": "best-of-n", "nfe": b.search_nfe}
    return Stage(
        f"Search: {b.search_method} against best-of-n",
        f"{len(prompts)} prompts of ShapeEval-hard, {b.search_nfe} network evaluations each, "
        f"{b.search_sampler_steps} steps under classifier-free guidance at scale {b.guidance_scale}, model {b.model}; "
        f"both raise {b.judge}.",
        ("best-of-n", b.search_method),
        before,
        after,
        {**facts, **both(before, after), "seconds": time.perf_counter() - began},
        f"search: {b.search_method} against best-of-n, {b.search_nfe} NFE each, reward {verdict(reward)}; "
        f"oracle {verdict(oracle)}",
        [command(f"search {config.method}", config) for config in configs],
    )


STAGES = {"guidance": guidance, "alignprop": training, "reno": reno, "search": search}  # names of metrics.json


# ------------------------------------------------------------------------------------------------ judging


@torch.no_grad()
def judged_pictures(b: Budget, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Judged:
    return Judged(judge_images(images, prompts, seeds), load(b.judge)(images, prompts), images)


def judged_of(b: Budget, e: Evaluation) -> Judged:
    """The pictures of an evaluation, with the reward of each."""
    with torch.no_grad():
        rewards = load(b.judge)(e.made.images, [result.prompt for result in e.results])
    return Judged(e.results, rewards, e.made.images)


def changes(before: Judged, after: Judged) -> tuple[Estimate, Estimate]:
    """After minus before, paired and over prompts: of the oracle, and of the reward, which is between -1 and 1."""
    by_prompt: dict[str, list[float]] = {}
    for result, change in zip(after.results, (after.rewards - before.rewards).tolist(), strict=True):
        by_prompt.setdefault(result.prompt, []).append(change)
    means = [sum(values) / len(values) for values in by_prompt.values()]
    return differences(after.results, before.results)["overall"], estimate(means, bounds=(-2.0, 2.0))


def both(before: Judged, after: Judged) -> dict[str, Any]:
    """Reward and oracle, before and after, and the differences with their intervals."""
    oracle, reward = changes(before, after)
    found = {"reward_before": before.reward, "reward_after": after.reward}
    found |= {"oracle_before": before.oracle, "oracle_after": after.oracle}
    return {**found, "reward_difference": asdict(reward), "oracle_difference": asdict(oracle)}


def verdict(change: Estimate) -> str:
    """The difference, its interval, and whether that excludes 0."""
    digits = 3 if abs(change.score) >= 0.01 else 4
    low, score, high = (f"{value:+.{digits}f}" for value in (change.low, change.score, change.high))
    return f"{score} [{low}, {high}] {'excludes' if change.excludes_zero else 'includes'} 0"


def read_all(folder: Path, when: str, count: int) -> Tensor:
    return torch.stack([read_picture(folder / f"{i:03d}-{when}.png") for i in range(count)])


# ------------------------------------------------------------------------------------------------ commands


def command(name: str, config: Any) -> str:
    """The command line that gives this Config: a flag for every field that is not at its default, except a method,
    which stands in the command's name."""
    defaults = type(config)()
    words = ["difftune", *name.split()]
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name == "method":
            continue
        if value != getattr(defaults, f.name) or f.name in ("model", "reward", "output_dir", "seed"):
            words += [f"--{f.name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def eval_command(
    model: str, options: Sequence[Any], seed: int, guidance: Sequence[Any], lora: str | None = None
) -> str:
    words = ["difftune", "eval", "--model", model, *(["--lora", lora] if lora else []), "--guidance", *guidance]
    return shlex.join(map(str, [*words, *options, "--seed", seed]))
