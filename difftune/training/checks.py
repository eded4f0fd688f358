"""The checks of a training's settings: one sentence for what is wrong, before anything is loaded."""

from pathlib import Path
from typing import Any

from difftune import processes
from difftune.configs.training import TrainingConfig
from difftune.errors import UserError
from difftune.lookup import method_of, reward_weights
from difftune.models import check_model, scheduler_of
from difftune.pipelines import lora
from difftune.pipelines.compiled import check_compile
from difftune.pipelines.engine import check_engine
from difftune.pipelines.method_parts import check_trainable
from difftune.training import validation
from difftune.training.optimizers import check_optimizer
from rewards.registry import Reward


def check_training(config: TrainingConfig, pipe: Any = None) -> None:
    """UserError for the first invalid setting of those that all recipes share.

    The ranges of numbers and the closed sets are checked when a Config is made; the prompts are read later.
    """
    check_precision(config)
    check_frames(config)
    check_start(config)
    check_optimizer(config.optimizer)
    validation.check_validation(config)
    method = method_of(config)
    check_engine(None, config.enable_xformers_memory_efficient_attention)
    check_compile(config)
    if pipe is None:
        check_model(config.model)
    check_trainable(method, lambda: scheduler_of(config.model) if pipe is None else pipe.scheduler)


def check_frames(config: TrainingConfig) -> None:
    """UserError for films in a run whose examples are pictures."""
    if config.num_frames > 1 and not validation.rewarded(config):
        raise UserError(
            f"num_frames is {config.num_frames}, and this run learns from pictures or from sets of them: leave it out,"
            " or train on a --reward"
        )


def check_start(config: TrainingConfig) -> None:
    """UserError for a LoRA that training cannot go on from with these settings."""
    if config.lora is None:
        if config.reference == "start":
            raise UserError("reference 'start' is the model with the LoRA of --lora: give that, or --reference base")
        return
    if config.full_finetuning:
        raise UserError(f"--lora {config.lora} is trained further as a LoRA: leave --full_finetuning out")
    if not Path(config.lora, lora.WEIGHTS).is_file():
        raise UserError(f"--lora {config.lora} holds no {lora.WEIGHTS}: give the --output_dir of a training run")
    settings, _ = lora.read_adapter(config.lora)
    alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    targets = {name for name in settings["target_modules"] if not name.startswith(lora.SINGLE)}
    layers = next((name for name, kept in lora.LAYOUTS.items() if set(kept) == targets), None)
    for flag, own, wanted in (
        ("rank", settings["r"], config.rank),
        ("lora_alpha", settings["lora_alpha"], alpha),
        ("lora_layers", layers, config.lora_layers),
    ):
        if own != wanted:
            raise UserError(f"the LoRA of {config.lora} has {flag} {own}, not {wanted}: give --{flag} {own}")


def check_precision(config: TrainingConfig) -> None:
    """UserError for a precision that this machine cannot train in."""
    if config.mixed_precision == "fp16" and processes.on_cpu():
        raise UserError("mixed_precision 'fp16' needs a GPU: give 'bf16' or 'no' on a CPU")


def check_reward(config: TrainingConfig, reward: Reward | None, gradient: bool) -> None:
    """UserError for a reward that is not known or, if its gradient is needed, not differentiable."""
    if validation.rewarded(config):
        reward_weights(config.reward if reward is None else reward, gradient)


def check_no_dropout(config: TrainingConfig) -> None:
    """UserError if a log-probability could not be computed again."""
    if config.lora_dropout:
        raise UserError(
            f"lora_dropout is {config.lora_dropout}: the ratio of two probabilities would be noise, so leave it at 0"
        )


def check_exact_ratio(config: TrainingConfig) -> None:
    """UserError if rounding would take a ratio of probabilities out of its clip range before any update."""
    if config.compile and config.mixed_precision != "no":
        raise UserError(
            f"--compile does not go with --mixed_precision {config.mixed_precision} here: a step is "
            "sampled by one graph and trained by another, whose rounding can be above the clip range; leave one out"
        )


def check_whole_groups(config: Any) -> None:
    """UserError unless the images of a prompt are in one round, of all processes together."""
    group, world = config.num_images_per_prompt, processes.process().num_processes
    count = config.train_batch_size * config.gradient_accumulation_steps * config.updates_per_round * world
    if count % group:
        raise UserError(
            f"a round has {count} images (train_batch_size x gradient_accumulation_steps x updates_per_round"
            f"{f' x {world} processes' if world > 1 else ''}): give a multiple of num_images_per_prompt, {group}"
        )


def check_groups(config: Any) -> None:
    """UserError unless the images of a prompt are in one batch."""
    group, size = config.num_images_per_prompt, config.train_batch_size
    if size % group:
        raise UserError(f"train_batch_size is {size}: it must be a multiple of num_images_per_prompt, {group}")
