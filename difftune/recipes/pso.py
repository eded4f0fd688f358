"""PSO: fine-tune a LoRA of a few-step model on pairs of images, at its own steps (https://arxiv.org/abs/2410.03190).

A distilled model knows the few noise levels tau_1 > ... > tau_N of its sampler and no other, so that a denoising loss
at random levels blurs what it makes. Each of its steps is a Gaussian, p(x' | x, c), whose mean the network gives; the
margin of the better image over the worse one is raised at those steps alone:

    l_k  = log p_theta(x'_k | x_k, c) / p_ref(x'_k | x_k, c),
    loss = mean over pairs and steps of  -log sigmoid(beta (l_winner - l_loser)).

Online, the winner and the loser are the best and the worst of the trajectories that the model samples of a prompt, l is
that of the transitions which it took (a mean over the latent's elements), clipped to
[log(1 - clip_range), log(1 + clip_range)], and the last step, which adds no noise, is left out. Offline, the winners
are the pictures of a folder, of a style or a concept, and the losers what the model makes of their captions before
training; they are noised to a level tau, and l is, up to a constant, minus half the denoising error there:
Diffusion-DPO on the model's own levels.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from difftune.configs.recipes import PSOConfig
from difftune.files.checkpoint import State
from difftune.files.pictures import list_captioned, read_all
from difftune.files.prompts import listed
from difftune.lookup import at_least
from difftune.recipes.dpo import dpo_loss, dpo_margin
from difftune.rollouts.denoising import draw
from difftune.rollouts.pairs import Pairs, Turn, accuracy_of, extremes, pair_errors
from difftune.rollouts.policy import Kernel, Policy, log_ratio
from difftune.rollouts.rounds import repeated
from difftune.rollouts.session import Session
from difftune.rollouts.trajectories import Rolled, roll_out, with_network
from difftune.training.checks import check_groups, check_no_dropout
from difftune.training.state import Metrics, take_snapshot
from difftune.training.steps import attempt_step, gather_statistics, take_step
from solvers.denoiser import Prediction
from solvers.noise import Noise
from solvers.samplers.step import transition


def train_pso(session: Session[PSOConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step."""
    config, run = session.config, session.run
    name = transition_of(config, run.pipe)
    policy = Policy(TRANSITIONS[name], 1.0, session.images.levels)
    session.tell(transition=name)
    if config.images is None:
        descend = partial(prefer_sampled, session, policy)
    else:
        descend = partial(prefer_pictures, session, pair_pictures(session, policy))
    for step in session.steps:
        with attempt_step(run, step) as metrics:
            metrics.update(descend(step))
        yield metrics, take_snapshot(run, step + 1, metrics)


# ------------------------------------------------------------------------------------------------ the model's steps


def consistency(prediction: Prediction, now: Noise, then: Noise, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean alpha' x0 (B, ...) and deviation sigma' () of a step whose noise is all new: LCM's and DMD2's.

    Multistep consistency sampling (https://arxiv.org/abs/2303.01469, algorithm 1). eta below 1 keeps a part of the
    noise, as in DDIM: alpha' x0 + sqrt(1 - eta^2) sigma' eps, and deviation eta sigma'.
    """
    kept = (1 - eta**2) ** 0.5
    return then.alpha * prediction.x0 + kept * then.sigma * prediction.eps, eta * then.sigma


TRANSITIONS: dict[str, Kernel] = {"lcm": consistency, "ancestral": transition}


# ------------------------------------------------------------------------------------------------ online


def pso_loss(
    winner: Tensor, loser: Tensor, label: Tensor, beta: float = 50.0, clip_range: float | None = 0.1
) -> Tensor:
    """The mean of -log sigmoid(beta label (l_w - l_l)), with l clipped to [log(1 - clip_range),
    log(1 + clip_range)] unless clip_range is None.

    winner, loser: log p_theta / p_ref (P,) of one step, means over the latent's elements. label (P,): 1, or 0 for a
    tie, which has no gradient. ln 2 if the model is the reference.
    """
    if clip_range is not None:
        winner, loser = (ratio.exp().clamp(1 - clip_range, 1 + clip_range).log() for ratio in (winner, loser))
    return -logsigmoid(beta * label * (winner - loser)).mean()


class Ordered(NamedTuple):
    """Trajectories of the best and of the worst image of each prompt, and all scores."""

    rolled: Rolled  # (2 P,): the winners, then the losers
    label: Tensor  # (P,), see pso_loss
    scores: Tensor  # (B,), of every trajectory that was sampled


def prefer_sampled(session: Session[PSOConfig], policy: Policy, step: int) -> Metrics:
    """One optimiser step on trajectories that are sampled for it: a backward pass for each of their random steps."""
    config, run = session.config, session.run

    def loss_of(turn: tuple[Ordered, int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        pairs, i = turn
        before = pairs.rolled.mean_under(run.reference, policy, i)
        mean, std = pairs.rolled.mean(policy, i)
        winner, loser = log_ratio(pairs.rolled.after(i), mean, before, std).chunk(2)
        margin = pairs.label * (winner - loser)
        loss = pso_loss(winner, loser, pairs.label, beta_of(config), config.clip_range)
        return loss, {"accuracy": accuracy_of(margin), "margin": margin.mean()}

    group = config.num_images_per_prompt
    prompts = repeated(session.prompts, group)
    batches = [order(roll_out(session, policy, prompts, numbers), group) for numbers in run.numbers(step)]
    found = take_step(run, [(pairs, i) for pairs in batches for i in pairs.rolled.trajectory.drawn], loss_of)
    return {**gather_statistics(run, [pairs.scores for pairs in batches]), **found}


def order(rolled: Rolled, group: int) -> Ordered:
    """The best and the worst of `group` samples in a row."""
    best, worst = extremes(rolled.scores, group)
    label = (rolled.scores[best] > rolled.scores[worst]).to(rolled.scores)
    return Ordered(rolled.rows(torch.cat([best, worst])), label, rolled.scores)


# ------------------------------------------------------------------------------------------------ offline


def prefer_pictures(session: Session[PSOConfig], pictures: Pairs, step: int) -> Metrics:
    """One optimiser step on pictures against what the model made of their captions before training."""
    config, run, images = session.config, session.run, session.images
    chosen = listed(list(range(len(pictures.winner))), config.seed)

    def loss_of(turn: Turn[Pairs]) -> tuple[Tensor, Mapping[str, Tensor]]:
        seeds = [f"{config.seed} draw {i}" for i in turn.numbers]
        draws = draw(images.model, seeds, images.levels[:-1])
        with torch.no_grad():
            before = pair_errors(images.with_network(run.reference), turn.images, draws)
        after = pair_errors(images, turn.images, draws)
        margin = dpo_margin(after.winner, after.loser, before.winner, before.loser, beta_of(config))
        return dpo_loss(margin), {"accuracy": accuracy_of(margin), "margin": margin.mean()}

    turns = [Turn(numbers, pictures.rows([chosen(i) for i in numbers])) for numbers in run.numbers(step)]
    return take_step(run, turns, loss_of)


@torch.no_grad()
def pair_pictures(session: Session[PSOConfig], policy: Policy) -> Pairs:
    """Each picture of the folder with each of the images that the model made of its caption before training.

    Their noise depends on the seed alone: a resumed run makes them again.
    """
    config, images = session.config, session.images
    found, model = list_captioned(config.images or "", config.caption), images.model
    texts = [str(picture.caption) for picture in found for _ in range(config.num_negatives)]
    winner = [model.encode_images(read_all([picture], model.size()).to(model.device)) for picture in found]
    losers = []
    for first in range(0, len(texts), config.train_batch_size):
        numbers = range(first, min(first + config.train_batch_size, len(texts)))
        start = images.begin(texts.__getitem__, numbers)
        assert start.noise is not None  # check_pso lets only a stochastic sampler pass
        losers.append(policy.sample(with_network(start.predict, session.run.reference), start.x, start.noise).end)
    repeats = torch.cat(winner).repeat_interleave(config.num_negatives, 0)
    label = torch.ones(len(texts), device=model.device)
    return Pairs(repeats, torch.cat(losers), images.texts(model, texts)["cond"], label)


# ------------------------------------------------------------------------------------------------ settings


def check_pso(config: PSOConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    if config.images is not None:
        list_captioned(config.images, config.caption)
        return
    check_groups(config)
    at_least(2, num_inference_steps=config.num_inference_steps)  # the last adds no noise, and is not trained
    check_no_dropout(config)


def beta_of(config: PSOConfig) -> float:
    """The setting, or what is usual: 50 for log-probabilities of transitions, 5000 for denoising errors."""
    if config.beta is not None:
        return config.beta
    return 50.0 if config.images is None else 5000.0


def transition_of(config: PSOConfig, pipe: Any) -> str:
    """The setting, or what the pipeline's scheduler does."""
    own = "lcm" if "LCM" in type(pipe.scheduler).__name__ else "ancestral"
    return own if config.transition is None else config.transition
