"""Whole files and whole folders: each is complete under its name, or not there.

What is being written lies beside its place as `.NAME.XXXXXXXX.partial`, is flushed to the disk, and is renamed. A
folder that takes another's place puts that aside as `.NAME.XXXXXXXX.old` for a moment. A process that was killed leaves
such names. All functions raise OSError where the disk refuses.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL, OLD = "partial", "old"


def beside(path: Path, kind: str = PARTIAL) -> Path:
    """A temporary name in the path's folder, unlike any other."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place to write a file at, which takes the place of `path` at the end; after an exception nothing has changed.

    It bears the name of `path`, in a temporary folder: loaders look at every file beside it. The file gets the mode
    that the umask allows, whoever wrote it.
    """
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
    """Write a whole file, and make its folder where there is none."""
    with whole_file(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def whole_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `path` at the end, or is removed after an exception.

    Its files get the modes that the umask allows, whoever wrote them. replace: False keeps a folder that another
    process has put there meanwhile, which is as good and may be in use.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(path)
    partial.mkdir()
    try:
        yield partial
        for inner in (*partial.rglob("*"), partial):
            settle(inner, mode_in(partial))
        if replace:
            replace_folder(partial, path)
        else:
            settle_first(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def settle_first(new: Path, path: Path) -> None:
    """Rename a folder to `path`, unless one is there."""
    try:
        os.rename(new, path)
    except OSError:
        if not path.is_dir():
            raise
    flush(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, which leaves its name at once, and the disk after that."""
    if path.is_dir() and not path.is_symlink():
        doomed = path if path.name.endswith(f".{PARTIAL}") else path.rename(beside(path))
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until what was written to a file, or into a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
