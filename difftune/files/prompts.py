"""Training prompts: a pure function of an index, so that a resumed run goes on with exactly the next one."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from difftune.errors import UserError
from difftune.files.text import read_text
from rewards.registry import unknown

Prompts = Callable[[int], str]  # index -> prompt
Item = TypeVar("Item")


# DDPO's simple animals (https://arxiv.org/abs/2305.13301).
ANIMALS = (
    *("cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion"),
    *("tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale"),
    *("dolphin", "squirrel", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig"),
    *("turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo"),
)
COLUMNS = ("prompt", "text", "caption")  # of a data set, the first of them that it has


def prompts_named(name: str, seed: int = 0) -> Prompts:
    """The prompts of a text file, one per line; of a data set, "dataset:NAME[:COLUMN]"; or built-in ones: "shapes",
    "shapes:CATEGORY", "animals".

    Raises UserError, in one sentence, for a file that is absent, unreadable or without a prompt.
    """
    source, _, rest = name.partition(":")
    if source == "shapes":
        return shapes(seed, rest)
    if source == "dataset":
        return listed(column(rest), seed)
    return listed(ANIMALS if name == "animals" else read_prompts(name), seed)


def shapes(seed: int = 0, category: str = "") -> Prompts:
    """Random captions of the world of shapes, in one category or equally in ShapeEval's six, without the contents that
    the evaluations hold out."""
    from rewards.world.draw import draw_caption, held_out
    from rewards.world.grammar import ALL_CATEGORIES, CATEGORIES, content

    if category and category not in ALL_CATEGORIES:
        raise UserError(unknown("category of shapes", category, ALL_CATEGORIES))

    def draws(index: int) -> Iterator[str]:
        rng = np.random.default_rng([seed, index])
        while True:
            caption = draw_caption(rng, category or str(rng.choice(CATEGORIES)))
            if content(caption) not in held_out():
                yield str(caption)

    return lambda index: next(draws(index))


def listed(prompts: Sequence[Item], seed: int = 0) -> Callable[[int], Item]:
    """Each prompt, or whatever the items are, once per epoch, in an order that is drawn anew for every epoch."""
    if not prompts:
        raise UserError("the list of prompts is empty: give at least one")

    @cache
    def order(epoch: int) -> list[int]:
        return np.random.default_rng([seed, epoch]).permutation(len(prompts)).tolist()

    return lambda index: prompts[order(index // len(prompts))[index % len(prompts)]]


def column(name: str) -> list[str]:
    """The texts of one column of a data set's training split, "NAME" or "NAME:COLUMN"; those that are blank are left
    out.

    NAME: a folder or a file of JSON lines, CSV or Parquet, or a data set of the hub. COLUMN: "prompt", "text" or
    "caption" if unsaid. Raises UserError, in one sentence, if there is none, or if `datasets` is not installed.
    """
    where, _, wanted = name.partition(":")
    found = open_data_set(where, f"prompts 'dataset:{name}'")
    chosen = wanted or next((c for c in COLUMNS if c in found.column_names), "")
    if chosen not in found.column_names:
        raise UserError(
            f"data set {where!r} has no column {wanted or COLUMNS!r}: it has {', '.join(found.column_names)}"
        )
    texts = [str(text).strip() for text in found[chosen] if text is not None]
    prompts = [text for text in texts if text]
    if not prompts:
        raise UserError(f"column {chosen!r} of data set {where!r} has no prompt")
    return prompts


def open_data_set(where: str, what: str) -> Any:
    """The training split of a data set: a name on the Hub, a folder, or a file. UserError if it cannot be loaded, or if
    `datasets` is not installed, which `what` needs."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{what} need the library datasets: pip install 'difftune[datasets]'") from error
    kind = FORMATS.get(Path(where).suffix)
    try:
        files = {"path": kind, "data_files": where} if kind else {"path": where}
        return datasets.load_dataset(**files, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load the data set {where!r}: {reason}") from error


FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_prompts(path: str | Path, instead: str = "shapes") -> list[str]:
    """The lines of a text file that are not blank. instead: a name that may be given in the file's place."""
    try:
        lines = [line.strip() for line in read_text(path, "the prompts of").split("\n")]
    except UserError as error:
        raise UserError(f"cannot read the prompts of {str(path)!r}: give a UTF-8 text file, or {instead!r}") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"{path} has no prompt: write one on each line")
    return prompts
