"""What a person is asked: pictures of a prompt, and which of them stand side by side."""

import csv
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from difftune.errors import UserError
from difftune.files.text import parse_json, read_text

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # what every browser shows


TABLES = ("prompts.json", "prompts.jsonl", "prompts.csv", "metadata.jsonl", "metadata.csv")  # looked for in this order


class Picture(NamedTuple):
    """A picture, and what is known of how it was made."""

    file: Path
    prompt: str
    seed: int | None
    model: str | None
    mime: str


Task = tuple[Picture, ...]  # pictures of one prompt, in the order in which they are shown


def pictures_to_label(folder: str | Path, table: str | Path | None = None) -> list[Picture]:
    """The pictures of a folder and their prompts, from a `table` of `file` and `prompt` (JSON, JSON lines or CSV).

    Without one, they are those of the sample.json of `difftune sample`, in the folder or in folders in it, else of a
    prompts.json, .jsonl or .csv, or a metadata.jsonl or .csv. Raises UserError if there is none, a picture is
    missing or is none, or a prompt is empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"--images {folder} is not a folder: give one that `difftune sample` wrote, or one with pictures"
        )
    found = [p for t in _tables(folder, table) for p in _listed(t)]
    if len({p.file for p in found}) < len(found):
        raise UserError(f"a picture of {folder} is listed twice: give each one prompt")
    return found


def _tables(folder: Path, table: str | Path | None) -> list[tuple[Path, Path]]:
    """(a table, the folder that its files are relative to)."""
    if table is not None:
        return [(Path(table), folder)]
    samples = [folder / "sample.json", *sorted(folder.glob("*/sample.json"))]
    if made := [(path, path.parent) for path in samples if path.is_file()]:
        return made
    if own := [folder / name for name in TABLES if (folder / name).is_file()]:
        return [(own[0], folder)]
    raise UserError(
        f"{folder} has no sample.json and no prompts.json: say with --prompts FILE which prompt a picture is of"
    )


def _listed(table: tuple[Path, Path]) -> Iterator[Picture]:
    path, folder = table
    for i, record in enumerate(_records(path)):
        yield _picture(record, folder, f"entry {i} of {path}")


def _records(path: Path) -> list[Mapping[str, Any]]:
    """[{"file", "prompt", ...}] of a table, of the file's own kind."""
    try:
        found = _parsed(path.suffix.lower(), read_text(path, "the prompts of"))
    except UserError:
        raise
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"cannot read the prompts of {path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, list) or not found or not all(isinstance(record, dict) for record in found):
        raise UserError(f"{path} lists no pictures: it holds entries with the keys file and prompt")
    return found


def _parsed(suffix: str, text: str) -> Any:
    if suffix == ".csv":
        table = csv.DictReader(io.StringIO(text))
        names = table.fieldnames or []
        if len(set(names)) < len(names):
            raise UserError("it has two columns of one name")
        return list(table)
    if suffix == ".jsonl":
        return [parse_json(line) for line in text.split("\n") if line.strip()]
    if suffix != ".json":
        raise UserError("it is no .json, .jsonl or .csv")
    found = parse_json(text)
    if isinstance(found, dict) and isinstance(found.get("images"), list):  # sample.json
        model = found["settings"].get("model") if isinstance(found.get("settings"), dict) else None
        return [{"model": model, **i} if isinstance(i, dict) else i for i in found["images"]]
    return [{"file": file, "prompt": prompt} for file, prompt in found.items()] if isinstance(found, dict) else found


def _picture(record: Mapping[str, Any], folder: Path, where: str) -> Picture:
    name, prompt = (record.get(key, record.get(other)) for key, other in (("file", "file_name"), ("prompt", "text")))
    if not isinstance(name, str) or not name or not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where} lacks a file or a prompt: both are texts that are not empty")
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise UserError(f"{where}: {name} lies outside {folder}")
    seed, model = record.get("seed"), record.get("model")
    return Picture(file, prompt, _seed(seed, where), str(model) if model else None, _mime(file))


def _seed(value: Any, where: str) -> int | None:
    try:
        return None if value in (None, "") else int(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: the seed {value!r} is not a whole number") from error


def _mime(file: Path) -> str:
    """What the file's first bytes say that it is."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return str(image.get_format_mimetype())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{file} is not a picture that a browser shows ({', '.join(FORMATS)}), or cannot be read"
        ) from error


def draw_tasks(found: Sequence[Picture], size: int = 2, rounds: int = 1, seed: int = 0) -> list[Task]:
    """What is shown: `size` pictures of one prompt at a time, so that each picture is shown once in a round.

    The order of the tasks and of the pictures in one is random, and a function of the seed and the pictures alone. A
    last group that is too small is filled up with pictures that the round has shown; a prompt with fewer than `size`
    pictures is shown with what it has, one with a single picture not at all. Raises UserError if there is no choice.
    """
    groups: dict[str, list[Picture]] = {}
    for picture in found:
        groups.setdefault(picture.prompt, []).append(picture)
    drawn = [t for prompt, group in groups.items() for t in _drawn(group, size, rounds, f"{seed} {prompt}")]
    if not drawn:
        raise UserError("no prompt has two pictures: make more of each with `difftune sample --num_images 4`")
    once = list({frozenset(p.file for p in task): task for task in drawn}.values())
    random.Random(f"{seed}").shuffle(once)
    return once


def _drawn(group: Sequence[Picture], size: int, rounds: int, seed: str) -> Iterator[Task]:
    if len(group) < 2:
        return
    rng = random.Random(seed)
    for _ in range(rounds):
        order = rng.sample(list(group), len(group))
        starts = range(0, len(order), size)
        for chosen in ((order[i : i + size] + order[: max(0, i + size - len(order))])[:size] for i in starts):
            yield tuple(rng.sample(unique := list(dict.fromkeys(chosen)), len(unique)))
