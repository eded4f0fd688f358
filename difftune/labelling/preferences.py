"""Pairs of pictures, a better and a worse one, wherever they were published: what dpo, kto and dro train on offline.

`preferences_named` reads a file of `difftune label`; a folder with pairs.jsonl, or a file of JSON or JSON lines; and
"dataset:NAME", a data set of the hub, of a folder or of a file. Rows have one of these layouts:

    {"prompt", "chosen", "rejected"}                            pictures of one's own
    {"caption", "jpg_0", "jpg_1", "label_0"}                    Pick-a-Pic: label_0 is 1, 0, or 0.5 for a tie
    {"prompt", "file_path": [a, b], "human_preference": [1, 0]}  HPD v2
    {"prompt", "path1", "path2"}                                HPD v3: the first one is better

A picture is a path, relative to the file's folder, or the bytes that the data set holds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

from difftune.errors import UserError
from difftune.files.pictures import Encoded
from difftune.files.prompts import open_data_set
from difftune.files.text import parse_json, read_text
from difftune.labelling.choices import Choice, decided

Row = Mapping[str, Any]
FILE = "pairs.jsonl"


class Layout(NamedTuple):
    """The columns of a published data set, and how they are read."""

    columns: tuple[str, ...]
    prompt: str
    pictures: Callable[[Row], tuple[Any, Any]]
    better: Callable[[Row], float]  # 1 if the first is better, 0 if the second; anything else is a tie
    judged: tuple[str, ...] = ()  # the columns that `better` reads


LAYOUTS = (
    Layout(("prompt", "chosen", "rejected"), "prompt", lambda row: (row["chosen"], row["rejected"]), lambda row: 1.0),
    Layout(
        ("caption", "jpg_0", "jpg_1", "label_0"),
        "caption",
        lambda row: (row["jpg_0"], row["jpg_1"]),
        lambda row: float(row["label_0"]) if row.get("has_label", True) else 0.5,
        ("label_0", "has_label"),
    ),
    Layout(
        ("prompt", "file_path", "human_preference"),
        "prompt",
        lambda row: (row["file_path"][0], row["file_path"][1]),
        lambda row: (1 + float(row["human_preference"][0]) - float(row["human_preference"][1])) / 2,
        ("human_preference",),
    ),
    Layout(("prompt", "path1", "path2"), "prompt", lambda row: (row["path1"], row["path2"]), lambda row: 1.0),
)


@dataclass(frozen=True)
class Preferences(Sequence[Choice]):
    """Decided pairs, each read when it is asked for."""

    name: str
    rows: Sequence[Row]
    layout: Layout
    folder: Path
    kept: Sequence[int]  # rows that are decided

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, index: int) -> Choice: ...
    @overload
    def __getitem__(self, index: slice) -> list[Choice]: ...
    def __getitem__(self, index: int | slice) -> Choice | list[Choice]:
        if isinstance(index, slice):
            return [self.choice(number) for number in self.kept[index]]
        return self.choice(self.kept[index])

    def choice(self, number: int) -> Choice:
        row = self.rows[number]
        first, second = (self.picture(value, number) for value in self.layout.pictures(row))
        if isinstance(first, Path) and first == second:
            raise UserError(f"{self.name}, row {number}: both pictures are {first}: give two")
        better = "a" if self.layout.better(row) == 1 else "b"
        return Choice(str(row[self.layout.prompt]), first, second, better, line=number)

    def picture(self, value: Any, number: int) -> Any:
        """A picture's file, or its bytes. UserError, with the row, if it is neither."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return Encoded(value, f"of row {number} of {self.name}")
        if not isinstance(value, str):
            raise UserError(f"{self.name}, row {number}: a picture is {type(value).__name__}: give a path, or bytes")
        found = [path for path in (self.folder / value, self.folder / "train" / value) if path.is_file()]
        if not found:
            raise UserError(f"{self.name}, row {number}: there is no picture {self.folder / value}")
        return found[0]


def preferences_named(name: str) -> Sequence[Choice]:
    """The decided pairs of a name: see the module. UserError, in one sentence, for what cannot be read."""
    if name.startswith("dataset:"):
        where = name.removeprefix("dataset:")
        rows = undecoded(open_data_set(where, f"labels {name!r}"))
        return kept_of(name, rows, rows.column_names, Path(where).parent if Path(where).is_file() else Path(where))
    path = Path(name, FILE) if Path(name).is_dir() else Path(name)
    if path.name != FILE and (not path.is_file() or of_difftune_label(path)):
        return decided(path)
    found = list(rows_of(path))
    preferences = kept_of(str(path), found, list(found[0]), path.parent)
    for index in range(len(preferences)):
        preferences[index]  # every picture is there
    return preferences


def of_difftune_label(path: Path) -> bool:
    """Whether a file is one that `difftune label` wrote, or empty, or no JSON at all: its first row says so."""
    try:
        first = next(rows_of(path), {})
    except UserError:
        return True
    return not first or "choice" in first or "undo" in first


def kept_of(name: str, rows: Any, columns: Sequence[str], folder: Path) -> Preferences:
    """The rows that are decided, by the layout that their columns have."""
    layout = next((layout for layout in LAYOUTS if set(layout.columns) <= set(columns)), None)
    if layout is None:
        known = "; ".join(", ".join(layout.columns) for layout in LAYOUTS)
        raise UserError(f"{name} has the columns {', '.join(columns)}: known are {known}")
    judged = [column for column in layout.judged if column in columns]
    narrow = rows.select_columns(judged) if not isinstance(rows, list) and judged else rows
    kept = [i for i, row in enumerate(narrow) if layout.better(row) in (0, 1)] if judged else range(len(rows))
    if not kept:
        raise UserError(f"{name} holds no pair of which one is better")
    return Preferences(name, rows, layout, folder, kept)


def undecoded(rows: Any) -> Any:
    """A data set whose pictures stay bytes."""
    import datasets

    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list, or of JSON lines. UserError, with the number of the first that is not one."""
    text = read_text(path, "the pairs of")
    try:
        whole = text.lstrip().startswith("[")
        rows = parse_json(text) if whole else [parse_json(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON that can be read: {' '.join(str(error).split())}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"entry {number} of {path} is not an object: give one for each pair")
        yield row
