"""Diffusion-DPO: fine-tune a LoRA on pairs, a better and a worse image (https://arxiv.org/abs/2311.12908).

Both images of a pair are noised to one level by one noise, and denoised by the model and by the model before training:

    u    = -beta / 2 [(L_w - L_w^ref) - (L_l - L_l^ref)],    loss = mean of -log sigmoid(u),

L being the denoising error, a mean over the latent's elements. Offline, the pairs are a person's labels; online, they
are the best and the worst of the images that the model makes of a prompt. `train` is the algorithm, `run` what the
command line does with it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from difftune.configs.recipes import DPOConfig
from difftune.files.checkpoint import Say, State
from difftune.lookup import at_least
from difftune.models import load as load_model
from difftune.rollouts.image_sampler import Chain
from difftune.rollouts.pairs import Batches, check_preferences, draws_of, judge_of, pair_errors, pairs_of
from difftune.rollouts.rounds import engine
from difftune.training.state import Metrics, Reward, Training, begin, differentiate, follow, statistics, steps, update
from difftune.training.state import card as model_card
from difftune.training.state import check as check_shared

# ------------------------------------------------------------------------------------------------ the algorithm


def dpo_margin(winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, beta: float) -> Tensor:
    """u = -beta / 2 [(L_w - L_w^ref) - (L_l - L_l^ref)], (P,), of denoising errors (P,)."""
    return -beta / 2 * ((winner - winner_ref) - (loser - loser_ref))


def dpo_loss(margin: Tensor, label: Tensor | None = None) -> Tensor:
    """The mean of -log sigmoid(u) over margins (P,): ln 2 where the model is the reference.

    label (P,): 1, or 0 for a tie, which has no gradient; None: all 1.
    """
    return -logsigmoid(margin if label is None else label * margin).mean()


def train(
    config: DPOConfig,
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
    batches, kept = pairs_of(config, run, chain, reward)
    with engine(config, run, say):
        yield from steps(config, run, partial(descend, config, run, chain, batches), kept)


def descend(config: DPOConfig, run: Training, chain: Chain, batches: Batches, step: int) -> Metrics:
    """One optimiser step on a step's pairs, and what it met."""
    turns = batches(step)
    met = []
    for n, (numbers, pairs) in enumerate(turns):
        draws = draws_of(config, chain.model, step, numbers)
        with torch.no_grad():
            before = pair_errors(chain, run.reference, pairs, draws)
        with run.learning(last=n == len(turns) - 1):
            after = pair_errors(chain, run.network, pairs, draws)
            margin = dpo_margin(*after, *before, config.beta)
            loss = dpo_loss(margin, pairs.label)
            differentiate(run, loss / len(turns))
        gains = [(late.detach() - early).mean() for late, early in zip(after, before, strict=True)]
        met.append(torch.stack([loss.detach(), ((margin.detach() * pairs.label).sign() + 1).mean() / 2, *gains]))
    norm = update(config, run)
    loss, accuracy, winner, loser = run.accelerator.gather(torch.stack(met)).mean(0).tolist()
    scores = [pairs.scores for _, pairs in turns if pairs.scores is not None]
    return {
        **(statistics(run.accelerator.gather(torch.cat(scores))) if scores else {}),
        "loss": loss,
        "grad_norm": norm,
        "accuracy": accuracy,
        "winner_gap": winner,
        "loser_gap": loser,
    }


# ------------------------------------------------------------------------------------------------ the command


def run(config: DPOConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None) -> dict[str, Any]:
    """`difftune train dpo`: train in `config.output_dir`; returns a summary. See `runs.run`."""
    check(config, pipe, reward)
    return follow(config, train, card, show, pipe, reward)


def check(config: DPOConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting that cannot be, before anything is loaded."""
    check_shared(config, pipe)
    check_preferences(config, reward)
    at_least(0, beta=config.beta)


def card(config: DPOConfig, metrics: Metrics) -> str:
    return model_card(config, metrics, "dpo", "Diffusion-DPO ([2311.12908](https://arxiv.org/abs/2311.12908))")
