"""ReNO's settings as objects: optimisers by their names, and rewards as one weighted sum."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from difftune.errors import UserError
from difftune.lookup import Rewards, known, reward_named
from difftune.reno.first_order import FIRST_ORDER
from difftune.reno.paper import Setting, learning_rate
from difftune.reno.zero_order import ZERO_ORDER
from rewards.compose import WeightedSum
from rewards.registry import entry, spelled

OPTIMIZERS = FIRST_ORDER | ZERO_ORDER


def optimizer_named(spec: Any, learning_rate: float | None = None, grad_clip: float | None = None) -> Any:
    """The optimiser of "NAME" or "NAME[OPTION=VALUE, ...]", or the object itself; the two options win where given.

    Raises UserError for a name or an option that is not known.
    """
    short = {"learning_rate": learning_rate, "grad_clip": grad_clip}
    given = {key: value for key, value in short.items() if value is not None}
    name, options = spelled(spec) if isinstance(spec, str) else (type(spec).__name__, {})
    kind = OPTIMIZERS[known("optimizer", name, OPTIMIZERS)] if isinstance(spec, str) else type(spec)
    names = [f.name for f in fields(kind)] if is_dataclass(kind) else []
    for option in options | given:
        known(f"option of optimizer {name!r}", option, names)
    return kind(**options | given) if isinstance(spec, str) else replace(spec, **given) if given else spec


def needs_gradient(optimizer: Any) -> bool:
    return not isinstance(optimizer, tuple(ZERO_ORDER.values()))


def sized(optimizer: Any, paper: Setting | None, dimension: int) -> Any:
    """The optimiser with a learning rate: the paper's for its model, else by the size, if none was given."""
    if vars(optimizer).get("learning_rate", 0) is not None:
        return optimizer
    return replace(optimizer, learning_rate=paper.learning_rate if paper else learning_rate(dimension))


def weights_over_ranges(reward: Rewards) -> WeightedSum:
    """The weighted sum where each reward is divided by the width of its nominal range.

    UserError for a reward without a name, or without a range.
    """
    if not isinstance(reward, Mapping):
        raise UserError("normalize goes by the rewards' nominal ranges: give the rewards by name")
    return reward_named({name: weight / nominal_width(name) for name, weight in reward.items()}, gradient=False)


def nominal_width(name: str) -> float:
    low, high = entry(name).range
    if not high - low < float("inf"):
        raise UserError(f"reward {name!r} has no nominal range to be normalised by: leave normalize out, and weigh it")
    return high - low
