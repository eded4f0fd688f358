"""What other libraries say by themselves is not shown, unless a person asks for it by --verbose; what we say is."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import click

from difftune.models import show_bars
from solvers.errors import Caution


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Without the warnings and the logs of libraries, except errors. A `Caution` of ours is one line on stderr."""
    if verbose:
        token = show_bars.set(True)
        try:
            yield
        finally:
            show_bars.reset(token)
        return
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", Caution)
        warnings.showwarning = _say
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _say(message: Warning | str, *about: object, **more: object) -> None:
    click.echo(f"difftune: {message}", err=True)


VERBOSE = click.Option(
    ["--verbose"],
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, param, value: ctx.meta.__setitem__("difftune.verbose", value),
    help="Also show the warnings and the loading bars of the libraries.",
)
