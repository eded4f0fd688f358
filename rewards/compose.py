"""Several rewards as one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, sqrt
from typing import Literal, NamedTuple, get_args

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


Scaling = Literal["none", "range", "running", "group"]


class Scale(NamedTuple):
    """A reward counts as (score - mean) / std."""

    mean: float = 0.0
    std: float = 1.0


@dataclass
class Scales:
    """Statistics of several rewards' scores that move from step to step: within one, `present` is what counts."""

    statistics: dict[str, Statistics] = field(default_factory=dict)
    present: dict[str, Statistics] = field(default_factory=dict)
    met: list[dict[str, Tensor]] = field(default_factory=list)  # scores that are not counted in yet
    listening: bool = False  # whether scores are met
    latest: dict[str, Statistics] = field(default_factory=dict)  # of the last step that had any
    begun: bool = False  # whether the present step has counted some

    def listen(self) -> None:
        """From now on scores are met, until they are taken."""
        self.met, self.listening = [], True

    def meet(self, parts: Mapping[str, Tensor]) -> None:
        if self.listening:
            self.met.append({name: scores.detach().cpu() for name, scores in parts.items()})

    def take(self) -> dict[str, list[float]]:
        """The scores that were met."""
        met = [{name: scores.double().tolist() for name, scores in parts.items()} for parts in self.met]
        self.met, self.listening = [], False
        return {name: [score for parts in met for score in parts[name]] for name in (met[0] if met else {})}

    def count(self, parts: Mapping[str, Sequence[float]]) -> None:
        """Count scores in, which the next step is scaled by."""
        if parts and not self.begun:
            self.latest, self.begun = {}, True
        for name, scores in parts.items():
            for statistics in (self.statistics, self.latest):
                statistics[name] = seen(torch.tensor(scores, dtype=torch.float64), statistics.get(name))

    def renew(self) -> None:
        """A step begins: all that was counted is present."""
        self.present, self.begun = dict(self.statistics), False

    def state(self) -> dict[str, list[float]]:
        """The statistics as JSON holds them."""
        return {name: list(found) for name, found in self.statistics.items()}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """Put back what `state` gave."""
        self.statistics = {name: Statistics(int(n), mean, squares) for name, (n, mean, squares) in state.items()}
        self.renew()


@dataclass(frozen=True)
class ScaledSum(WeightedSum):
    """sum_i weight_i (reward_i(images, prompts) - mean_i) / std_i, so that weights compare whatever the rewards' units.

    scaling: "range", mean and std are the low end and the width of the reward's nominal range; "running", those of all
    scores of the steps before, and the nominal range's while there are fewer than two; "group", those of each `group`
    scores in a row, which are of one prompt, and 0 if they are equal; "none", 0 and 1. `scales` are running's. No
    gradient goes through mean and std. Raises ValueError for a reward without a nominal range if that is wanted.
    """

    scaling: Scaling = "none"
    group: int = 1
    scales: Scales = field(default_factory=Scales, compare=False)

    def __post_init__(self) -> None:
        if self.scaling not in get_args(Scaling):
            raise RewardError(f"rewards are scaled by {', '.join(get_args(Scaling))}, not {self.scaling!r}")
        if self.scaling == "range":
            for name in self.rewards:
                nominal_scale(name)

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        found = super().parts(images, prompts)
        self.scales.meet(found)
        return found

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        return super().total({name: self.scaled(name, scores) for name, scores in parts.items()})

    def scaled(self, name: str, scores: Tensor) -> Tensor:
        """The scores (B,) of a reward in its scale."""
        if self.scaling == "group":
            return in_groups(scores, self.group)
        mean, std = self.scale(name)
        return (scores - mean) / std

    def scale(self, name: str) -> Scale:
        known = self.scales.present.get(name, Statistics())
        if self.scaling == "running" and known.number > 1:
            return Scale(known.mean, known.std)
        if self.scaling == "running":
            return nominal_scale(name, Scale())
        return nominal_scale(name) if self.scaling == "range" else Scale()


def nominal_scale(name: str, otherwise: Scale | None = None) -> Scale:
    """The low end and the width of a reward's nominal range; `otherwise` for one that has none, and for a reward that
    is known by its class alone. RewardError without that."""
    try:
        low, high = entry(name).range
    except RewardError:
        low, high = -inf, inf
    if high - low < inf:
        return Scale(low, high - low)
    if otherwise is not None:
        return otherwise
    raise RewardError(f"reward {name!r} has no nominal range to be scaled by: leave reward_scaling out, and weigh it")


def in_groups(scores: Tensor, group: int) -> Tensor:
    """(r - mean of the prompt) / std of the prompt, (B,), of every `group` scores in a row; 0 if they are all equal."""
    groups = scores.double().view(-1, group)
    alike = (groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)).detach()
    gaps = (groups - groups.mean(1, keepdim=True).detach()).masked_fill(alike, 0.0)
    std = groups.detach().std(1, correction=0, keepdim=True).clamp(min=1e-6)
    return (gaps / std).flatten().to(scores)


def scaled_sum(reward: WeightedSum, scaling: Scaling, group: int = 1) -> WeightedSum:
    """The same sum of scaled rewards; itself if they are not to be scaled."""
    return reward if scaling == "none" else ScaledSum(reward.rewards, reward.weights, scaling, group)


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
