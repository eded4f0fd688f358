"""DRAGON: fine-tune a LoRA on sets of better and of worse images (https://arxiv.org/abs/2504.15217).

Each round, the model makes two images of every prompt. One of each pair goes into the positive set D+, the other into
the negative set D-, so that the reward R(D+) is high: R may be the mean of a reward of single images, or of an image's
likeness to exemplars, or look at the set as a whole (Fréchet distance and MMD to exemplars, Vendi diversity). A sweep
over the pairs swaps one wherever R(D+) rises, by statistics that change by one item; for a mean reward that is the
better of every pair. The model is then updated to prefer D+ to D- by Diffusion-DPO, on pairs, or by Diffusion-KTO, on
single images:

    D+ = argmax of R over one item of every pair (greedy),
    loss = dpo_loss(D+, D-)  or  kto_loss(D+ good, D- bad).

At the end, images of new prompts before and after training are compared: the win rate, with its exact interval.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from difftune.configs.recipes import DragonConfig
from difftune.errors import UserError
from difftune.evaluation.win_rate import win_rate
from difftune.files import output
from difftune.files.checkpoint import State, seeded_generators
from difftune.files.prompts import Prompts, listed
from difftune.pipelines import lora
from difftune.recipes.dpo import dpo_loss, dpo_margin
from difftune.recipes.kto import kto_baseline, kto_loss
from difftune.recipes.set_objectives import OBJECTIVES, SetObjective, check_objective
from difftune.rollouts.image_sampler import ImageSampler
from difftune.rollouts.pairs import PairErrors, Pairs, Turn, accuracy_of, pair_errors, step_draws
from difftune.rollouts.rounds import Rounds, repeated
from difftune.rollouts.session import Session
from difftune.training.network import TrainedNetwork
from difftune.training.numbering import seed_of
from difftune.training.state import Metrics, Training, take_snapshot
from difftune.training.steps import attempt_step, take_step
from rewards.checks import finite
from rewards.errors import NotFinite
from rewards.registry import Reward
from rewards.sets.catalogue import greedy_swap
from solvers.denoiser import Cond


def train_dragon(session: Session[DragonConfig]) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each remaining optimiser step.

    The rewards in the metrics are those of the step's round, which the weights at its beginning have made.
    """
    config, run = session.config, session.run
    objective = OBJECTIVES[config.objective](config, session.images.model, session.judge)
    rounds = Rounds(run, config.updates_per_round, lambda steps: sample_sets(session, objective, steps))
    for step in session.steps:
        with attempt_step(run, step) as metrics:
            metrics.update(prefer_better_set(session, rounds.at(step), step))
        yield metrics, take_snapshot(run, step + 1, metrics, rounds.kept())


# ------------------------------------------------------------------------------------------------ a round


class Sets(NamedTuple):
    """A round's pairs, each with its D+ item first, and the rewards: over all images, over D+, over D-."""

    pairs: Pairs
    rewards: Metrics


@torch.no_grad()
def sample_sets(session: Session[DragonConfig], objective: SetObjective, steps: range) -> Sets:
    """A round: two images of each prompt are made and split into D+ and D-. Each process splits its own."""
    config, run = session.config, session.run
    count = 2 * config.pairs_per_round
    first = (steps.start // config.updates_per_round * run.world + run.rank) * count
    made = look_at(objective, session.images, repeated(session.prompts, 2), range(first, first + count), config)
    if not all(gather_object([bool(made.features.isfinite().all())])):  # of one process: none goes on
        raise NotFinite("a feature of the round's images is not finite")
    pairs = made.features.view(config.pairs_per_round, 2, -1)
    start = torch.zeros(len(pairs), dtype=torch.long)
    chosen = greedy_swap(objective.reward, pairs, start, config.sweeps).to(made.latents.device)
    rows = torch.arange(0, count, 2, device=made.latents.device)
    positive, negative = rows + chosen, rows + 1 - chosen
    rewards = {
        "reward_mean": objective.value(made.features),
        "reward_positive": objective.value(made.features[positive]),
        "reward_negative": objective.value(made.features[negative]),
        "swapped": chosen.double().mean().item(),
    }
    one_each = {key: entry[rows] for key, entry in made.cond.items()}
    label = torch.ones_like(rows).float()
    return Sets(Pairs(made.latents[positive], made.latents[negative], one_each, label), rewards)


class Seen(NamedTuple):
    """Images as latents, the objective's features of them, and what they show."""

    latents: Tensor  # (B, C, h, w)
    features: Tensor  # (B, D)
    cond: Cond


@torch.no_grad()
def look_at(
    objective: SetObjective, images: ImageSampler, prompts: Prompts, numbers: range, config: DragonConfig
) -> Seen:
    """Numbered images, made two at a time for each pair of a batch."""
    found = []
    size = 2 * config.train_batch_size
    for first in range(numbers.start, numbers.stop, size):
        start = images.begin(prompts, range(first, min(first + size, numbers.stop)))
        latents = images.latents(start)
        features = objective.look(latents, images.model.decode(latents), start.prompts)
        found.append((latents, features))
    latents, features = (torch.cat(each) for each in zip(*found, strict=True))
    cond = images.texts(images.model, [prompts(i) for i in numbers])["cond"]  # padded to the longest of them all
    return Seen(latents, features, cond)


# ------------------------------------------------------------------------------------------------ the update


def prefer_better_set(session: Session[DragonConfig], sets: Sets, step: int) -> Metrics:
    """One optimiser step on some of the round's pairs: a backward pass for each batch of them, and the update."""
    config, run, images = session.config, session.run, session.images

    def loss_of(turn: Turn[Pairs]) -> tuple[Tensor, Mapping[str, Tensor]]:
        draws = step_draws(session, step, turn.numbers)
        with torch.no_grad():
            before = pair_errors(images.with_network(run.reference), turn.images, draws)
        after = pair_errors(images, turn.images, draws)
        positive, negative = after.winner - before.winner, after.loser - before.loser
        return contrastive_loss(config, run, after, before), {
            "accuracy": accuracy_of(negative - positive),
            "positive_gap": positive.mean(),
            "negative_gap": negative.mean(),
        }

    turns = [Turn(numbers, sets.pairs.rows(choose_pairs(config, run, numbers))) for numbers in run.numbers(step)]
    return {**sets.rewards, **take_step(run, turns, loss_of)}


def contrastive_loss(config: DragonConfig, run: Training, after: PairErrors, before: PairErrors) -> Tensor:
    """The loss (): denoising errors on D+ and D-, by the model now (after) and by the one before training (before)."""
    beta = LOSSES[config.loss] if config.beta is None else config.beta
    if config.loss == "dpo":
        return dpo_loss(dpo_margin(after.winner, after.loser, before.winner, before.loser, beta))
    gains = torch.cat([before.winner - after.winner, before.loser - after.loser])
    signs = torch.cat([torch.ones_like(after.winner), -torch.ones_like(after.loser)])
    return kto_loss(gains, signs, kto_baseline(run.accelerator.gather(gains.detach())), beta)


def choose_pairs(config: DragonConfig, run: Training, numbers: range) -> list[int]:
    """The round's pairs that a batch takes: all in turn, in an order that is drawn anew for every pass over them."""
    first = (numbers.start - run.rank * len(numbers)) // run.world
    chosen = listed(list(range(config.pairs_per_round)), config.seed)
    return [chosen(first + i) for i in range(len(numbers))]


# ------------------------------------------------------------------------------------------------ the win rate

NEW = 10**9  # number of the first image that no run trains on
SUBSET = 8  # images of a set in a win rate


def write_win_rate(config: DragonConfig, pipe: Any, prompts: Prompts, reward: Reward | None) -> dict[str, Any]:
    """Write win_rate.json into the run's folder, and return what it says: see `compare_with_base`; {} if not wanted."""
    if not config.num_win_rate_images:
        return {}
    found = compare_with_base(config, pipe, prompts, reward)
    output.write_json(Path(config.output_dir) / "win_rate.json", found)
    return found


@torch.no_grad()
def compare_with_base(config: DragonConfig, pipe: Any, prompts: Prompts, reward: Reward | None) -> dict[str, Any]:
    """How often the adapted pipeline beats the one without the adapter, on prompts and noise that no run trains on.

    An image is compared with the other of its prompt and noise. Where the reward is of sets, the images are parted into
    sets of 8, which share none, so that the comparisons are independent and the interval holds. What a reward draws
    from the global generators is a function of the seed.
    """
    network = lora.network_of(pipe)
    images = ImageSampler.of(config, pipe, TrainedNetwork(network, network.dtype))
    objective = OBJECTIVES[config.objective](config, images.model, reward)
    numbers = range(NEW, NEW + config.num_win_rate_images)
    with seeded_generators(seed_of(config.seed, NEW, "win rate")):
        tuned = look_at(objective, images, prompts, numbers, config).features
        with lora.off(network):
            base = look_at(objective, images, prompts, numbers, config).features
    for features in (tuned, base):
        finite(features, "a feature of a validation image")
    parts = part_sets(objective, tuned, base)
    gains = torch.tensor([objective.value(mine) - objective.value(its) for mine, its in parts])
    found = win_rate(int((gains > 0).sum()), int((gains == 0).sum()), len(gains))
    rewards = {"reward_before": objective.value(base), "reward_after": objective.value(tuned)}
    return {"objective": config.objective, "images": len(base), **rewards, "win_rate": asdict(found)}


def part_sets(objective: SetObjective, tuned: Tensor, base: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The features that are compared with each other: of single images, or of sets of `SUBSET`."""
    size = 1 if objective.single else SUBSET
    whole = len(base) // size * size
    return list(zip(tuned[:whole].split(size), base[:whole].split(size), strict=True))


# ------------------------------------------------------------------------------------------------ settings

LOSSES = {"dpo": 5000.0, "kto": 1000.0}  # and their papers' beta


def check_dragon(config: DragonConfig) -> None:
    """UserError for the first of this recipe's own settings that is invalid."""
    check_objective(config)
    if config.full_finetuning and config.num_win_rate_images:
        raise UserError("full fine-tuning has no adapter to switch off for a win rate: set num_win_rate_images to 0")
    if 0 < config.num_win_rate_images < SUBSET:
        raise UserError(f"num_win_rate_images is {config.num_win_rate_images}: give at least {SUBSET}, or 0")
