"""DRaFT: fine-tune a LoRA on a differentiable reward, through the sampler's last K steps
(https://arxiv.org/abs/2309.17400).

    minimise  -mean_b R_b,      with gradient through the last K steps alone;  K = 1 is enough for many rewards

DRaFT-LV keeps the last step alone and noises its result again n times, for n gradients of the same image whose mean has
a lower variance.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from difftune.configs.recipes import DraftConfig
from difftune.files.checkpoint import Say, State
from difftune.lookup import at_least
from difftune.pipelines.engine import gradient_named
from difftune.recipes.alignprop import alignprop_loss
from difftune.recipes.reward_gradient import Modes, ascents, check_gradient
from difftune.training.state import Metrics, Reward, follow
from difftune.training.state import card as model_card


def gradient_of(config: DraftConfig) -> str:
    """The engine's mode: the last K steps, or the copies of the last one."""
    copies = config.low_variance_copies
    return f"truncated:{copies}:draft_lv" if copies else f"truncated:{config.truncation_steps}"


def train(
    config: DraftConfig,
    state: State | None = None,
    pipe: Any = None,
    reward: Reward | None = None,
    say: Say | None = None,
) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each optimiser step; see `difftune.recipes.alignprop.train`."""
    check(config, pipe, reward)
    loss = partial(alignprop_loss, coefficient=config.loss_coeff)
    yield from ascents(config, Modes(None, gradient_of(config)), loss, state, pipe, reward, say)


def run(config: DraftConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None) -> dict[str, Any]:
    """`difftune train draft`: train in `config.output_dir`; returns a summary. See `runs.run`."""
    check(config, pipe, reward)
    return follow(config, train, card, show, pipe, reward, gradient=True)


def check(config: DraftConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting that cannot be, before anything is loaded."""
    check_gradient(config, pipe, reward)
    at_least(1, truncation_steps=config.truncation_steps)
    at_least(0, low_variance_copies=config.low_variance_copies)
    if not config.low_variance_copies:
        gradient_named(gradient_of(config), config.num_inference_steps, config.sampler)


def card(config: DraftConfig, metrics: Metrics) -> str:
    return model_card(config, metrics, "draft", "DRaFT ([2309.17400](https://arxiv.org/abs/2309.17400))")
