"""Better and worse images as latents, for recipes that compare denoising errors: labelled, or made and judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from difftune.configs.recipes import PreferenceConfig
from difftune.configs.training import TrainingConfig
from difftune.errors import UserError
from difftune.files.prompts import listed, prompts_named
from difftune.labelling.choices import Choice, decided
from difftune.lookup import at_least, reward_named, reward_weights
from difftune.rollouts.denoising import Draws, denoising_errors, draw
from difftune.rollouts.image_sampler import Chain
from difftune.rollouts.rounds import Made, Rounds, make, repeated
from difftune.training.state import Called, Kept, Reward, Training, nothing, samples
from solvers.denoiser import Cond
from solvers.latent import LatentModel


@dataclass(frozen=True)
class Pairs:
    """Latents (P, C, h, w) of better and worse images, what they show, and their scores if they were scored."""

    winner: Tensor
    loser: Tensor
    cond: Cond  # P rows
    label: Tensor  # (P,): 1, or 0 for a tie
    scores: Tensor | None = None  # of all images that were made for them

    def rows(self, index: list[int]) -> "Pairs":
        """Some of the pairs, without scores."""
        cond = {key: value[index] for key, value in self.cond.items()}
        return Pairs(self.winner[index], self.loser[index], cond, self.label[index])


Batches = Callable[[int], Sequence[tuple[range, Pairs]]]  # optimiser step -> samples' numbers, and the pairs


def pairs_of(
    config: PreferenceConfig, run: Training, chain: Chain, reward: Reward | None
) -> tuple[Batches, Callable[[], Kept]]:
    """The pairs of each backward pass of an optimiser step, and what `snapshot` is to keep for them.

    From `config.labels`; else each is the best and the worst of `config.num_images_per_prompt` images that are made.
    """
    passes = range(config.gradient_accumulation_steps)

    def numbers(step: int) -> list[range]:
        return [samples(config, step, i, run.rank, run.world) for i in passes]

    if config.labels is not None:
        chosen = listed(decided(config.labels), config.seed)
        return lambda step: [(r, labelled(chain.model, [chosen(i) for i in r])) for r in numbers(step)], nothing
    assert reward is not None
    group = config.num_images_per_prompt
    prompts = repeated(prompts_named(config.prompts, config.seed), group)

    def made(r: range) -> Pairs:
        return best_and_worst(make(chain, prompts, reward, range(r.start * group, r.stop * group), run), group)

    rounds = Rounds(config.updates_per_round, lambda steps: [(r, made(r)) for r in numbers(steps.start)], config.seed)
    return partial(rounds.at, run), rounds.kept


@torch.no_grad()
def labelled(model: LatentModel, choices: Sequence[Choice]) -> Pairs:
    """The pictures of decided choices, encoded by the VAE."""
    winner, loser = (encoded(model, [getattr(c, side) for c in choices]) for side in ("winner", "loser"))
    cond = model.encode([choice.prompt for choice in choices])["cond"]
    return Pairs(winner, loser, cond, torch.ones(len(choices), device=winner.device))


def encoded(model: LatentModel, pictures: Sequence[Path]) -> Tensor:
    """Latents (B, C, h, w) of image files, which are cropped and resized to the model's size."""
    return model.encode_images(torch.stack([pixels(file, model.size()) for file in pictures]).to(model.device))


def pixels(file: Path, size: tuple[int, int]) -> Tensor:
    """An image file as (3, H, W) in [0, 1]: the largest part in its middle that has the size's shape."""
    try:
        picture = Image.open(file).convert("RGB")
    except OSError as error:
        raise UserError(f"{file} cannot be read as an image: {error}") from error
    height, width = size
    fitted = (
        ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS) if picture.size != (width, height) else picture
    )
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255).permute(2, 0, 1)


def best_and_worst(made: Made, group: int) -> Pairs:
    """The best and the worst of `group` images in a row; a tie if they are equal."""
    scores = made.scores.view(-1, group)
    starts = torch.arange(len(scores), device=scores.device) * group
    best, worst = starts + scores.argmax(1), starts + scores.argmin(1)
    cond = {key: value[starts] for key, value in made.cond.items()}
    decided = (made.scores[best] > made.scores[worst]).float()
    return Pairs(made.latents[best], made.latents[worst], cond, decided, made.scores)


def draws_of(config: TrainingConfig, model: LatentModel, step: int, numbers: range) -> Draws:
    """A noise level and noise for each sample of a step, which depend on the seed, the step and its number alone."""
    return draw(model, [f"{config.seed} draw {step} {number}" for number in numbers])


def pair_errors(chain: Chain, network: Called, pairs: Pairs, draws: Draws) -> tuple[Tensor, Tensor]:
    """Denoising errors (P,) of the winners and of the losers; the two of a pair share their noise."""
    twice = list(range(len(pairs.winner))) * 2
    cond = {key: value[twice] for key, value in pairs.cond.items()}
    x0, both = torch.cat([pairs.winner, pairs.loser]), draws.rows(twice)
    winner, loser = denoising_errors(replace(chain.denoiser, network=network), x0, both, cond).chunk(2)
    return winner, loser


def check_preferences(config: Any, reward: Reward | None) -> None:
    """One sentence for the first setting of preferences that cannot be."""
    at_least(2, num_images_per_prompt=config.num_images_per_prompt)
    at_least(1, updates_per_round=config.updates_per_round)
    if config.labels is not None:
        decided(config.labels)
    elif reward is None:
        reward_weights(config.reward)


def judge_of(config: PreferenceConfig, reward: Reward | None) -> Reward | None:
    """The reward that judges, if there are no labels."""
    if config.labels is not None:
        return None
    return reward_named(config.reward, gradient=False) if reward is None else reward
