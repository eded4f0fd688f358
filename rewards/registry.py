"""Rewards by name: what a user must know of each, and how to load it.

Listing imports nothing heavy: an entry names its class as "module:Class" (`rewards.catalogue`), and `load` imports it.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlsplit

from rewards.catalogue import CATALOGUE
from rewards.catalogue import Entry as Entry
from rewards.errors import NotFetched, RewardError

if TYPE_CHECKING:
    from torch import Tensor

Make = TypeVar("Make", bound="Callable[..., Reward]")
GROUP = "difftune.rewards"  # of entry points
OF_ALL = ("batch_size", "gradient_checkpointing")  # options that `load` adds to those of the reward


class Reward(Protocol):
    """Scores images. `differentiable` says whether a gradient reaches the pixels."""

    @property
    def differentiable(self) -> bool: ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1] and B prompts -> scores (B,) float32; a gradient only if differentiable."""


REWARDS: dict[str, Entry] = dict(CATALOGUE)  # and what is registered


def register(name: str, summary: str, **facts: Any) -> Callable[[Make], Make]:
    """Puts a reward of your own into `REWARDS`; `facts` are the other fields of `Entry`.

    >>> @register("red", "mean of the red channel", needs_prompt=False, differentiable=True, range=(0, 1))
    ... class Red: ...
    """

    def add(make: Make) -> Make:
        if name in REWARDS:
            raise RewardError(f"there is a reward {name!r} already: choose another name")
        REWARDS[name] = Entry(make, summary, **facts)
        return make

    return add


def load(name: str, batch_size: int | None = None, gradient_checkpointing: bool = False, **options: Any) -> Reward:
    """The reward of that name, or of "module:attribute" (`rewards.outside`); options may stand in the name (`spelled`).

    With `batch_size`, so many images are scored at a time; with `gradient_checkpointing`, each of these parts is scored
    again in the backward pass, so that no more than one part's graph is in memory. Neither changes a score. Raises
    ValueError, in one sentence, for a name or an option that is not known, and for one that is missing.
    """
    plain, written = spelled(name)
    make, options = imported(entry(plain).make), written | options
    known = inspect.signature(make).parameters
    parts = {"batch_size": batch_size, "gradient_checkpointing": gradient_checkpointing}
    parts |= {option: options.pop(option) for option in OF_ALL if option in options and option not in known}
    reward = _made(name, make, fitting(plain, make, options))
    if parts["batch_size"] is None and not parts["gradient_checkpointing"]:
        return reward
    batched: Callable[..., Reward] = imported("rewards.wrappers.batched:Batched")
    return batched(reward, **parts)


def _made(name: str, make: Callable[..., Reward], options: dict[str, Any]) -> Reward:
    try:
        return make(**options)
    except NotFetched as error:
        command = f"difftune rewards prefetch {shlex.quote(name)}"
        raise NotFetched(f"reward {name!r}: {error}; run `{command}` with a network first") from error


def fitting(name: str, make: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """`options`, if they are what `make` takes. Raises ValueError for one that is not known or is missing."""
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known:
            raise RewardError(unknown(f"option of reward {name!r}", option, known))
    for option, about in known.items():
        if about.default is about.empty and option not in options:
            raise RewardError(f"reward {name!r} needs the option {option!r}: write {name}[{option}=...]")
    return options


def spelled(name: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of "name[key=value, key=value]", as the command line has them.

    A value is a Python literal (a number, a list, quoted text) or else the text itself, which may have options of its
    own: "smooth[reward=vlm[model=x, yes=y], shifts=4]". Raises ValueError for an option without "=", and for brackets
    that do not close.
    """
    plain, bracket, inside = name.partition("[")
    if not bracket or not name.endswith("]"):
        return name, {}
    pairs = [pair.partition("=") for pair in _options(inside[:-1])]
    for key, equals, value in pairs:
        if not equals:
            raise RewardError(f"cannot read {key!r} in {name!r}: options are KEY=VALUE, as in jpeg[quality=40]")
        if _open(value):
            raise RewardError(f"the brackets of {value[:80]!r} in {name[:80]!r} do not close")
    keys = [key.strip() for key, _, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise RewardError(f"the option {twice[0][:80]!r} is given twice in {name[:80]!r}: give it once")
    return plain, {key.strip(): _literal(value) for key, _, value in pairs}


def _options(inside: str) -> list[str]:
    """The text between the brackets, divided at each comma before KEY=, except one in brackets further in."""
    first, *rest = re.split(r"(,\s*)(?=\w+=)", inside)
    options = [first]
    for comma, option in zip(rest[::2], rest[1::2], strict=True):
        if _open(options[-1]):
            options[-1] += comma + option
        else:
            options.append(option)
    return options


def _open(text: str) -> bool:
    """Whether brackets are open at its end, except those in quoted text."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", text)
    return bare.count("[") != bare.count("]")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def entry(name: str) -> Entry:
    """What is known of a reward. Raises ValueError, in one sentence that names the nearest, for an unknown name.

    A name that is not there may be another distribution's (an entry point), "module:attribute", or the URL of a server.
    A reward that is made of another, as "smooth[reward=pickscore]", has the other's facts; one that is many, as
    "pyiqa[metric=musiq]", those of the one that is named.
    """
    name, options = spelled(name)
    if name.startswith(("http://", "https://")):
        _check_url(name)
        return replace(REWARDS["remote"], make=partial(imported("rewards.network.remote:Remote"), name))
    if name not in REWARDS and ":" in name:
        return imported("rewards.outside:described")(name)
    if name not in REWARDS:
        plugins()
    if name not in REWARDS:
        raise RewardError(unknown("reward", name, REWARDS))
    found = REWARDS[name]
    return imported(found.of_options)(found, options) if found.of_options else _wrapping(found, options)


def _wrapping(outer: Entry, options: dict[str, Any]) -> Entry:
    """The entry of a reward that is made of another: what is known of that one, made by the outer."""
    if not outer.wraps or not isinstance(options.get("reward"), str):
        return outer
    inner, name = entry(options["reward"]), options["reward"]
    return replace(inner, make=outer.make, fetch=outer.fetch, wraps=True, summary=f"smooth {name}: {inner.summary}")


def stated(name: str) -> tuple[Entry, bool]:
    """What is known of a reward where no code of a person's own is called: `entry`, but that a "module:attribute" which
    does not say so is not tried for a gradient. The flag tells whether its `differentiable` is known."""
    plain, _ = spelled(name)
    if plain in REWARDS or ":" not in plain or plain.startswith(("http://", "https://")):
        return entry(name), True
    found: tuple[Entry, bool] = imported("rewards.outside:stated")(plain)  # type: ignore[assignment]
    return found


def _check_url(url: str) -> None:
    try:
        host = urlsplit(url).hostname if urlsplit(url).port != 0 and url.isprintable() and " " not in url else None
    except ValueError:  # brackets that are not closed, or a port that is none
        host = None
    if not host:
        raise RewardError(f"{url[:200]!r} is not an address of a reward server: write http://HOST:PORT")


@cache
def plugins() -> tuple[str, ...]:
    """Loads the entry points of other distributions, once; one sentence for each that fails.

    An entry point of the group `difftune.rewards` names a module, or something in one, whose import calls `register`.
    """
    return tuple(why for point in entry_points(group=GROUP) if (why := _failure(point)))


def _failure(point: EntryPoint) -> str:
    try:
        point.load()
    except Exception as error:  # another distribution's: whatever it raises must not take the others along
        whose = point.dist.name if point.dist else "a distribution"
        return f"reward {point.name!r} of {whose} cannot be loaded: {type(error).__name__}: {error}"
    return ""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for a name that is not known: the name, the nearest one and all that there are."""
    names = sorted(known)
    near = [each for each in names if _spelt(each) == _spelt(name)] or difflib.get_close_matches(name, names, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return f"no {kind} {name!r}{guess}; known: {', '.join(names[:MOST]) or 'none'}{more}"


MOST = 60  # names in one sentence


def _spelt(name: str) -> str:
    """A name as it is compared: CFG++ is cfgpp, and best_of_n is best-of-n."""
    return name.lower().replace("+", "p").replace("-", "").replace("_", "")


def imported(make: str | Callable[..., Any]) -> Callable[..., Any]:
    """What "module:attribute" names."""
    if callable(make):
        return make
    module, attribute = make.split(":")
    return vars(import_module(module))[attribute]
