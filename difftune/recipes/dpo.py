"""Diffusion-DPO: fine-tune a LoRA on pairs, a better and a worse image (https://arxiv.org/abs/2311.12908).

Both images of a pair are noised to one level by one noise, and denoised by the model and by the model before training:

    u    = -beta / 2 [(L_w - L_w^ref) - (L_l - L_l^ref)],    loss = mean of -log sigmoid(u),

L being the denoising error, a mean over the latent's elements. Offline, the pairs are a person's labels; online, they
are the best and the worst of the images that the model makes of a prompt.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from difftune.configs.recipes import DPOConfig
from difftune.files.checkpoint import State
from difftune.rollouts.pairs import Pairs, Turn, accuracy_of, check_preferences, open_pairs, pair_errors, step_draws
from difftune.rollouts.session import Session
from difftune.training.state import Metrics, take_snapshot
from difftune.training.steps import attempt_step, gather_statistics, take_step


def train_dpo(session: Session[DPOConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step."""
    run, pairs = session.run, open_pairs(session)
    for step in session.steps:
        with attempt_step(run, step) as metrics:
            metrics.update(prefer_winners(session, pairs.at(step), step))
        yield metrics, take_snapshot(run, step + 1, metrics, pairs.kept())


def dpo_margin(winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, beta: float) -> Tensor:
    """u = -beta / 2 [(L_w - L_w^ref) - (L_l - L_l^ref)], (P,), of denoising errors (P,)."""
    return -beta / 2 * ((winner - winner_ref) - (loser - loser_ref))


def dpo_loss(margin: Tensor, label: Tensor | None = None) -> Tensor:
    """The mean of -log sigmoid(u) over margins (P,): ln 2 if the model is the reference.

    label (P,): 1, or 0 for a tie, which has no gradient; None: all 1.
    """
    return -logsigmoid(margin if label is None else label * margin).mean()


def prefer_winners(session: Session[DPOConfig], turns: Sequence[Turn[Pairs]], step: int) -> Metrics:
    """One optimiser step: a backward pass for every batch of pairs, and the update."""
    config, run, images = session.config, session.run, session.images

    def loss_of(turn: Turn[Pairs]) -> tuple[Tensor, Mapping[str, Tensor]]:
        pairs, draws = turn.images, step_draws(session, step, turn.numbers)
        with torch.no_grad():
            before = pair_errors(images.with_network(run.reference), pairs, draws)
        after = pair_errors(images, pairs, draws)
        margin = dpo_margin(after.winner, after.loser, before.winner, before.loser, config.beta)
        return dpo_loss(margin, pairs.label), {
            "accuracy": accuracy_of(margin * pairs.label),
            "winner_gap": (after.winner - before.winner).mean(),
            "loser_gap": (after.loser - before.loser).mean(),
        }

    found = take_step(run, turns, loss_of)
    return {**gather_statistics(run, [t.images.scores for t in turns if t.images.scores is not None]), **found}


# ------------------------------------------------------------------------------------------------ settings


def check_dpo(config: DPOConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    check_preferences(config)
