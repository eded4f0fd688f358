"""What settings name, as objects: one sentence for every name or option that is not known."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from difftune.errors import UserError
from guidance.contract import Guidance
from guidance.methods.catalogue import GUIDANCE
from rewards.compose import WeightedSum, parse_rewards, weighted
from rewards.registry import REWARDS, Reward, entry, unknown
from solvers.samplers.catalogue import SAMPLERS, Step

Thing = TypeVar("Thing")
Rewards = Sequence[str] | Mapping[str, float] | Reward  # NAME=WEIGHT terms, weights by name, or a reward itself


def guidance_named(name: str, scale: float | None = None, options: Mapping[str, Any] | None = None) -> Guidance:
    """The method with its options, of which `scale` is one and wins; "interval:apg" is APG in an Interval."""
    kinds = guidance_kinds(name)
    settings: list[dict[str, Any]] = [{} for _ in kinds]
    for key, value in {**(options or {}), **({} if scale is None else {"scale": scale})}.items():
        depth, option = guidance_field(name, key)
        settings[depth][option] = value
    method = kinds[-1](**settings[-1])
    for kind, given in zip(kinds[-2::-1], settings[-2::-1], strict=True):
        method = kind(method=method, **given)
    return method


def guidance_of(config: Any) -> Guidance:
    """The method that a Config names by `guidance`, `guidance_scale` and `guidance_options`."""
    return guidance_named(config.guidance, config.guidance_scale, config.guidance_options)


def guidance_kinds(name: str) -> list[Callable[..., Guidance]]:
    """The methods of a name from the outside inwards; one that holds another and names none holds CFG."""
    parts = name.split(":")
    kinds = [member("guidance method", part, GUIDANCE) for part in parts]
    for part, kind in zip(parts[:-1], kinds, strict=False):
        if "method" not in _options(kind):
            holders = ", ".join(n for n, k in GUIDANCE.items() if "method" in _options(k))
            raise UserError(f"in {name!r}, {part} can hold no other method; these can: {holders}")
    return [*kinds, GUIDANCE["cfg"]] if "method" in _options(kinds[-1]) else kinds


def guidance_field(name: str, key: str) -> tuple[int, str]:
    """(depth, option) of a setting: "low" is the outermost method's that has such an option, "method.scale" one of the
    method inside."""
    *inwards, option = key.split(".")
    kinds = guidance_kinds(name)
    depths = [len(inwards)] if inwards else range(len(kinds))
    for depth in depths if set(inwards) <= {"method"} else []:
        if depth < len(kinds) and option != "method" and option in _options(kinds[depth]):
            return depth, option
    names = {option for kind in kinds for option in _options(kind)} - {"method"}
    raise UserError(unknown(f"option of guidance {name!r}", key, names))


def takes_scale(name: str) -> bool:
    """Whether a scale means something to the method."""
    kinds = guidance_kinds(name)
    return kinds[-1] is not GUIDANCE["none"] and any("scale" in _options(kind) for kind in kinds)


def _options(method: Callable[..., Guidance]) -> Collection[str]:
    return inspect.signature(method).parameters


def sampler_named(name: str) -> Step:
    return member("sampler", name, SAMPLERS)


def reward_named(reward: Rewards, gradient: bool = True) -> WeightedSum:
    """The rewards as one weighted sum, loaded: of ["NAME=WEIGHT", ...] or {name: weight}; a reward itself is a sum of
    one, under its class's name. Raises RewardError or UserError as `reward_weights` does."""
    weights = reward_weights(reward, gradient)
    if isinstance(reward, Sequence | Mapping):
        return weighted(weights)
    name = type(reward).__name__
    return reward if isinstance(reward, WeightedSum) else WeightedSum({name: reward}, {name: 1.0})


def reward_weights(reward: Rewards, gradient: bool = False) -> dict[str, float]:
    """The weights by name, if all are known, and differentiable if a `gradient` is needed; nothing is loaded. A reward
    itself has no name: {}."""
    if not isinstance(reward, Sequence | Mapping):
        if gradient:
            _refuse(type(reward).__name__, reward.differentiable)
        return {}
    weights = dict(reward) if isinstance(reward, Mapping) else parse_rewards(reward)
    for name in weights:
        able = entry(name).differentiable
        if gradient:
            _refuse(name, able)
    return weights


def _refuse(name: str, able: bool) -> None:
    if not able:
        names = ", ".join(sorted(name for name, entry in REWARDS.items() if entry.differentiable))
        raise UserError(f"reward {name!r} is not differentiable, and its gradient is needed: choose of {names}")


def member(kind: str, name: str, family: Mapping[str, Thing]) -> Thing:
    return family[known(kind, name, family)]


def known(kind: str, name: str, names: Collection[str]) -> str:
    """The name, if it is known; one sentence with the nearest otherwise."""
    if name not in names:
        raise UserError(unknown(kind, name, names))
    return name


def at_least(least: float, **values: float) -> None:
    """One sentence for the first setting that is less."""
    for name, value in values.items():
        if not value >= least:
            raise UserError(f"{name} is {value}: it must be at least {least}")
