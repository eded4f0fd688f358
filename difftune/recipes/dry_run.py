"""What `difftune train` would do."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from difftune.configs.training import TrainingConfig
from difftune.errors import UserError
from difftune.models import load as load_model
from difftune.pipelines import dry_run
from difftune.processes import say_once
from difftune.recipes import check_recipe, recipe_of, train
from difftune.training import validation

AFTER = 2  # optimiser steps that are timed, after the first one


def training(config: TrainingConfig) -> dry_run.Lines:
    """The plan of a training, by its first optimiser steps: without accumulation where that can be, and validations."""
    check_recipe(config)
    held_out = [config.validation_reward] if config.validation_reward else []
    rewards = [*(dry_run.named(config.reward) if validation.rewarded(config) else []), *held_out]
    images = config.train_batch_size * config.gradient_accumulation_steps
    work = f"{recipe_of(config).title}: {config.max_train_steps} optimiser steps of {images} images a process"
    lines = {"model": dry_run.model_line(config.model), **dry_run.reward_lines(rewards), "work": work}
    if not (dry_run.here(config.model) and dry_run.rewards_here(rewards)):
        return {**lines, "time": dry_run.not_measured(config.model, rewards)}
    small = smaller(config)
    parts = config.gradient_accumulation_steps // small.gradient_accumulation_steps
    say_once(f"measuring: {AFTER + 1} optimiser steps of {small.train_batch_size} images at a time")
    seconds, peak = step_cost(small)
    basis = f"{seconds * parts:.2g} s an optimiser step, without validations" + (
        ", not compiled" if config.compile else ""
    )
    return lines | dry_run.cost_lines(seconds * parts * config.max_train_steps, peak, basis)


def smaller(config: TrainingConfig) -> TrainingConfig:
    """The settings without validations, plain, and without accumulation where the recipe can do without."""
    less: dict[str, Any] = {"validation_steps": None, "validation_reward": None, "early_stop": False, "compile": False}
    plain = replace(config, max_train_steps=AFTER + 1, **less)
    try:
        small = replace(plain, gradient_accumulation_steps=1)
        check_recipe(small)
    except UserError:
        return plain
    return small


def step_cost(config: TrainingConfig) -> dry_run.Cost:
    """The longest of the optimiser steps after the first, and the memory of the first."""
    pipe: Any = load_model(config.model)
    steps = train(config, None, pipe)
    peak = dry_run.peak_of(lambda: next(steps), pipe)
    return dry_run.Cost(max(timed(steps)), peak)


def timed(steps: Iterator[Any]) -> Iterator[float]:
    """The seconds of each remaining step."""
    began = time.perf_counter()
    for _ in steps:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        yield time.perf_counter() - began
        began = time.perf_counter()
