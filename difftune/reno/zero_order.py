"""Optimisers that move a noise by rewards alone: for scores that have no gradient, and for models too large for one.

    candidates (N, D) = search.send(values (N,))

A search is a generator for one sample: it yields candidates, is sent the value of each (what is maximised), and yields
the next. Its first candidate is the noise that it was given. Each asks only `normal` for random numbers, so that
sending it the same values again brings it to the same place: that is how a run is resumed.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor

from difftune.errors import UserError
from difftune.reno.first_order import clipped, rate
from solvers.ranges import Count, Decay, NotNegative, Positive, Range, Ranged

Search = Generator[Tensor, Tensor, None]
Normal = Callable[[int, int], Tensor]  # (N, D) -> that many unit normals


class ZeroOrder(Protocol):
    """An optimiser that is told values alone; `candidates` are those of an iteration after the first."""

    @property
    def candidates(self) -> int: ...
    def search(self, z: Tensor, normal: Normal) -> Search: ...


@dataclass(frozen=True)
class Neighbours(Ranged):
    """Zero-order search (https://arxiv.org/abs/2501.09732): the pivot moves to the best of its neighbours, if better.

    n' = |n| (c u + sqrt(1 - c^2) w), u = n / |n|, w a random unit vector across it: of the same norm, at cosine c. The
    rule for a neighbour is that of a public port; c = 0.95 and four neighbours are its defaults.
    """

    candidates: Count = 4
    cosine: Annotated[float, Range(-1, 1)] = 0.95

    def search(self, z: Tensor, normal: Normal) -> Search:
        pivot, best = z, (yield z[None])[0]
        while True:
            near = neighbours(pivot, self.cosine, normal(self.candidates, len(z)))
            values = yield near
            if values.max() > best:
                pivot, best = near[values.argmax()], values.max()


def neighbours(pivot: Tensor, cosine: float, draws: Tensor) -> Tensor:
    """Vectors (N, D) of the pivot's norm at that cosine to it, in the directions of `draws` across it."""
    u = pivot / pivot.norm()
    across = draws - (draws @ u)[:, None] * u
    w = across / across.norm(dim=1, keepdim=True)
    return pivot.norm() * (cosine * u + (1 - cosine**2) ** 0.5 * w)


@dataclass(frozen=True)
class SPSA(Ranged):
    """Simultaneous perturbation (Spall 1992): a gradient from pairs z +- radius d, d of random signs, then SGD's step.

    g = mean over pairs of (f(z + radius d) - f(z - radius d)) / (2 radius) d. The best candidate is kept, as always.
    """

    candidates: Count = 4  # two for each pair
    radius: Positive = 0.1  # of each element
    learning_rate: NotNegative | None = None  # None: 5 sqrt(D / 16384)
    momentum: Decay = 0.9
    grad_clip: Positive | None = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.candidates % 2:
            raise UserError(f"candidates is {self.candidates}: optimizer 'spsa' takes pairs, so give an even number")

    def search(self, z: Tensor, normal: Normal) -> Search:
        velocity = torch.zeros_like(z)
        yield z[None]
        while True:
            signs = normal(self.candidates // 2, len(z)).sign()
            values = yield torch.cat([z + self.radius * signs, z - self.radius * signs])
            plus, minus = values.chunk(2)
            gradient = ((plus - minus)[:, None].to(z) / (2 * self.radius) * signs).mean(dim=0)
            g = clipped(gradient[None], self.grad_clip)[0]
            velocity = self.momentum * velocity + g
            z = z + rate(self.learning_rate) * (g + self.momentum * velocity)


@dataclass(frozen=True)
class CMA(Ranged):
    """CMA-ES with a diagonal covariance, by the library `cma` (https://arxiv.org/abs/1604.00772; `difftune[cma]`).

    Diagonal (Ros & Hansen 2008), since D^2 numbers are too many for a noise.
    """

    candidates: Annotated[int, Range(4)] = 16
    sigma: Positive = 0.3  # the first step's, of each element

    def __post_init__(self):
        super().__post_init__()
        library()

    def search(self, z: Tensor, normal: Normal) -> Search:
        strategy = self._strategy(z, normal)
        yield z[None]
        while True:
            asked = strategy.ask()
            values = yield torch.stack([torch.from_numpy(x) for x in asked]).to(z)
            strategy.tell(asked, (-values).tolist())

    def _strategy(self, z: Tensor, normal: Normal) -> Any:
        options: dict[str, Any] = {"popsize": self.candidates, "CMA_diagonal": True, "verbose": -9}
        options["seed"] = float("nan")  # it seeds no generator, and asks only this
        options["randn"] = lambda n, d: normal(n, d).double().cpu().numpy()
        return library().CMAEvolutionStrategy(z.double().cpu().numpy(), self.sigma, options)


def library() -> Any:
    """The package `cma`; UserError if it is missing."""
    if find_spec("cma") is None:
        raise UserError("optimizer 'cma' needs the package cma: pip install 'difftune[cma]'")
    return import_module("cma")


ZERO_ORDER: dict[str, type] = {"neighbours": Neighbours, "spsa": SPSA, "cma": CMA}


def started(optimizer: ZeroOrder, z: Tensor, seed: int, told: list[Tensor]) -> tuple[Search, Tensor]:
    """The search of one sample z (D,), brought to where it stands after it was told `told`, and what it asks next."""
    generator = torch.Generator().manual_seed(seed)
    search = optimizer.search(z, lambda n, d: torch.randn(n, d, generator=generator, dtype=z.dtype).to(z.device))
    asked = next(search)
    for values in told:
        asked = search.send(values)
    return search, asked


def ranked(values: Tensor) -> Tensor:
    """The values (N,), where one that is not finite has become the lowest that is."""
    bad = ~values.isfinite()
    return torch.where(bad, values[~bad].min(), values) if bad.any() and not bad.all() else values
