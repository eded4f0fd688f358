"""Which of two pictures a person chose, read from the file that `difftune label` writes.

One JSON object on each line, appended and never changed:

    {"prompt": str, "a": path, "b": path, "choice": "a" | "b" | "tie" | "bad" | "skip",
     "seed_a": int | null, "seed_b": int | null, "model": str | null, "time": str}
    {"undo": n}        takes back the choice on line n, where the first line is 0

Paths are relative to the file's folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftune.errors import UserError
from difftune.files.text import parse_json, read_text

CHOICES = ("a", "b", "tie", "skip", "bad")


@dataclass(frozen=True)
class Choice:
    """One line: two pictures of one prompt, and which of them was chosen."""

    prompt: str
    a: Path
    b: Path
    choice: str  # of CHOICES
    seed_a: int | None = None  # that the picture was made with, if difftune made it
    seed_b: int | None = None
    model: str | None = None
    line: int = 0  # the first is 0, as in an undo

    @property
    def winner(self) -> Path:
        return self.a if self.choice == "a" else self.b

    @property
    def loser(self) -> Path:
        return self.b if self.choice == "a" else self.a


def read_labels(file: str | Path) -> list[Choice]:
    """The choices that were not taken back, in the order of their lines.

    Raises UserError, which names the line, for one that is not such an object, names a picture that is absent, or takes
    back what is not a choice.
    """
    file = Path(file)
    try:
        text = read_text(file, "the labels of")
    except UserError as error:
        raise UserError(f"{error}; give a file that difftune label wrote") from error
    lines = text.removesuffix("\n").split("\n")  # splitlines would end one at U+2028 too
    found: dict[int, Choice] = {}
    for number, text in enumerate(lines if lines != [""] else []):
        where = f"{file}, line {number}"
        about = _object(text, where)
        if "undo" in about:
            _undo(found, about["undo"], where)
        else:
            found[number] = _choice(about, file.parent, number, where)
    return list(found.values())


def decided(file: str | Path) -> list[Choice]:
    """The choices that say which picture is better: neither alike, nor bad, nor skipped. UserError if there is none."""
    found = [choice for choice in read_labels(file) if choice.choice in ("a", "b")]
    if not found:
        raise UserError(f"{file} holds no choice between two pictures: label some with difftune label")
    return found


def _object(text: str, where: str) -> Mapping[str, Any]:
    try:
        about = parse_json(text)
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where} is no JSON ({text[:40]!r}): correct it, or delete it") from error
    if not isinstance(about, dict):
        raise UserError(f"{where} is {text[:40]!r}, not an object with prompt, a, b and choice: correct it")
    return about


def _undo(found: dict[int, Choice], number: Any, where: str) -> None:
    if number not in found:
        raise UserError(f"{where} takes back line {number!r}, which holds no choice: correct it, or delete it")
    del found[number]


def _choice(about: Mapping[str, Any], folder: Path, number: int, where: str) -> Choice:
    for key, kinds in {"prompt": str, "a": str, "b": str, "choice": str, **OPTIONAL}.items():
        if not isinstance(about.get(key), kinds) or isinstance(about.get(key), bool):
            raise UserError(f"{where}: {key} is {about.get(key)!r}, not {SAID[kinds]}: correct it")
    if about["choice"] not in CHOICES:
        raise UserError(f"{where}: choice is {about['choice']!r}, not one of {', '.join(CHOICES)}: correct it")
    a, b = folder / about["a"], folder / about["b"]
    for picture in (a, b):
        if not picture.is_file():
            raise UserError(f"{where}: there is no picture {picture}; paths are relative to the file's folder")
    rest = {key: about.get(key) for key in OPTIONAL}
    return Choice(about["prompt"], a, b, about["choice"], **rest, line=number)


NUMBER, TEXT = (int, type(None)), (str, type(None))
OPTIONAL: dict[str, Any] = {"seed_a": NUMBER, "seed_b": NUMBER, "model": TEXT}
SAID: dict[Any, str] = {str: "a text", NUMBER: "a whole number or null", TEXT: "a text or null"}
