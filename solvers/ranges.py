"""Numbers and their ranges: said beside a field, checked in one place, shown by `--help`.

@dataclass(frozen=True)
class Settings(Ranged):
    rank: Count = 4                         # a whole number, at least 1
    decay: Annotated[float, Range(0, 1)] = 0.9
    target: float | None = None             # a number without a range of its own must be finite
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from math import inf, isfinite
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from solvers.errors import UserError


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; an end is out of it where `above` or `below` says so.

    An infinite number is in no range, except one that says so by `infinite`.
    """

    low: float = -inf
    high: float = inf
    above: bool = False  # without `low` itself
    below: bool = False  # without `high` itself
    infinite: bool = False
    whole: bool = False

    def __contains__(self, number: float) -> bool:
        high_enough = number > self.low if self.above else number >= self.low
        low_enough = number < self.high if self.below else number <= self.high
        right_kind = isinstance(number, int) or ((isfinite(number) or self.infinite) and not self.whole)
        return bool(high_enough and low_enough and right_kind)

    def __str__(self) -> str:
        """As a sentence ends: "it must be ..."."""
        if isfinite(self.low) and isfinite(self.high) and not (self.above or self.below):
            return f"from {self.low} to {self.high}"
        low = "" if self.low == -inf else f"{'above' if self.above else 'at least'} {self.low}"
        high = "" if self.high == inf else f"{'below' if self.below else 'at most'} {self.high}"
        said = " and ".join(part for part in (low, high) if part)
        return said or ("a whole number" if self.whole else "a number" if self.infinite else "a finite number")


Count = Annotated[int, Range(1)]
Many = Annotated[int, Range(1, 1_000_000)]  # of what is listed, or held in memory, all at once
Whole = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, below=True)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Steps = Annotated[int, Range(1, 1000)]
Side = Annotated[int, Range(1, 16384)]


class Ranged:
    """A dataclass that is checked when it is made: UserError names the first number that is out of its range, and the
    first name that is none of its field's (a Literal)."""

    def __post_init__(self) -> None:
        for name, known in choices(type(self)).items():  # type: ignore[arg-type]
            absent = vars(self)[name] is None and name in optional(type(self))  # type: ignore[arg-type]
            if vars(self)[name] not in known and not absent:
                raise UserError(_unknown(name, vars(self)[name], known))
        for name, within in ranges(type(self)).items():  # type: ignore[arg-type]
            kinds = numbers_alone(type(self)).get(name)  # type: ignore[arg-type]
            if kinds and (not isinstance(vars(self)[name], kinds) or isinstance(vars(self)[name], bool)):
                raise UserError(f"{name} is {str(vars(self)[name])[:60]!r}: it must be a number")
            check(name, vars(self)[name], within)


def check(name: str, value: Any, within: Range) -> None:
    """UserError for the first number of `value` (a number, or a list of them) that is out of range."""
    for number in _numbers(value):
        if number not in within:
            raise UserError(f"{name} is {_shown(number)}: it must be {within}{_kind(number, within)}")


def _kind(number: float, within: Range) -> str:
    """What else than its size a number lacks."""
    if isinstance(number, int) or str(within) in ("a finite number", "a whole number"):
        return ""
    return ", and a whole number" if within.whole else "" if isfinite(number) else ", and finite"


@cache
def ranges(kind: type) -> dict[str, Range]:
    """The range of each field that is a number, or holds some."""
    hints = get_type_hints(kind, include_extras=True)
    found = {f.name: range_of(hints[f.name]) for f in fields(kind)}  # type: ignore[arg-type]
    return {name: within for name, within in found.items() if within is not None}


@cache
def numbers_alone(kind: type) -> dict[str, tuple[type, ...]]:
    """What may stand in each field that holds one number, or none: no tensor, function or list."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for f in fields(kind):  # type: ignore[arg-type]
        parts = {part for part in _parts(hints[f.name]) if not isinstance(part, Range)}
        if parts <= {int, float, type(None)} and get_origin(hints[f.name]) not in (tuple, list):
            found[f.name] = (int, float, *(parts & {type(None)}))
    return found


@cache
def choices(kind: type) -> dict[str, tuple[str, ...]]:
    """The names that each field of a closed set knows."""
    hints = get_type_hints(kind)
    found = {f.name: choices_of(hints[f.name]) for f in fields(kind)}  # type: ignore[arg-type]
    return {name: known for name, known in found.items() if known}


@cache
def optional(kind: type) -> set[str]:
    """The fields that may be None."""
    hints = get_type_hints(kind)
    return {f.name for f in fields(kind) if type(None) in get_args(hints[f.name])}  # type: ignore[arg-type]


def choices_of(hint: Any) -> tuple[str, ...]:
    """The names of a Literal, or of one that may be None; () where an annotation is neither."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((get_args(member) for member in members if get_origin(member) is Literal), ())


def _unknown(kind: str, name: Any, known: Sequence[str]) -> str:
    near = get_close_matches(str(name), known, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    return f"no {kind} {name!r}{guess}; known: {', '.join(known)}"


def range_of(hint: Any) -> Range | None:
    """The range that an annotation says; finite numbers where it says none, None if it is of no numbers."""
    parts = list(_parts(hint))
    if int not in parts and float not in parts:
        return None
    said = next((part for part in parts if isinstance(part, Range)), Range())
    return said if float in parts else Range(said.low, said.high, said.above, said.below, said.infinite, whole=True)


def _parts(hint: Any) -> Iterator[Any]:
    """The types and metadata that an annotation is made of; what a function takes and a mapping holds is not."""
    if get_origin(hint) is None:
        yield hint
    elif get_origin(hint) in (Annotated, Union, UnionType, tuple, list):
        for part in get_args(hint):
            yield from _parts(part)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _shown(number: float) -> str:
    """A number as a sentence shows it: one of thousands of digits is cut."""
    if isinstance(number, int) and abs(number) >= 10**24:
        return f"a number of about {number.bit_length() * 0.30103:.0f} digits"
    return str(number)
