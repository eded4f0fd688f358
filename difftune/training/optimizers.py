"""Optimisers by name, and the learning rate. A new optimiser is a function of (config, weights) in `OPTIMIZERS`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from difftune.configs.training import TrainingConfig
from difftune.errors import UserError


def adamw(config: TrainingConfig, weights: Iterable[Tensor]) -> torch.optim.Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101): two float32 numbers of state per weight."""
    return torch.optim.AdamW(
        list(weights),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )


def adamw8bit(config: TrainingConfig, weights: Iterable[Tensor]) -> torch.optim.Optimizer:
    """AdamW with its state in blocks of 8-bit numbers (https://arxiv.org/abs/2110.02861), by bitsandbytes.

    Weights of fewer than 4096 elements keep 32-bit states.
    """
    return _bitsandbytes().optim.AdamW8bit(
        list(weights),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )


def lion(config: TrainingConfig, weights: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Lion (https://arxiv.org/abs/2302.06675), by timm: the sign of a mean of gradients, one float32 number of state.

    Its step has the same size for every weight, so its learning rate is 3 to 10 times lower than AdamW's, and its
    weight decay as much higher.
    """
    from timm.optim import Lion

    return Lion(
        list(weights),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
    )


OPTIMIZERS: dict[str, Callable[[TrainingConfig, Iterable[Tensor]], torch.optim.Optimizer]] = {
    f.__name__: f for f in (adamw, adamw8bit, lion)
}


def check_optimizer(name: str) -> None:
    """UserError if the optimiser's library is not installed."""
    if name == "adamw8bit":
        _bitsandbytes()


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "optimizer 'adamw8bit' needs bitsandbytes: pip install 'difftune[8bit]', or --optimizer adamw"
        ) from error
    return bitsandbytes


def learning_rates(config: TrainingConfig) -> Callable[[int], float]:
    """The learning rate's factor as a function of the step: nothing to save."""
    schedule = get_scheduler(
        config.lr_scheduler,
        torch.optim.SGD([torch.zeros(())], lr=1.0),
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    return schedule.lr_lambdas[0]
