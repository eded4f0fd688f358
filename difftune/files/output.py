"""Whole files and whole folders, by `guidance.files`, with DiskError, one sentence, where the disk refuses.

A process that was killed leaves temporary names, and `sweep` clears them up: a partial one goes, and an old one comes
back where nothing took its place.
"""

import io
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError

from difftune.errors import DiskError
from guidance import files
from guidance.files import OLD, PARTIAL, beside, flush

__all__ = ["beside", "flush"]

TEMPORARY = re.compile(rf"\.(.+)\.[0-9a-f]{{8}}\.({PARTIAL}|{OLD})")


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Around what writes the file or the folder `path`: DiskError, in one sentence, if the disk refuses."""
    try:
        yield
    except DiskError:
        raise
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise DiskError(f"cannot write {path}: {why}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """`guidance.files.whole_file`. Raises DiskError where the disk refuses."""
    with written(path), files.whole_file(path) as partial:
        yield partial


def write(path: Path, data: bytes | str) -> None:
    """Write a whole file, and make its folder where there is none. Raises DiskError where the disk refuses."""
    with written(path):
        files.write(path, data)


def as_json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def write_json(path: Path, value: Any) -> None:
    write(path, as_json(value))


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """`guidance.files.whole_folder`. Raises DiskError where the disk refuses."""
    with written(path), files.whole_folder(path) as partial:
        yield partial


def remove(path: Path) -> None:
    """Remove a file or a folder, which leaves its name at once, and the disk after that. DiskError where it refuses."""
    with written(path):
        files.remove(path)


def sweep(folder: Path) -> None:
    """Clear up what writers that were killed left in a folder which no other process writes."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = TEMPORARY.fullmatch(path.name)
        if found and found[2] == OLD and not (folder / found[1]).exists():
            with written(folder):
                os.rename(path, folder / found[1])
        elif found:
            remove(path)


def append(path: Path, line: bytes | str) -> None:
    """Add a line to a file and wait for the disk. DiskError if that fails: the file is then as it was."""
    with written(path), path.open("ab", buffering=0) as file:
        append_to(file.fileno(), (line.encode() if isinstance(line, str) else line) + b"\n")


def append_to(descriptor: int, data: bytes) -> None:
    """Add whole lines to an open file and wait for the disk. OSError if that fails: the file is then as it was."""
    size = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError("the disk is full")
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def png(image: Any) -> bytes:
    """A picture (H, W, 3) in [0, 1] as PNG."""
    buffer = io.BytesIO()
    _picture(image).save(buffer, format="PNG")
    return buffer.getvalue()


def grid(images: Sequence[Any], columns: int | None = None, gap: int = 2) -> bytes:
    """Pictures (H, W, 3) of one size in rows of `columns`, as PNG."""
    pictures = [_picture(image) for image in images]
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].width + gap, pictures[0].height + gap
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _picture(image: Any) -> Image.Image:
    return Image.fromarray((image * 255).round().astype("uint8"))
