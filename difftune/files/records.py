"""JSON lines that a run appends to, and rewinds to the step from which it goes on."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from difftune.files import output


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line, which is on the disk when this returns. DiskError if it cannot be: the file is as it was."""
    output.append(path, json.dumps(record, allow_nan=False))


def rewind(path: Path, step: int) -> None:
    """Drop the lines after `step`, and those that are not records: a resumed run writes them again."""
    if path.exists():
        kept = [record for record in records(path) if record["step"] <= step]
        output.write(path, "".join(json.dumps(record) + "\n" for record in kept))


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl that hold a record, an object with the number `step`; none if there is no file.

    Others are passed over: a line may be blank, torn by a crash, or damaged, and those after it are good all the same.
    """
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int | float):
            yield found
