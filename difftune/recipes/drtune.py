"""DRTune: fine-tune a LoRA on a reward through steps all along the sampler, without the product of their Jacobians
(https://arxiv.org/abs/2405.00760).

    minimise  -mean_b R_b,      where the network's input is cut off at every step, and its output at all but K

What a trained step adds to the latent goes on to the end along the linear path around the network; so early steps are
trained as well as late ones, at the memory of one call. It is AlignProp's `ascend` with another mode of the engine.
"""

from collections.abc import Iterator
from functools import partial

from difftune.configs.recipes import DrtuneConfig
from difftune.files.checkpoint import State
from difftune.pipelines.engine import gradient_named
from difftune.recipes.alignprop import alignprop_loss, ascend
from difftune.recipes.reward_gradient import Modes, check_gradient
from difftune.rollouts.session import Session
from difftune.training.state import Metrics


def train_drtune(session: Session[DrtuneConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each optimiser step that is left."""
    loss = partial(alignprop_loss, coefficient=session.config.loss_coeff)
    yield from ascend(session, Modes(None, spread_steps(session.config)), loss)


def spread_steps(config: DrtuneConfig) -> str:
    """The engine's mode; K is at most the number of steps."""
    return f"truncated:{min(config.truncation_steps, config.num_inference_steps)}:drtune"


def check_drtune(config: DrtuneConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    check_gradient(config)
    gradient_named(spread_steps(config), config.num_inference_steps, config.sampler)
