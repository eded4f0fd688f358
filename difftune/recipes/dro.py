"""DRO: fine-tune a LoRA to denoise good images better and bad ones worse (https://arxiv.org/abs/2503.22677).

    loss = mean over pairs of  L_w - L_l,

L being the denoising error. There is no reference and no sigmoid: at the model before training the gradient is 4 / beta
times that of Diffusion-DPO, and away from it nothing bounds the loss but `max_loser_loss`, a small learning rate and an
early stop. (It is DSO's "direct reward optimisation", not the quadratic loss of that name for language models. Its code
draws the noise of the two images of a pair apart; here they share it, which has the same mean and less variance.)
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from difftune.configs.recipes import DROConfig
from difftune.files.checkpoint import State
from difftune.rollouts.pairs import Pairs, Turn, check_preferences, open_pairs, pair_errors, step_draws
from difftune.rollouts.session import Session
from difftune.training.state import Metrics, take_snapshot
from difftune.training.steps import attempt_step, gather_statistics, take_step


def train_dro(session: Session[DROConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step."""
    run, pairs = session.run, open_pairs(session)
    for step in session.steps:
        with attempt_step(run, step) as metrics:
            metrics.update(denoise_winners(session, pairs.at(step), step))
        yield metrics, take_snapshot(run, step + 1, metrics, pairs.kept())


def dro_loss(errors: Tensor, signs: Tensor, max_loser_loss: float | None = None) -> Tensor:
    """2 mean(a_b L_b) over errors (B,) with signs a (B,): 1 for a good image, -1 for a bad one, 0 for neither.

    With as many good as bad images this is the mean of L_w - L_l over pairs; there need be no pairs. A bad image whose
    error is above max_loser_loss has no gradient.
    """
    kept = errors if max_loser_loss is None else errors.where(signs >= 0, errors.clamp(max=max_loser_loss))
    return 2 * (signs * kept).mean()


def denoise_winners(session: Session[DROConfig], turns: Sequence[Turn[Pairs]], step: int) -> Metrics:
    """One optimiser step: a backward pass for every batch of pairs, and the update."""
    config, run, images = session.config, session.run, session.images

    def loss_of(turn: Turn[Pairs]) -> tuple[Tensor, Mapping[str, Tensor]]:
        pairs = turn.images
        errors = pair_errors(images, pairs, step_draws(session, step, turn.numbers))
        signs = torch.cat([pairs.label, -pairs.label])
        loss = dro_loss(torch.cat([errors.winner, errors.loser]), signs, config.max_loser_loss)
        return loss, {"winner_error": errors.winner.mean(), "loser_error": errors.loser.mean()}

    found = take_step(run, turns, loss_of)
    return {**gather_statistics(run, [t.images.scores for t in turns if t.images.scores is not None]), **found}


# ------------------------------------------------------------------------------------------------ settings


def check_dro(config: DROConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    check_preferences(config)
