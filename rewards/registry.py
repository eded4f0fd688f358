"""Rewards by name: what a user must know of each, and how to load it.

Listing imports nothing heavy: an entry names its class as "module:Class", and `load` imports it.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Make = TypeVar("Make", bound="Callable[..., Reward]")


class Reward(Protocol):
    """Scores images. `differentiable` says whether a gradient reaches the pixels."""

    @property
    def differentiable(self) -> bool: ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1] and B prompts -> scores (B,) float32; a gradient only if differentiable."""


@dataclass(frozen=True)
class Entry:
    """What a user must know of a reward before using it."""

    make: str | Callable[..., Reward]  # "module:Class", imported by `load`, or the class itself
    summary: str  # one line
    needs_prompt: bool
    differentiable: bool
    range: tuple[float, float]  # nominal: what to expect, not a bound
    higher_is_better: bool = True
    resolution: int | None = None  # side in pixels of what it looks at; None: as it comes
    preprocessing: str = "none"
    licence: str = "Apache-2.0"  # of the weights, or of the code where there are none
    noncommercial: bool = False
    copyleft: bool = False  # AGPL and the like
    hub_id: str | None = None  # None: computed, or embedded in this package
    revision: str | None = None
    sha256: str | None = None
    memory_mb: int = 0  # of its weights


REWARDS: dict[str, Entry] = {
    "oracle": Entry(
        "rewards.oracle:Oracle",
        "1 if the caption holds of the shapes in the picture, else 0: exact, for evaluation",
        needs_prompt=True,
        differentiable=False,
        range=(0, 1),
        resolution=64,
        preprocessing="rounded to 8 bits, antialiased bilinear resize",
    ),
    "tiny-clip": Entry(
        "rewards.clip:tiny_clip",
        "cosine between picture and caption, by the embedded CLIP of the world of shapes",
        needs_prompt=True,
        differentiable=True,
        range=(-1, 1),
        resolution=64,
        preprocessing="antialiased bicubic resize of the shorter side, centre crop, the model's mean and std",
        memory_mb=10,
    ),
    "jpeg": Entry(
        "rewards.jpeg:JPEG",
        "size in kB (1000 bytes) of the picture as JPEG; a negative weight asks for compressible pictures",
        needs_prompt=False,
        differentiable=False,
        range=(0.5, 300),
        preprocessing="rounded to 8 bits",
    ),
    "brightness": Entry(
        "rewards.simple:Brightness",
        "distance of the mean pixel from a target, negated",
        needs_prompt=False,
        differentiable=True,
        range=(-1, 0),
    ),
    "colorfulness": Entry(
        "rewards.simple:Colorfulness",
        "how colourful a picture looks, by Hasler and Suesstrunk (2003): 0 gray, 33 moderately, 109 extremely",
        needs_prompt=False,
        differentiable=True,
        range=(0, 150),
    ),
    "saturation": Entry(
        "rewards.simple:Saturation",
        "mean saturation of HSV: 0 gray, 1 pure colours",
        needs_prompt=False,
        differentiable=True,
        range=(0, 1),
    ),
    "contrast": Entry(
        "rewards.simple:Contrast",
        "RMS contrast, the standard deviation of luma: 0 flat, 0.5 black and white in halves",
        needs_prompt=False,
        differentiable=True,
        range=(0, 0.5),
    ),
}


def register(name: str, summary: str, **facts: Any) -> Callable[[Make], Make]:
    """Puts a reward of your own into `REWARDS`; `facts` are the other fields of `Entry`.

    >>> @register("red", "mean of the red channel", needs_prompt=False, differentiable=True, range=(0, 1))
    ... class Red: ...
    """

    def add(make: Make) -> Make:
        if name in REWARDS:
            raise ValueError(f"there is a reward {name!r} already: choose another name")
        REWARDS[name] = Entry(make, summary, **facts)
        return make

    return add


def load(name: str, **options: Any) -> Reward:
    """The reward of that name. Raises ValueError, in one sentence, for a name or an option that is not known."""
    make = _imported(entry(name).make)
    known = list(inspect.signature(make).parameters)
    for option in options:
        if option not in known:
            raise ValueError(unknown(f"option of reward {name!r}", option, known))
    return make(**options)


def entry(name: str) -> Entry:
    """What is known of a reward. Raises ValueError, in one sentence that names the nearest, for an unknown name."""
    if name not in REWARDS:
        raise ValueError(unknown("reward", name, REWARDS))
    return REWARDS[name]


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for a name that is not known: the name, the nearest one and all that there are."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    return f"no {kind} {name!r}{guess}; known: {', '.join(names) or 'none'}"


def _imported(make: str | Callable[..., Reward]) -> Callable[..., Reward]:
    if callable(make):
        return make
    module, attribute = make.split(":")
    return vars(import_module(module))[attribute]
