"""The data of preferences and policy gradients: images that the model itself makes, round by round.

A round is sampled by the weights that it begins with and serves one optimiser step or several. A run that is resumed
within a round samples it again, by those weights and from the statistics of the rewards before it, which are saved with
it, and from generators that are a function of the seed and the round (a reward may draw from them): nothing that a
round holds needs to be saved.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from difftune.files.checkpoint import seeded_generators
from difftune.files.prompts import Prompts
from difftune.rollouts.session import Session
from difftune.training.numbering import seed_of
from difftune.training.state import Kept, Training, copy_tensors, keep_nothing, place_like
from difftune.training.steps import score_images
from solvers.denoiser import Cond

Found = TypeVar("Found")
Held = TypeVar("Held", covariant=True)


class Source(Protocol[Held]):
    """The data of a run's optimiser steps."""

    def at(self, step: int) -> Held:
        """The data of the step."""

    def kept(self) -> Kept:
        """The state that `take_snapshot` is to save, so that a resumed run finds the same data."""


@dataclass
class EveryStep(Generic[Found]):
    """A source that is a function of the step: nothing to save."""

    at: Callable[[int], Found]

    def kept(self) -> Kept:
        return keep_nothing()


@dataclass
class Rounds(Generic[Found]):
    """The rounds of a run, of `length` optimiser steps each; `collect` makes what those steps are taken on."""

    run: Training
    length: int
    collect: Callable[[range], Found]
    sampled_by: Callable[[Kept, int], Mapping[str, Tensor]] | None = None
    """The weights that sample the round of a step, by what the round before began with; None: the trained ones."""
    first: int = -1  # step of the round that is held
    began: Kept = field(default_factory=keep_nothing)  # the weights and the rewards' statistics at its beginning
    found: Found | None = None

    def at(self, step: int) -> Found:
        """The data of the round that `step` belongs to."""
        first, run = step - step % self.length, self.run
        if self.first != first:
            within = first < step == run.done
            if within:
                self.began = run.own
            else:
                before = run.own if self.first < 0 else self.began
                weights = run.weights if self.sampled_by is None else self.sampled_by(before, first)
                self.began = Kept(copy_tensors(weights), {"seen": run.seen.state(), "scales": run.scales.state()})
            self.first, self.found = first, None
        if self.found is None:
            run.seen.load(self.began.info["seen"])
            run.scales.load(self.began.info.get("scales", {}))
            seed = seed_of(run.config.seed, first, f"round of process {run.rank}")
            with lend_weights(run.weights, self.began.tensors), seeded_generators(seed):
                self.found = self.collect(range(first, first + self.length))
        return self.found

    def kept(self) -> Kept:
        """The round's beginning, so that it can be made again."""
        return self.began if self.length > 1 or self.sampled_by is not None else keep_nothing()


@contextmanager
def lend_weights(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """The weights with other values; they have their own again afterwards, bit for bit."""
    own = copy_tensors(weights)
    try:
        set_weights(weights, values)
        yield
    finally:
        set_weights(weights, own)


@torch.no_grad()
def set_weights(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        value = values[name]
        weight.copy_(value if isinstance(value, DTensor) else place_like(weight, name, value))


# ------------------------------------------------------------------------------------------------ images of the model


@dataclass(frozen=True)
class ScoredImages:
    """A batch of images as latents, what they show, and their scores."""

    latents: Tensor  # (B, C, h, w)
    cond: Cond
    scores: Tensor  # (B,)


def repeated(prompts: Prompts, count: int) -> Prompts:
    """Each prompt for so many samples in a row."""
    return lambda index: prompts(index // count)


@torch.no_grad()
def make_images(session: Session, prompts: Prompts, numbers: range) -> ScoredImages:
    """Sample and score images. Raises NotFinite if a score is not finite."""
    images = session.images
    start = images.begin(prompts, numbers)
    latents = images.latents(start)
    scores = score_images(session.reward, images.model.decode(latents), start.prompts, session.run)
    return ScoredImages(latents, start.predict.conds["cond"], scores)
