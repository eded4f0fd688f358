"""D3PO: fine-tune a LoRA on preferences between sampled images, step by step (https://arxiv.org/abs/2311.13231).

Two images of one prompt are sampled from one x_T. Which of them is better, the reward says, or a person; each step of
the better one is then preferred to the same step of the worse one:

    l_k  = log pi_theta(x_{t-1}^k | x_t^k, c) / pi_ref(x_{t-1}^k | x_t^k, c), kept within log(1 -+ clip_range),
    loss = mean over pairs and steps of  -log sigmoid(beta (l_winner - l_loser)).

The reference is the model before training. Only the order of two rewards counts. `train` is the algorithm, `run` what
the command line does with it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from difftune.configs.recipes import D3POConfig
from difftune.files.checkpoint import Say, State
from difftune.files.prompts import prompts_named
from difftune.labelling.choices import decided
from difftune.lookup import at_least, reward_named, reward_weights
from difftune.models import load as load_model
from difftune.rollouts.image_sampler import Chain
from difftune.rollouts.policy import Policy, log_ratio
from difftune.rollouts.replay import check_replay, replayed
from difftune.rollouts.rounds import Rolled, check_groups, check_policy, engine, policy_of, repeated, roll
from difftune.training.state import (
    Metrics,
    Reward,
    Training,
    begin,
    differentiate,
    follow,
    samples,
    statistics,
    steps,
    update,
)
from difftune.training.state import card as model_card
from difftune.training.state import check as check_shared

# ------------------------------------------------------------------------------------------------ the algorithm


def d3po_loss(
    first: Tensor, second: Tensor, label: Tensor, beta: float = 0.1, clip_range: float | None = 0.1
) -> Tensor:
    """The mean of -log sigmoid(beta label (l_1 - l_2)), l being log-ratios kept within log(1 -+ clip_range).

    first, second: log pi_theta / pi_ref (P,) of the same step of each pair's members. label (P,): 1 where the first is
    preferred, -1 where the second, 0 for a tie, which has no gradient. clip_range None: the log-ratios as they are.
    """
    if clip_range is not None:
        first, second = (clipped(ratio, clip_range) for ratio in (first, second))
    return -logsigmoid(beta * label * (first - second)).mean()


def clipped(log_ratio: Tensor, clip_range: float) -> Tensor:
    return log_ratio.exp().clamp(1 - clip_range, 1 + clip_range).log()


class Ranked(NamedTuple):
    """A batch of trajectories and all its pairs of one prompt."""

    rolled: Rolled
    first: Tensor  # (P,), rows of the batch
    second: Tensor  # (P,)
    label: Tensor  # (P,), see d3po_loss


def ranked(rolled: Rolled, group: int) -> Ranked:
    """Every two of `group` samples in a row, and which of them has the greater score."""
    starts = range(0, len(rolled.scores), group)
    pairs = [(start + i, start + j) for start in starts for i, j in combinations(range(group), 2)]
    first, second = torch.tensor(pairs, device=rolled.scores.device).T
    return Ranked(rolled, first, second, (rolled.scores[first] - rolled.scores[second]).sign())


def train(
    config: D3POConfig,
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
    if config.labels is None and reward is None:
        reward = reward_named(config.reward, gradient=False)
    run = begin(config, state, load_model(config.model) if pipe is None else pipe, reference=True)
    chain = Chain.of(config, run.pipe, run.network)
    policy = policy_of(chain, config.eta)
    batch = (
        person(config, run, chain, policy)
        if reward is None or config.labels
        else judge(config, run, chain, policy, reward)
    )
    with engine(config, run, say, eta=f"{policy.eta:g}"):
        yield from steps(config, run, partial(ascend, config, run, policy, batch))


def judge(config: D3POConfig, run: Training, chain: Chain, policy: Policy, reward: Reward) -> Callable[[range], Ranked]:
    """Batches that are sampled now, ordered by the reward."""
    group = config.num_images_per_prompt
    prompts = repeated(prompts_named(config.prompts, config.seed), group)
    return lambda indices: ranked(roll(chain, policy, prompts, reward, indices, run, shared=group), group)


def person(config: D3POConfig, run: Training, chain: Chain, policy: Policy) -> Callable[[range], Ranked]:
    """Batches that a person has ordered, sampled again by the model that made them."""
    assert config.labels is not None
    choices = replayed(config, decided(config.labels), run, chain, policy)
    return lambda indices: ranked(choices(indices), 2)


def ascend(config: D3POConfig, run: Training, policy: Policy, batch: Callable[[range], Ranked], step: int) -> Metrics:
    """One optimiser step on new pairs, and what it met."""
    passes = range(config.gradient_accumulation_steps)
    batches = [batch(samples(config, step, i, run.rank, run.world)) for i in passes]
    turns = [(pairs, i) for pairs in batches for i in pairs.rolled.trajectory.drawn]
    met = []
    for n, (pairs, i) in enumerate(turns):
        before = pairs.rolled.reference(policy, run, i)
        with run.learning(last=n == len(turns) - 1):
            mean, std = pairs.rolled.mean(policy, i)
            ratios = log_ratio(pairs.rolled.trajectory.paths[i + 1].x, mean, before, std)
            loss = d3po_loss(ratios[pairs.first], ratios[pairs.second], pairs.label, config.beta, config.clip_range)
            differentiate(run, loss / len(turns))
        met.append(torch.stack([loss.detach(), *agreement(ratios.detach(), pairs)]))
    norm = update(config, run)
    loss, accuracy, gap = run.accelerator.gather(torch.stack(met)).mean(0).tolist()
    return {
        **judged(config, run, batches),
        "loss": loss,
        "grad_norm": norm,
        "accuracy": accuracy,
        "log_ratio": gap,
    }


def agreement(ratios: Tensor, pairs: Ranked) -> tuple[Tensor, Tensor]:
    """How often the policy's log-ratios order a pair as its label does, ties counting one half; their mean size."""
    right = pairs.label * (ratios[pairs.first] - ratios[pairs.second])
    return (right.sign() + 1).mean() / 2, ratios.abs().mean()


def judged(config: D3POConfig, run: Training, batches: list[Ranked]) -> Metrics:
    """The rewards of a step's images; a person gives none."""
    if config.labels is not None:
        return {}
    return statistics(run.accelerator.gather(torch.cat([pairs.rolled.scores for pairs in batches])))


# ------------------------------------------------------------------------------------------------ the command


def run(config: D3POConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None) -> dict[str, Any]:
    """`difftune train d3po`: train in `config.output_dir`; returns a summary. See `runs.run`."""
    check(config, pipe, reward)
    return follow(config, train, card, show, pipe, reward)


def check(config: D3POConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting that cannot be, before anything is loaded."""
    check_shared(config, pipe)
    check_policy(config)
    check_groups(config, least=2)
    at_least(0, beta=config.beta, clip_range=config.clip_range)
    if config.labels is not None:
        check_replay(config, decided(config.labels))
    elif reward is None:
        reward_weights(config.reward)


def card(config: D3POConfig, metrics: Metrics) -> str:
    return model_card(config, metrics, "d3po", "D3PO ([2311.13231](https://arxiv.org/abs/2311.13231))")
