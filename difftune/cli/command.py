"""Commands whose flags may take several values, and the settings of a method."""

from collections.abc import Iterable, Sequence
from typing import Any

import click

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # never a value of a flag before them
DOTTED = "--guidance."  # the key is whatever follows


class Values(click.Option):
    """An option that takes several values after one flag, and repeats."""

    def __init__(self, flags: Sequence[str], **about: Any):
        super().__init__(flags, **about | {"multiple": True})


class Command(click.Command):
    """A command whose `Values` and `--guidance.KEY` are read, and whose defaults come from `--config`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._spelled_out(args)))

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


def _setting(flag: str, rest: list[str]) -> tuple[str, str]:
    if not rest:
        raise click.UsageError(f"{flag} needs a value")
    return DOTTED + "KEY", f"{flag.removeprefix(DOTTED)}={rest.pop(0)}"
