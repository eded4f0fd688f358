"""What preferences and policy gradients are trained on: images that the model itself makes, round by round.

A round is sampled by the weights that it begins with and serves one optimiser step or several. A run that is resumed
within a round samples it again, by those weights and from the statistics of the rewards before it, which are saved with
it, and from generators that are a function of the seed and the round (a reward may draw from them): nothing that a
round holds needs to be saved.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.distributed.tensor import DTensor

from difftune.configs.training import TrainingConfig
from difftune.errors import UserError
from difftune.files.checkpoint import Say, randomness, restore
from difftune.files.prompts import Prompts
from difftune.pipelines import lora
from difftune.pipelines.engine import kernels
from difftune.rollouts.image_sampler import Chain
from difftune.rollouts.policy import ETAS, KERNELS, Policy, Trajectory, kernel_of
from difftune.training.state import Called, Kept, Reward, Training, copied, mixed, nothing, placed, scored
from guidance.guided import GuidedPredict
from solvers.denoiser import Cond
from solvers.rollout.modes import rollout

Found = TypeVar("Found")


@dataclass
class Rounds(Generic[Found]):
    """The rounds of a run, of `length` optimiser steps each; `collect` makes what those steps are taken on."""

    length: int
    collect: Callable[[range], Found]
    seed: int
    first: int = -1  # step of the round that is held
    began: Kept = field(default_factory=nothing)  # the weights and the rewards' statistics at its beginning
    found: Found | None = None

    def at(self, run: Training, step: int) -> Found:
        """What the round of `step` holds."""
        first = step - step % self.length
        if self.first != first:
            within = first < step == run.done
            self.began = run.own if within else Kept(copied(run.weights), {"seen": run.seen.state()})
            self.first, self.found = first, None
        if self.found is None:
            run.seen.load(self.began.info["seen"])
            of = mixed(self.seed, first, f"round of process {run.rank}")
            with lent(run.weights, self.began.tensors), seeded(of):
                self.found = self.collect(range(first, first + self.length))
        return self.found

    def kept(self) -> Kept:
        """What `snapshot` is to save, so that the round can be made again."""
        return self.began if self.length > 1 else nothing()


@contextmanager
def lent(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """The weights with other values; they have their own again afterwards, bit for bit."""
    own = copied(weights)
    try:
        put(weights, values)
        yield
    finally:
        put(weights, own)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators begin at this seed; afterwards they are as they were."""
    before = randomness()
    try:
        set_seed(seed % 2**32)
        yield
    finally:
        restore(before)


@torch.no_grad()
def put(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        value = values[name]
        weight.copy_(value if isinstance(value, DTensor) else placed(name, value, weight))


# ------------------------------------------------------------------------------------------------ images of the model


@dataclass(frozen=True)
class Rolled:
    """A batch of trajectories, and their scores."""

    texts: Sequence[str]
    predict: GuidedPredict  # of the weights as they are when it is called
    trajectory: Trajectory
    scores: Tensor  # (B,)

    def mean(self, policy: Policy, i: int) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and deviation () of step i, with a gradient in the weights."""
        return policy.mean(self.predict, self.trajectory.paths[i], i)

    @torch.no_grad()
    def reference(self, policy: Policy, run: Training, i: int) -> Tensor:
        """The mean (B, ...) of step i before any training, under the same guidance."""
        return policy.mean(under(self.predict, run.reference), self.trajectory.paths[i], i)[0]


@dataclass(frozen=True)
class Made:
    """A batch of images as latents, what they show, and their scores."""

    latents: Tensor  # (B, C, h, w)
    cond: Cond
    scores: Tensor  # (B,)


def repeated(prompts: Prompts, count: int) -> Prompts:
    """Each prompt for so many samples in a row."""
    return lambda index: prompts(index // count)


def under(predict: GuidedPredict, network: Called) -> GuidedPredict:
    """The same guidance of the same conditions by another network."""
    main: Any = predict.networks["main"]
    return replace(predict, networks={**predict.networks, "main": replace(main, network=network)})


@torch.no_grad()
def roll(
    chain: Chain, policy: Policy, prompts: Prompts, reward: Reward, indices: range, run: Training, shared: int = 1
) -> Rolled:
    """Sample and score trajectories; a sample's noise depends on the seed and its index alone.

    shared: so many in a row start from the first one's x_T. Raises NotFinite where a score is not finite.
    """
    texts, x, noise, predict = chain.begin(prompts, indices, None)
    assert noise is not None  # check_policy lets only a stochastic sampler pass
    trajectory = policy.sample(predict, x[::shared].repeat_interleave(shared, 0), noise)
    return Rolled(texts, predict, trajectory, scored(reward, chain.model.decode(trajectory.end), texts, run))


@torch.no_grad()
def make(chain: Chain, prompts: Prompts, reward: Reward, indices: range, run: Training) -> Made:
    """Sample and score images. Raises NotFinite where a score is not finite."""
    texts, x, noise, predict = chain.begin(prompts, indices, None)
    latents = rollout(chain.step, predict, x, chain.levels, "full", noise).x
    return Made(latents, predict.conds["cond"], scored(reward, chain.model.decode(latents), texts, run))


# ------------------------------------------------------------------------------------------------ settings


def policy_of(chain: Chain, eta: float | None) -> Policy:
    """The chain's sampler as a policy: DDIM with eta, or the SDE of a flow; their papers' noise where eta is None."""
    kernel = kernel_of(chain.denoiser.prediction_type)
    return Policy(KERNELS[kernel], ETAS[kernel] if eta is None else eta, chain.levels)


def check_policy(config: Any) -> None:
    """UserError for settings under which a sampler has no log-probability, or none that can be computed again."""
    if config.sampler != "ancestral":
        raise UserError(f"sampler {config.sampler!r} has no log-probability here: leave it at 'ancestral'")
    if config.eta is not None and not config.eta > 0:
        raise UserError(f"eta is {config.eta}: a sampler without noise has no log-probability, so give it above 0")
    if config.lora_dropout:
        raise UserError(
            f"lora_dropout is {config.lora_dropout}: the ratio of two probabilities would be noise, so leave it at 0"
        )


def check_groups(config: Any, least: int = 1) -> None:
    """UserError unless the images of a prompt are in one batch, and enough."""
    group, size = config.num_images_per_prompt, config.train_batch_size
    if group < least:
        raise UserError(f"num_images_per_prompt is {group}: it must be at least {least}")
    if size % group:
        raise UserError(f"train_batch_size is {size}: it must be a multiple of num_images_per_prompt, {group}")


@contextmanager
def engine(config: TrainingConfig, run: Training, say: Say | None, **lines: str) -> Iterator[None]:
    """The attention and the kernels that config asks for; `say` hears of them, and of `lines`."""
    network = lora.network_of(run.pipe)
    with kernels(config.enable_xformers_memory_efficient_attention, config.deterministic, network) as found:
        for name, line in {**lines, "attention": f"{found.backend} ({found.why})"}.items():
            if say is not None:
                say(f"{name}: {line}")
        yield
