"""How much of the gradients of a run is signal, and how much the chance of the batch.

Successive updates see other images, and the weights have hardly moved between them: g and g' are two estimates of one
gradient G from B images each, whose covariance is S / B. So

    E[g . g'] = |G|^2,    E|g|^2 = |G|^2 + tr(S) / B,
    B_simple = tr(S) / |G|^2 = B (1 - r) / r    with    r = mean (g . g') / mean (|g|^2 + |g'|^2) / 2,

the simple noise scale of McCandlish et al. (https://arxiv.org/abs/1812.06162, appendix A.1, whose small batch is one
update's, and whose large one is two updates'). At a batch of B_simple images the gradient is as much signal as noise.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

LATEST = 100  # pairs that an estimate is of
FIRST = 20  # pairs before the first verdict; each later one comes after twice as many
ERRORS = 2.0  # standard errors that a verdict allows for


class Pair(NamedTuple):
    """What two successive gradients say."""

    product: float  # g . g'
    power: float  # (|g|^2 + |g'|^2) / 2


@dataclass
class GradientLog:
    """The gradients of a run as its optimiser gets them, after the clip, two at a time."""

    images: int  # B: of one update, in all processes
    previous: Tensor | None = None  # the gradient before, one vector
    pairs: list[Pair] = field(default_factory=list)  # the latest
    count: int = 0  # pairs so far
    cosine: float | None = None  # of the latest pair
    warned: bool = False  # a person was told that it is hopeless

    def see(self, gradients: Iterable[Tensor]) -> None:
        """Count the gradient of an update, weight by weight. One that is 0 says nothing, and is left out."""
        now = torch.cat([gradient.detach().flatten().float() for gradient in gradients])
        square = float(now.dot(now))
        if not square:
            return
        if self.previous is not None:
            other, product = float(self.previous.dot(self.previous)), float(self.previous.dot(now))
            self.cosine = product / sqrt(square * other)
            self.pairs = [*self.pairs, Pair(product, (square + other) / 2)][-LATEST:]
            self.count += 1
        self.previous = now

    @property
    def metrics(self) -> dict[str, float]:
        """`grad_cosine` of the latest two gradients, and `noise_scale` in images unless it is infinite."""
        if self.cosine is None:
            return {}
        scale = noise_scale(self.images, signal_share(self.pairs))
        return {"grad_cosine": self.cosine} | ({"noise_scale": scale} if scale < inf else {})

    def hopeless(self, updates: int) -> float | None:
        """The least noise scale that the pairs allow, if it is more images than `updates` see: most of what they learn
        is then chance. None otherwise, and between verdicts: there is one after 20 pairs, 40, 80, ..."""
        if self.count < FIRST or self.count % FIRST or (self.count // FIRST).bit_count() != 1:
            return None
        least = noise_scale(self.images, signal_share(self.pairs) + ERRORS * share_error(self.pairs))
        return least if least > updates * self.images else None


def signal_share(pairs: list[Pair]) -> float:
    """r: the share of |G|^2 in a gradient's expected square, the cosine where all norms are alike."""
    return sum(pair.product for pair in pairs) / sum(pair.power for pair in pairs)


def share_error(pairs: list[Pair]) -> float:
    """The standard error of r, by the deviations of g . g' - r (|g|^2 + |g'|^2) / 2."""
    share, power = signal_share(pairs), sum(pair.power for pair in pairs)
    return sqrt(sum((pair.product - share * pair.power) ** 2 for pair in pairs) * len(pairs) / (len(pairs) - 1)) / power


def noise_scale(images: int, share: float) -> float:
    """B (1 - r) / r, in images; infinite where no signal remains."""
    return images * max(1 - share, 0.0) / share if share > 0 else inf
