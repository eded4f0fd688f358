"""Several rewards as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rewards.checks import checked
from rewards.registry import Reward, entry, load


@dataclass(frozen=True)
class WeightedSum:
    """sum_i weight_i reward_i(images, prompts); differentiable if every member is.

    Raises ValueError, naming the reward and the prompts, where a member is not finite.
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
    is not known, a weight that is no finite number, and where there is none."""
    if not weights:
        raise ValueError("no reward was given: name one, as in tiny-clip=1")
    for name, weight in weights.items():
        entry(name)
        if not isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} is {weight}, not a finite number")
    return WeightedSum({name: load(name) for name in weights}, {name: float(w) for name, w in weights.items()})


def parse_rewards(terms: Sequence[str]) -> dict[str, float]:
    """Weights by name from the command line: ["tiny-clip=0.5", "jpeg"] -> {"tiny-clip": 0.5, "jpeg": 1.0}.

    Raises ValueError, in one sentence, for an unknown name, a weight that is no finite number, a name given twice.
    """
    weights: dict[str, float] = {}
    for term in terms:
        name, _, weight = term.partition("=")
        entry(name)
        if name in weights:
            raise ValueError(f"reward {name!r} is given twice: give it once, with one weight")
        weights[name] = _number(weight, term) if "=" in term else 1.0
    return weights


def _number(text: str, term: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise ValueError(f"cannot read {term!r}: the weight after '=' is a finite number, as in tiny-clip=0.5")
    return number
