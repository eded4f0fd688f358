"""DDPO: fine-tune a LoRA on any reward by policy gradients (https://arxiv.org/abs/2305.13301).

The sampler is a policy of T Gaussian steps. A round of images is sampled and scored, the scores become advantages, and
every step of every image is made more or less likely, within a trust region around the policy that sampled it:

    rho_t = pi_theta(x_{t-1} | x_t, c) / pi_old(x_{t-1} | x_t, c),
    loss  = mean over images and steps of  max(-A rho_t, -A clip(rho_t, 1 - clip_range, 1 + clip_range)).

With `kl_weight` there is a penalty besides, kl_weight * KL(pi_theta || pi_ref) at each step, which is near DPOK
(https://arxiv.org/abs/2305.16381). `train` is the algorithm, `run` what the command line does with it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from difftune.configs.recipes import DDPOConfig
from difftune.errors import UserError
from difftune.files.checkpoint import Say, State
from difftune.files.prompts import Prompts, prompts_named
from difftune.lookup import at_least, reward_named, reward_weights
from difftune.models import load as load_model
from difftune.rollouts.image_sampler import Chain
from difftune.rollouts.policy import Policy, kl, log_prob
from difftune.rollouts.rounds import Rolled, Rounds, check_groups, check_policy, engine, policy_of, repeated, roll
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


def ddpo_loss(advantages: Tensor, log_ratios: Tensor, clip_range: float = 1e-4) -> Tensor:
    """The mean of max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)) with rho = exp(log_ratios).

    advantages, log_ratios (B,). A step that has left the trust region in its advantage's direction has no gradient.
    """
    ratios = log_ratios.exp()
    return torch.maximum(-advantages * ratios, -advantages * ratios.clamp(1 - clip_range, 1 + clip_range)).mean()


def advantages(scores: Tensor, group: int = 1, limit: float = 5.0) -> Tensor:
    """(R - mean) / (std + 1e-8), kept within [-limit, limit], of all scores (N,) of a round.

    group: so many scores in a row are of one prompt, and the mean is theirs; 1: the mean is that of the round. The
    deviation is the population's, of all that is left.
    """
    gaps = scores - (scores.mean() if group == 1 else scores.view(-1, group).mean(1).repeat_interleave(group))
    return (gaps / (gaps.square().mean().sqrt() + 1e-8)).clamp(-limit, limit)


def train(
    config: DDPOConfig,
    state: State | None = None,
    pipe: Any = None,
    reward: Reward | None = None,
    say: Say | None = None,
) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each optimiser step, from the step of `state` on.

    pipe, reward: those that config names, unless given; the reward needs no gradient. The pipeline gets the adapter,
    and keeps it. `say` is told what was resolved. The rewards in the metrics are those of the step's round, which the
    weights at the round's beginning have made.
    Raises UserError for settings that cannot be, RunError after too many steps that were not finite.
    """
    check(config, pipe, reward)
    reward = reward_named(config.reward, gradient=False) if reward is None else reward
    prompts = repeated(prompts_named(config.prompts, config.seed), config.num_images_per_prompt)
    run = begin(config, state, load_model(config.model) if pipe is None else pipe, reference=config.kl_weight > 0)
    if config.per_prompt_stat_tracking:
        size, least = config.per_prompt_stat_tracking_buffer_size, config.per_prompt_stat_tracking_min_count
        run.seen = replace(run.seen, size=size, least=least)
    chain = Chain.of(config, run.pipe, run.network)
    policy = policy_of(chain, config.eta)
    sampled = partial(collect, config, run, chain, policy, prompts, reward)
    rounds = Rounds(config.updates_per_round, sampled, config.seed)
    with engine(config, run, say, eta=f"{policy.eta:g}"):
        yield from steps(config, run, partial(ascend, config, run, policy, rounds), rounds.kept)


class Judged(NamedTuple):
    """A round: one process's batches with their advantages, and the scores of all processes."""

    batches: Sequence[Rolled]
    advantages: Sequence[Tensor]  # (B,) each
    scores: Tensor


def collect(
    config: DDPOConfig, run: Training, chain: Chain, policy: Policy, prompts: Prompts, reward: Reward, steps: range
) -> Judged:
    """The images of a round's optimiser steps, and their advantages over all processes."""
    passes = range(config.gradient_accumulation_steps)
    parts = [samples(config, step, i, run.rank, run.world) for step in steps for i in passes]
    batches = [roll(chain, policy, prompts, reward, indices, run) for indices in parts]
    everyone = run.accelerator.gather(torch.cat([batch.scores for batch in batches]))
    found = compared(config, run, gather_object([text for batch in batches for text in batch.texts]), everyone)
    return Judged(batches, found.view(run.world, len(batches), -1)[run.rank].unbind(), everyone)


def compared(config: DDPOConfig, run: Training, texts: Sequence[str], scores: Tensor) -> Tensor:
    """The advantages (N,) of a round's scores, of all processes: by the round's moments, or by each prompt's latest."""
    if config.per_prompt_stat_tracking:
        return run.seen.advantages(texts, scores).clamp(-config.adv_clip_max, config.adv_clip_max)
    return advantages(scores, config.num_images_per_prompt, config.adv_clip_max)


def ascend(config: DDPOConfig, run: Training, policy: Policy, rounds: Rounds[Judged], step: int) -> Metrics:
    """One optimiser step on its share of the round, and what it met."""
    judged = rounds.at(run, step)
    count = config.gradient_accumulation_steps
    share = slice(step % config.updates_per_round * count, (step % config.updates_per_round + 1) * count)
    batches = list(zip(judged.batches[share], judged.advantages[share], strict=True))
    turns = [(batch, found, i) for batch, found in batches for i in batch.trajectory.drawn]
    met = []
    for n, (batch, found, i) in enumerate(turns):
        before = batch.reference(policy, run, i) if config.kl_weight else None
        with run.learning(last=n == len(turns) - 1):
            mean, std = batch.mean(policy, i)
            log_ratios = log_prob(batch.trajectory.paths[i + 1].x, mean, std) - batch.trajectory.log_probs[i]
            loss = ddpo_loss(found, log_ratios, config.clip_range)
            if before is not None:
                loss = loss + config.kl_weight * kl(mean, before, std).mean()
            differentiate(run, loss / len(turns))
        met.append(torch.stack([loss.detach(), *region(log_ratios.detach(), config.clip_range)]))
    norm = update(config, run)
    loss, ratio, gap, clipped = run.accelerator.gather(torch.stack(met)).mean(0).tolist()
    return {
        **statistics(judged.scores),
        "loss": loss,
        "grad_norm": norm,
        "ratio": ratio,
        "approx_kl": gap,
        "clip_fraction": clipped,
    }


def region(log_ratios: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
    """Where a batch is within the trust region: the mean ratio, half the mean squared log ratio, the share outside."""
    ratios = log_ratios.exp()
    return ratios.mean(), log_ratios.square().mean() / 2, ((ratios - 1).abs() > clip_range).float().mean()


# ------------------------------------------------------------------------------------------------ the command


def run(config: DDPOConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None) -> dict[str, Any]:
    """`difftune train ddpo`: train in `config.output_dir`; returns a summary. See `runs.run`."""
    check(config, pipe, reward)
    return follow(config, train, card, show, pipe, reward, gradient=False)


def check(config: DDPOConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting that cannot be, before anything is loaded."""
    check_shared(config, pipe)
    check_policy(config)
    check_groups(config)
    at_least(1, updates_per_round=config.updates_per_round)
    least, size = config.per_prompt_stat_tracking_min_count, config.per_prompt_stat_tracking_buffer_size
    at_least(1, per_prompt_stat_tracking_min_count=least)
    if size < least:
        raise UserError(
            f"per_prompt_stat_tracking_buffer_size is {size}: give at least per_prompt_stat_tracking_min_count, {least}"
        )
    at_least(0, clip_range=config.clip_range, adv_clip_max=config.adv_clip_max, kl_weight=config.kl_weight)
    if reward is None:
        reward_weights(config.reward)


def card(config: DDPOConfig, metrics: Metrics) -> str:
    return model_card(config, metrics, "ddpo", "DDPO ([2305.13301](https://arxiv.org/abs/2305.13301))")
