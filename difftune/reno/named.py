"""ReNO's optimisers by their names."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from difftune.lookup import known
from difftune.reno.first_order import FIRST_ORDER
from difftune.reno.paper import Setting, learning_rate
from difftune.reno.zero_order import ZERO_ORDER
from rewards.registry import spelled

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
