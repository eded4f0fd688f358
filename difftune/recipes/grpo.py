"""GRPO: fine-tune a LoRA on any reward by comparing the images of a prompt with each other (Flow-GRPO,
https://arxiv.org/abs/2505.05470), with the settings of DanceGRPO, MixGRPO, Flow-GRPO-Fast, CPS and GRPO-Guard.

The sampler is DDPO's policy of Gaussian steps, pi(x' | x, c) = N(mu_theta, sigma^2). A round samples G images of each
prompt; some steps of a window add noise, the others are the ODE's. Each noisy step is made more or less likely by the
advantage of its image in its group, within a trust region around the policy that sampled it:

    A    = (r - mean of the prompt) / deviation, clipped to [-adv_clip_max, adv_clip_max],
    rho  = exp(1/n log pi_theta(x' | x, c) / pi_old(x' | x, c)), for a latent of n elements,
    loss = mean over images and noisy steps of  max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range))
           + kl_weight / n KL(pi_theta || pi_ref).

log rho and KL are means over the latent's elements, not sums; clip_range and kl_weight are for that (kl_form="velocity"
has the mean squared difference of the networks' outputs in place of KL / n). `advantage_std` is
the deviation: "residual", of r - mean of the prompt over all images of a round; "raw", of r over the same images;
"group", of r over the prompt's own images.

trust="guard" (GRPO-Guard, https://arxiv.org/abs/2510.22319) has another rho:

    log rho_guard = 1/n sum over elements of z (mu_theta - mu_old),  with the noise z = (x' - mu_old) / sigma drawn
                  = sigma (log rho + 1/n |mu_theta - mu_old|^2 / (2 sigma^2)).

Under pi_old its mean is 0. Its size is that of the change of mu, whatever sigma is, so one clip range suits all steps.

    clipped loss   recipes/ddpo.py (`ddpo_loss`)
    advantages     rollouts/groups.py (`judge_groups`)
    pi_old         rollouts/rounds.py (`Rounds`: the weights that a round begins with)
    update         training/steps.py (`take_step`)
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from difftune.configs.recipes import GRPOConfig
from difftune.errors import UserError
from difftune.files.checkpoint import State
from difftune.recipes.ddpo import ddpo_loss, trust_region
from difftune.rollouts.groups import judge_groups, part_rewards
from difftune.rollouts.policy import Policy, check_eta, kl, log_prob, per_element
from difftune.rollouts.rounds import Rounds, repeated
from difftune.rollouts.session import Session
from difftune.rollouts.trajectories import Rolled, policy_of, roll_out
from difftune.training.checks import check_exact_ratio, check_groups, check_no_dropout, check_whole_groups
from difftune.training.state import Metrics, take_snapshot
from difftune.training.steps import attempt_step, take_step
from guidance.guided import GuidedPredict
from solvers.denoiser import Prediction, target
from solvers.noise import Noise


def train_grpo(session: Session[GRPOConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step.

    The rewards in the metrics are those of the step's round, which the weights at the round's beginning have made.
    """
    config, run = session.config, session.run
    policy = policy_of(session.images, config.eta, config.kernel)
    session.tell(kernel=policy.kernel.__name__, eta=f"{policy.eta:g}")
    rounds = Rounds(run, config.updates_per_round, lambda steps: sample_round(session, policy, steps))
    for step in session.steps:
        with attempt_step(run, step) as metrics:
            metrics.update(reinforce_groups(session, rounds.at(step), step % config.updates_per_round))
        yield metrics, take_snapshot(run, step + 1, metrics, rounds.kept())


def reinforce_groups(session: Session[GRPOConfig], judged: "JudgedGroups", share: int) -> Metrics:
    """One optimiser step on its share of the round: a backward pass for each noisy step of its batches, the update."""
    config, run, policy = session.config, session.run, judged.policy
    clip, space = clip_of(config), session.images.denoiser.prediction_type

    def loss_of(turn: tuple[Rolled, Tensor, int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        batch, gains, i = turn
        before = weigh(policy, batch, i, batch.predict_by(run.reference)) if config.kl_weight else None
        now = weigh(policy, batch, i, batch.predict)
        log_ratios = log_ratio_of(config, batch, i, now)
        loss, found = ddpo_loss(gains, log_ratios, clip), trust_region(log_ratios.detach(), clip)
        if before is not None:
            apart = divergence_of(config, now, before, space, policy.levels[i]).mean()
            loss, found = loss + config.kl_weight * apart, {**found, "kl": apart}
        return loss, found

    count = config.gradient_accumulation_steps
    batches = list(zip(judged.batches, judged.advantages, strict=True))[share * count : (share + 1) * count]
    turns = [(batch, gains, i) for batch, gains in batches for i in batch.trajectory.drawn]
    return {**judged.metrics, **take_step(run, turns, loss_of)}


class Weighed(NamedTuple):
    """A step of a batch by some weights."""

    prediction: Prediction
    mean: Tensor  # (B, ...)
    std: Tensor  # ()


def weigh(policy: Policy, batch: Rolled, i: int, predict: GuidedPredict) -> Weighed:
    """Step i from where the batch was, by the weights of `predict`."""
    prediction, mean, std = policy.step(predict, batch.trajectory.paths[i], i)
    return Weighed(prediction, policy.shifted(prediction, mean, i), std)


def log_ratio_of(config: GRPOConfig, batch: Rolled, i: int, now: Weighed) -> Tensor:
    """log rho (B,) of step i: exactly 0 by the weights that sampled it."""
    if config.trust == "guard":
        return guard_log_ratio(batch.after(i), now.mean, batch.trajectory.means[i], now.std)
    return log_prob(batch.after(i), now.mean, now.std) - batch.trajectory.log_prob(i)


def divergence_of(config: GRPOConfig, now: Weighed, before: Weighed, space: str, at: Noise) -> Tensor:
    """The divergence (B,) from the reference of a step from level `at`, by a network that emits `space`."""
    if config.kl_form == "gaussian":
        return kl(now.mean, before.mean, now.std)
    return velocity_gap(space, now.prediction, before.prediction, at)


def guard_log_ratio(x: Tensor, mean: Tensor, old: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's log-ratio (B,): the mean over elements of z (mean - old), with z = (x - old) / std (see above)."""
    return per_element((x.detach() - old) / std * (mean - old))


def velocity_gap(space: str, prediction: Prediction, reference: Prediction, at: Noise) -> Tensor:
    """The mean over elements, (B,), of the squared difference of what the two networks emit."""
    said, base = (target(space, p.x0, p.eps, at.alpha, at.sigma) for p in (prediction, reference))
    return per_element((said - base) ** 2)


# ------------------------------------------------------------------------------------------------ rounds


class JudgedGroups(NamedTuple):
    """A round: one process's batches with their advantages, and what is reported of all processes'."""

    policy: Policy  # with the round's window
    batches: Sequence[Rolled]
    advantages: Sequence[Tensor]  # (B,) each
    metrics: Metrics


def sample_round(session: Session[GRPOConfig], policy: Policy, steps: range) -> JudgedGroups:
    """The images of a round's optimiser steps, and their advantages in their groups, over all processes."""
    config, run = session.config, session.run
    window = window_of(config, policy, steps.start)
    policy = replace(policy, window=window)
    group = config.num_images_per_prompt
    prompts, shared = repeated(session.prompts, group), group if config.shared_noise else 1
    numbers = [part for step in steps for part in run.numbers(step)]
    judged, parted = part_rewards(session)
    batches = [roll_out(judged, policy, prompts, part, shared) for part in numbers]
    found, metrics = judge_groups(session, numbers, [batch.scores for batch in batches], parted)
    return JudgedGroups(policy, batches, found, {**metrics, "window": float(window.start)})


def window_of(config: GRPOConfig, policy: Policy, step: int) -> range:
    """The steps that add noise, and are trained, in the round that begins with an optimiser step.

    "random": anywhere in the first half of the steps (Flow-GRPO-Fast), the same in every process. "progressive": from
    the first steps on, one further every `window_interval` optimiser steps, to the last (MixGRPO).
    """
    count = sum(bool(then.sigma > 0) for then in policy.levels[1:])  # the step to data adds no noise
    width = min(config.sde_window or count, count)
    if config.window_schedule == "progressive":
        first = min(step // config.window_interval, count - width)
    else:
        latest = max(config.num_inference_steps // 2 - width, 0)
        first = random.Random(f"{config.seed} {step} window").randint(0, min(latest, count - width))
    return range(first, first + width)


# ------------------------------------------------------------------------------------------------ settings


CLIPS = {"clip": 1e-4, "guard": 2e-6}  # the papers' clip ranges


def clip_of(config: GRPOConfig) -> float:
    return CLIPS[config.trust] if config.clip_range is None else config.clip_range


def check_grpo(config: GRPOConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    check_no_dropout(config)
    check_exact_ratio(config)
    if config.shared_noise:
        check_groups(config)
    if config.kernel is not None:
        check_eta(config.kernel, config.eta)
    check_heard(config)
    if config.num_inference_steps < 2:
        raise UserError("num_inference_steps is 1: the step to data adds no noise, so give at least 2")
    check_whole_groups(config)


def check_heard(config: GRPOConfig) -> None:
    """UserError for a setting that changes nothing beside the others."""
    for name, deaf, why in (
        ("kl_form", config.kl_weight == 0, "kl_weight is 0"),
        ("window_schedule", config.sde_window == 0, "sde_window is 0, which is all steps"),
        ("window_interval", config.window_schedule == "random", "window_schedule is 'random'"),
    ):
        given = getattr(config, name)
        if deaf and given != getattr(GRPOConfig, name):
            raise UserError(f"{name} is {given!r}, but {why}, so that it would change nothing: leave it out")
