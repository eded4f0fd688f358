"""Whole files and whole folders: each is complete under its name, or not there.

What is being written lies beside its place as `.NAME.XXXXXXXX.partial`, is flushed to the disk, and is renamed. A
folder that takes another's place puts that aside as `.NAME.XXXXXXXX.old` for a moment. A process that was killed leaves
such names, and `sweep` clears them up: a partial one goes, and an old one comes back where nothing took its place.
"""

import io
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError

from difftune.errors import DiskError, UserError

PARTIAL, OLD = "partial", "old"
TEMPORARY = re.compile(rf"\.(.+)\.[0-9a-f]{{8}}\.({PARTIAL}|{OLD})")


def unused(folder: str | Path) -> Path:
    """The folder, if it is absent or empty: nothing of another run is ever overwritten."""
    folder = Path(folder)
    try:
        there = folder.exists()
    except OSError as error:
        raise UserError(f"cannot use {str(folder)[:60]}...: {error.strerror}; choose another --output_dir") from error
    if folder.is_dir() and not any(folder.iterdir()):
        return folder
    if there:
        held = f"holds another run ({min(p.name for p in folder.iterdir())})" if folder.is_dir() else "is a file"
        raise UserError(f"{folder} {held}: nothing was written, choose another --output_dir")
    return folder


def beside(path: Path, kind: str = PARTIAL) -> Path:
    """A temporary name in the path's folder, unlike any other."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


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
    """A place to write a file at, which takes the place of `path` at the end; after an exception nothing has changed.

    It bears the name of `path`, in a temporary folder: loaders look at every file beside it. The file gets the mode
    that the umask allows, whoever wrote it. Raises DiskError if the disk refuses.
    """
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = beside(path)
        partial.mkdir()
        try:
            yield partial / path.name
            settle(partial / path.name, mode_in(partial))
            os.replace(partial / path.name, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        flush(path.parent)


def write(path: Path, data: bytes | str) -> None:
    """Write a whole file, and make its folder if there is none. Raises DiskError if the disk refuses."""
    with whole_file(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def as_json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def write_json(path: Path, value: Any) -> None:
    write(path, as_json(value))


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `path` at the end, or is removed after an exception.

    Its files get the modes that the umask allows, whoever wrote them. Raises DiskError if the disk refuses.
    """
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = beside(path)
        partial.mkdir()
        try:
            yield partial
            for inner in (*partial.rglob("*"), partial):
                settle(inner, mode_in(partial))
            replace_folder(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def mode_in(folder: Path) -> int:
    """The mode of a new file under the umask, which `mkdir` followed when it made the folder."""
    return folder.stat().st_mode & 0o666


def settle(path: Path, mode: int) -> None:
    """Give a file its mode, and wait until it, or what is in a folder, is on the disk."""
    if path.is_file():
        path.chmod(mode)
    flush(path)


def replace_folder(new: Path, path: Path) -> None:
    """Rename a folder to `path`; one that is there is removed once the new one has its place."""
    old = beside(path, OLD)
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)
    flush(path.parent)
    if old.exists():
        remove(old)


def remove(path: Path) -> None:
    """Remove a file or a folder, which leaves its name at once, and the disk after that. DiskError if it refuses."""
    with written(path):
        if path.is_dir() and not path.is_symlink():
            doomed = path if path.name.endswith(f".{PARTIAL}") else path.rename(beside(path))
            shutil.rmtree(doomed)
        else:
            path.unlink(missing_ok=True)


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


def flush(path: Path) -> None:
    """Wait until what was written to a file, or into a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
