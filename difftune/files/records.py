"""JSON lines that a run appends to, and rewinds to the step from which it goes on."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from difftune.files.output import write


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line, which is on its way to the disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def rewind(path: Path, step: int) -> None:
    """Drop the lines after `step`, and one that was torn: a resumed run writes them again."""
    if path.exists():
        write(path, "".join(json.dumps(record) + "\n" for record in records(path) if record["step"] <= step))


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl, up to the first that was torn."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
