"""Several rewards as one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rewards.checks import checked, paired
from rewards.errors import RewardError
from rewards.registry import Reward, entry, load


@dataclass(frozen=True)
class WeightedSum:
    """sum_i weight_i reward_i(images, prompts); differentiable if every member is.

    Raises ValueError, naming the reward and the prompts, if a member is not finite.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]

    @property
    def differentiable(self) -> bool:
        return all(reward.differentiable for reward in self.rewards.values())

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.total(self.parts(images, prompts))

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each member's own scores (B,), without its weight."""
        return {name: checked(reward(images, prompts), name, prompts) for name, reward in self.rewards.items()}

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum (B,) of scores that `parts` returned."""
        first, *rest = [self.weights[name] * scores for name, scores in parts.items()]
        return sum(rest, first)


@dataclass(frozen=True)
class Recomputed:
    """A reward that keeps no graph between forward and backward: it is computed again on the way back, the random state
    as it was. Of several, one graph at a time is there; of one alone, nothing is saved."""

    reward: Reward

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return checkpoint(self.reward, images, prompts, use_reentrant=False)


def weighted(weights: Mapping[str, float]) -> WeightedSum:
    """Rewards by name with their weights: weighted({"tiny-clip": 1, "jpeg": -0.1}). Raises ValueError for a name that
    is not known, a weight that is not a finite number, and if there is none."""
    if not weights:
        raise RewardError("no reward was given: name one, as in tiny-clip=1")
    for name, weight in weights.items():
        entry(name)
        if not isfinite(weight):
            raise RewardError(f"the weight of reward {name!r} is {weight}, not a finite number")
    return WeightedSum({name: load(name) for name in weights}, {name: float(w) for name, w in weights.items()})


def parse_rewards(terms: Sequence[str]) -> dict[str, float]:
    """Weights by name from the command line: ["tiny-clip=0.5", "jpeg"] -> {"tiny-clip": 0.5, "jpeg": 1.0}.

    A name may have options, which stay in it: "jpeg[quality=40]=0.5" -> {"jpeg[quality=40]": 0.5}.

    Raises ValueError, in one sentence, for an unknown name, a weight that is not a finite number, a name given twice.
    """
    weights: dict[str, float] = {}
    for term in terms:
        name, equals, weight = _divided(term)
        entry(name)
        if name in weights:
            raise RewardError(f"reward {name!r} is given twice: give it once, with one weight")
        weights[name] = _number(weight, term) if equals else 1.0
    return weights


def _divided(term: str) -> tuple[str, str, str]:
    """NAME, "=" and WEIGHT, or NAME alone; what stands in brackets belongs to the name."""
    name, bracket, after = term.rpartition("]")
    plain, equals, weight = after.partition("=")
    return name + bracket + plain, equals, weight


def _number(text: str, term: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise RewardError(f"cannot read {term!r}: the weight after '=' is a finite number, as in tiny-clip=0.5")
    return number


# ------------------------------------------------------------------------------------------------ one scale


class Statistics(NamedTuple):
    """Number, mean and sum of squared deviations of all scores so far; they are saved with a run."""

    number: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """The standard deviation of the scores, with number - 1; 1 if they are fewer than two, or all equal."""
        return sqrt(self.squares / (self.number - 1)) or 1.0 if self.number > 1 else 1.0


def seen(scores: Tensor, before: Statistics | None = None) -> Statistics:
    """`before` with these scores (B,) counted in (Chan et al., 1979): the same whatever the batches."""
    before = before or Statistics()
    x = scores.detach().double()
    number = before.number + len(x)
    delta = float(x.mean()) - before.mean
    squares = before.squares + float(((x - x.mean()) ** 2).sum()) + delta**2 * before.number * len(x) / number
    return Statistics(number, before.mean + delta * len(x) / number, squares)


def normalised(
    parts: Mapping[str, Tensor], statistics: Mapping[str, Statistics]
) -> tuple[dict[str, Tensor], dict[str, Statistics]]:
    """(scores - mean) / std of every reward, by the statistics with this batch counted in; and those statistics.

    A constant reward becomes 0. The statistics carry no gradient.
    """
    now = {name: seen(scores, statistics.get(name)) for name, scores in parts.items()}
    return {name: (scores - now[name].mean) / now[name].std for name, scores in parts.items()}, now


@dataclass(frozen=True)
class Clipped:
    """A reward kept in [low, high]; outside of it there is no gradient."""

    reward: Reward
    low: float = float("-inf")
    high: float = float("inf")

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise RewardError(f"a reward is clipped to [low, high], not to [{self.low}, {self.high}]")

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(images, prompts).clamp(self.low, self.high)


# ------------------------------------------------------------------------------------------------ several aims


def non_dominated(scores: Tensor) -> Tensor:
    """The items of a batch that no other dominates: scores (B, R), one column per reward -> (B,) bool.

    a dominates b if it is at least as high in every reward, and higher in one (Parrot,
    https://arxiv.org/abs/2401.05675). Equal items do not dominate each other. Scores need no common scale.
    """
    if scores.ndim != 2:
        raise RewardError(f"the scores of a batch are (B, R), one column per reward, not {tuple(scores.shape)}")
    a, b = scores[:, None], scores[None]
    dominates = (a >= b).all(dim=2) & (a > b).any(dim=2)
    return ~dominates.any(dim=0)


def lagrangian(
    parts: Mapping[str, Tensor], objective: str, floors: Mapping[str, float], multipliers: Mapping[str, float]
) -> Tensor:
    """(objective + sum_i m_i (reward_i - floor_i)) / (1 + sum_i m_i), (B,): what is maximised under constraints."""
    m = {name: multipliers.get(name, 0.0) for name in floors}  # none yet: as `dual_ascent` starts
    slack = [m[name] * (parts[name] - floor) for name, floor in floors.items()]
    return sum(slack, parts[objective]) / (1 + sum(m.values()))


def dual_ascent(
    multipliers: Mapping[str, float], parts: Mapping[str, Tensor], floors: Mapping[str, float], rate: float = 0.1
) -> dict[str, float]:
    """m_i <- max(0, m_i + rate (floor_i - mean reward_i)): one under its floor gains weight, one above loses it."""
    gaps = {name: floor - float(parts[name].detach().mean()) for name, floor in floors.items()}
    return {name: max(0.0, multipliers.get(name, 0.0) + rate * gap) for name, gap in gaps.items()}


@dataclass(frozen=True)
class Routed:
    """Each prompt is scored by the reward of the first pattern (a regular expression) that it holds; else by `other`.

    Raises ValueError, naming the prompt, if nothing serves it.
    """

    routes: Mapping[str, Reward]
    other: Reward | None = None

    @property
    def differentiable(self) -> bool:
        return all(reward.differentiable for reward in (*self.routes.values(), *([self.other] if self.other else [])))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        chosen = [self.route(prompt) for prompt in prompts]
        scores = images.new_zeros(len(images), dtype=torch.float32)
        for reward in {id(reward): reward for reward in chosen}.values():
            rows = [i for i, other in enumerate(chosen) if other is reward]
            at = torch.tensor(rows, device=images.device)
            scores = scores.index_add(0, at, reward(images[at], [prompts[i] for i in rows]))
        return scores

    def route(self, prompt: str) -> Reward:
        """The reward of a prompt."""
        found = next((reward for pattern, reward in self.routes.items() if re.search(pattern, prompt)), self.other)
        if found is None:
            raise RewardError(f"no reward is for the prompt {prompt!r}: add a route, or a reward for all others")
        return found
