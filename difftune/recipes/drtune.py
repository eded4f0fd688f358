"""DRTune: fine-tune a LoRA on a reward through steps all along the sampler, without the product of their Jacobians
(https://arxiv.org/abs/2405.00760).

    minimise  -mean_b R_b,      where the network's input is cut off at every step, and its output at all but K

What a trained step adds to the latent goes on to the end along the linear path around the network; so early steps are
trained as well as late ones, at the memory of one call.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from difftune.configs.recipes import DrtuneConfig
from difftune.files.checkpoint import Say, State
from difftune.lookup import at_least
from difftune.pipelines.engine import gradient_named
from difftune.recipes.alignprop import alignprop_loss
from difftune.recipes.reward_gradient import Modes, ascents, check_gradient
from difftune.training.state import Metrics, Reward, follow
from difftune.training.state import card as model_card


def gradient_of(config: DrtuneConfig) -> str:
    """The engine's mode; K is at most the number of steps."""
    return f"truncated:{min(config.truncation_steps, config.num_inference_steps)}:drtune"


def train(
    config: DrtuneConfig,
    state: State | None = None,
    pipe: Any = None,
    reward: Reward | None = None,
    say: Say | None = None,
) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each optimiser step; see `difftune.recipes.alignprop.train`."""
    check(config, pipe, reward)
    loss = partial(alignprop_loss, coefficient=config.loss_coeff)
    yield from ascents(config, Modes(None, gradient_of(config)), loss, state, pipe, reward, say)


def run(
    config: DrtuneConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None
) -> dict[str, Any]:
    """`difftune train drtune`: train in `config.output_dir`; returns a summary. See `runs.run`."""
    check(config, pipe, reward)
    return follow(config, train, card, show, pipe, reward, gradient=True)


def check(config: DrtuneConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting that cannot be, before anything is loaded."""
    check_gradient(config, pipe, reward)
    at_least(1, truncation_steps=config.truncation_steps)
    gradient_named(gradient_of(config), config.num_inference_steps, config.sampler)


def card(config: DrtuneConfig, metrics: Metrics) -> str:
    return model_card(config, metrics, "drtune", "DRTune ([2405.00760](https://arxiv.org/abs/2405.00760))")
