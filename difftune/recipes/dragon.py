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
`train` is the algorithm, `run` what the command line does with it.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from difftune import processes
from difftune.configs.recipes import DragonConfig
from difftune.errors import UserError
from difftune.evaluation.win_rate import win_rate
from difftune.files import output
from difftune.files.checkpoint import Say, State
from difftune.files.prompts import Prompts, listed, prompts_named
from difftune.lookup import at_least, known
from difftune.models import load as load_model
from difftune.pipelines import lora
from difftune.recipes.dpo import dpo_loss, dpo_margin
from difftune.recipes.kto import kto_baseline, kto_loss
from difftune.recipes.set_objectives import OBJECTIVES, Objective, check_objective
from difftune.rollouts.image_sampler import Chain
from difftune.rollouts.pairs import Pairs, draws_of, pair_errors
from difftune.rollouts.rounds import Rounds, engine, repeated
from difftune.training.state import (
    Called,
    Metrics,
    Reward,
    Training,
    begin,
    differentiate,
    follow,
    samples,
    steps,
    update,
)
from difftune.training.state import card as model_card
from difftune.training.state import check as check_shared
from rewards.checks import finite
from rewards.errors import NotFinite
from rewards.sets.catalogue import greedy_swap
from solvers.denoiser import Cond
from solvers.rollout.modes import rollout

LOSSES = {"dpo": 5000.0, "kto": 1000.0}  # and their papers' beta
NEW = 10**9  # number of the first image that no run trains on
SUBSET = 8  # images of a set in a win rate

# ------------------------------------------------------------------------------------------------ the algorithm


class Sets(NamedTuple):
    """A round's pairs, each with its item of D+ first, and the rewards of all images, of D+ and of D-."""

    pairs: Pairs
    rewards: Metrics


def train(
    config: DragonConfig,
    state: State | None = None,
    pipe: Any = None,
    reward: Reward | None = None,
    say: Say | None = None,
) -> Iterator[tuple[Metrics, State]]:
    """Metrics and state after each optimiser step, from the step of `state` on.

    pipe, reward: those that config names, unless given; the reward needs no gradient, and counts for the objective
    "instance" alone. The pipeline gets the adapter, and keeps it. `say` is told what was resolved. The rewards in the
    metrics are those of the step's round, which the weights at its beginning have made.
    Raises UserError for settings that cannot be, RunError after too many steps that were not finite.
    """
    check(config, pipe, reward)
    run = begin(config, state, load_model(config.model) if pipe is None else pipe, reference=True)
    chain = Chain.of(config, run.pipe, run.network)
    prompts = repeated(prompts_named(config.prompts, config.seed), 2)
    objective = OBJECTIVES[config.objective](config, chain.model, reward)
    rounds = Rounds(config.updates_per_round, partial(collect, config, run, chain, prompts, objective), config.seed)
    with engine(config, run, say):
        yield from steps(config, run, partial(descend, config, run, chain, rounds), rounds.kept)


@torch.no_grad()
def collect(
    config: DragonConfig, run: Training, chain: Chain, prompts: Prompts, objective: Objective, steps: range
) -> Sets:
    """A round: images are made and split into D+ and D-. Each process splits its own."""
    count = 2 * config.pairs_per_round
    first = (steps.start // config.updates_per_round * run.world + run.rank) * count
    numbers = range(first, first + count)
    latents, features, cond = made(config, chain, prompts, objective, numbers)
    if not all(gather_object([bool(features.isfinite().all())])):  # of one process: none goes on
        raise NotFinite("a feature of the round's images is not finite")
    pairs = features.view(config.pairs_per_round, 2, -1)
    start = torch.zeros(len(pairs), dtype=torch.long)
    chosen = greedy_swap(objective.reward, pairs, start, config.sweeps).to(latents.device)
    rows = torch.arange(0, count, 2, device=latents.device)
    positive, negative = rows + chosen, rows + 1 - chosen
    value = partial(value_of, objective)
    rewards = {
        "reward_mean": value(features),
        "reward_positive": value(features[positive]),
        "reward_negative": value(features[negative]),
        "swapped": chosen.double().mean().item(),
    }
    one_each = {key: entry[rows] for key, entry in cond.items()}
    return Sets(Pairs(latents[positive], latents[negative], one_each, torch.ones_like(rows).float()), rewards)


@torch.no_grad()
def made(
    config: DragonConfig, chain: Chain, prompts: Prompts, objective: Objective, indices: range
) -> tuple[Tensor, Tensor, Cond]:
    """Latents, features and conditions of numbered images, made two at a time for each pair of a batch."""
    found = []
    size = 2 * config.train_batch_size
    for start in range(indices.start, indices.stop, size):
        texts, x, noise, predict = chain.begin(prompts, range(start, min(start + size, indices.stop)), None)
        latents = rollout(chain.step, predict, x, chain.levels, "full", noise).x
        features = objective.look(latents, chain.model.decode(latents), texts)
        found.append((latents, features, predict.conds["cond"]))
    every = {key: torch.cat([cond[key] for _, _, cond in found]) for key in found[0][2]}
    return torch.cat([latents for latents, _, _ in found]), torch.cat([features for _, features, _ in found]), every


def value_of(objective: Objective, features: Tensor) -> float:
    """The reward of a set."""
    return float(objective.reward.value(objective.reward.begin(features)))


def descend(config: DragonConfig, run: Training, chain: Chain, rounds: Rounds[Sets], step: int) -> Metrics:
    """One optimiser step on some of the round's pairs, and what it met."""
    sets = rounds.at(run, step)
    met, passes = [], config.gradient_accumulation_steps
    for n in range(passes):
        numbers = samples(config, step, n, run.rank, run.world)
        pairs = sets.pairs.rows(drawn(config, run, numbers))
        draws = draws_of(config, chain.model, step, numbers)
        with torch.no_grad():
            before = torch.stack(pair_errors(chain, run.reference, pairs, draws))
        with run.learning(last=n == passes - 1):
            after = torch.stack(pair_errors(chain, run.network, pairs, draws))
            loss = contrastive(config, run, after, before)
            differentiate(run, loss / passes)
        gaps = (after - before).detach()
        right = ((gaps[1] - gaps[0]).sign() + 1).mean() / 2
        met.append(torch.stack([loss.detach(), right, *gaps.mean(1)]))
    norm = update(config, run)
    loss, accuracy, positive, negative = run.accelerator.gather(torch.stack(met)).view(-1, 4).mean(0).tolist()
    about = {"loss": loss, "grad_norm": norm, "accuracy": accuracy}
    return {**sets.rewards, **about, "positive_gap": positive, "negative_gap": negative}


def contrastive(config: DragonConfig, run: Training, after: Tensor, before: Tensor) -> Tensor:
    """The loss () of denoising errors (2, P) of D+ and D-, of the model (after) and of the one before training."""
    beta = LOSSES[config.loss] if config.beta is None else config.beta
    if config.loss == "dpo":
        return dpo_loss(dpo_margin(after[0], after[1], before[0], before[1], beta))
    gains = (before - after).flatten()
    signs = torch.ones_like(after)
    signs[1] = -1
    return kto_loss(gains, signs.flatten(), kto_baseline(run.accelerator.gather(gains.detach())), beta)


def drawn(config: DragonConfig, run: Training, numbers: range) -> list[int]:
    """Which of the round's pairs a batch takes: all in turn, in an order that is new in every pass over them."""
    first = (numbers.start - run.rank * len(numbers)) // run.world
    chosen = listed(list(range(config.pairs_per_round)), config.seed)
    return [chosen(first + i) for i in range(len(numbers))]


# ------------------------------------------------------------------------------------------------ the win rate


@torch.no_grad()
def compared(config: DragonConfig, pipe: Any, reward: Reward | None = None) -> dict[str, Any]:
    """How often the adapted pipeline beats the one without the adapter, on prompts and noise that no run trains on.

    An image is compared with the other of its prompt and noise. Where the reward is of sets, the images are parted into
    sets of 8, which share none, so that the comparisons are independent and the interval holds.
    """
    network = lora.network_of(pipe)
    chain = Chain.of(config, pipe, Called(network, network.dtype))
    objective = OBJECTIVES[config.objective](config, chain.model, reward)
    prompts, numbers = prompts_named(config.prompts, config.seed), range(NEW, NEW + config.num_win_rate_images)
    tuned = made(config, chain, prompts, objective, numbers)[1]
    with lora.off(network):
        base = made(config, chain, prompts, objective, numbers)[1]
    for features in (tuned, base):
        finite(features, "a feature of a validation image")
    gains = torch.tensor([value_of(objective, t) - value_of(objective, b) for t, b in parted(objective, tuned, base)])
    found = win_rate(int((gains > 0).sum()), int((gains == 0).sum()), len(gains))
    rewards = {"reward_before": value_of(objective, base), "reward_after": value_of(objective, tuned)}
    return {"objective": config.objective, "images": len(base), **rewards, "win_rate": asdict(found)}


def parted(objective: Objective, tuned: Tensor, base: Tensor) -> list[tuple[Tensor, Tensor]]:
    size = 1 if objective.single else SUBSET
    whole = len(base) // size * size
    return list(zip(tuned[:whole].split(size), base[:whole].split(size), strict=True))


# ------------------------------------------------------------------------------------------------ the command


def run(
    config: DragonConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None
) -> dict[str, Any]:
    """`difftune train dragon`: train in `config.output_dir`; returns a summary. See `runs.run`.

    Writes win_rate.json beside what `runs.run` writes.
    """
    check(config, pipe, reward)
    pipe = load_model(config.model) if pipe is None else pipe
    found = follow(config, train, card, show, pipe, reward)
    if config.num_win_rate_images and processes.process().is_main_process:
        found |= compared(config, pipe, reward)
        output.write_json(Path(config.output_dir) / "win_rate.json", found)
    return found


def check(config: DragonConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """One sentence for the first setting that cannot be, before anything is loaded."""
    check_shared(config, pipe)
    at_least(1, updates_per_round=config.updates_per_round, sweeps=config.sweeps, feature_dims=config.feature_dims)
    at_least(2, pairs_per_round=config.pairs_per_round)
    at_least(0, num_win_rate_images=config.num_win_rate_images, beta=config.beta or 0)
    known("loss", config.loss, LOSSES)
    check_objective(config, reward)
    if config.full_finetuning and config.num_win_rate_images:
        raise UserError("full fine-tuning has no adapter to switch off for a win rate: set num_win_rate_images to 0")
    if 0 < config.num_win_rate_images < SUBSET:
        raise UserError(f"num_win_rate_images is {config.num_win_rate_images}: give at least {SUBSET}, or 0")


def card(config: DragonConfig, metrics: Metrics) -> str:
    of = config.reward if config.objective == "instance" else [f"the objective {config.objective}"]
    about = replace(config, reward=of)
    return model_card(about, metrics, "dragon", "DRAGON ([2504.15217](https://arxiv.org/abs/2504.15217))")
