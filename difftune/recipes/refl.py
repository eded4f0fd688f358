"""ReFL: fine-tune a LoRA on a reward of the clean image that is predicted K steps before the end
(https://arxiv.org/abs/2304.05977).

    minimise  coefficient * mean_b relu(threshold - R(decode(x0_theta(x_{T-K}, c)), c)),      K drawn anew each time

One network call carries gradient, so that an image costs T - K calls and one graph.
"""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from difftune.configs.recipes import ReflConfig
from difftune.files.checkpoint import Say, State
from difftune.lookup import at_least
from difftune.recipes.reward_gradient import Modes, ascents, check_gradient
from difftune.training.state import Metrics, Reward, follow
from difftune.training.state import card as model_card


def refl_loss(scores: Tensor, threshold: float = 2.0, coefficient: float = 1e-3) -> Tensor:
    """L = coefficient * mean_b relu(threshold - R_b), for scores (B,): nothing is asked of an image above it."""
    return coefficient * (threshold - scores).relu().mean()


def modes(config: ReflConfig) -> Modes:
    """truncated:K:refl with K ~ Uniform{truncation_min, ..., truncation_max}, the same in every process."""
    most = min(config.truncation_max, config.num_inference_steps)
    least = min(config.truncation_min, most)

    def drawn(step: int) -> str:
        return f"truncated:{random.Random(f'{config.seed} {step} refl').randint(least, most)}:refl"

    words = f"truncated:K:refl, K ~ U{{{least}..{most}}} anew for each optimiser step"
    return Modes(drawn, f"truncated:{most}:refl", words)


def train(
    config: ReflConfig,
    state: State | None = None,
    pipe: Any = None,
    reward: Reward | None = None,
    say: Say | None = None,
) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each optimiser step; see `difftune.recipes.alignprop.train`."""
    check(config, pipe, reward)
    loss = partial(refl_loss, threshold=config.reward_threshold, coefficient=config.loss_coeff)
    yield from ascents(config, modes(config), loss, state, pipe, reward, say)


def run(config: ReflConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None) -> dict[str, Any]:
    """`difftune train refl`: train in `config.output_dir`; returns a summary. See `runs.run`."""
    check(config, pipe, reward)
    return follow(config, train, card, show, pipe, reward, gradient=True)


def check(config: ReflConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting that cannot be, before anything is loaded."""
    check_gradient(config, pipe, reward)
    at_least(1, truncation_min=config.truncation_min)
    at_least(config.truncation_min, truncation_max=config.truncation_max)


def card(config: ReflConfig, metrics: Metrics) -> str:
    return model_card(config, metrics, "refl", "ReFL ([2304.05977](https://arxiv.org/abs/2304.05977))")
