"""What settings name, as objects: one sentence for every name or option that is not known."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import is_dataclass, replace
from importlib import import_module
from typing import Any, TypeVar

from difftune.errors import UserError
from guidance.contract import Guidance
from guidance.methods.catalogue import GUIDANCE
from rewards.compose import WeightedSum, parse_rewards, weighted
from rewards.outside import Plain, plain
from rewards.registry import REWARDS, Reward, entry, unknown
from rewards.wrappers.frames import OverFrames
from solvers.samplers.catalogue import SAMPLERS, Step

Thing = TypeVar("Thing")
# one NAME=WEIGHT term or several, weights by name, or a reward itself
Rewards = str | Sequence[str] | Mapping[str, float] | Reward


def guidance_named(name: str, scale: float | None = None, options: Mapping[str, Any] | None = None) -> Guidance:
    """The method with its options, of which `scale` is one and wins; "interval:apg" is APG in an Interval, and
    "module:Class" a method of one's own."""
    kinds = guidance_kinds(name)
    settings: list[dict[str, Any]] = [{} for _ in kinds]
    for key, value in {**(options or {}), **({} if scale is None else {"scale": scale})}.items():
        depth, option = guidance_field(name, key)
        settings[depth][option] = value
    method = kinds[-1](**settings[-1])
    for kind, given in zip(kinds[-2::-1], settings[-2::-1], strict=True):
        method = kind(method=method, **given)
    return method


def method_of(config: Any) -> Guidance:
    """The method that a Config names by `guidance`, `guidance_scale` and `guidance_options`."""
    return guidance_named(config.guidance, config.guidance_scale, config.guidance_options)


def guidance_kinds(name: str) -> list[Callable[..., Guidance]]:
    """The methods of a name from the outside inwards; one that holds another and names none holds CFG."""
    parts = _parts(name)
    kinds = [_own_method(part) if ":" in part else member("guidance method", part, GUIDANCE) for part in parts]
    for part, kind in zip(parts[:-1], kinds, strict=False):
        if "method" not in _options(kind):
            holders = ", ".join(n for n, k in GUIDANCE.items() if "method" in _options(k))
            raise UserError(f"in {name!r}, {part} can hold no other method; these can: {holders}")
    return [*kinds, GUIDANCE["cfg"]] if "method" in _options(kinds[-1]) else kinds


def _parts(name: str) -> list[str]:
    """The methods that a name names: "interval:mine:Fading" is interval, and the class Fading of the module mine."""
    parts: list[str] = []
    words = name.split(":")
    while words:
        word = words.pop(0)
        parts.append(f"{word}:{words.pop(0)}" if word not in GUIDANCE and words and _is_module(word) else word)
    return parts


def _is_module(name: str) -> bool:
    """Whether a module of that name can be imported, of the working folder too."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look there
    try:
        return all(part.isidentifier() for part in name.split(".")) and importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _own_method(name: str) -> Callable[..., Guidance]:
    """The class that "module:Class" names. UserError for what is not a guidance method."""
    module, _, attribute = name.partition(":")
    found = vars(import_module(module))
    if attribute not in found:
        raise UserError(f"the module {module!r} has no {attribute!r}, which the guidance {name!r} names")
    kind = found[attribute]
    if not (isinstance(kind, type) and is_dataclass(kind) and {"guide", "space"} <= set(dir(kind))):
        raise UserError(
            f'{name!r} is not a guidance method: write a frozen dataclass with space = "any" and a generator '
            "guide(self, path, at), as docs/guides/your-guidance.md shows"
        )
    made: Any = kind
    return made


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
    """The rewards as one weighted sum, loaded: of "NAME=WEIGHT", several of them, or {name: weight}; a reward itself is
    a sum of one, under the name of its function or class. Raises RewardError or UserError as `reward_weights` does."""
    if isinstance(reward, Sequence | Mapping):
        return weighted(reward_weights(reward, gradient))
    own = _own_reward(reward)
    reward_weights(own, gradient)
    name = _name_of(reward)
    return own if isinstance(own, WeightedSum) else WeightedSum({name: own}, {name: 1.0})


def _own_reward(reward: Any) -> Reward:
    """A reward as it is given; a function, and what does not say whether it is differentiable, is checked and tried."""
    if inspect.isroutine(reward) or "differentiable" not in dir(reward):
        return plain(reward)
    own: Reward = reward
    return own


def _name_of(reward: Any) -> str:
    reward = reward.function if isinstance(reward, Plain) else reward
    return str(reward.__name__) if inspect.isroutine(reward) else type(reward).__name__


def over_frames(reward: Any, config: Any) -> Any:
    """The reward of the films of a training: each member of the sum is the mean over `config.reward_frames` of their
    frames. The reward itself where `config.num_frames` is 1."""
    if config.num_frames == 1:
        return reward
    named = reward_named(reward, gradient=False)
    return replace(named, rewards={n: OverFrames(r, config.reward_frames) for n, r in named.rewards.items()})


def reward_weights(reward: Rewards, gradient: bool = False) -> dict[str, float]:
    """The weights by name, if all are known, and differentiable if a `gradient` is needed; nothing is loaded. A reward
    itself has no name: {}."""
    if not isinstance(reward, Sequence | Mapping):
        if gradient:
            _refuse(_name_of(reward), _own_reward(reward).differentiable)
        return {}
    terms = [reward] if isinstance(reward, str) else reward
    weights = dict(terms) if isinstance(terms, Mapping) else parse_rewards(terms)
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
