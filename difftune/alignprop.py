"""AlignProp: fine-tune a LoRA on a differentiable reward, through the sampler (https://arxiv.org/abs/2310.03739).

    maximise  J(theta) = E_{c, x_T} [ R(decode(x_0(theta, x_T, c)), c) ]

The gradient goes through the reward, the VAE's decoder and the last K steps of the sampler; K is drawn anew for each
optimiser step. `train` is the algorithm, `run` what the command line does with it.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from difftune import runs
from difftune.chain import Chain
from difftune.checkpoint import Say, State
from difftune.configs import AlignPropConfig
from difftune.engine import Engine, check_engine, held, kernels, one_at_a_time, plan_for, probe_step, scores_of
from difftune.models import load as load_model
from difftune.named import at_least, differentiable, gradient_named, reward_named
from difftune.prompts import Prompts, prompts_named
from difftune.training import (
    Metrics,
    Reward,
    Training,
    attempt,
    begin,
    differentiate,
    samples,
    scored,
    snapshot,
    statistics,
    update,
)
from difftune.training import card as model_card
from difftune.training import check as check_shared
from solvers.budget import Plan, Probe, probe

# ------------------------------------------------------------------------------------------------ the algorithm


def alignprop_loss(scores: Tensor, coefficient: float = 1.0) -> Tensor:
    """L = -coefficient * mean_b R_b, for scores (B,)."""
    return -coefficient * scores.mean()


def kept_steps(config: AlignPropConfig, step: int) -> int:
    """K ~ Uniform{truncation_min, ..., truncation_max}, one draw per optimiser step, the same in every process.

    The suffix rule, which is the paper's: the last K steps carry gradient. (Its released code draws anew at every
    sampler step, and so keeps step i with probability (i + 1) / 51.)
    """
    most = greatest(config)
    return random.Random(f"{config.seed} {step}").randint(min(config.truncation_min, most), most)


def train(
    config: AlignPropConfig,
    state: State | None = None,
    pipe: Any = None,
    reward: Reward | None = None,
    say: Say | None = None,
) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each optimiser step, from the step of `state` on.

    pipe, reward: those that config names, unless given. The pipeline gets the adapter, and keeps it. `say` is told what
    was resolved: the gradient mode, the attention, the plan for a memory budget.
    Raises UserError for settings that cannot be, RunError where a reward or a gradient is not finite: the weights are
    then those of the state yielded last.
    """
    check(config, pipe, reward)
    reward = reward_named(config.reward) if reward is None else reward
    prompts = prompts_named(config.prompts, config.seed)
    run = begin(config, state, load_model(config.model) if pipe is None else pipe)
    chain = Chain.of(config, run.pipe, run.network)
    with running(config, run, chain, prompts, reward, say) as plan:
        reward = one_at_a_time(reward, plan)
        for step in range(run.done, config.max_train_steps):
            gradient = mode_of(config, plan, step)
            climb = partial(ascend, config, run, chain, prompts, reward, plan, gradient, step)
            metrics = attempt(config, run, step, climb)
            yield metrics, snapshot(config, run, step + 1, metrics)


def ascend(
    config: AlignPropConfig,
    run: Training,
    chain: Chain,
    prompts: Prompts,
    reward: Reward,
    plan: Plan,
    gradient: str,
    step: int,
) -> Metrics:
    """One optimiser step up the reward, and what it met."""
    parts = passes(config, plan, step, run)
    scores = []
    for i, indices in enumerate(parts):
        with run.learning(last=i == len(parts) - 1):
            scores.append(backward(config, run, chain, prompts, reward, indices, gradient))
    norm = update(config, run)
    everyone = run.accelerator.gather(torch.cat(scores))
    return {
        **statistics(everyone),
        "loss": alignprop_loss(everyone, config.loss_coeff).item(),
        "grad_norm": norm,
        "K": carrying(gradient, config.num_inference_steps),
    }


@contextmanager
def running(
    config: AlignPropConfig, run: Training, chain: Chain, prompts: Prompts, reward: Reward, say: Say | None
) -> Iterator[Plan]:
    """The engine as it is set for this run: kernels, and the plan, under its block checkpointing."""
    pipe, network = chain.model.pipe, chain.model.network
    with kernels(config.enable_xformers_memory_efficient_attention, config.deterministic, network) as found:
        plan = planned(config, run, chain, prompts, reward)
        for name, line in Engine(plan, found, config.deterministic).lines(resolved(config, plan)).items():
            (say or quiet)(f"{name}: {line}")
        with plan.applied(network, pipe.vae):
            yield plan


def planned(config: AlignPropConfig, run: Training, chain: Chain, prompts: Prompts, reward: Reward) -> Plan:
    """The plan for the budget, from one step on the first sample.

    Where every step carries gradient, the mode is the plan's to choose; else it is the greatest truncation.
    """
    gradient = config.gradient or (None if exact(config) else f"truncated:{greatest(config)}")

    def measure(limit: int | None) -> Probe:
        texts, x, noise, predict = chain.begin(prompts, [0], gradient)
        chain.model.network.train()
        found = probe(
            probe_step(gradient, chain.step),
            predict,
            x,
            chain.levels,
            noise,
            network=chain.model.network,
            decode=lambda x: chain.model.decode(x, checkpointed=True),
            decoder=chain.model.pipe.vae,
            rewards=scores_of(reward, texts),
            held=held(chain.model, sum(weight.nbytes for weight in run.weights.values())),
            limit=limit,
        )
        chain.model.network.eval()
        return found

    return plan_for(config.memory_budget, gradient, config.num_inference_steps, config.train_batch_size, measure)


def greatest(config: AlignPropConfig) -> int:
    """The greatest K that is drawn."""
    return min(config.truncation_max, config.num_inference_steps)


def exact(config: AlignPropConfig) -> bool:
    """Whether every step carries gradient, whatever K is drawn."""
    return min(config.truncation_min, greatest(config)) == config.num_inference_steps


def mode_of(config: AlignPropConfig, plan: Plan, step: int) -> str:
    """The engine's mode in one optimiser step."""
    if config.gradient is None and not (config.memory_budget and exact(config)):
        return f"truncated:{kept_steps(config, step)}"
    return plan.gradient


def passes(config: AlignPropConfig, plan: Plan, step: int, run: Training) -> list[range]:
    """The samples of each backward pass of one optimiser step, in one process."""
    batches = range(config.gradient_accumulation_steps)
    return [part for i in batches for part in plan.split(samples(config, step, i, run.rank, run.world))]


def backward(
    config: AlignPropConfig,
    run: Training,
    chain: Chain,
    prompts: Prompts,
    reward: Reward,
    indices: range,
    gradient: str,
) -> Tensor:
    """One backward pass: the gradient is added to the weights', the scores (B,) are returned."""
    images, texts = chain(prompts, indices, gradient)
    scores = scored(reward, images, texts, run)
    share = len(indices) / config.train_batch_size / config.gradient_accumulation_steps
    differentiate(run, share * alignprop_loss(scores, config.loss_coeff))
    return scores.detach()


def quiet(line: str) -> None:
    """Say nothing."""


def carrying(gradient: str, steps: int) -> int:
    """How many sampler steps carry gradient in a mode of the engine."""
    name, _, option = gradient.partition(":")
    return int(option.partition(":")[0]) if name == "truncated" else steps


# ------------------------------------------------------------------------------------------------ the command


def run(
    config: AlignPropConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None
) -> dict[str, Any]:
    """`difftune train alignprop`: train in `config.output_dir`; returns a summary. See `runs.run`."""
    check(config, pipe, reward)
    state = runs.starting_state(config, show)
    reward = reward_named(config.reward) if reward is None else reward
    pipe = load_model(config.model) if pipe is None else pipe
    steps = train(config, state, pipe, reward, runs.resolving(config, show))
    return runs.run(config, steps, state, pipe, lambda last: card(config, last))


def check(config: AlignPropConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting that cannot be, before anything is loaded."""
    check_shared(config, pipe)
    at_least(1, truncation_min=config.truncation_min)
    at_least(config.truncation_min, truncation_max=config.truncation_max)
    if config.gradient is not None:
        gradient_named(config.gradient, config.num_inference_steps, config.sampler)
    check_engine(config.memory_budget, xformers=False)
    differentiable(config.reward if reward is None else reward)


def resolved(config: AlignPropConfig, plan: Plan) -> str:
    """The engine's mode in words."""
    if config.gradient is not None or (config.memory_budget and exact(config)):
        return plan.gradient
    most = greatest(config)
    return f"truncated:K, K ~ U{{{min(config.truncation_min, most)}..{most}}} anew for each optimiser step"


def card(config: AlignPropConfig, metrics: Metrics) -> str:
    return model_card(config, metrics, "alignprop", "AlignProp ([2310.03739](https://arxiv.org/abs/2310.03739))")
