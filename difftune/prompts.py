"""Training prompts: a pure function of an index, so that a resumed run goes on with exactly the next one."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from difftune.errors import UserError

Prompts = Callable[[int], str]  # index -> prompt
Item = TypeVar("Item")


def prompts_named(name: str, seed: int = 0) -> Prompts:
    """The prompts of a text file, one per line, or the built-in ones: "shapes".

    Raises UserError, in one sentence, for a file that is absent, unreadable or without a prompt.
    """
    return shapes(seed) if name == "shapes" else listed(read(name), seed)


def shapes(seed: int = 0) -> Prompts:
    """Random captions of the world of shapes, all categories alike, without the contents that ShapeEval holds out."""
    from rewards.shapes import CATEGORIES, content, draw_caption, held_out

    def draws(index: int) -> Iterator[str]:
        rng = np.random.default_rng([seed, index])
        while True:
            caption = draw_caption(rng, str(rng.choice(CATEGORIES)))
            if content(caption) not in held_out():
                yield str(caption)

    return lambda index: next(draws(index))


def listed(prompts: list[Item], seed: int = 0) -> Callable[[int], Item]:
    """Each prompt, or whatever the items are, once per epoch, in an order that is drawn anew for every epoch."""
    if not prompts:
        raise UserError("the list of prompts is empty: give at least one")

    @cache
    def order(epoch: int) -> list[int]:
        return np.random.default_rng([seed, epoch]).permutation(len(prompts)).tolist()

    return lambda index: prompts[order(index // len(prompts))[index % len(prompts)]]


def read(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts of {str(path)!r}: give a UTF-8 text file, or 'shapes'") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"{path} has no prompt: write one on each line")
    return prompts
