"""The prompts that an evaluation draws, each once, with its category: a list by name, of a file or of a data set.

The lists with a licence that allows it lie in `prompts/`, as their authors published them, or are fetched from the Hub.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from difftune.errors import UserError
from difftune.files.prompts import COLUMNS, column, read_prompts
from difftune.files.text import parse_json, read_text
from rewards import hub
from rewards.world import draw, grammar

Entry = dict[str, str]  # "prompt", and "category", which may be empty

FOLDER = Path(__file__).parent / "prompts"
WORLD = {"shapeeval": draw.shapeeval, "shapeeval-hard": draw.shapeeval_hard}
SHIPPED = {
    "geneval": "geneval.jsonl",
    "parti": "parti.tsv",
    "imagereward": "imagereward-benchmark.json",
    "ocr": "flow-grpo-ocr-test.txt",
    "t2i-compbench": "t2i-compbench",
}


class OnHub(NamedTuple):
    """A list in files of a data set on the Hub, one of each category."""

    data_set: str
    revision: str
    files: dict[str, str]


STYLES = ("anime", "concept-art", "paintings", "photo")
FETCHED = {  # Apache-2.0, by its card
    "hpd-v2": OnHub(
        "ymhao/HPDv2", "fd163b223b6faf112eccafeabe2e31a0e950f177", {s: f"benchmark/{s}.json" for s in STYLES}
    ),
}
ELSEWHERE = {  # known lists that may not be shipped: why, and how to name them
    "drawbench": ("its licence is not stated", "dataset:shunk031/DrawBench:COLUMN"),
    "geneval2": ("it is CC BY-NC 4.0", "its geneval2_data.jsonl"),
    "oneig": ("it is CC BY-NC 4.0", "dataset:OneIG-Bench/OneIG-Bench:COLUMN"),
    "pick-a-pic": ("users wrote it, and not all of it is safe to show", "dataset:yuvalkirstain/pickapic_v1:caption"),
}
CATEGORIES = ("category", "tag")  # columns, the first of them that a list has


def read_entries(name: str, per_category: int | None = None) -> list[Entry]:
    """The prompts of a named list, a file (.txt, .json, .jsonl, .tsv, .csv) or "dataset:ID[:COLUMN]", by categories.

    With `per_category`, only that many of each category. Captions of the world of shapes that have no category get the
    grammar's. Raises UserError for what cannot be read and holds no prompt.
    """
    listed: Iterable[Entry]
    if name in WORLD:
        listed = WORLD[name]()
    elif name in SHIPPED:
        listed = shipped_entries(FOLDER / SHIPPED[name])
    elif name in FETCHED:
        listed = fetched_entries(FETCHED[name])
    elif name in ELSEWHERE:
        why, instead = ELSEWHERE[name]
        raise UserError(f"the list {name} is not shipped, since {why}: give {instead} as --prompts")
    elif name.startswith("dataset:"):
        listed = [{"prompt": text, "category": ""} for text in column(name.removeprefix("dataset:"))]
    else:
        listed = entries_in_file(Path(name))
    return _by_category(_of_the_world(_once(listed)), per_category)


def shipped_entries(path: Path) -> list[Entry]:
    """The prompts of a file, or of a folder of files, each of which is a category."""
    if path.is_file():
        return entries_in_file(path)
    return [{**e, "category": file.stem} for file in sorted(path.glob("*.txt")) for e in entries_in_file(file)]


def fetched_entries(about: OnHub) -> list[Entry]:
    """The prompts of a list on the Hub, fetched at the first time."""
    files = {name: hub.data_file(about.data_set, file, about.revision) for name, file in about.files.items()}
    return [{**entry, "category": name} for name, file in files.items() for entry in entries_in_file(file)]


def entries_in_file(path: Path) -> list[Entry]:
    """The prompts of a file: lines of text, or records with a prompt ("prompt", "text" or "caption") and maybe a
    category ("category" or "tag")."""
    read = READERS.get(path.suffix.lower())
    if read is None:
        return [{"prompt": line, "category": ""} for line in read_prompts(path, "shapeeval")]
    try:
        rows = list(read(read_text(path, "--prompts")))
    except UserError:
        raise
    except (ValueError, RecursionError, TypeError, AttributeError, csv.Error) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read the prompts of {str(path)!r} ({why}): give records with a prompt each") from error
    if not rows:
        raise UserError(f"{path} has no prompt: give records with a prompt each")
    return [_entry(row, f"record {number} of {path}") for number, row in enumerate(rows, 1)]


def _json(text: str) -> Iterable[Any]:
    found = parse_json(text)
    if not isinstance(found, list):
        raise ValueError("it is not a list")
    return found


def _json_lines(text: str) -> Iterable[Any]:
    return (parse_json(line) for line in text.split("\n") if line.strip())


def _tabs(text: str) -> Iterable[Any]:
    return csv.DictReader(StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)


def _commas(text: str) -> Iterable[Any]:
    return csv.DictReader(StringIO(text, newline=""), strict=True)


READERS = {".json": _json, ".jsonl": _json_lines, ".tsv": _tabs, ".csv": _commas}


def _entry(row: Any, where: str) -> Entry:
    if isinstance(row, str):
        row = {"prompt": row}
    named = {str(key).lower(): value for key, value in row.items()} if isinstance(row, Mapping) else {}
    prompt, category = _first(named, COLUMNS), _first(named, CATEGORIES)
    if not prompt:
        raise UserError(f"{where} has no prompt: write it under one of {', '.join(COLUMNS)}")
    return {"prompt": prompt, "category": category}


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    texts = [row[name] for name in names if isinstance(row.get(name), str)]
    return texts[0].strip() if texts else ""


def _once(listed: Iterable[Mapping[str, str]]) -> list[Entry]:
    """Each prompt where it stands first: an image's seed comes from its prompt, so a second one would have the same."""
    found: dict[str, Entry] = {}
    for entry in listed:
        found.setdefault(entry["prompt"], dict(entry))
    return list(found.values())


def _of_the_world(listed: list[Entry]) -> list[Entry]:
    """The entries with the grammar's categories if they have none and are all captions of the world of shapes."""
    if any(entry["category"] for entry in listed):
        return listed
    try:
        return [{**entry, "category": grammar.category(grammar.parse(entry["prompt"]))} for entry in listed]
    except ValueError:
        return listed


def _by_category(listed: list[Entry], most: int | None) -> list[Entry]:
    """The first entries of each category, those of one category in a row: the grammar's in its order, others as met."""
    names = dict.fromkeys(entry["category"] for entry in listed)
    order = [name for name in grammar.ALL_CATEGORIES if name in names]
    order += [name for name in names if name not in order]
    return [entry for name in order for entry in [e for e in listed if e["category"] == name][:most]]
