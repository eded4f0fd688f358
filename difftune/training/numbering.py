"""The numbers of a run's samples, and the seed of each: a sample is a function of its number, whoever makes it."""

import random

from difftune.configs.training import TrainingConfig


def sample_numbers(config: TrainingConfig, step: int, rank: int = 0, world: int = 1) -> list[range]:
    """One process's samples in each backward pass of an optimiser step, by their numbers in the whole run."""
    size, passes = config.train_batch_size, config.gradient_accumulation_steps
    starts = [((step * passes + i) * world + rank) * size for i in range(passes)]
    return [range(start, start + size) for start in starts]


def seed_of(seed: int, index: int, use: str = "noise") -> int:
    """One seed of two numbers and a name, unlike for any others."""
    return random.Random(f"{seed} {use} {index}").getrandbits(63)
