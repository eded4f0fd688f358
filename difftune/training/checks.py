"""What is wrong with a training's settings, in one sentence, before anything is loaded."""

from dataclasses import asdict
from typing import Any

from difftune import processes
from difftune.configs.training import TrainingConfig
from difftune.errors import UserError
from difftune.lookup import at_least, guidance_named, known, model_named, reward_weights, sampler_named
from difftune.models import scheduler_of
from difftune.pipelines import lora
from difftune.pipelines.engine import check_engine
from difftune.pipelines.method_parts import check_trainable
from difftune.training import validation
from difftune.training.network import DTYPES
from difftune.training.optimizers import OPTIMIZERS, SCHEDULES, check_optimizer
from rewards.registry import Reward


def check_training(config: TrainingConfig, pipe: Any = None) -> None:
    """UserError for the first setting of those that all recipes share that cannot be; the prompts are not looked at."""
    names = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "num_inference_steps", "rank")
    at_least(1, **{name: asdict(config)[name] for name in (*names, "checkpointing_steps")})
    at_least(1, checkpoints_total_limit=config.checkpoints_total_limit or 1)
    at_least(0, learning_rate=config.learning_rate, max_grad_norm=config.max_grad_norm)
    at_least(0, max_skipped_steps=config.max_skipped_steps)
    known("mixed_precision", config.mixed_precision, DTYPES)
    check_precision(config)
    known("lr_scheduler", config.lr_scheduler, SCHEDULES)
    check_optimizer(known("optimizer", config.optimizer, OPTIMIZERS))
    known("lora_layers", config.lora_layers, lora.LAYOUTS)
    if config.ema_decay is not None and not 0 <= config.ema_decay < 1:
        raise UserError(f"ema_decay is {config.ema_decay}: it must be at least 0 and less than 1")
    validation.check_validation(config)
    sampler_named(config.sampler)
    method = guidance_named(config.guidance, config.guidance_scale, config.guidance_options)
    check_engine(None, config.enable_xformers_memory_efficient_attention)
    if pipe is None:
        model_named(config.model)
    check_trainable(method, lambda: scheduler_of(config.model) if pipe is None else pipe.scheduler)


def check_precision(config: TrainingConfig) -> None:
    """UserError for a precision that this machine cannot train in."""
    if config.mixed_precision == "fp16" and processes.on_cpu():
        raise UserError("mixed_precision 'fp16' needs a GPU: give 'bf16' or 'no' on a CPU")


def check_reward(config: TrainingConfig, reward: Reward | None, gradient: bool) -> None:
    """UserError for a reward that is not known or, where its gradient is needed, not differentiable."""
    if validation.rewarded(config):
        reward_weights(config.reward if reward is None else reward, gradient)


def check_policy(config: Any) -> None:
    """UserError for settings under which a sampler has no log-probability, or none that can be computed again."""
    if config.sampler != "ancestral":
        raise UserError(f"sampler {config.sampler!r} has no log-probability here: leave it at 'ancestral'")
    if config.eta is not None and not config.eta > 0:
        raise UserError(f"eta is {config.eta}: a sampler without noise has no log-probability, so give it above 0")
    check_no_dropout(config)


def check_no_dropout(config: TrainingConfig) -> None:
    if config.lora_dropout:
        raise UserError(
            f"lora_dropout is {config.lora_dropout}: the ratio of two probabilities would be noise, so leave it at 0"
        )


def check_groups(config: Any, least: int = 1) -> None:
    """UserError unless the images of a prompt are in one batch, and enough."""
    group, size = config.num_images_per_prompt, config.train_batch_size
    if group < least:
        raise UserError(f"num_images_per_prompt is {group}: it must be at least {least}")
    if size % group:
        raise UserError(f"train_batch_size is {size}: it must be a multiple of num_images_per_prompt, {group}")
