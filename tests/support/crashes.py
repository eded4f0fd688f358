"""A process that is killed just before one of its file operations, or whose disk fails from one on, played inside this
one."""

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
BY_PATH = ("replace", "rename", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "chmod", "truncate")
BY_DESCRIPTOR = ("write", "fsync", "ftruncate")


class Killed(BaseException):
    """Nobody catches it, and nothing that is done on the way out reaches the disk."""


FAULTS: dict[str, Callable[[str], BaseException | None]] = {
    "killed": lambda name: Killed(),
    "full": lambda name: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if name in FILLS else None,
    "read-only": lambda name: OSError(errno.EROFS, os.strerror(errno.EROFS)),
}
FILLS = {"open", "fill", "write", "fsync", "mkdir"}  # what a full disk refuses


class Crash:
    """Counts the file operations below a folder; from the k-th on they meet a fault of `FAULTS`."""

    def __init__(self, root: Path, k: int | None, fault: str):
        self.root, self.k, self.fault, self.seen = str(root), k, FAULTS[fault], []

    def step(self, name: str, path: str) -> None:
        """Count an operation that is about to be done, or raise the fault in its place."""
        if path.startswith(self.root):
            found = self.fault(name) if self.k is not None and len(self.seen) >= self.k else None
            if found is not None:
                raise found
            self.seen.append(f"{name} {path.removeprefix(self.root)}")


@contextmanager
def crashing(root: Path, k: int | None = None, fault: str = "killed") -> Iterator[Crash]:
    """Inside, the k-th file operation below `root`, counted from 0, meets a fault; None only counts them."""
    crash = Crash(root, k, fault)
    with pytest.MonkeyPatch.context() as patch:
        for name in BY_PATH:
            patch.setattr(os, name, _by_path(crash, name, getattr(os, name)))
        for name in BY_DESCRIPTOR:
            patch.setattr(os, name, _by_descriptor(crash, name, getattr(os, name)))
        patch.setattr(os, "open", _low(crash, os.open))
        opened = _high(crash, io.open)
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        patch.setattr(safetensors.torch, "serialize_file", _serialized(crash, safetensors.torch.serialize_file))
        yield crash


def killed_at(root: Path, k: int, run: Callable[[], object]) -> bool:
    """Run until the k-th operation; False where the run ended before it."""
    with crashing(root, k):
        try:
            run()
        except Killed:
            return True
    return False


def failed_at(root: Path, k: int, fault: str, run: Callable[[], object]) -> Exception | None:
    """What a run raised whose disk failed from its k-th operation on; None where it came to its end."""
    with crashing(root, k, fault):
        try:
            run()
        except Exception as error:
            return error
    return None


def _place(path: object, dir_fd: int | None = None) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    name = os.fsdecode(os.fspath(path))  # type: ignore[call-overload]
    return os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), name) if dir_fd is not None else os.path.abspath(name)


def _by_path(crash: Crash, name: str, real: Callable) -> Callable:
    def operation(path, *args, **kwargs):
        crash.step(name, _place(path, kwargs.get("dir_fd")))
        return real(path, *args, **kwargs)

    return operation


def _by_descriptor(crash: Crash, name: str, real: Callable) -> Callable:
    def operation(descriptor, *args):
        crash.step(name, _place(descriptor))
        return real(descriptor, *args)

    return operation


def _low(crash: Crash, real: Callable) -> Callable:
    def operation(path, flags, *args, **kwargs):
        if flags & WRITES:
            crash.step("open", _place(path, kwargs.get("dir_fd")))
        return real(path, flags, *args, **kwargs)

    return operation


def _high(crash: Crash, real: Callable) -> Callable:
    def operation(file, mode="r", *args, **kwargs):
        if not set(mode) & set("wax+") or isinstance(file, int):
            return real(file, mode, *args, **kwargs)
        crash.step("open", _place(file))
        opened = real(file, mode, *args, **kwargs)
        try:
            crash.step("fill", _place(file))
        except Killed:
            opened.close()
            raise
        return opened

    return operation


def _serialized(crash: Crash, real: Callable) -> Callable:
    def operation(tensors, filename, *args, **kwargs):
        crash.step("open", _place(filename))
        real(tensors, filename, *args, **kwargs)
        try:
            crash.step("fill", _place(filename))
        except Killed:
            with _REAL_OPEN(filename, "r+b") as file:
                file.seek(0, io.SEEK_END)
                file.truncate(file.tell() // 2)
            raise

    return operation


_REAL_OPEN = io.open


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder and what it holds; None for a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}
