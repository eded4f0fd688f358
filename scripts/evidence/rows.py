"""A measurement, the file that keeps it, and what is claimed on the page from several of them."""

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benching import hardware, weights

from difftune.evaluation.intervals import Estimate, estimate
from difftune.files.output import write


@dataclass(frozen=True)
class Row:
    """One measurement: a file's name, all that its result depends on, and how it is made."""

    name: str
    settings: Mapping[str, Any]
    models: tuple[str, ...]  # whose weights count
    measure: Callable[[], Mapping[str, Any]]
    group: str = ""  # rows of one group are made by one process: one reads what another found

    @property
    def digest(self) -> str:
        """Of the settings and of the models' weights: what was measured with others is measured again."""
        known = json.dumps([self.settings, {name: weights(name) for name in self.models}], sort_keys=True)
        return hashlib.sha256(known.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Results:
    """A folder with a file for each row that was measured: {"digest", "settings", "on", "seconds", "found"}."""

    folder: Path

    def file(self, row: Row) -> Path:
        return self.folder / f"{row.name}.json"

    def read(self, row: Row) -> dict[str, Any] | None:
        """What the row found; None if it was not measured, or under other settings or weights."""
        entry = self.entry(row)
        return None if entry is None else entry["found"]

    def entry(self, row: Row) -> dict[str, Any] | None:
        """The row's whole file, under the same condition."""
        try:
            entry = json.loads(self.file(row).read_text())
        except (OSError, ValueError):
            return None
        return entry if entry["digest"] == row.digest else None

    def measured(self, row: Row) -> dict[str, Any]:
        """What the row found: read, or measured and written as a whole file, by one process at a time."""
        with locked(self.folder / "locks" / row.name):
            found = self.read(row)
            return self.made(row) if found is None else found

    def made(self, row: Row) -> dict[str, Any]:
        """The row, measured and written."""
        began = time.perf_counter()
        made = dict(row.measure())
        seconds = round(time.perf_counter() - began, 1)
        entry = {"digest": row.digest, "settings": row.settings, "on": hardware(), "seconds": seconds, "found": made}
        write(self.file(row), json.dumps(entry))
        return json.loads(json.dumps(made))  # as it is read

    def all_of(self, rows: Iterable[Row]) -> list[dict[str, Any]] | None:
        """What each of the rows found; None unless all were measured."""
        found = [self.read(row) for row in rows]
        return None if not found or None in found else found  # type: ignore[return-value]


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Only one process at a time is within; the lock of one that was killed is free."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def part_of(rows: Sequence[Row], part: str) -> list[Row]:
    """The rows of the I-th of N parts, for processes side by side; a group stays together."""
    index, count = map(int, part.split("/"))
    groups = list(dict.fromkeys(row.group or row.name for row in rows))
    return [row for row in rows if groups.index(row.group or row.name) % count == index - 1]


# ------------------------------------------------------------------------------------------------ claims


@dataclass(frozen=True)
class Claim:
    """What a paper says of a method, and what was measured of it here."""

    method: str
    page: str  # below docs/
    paper: str  # its claim
    ours: str  # the measurement, with its interval, at equal cost
    holds: bool | None  # None: the interval does not tell
    command: str

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "does not hold", None: "not told apart"}[self.holds]


@dataclass(frozen=True)
class Section:
    """A part of the page: its rows, and what is said of those that were measured."""

    title: str
    rows: Sequence[Row]
    claims: Sequence[Claim] = ()
    text: str = ""  # Markdown: tables


def paired(after: Sequence[float], before: Sequence[float], bound: float = 1.0) -> Estimate:
    """The mean difference with its 95 % interval over prompts."""
    return estimate([a - b for a, b in zip(after, before, strict=True)], (-bound, bound))


def said(change: Estimate, digits: int = 3) -> str:
    """A difference with its sign and its interval."""
    return f"{change.score:+.{digits}f} [{change.low:+.{digits}f}, {change.high:+.{digits}f}]"


def above(change: Estimate) -> bool | None:
    """Whether a difference is above 0; None if its interval holds 0."""
    return change.score > 0 if change.excludes_zero else None
