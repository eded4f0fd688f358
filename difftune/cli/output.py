"""What commands print: JSON alone, or a table."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

import click

STDOUT = "difftune.stdout"  # where a command's context keeps the standard output, to which `show` alone writes


def show(found: Any, as_json: bool, text: str) -> None:
    """Print the result of the command."""
    if os.environ.get("RANK", "0") == "0":  # only one of the processes that accelerate launched prints
        click.echo(json.dumps(found) if as_json else text, file=click.get_current_context().meta[STDOUT])


def paragraphs(entries: Sequence[Sequence[str]], indent: int = 0) -> str:
    """Names with texts beside them, each text on lines of its own that fit the terminal."""
    column = indent + max(len(name) for name, *_ in entries) + 2
    room = max(24, shutil.get_terminal_size().columns - column)
    lines = []
    for name, *texts in entries:
        broken = [line for text in texts for line in wrap(text, room, break_on_hyphens=False)]
        heads = [" " * indent + name, *[""] * (len(broken) - 1)]
        lines += [f"{head:<{column}}{line}" for head, line in zip(heads, broken, strict=True)]
    return "\n".join(lines)


def table(rows: Sequence[Sequence[str]]) -> str:
    width = max(len(row) for row in rows)
    full = [[*row, *[""] * (width - len(row))] for row in rows]
    columns = [max(map(len, column)) for column in zip(*full, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, columns, strict=True)).rstrip() for row in full)


def planned(lines: Mapping[str, str]) -> str:
    """The lines of a dry run."""
    return paragraphs([(f"{name}:", text) for name, text in lines.items()])


def summary(thing: Any) -> str:
    """The first sentence of the docstring; a colon or a comma before a formula ends it."""
    paragraph = " ".join((thing.__doc__ or "").strip().partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".:,") + "."


def said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value or "not installed")
