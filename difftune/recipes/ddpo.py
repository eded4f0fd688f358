"""DDPO: fine-tune a LoRA on any reward by policy gradients (https://arxiv.org/abs/2305.13301).

The sampler is a policy of T Gaussian steps. A round of images is sampled and scored, the scores become advantages, and
every step of every image is made more or less likely, within a trust region around the policy that sampled it:

    rho_t = pi_theta(x_{t-1} | x_t, c) / pi_old(x_{t-1} | x_t, c),
    loss  = mean over images and steps of  max(-A rho_t, -A clip(rho_t, 1 - clip_range, 1 + clip_range)).

With `kl_weight` there is a penalty besides, kl_weight * KL(pi_theta || pi_ref) at each step, which is near DPOK
(https://arxiv.org/abs/2305.16381).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from difftune.configs.recipes import DDPOConfig
from difftune.errors import UserError
from difftune.files.checkpoint import State
from difftune.rollouts.policy import Policy, kl, log_prob
from difftune.rollouts.rounds import Rounds, repeated
from difftune.rollouts.session import Session
from difftune.rollouts.trajectories import Rolled, policy_of, roll_out
from difftune.training.checks import check_exact_ratio, check_groups, check_no_dropout
from difftune.training.reward_statistics import PerPrompt
from difftune.training.state import Metrics, take_snapshot
from difftune.training.steps import attempt_step, statistics, take_step


def train_ddpo(session: Session[DDPOConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step.

    The rewards in the metrics are those of the step's round, which the weights at the round's beginning have made.
    """
    config, run = session.config, session.run
    run.seen = reward_history(config, run.seen)
    policy = policy_of(session.images, config.eta)
    session.tell(eta=f"{policy.eta:g}")
    rounds = Rounds(run, config.updates_per_round, lambda steps: sample_round(session, policy, steps))
    for step in session.steps:
        with attempt_step(run, step) as metrics:
            metrics.update(reinforce(session, policy, rounds.at(step), step % config.updates_per_round))
        yield metrics, take_snapshot(run, step + 1, metrics, rounds.kept())


def ddpo_loss(advantages: Tensor, log_ratios: Tensor, clip_range: float = 1e-4) -> Tensor:
    """The mean of max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)) with rho = exp(log_ratios).

    advantages, log_ratios (B,). A step that has left the trust region in its advantage's direction has no gradient.
    """
    ratios = log_ratios.exp()
    return torch.maximum(-advantages * ratios, -advantages * ratios.clamp(1 - clip_range, 1 + clip_range)).mean()


def advantages(scores: Tensor, group: int = 1, limit: float = 5.0) -> Tensor:
    """(R - mean) / (std + 1e-8), clipped to [-limit, limit], of all scores (N,) of a round.

    group: each block of so many consecutive scores is one prompt's, and the mean is theirs; 1: the mean is that of the
    round. std is the population's, of all R - mean of the round.
    """
    gaps = scores - (scores.mean() if group == 1 else scores.view(-1, group).mean(1).repeat_interleave(group))
    return (gaps / (gaps.square().mean().sqrt() + 1e-8)).clamp(-limit, limit)


def reinforce(session: Session[DDPOConfig], policy: Policy, judged: "Judged", share: int) -> Metrics:
    """One optimiser step on its share of the round: a backward pass for each stochastic sampler step, the update."""
    config, run = session.config, session.run

    def loss_of(turn: tuple[Rolled, Tensor, int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        batch, gains, i = turn
        before = batch.mean_under(run.reference, policy, i) if config.kl_weight else None
        mean, std = batch.mean(policy, i)
        log_ratios = log_prob(batch.after(i), mean, std) - batch.trajectory.log_prob(i)
        loss = ddpo_loss(gains, log_ratios, config.clip_range)
        if before is not None:
            loss = loss + config.kl_weight * kl(mean, before, std).mean()
        return loss, trust_region(log_ratios.detach(), config.clip_range)

    count = config.gradient_accumulation_steps
    batches = list(zip(judged.batches, judged.advantages, strict=True))[share * count : (share + 1) * count]
    turns = [(batch, gains, i) for batch, gains in batches for i in batch.trajectory.drawn]
    return {**statistics(judged.scores), **take_step(run, turns, loss_of)}


def trust_region(log_ratios: Tensor, clip_range: float) -> dict[str, Tensor]:
    """The mean ratio, half the mean squared log-ratio, and the share of ratios that have left the trust region."""
    ratios = log_ratios.exp()
    clipped = ((ratios - 1).abs() > clip_range).float().mean()
    return {"ratio": ratios.mean(), "approx_kl": log_ratios.square().mean() / 2, "clip_fraction": clipped}


# ------------------------------------------------------------------------------------------------ rounds


class Judged(NamedTuple):
    """A round: one process's batches with their advantages, and the scores of all processes."""

    batches: Sequence[Rolled]
    advantages: Sequence[Tensor]  # (B,) each
    scores: Tensor


def sample_round(session: Session[DDPOConfig], policy: Policy, steps: range) -> Judged:
    """The images of a round's optimiser steps, and their advantages over all processes."""
    config, run = session.config, session.run
    prompts = repeated(session.prompts, config.num_images_per_prompt)
    batches = [roll_out(session, policy, prompts, numbers) for step in steps for numbers in run.numbers(step)]
    everyone = run.accelerator.gather(torch.cat([batch.scores for batch in batches]))
    texts = gather_object([text for batch in batches for text in batch.texts])
    if config.per_prompt_stat_tracking:
        found = run.seen.advantages(texts, everyone).clamp(-config.adv_clip_max, config.adv_clip_max)
    else:
        found = advantages(everyone, config.num_images_per_prompt, config.adv_clip_max)
    return Judged(batches, found.view(run.world, len(batches), -1)[run.rank].unbind(), everyone)


def reward_history(config: DDPOConfig, seen: PerPrompt) -> PerPrompt:
    """The rewards of each prompt, with the buffer that config asks for."""
    if not config.per_prompt_stat_tracking:
        return seen
    size, least = config.per_prompt_stat_tracking_buffer_size, config.per_prompt_stat_tracking_min_count
    return replace(seen, size=size, least=least)


# ------------------------------------------------------------------------------------------------ settings


def check_ddpo(config: DDPOConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    check_no_dropout(config)
    check_exact_ratio(config)
    check_groups(config)
    least, size = config.per_prompt_stat_tracking_min_count, config.per_prompt_stat_tracking_buffer_size
    if size < least:
        raise UserError(
            f"per_prompt_stat_tracking_buffer_size is {size}: give at least per_prompt_stat_tracking_min_count, {least}"
        )
