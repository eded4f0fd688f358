"""Rewards that the registry does not know: "module:attribute", or a plain callable of images and prompts."""

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rewards.errors import RewardError
from rewards.registry import Entry


@dataclass(frozen=True)
class Plain:
    """A function of images and prompts as a reward; its scores are made float32."""

    function: Callable[[Tensor, Sequence[str]], Tensor]
    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts).float()


def plain(function: Callable[[Tensor, Sequence[str]], Tensor]) -> Plain:
    """The function as a reward. It is differentiable if `function.differentiable` says so; where it says nothing, it is
    tried on one picture of noise, with the prompt "a red circle". Raises ValueError for scores that are not (B,)."""
    if "differentiable" in dir(function):
        return Plain(function, bool(function.differentiable))  # type: ignore[attr-defined]
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = function(images, ["a red circle"])
    if not isinstance(scores, Tensor) or scores.shape != (1,):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise RewardError(f"a reward gives scores (B,) for B images, not {shape} for one image")
    return Plain(function, scores.requires_grad)


@cache
def described(name: str) -> Entry:
    """The entry of "module:attribute": a class, which is made with the options, or any callable of (images, prompts).

    Modules of the working directory are found too. Raises ValueError if there is no such module or attribute, or if it
    is no reward.
    """
    thing = _found(name)
    summary = (inspect.getdoc(thing) or "a reward of your own").splitlines()[0]
    anything = (float("-inf"), float("inf"))
    if isinstance(thing, type):
        return Entry(thing, summary, True, _stated(thing, name), anything, licence="unknown")
    if not callable(thing):
        raise RewardError(f"{name!r} is no reward: it cannot be called with images and prompts")
    reward = plain(thing)
    return Entry(lambda: reward, summary, True, reward.differentiable, anything, licence="unknown")


def _stated(kind: type, name: str) -> bool:
    """What a class says of all its objects."""
    found = inspect.getattr_static(kind, "differentiable", None)
    if not isinstance(found, bool):
        raise RewardError(f"the class {name!r} is no reward: write `differentiable = True`, or False, in its body")
    return found


def _found(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module.split(".")):
        raise RewardError(f"cannot read the reward {name!r}: write MODULE:ATTRIBUTE, as in my_rewards:red")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look there
    try:
        found = vars(import_module(module))
    except ImportError as error:
        raise RewardError(f"cannot import the reward {name!r}: {error}") from error
    if attribute not in found:
        raise RewardError(f"the module {module!r} has no {attribute!r}, which the reward {name!r} names")
    return found[attribute]
