"""Diffusion-KTO: fine-tune a LoRA on images that are good or bad, each by itself (https://arxiv.org/abs/2404.04465).

    g_b  = L_b^ref - L_b,    Q = max(0, mean of g over the batch), without a gradient,
    loss = mean over images of  w_b (1 - sigmoid(a_b beta (g_b - Q))),

L being the denoising error, a = 1 for a good image and -1 for a bad one, w their weights. Offline, a person's labels
make the chosen image good and the other bad; online, the images above the mean reward of their prompt are good.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difftune.configs.recipes import KTOConfig
from difftune.files.checkpoint import State
from difftune.labelling.choices import Choice
from difftune.rollouts.denoising import denoising_errors
from difftune.rollouts.image_sampler import ImageSampler
from difftune.rollouts.pairs import Turn, check_preferences, open_turns, step_draws
from difftune.rollouts.rounds import ScoredImages, Source, make_images, repeated
from difftune.rollouts.session import Session
from difftune.training.checks import check_groups
from difftune.training.state import Metrics, take_snapshot
from difftune.training.steps import attempt_step, gather_statistics, take_step
from solvers.denoiser import Cond


def train_kto(session: Session[KTOConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step."""
    run, images = session.run, open_marked(session)
    for step in session.steps:
        with attempt_step(run, step) as metrics:
            metrics.update(part_good_from_bad(session, images.at(step), step))
        yield metrics, take_snapshot(run, step + 1, metrics, images.kept())


def kto_loss(
    gains: Tensor, signs: Tensor, baseline: Tensor, beta: float, desirable: float = 1.0, undesirable: float = 1.0
) -> Tensor:
    """The mean of w (1 - sigmoid(a beta (g - Q))) over gains g (B,) with signs a (B,): 1 good, -1 bad, 0 neither.

    baseline Q (): see `kto_baseline`; no gradient flows to it. desirable, undesirable: w of good and of bad images.
    """
    weights = torch.where(signs > 0, desirable, undesirable).to(gains)
    return (weights * (1 - (signs * beta * (gains - baseline.detach())).sigmoid())).mean()


def kto_baseline(gains: Tensor) -> Tensor:
    """Q = max(0, mean of the gains), an estimate of the divergence between the model and its reference."""
    return gains.detach().mean().clamp(min=0)


def part_good_from_bad(session: Session[KTOConfig], turns: Sequence[Turn["Marked"]], step: int) -> Metrics:
    """One optimiser step: a backward pass for every batch of images, and the update."""
    config, run = session.config, session.run
    trained, reference = session.images.denoiser, session.images.with_network(run.reference).denoiser

    def loss_of(turn: Turn[Marked]) -> tuple[Tensor, Mapping[str, Tensor]]:
        marked, draws = turn.images, step_draws(session, step, turn.numbers)
        before = denoising_errors(reference, marked.latents, draws, marked.cond).detach()
        gains = before - denoising_errors(trained, marked.latents, draws, marked.cond)
        baseline = kto_baseline(run.accelerator.gather(gains.detach()))
        weights = (config.desirable_weight, config.undesirable_weight)
        loss = kto_loss(gains, marked.signs, baseline, config.beta, *weights)
        means = {"good_gain": mean_over(gains, marked.signs > 0), "bad_gain": mean_over(gains, marked.signs < 0)}
        return loss, {"baseline": baseline, **means}

    found = take_step(run, turns, loss_of)
    return {**gather_statistics(run, [t.images.scores for t in turns if t.images.scores is not None]), **found}


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen values, 0 if there are none."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------ good and bad images


@dataclass(frozen=True)
class Marked:
    """Images as latents (B, C, h, w), what they show, which are good, and their scores if they were scored."""

    latents: Tensor
    cond: Cond
    signs: Tensor  # (B,): 1 good, -1 bad, 0 neither
    scores: Tensor | None = None


def open_marked(session: Session[KTOConfig]) -> Source[Sequence[Turn[Marked]]]:
    """The images of each backward pass of an optimiser step: a person's choices, or made and compared with the mean."""
    group = session.config.num_images_per_prompt
    prompts = repeated(session.prompts, group)
    return open_turns(
        session,
        lambda chosen, numbers: mark_choices(session.images, chosen, numbers),
        lambda numbers: above_mean(make_images(session, prompts, numbers), group),
    )


@torch.no_grad()
def mark_choices(images: ImageSampler, chosen: Callable[[int], Choice], numbers: range) -> Marked:
    """Pictures of decided choices, encoded by the VAE: 2 i is the winner of the i-th choice, 2 i + 1 its loser."""
    choices = [chosen(number // 2) for number in numbers]
    pictures = [c.loser if n % 2 else c.winner for n, c in zip(numbers, choices, strict=True)]
    latents = images.files(images.model, pictures)
    cond = images.texts(images.model, [c.prompt for c in choices])["cond"]
    return Marked(latents, cond, torch.tensor([-1.0 if n % 2 else 1.0 for n in numbers], device=latents.device))


def above_mean(made: ScoredImages, group: int) -> Marked:
    """Mark the images of each prompt, `group` in a row: good above their mean score, bad below it."""
    means = made.scores.view(-1, group).mean(1).repeat_interleave(group)
    return Marked(made.latents, made.cond, (made.scores - means).sign(), made.scores)


# ------------------------------------------------------------------------------------------------ settings


def check_kto(config: KTOConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    check_preferences(config)
    if config.labels is None:
        check_groups(config)
