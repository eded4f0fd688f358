"""Commands whose flags may take several values, and stand in groups in `--help`, which ends with an example."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from math import isfinite
from typing import Any

import click

from difftune.cli.output import STDOUT
from difftune.cli.quiet import VERBOSE, quiet
from difftune.configs.fields import GROUP_OF, GROUPS, OWN
from solvers.ranges import Range

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # never a value of a flag before them
DOTTED = "--guidance."  # the key is whatever follows


class Number(click.ParamType):
    """A number in its range, which is one of `solvers.ranges`."""

    def __init__(self, within: Range):
        self.within = within
        self.name = "integer" if within.whole else "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            number = int(value) if self.within.whole else float(value)
        except (ValueError, OverflowError):
            self.fail(f"{shortened(value)!r} is not a {'whole ' if self.within.whole else ''}number", param, ctx)
        if number not in self.within:
            known = isinstance(number, int) or isfinite(number) or "finite" in str(self.within)
            finite = "" if known else ", and finite"
            self.fail(f"{shortened(value)} is out of its range: it must be {self.within}{finite}", param, ctx)
        return number


def shortened(value: Any) -> str:
    """A value as a sentence shows it."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


class Flag(click.Option):
    """An option that shows its default, and the range of its number."""

    def __init__(self, flags: Sequence[str], **about: Any):
        super().__init__(flags, **{"show_default": True} | about)

    def get_help_extra(self, ctx: click.Context) -> Any:
        extra = super().get_help_extra(ctx)
        if isinstance(self.type, Number):
            extra["range"] = str(self.type.within)
        return extra


class Values(Flag):
    """An option that takes several values after one flag, and repeats."""

    def __init__(self, flags: Sequence[str], **about: Any):
        super().__init__(flags, **about | {"multiple": True})


class Command(click.Command):
    """A command whose `Values` and `--guidance.KEY` are read, and whose defaults come from `--config`."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.params.append(VERBOSE)
        self.example = example

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what libraries print meanwhile goes to stderr."""
        ctx.meta[STDOUT] = sys.stdout
        with redirect_stdout(sys.stderr), quiet(ctx.meta.get("difftune.verbose", False)):
            return super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for word in args:
            check_text(word)
        words = list(self._spelled_out(args))
        self._check_once(ctx, words)
        return super().parse_args(ctx, words)

    def _check_once(self, ctx: click.Context, words: Sequence[str]) -> None:
        """A usage error for a flag that is given again, except one that takes several values."""
        _, _, order = self.make_parser(ctx).parse_args(list(words))
        again = [param for param, times in Counter(order).items() if times > 1 and not takes_several(param)]
        if again:
            raise click.UsageError(f"{again[0].opts[0]} is given {Counter(order)[again[0]]} times: give it once")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The flags by their groups."""
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in [*list(GROUPS)[:1], OWN, *GROUPS]}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                group = "Files" if "--help" in param.opts else GROUP_OF.get(param.name or "", OWN)
                rows[group].append(record)
        for title, records in rows.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records, col_max=34)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.example:
            with formatter.section("Example"):
                formatter.write(f"  {self.example}\n")

    def _spelled_out(self, args: Sequence[str]) -> Iterable[str]:
        """The arguments as click reads them: one flag per value, the key of a setting with its value."""
        flags = {flag for p in self.params if isinstance(p, Values) for flag in p.opts}
        files = any(isinstance(p, click.Argument) for p in self.params)
        rest = list(args)
        while rest:
            flag, equals, value = rest.pop(0).partition("=")
            if flag == "--":
                yield from ("--", *rest)
                return
            if flag.startswith(DOTTED):
                yield from _setting(flag, [value] if equals else rest)
            elif flag in flags:
                given = [value] if equals else []
                while rest and not rest[0].startswith("-") and not (files and rest[0].lower().endswith(IMAGES)):
                    given.append(rest.pop(0))
                yield from [word for v in given for word in (flag, v)] or [flag]
            else:
                yield flag + equals + value


def takes_several(param: click.Parameter) -> bool:
    return isinstance(param, click.Argument) or param.multiple


def check_text(word: str) -> None:
    """A usage error for what is not text: a NUL, or half of a character (bytes that are not UTF-8)."""
    if "\0" in word or (not word.isascii() and any("\ud800" <= c <= "\udfff" for c in word)):
        raise click.UsageError(f"{shortened(word)!a} is not text: it holds a NUL, or bytes that are not UTF-8")


def _setting(flag: str, rest: list[str]) -> tuple[str, str]:
    if not rest:
        raise click.UsageError(f"{flag} needs a value")
    return DOTTED + "KEY", f"{flag.removeprefix(DOTTED)}={rest.pop(0)}"
