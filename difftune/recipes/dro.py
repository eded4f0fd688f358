"""DRO: fine-tune a LoRA to denoise good images better and bad ones worse (https://arxiv.org/abs/2503.22677).

    loss = mean over pairs of  L_w - L_l,

L being the denoising error. There is no reference and no sigmoid: at the model before training the gradient is 4 / beta
times that of Diffusion-DPO, and away from it nothing bounds the loss but `max_loser_loss`, a small learning rate and an
early stop. (It is DSO's "direct reward optimisation", not the quadratic loss of that name for language models. Its code
draws the noise of the two images of a pair apart; here they share it, which has the same mean and less variance.)
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from difftune.configs.recipes import DROConfig
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


def dro_loss(errors: Tensor, signs: Tensor, max_loser_loss: float | None = None) -> Tensor:
    """2 mean(a_b L_b) over errors (B,) with signs a (B,): 1 for a good image, -1 for a bad one, 0 for neither.

    With as many good as bad images this is the mean of L_w - L_l over pairs; there need be no pairs. A bad image whose
    error is above max_loser_loss has no gradient.
    """
    kept = errors if max_loser_loss is None else errors.where(signs >= 0, errors.clamp(max=max_loser_loss))
    return 2 * (signs * kept).mean()


def train(
    config: DROConfig,
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
    run = begin(config, state, load_model(config.model) if pipe is None else pipe)
    chain = Chain.of(config, run.pipe, run.network)
    batches, kept = pairs_of(config, run, chain, reward)
    with engine(config, run, say):
        yield from steps(config, run, partial(descend, config, run, chain, batches), kept)


def descend(config: DROConfig, run: Training, chain: Chain, batches: Batches, step: int) -> Metrics:
    """One optimiser step on a step's pairs, and what it met."""
    turns = batches(step)
    met = []
    for n, (numbers, pairs) in enumerate(turns):
        draws = draws_of(config, chain.model, step, numbers)
        with run.learning(last=n == len(turns) - 1):
            winner, loser = pair_errors(chain, run.network, pairs, draws)
            signs = torch.cat([pairs.label, -pairs.label])
            loss = dro_loss(torch.cat([winner, loser]), signs, config.max_loser_loss)
            differentiate(run, loss / len(turns))
        met.append(torch.stack([loss.detach(), winner.detach().mean(), loser.detach().mean()]))
    norm = update(config, run)
    loss, winner, loser = run.accelerator.gather(torch.stack(met)).mean(0).tolist()
    scores = [pairs.scores for _, pairs in turns if pairs.scores is not None]
    return {
        **(statistics(run.accelerator.gather(torch.cat(scores))) if scores else {}),
        "loss": loss,
        "grad_norm": norm,
        "winner_error": winner,
        "loser_error": loser,
    }


# ------------------------------------------------------------------------------------------------ the command


def run(config: DROConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None) -> dict[str, Any]:
    """`difftune train dro`: train in `config.output_dir`; returns a summary. See `runs.run`."""
    check(config, pipe, reward)
    return follow(config, train, card, show, pipe, reward)


def check(config: DROConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting that cannot be, before anything is loaded."""
    check_shared(config, pipe)
    check_preferences(config, reward)
    if config.max_loser_loss is not None:
        at_least(0, max_loser_loss=config.max_loser_loss)


def card(config: DROConfig, metrics: Metrics) -> str:
    return model_card(config, metrics, "dro", "DRO ([2503.22677](https://arxiv.org/abs/2503.22677))")
