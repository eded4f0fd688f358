"""Adjoint matching: fine-tune a LoRA on a differentiable reward by regression on a lean adjoint
(https://arxiv.org/abs/2409.08861).

    maximise  E[ lambda r(x_N) ] - KL(p_theta | p_base),      optimum  p(x_N) = p_base(x_N) exp(lambda r(x_N)) / Z

over memoryless samplers (eta = 1, of flows too), whose end does not depend on their start. Each optimiser step samples
trajectories x_0 ... x_N by the trained model, sweeps the reward's gradient back through the *base* model, and regresses
what the trained model adds to the base's mean on it:

    a_N = -lambda dr/dx_N,    a_k = (dmu_base / dx_k)^T a_{k+1},
    loss = mean over images and some steps of  |(mu_theta(x_k) - mu_base(x_k)) / sigma_k + sigma_k a_{k+1}|^2.

No gradient goes through the sampler. (The released code has a_k for a_{k+1}, which errs unless the steps are many.)
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difftune.configs.recipes import AdjointMatchingConfig
from difftune.files.checkpoint import State
from difftune.lookup import at_least
from difftune.pipelines.engine import as_decoded
from difftune.rollouts.image_sampler import ImageSampler
from difftune.rollouts.policy import Policy, Trajectory
from difftune.rollouts.session import Session
from difftune.training.state import Kept, Metrics, take_snapshot
from difftune.training.steps import attempt_step, gather_statistics, score_images, take_step
from guidance.guided import GuidedPredict
from guidance.methods.cfg import Plain
from solvers.rollout.lean import lean_sweep
from solvers.samplers.step import transition


def train_adjoint_matching(session: Session[AdjointMatchingConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step."""
    run, policy = session.run, memoryless(session.images)
    limit = Limit(run.own.info.get("limit"))
    for step in session.steps:
        with attempt_step(run, step) as metrics:
            batches = [sweep_back(session, policy, numbers) for numbers in run.numbers(step)]
            metrics.update(match(session, policy, batches, limit, step))
        yield metrics, take_snapshot(run, step + 1, metrics, Kept({}, {"limit": limit.value}))


def adjoint_loss(mean: Tensor, base: Tensor, std: Tensor, adjoint: Tensor) -> Tensor:
    """|(mu_theta - mu_base) / sigma + sigma a|^2, (B,), summed over elements; a is that of the step's *end*."""
    return ((mean - base) / std + std * adjoint).square().flatten(1).sum(1)


def match(
    session: Session[AdjointMatchingConfig], policy: Policy, batches: Sequence["Swept"], limit: "Limit", step: int
) -> Metrics:
    """One optimiser step: a backward pass for each of some steps of each batch, and the update.

    An image's step whose root of the loss is above the limit has no gradient, but counts in the mean.
    """
    config, run = session.config, session.run
    roots: list[Tensor] = []

    def loss_of(turn: tuple[Swept, int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        batch, k = turn
        path = batch.trajectory.paths[k]
        with torch.no_grad():
            base, _ = policy.mean(batch.base, path, k)
        mean, std = policy.mean(batch.trained, path, k)
        losses = adjoint_loss(mean, base, std, batch.adjoints[k + 1])
        roots.append(losses.detach().sqrt())
        kept = limit.keeps(roots[-1])
        control = ((mean.detach() - base) / std).square().mean()
        return (losses * kept).mean(), {"control": control, "dropped": 1 - kept.float().mean()}

    chosen = draw_steps(config, policy, step)
    found = take_step(run, [(batch, k) for batch in batches for k in chosen], loss_of)
    limit.follow(run.accelerator.gather(torch.cat(roots)), config.drop_quantile)
    return {**gather_statistics(run, [batch.scores for batch in batches]), **found}


@dataclass
class Limit:
    """What the roots of the losses are kept under: the mean, with decay 0.9, of a quantile of those before."""

    value: float | None = None  # None: there were none before

    def keeps(self, roots: Tensor) -> Tensor:
        """Which of them (B,) are under it."""
        return torch.ones_like(roots, dtype=torch.bool) if self.value is None else roots <= self.value

    def follow(self, roots: Tensor, quantile: float) -> None:
        """Take the roots of an optimiser step in; a quantile of 1 keeps all."""
        if quantile < 1:
            now = roots.float().quantile(quantile).item()
            self.value = now if self.value is None else 0.9 * self.value + 0.1 * now


def draw_steps(config: AdjointMatchingConfig, policy: Policy, step: int) -> list[int]:
    """The sampler steps that an optimiser step is taken on, of those that add noise: half of them from the first 60 %,
    none twice, the same in every process."""
    noisy = [k for k, then in enumerate(policy.levels[1:]) if then.sigma > 0]
    draw, early = random.Random(f"{config.seed} {step} adjoint"), round(0.6 * len(noisy))
    count = min(config.steps_per_image, len(noisy))
    first = min((count + 1) // 2, early)
    first = max(first, count - (len(noisy) - early))
    return sorted([*draw.sample(noisy[:early], first), *draw.sample(noisy[early:], count - first)])


# ------------------------------------------------------------------------------------------------ trajectories


@dataclass(frozen=True)
class Swept:
    """A batch of trajectories by the trained model, and their lean adjoints."""

    trajectory: Trajectory
    adjoints: Sequence[Tensor]  # a_0 ... a_N, (B, ...) each
    trained: GuidedPredict  # both without guidance
    base: GuidedPredict
    scores: Tensor  # (B,)


def memoryless(images: ImageSampler) -> Policy:
    """DDPM's steps, of flows too: the noise of the start is gone at the end, as the optimum's form needs."""
    return Policy(transition, 1.0, images.levels)


def sweep_back(session: Session[AdjointMatchingConfig], policy: Policy, numbers: range) -> Swept:
    """Sample numbered images, score them, and carry the reward's gradient back through the base model."""
    images, run = session.images, session.run
    start = images.begin(session.prompts, numbers)
    assert start.noise is not None  # the only sampler is stochastic
    trajectory = policy.sample(start.predict, start.x, start.noise)
    scores, gradient = score_with_gradient(session, trajectory.end, start.prompts)
    plain = replace(images, guidance=Plain())
    base = plain.with_network(run.frozen).predict(start.predict.conds)
    states = [path.x for path in trajectory.paths]
    adjoints = lean_sweep(base, states, policy.levels, -session.config.reward_multiplier * gradient)
    return Swept(trajectory, adjoints, plain.predict(start.predict.conds), base, scores)


def score_with_gradient(session: Session, latents: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The scores (B,) of latents' images, and each one's gradient in its latent (B, ...)."""
    latents = latents.detach().requires_grad_()
    images = session.images.model.decode(latents, checkpointed=True)
    reward = as_decoded(session.reward, len(images), session.config.decode_batch)
    scores = score_images(reward, images, prompts, session.run)
    (gradient,) = torch.autograd.grad(scores.sum(), latents)
    return scores.detach(), gradient


# ------------------------------------------------------------------------------------------------ settings


def check_adjoint_matching(config: AdjointMatchingConfig) -> None:
    """UserError for the first setting that is invalid, of those that this recipe alone has."""
    at_least(2, num_inference_steps=config.num_inference_steps)
