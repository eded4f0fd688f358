"""AlignProp: fine-tune a LoRA on a differentiable reward, through the sampler (https://arxiv.org/abs/2310.03739).

    maximise  J(theta) = E_{c, x_T} [ R(decode(x_0(theta, x_T, c)), c) ]

The gradient goes through the reward, the VAE's decoder and the last K steps of the sampler; K is drawn anew for each
optimiser step. `train` is the algorithm, `run` what the command line does with it.
"""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from difftune.configs.recipes import AlignPropConfig
from difftune.files.checkpoint import Say, State
from difftune.lookup import at_least, known
from difftune.pipelines.engine import check_offloading, gradient_named
from difftune.recipes.reward_gradient import Modes, ascents, check_gradient
from difftune.training.state import Metrics, Reward, follow
from difftune.training.state import card as model_card

TRUNCATIONS = ("suffix", "bernoulli_linear")


def alignprop_loss(scores: Tensor, coefficient: float = 1.0) -> Tensor:
    """L = -coefficient * mean_b R_b, for scores (B,)."""
    return -coefficient * scores.mean()


def kept_steps(config: AlignPropConfig, step: int) -> int:
    """K ~ Uniform{truncation_min, ..., truncation_max}, one draw per optimiser step, the same in every process.

    The suffix rule, which is the paper's: the last K steps carry gradient.
    """
    most = greatest(config)
    return random.Random(f"{config.seed} {step}").randint(min(config.truncation_min, most), most)


def kept_mask(config: AlignPropConfig, step: int) -> str:
    """One digit per sampler step, 1 where it carries gradient: step i of T does with probability (i + 1) / (T + 1).

    The Bernoulli-linear rule, which is the released code's: a new threshold is drawn at every sampler step. What a
    dropped step adds to the latent is constant; the latent's way around it is not cut. One draw per optimiser step,
    the same in every process; where no step is kept, the last one is.
    """
    draw, count = random.Random(f"{config.seed} {step} bernoulli"), config.num_inference_steps
    kept = [draw.random() < (i + 1) / (count + 1) for i in range(count)]
    kept[-1] = kept[-1] or not any(kept)
    return "".join("01"[keep] for keep in kept)


def modes(config: AlignPropConfig) -> Modes:
    """The mode that is given, or the truncation that is drawn; where every step carries gradient, a plan's choice."""
    count, most = config.num_inference_steps, greatest(config)
    least = min(config.truncation_min, most)
    if config.gradient is not None:
        return Modes(None, config.gradient)
    if config.truncation == "bernoulli_linear":
        words = f"truncated:MASK, step i of {count} with probability (i + 1) / {count + 1}"
        return Modes(lambda step: f"truncated:{kept_mask(config, step)}:mask", f"truncated:{count}", words)
    if least == count and config.memory_budget:
        return Modes(None, None)
    words = f"truncated:K, K ~ U{{{least}..{most}}} anew for each optimiser step"
    return Modes(lambda step: f"truncated:{kept_steps(config, step)}", f"truncated:{most}", words)


def greatest(config: AlignPropConfig) -> int:
    """The greatest K that is drawn."""
    return min(config.truncation_max, config.num_inference_steps)


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
    Raises UserError for settings that cannot be, RunError where rewards or gradients were not finite in more steps than
    `config.max_skipped_steps`: the weights are then those of the state yielded last.
    """
    check(config, pipe, reward)
    loss = partial(alignprop_loss, coefficient=config.loss_coeff)
    yield from ascents(config, modes(config), loss, state, pipe, reward, say)


def run(
    config: AlignPropConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None
) -> dict[str, Any]:
    """`difftune train alignprop`: train in `config.output_dir`; returns a summary. See `runs.run`."""
    check(config, pipe, reward)
    return follow(config, train, card, show, pipe, reward, gradient=True)


def check(config: AlignPropConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting that cannot be, before anything is loaded."""
    check_gradient(config, pipe, reward)
    known("truncation", config.truncation, TRUNCATIONS)
    at_least(1, truncation_min=config.truncation_min)
    at_least(config.truncation_min, truncation_max=config.truncation_max)
    if config.gradient is not None:
        gradient_named(config.gradient, config.num_inference_steps, config.sampler)
        check_offloading(config.offload, config.gradient)


def card(config: AlignPropConfig, metrics: Metrics) -> str:
    return model_card(config, metrics, "alignprop", "AlignProp ([2310.03739](https://arxiv.org/abs/2310.03739))")
