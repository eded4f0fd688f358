"""Rewards that the registry does not know: "module:attribute", or a plain callable of images and prompts."""

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.errors import RewardError
from rewards.registry import Entry, imported


@dataclass(frozen=True)
class Plain:
    """A function of images and prompts as a reward; its scores are made float32."""

    function: Callable[[Tensor, Sequence[str]], Tensor]
    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        try:
            scores = self.function(images, prompts)
        except (TypeError, AttributeError) as error:  # of a function of pictures of PIL, or of other arguments
            raise RewardError(f"the reward {self._name} failed, {type(error).__name__}: {error}; {FORM}") from error
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            shape = f"a tensor {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise RewardError(
                f"the reward {self._name} gives {shape} for {len(images)} image{'s' * (len(images) > 1)}; {FORM}"
            )
        return scores.float()

    @property
    def _name(self) -> str:
        return named(self.function)


def named(function: Any) -> str:
    """The name of a function or of an object's class, in quotes."""
    return repr(function.__name__ if inspect.isroutine(function) else type(function).__name__)


FORM = (
    "a reward is a function of images, a tensor (B, 3, H, W) in [0, 1], and a list of B prompts, and gives a tensor "
    "(B,), as in: def red(images, prompts): return images[:, 0].mean((1, 2))"
)


def plain(function: Callable[[Tensor, Sequence[str]], Tensor]) -> Plain:
    """The function as a reward. It is differentiable if `function.differentiable` says so; if it says nothing, it is
    tried on one picture of noise, with the prompt "a red circle". Raises ValueError, which shows the right form, for
    other arguments than images and prompts, and for scores that are not (B,)."""
    check_arguments(function)
    if "differentiable" in dir(function):
        return Plain(function, bool(function.differentiable))  # type: ignore[attr-defined]
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return Plain(function, Plain(function, True)(images, ["a red circle"]).requires_grad)


def check_arguments(function: Callable[..., Any]) -> None:
    """Raises ValueError for a function that cannot be called with images and prompts."""
    try:
        inspect.signature(function).bind("images", "prompts")
    except TypeError as error:
        of = named(function)
        raise RewardError(f"the reward {of} cannot be called with images and prompts ({error}); {FORM}") from error
    except ValueError:  # a function of C, which does not say what it takes
        return


@cache
def described(name: str) -> Entry:
    """The entry of "module:attribute": a class, which is made with the options, or any callable of (images, prompts).

    Modules of the working directory are found too. Raises RewardError if there is no such module or attribute, or if it
    is not a reward: a callable is called, as `plain` says.
    """
    told, known = stated(name)
    if known:
        return told
    try:
        reward = plain(imported(told.make))
    except RewardError:
        raise
    except Exception as error:  # whatever a function of somebody else's raises
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RewardError(f"{name!r} is not a reward: called with one image and its prompt, it raised {why}") from error
    return replace(told, make=lambda: reward, differentiable=reward.differentiable)


def stated(name: str) -> tuple[Entry, bool]:
    """What "module:attribute" says of itself without being called, and whether it says that it is differentiable.

    `make` of a callable that does not is the callable itself. Raises RewardError as `described` does.
    """
    thing = _found(name)
    summary = ((inspect.getdoc(thing) or "").strip() or "a reward of your own").splitlines()[0]
    anything = (float("-inf"), float("inf"))
    if isinstance(thing, type):
        return Entry(thing, summary, True, _stated(thing, name), anything, licence="unknown"), True
    if not callable(thing):
        raise RewardError(f"{name!r} is not a reward: it cannot be called with images and prompts")
    check_arguments(thing)
    if "differentiable" not in dir(thing):
        return Entry(thing, summary, True, False, anything, licence="unknown"), False
    reward = plain(thing)
    return Entry(lambda: reward, summary, True, reward.differentiable, anything, licence="unknown"), True


def _stated(kind: type, name: str) -> bool:
    """What a class says of all its objects."""
    found = inspect.getattr_static(kind, "differentiable", None)
    if not isinstance(found, bool):
        raise RewardError(f"the class {name!r} is not a reward: write `differentiable = True`, or False, in its body")
    return found


def _found(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if module.endswith(".py") or not all(part.isidentifier() for part in module.split(".")):
        example = f"{Path(module).stem}:{attribute}" if module.endswith(".py") and attribute else "my_rewards:red"
        raise RewardError(f"cannot read the reward {name!r}: write MODULE:ATTRIBUTE, as in {example}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look there
    try:
        found = vars(import_module(module))
    except ImportError as error:
        where = f"; {module}.py belongs in this folder, {os.getcwd()}" if not find_spec(module.split(".")[0]) else ""
        raise RewardError(f"cannot import the reward {name!r}: {error}{where}") from error
    if attribute not in found:
        raise RewardError(f"the module {module!r} has no {attribute!r}, which the reward {name!r} names")
    return found[attribute]
