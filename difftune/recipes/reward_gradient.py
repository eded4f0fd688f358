"""Parts of the recipes that differentiate a reward through the sampler: the divergence from the model before training,
and the engine's mode and plan. The algorithm itself is read in `difftune.recipes.alignprop`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import exp, hypot, inf, log
from typing import NamedTuple

import torch
from torch import Tensor

from difftune import processes
from difftune.configs.recipes import RewardGradientConfig
from difftune.pipelines.engine import (
    Engine,
    bound_mode,
    check_engine,
    held,
    offload_of,
    plan_for,
    probe_step,
    scores_of,
)
from difftune.pipelines.shared import told_by_each
from difftune.rollouts.image_sampler import Drawn, ImageSampler
from difftune.rollouts.session import Session
from difftune.training.network import TrainedNetwork
from difftune.training.numbering import seed_of
from solvers.denoiser import Path
from solvers.memory.budget import Plan, Probe, probe
from solvers.noise import Noise
from solvers.rollout.recompute import Recomputed
from solvers.rollout.truncated import steps_carrying
from solvers.samplers.catalogue import gaussian


class Modes(NamedTuple):
    """The engine's mode in each optimiser step: which of the sampler's steps carry gradient."""

    of: Callable[[int], str] | None  # step -> mode; None: what was planned, in every step
    greatest: str | None  # what is to fit into a memory budget; None: the plan chooses a mode
    words: str | None = None  # how a person reads it; None: as the plan has it


# ------------------------------------------------------------------------------------------------ KL to the reference


def kl_rate(eps: Tensor, reference: Tensor) -> Tensor:
    """mean over all elements of (eps_theta - eps_ref)^2: the divergence per latent element and unit of
    log(sigma / alpha)."""
    return (eps - reference).square().mean()


def divergence(images: ImageSampler, reference: TrainedNetwork, drawn: Drawn, numbers: range) -> Tensor:
    """An estimate, (), of the divergence of the model from its reference, in nats per latent element.

        KL(p_theta | p_ref) = integral of E |eps_theta(x, c) - eps_ref(x, c)|^2 d log(sigma / alpha),

    with x = alpha x_0 + sigma eps for the model's own samples x_0: the relative entropy of two diffusions that share
    their noise, with eps = -sigma times the score (https://arxiv.org/abs/2101.09258, theorem 1). It is taken over the
    sampler's range of levels, at one level for each backward pass, and eps_theta is the guided prediction. The
    gradient goes through eps_theta alone, at x as it is.
    """
    generators = [torch.Generator().manual_seed(seed_of(images.seed, i, "kl")) for i in numbers]
    x0 = drawn.path.x[: len(numbers)].detach()
    place = torch.rand((), generator=generators[0]).item()
    at, width = level_between(images.levels, place)
    x = Path(at.alpha * x0 + at.sigma * gaussian(x0, generators))
    with torch.no_grad():
        before = images.with_network(reference).predict(drawn.conds)(x, at).eps
    return width * kl_rate(Recomputed(images.predict(drawn.conds))(x, at).eps, before)


def level_between(levels: Sequence[Noise], place: float) -> tuple[Noise, float]:
    """The level at `place` in [0, 1] along the levels' finite range of log(sigma / alpha), in the levels' coordinates,
    and the width of that range."""
    finite = [at for at in levels if at.sigma > 0 and at.alpha > 0]
    low, high = (log(float(at.sigma) / float(at.alpha)) for at in (finite[-1], finite[0]))
    ratio, first = exp(low + place * (high - low)), finite[0]
    flow = abs(float(first.alpha + first.sigma) - 1) < 1e-6
    norm = 1 + ratio if flow else 1.0 if float(first.alpha) == 1 else hypot(1, ratio)
    return Noise(first.sigma.new_tensor(1 / norm), first.sigma.new_tensor(ratio / norm)), high - low


# ------------------------------------------------------------------------------------------------ signal and noise


def judge_evenly(judge: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The rewards (B,) that judge(x) gives the latents x (B, ...), with gradients that weigh all samples alike.

        dR_b / dx_b  is passed on as  (dR_b / dx_b) / |dR_b / dx_b|

    A loss with dL / dR_b = w_b passes on w_b times that. A gradient of 0 stays 0.
    """
    start, weights = x.view_as(x), torch.ones(())
    rewards = judge(start)

    def keep(gradient: Tensor) -> None:
        nonlocal weights
        weights = gradient.abs()

    def normalize(gradient: Tensor) -> Tensor:
        lengths = gradient.flatten(1).norm(dim=1)
        scale = torch.where(lengths > 0, weights / lengths, 0.0)
        return gradient * scale.view(-1, *[1] * (gradient.ndim - 1))

    rewards.register_hook(keep)
    start.register_hook(normalize)
    return rewards


def warn_of_noise(session: Session[RewardGradientConfig]) -> None:
    """Say, at most once, that the run sees fewer images than the noise scale of its gradients, and what to change."""
    config, met = session.config, session.run.gradients
    least = None if met is None or met.warned else met.hopeless(config.max_train_steps)
    if met is None or least is None:
        return
    met.warned = True
    known = f"above {least:.0f} images" if least < inf else "beyond measure: they do not agree at all"
    quieter = "train without guidance (--guidance none), or with" if config.guidance != "none" else "train with"
    processes.say_once(
        f"most of this run is chance: the noise scale of the gradients is {known}, and all {config.max_train_steps} "
        f"updates of {met.images} images see {config.max_train_steps * met.images}; {quieter} more images per update "
        "(--gradient_accumulation_steps), or a smoother reward"
    )


# ------------------------------------------------------------------------------------------------ the engine


@contextmanager
def plan_engine(session: Session[RewardGradientConfig], modes: Modes) -> Iterator[Plan]:
    """The plan for the memory budget, under its block checkpointing; what was resolved is told."""
    config, images = session.config, session.images
    network = images.model.network
    gradient = bound_mode(modes.greatest, config.offload)
    plan, *_ = told_by_each(lambda: measure_plan(session, gradient))  # the main process's, for all
    engine = Engine(plan, session.attention, offload=offload_of(config.offload, network.device))
    lines = engine.lines(modes.words or plan.gradient)
    session.tell(**{name: line for name, line in lines.items() if name != "attention"})
    with plan.applied(network, images.model.pipe.vae):
        yield plan


def measure_plan(session: Session[RewardGradientConfig], gradient: str | None) -> Plan:
    """The plan for the budget, from one step on the first sample; `gradient` is its to choose if it is None."""
    config, run, images = session.config, session.run, session.images
    model = images.model
    trained = sum(weight.nbytes for weight in run.weights.values())

    def measure(limit: int | None) -> Probe:
        start = images.begin(session.prompts, [0], gradient)
        model.network.train()
        found = probe(
            probe_step(gradient, images.step),
            start.predict,
            start.x,
            images.levels,
            start.noise,
            network=model.network,
            decode=lambda x: model.decode(x, checkpointed=True),
            decoder=model.pipe.vae,
            rewards=scores_of(session.reward, start.prompts),
            held=held(model, trained) + trained * ((run.average is not None) + (run.gradients is not None)),
            limit=limit,
        )
        model.network.eval()
        return replace(found, once_more=config.kl_coeff > 0)

    steps, batch = config.num_inference_steps, config.train_batch_size
    return plan_for(config.memory_budget, gradient, steps, batch, config.decode_batch, measure)


def count_carrying(gradient: str, steps: int) -> int:
    """How many of the sampler's steps carry gradient in a mode of the engine."""
    name, _, option = gradient.partition(":")
    return steps_carrying(option) if name == "truncated" else steps


def check_gradient(config: RewardGradientConfig) -> None:
    """UserError for a memory budget that is none."""
    check_engine(config.memory_budget, xformers=False)
