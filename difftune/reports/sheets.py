"""Sheets of pictures with labels that can be read: rows with names, and a line of text above each cell."""

import io
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 128  # pixels of a picture's shorter side, at least: smaller ones are enlarged without smoothing
GAP = 2  # between the pictures of a cell
MARGIN = 8  # around the sheet
SMALLEST, LARGEST = 12, 24  # sizes of a label, in pixels
NAME, LETTERS, LINES = 18, 28, 6  # of a row's name: its largest size, the letters of a line, and its lines at most
INK, FAINT = "#111827", "#4b5563"


@dataclass(frozen=True)
class Cell:
    """Pictures (H, W, 3) in [0, 1] of one size, in rows of `columns`, and what stands above them."""

    pictures: Sequence[Any]
    caption: str = ""
    columns: int | None = None  # all in one row if not given


def sheet(rows: Iterable[tuple[str, Sequence[Cell | None]]]) -> bytes:
    """The rows, each with its name at the left, as PNG. None leaves a place empty. All cells are of one size."""
    named = [(wrapped(name), cells) for name, cells in rows]
    blocks = [[None if cell is None else block(cell) for cell in cells] for _, cells in named]
    width, height = next(made.size for row in blocks for made in row if made is not None)
    captions = [cell.caption for _, cells in named for cell in cells if cell is not None]
    letters = fitting(captions, width)
    names = font(min(letters.size, NAME), bold=True)
    lines = [line for name, _ in named for line in name.splitlines()]
    left = MARGIN + (round(max(map(names.getlength, lines)) + letters.size) if lines else 0)
    line = round(1.5 * letters.size) if any(captions) else 0
    gap = letters.size
    across, down = max(len(cells) for _, cells in named), len(named)
    whole = (left + across * (width + gap) - gap + MARGIN, down * (line + height + gap) - gap + 2 * MARGIN)
    made = Image.new("RGB", whole, "white")
    pen = ImageDraw.Draw(made)
    for i, (name, cells) in enumerate(named):
        y = MARGIN + i * (line + height + gap)
        pen.text((MARGIN, y + line + height // 2), name, INK, names, anchor="lm")
        for j, (cell, picture) in enumerate(zip(cells, blocks[i], strict=True)):
            if cell is not None and picture is not None:
                x = left + j * (width + gap)
                pen.text((x, y + line // 2), cell.caption, FAINT, letters, anchor="lm")
                made.paste(picture, (x, y + line))
    return as_png(made)


def wrapped(name: str) -> str:
    """A name in lines of LETTERS, and what is beyond LINES of them as an ellipsis."""
    return textwrap.fill(name, LETTERS, max_lines=LINES, placeholder=" ...")


def block(cell: Cell) -> Image.Image:
    """The pictures of a cell side by side, enlarged by a whole number if they are small."""
    pictures = [as_picture(picture) for picture in cell.pictures]
    columns = cell.columns or len(pictures)
    side = min(pictures[0].size)
    factor = max(1, round(SIDE / side))
    width, height = (factor * length for length in pictures[0].size)
    down = -(-len(pictures) // columns)
    made = Image.new("RGB", (columns * (width + GAP) - GAP, down * (height + GAP) - GAP), "white")
    for i, picture in enumerate(pictures):
        large = picture.resize((width, height), Image.Resampling.NEAREST)
        made.paste(large, (i % columns * (width + GAP), i // columns * (height + GAP)))
    return made


def as_picture(array: Any) -> Image.Image:
    return Image.fromarray((np.asarray(array) * 255).round().astype("uint8"))


def as_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def fitting(captions: Sequence[str], width: int) -> ImageFont.FreeTypeFont:
    """The largest font between SMALLEST and LARGEST in which every caption is at most `width` pixels long."""
    for size in range(LARGEST, SMALLEST, -1):
        if all(font(size).getlength(caption) <= width for caption in captions):
            return font(size)
    return font(SMALLEST)


@cache
def font(size: float, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(str(file), size)
