"""AlignProp: fine-tune a LoRA on a differentiable reward, through the sampler (https://arxiv.org/abs/2310.03739).

    maximise  J(theta) = loss_coeff E_{c, x_T} [ R(decode(x_0(theta, x_T, c)), c) ] - kl_coeff KL(theta)

The gradient goes through the reward, the VAE's decoder and the last K steps of the sampler. K is drawn anew for each
optimiser step, unless `gradient` names the engine's mode, or every step is to carry gradient within a memory budget:
then a plan chooses the mode. DRaFT, ReFL and DRTune are `ascend` with other steps that carry gradient, or another loss.

    sampling     rollouts/image_sampler.py (`ImageSampler.draw`)
    truncation   `truncation` below; its mode runs in solvers/rollout/truncated.py
    KL           recipes/reward_gradient.py (`divergence`)
    update       training/steps.py (`take_step`)
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import floor

from torch import Tensor

from difftune.configs.recipes import AlignPropConfig, RewardGradientConfig
from difftune.files.checkpoint import State
from difftune.lookup import at_least
from difftune.pipelines.engine import check_offloading, gradient_named, one_at_a_time
from difftune.recipes.reward_gradient import (
    Modes,
    check_gradient,
    count_carrying,
    divergence,
    judge_evenly,
    plan_engine,
    warn_of_noise,
)
from difftune.recipes.surrogates import check_surrogate, drawn_surrogates, is_surrogate
from difftune.rollouts.session import Session
from difftune.training.state import Metrics, take_snapshot
from difftune.training.steps import attempt_step, gather_statistics, score_images, take_step
from solvers.memory.budget import Plan

Loss = Callable[[Tensor], Tensor]  # scores (B,) -> the loss, ()


def train_alignprop(session: Session[AlignPropConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step."""
    config, levels = session.config, session.images.levels
    modes = drawn_surrogates(config, levels) if is_surrogate(config.gradient) else truncation(config)
    yield from ascend(session, modes, partial(alignprop_loss, coefficient=config.loss_coeff))


def alignprop_loss(scores: Tensor, coefficient: float = 1.0) -> Tensor:
    """L = -coefficient * mean_b R_b, for scores (B,)."""
    return -coefficient * scores.mean()


def ascend(session: Session[RewardGradientConfig], modes: Modes, loss: Loss) -> Iterator[tuple[Metrics, State]]:
    """Up the reward's gradient: metrics and state after each remaining optimiser step."""
    with plan_engine(session, modes) as plan:
        for step in session.steps:
            gradient = plan.gradient if modes.of is None else modes.of(step)
            with attempt_step(session.run, step) as metrics:
                metrics.update(ascend_once(session, plan, gradient, loss, step))
                warn_of_noise(session)
            yield metrics, take_snapshot(session.run, step + 1, metrics)


def ascend_once(session: Session[RewardGradientConfig], plan: Plan, gradient: str, loss: Loss, step: int) -> Metrics:
    """One optimiser step: images, their rewards, the loss, its gradient through the sampler, and the update."""
    config, run = session.config, session.run
    model = replace(session.images.model, decode_batch=plan.decode_batch)
    images = replace(session.images, model=model, offload=config.offload)
    reward = one_at_a_time(session.reward, plan)
    scores: list[Tensor] = []

    def loss_of(numbers: range) -> tuple[Tensor, Mapping[str, Tensor]]:
        drawn = images.draw(session.prompts, numbers, gradient)

        def judge(x: Tensor) -> Tensor:
            ended = drawn._replace(path=replace(drawn.path, x=x))
            return score_images(reward, images.decode(ended), drawn.prompts, run)

        x = drawn.path.x
        rewards = judge_evenly(judge, x) if config.normalize_reward_gradients else judge(x)
        scores.append(rewards.detach())
        value = loss(rewards)
        if not config.kl_coeff:
            return value, {}
        kl = divergence(images, run.reference, drawn, numbers)
        return value + config.kl_coeff * kl, {"loss": value, "kl": kl}

    parts = [part for numbers in run.numbers(step) for part in plan.split(numbers)]
    sizes = [len(part) for part in parts]
    found = take_step(run, parts, loss_of, sizes, config.normalize_gradient)  # backward for each, then one update
    carrying = count_carrying(gradient, len(images.levels) - 1)
    return {**gather_statistics(run, scores), **found, "K": carrying}


# ------------------------------------------------------------------------------------------------ which steps


def truncation(config: AlignPropConfig) -> Modes:
    """The mode that is given, or the truncation that is drawn; if every step carries gradient, a plan's choice."""
    count, most = config.num_inference_steps, greatest_truncation(config)
    least = min(config.truncation_min, most)
    if config.gradient is not None:
        return Modes(None, config.gradient)
    if config.truncation == "bernoulli_linear":
        words = f"truncated:MASK, step i of {count} with probability (i + 1) / {count + 1}"
        return Modes(lambda step: f"truncated:{draw_mask(config, step)}:mask", f"truncated:{count}", words)
    if config.truncation == "gaussian":
        words = f"truncated:K, K = {count} - N({0.84 * count:g}, {0.1 * count:g}) anew for each optimiser step"
        return Modes(lambda step: f"truncated:{draw_gaussian(config, step)}", f"truncated:{max(count - 1, 1)}", words)
    if least == count and config.memory_budget:
        return Modes(None, None)
    words = f"truncated:K, K ~ U{{{least}..{most}}} anew for each optimiser step"
    return Modes(lambda step: f"truncated:{draw_steps(config, step)}", f"truncated:{most}", words)


def draw_steps(config: AlignPropConfig, step: int) -> int:
    """K ~ Uniform{truncation_min, ..., truncation_max}, one draw per optimiser step, the same in every process.

    The suffix rule, which is the paper's: the last K steps carry gradient, as they do under the Gaussian one.
    """
    most = greatest_truncation(config)
    return random.Random(f"{config.seed} {step}").randint(min(config.truncation_min, most), most)


def draw_gaussian(config: AlignPropConfig, step: int) -> int:
    """K = T - t with t = floor(N(.84 T, .1 T)), drawn again until 1 <= t <= T - 1: N(42, 5) of 50 steps.

    The rule of the authors' repository as it is now, which draws one threshold for a batch; here one for each optimiser
    step, the same in every process. K is 9.1 of 50 in the mean; a sampler of one step has K = 1.
    """
    draw, count = random.Random(f"{config.seed} {step} gaussian"), config.num_inference_steps
    threshold = 0
    while count > 1 and not 1 <= threshold <= count - 1:
        threshold = floor(draw.gauss(0.84 * count, 0.1 * count))
    return count - threshold


def draw_mask(config: AlignPropConfig, step: int) -> str:
    """One digit per sampler step, 1 if it carries gradient: step i of T does with probability (i + 1) / (T + 1).

    The Bernoulli-linear rule, of the authors' first code and of TRL: a new threshold is drawn at every sampler step.
    What a dropped step adds to the latent is constant; the latent's way around it is not cut. One draw per optimiser
    step, the same in every process; if no step is kept, the last one is.
    """
    draw, count = random.Random(f"{config.seed} {step} bernoulli"), config.num_inference_steps
    kept = [draw.random() < (i + 1) / (count + 1) for i in range(count)]
    kept[-1] = kept[-1] or not any(kept)
    return "".join("01"[keep] for keep in kept)


def greatest_truncation(config: AlignPropConfig) -> int:
    """The greatest K that is drawn."""
    return min(config.truncation_max, config.num_inference_steps)


# ------------------------------------------------------------------------------------------------ settings


def check_alignprop(config: AlignPropConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    check_gradient(config)
    at_least(config.truncation_min, truncation_max=config.truncation_max)
    if is_surrogate(config.gradient):
        check_surrogate(config)
    elif config.gradient is not None:
        gradient_named(config.gradient, config.num_inference_steps, config.sampler)
        check_offloading(config.offload, config.gradient)
