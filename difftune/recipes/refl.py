"""ReFL: fine-tune a LoRA on a reward of the clean image that is predicted K steps before the end
(https://arxiv.org/abs/2304.05977).

    minimise  coefficient * mean_b relu(threshold - R(decode(x0_theta(x_{T-K}, c)), c)),      K drawn anew each time

One network call carries gradient, so that an image costs T - K calls and one graph. It is AlignProp's `ascend` with
another mode of the engine and another loss.
"""

import random
from collections.abc import Iterator
from functools import partial

from torch import Tensor

from difftune.configs.recipes import ReflConfig
from difftune.files.checkpoint import State
from difftune.lookup import at_least
from difftune.recipes.alignprop import ascend
from difftune.recipes.reward_gradient import Modes, check_gradient
from difftune.rollouts.session import Session
from difftune.training.state import Metrics


def train_refl(session: Session[ReflConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step."""
    config = session.config
    loss = partial(refl_loss, threshold=config.reward_threshold, coefficient=config.loss_coeff)
    yield from ascend(session, early_prediction(config), loss)


def refl_loss(scores: Tensor, threshold: float = 2.0, coefficient: float = 1e-3) -> Tensor:
    """L = coefficient * mean_b relu(threshold - R_b), for scores (B,): nothing is asked of an image above it."""
    return coefficient * (threshold - scores).relu().mean()


def early_prediction(config: ReflConfig) -> Modes:
    """truncated:K:refl with K ~ Uniform{truncation_min, ..., truncation_max}, the same in every process."""
    most = min(config.truncation_max, config.num_inference_steps)
    least = min(config.truncation_min, most)

    def drawn(step: int) -> str:
        return f"truncated:{random.Random(f'{config.seed} {step} refl').randint(least, most)}:refl"

    words = f"truncated:K:refl, K ~ U{{{least}..{most}}} anew for each optimiser step"
    return Modes(drawn, f"truncated:{most}:refl", words)


def check_refl(config: ReflConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    check_gradient(config)
    at_least(config.truncation_min, truncation_max=config.truncation_max)
