"""D3PO: fine-tune a LoRA on preferences between sampled images, step by step (https://arxiv.org/abs/2311.13231).

`num_images_per_prompt` images of one prompt are sampled from one x_T, and all pairs of them are compared. The reward or
a person says which is better; training then prefers each step of it to the same step of the other:

    l_k  = 1/n log pi_theta(x_{t-1}^k | x_t^k, c) / pi_ref(x_{t-1}^k | x_t^k, c), for a latent of n elements,
           clipped to [log(1 - clip_range), log(1 + clip_range)],
    loss = mean over pairs and steps of  -log sigmoid(beta (l_winner - l_loser)).

l is a mean over the latent's elements, not a sum, and beta is for that. The reference is the model before training.
Only the order of two rewards counts. A person labels pairs of images; both are sampled again, each from its own x_T.

    sampling     rollouts/trajectories.py (`roll_out`); labelled images: rollouts/replay.py
    log-ratio    rollouts/policy.py (`log_ratio`)
    update       training/steps.py (`take_step`)
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from difftune.configs.recipes import D3POConfig
from difftune.files.checkpoint import State
from difftune.labelling.choices import decided
from difftune.rollouts.pairs import accuracy_of
from difftune.rollouts.policy import Policy, log_ratio
from difftune.rollouts.replay import check_replay, open_choices
from difftune.rollouts.rounds import repeated
from difftune.rollouts.session import Session
from difftune.rollouts.trajectories import Rolled, policy_of, roll_out
from difftune.training.checks import check_groups, check_no_dropout
from difftune.training.state import Metrics, take_snapshot
from difftune.training.steps import attempt_step, gather_statistics, take_step


def train_d3po(session: Session[D3POConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step."""
    run, policy = session.run, policy_of(session.images, session.config.eta)
    session.tell(eta=f"{policy.eta:g}")
    sample = open_preferences(session, policy)
    for step in session.steps:
        with attempt_step(run, step) as metrics:
            metrics.update(prefer(session, policy, [sample(numbers) for numbers in run.numbers(step)]))
        yield metrics, take_snapshot(run, step + 1, metrics)


def d3po_loss(
    first: Tensor, second: Tensor, label: Tensor, beta: float = 0.1, clip_range: float | None = 0.1
) -> Tensor:
    """The mean of -log sigmoid(beta label (l_1 - l_2)), l being the log-ratios clipped to
    [log(1 - clip_range), log(1 + clip_range)].

    first, second: log pi_theta / pi_ref (P,), means over latent elements, of the same step of each pair's two images.
    label (P,): 1 if the first is preferred, -1 if the second, 0 for a tie, which has no gradient. clip_range None: the
    log-ratios as they are.
    """
    if clip_range is not None:
        first, second = (clip_log_ratio(ratio, clip_range) for ratio in (first, second))
    return -logsigmoid(beta * label * (first - second)).mean()


def clip_log_ratio(log_ratio: Tensor, clip_range: float) -> Tensor:
    return log_ratio.exp().clamp(1 - clip_range, 1 + clip_range).log()


def prefer(session: Session[D3POConfig], policy: Policy, batches: list["Ranked"]) -> Metrics:
    """One optimiser step: a backward pass for every stochastic sampler step of every batch, and the update."""
    config, run = session.config, session.run

    def loss_of(turn: tuple[Ranked, int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        pairs, i = turn
        before = pairs.rolled.mean_under(run.reference, policy, i)
        mean, std = pairs.rolled.mean(policy, i)
        ratios = log_ratio(pairs.rolled.after(i), mean, before, std)
        first, second = ratios[pairs.first], ratios[pairs.second]
        loss = d3po_loss(first, second, pairs.label, config.beta, config.clip_range)
        return loss, {"accuracy": accuracy_of(pairs.label * (first - second)), "log_ratio": ratios.abs().mean()}

    turns = [(pairs, i) for pairs in batches for i in pairs.rolled.trajectory.drawn]
    found = take_step(run, turns, loss_of)
    scores = [] if config.labels is not None else [pairs.rolled.scores for pairs in batches]
    return {**gather_statistics(run, scores), **found}


# ------------------------------------------------------------------------------------------------ preferences


def open_preferences(session: Session[D3POConfig], policy: Policy) -> Callable[[range], "Ranked"]:
    """What gives the batches: a person's labelled images sampled again, or new images ranked by the reward."""
    if session.config.labels is not None:
        choices = open_choices(session, policy)
        return lambda numbers: rank(choices(numbers), 2)
    group = session.config.num_images_per_prompt
    prompts = repeated(session.prompts, group)
    return lambda numbers: rank(roll_out(session, policy, prompts, numbers, shared=group), group)


class Ranked(NamedTuple):
    """A batch of trajectories and all its pairs of one prompt."""

    rolled: Rolled
    first: Tensor  # (P,), rows of the batch
    second: Tensor  # (P,)
    label: Tensor  # (P,), see d3po_loss


def rank(rolled: Rolled, group: int) -> Ranked:
    """All pairs within each block of `group` consecutive samples, and which of the two has the greater score."""
    starts = range(0, len(rolled.scores), group)
    pairs = [(start + i, start + j) for start in starts for i, j in combinations(range(group), 2)]
    first, second = torch.tensor(pairs, device=rolled.scores.device).T
    return Ranked(rolled, first, second, (rolled.scores[first] - rolled.scores[second]).sign())


# ------------------------------------------------------------------------------------------------ settings


def check_d3po(config: D3POConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    check_no_dropout(config)
    check_groups(config)
    if config.labels is not None:
        check_replay(config, decided(config.labels))
