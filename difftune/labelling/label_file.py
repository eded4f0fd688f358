"""The file of labels: appended to, synced, locked, repaired."""

import fcntl
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftune.errors import RunError, UserError
from difftune.files.output import append, append_to, flush, written

PROMPT = rb'\{"prompt": "(?:[^"\\]|\\.)*"'
STARTS = (b'{"prompt": "', b'{"undo": ')  # how the lines begin that we write
THEN = b', "a": "'  # and how they go on after the prompt


@dataclass(frozen=True)
class LabelFile:
    """An append-only file of labels that this process alone writes, and its lines."""

    path: Path
    descriptor: int
    lines: list[dict[str, Any]]

    @classmethod
    def open(cls, path: Path) -> "LabelFile":
        """The file, repaired: its last line, which a crash may have torn, and a choice that lacks some of its lines.

        A last line without its end gets its line break if it is a whole label; else its bytes move to PATH.torn. A
        choice of several lines that are not all there is undone. Raises UserError, and leaves the file as it is, if
        another process writes it, a line is not a label, or what follows the last line is not the beginning of one.
        """
        descriptor = _locked(path)
        try:
            with written(path):
                flush(path.parent)  # which may know of the file from now on
                data = _content(path, descriptor)
                whole, torn = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
                lines = _lines(whole, path)
                labels = cls(path, descriptor, lines + _mended(descriptor, path, torn, len(whole), len(lines)))
                labels.append([{"undo": i} for i in _halves(labels.lines)])
        except BaseException:
            os.close(descriptor)
            raise
        return labels

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write the lines at once and wait for the disk. RunError if that fails: the file is then as it was."""
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        try:
            append_to(self.descriptor, data)
        except OSError as error:
            raise RunError(f"the label was not written to {self.path}: {error}") from error
        self.lines.extend(lines)

    def close(self) -> None:
        os.close(self.descriptor)


def _locked(path: Path) -> int:
    """The file open for appending, made if there is none, and locked until it is closed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot write labels to {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        by, why = _holder(descriptor), error.strerror
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise UserError(f"cannot write labels to {path}: {why}") from error
        raise UserError(
            f"{path} is written by another `difftune label`{by}: end that, or give another --labels"
        ) from error
    return descriptor


def _holder(descriptor: int) -> str:
    """Which process has the lock of an open file, so far as the system tells."""
    inode, table = str(os.fstat(descriptor).st_ino), Path("/proc/locks")
    for line in table.read_text().splitlines() if table.exists() else ():
        words = line.split()  # 1: FLOCK ADVISORY WRITE 4711 00:2b:123456 0 EOF
        if words[1] == "FLOCK" and words[5].rpartition(":")[2] == inode:
            return f", process {words[4]}"
    return ""


def _content(path: Path, descriptor: int) -> bytes:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise UserError(f"cannot write labels to {path}: it is not a file, give another --labels")
    return path.read_bytes()


def _mended(descriptor: int, path: Path, torn: bytes, end: int, number: int) -> list[dict[str, Any]]:
    """Repair what follows the last line break, which is at `end`; returns the label that it holds, if it is whole."""
    if not torn:
        return []
    if not _begins_a_line(torn):
        raise UserError(f"{path} does not end with a label: mend it, or give --labels")
    if _is_json(torn):
        line = _label(torn, path, number)
        append_to(descriptor, b"\n")
        return [line]
    aside = path.with_name(path.name + ".torn")
    if not (aside.exists() and aside.read_bytes().endswith(torn + b"\n")):  # as after a kill right here
        append(aside, torn)
    os.ftruncate(descriptor, end)
    os.fsync(descriptor)
    return []


def _begins_a_line(torn: bytes) -> bool:
    """Whether a line that we write begins so, however short it was cut."""
    prompt = re.match(PROMPT, torn)
    rest, known = (torn[prompt.end() :], (THEN,)) if prompt else (torn, STARTS)
    return any(rest[: len(start)] == start[: len(rest)] for start in known)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(data: bytes, path: Path) -> list[dict[str, Any]]:
    return [_label(line, path, i) for i, line in enumerate(data.split(b"\n")[:-1])]


def _label(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """A line of the file, `number` counted from 0. Raises UserError for one that is not a label."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"line {number} of {path}, counted from 0, is no JSON: mend it, or give --labels") from error
    if not isinstance(found, dict) or not (type(found.get("undo")) is int or _is_choice(found)):
        raise UserError(f"line {number} of {path}, counted from 0, is not a label: mend it, or give --labels")
    return found


def _is_choice(line: Mapping[str, Any]) -> bool:
    several = "of" not in line or (type(line["of"]) is int and isinstance(line.get("time"), str))
    return several and all(isinstance(line.get(key), str) for key in ("a", "b", "choice"))


def live(lines: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """{line number: label} of the labels that no later line undoes."""
    undone = {line["undo"] for line in lines if "undo" in line}
    return {i: line for i, line in enumerate(lines) if "undo" not in line and i not in undone}


def _halves(lines: Sequence[Mapping[str, Any]]) -> list[int]:
    """The labels that hold of choices of which not all lines hold."""
    holding = live(lines)
    sizes = Counter(line["time"] for line in holding.values() if "of" in line)
    return [i for i, line in holding.items() if "of" in line and sizes[line["time"]] < line["of"]]
