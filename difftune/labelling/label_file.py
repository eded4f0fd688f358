"""The file of labels: appended to, synced, locked, repaired."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftune.errors import RunError, UserError

Answer = tuple[bytes, str, dict[str, str]]  # body, content type, further headers


@dataclass(frozen=True)
class LabelFile:
    """An append-only file of labels that this process alone writes, and its lines."""

    path: Path
    descriptor: int
    lines: list[dict[str, Any]]

    @classmethod
    def open(cls, path: Path) -> "LabelFile":
        """The file, repaired: its last line, which a crash may have torn, and a choice that lacks some of its lines.

        A last line without its end gets its line break where it is whole JSON; else its bytes are moved to PATH.torn. A
        choice of several lines that are not all there is undone. Raises UserError where another process writes the file
        or a line is no label.
        """
        descriptor = _locked(path)
        try:
            labels = cls(path, descriptor, _lines(_repaired(descriptor, path), path))
            labels.append([{"undo": i} for i in _halves(labels.lines)])
        except BaseException:
            os.close(descriptor)
            raise
        return labels

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write the lines at once and wait for the disk. RunError where that fails: the file is then as it was."""
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        size = os.fstat(self.descriptor).st_size
        try:
            if os.write(self.descriptor, data) != len(data):
                raise OSError("the disk is full")
            os.fsync(self.descriptor)
        except OSError as error:
            os.ftruncate(self.descriptor, size)
            raise RunError(f"the label was not written to {self.path}: {error}") from error
        self.lines.extend(lines)

    def close(self) -> None:
        os.close(self.descriptor)


def _locked(path: Path) -> int:
    """The file open for appending, made where there is none, and locked until it is closed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write labels to {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _synced(path.parent)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{path} is written by another `difftune label`: end that, or give another --labels") from error
    return descriptor


def _synced(folder: Path) -> None:
    """Wait until the disk knows of the folder's new files."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _repaired(descriptor: int, path: Path) -> bytes:
    """The whole lines of the file, whose torn end is repaired first."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    whole, torn = data[:end], data[end:]
    if torn and _is_json(torn):
        os.write(descriptor, b"\n")
        return data + b"\n"
    if torn:
        with open(path.with_name(path.name + ".torn"), "ab") as aside:
            aside.write(torn + b"\n")
            aside.flush()
            os.fsync(aside.fileno())
        os.ftruncate(descriptor, end)
    return whole


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _lines(data: bytes, path: Path) -> list[dict[str, Any]]:
    lines = []
    for i, line in enumerate(data.splitlines()):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise UserError(f"line {i} of {path}, counted from 0, is no JSON: mend it, or give --labels") from error
        if not isinstance(found, dict) or not ("undo" in found or {"a", "b", "choice"} <= found.keys()):
            raise UserError(f"line {i} of {path}, counted from 0, is no label: mend it, or give --labels")
        lines.append(found)
    return lines


def live(lines: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """{line number: label} of the labels that no later line undoes."""
    undone = {line["undo"] for line in lines if "undo" in line}
    return {i: line for i, line in enumerate(lines) if "undo" not in line and i not in undone}


def _halves(lines: Sequence[Mapping[str, Any]]) -> list[int]:
    """The labels that hold of choices of which not all lines hold."""
    holding = live(lines)
    return [i for i, line in holding.items() if len(_together(holding, i)) < line.get("of", 1)]


def _together(holding: Mapping[int, Mapping[str, Any]], i: int) -> list[int]:
    """The labels that one choice wrote together with label i."""
    if "of" not in holding[i]:
        return [i]
    return [j for j, line in holding.items() if "of" in line and line["time"] == holding[i]["time"]]
