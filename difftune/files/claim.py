"""A folder belongs to one run at a time: made and tried before the work, and locked while it is written.

The lock file is there for as long as a run is not done. It tells the process that holds it, and the names of the files
that are only whole together: a run that fails removes them, and the next run removes those of one that was killed.
Removing the lock file is the last thing that a run does.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difftune.errors import UserError
from difftune.files.output import append_to, remove, sweep, write, written

LOCK = ".difftune.lock"


@dataclass
class Claim:
    """A folder that this process alone writes, until `claimed` ends."""

    path: Path
    descriptor: int  # of the lock file
    noted: list[str] = field(default_factory=list)  # names that are removed unless the run ends
    ended: bool = False  # whether a run that was killed had come to its end: all it had to write is there

    def held(self) -> list[str]:
        """The names in the folder, without the lock."""
        return sorted(path.name for path in self.path.iterdir() if path.name != LOCK)

    def note(self, *names: str) -> None:
        """Note names that will be written: those that are not there yet are removed unless the run ends."""
        new = [name for name in names if name not in self.noted and not (self.path / name).exists()]
        if new:
            self._tell({"writes": new})
            self.noted += new

    def keep(self, *names: str) -> None:
        """Keep what was written under these names, or all of it, if the run fails: it can go on from there."""
        kept = set(names or self.noted) & set(self.noted)
        self.noted = [name for name in self.noted if name not in kept]  # even if the disk is full
        if kept:
            self._tell({"keeps": sorted(kept)})

    def clear(self) -> None:
        """Remove what was noted: the run begins anew."""
        for name in self.noted:
            remove(self.path / name)
        self.keep()

    def end(self, *needless: str) -> None:
        """Say that all is written, then remove what was needed until then."""
        self._tell({"ends": list(needless)})
        self.noted.clear()
        for name in needless:
            remove(self.path / name)

    def write(self, name: str, data: bytes | str) -> None:
        """Note a file and write it whole."""
        self.note(name)
        write(self.path / name, data)

    def results(self, files: Iterable[tuple[str, bytes | str]]) -> None:
        """Write the files that are only whole together."""
        found = list(files)
        self.note(*(name for name, _ in found))
        for name, data in found:
            write(self.path / name, data)

    def _tell(self, about: dict[str, Any]) -> None:
        with written(self.path):
            append_to(self.descriptor, json.dumps(about).encode() + b"\n")


@contextmanager
def claimed(folder: str | Path) -> Iterator[Claim]:
    """The folder, made if there is none, tried, locked and swept.

    Raises UserError if it cannot be made or written, or if another process has it, which it names. After an
    exception the files that were noted are removed, and the folder too if it was made here and is now empty.
    """
    if not str(folder).strip():
        raise UserError("the output folder has no name: give --output_dir one")
    path = Path(folder)
    made = _made(path)
    try:
        with _locked(path) as claim:
            sweep(path)
            yield claim
    except BaseException:
        for parent in made:
            with suppress(OSError):  # it holds something
                parent.rmdir()
        raise


@contextmanager
def fresh(folder: str | Path) -> Iterator[Claim]:
    """`claimed`, for a command that writes all its files at its end: nothing of another run is ever overwritten.

    Raises UserError if the folder holds anything but what a killed run of such a command left.
    """
    with claimed(folder) as claim:
        claim.clear()
        if held := claim.held():
            raise UserError(f"{folder} holds another run ({held[0]}): nothing was written, choose another --output_dir")
        yield claim


def _made(path: Path) -> list[Path]:
    """Make the folder. Returns it and its parents, so far as they were not there, the innermost first."""
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: choose another --output_dir")
        missing = [parent for parent in (path, *path.parents) if not parent.exists()]
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, UserError) else _refused(path, error) from error
    return missing


@contextmanager
def _locked(path: Path) -> Iterator[Claim]:
    """The folder under a lock file, which is removed at the end unless what was noted could not be."""
    descriptor = _lock(path)
    needless = _needless(path)
    claim = Claim(path, descriptor, _noted(path), needless is not None)
    try:
        try:
            claim._tell({"pid": os.getpid(), "host": socket.gethostname()})
            for name in needless or ():
                remove(path / name)
            yield claim
        except BaseException:
            with suppress(OSError):
                claim.clear()
                os.unlink(path / LOCK)
            raise
        with written(path):
            (path / LOCK).unlink(missing_ok=True)  # what was noted is whole once it is gone
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int:
    """The folder's lock file, open and locked; made if there is none."""
    while True:
        try:
            descriptor = os.open(path / LOCK, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise _refused(path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise UserError(f"{path} is in use by {_holder(path)}: wait, or choose another --output_dir") from error
            raise _refused(path, error) from error
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # its holder ended between our two calls, and removed it


def _refused(path: Path, error: Exception) -> UserError:
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return UserError(f"cannot write to {str(path)!r}: {why}; choose another --output_dir")


def _told(path: Path) -> list[dict[str, Any]]:
    """The records in the folder's lock file; a torn line is left out."""
    found: list[Any] = []
    for line in (path / LOCK).read_bytes().split(b"\n"):
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def _noted(path: Path) -> list[str]:
    """The names that a killed run noted last, plain ones alone: nothing outside the folder is ever removed."""
    names: list[str] = []
    for line in _told(path):
        kept = names if "ends" in line else line.get("keeps", [])
        names = [name for name in (*names, *line.get("writes", [])) if name not in kept]
    return _plain(names)


def _needless(path: Path) -> list[str] | None:
    """The names that a run which was killed at its end had still to remove; None if it was killed before."""
    said = [line for line in _told(path) if "pid" not in line]
    return _plain(said[-1]["ends"]) if said and "ends" in said[-1] else None


def _plain(names: Sequence[Any]) -> list[str]:
    return [name for name in names if isinstance(name, str) and Path(name).name == name]


def _holder(path: Path) -> str:
    """The process that has the lock, as it told by itself."""
    holders = [line for line in _told(path) if "pid" in line]
    if not holders:
        return "another process"
    here = holders[-1].get("host") == socket.gethostname()
    return f"process {holders[-1]['pid']}" + ("" if here else f" on {holders[-1].get('host')}")
