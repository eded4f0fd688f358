"""DRTune: fine-tune a LoRA on a reward through steps all along the sampler, without the product of their Jacobians
(https://arxiv.org/abs/2405.00760).

    minimise  -mean_b R_b,      where the network's input is detached at every step, its output at all but K steps

Gradient reaches a trained step only through the sampler's linear updates, never through later network calls; so early
steps are trained as well as late ones, with the memory of one network call. The K steps are evenly spaced, from an
offset that is drawn anew for each optimiser step. It is AlignProp's `ascend` with another mode of the engine.
"""

import random
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
    """Metrics and state after each remaining optimiser step."""
    loss = partial(alignprop_loss, coefficient=session.config.loss_coeff)
    yield from ascend(session, spread_steps(session.config), loss)


def spread_steps(config: DrtuneConfig) -> Modes:
    """The engine's modes: of T steps, floor((k + u) T / K) for k = 0 ... K - 1, with u ~ U[0, 1) drawn anew for each
    optimiser step, the same in every process; K is at most T."""
    count = config.num_inference_steps
    kept = min(config.truncation_steps, count)

    def drawn(step: int) -> str:
        offset = random.Random(f"{config.seed} {step} drtune").random()
        trained = {int((k + offset) * count / kept) for k in range(kept)}
        return f"truncated:{''.join('01'[i in trained] for i in range(count))}:held"

    words = f"truncated:MASK:held, {kept} evenly spaced steps of {count} from an offset drawn for each optimiser step"
    return Modes(drawn, drawn(0), words)


def check_drtune(config: DrtuneConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    check_gradient(config)
    gradient_named(spread_steps(config).greatest or "", config.num_inference_steps, config.sampler)
