"""Up a reward's gradient, through the sampler: what AlignProp, DRaFT, ReFL and DRTune share.

    minimise  mean_b f(R_b) + kl_coeff * KL(theta),      R_b = R(decode(x_0(theta, x_T, c)), c)

They differ in the sampler steps that carry gradient, which are a mode of the engine, and in f. A recipe's `train` says
both and leaves the rest to `ascents`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import exp, hypot, log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difftune.configs.recipes import RewardGradientConfig
from difftune.files.checkpoint import Say, State
from difftune.files.prompts import Prompts, prompts_named
from difftune.lookup import at_least, reward_named, reward_weights
from difftune.models import load as load_model
from difftune.pipelines.engine import (
    Engine,
    bound_mode,
    check_engine,
    held,
    kernels,
    offload_of,
    one_at_a_time,
    plan_for,
    probe_step,
    scores_of,
)
from difftune.rollouts.image_sampler import Chain, Drawn
from difftune.training.state import (
    Metrics,
    Reward,
    Training,
    begin,
    check,
    differentiate,
    mixed,
    samples,
    scored,
    statistics,
    steps,
    update,
)
from solvers.denoiser import Path
from solvers.memory.budget import Plan, Probe, probe
from solvers.noise import Noise
from solvers.rollout.recompute import Recomputed
from solvers.samplers.catalogue import gaussian

Loss = Callable[[Tensor], Tensor]  # scores (B,) -> the loss, ()


class Modes(NamedTuple):
    """The engine's mode in each optimiser step."""

    of: Callable[[int], str] | None  # step -> mode; None: what was planned, in every step
    greatest: str | None  # what is to fit into a memory budget; None: the plan chooses a mode
    words: str | None = None  # how a person reads it; None: as the plan has it


@dataclass(frozen=True)
class Ascent:
    """All that one optimiser step needs beside its number."""

    config: RewardGradientConfig
    run: Training
    chain: Chain
    reference: Chain | None  # where there is a KL
    prompts: Prompts
    reward: Reward
    loss: Loss
    plan: Plan


def ascents(
    config: RewardGradientConfig,
    modes: Modes,
    loss: Loss,
    state: State | None = None,
    pipe: Any = None,
    reward: Reward | None = None,
    say: Say | None = None,
) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each optimiser step, from the step of `state` on; see `recipes.alignprop.train`."""
    reward = reward_named(config.reward) if reward is None else reward
    prompts = prompts_named(config.prompts, config.seed)
    run = begin(config, state, load_model(config.model) if pipe is None else pipe, reference=config.kl_coeff > 0)
    chain = replace(Chain.of(config, run.pipe, run.network), offload=config.offload)
    reference = Chain.of(config, run.pipe, run.reference) if config.kl_coeff > 0 else None
    with running(config, modes, run, chain, prompts, reward, say) as plan:
        ascent = Ascent(config, run, chain, reference, prompts, one_at_a_time(reward, plan), loss, plan)
        yield from steps(config, run, partial(climb, ascent, modes))


def climb(ascent: Ascent, modes: Modes, step: int) -> Metrics:
    """One optimiser step, and what it met."""
    config, run = ascent.config, ascent.run
    gradient = ascent.plan.gradient if modes.of is None else modes.of(step)
    batches = range(config.gradient_accumulation_steps)
    parts = [p for i in batches for p in ascent.plan.split(samples(config, step, i, run.rank, run.world))]
    scores, divergence = [], 0.0
    for i, indices in enumerate(parts):
        with run.learning(last=i == len(parts) - 1):
            its, kl = backward(ascent, indices, gradient)
        scores.append(its)
        divergence += kl
    norm = update(config, run)
    everyone = run.accelerator.gather(torch.cat(scores))
    found = {"loss": ascent.loss(everyone).item(), "grad_norm": norm, "K": carrying(gradient, len(ascent.chain.levels))}
    if ascent.reference is not None:
        everywhere = run.accelerator.gather(torch.tensor([divergence], device=everyone.device))
        found["kl"] = everywhere.mean().item()
    return {**statistics(everyone), **found}


def backward(ascent: Ascent, indices: range, gradient: str) -> tuple[Tensor, float]:
    """One backward pass: the gradient is added to the weights'. Returns the scores (B,), and its share of the KL."""
    config, run = ascent.config, ascent.run
    drawn = ascent.chain.draw(ascent.prompts, indices, gradient)
    scores = scored(ascent.reward, ascent.chain.decode(drawn), drawn.prompts, run)
    share = len(indices) / config.train_batch_size / config.gradient_accumulation_steps
    loss, kl = ascent.loss(scores), 0.0
    if ascent.reference is not None:
        divergence = divergence_of(ascent, drawn, indices)
        loss, kl = loss + config.kl_coeff * divergence, share * divergence.item()
    differentiate(run, share * loss)
    return scores.detach(), kl


# ------------------------------------------------------------------------------------------------ KL to the reference


def kl_rate(eps: Tensor, reference: Tensor) -> Tensor:
    """mean over all elements of (eps_theta - eps_ref)^2: the divergence per latent element and unit of
    log(sigma / alpha)."""
    return (eps - reference).square().mean()


def divergence_of(ascent: Ascent, drawn: Drawn, indices: range) -> Tensor:
    """An estimate, (), of the divergence of the model from its reference, in nats per latent element.

        KL(p_theta | p_ref) = integral of E |eps_theta(x, c) - eps_ref(x, c)|^2 d log(sigma / alpha),

    with x = alpha x_0 + sigma eps for the model's own samples x_0: the relative entropy of two diffusions that share
    their noise, with eps = -sigma times the score (https://arxiv.org/abs/2101.09258, theorem 1). It is taken over the
    sampler's range of levels, at one level for each backward pass, and eps_theta is the guided prediction. The
    gradient goes through eps_theta alone, at x as it is.
    """
    generators = [torch.Generator().manual_seed(mixed(ascent.config.seed, i, "kl")) for i in indices]
    x0 = drawn.path.x[: len(indices)].detach()
    place = torch.rand((), generator=generators[0]).item()
    at, width = between(ascent.chain.levels, place)
    x = Path(at.alpha * x0 + at.sigma * gaussian(x0, generators))
    with torch.no_grad():
        assert ascent.reference is not None
        before = ascent.reference.predict(drawn.conds)(x, at).eps
    return width * kl_rate(Recomputed(ascent.chain.predict(drawn.conds))(x, at).eps, before)


def between(levels: Sequence[Noise], place: float) -> tuple[Noise, float]:
    """The level at `place` in [0, 1] of the finite range of log(sigma / alpha), in the coordinates of the levels, and
    the width of that range."""
    finite = [at for at in levels if at.sigma > 0 and at.alpha > 0]
    low, high = (log(float(at.sigma) / float(at.alpha)) for at in (finite[-1], finite[0]))
    ratio, first = exp(low + place * (high - low)), finite[0]
    flow = abs(float(first.alpha + first.sigma) - 1) < 1e-6
    norm = 1 + ratio if flow else 1.0 if float(first.alpha) == 1 else hypot(1, ratio)
    return Noise(first.sigma.new_tensor(1 / norm), first.sigma.new_tensor(ratio / norm)), high - low


# ------------------------------------------------------------------------------------------------ the engine


@contextmanager
def running(
    config: RewardGradientConfig,
    modes: Modes,
    run: Training,
    chain: Chain,
    prompts: Prompts,
    reward: Reward,
    say: Say | None,
) -> Iterator[Plan]:
    """The engine as it is set for this run: kernels, and the plan, under its block checkpointing."""
    pipe, network = chain.model.pipe, chain.model.network
    with kernels(config.enable_xformers_memory_efficient_attention, config.deterministic, network) as found:
        bound = bound_mode(modes.greatest, config.offload)
        plan = planned(config, bound, run, chain, prompts, reward)
        engine = Engine(plan, found, config.deterministic, offload_of(config.offload, network.device))
        for name, line in engine.lines(modes.words or plan.gradient).items():
            (say or quiet)(f"{name}: {line}")
        with plan.applied(network, pipe.vae):
            yield plan


def planned(
    config: RewardGradientConfig, gradient: str | None, run: Training, chain: Chain, prompts: Prompts, reward: Reward
) -> Plan:
    """The plan for the budget, from one step on the first sample; `gradient` is its to choose where it is None."""
    trained = sum(weight.nbytes for weight in run.weights.values())
    network = chain.model.network

    def measure(limit: int | None) -> Probe:
        texts, x, noise, predict = chain.begin(prompts, [0], gradient)
        network.train()
        found = probe(
            probe_step(gradient, chain.step),
            predict,
            x,
            chain.levels,
            noise,
            network=network,
            decode=lambda x: chain.model.decode(x, checkpointed=True),
            decoder=chain.model.pipe.vae,
            rewards=scores_of(reward, texts),
            held=held(chain.model, trained) + (trained if run.average else 0),
            limit=limit,
        )
        network.eval()
        return found

    return plan_for(config.memory_budget, gradient, config.num_inference_steps, config.train_batch_size, measure)


def carrying(gradient: str, levels: int) -> int:
    """How many sampler steps carry gradient in a mode of the engine, for that many levels."""
    name, _, option = gradient.partition(":")
    number, _, style = option.partition(":")
    if name != "truncated":
        return levels - 1
    if style == "refl" or style == "draft_lv":
        return 1
    return number.count("1") if style == "mask" else int(number)


def quiet(line: str) -> None:
    """Say nothing."""


# ------------------------------------------------------------------------------------------------ the command


def check_gradient(config: RewardGradientConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting, of those that these recipes share, that cannot be."""
    check(config, pipe)
    at_least(0, kl_coeff=config.kl_coeff)
    check_engine(config.memory_budget, xformers=False)
    reward_weights(config.reward if reward is None else reward, gradient=True)
