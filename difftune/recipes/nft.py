"""NFT: fine-tune a LoRA on any reward by the forward process: clean images, noised (DiffusionNFT,
https://arxiv.org/abs/2509.16117), with the losses of AWM and DGPO as settings.

A round samples G images of each prompt by any sampler, with an *old* average of the weights. Only the clean latents are
kept. Noised to a level t, an image of quality r in [0, 1] pulls one of two mirror images of the model to itself:

    x0+ = x0_old + beta (x0_theta - x0_old),    x0- = x0_old - beta (x0_theta - x0_old),
    loss = a / beta [ r |x0+ - x0|^2 / w+  +  (1 - r) |x0- - x0|^2 / w- ],      r = 1/2 + A / (2 a),

with the advantage A of the image in its group, kept within +-a, and w the mean distance, which makes all levels alike.
No sampler is differentiated, no step has a probability, and there is no guidance. After a round the old weights follow:
old <- d old + (1 - d) theta.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from difftune.configs.recipes import NFTConfig
from difftune.errors import UserError
from difftune.files.checkpoint import State
from difftune.recipes.ddpo import ddpo_loss
from difftune.rollouts.denoising import Draws, Said, draw_levels, said_at, served
from difftune.rollouts.groups import judge_groups, part_rewards
from difftune.rollouts.image_sampler import ImageSampler
from difftune.rollouts.policy import per_element
from difftune.rollouts.rounds import Rounds, ScoredImages, lend_weights, make_images, repeated
from difftune.rollouts.session import Session
from difftune.training.checks import check_groups, check_no_dropout, check_whole_groups
from difftune.training.network import evaluated
from difftune.training.state import Kept, Metrics, Training, copy_tensors, take_snapshot
from difftune.training.steps import attempt_step, take_step


def train_nft(session: Session[NFTConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step.

    The rewards in the metrics are of the images of the step's round, which were sampled with the old weights.
    """
    config, run = session.config, session.run
    rounds = Rounds(
        run, config.updates_per_round, partial(sample_round, session), sampled_by=partial(old_weights, config, run)
    )
    for step in session.steps:
        with attempt_step(run, step) as metrics:
            metrics.update(contrast(session, rounds.at(step), rounds.began.tensors, step))
        yield metrics, take_snapshot(run, step + 1, metrics, rounds.kept())


def contrast(session: Session[NFTConfig], judged: "JudgedImages", old: Mapping[str, Tensor], step: int) -> Metrics:
    """One optimiser step on its share of the round: a backward pass for each level of each batch, and the update."""
    config, run, images = session.config, session.run, session.images

    def loss_of(turn: tuple[ImageBatch, int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        batch, i = turn
        draws = batch_draws(session, step, batch.numbers, i)
        with torch.no_grad(), evaluated(run.network.prepared), lend_weights(run.weights, old):
            before = say(images, batch, draws)
        with torch.no_grad():
            base = say(images.with_network(run.reference), batch, draws) if wants_base(config) else None
        now = say(images, batch, draws)
        loss = LOSSES[config.loss](config, Spoken(now, before, base), batch.images.latents, batch.advantages)
        found = {"old_gap": per_element((now.out - before.out) ** 2).mean()}
        if config.kl_weight and base is not None:
            apart = per_element((now.out - base.out) ** 2).mean()
            loss, found = loss + config.kl_weight * apart, {**found, "kl": apart}
        return loss, found

    count, share = config.gradient_accumulation_steps, step % config.updates_per_round
    batches = judged.batches[share * count : (share + 1) * count]
    turns = [(batch, i) for batch in batches for i in range(config.levels_per_image)]
    return {**judged.metrics, **take_step(run, turns, loss_of)}


# ------------------------------------------------------------------------------------------------ losses


class Spoken(NamedTuple):
    """What the trained, the old and the base network say of the same noised images."""

    now: Said
    old: Said
    base: Said | None


def nft_loss(now: Tensor, old: Tensor, clean: Tensor, quality: Tensor, beta: float, adaptive: bool = True) -> Tensor:
    """The mean over images of [ r mean (x0+ - x0)^2 / w+ + (1 - r) mean (x0- - x0)^2 / w- ] / beta.

    now, old, clean (B, ...): the clean image that the trained and the old network predict, and the true one. quality r
    (B,). x0+- = old +- beta (now - old); w+- = mean |x0+- - x0| of each image, without a gradient; 1 unless `adaptive`.
    The minimum of the plain loss is old + (2 / beta) Cov(r, x0 | x_t), whatever is added to r.
    """
    sides = []
    for sign in (1, -1):
        gap = old + sign * beta * (now - old) - clean
        width = gap.detach().double().abs().flatten(1).mean(1).clamp(min=1e-5).to(gap) if adaptive else 1.0
        sides.append(per_element(gap**2) / width)
    return (quality * sides[0] + (1 - quality) * sides[1]).mean() / beta


def quality_of(advantages: Tensor, limit: float) -> Tensor:
    """r = A / (2 limit) + 1/2, kept within [0, 1]."""
    return (advantages / (2 * limit) + 0.5).clamp(0, 1)


def dgpo_loss(errors: Tensor, base: Tensor, old: Tensor, advantages: Tensor, settings: "DGPOSettings") -> Tensor:
    """The mean of s_g A_i m_i over images i of groups g, with the weight s_g = sigmoid(sum_i A_i beta (m_i - m_i^base)
    / G), without a gradient (DGPO, https://arxiv.org/abs/2510.08425).

    errors m, base, old (B,): denoising errors of the trained, base and old network. An image
    has no gradient once its ratio exp(m^old - m) has passed 1 +- clip_range in the direction of its advantage.
    """
    weight = (settings.beta * advantages * (errors.detach() - base)).view(-1, settings.group).mean(1).sigmoid()
    ratio = (old - errors.detach()).exp()
    left = ((advantages > 0) & (ratio > 1 + settings.clip_range)) | (
        (advantages < 0) & (ratio < 1 - settings.clip_range)
    )
    return (weight.repeat_interleave(settings.group) * advantages * errors * ~left).mean()


class DGPOSettings(NamedTuple):
    """Images of a prompt, weight of the group's margin, and the trust region."""

    group: int
    beta: float
    clip_range: float


def nft(config: NFTConfig, said: Spoken, clean: Tensor, advantages: Tensor) -> Tensor:
    """`nft_loss` times the greatest advantage, so that the gradient's scale is that of A."""
    limit, beta = config.adv_clip_max, BETAS["nft"] if config.beta is None else config.beta
    quality = quality_of(advantages, limit)
    return limit * nft_loss(said.now.x0, said.old.x0, clean, quality, beta, config.adaptive_weight)


def awm(config: NFTConfig, said: Spoken, clean: Tensor, advantages: Tensor) -> Tensor:
    """Advantage weighted matching (https://arxiv.org/abs/2509.25050): PPO's loss with rho = exp(m_old - m) of the
    denoising errors m."""
    return ddpo_loss(advantages, said.old.error - said.now.error, clip_of(config))


def dgpo(config: NFTConfig, said: Spoken, clean: Tensor, advantages: Tensor) -> Tensor:
    """`dgpo_loss` of the groups of a batch, which share level and noise."""
    assert said.base is not None
    beta = BETAS["dgpo"] if config.beta is None else config.beta
    settings = DGPOSettings(config.num_images_per_prompt, beta, clip_of(config))
    return dgpo_loss(said.now.error, said.base.error, said.old.error, advantages, settings)


LOSSES = {"nft": nft, "awm": awm, "dgpo": dgpo}
BETAS = {"nft": 1.0, "dgpo": 100.0}
CLIPS = {"awm": 1.0, "dgpo": 0.05}


def clip_of(config: NFTConfig) -> float:
    return CLIPS[config.loss] if config.clip_range is None else config.clip_range


def wants_base(config: NFTConfig) -> bool:
    """Whether the model before training is called."""
    return config.kl_weight > 0 or config.loss == "dgpo"


# ------------------------------------------------------------------------------------------------ rounds


class ImageBatch(NamedTuple):
    """A batch of clean images with their advantages."""

    numbers: range
    images: ScoredImages
    advantages: Tensor  # (B,)


class JudgedImages(NamedTuple):
    """A round: one process's batches, and what is reported of all processes'."""

    batches: Sequence[ImageBatch]
    metrics: Metrics


def sample_round(session: Session[NFTConfig], steps: range) -> JudgedImages:
    """The images of a round's optimiser steps, and their advantages in their groups, over all processes."""
    prompts = repeated(session.prompts, session.config.num_images_per_prompt)
    numbers = [part for step in steps for part in session.run.numbers(step)]
    judged, parted = part_rewards(session)
    made = [make_images(judged, prompts, part) for part in numbers]
    found, metrics = judge_groups(session, numbers, [images.scores for images in made], parted)
    return JudgedImages([ImageBatch(*batch) for batch in zip(numbers, made, found, strict=True)], metrics)


def old_weights(config: NFTConfig, run: Training, earlier: Kept, step: int) -> Mapping[str, Tensor]:
    """The weights that sample the round which begins with an optimiser step: d old + (1 - d) theta; theta at first."""
    if not earlier.tensors:
        return copy_tensors(run.weights)
    decay = old_decay(config.old_schedule, step)
    return {name: weight.detach().lerp(earlier.tensors[name].to(weight), decay) for name, weight in run.weights.items()}


def old_decay(schedule: str, step: int) -> float:
    """d after so many optimiser steps: min(0.001 n, 0.5); or, "late", 0 until n = 75, then min(0.0075 (n - 75), 0.999).

    The published schedules. Where d is 0, the method is on-policy.
    """
    return min(0.001 * step, 0.5) if schedule == "linear" else min(0.0075 * max(step - 75, 0), 0.999)


def batch_draws(session: Session[NFTConfig], step: int, numbers: range, i: int) -> Draws:
    """The i-th level and noise of each image of an optimiser step: the sampler's own levels, in an order that is drawn
    for each image, or for DGPO for each group, which shares the noise too."""
    config, levels = session.config, served(session.images.model, session.images.levels[:-1])
    group = config.num_images_per_prompt if config.loss == "dgpo" else 1
    seeds = [f"{config.seed} nft {step} {number // group}" for number in numbers]
    count = min(config.levels_per_image, len(levels))
    rows = [random.Random(seed).sample(range(len(levels)), count)[i % count] for seed in seeds]
    return draw_levels(session.images.model, [f"{seed} {i}" for seed in seeds], levels, rows)


def say(images: ImageSampler, batch: ImageBatch, draws: Draws) -> Said:
    """What the sampler's network says of a batch that is noised."""
    return said_at(images.denoiser, batch.images.latents, draws, batch.images.cond)


# ------------------------------------------------------------------------------------------------ settings


def check_nft(config: NFTConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    check_whole_groups(config)
    check_heard(config)
    if config.loss != "nft":
        check_no_dropout(config)
    if config.loss == "dgpo":
        check_groups(config)
    if config.levels_per_image > config.num_inference_steps:
        raise UserError(
            f"levels_per_image is {config.levels_per_image}: the sampler has {config.num_inference_steps} levels, give "
            "at most that"
        )
    if config.adv_clip_max == 0:
        raise UserError("adv_clip_max is 0: no image would be better than another, give it above 0")


LOSSES_OF = {"beta": ("nft", "dgpo"), "clip_range": ("awm", "dgpo"), "adaptive_weight": ("nft",)}  # of a setting


def check_heard(config: NFTConfig) -> None:
    """UserError for a setting that the loss does not have."""
    for name, losses in LOSSES_OF.items():
        given = getattr(config, name)
        if config.loss not in losses and given != getattr(NFTConfig, name):
            raise UserError(
                f"{name} is {given}, and loss {config.loss!r} has none, but {' and '.join(losses)}: leave it out"
            )
