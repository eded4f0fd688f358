"""DRaFT: fine-tune a LoRA on a differentiable reward, through the sampler's last K steps
(https://arxiv.org/abs/2309.17400).

    minimise  -mean_b R_b,      with gradient through the last K steps alone;  K = 1 is enough for many rewards

DRaFT-LV keeps the last step alone and noises its result again n times, for n gradients of the same image whose mean has
a lower variance. It is AlignProp's `ascend` with a K that does not change.
"""

from collections.abc import Iterator
from functools import partial

from difftune.configs.recipes import DraftConfig
from difftune.files.checkpoint import State
from difftune.pipelines.engine import gradient_named
from difftune.recipes.alignprop import alignprop_loss, ascend
from difftune.recipes.reward_gradient import Modes, check_gradient
from difftune.rollouts.session import Session
from difftune.training.state import Metrics


def train_draft(session: Session[DraftConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step."""
    loss = partial(alignprop_loss, coefficient=session.config.loss_coeff)
    yield from ascend(session, Modes(None, last_steps(session.config)), loss)


def last_steps(config: DraftConfig) -> str:
    """The engine's mode: the last K steps, or the copies of the last one."""
    copies = config.low_variance_copies
    return f"truncated:{copies}:draft_lv" if copies else f"truncated:{config.truncation_steps}"


def check_draft(config: DraftConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    check_gradient(config)
    if not config.low_variance_copies:
        gradient_named(last_steps(config), config.num_inference_steps, config.sampler)
