"""Validation: the same prompts and seeds again and again, a picture of them, and the reward that is held out.

`validation.jsonl` has a line for each, `validation/` a grid for each, `best/` the weights of the best.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difftune.configs.training import TrainingConfig
from difftune.errors import UserError
from difftune.files import checkpoint, output, records
from difftune.files.checkpoint import State
from difftune.files.films import check_films, mp4, stills
from difftune.files.prompts import read_prompts
from difftune.lookup import method_of, over_frames, reward_named, reward_weights
from difftune.pipelines import lora
from difftune.pipelines.generate import Sampling, generate_batches, pixels
from difftune.processes import say_once
from guidance.contract import Guidance
from rewards.checks import finite
from rewards.monitor import Monitor, Parting

RECORDS, GRIDS, BEST = "validation.jsonl", "validation", "best"
Scorer = Callable[[Tensor, list[str]], Tensor]


class Validation(NamedTuple):
    """One validation."""

    record: dict[str, float]  # step, reward_mean and held_out_mean, see `load_scorers`
    images: Tensor  # (B, 3, H, W) in [0, 1], or films (B, 3, F, H, W)
    best: bool  # whether no earlier one was as good
    parting: Parting | None  # where the held-out reward falls while the trained one rises


def check_validation(config: TrainingConfig) -> None:
    """UserError for the first invalid setting of the validation; nothing is loaded."""
    validation_prompts(config)
    if config.validation_steps is not None and config.num_frames > 1:
        check_films()
    if config.validation_steps is None:
        if config.early_stop or config.validation_reward is not None:
            wanted = "early_stop" if config.early_stop else "validation_reward"
            raise UserError(f"{wanted} needs validations: give --validation_steps, as in 50")
        return
    if config.validation_reward is None:
        if config.early_stop:
            raise UserError("early_stop compares with a reward that is not trained on: give --validation_reward")
        return
    held_out = reward_weights([config.validation_reward])
    if not rewarded(config):
        if config.early_stop:
            raise UserError("early_stop compares with the reward that is trained on, and here none is: leave it out")
        return
    if both := sorted(held_out.keys() & reward_weights(config.reward).keys()):
        raise UserError(f"validation_reward {both[0]!r} is trained on: what is held out must be another")


def rewarded(config: TrainingConfig) -> bool:
    """Whether the recipe trains on `config.reward`: not if a person's labels, a folder of pictures, or an objective
    of sets takes its place."""
    settings = asdict(config)
    others = (settings.get("labels"), settings.get("images"), settings.get("objective", "instance") != "instance")
    return not any(others)


def validation_prompts(config: TrainingConfig) -> list[str]:
    """The validation's prompts: the lines of a file, or ShapeEval's, category after category."""
    if config.validation_prompts != "shapeeval":
        return read_prompts(config.validation_prompts, "shapeeval")
    from rewards.world.draw import shapeeval
    from rewards.world.grammar import CATEGORIES

    by_category = [[e["prompt"] for e in shapeeval() if e["category"] == name] for name in CATEGORIES]
    return [prompt for several in zip(*by_category, strict=True) for prompt in several]


def load_scorers(config: TrainingConfig, reward: Scorer | None) -> dict[str, Scorer]:
    """The trained reward, as given or as named, and the held-out one if there is one; of films, over their frames.

    Where no reward is trained on, the held-out one is alone, or `config.reward` in its place.
    """
    found: dict[str, Scorer] = {}
    if rewarded(config) or config.validation_reward is None:
        found["reward"] = reward_named(config.reward, gradient=False) if reward is None else reward
    if config.validation_reward is not None:
        found["held_out"] = reward_named([config.validation_reward], gradient=False)
    return {name: over_frames(scorer, config) for name, scorer in found.items()}


@dataclass(frozen=True)
class Validator:
    """The prompts, the guidance method and the rewards of all validations of a run, resolved once."""

    config: TrainingConfig
    prompts: list[str]  # of each image
    method: Guidance
    scorers: Mapping[str, Scorer]


def open_validator(config: TrainingConfig, reward: Scorer | None) -> Validator | None:
    """The validator of a run; None if its settings ask for no validations. `reward`: as for `load_scorers`."""
    if config.validation_steps is None:
        return None
    some = validation_prompts(config)
    prompts = [some[i % len(some)] for i in range(config.num_validation_images)]
    method = method_of(config)
    if config.validation_prompts == "shapeeval" and not config.prompts.startswith("shapes"):
        say_once("validation: captions of shapes, from ShapeEval; --validation_prompts FILE draws others")
    return Validator(config, prompts, method, load_scorers(config, reward))


def sampling_of(config: TrainingConfig) -> Sampling:
    """How a run's pictures are drawn, other than those that it trains on."""
    frames = config.num_frames if config.num_frames > 1 else None
    return Sampling(
        config.num_inference_steps,
        1 if asdict(config).get("memory_budget") else config.train_batch_size,  # which fits if a step does
        embedded_guidance=config.embedded_guidance,
        num_frames=frames,
        decode_batch=config.decode_batch,
        enable_vae_tiling=config.enable_vae_tiling,
    )


@torch.no_grad()
def validate(validator: Validator, pipe: Any, state: State) -> Validation:
    """Draw, score, and compare with the earlier validations of this run.

    The weights are the average's, if the run keeps one; the global generators are left as they were. Raises
    NotFinite if a score is not finite.
    """
    random, config, prompts = checkpoint.randomness(), validator.config, validator.prompts
    sampling = sampling_of(config)
    seeds = [config.seed + i for i in range(len(prompts))]
    try:
        with _average(pipe, state):
            batches = generate_batches(pipe, prompts, seeds, validator.method, sampling)
            images = torch.cat([batch.images for batch in batches])
            score = partial(_mean, images=images, prompts=prompts, size=sampling.batch_size, device=pipe.device)
            means = {f"{name}_mean": score(scorer) for name, scorer in validator.scorers.items()}
    finally:
        checkpoint.restore(random)
    record = {"step": state.step, **means}
    earlier = [r for r in read_validations(config) if 0 < r["step"] < state.step]
    curve = [*earlier, record]
    key = "held_out_mean" if "held_out_mean" in record else "reward_mean"
    best = state.step > 0 and all(record[key] > r[key] for r in earlier)
    parting = None
    if {"reward_mean", "held_out_mean"} <= record.keys():
        parting = Monitor()([r["reward_mean"] for r in curve], [r["held_out_mean"] for r in curve])
    return Validation(record, images, best, parting)


def write_validation(config: TrainingConfig, found: Validation, save: Callable[[Path], Any]) -> None:
    """Write the grid (of the films' middle frames) and the films, the weights if they are the best, and the line, which
    comes last."""
    folder, step = Path(config.output_dir), int(found.record["step"])
    grid = output.grid(pixels(stills(found.images)))
    output.write(folder / GRIDS / f"step-{step:06d}.png", grid)
    for i, film in enumerate(found.images if found.images.ndim == 5 else []):
        output.write(folder / GRIDS / f"step-{step:06d}-{i:02d}.mp4", mp4(film))
    if found.best:
        save(folder / BEST)
        output.write_json(folder / BEST / "validation.json", found.record)
    records.append(folder / RECORDS, found.record)


def read_validations(config: TrainingConfig) -> list[dict[str, float]]:
    """The validations that are written: of step 0 what training began with, if a LoRA is trained."""
    path = Path(config.output_dir) / RECORDS
    return list(records.records(path)) if path.exists() else []


def _mean(scorer: Scorer, images: Tensor, prompts: list[str], size: int, device: torch.device) -> float:
    """The mean score; `size` images are on the device at a time."""
    parts = [(images[i : i + size], prompts[i : i + size]) for i in range(0, len(images), size)]
    scores = torch.cat([scorer(some.to(device), texts) for some, texts in parts])
    return float(finite(scores, "a reward of the validation").float().mean())


@contextmanager
def _average(pipe: Any, state: State) -> Iterator[None]:
    """The pipeline with the average of the weights, if the state has one."""
    average = {name.removeprefix("ema."): t for name, t in state.tensors.items() if name.startswith("ema.")}
    with lora.lent(lora.network_of(pipe), average):
        yield
