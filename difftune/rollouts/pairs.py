"""Better and worse images as latents, for recipes that compare denoising errors: labelled, or made and judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from difftune.configs.recipes import PreferenceConfig
from difftune.files.prompts import listed
from difftune.labelling.choices import Choice
from difftune.labelling.preferences import Preferences, preferences_named
from difftune.rollouts.denoising import Draws, denoising_errors, draw
from difftune.rollouts.image_sampler import ImageSampler
from difftune.rollouts.rounds import EveryStep, Rounds, ScoredImages, Source, make_images, repeated
from difftune.rollouts.session import Session
from solvers.denoiser import Cond

Images = TypeVar("Images")


class Turn(NamedTuple, Generic[Images]):
    """The samples of one backward pass: their numbers and their images."""

    numbers: range
    images: Images


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


def open_turns(
    session: Session[PreferenceConfig],
    label: Callable[[Callable[[int], Choice], range], Images],
    make: Callable[[range], Images],
) -> Source[Sequence[Turn[Images]]]:
    """The images of each backward pass of an optimiser step: of a person's choices, or made round by round."""
    config, run = session.config, session.run
    if config.labels is not None:
        pairs = preferences_named(config.labels)
        ties = f", {len(pairs.rows) - len(pairs)} undecided are left out" if isinstance(pairs, Preferences) else ""
        session.tell(labels=f"{len(pairs)} decided pairs{ties}")
        chosen = listed(pairs, config.seed)
        return EveryStep(lambda step: [Turn(r, label(chosen, r)) for r in run.numbers(step)])
    return Rounds(run, config.updates_per_round, lambda steps: [Turn(r, make(r)) for r in run.numbers(steps.start)])


def open_pairs(session: Session[PreferenceConfig]) -> Source[Sequence[Turn[Pairs]]]:
    """Pairs of `config.labels`; else each is the best and the worst of `config.num_images_per_prompt` that are made."""
    group = session.config.num_images_per_prompt
    prompts = repeated(session.prompts, group)

    def make(numbers: range) -> Pairs:
        return best_and_worst(make_images(session, prompts, range(numbers.start * group, numbers.stop * group)), group)

    return open_turns(session, lambda chosen, numbers: label_pairs(session, [chosen(i) for i in numbers]), make)


@torch.no_grad()
def label_pairs(session: Session[PreferenceConfig], choices: Sequence[Choice]) -> Pairs:
    """The pictures of decided choices, encoded by the VAE."""
    images = session.images
    winner, loser = (images.files(images.model, [getattr(c, side) for c in choices]) for side in ("winner", "loser"))
    cond = images.texts(images.model, [choice.prompt for choice in choices])["cond"]
    return Pairs(winner, loser, cond, torch.ones(len(choices), device=winner.device))


def best_and_worst(made: ScoredImages, group: int) -> Pairs:
    """The best and the worst of `group` images in a row; a tie if they are equal."""
    best, worst = extremes(made.scores, group)
    cond = {key: value[best] for key, value in made.cond.items()}
    label = (made.scores[best] > made.scores[worst]).float()
    return Pairs(made.latents[best], made.latents[worst], cond, label, made.scores)


def extremes(scores: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The rows (P,) of the greatest and of the least of every `group` scores in a row; the first ones of equals."""
    groups = scores.view(-1, group)
    starts = torch.arange(len(groups), device=scores.device) * group
    return starts + groups.argmax(1), starts + groups.argmin(1)


# ------------------------------------------------------------------------------------------------ denoising errors


class PairErrors(NamedTuple):
    """Denoising errors of a batch of pairs."""

    winner: Tensor  # (P,)
    loser: Tensor  # (P,)


def step_draws(session: Session, step: int, numbers: range) -> Draws:
    """A noise level and noise for each sample of a step, which depend on the seed, the step and its number alone."""
    return draw(session.images.model, [f"{session.config.seed} draw {step} {number}" for number in numbers])


def pair_errors(images: ImageSampler, pairs: Pairs, draws: Draws) -> PairErrors:
    """The errors of the sampler's network; the two images of a pair share their noise."""
    twice = list(range(len(pairs.winner))) * 2
    cond = {key: value[twice] for key, value in pairs.cond.items()}
    x0, both = torch.cat([pairs.winner, pairs.loser]), draws.rows(twice)
    return PairErrors(*denoising_errors(images.denoiser, x0, both, cond).chunk(2))


def accuracy_of(margins: Tensor) -> Tensor:
    """How often margins (P,) are above 0, ties counting half: the model prefers the winner more than its reference."""
    return (margins.detach().sign() + 1).mean() / 2


def check_preferences(config: PreferenceConfig) -> None:
    """UserError for labels that cannot be read."""
    if config.labels is not None:
        preferences_named(config.labels)
