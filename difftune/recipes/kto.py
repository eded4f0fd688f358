"""Diffusion-KTO: fine-tune a LoRA on images that are good or bad, each by itself (https://arxiv.org/abs/2404.04465).

    g_b  = L_b^ref - L_b,    Q = max(0, mean of g over the batch), without a gradient,
    loss = mean over images of  w_b (1 - sigmoid(a_b beta (g_b - Q))),

L being the denoising error, a = 1 for a good image and -1 for a bad one, w their weights. Offline, a person's labels
make the chosen image good and the other bad; online, the images above the mean reward of their prompt are good. `train`
is the algorithm, `run` what the command line does with it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from difftune.configs.recipes import KTOConfig
from difftune.files.checkpoint import Say, State
from difftune.files.prompts import listed, prompts_named
from difftune.labelling.choices import Choice, decided
from difftune.lookup import at_least
from difftune.models import load as load_model
from difftune.rollouts.denoising import Draws, denoising_errors
from difftune.rollouts.image_sampler import Chain
from difftune.rollouts.pairs import check_preferences, draws_of, encoded, judge_of
from difftune.rollouts.rounds import Made, Rounds, check_groups, engine, make, repeated
from difftune.training.state import (
    Called,
    Kept,
    Metrics,
    Reward,
    Training,
    begin,
    differentiate,
    follow,
    nothing,
    samples,
    statistics,
    steps,
    update,
)
from difftune.training.state import card as model_card
from difftune.training.state import check as check_shared
from solvers.denoiser import Cond
from solvers.latent import LatentModel

# ------------------------------------------------------------------------------------------------ the algorithm


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


@dataclass(frozen=True)
class Marked:
    """Images as latents (B, C, h, w), what they show, which are good, and their scores if they were scored."""

    latents: Tensor
    cond: Cond
    signs: Tensor  # (B,): 1 good, -1 bad, 0 neither
    scores: Tensor | None = None


Batches = Callable[[int], Sequence[tuple[range, Marked]]]  # optimiser step -> samples' numbers, and the images


def train(
    config: KTOConfig,
    state: State | None = None,
    pipe: Any = None,
    reward: Reward | None = None,
    say: Say | None = None,
) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each optimiser step, from the step of `state` on.

    pipe, reward: those that config names, unless given; the reward needs no gradient, and judges only if config names
    no labels. The pipeline gets the adapter, and keeps it. `say` is told what was resolved.
    Raises UserError for settings that cannot be, RunError after too many steps that were not finite.
    """
    check(config, pipe, reward)
    reward = judge_of(config, reward)
    run = begin(config, state, load_model(config.model) if pipe is None else pipe, reference=True)
    chain = Chain.of(config, run.pipe, run.network)
    batches, kept = marked_of(config, run, chain, reward)
    with engine(config, run, say):
        yield from steps(config, run, partial(descend, config, run, chain, batches), kept)


def marked_of(
    config: KTOConfig, run: Training, chain: Chain, reward: Reward | None
) -> tuple[Batches, Callable[[], Kept]]:
    """The images of each backward pass of an optimiser step, and what `snapshot` is to keep for them."""
    passes = range(config.gradient_accumulation_steps)

    def numbers(step: int) -> list[range]:
        return [samples(config, step, i, run.rank, run.world) for i in passes]

    if config.labels is not None:
        chosen = listed(decided(config.labels), config.seed)
        return lambda step: [(r, labelled(chain.model, chosen, r)) for r in numbers(step)], nothing
    assert reward is not None
    prompts = repeated(prompts_named(config.prompts, config.seed), config.num_images_per_prompt)

    def made(r: range) -> Marked:
        return above_mean(make(chain, prompts, reward, r, run), config.num_images_per_prompt)

    rounds = Rounds(config.updates_per_round, lambda steps: [(r, made(r)) for r in numbers(steps.start)], config.seed)
    return partial(rounds.at, run), rounds.kept


@torch.no_grad()
def labelled(model: LatentModel, chosen: Callable[[int], Choice], numbers: range) -> Marked:
    """Pictures of decided choices, encoded by the VAE: 2 i is the winner of the i-th choice, 2 i + 1 its loser."""
    choices = [chosen(number // 2) for number in numbers]
    pictures = [c.loser if n % 2 else c.winner for n, c in zip(numbers, choices, strict=True)]
    signs = torch.tensor([-1.0 if n % 2 else 1.0 for n in numbers], device=model.device)
    return Marked(encoded(model, pictures), model.encode([c.prompt for c in choices])["cond"], signs)


def above_mean(made: Made, group: int) -> Marked:
    """Of `group` images in a row those above their mean score are good, those below it bad."""
    means = made.scores.view(-1, group).mean(1).repeat_interleave(group)
    return Marked(made.latents, made.cond, (made.scores - means).sign(), made.scores)


def descend(config: KTOConfig, run: Training, chain: Chain, batches: Batches, step: int) -> Metrics:
    """One optimiser step on a step's images, and what it met."""
    turns = batches(step)
    met = []
    for n, (numbers, marked) in enumerate(turns):
        draws = draws_of(config, chain.model, step, numbers)
        with torch.no_grad():
            before = errors(chain, run.reference, marked, draws)
        with run.learning(last=n == len(turns) - 1):
            gains = before - errors(chain, run.network, marked, draws)
            baseline = kto_baseline(run.accelerator.gather(gains.detach()))
            weights = (config.desirable_weight, config.undesirable_weight)
            loss = kto_loss(gains, marked.signs, baseline, config.beta, *weights)
            differentiate(run, loss / len(turns))
        met.append(torch.stack([loss.detach(), baseline, *halves(gains.detach(), marked.signs)]))
    norm = update(config, run)
    loss, baseline, good, bad = run.accelerator.gather(torch.stack(met)).mean(0).tolist()
    scores = [marked.scores for _, marked in turns if marked.scores is not None]
    return {
        **(statistics(run.accelerator.gather(torch.cat(scores))) if scores else {}),
        "loss": loss,
        "grad_norm": norm,
        "baseline": baseline,
        "good_gain": good,
        "bad_gain": bad,
    }


def errors(chain: Chain, network: Called, marked: Marked, draws: Draws) -> Tensor:
    return denoising_errors(replace(chain.denoiser, network=network), marked.latents, draws, marked.cond)


def halves(gains: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """The mean gain of the good images and that of the bad ones, 0 where there are none."""
    good, bad = (signs > 0).float(), (signs < 0).float()
    return tuple((gains * half).sum() / half.sum().clamp(min=1) for half in (good, bad))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ the command


def run(config: KTOConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None) -> dict[str, Any]:
    """`difftune train kto`: train in `config.output_dir`; returns a summary. See `runs.run`."""
    check(config, pipe, reward)
    return follow(config, train, card, show, pipe, reward)


def check(config: KTOConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting that cannot be, before anything is loaded."""
    check_shared(config, pipe)
    check_preferences(config, reward)
    if config.labels is None:
        check_groups(config, least=2)
    at_least(
        0, beta=config.beta, desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight
    )


def card(config: KTOConfig, metrics: Metrics) -> str:
    return model_card(config, metrics, "kto", "Diffusion-KTO ([2404.04465](https://arxiv.org/abs/2404.04465))")
