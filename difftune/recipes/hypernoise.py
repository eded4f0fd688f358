"""Noise hypernetworks: a LoRA that moves the initial noise of a few-step model in one pass (HyperNoise,
https://arxiv.org/abs/2508.09968), so that ReNO's gain costs no optimisation at use.

The network with its LoRA is called once, on the noise z at the first level; its output minus the base's is added to z.
The generator g is the base model itself, frozen, and its images are judged:

    f(z, c) = network_LoRA(z, c) - network_base(z, c),    z' = z + f,
    loss    = -mean R(g(z', c), c) + weight mean f^2.

|f|^2 / 2 equals the KL divergence of z' from unit noise up to a Jacobian term that vanishes for constant f. The optimum
is the noise density times exp(reward); if generator and reward are linear, a constant f reaches it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from difftune.configs.recipes import HypernoiseConfig
from difftune.errors import UserError
from difftune.files.checkpoint import State
from difftune.pipelines.engine import as_decoded
from difftune.pipelines.noise_lora import noise_shift
from difftune.rollouts.session import Session
from difftune.training.state import Metrics, take_snapshot
from difftune.training.steps import attempt_step, gather_statistics, score_images, take_step
from solvers.rollout.modes import rollout


def train_hypernoise(session: Session[HypernoiseConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step."""
    for step in session.steps:
        with attempt_step(session.run, step) as metrics:
            metrics.update(move_noise(session, step))
        yield metrics, take_snapshot(session.run, step + 1, metrics)


def hypernoise_loss(scores: Tensor, shift: Tensor, weight: float = 0.5) -> Tensor:
    """-mean R + weight mean f^2, for scores (B,) and shifts f (B, ...) of the noise.

    The theory's weight is N / 2 for f's N elements, so at 0.5 the reward weighs N times more than in the theory.
    """
    return -scores.mean() + weight * shift.square().mean()


def move_noise(session: Session[HypernoiseConfig], step: int) -> Metrics:
    """One optimiser step: noises moved, images of the frozen generator, their rewards, and the update."""
    config, run, images = session.config, session.run, session.images
    base = replace(images.denoiser, network=run.reference)
    generator, scale = images.with_network(run.frozen), images.model.start_scale(images.levels)
    reward = as_decoded(session.reward, config.train_batch_size, config.decode_batch)
    found: list[Tensor] = []

    def loss_of(numbers: range) -> tuple[Tensor, Mapping[str, Tensor]]:
        start = images.begin(session.prompts, numbers)
        conds = start.predict.conds
        shift = noise_shift(images.denoiser, base, start.x, images.levels[0], conds["cond"])
        x = start.x + scale * shift
        path = rollout(images.step, generator.predict(conds), x, images.levels, "checkpoint", start.noise)
        scores = score_images(reward, images.model.decode(path.x, checkpointed=True), start.prompts, run)
        found.append(scores.detach())
        divergence = shift.detach().square().flatten(1).sum(1).mean() / 2
        return hypernoise_loss(scores, shift, config.regularization_weight), {"kl": divergence}

    metrics = take_step(run, run.numbers(step), loss_of)
    return {**gather_statistics(run, found), **metrics}


# ------------------------------------------------------------------------------------------------ settings


def check_hypernoise(config: HypernoiseConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    if config.full_finetuning:
        raise UserError("hypernoise moves the noise by a LoRA beside the model: leave full_finetuning out")
    if config.reference == "start":
        raise UserError(
            "reference is 'start', but the noise is moved by all that the LoRA adds to the model, as difftune sample "
            "--noise_lora does too: leave reference out"
        )
    if config.validation_steps is not None:
        raise UserError(
            "a validation draws with the LoRA in the model, and this one is beside it: leave validation_steps out, and "
            "draw with difftune sample --noise_lora"
        )
