"""What a person was asked and has said: which tasks are open, which comes next, and what a choice writes.

Every choice costs the same, however many tasks there are: what holds is kept by line, by pair and by task.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from difftune.labelling.label_file import LabelFile
from difftune.labelling.tasks import Picture, Task

WORDS = ("tie", "bad", "skip")  # what may be said in place of a picture: alike, none is good, not now
SKIPS = 2  # how often a task may be skipped before it is left alone


class Session:
    """Tasks, the file that their labels go to, and which of them remain."""

    def __init__(self, todo: Sequence[Task], labels: LabelFile):
        self.todo, self.labels = todo, labels
        folder = labels.path.parent.resolve()
        every = dict.fromkeys(picture for task in todo for picture in task)
        self.names = {p: Path(os.path.relpath(p.file, folder)).as_posix() for p in every}
        self.tasks: dict[frozenset[str], list[int]] = {}  # in which a pair stands
        for number, task in enumerate(todo):
            for pair in combinations(map(self.name, task), 2):
                self.tasks.setdefault(frozenset(pair), []).append(number)
        self.holding: dict[int, Mapping[str, Any]] = {}  # labels that no later line undoes, by line
        self.said: Counter[tuple[frozenset[str], bool]] = Counter()  # labels of a pair, and skips of it
        self.state = ["open"] * len(todo)  # open, skipped or done
        self.counts = Counter(self.state)
        for number, line in enumerate(labels.lines):
            self._hear(number, line)

    def done(self) -> list[bool]:
        """Whether each task has its labels: one picture is compared with all others of it, or was skipped with them
        `SKIPS` times."""
        return [state == "done" for state in self.state]

    def next(self, count: int = 1) -> list[int]:
        """The numbers of the tasks that come next: those that are open, then those that were skipped once."""
        found = [i for kind in ("open", "skipped") for i in islice(self._of(kind), count)]
        return found[:count]

    def name(self, picture: Picture) -> str:
        """The picture's path as the label file tells it."""
        return self.names[picture]

    def choose(self, task: int, choice: int | str) -> None:
        """Write that of a task picture number `choice` is the best, or one of `WORDS`."""
        self._write(list(self._lines(self.todo[task], choice)))

    def undo(self) -> None:
        """Take back the last choice that holds, of this session or an earlier one."""
        if not self.holding:
            return
        last = next(reversed(self.holding))
        together = [last]
        if "of" in self.holding[last]:
            time = self.holding[last]["time"]
            together = [i for i in islice(reversed(self.holding), 9) if self.holding[i].get("time") == time]
        self._write([{"undo": i} for i in sorted(together)])

    def _of(self, kind: str) -> Iterator[int]:
        return (i for i, state in enumerate(self.state) if state == kind)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        first = len(self.labels.lines)
        self.labels.append(lines)
        for number, line in enumerate(lines, first):
            self._hear(number, line)

    def _hear(self, number: int, line: Mapping[str, Any]) -> None:
        """Take a line of the file into account."""
        undone = self.holding.pop(line["undo"], None) if "undo" in line else None
        if "undo" not in line:
            self.holding[number] = line
        about, sign = (line, 1) if "undo" not in line else (undone, -1)
        if about is None:
            return
        pair = frozenset((about["a"], about["b"]))
        self.said[pair, about["choice"] == "skip"] += sign
        for task in self.tasks.get(pair, ()):
            self.counts[self.state[task]] -= 1
            self.state[task] = self._stands(self.todo[task])
            self.counts[self.state[task]] += 1

    def _stands(self, task: Task) -> str:
        names = [self.name(picture) for picture in task]
        if _compared(names, lambda pair: self.said[pair, False] > 0 or self.said[pair, True] >= SKIPS):
            return "done"
        return "skipped" if _compared(names, lambda pair: self.said[pair, True] > 0) else "open"

    def _lines(self, task: Task, choice: int | str) -> Iterator[dict[str, Any]]:
        best, time = choice if isinstance(choice, int) else 0, datetime.now(UTC).isoformat()
        several = {"of": len(task) - 1} if len(task) > 2 else {}
        for other in (i for i in range(len(task)) if i != best):
            a, b = (task[i] for i in sorted((best, other)))
            word = choice if isinstance(choice, str) else "a" if best < other else "b"
            yield {
                "prompt": a.prompt,
                "a": self.name(a),
                "b": self.name(b),
                "choice": word,
                "seed_a": a.seed,
                "seed_b": b.seed,
                "model": a.model if a.model == b.model else None,
                "time": time,
                **several,
            }


def _compared(names: Sequence[str], holds: Callable[[frozenset[str]], bool]) -> bool:
    """Whether one of the pictures is compared with all others."""
    return any(all(holds(frozenset((one, other))) for other in names if other != one) for one in names)
