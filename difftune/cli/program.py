"""The command line. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

import io
import os
import sys
from contextlib import redirect_stdout
from typing import Any, TextIO

import click

from difftune import __version__
from difftune.cli.about import demo, doctor, methods
from difftune.cli.images import compare, evaluate, export, sample, score
from difftune.cli.label import label
from difftune.cli.rewards import rewards
from difftune.cli.train import optimize, search, train
from difftune.errors import ERRORS, DiskError
from difftune.signals import ending


class Program(click.Group):
    """A group that ends with one sentence if a person can put it right, and with a traceback if we must."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            return super().main(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _stop(error.format_message(), error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            _stop("interrupted", 130)
        except ERRORS as error:
            _stop(str(error), error.exit_code)
        except (MemoryError, RuntimeError) as error:
            if not _of_memory(error):
                raise
            _stop("there is not enough memory for this: give smaller numbers, or a --memory_budget", 1)


def _of_memory(error: Exception) -> bool:
    """Whether an error is of a memory that is full; torch has a class of its own for a GPU's alone."""
    return isinstance(error, MemoryError) or any(say in str(error) for say in ("allocate memory", "out of memory"))


class Output(io.FileIO):
    """The standard output, which tells in one sentence that it takes no more, and then takes all that remains."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # the interpreter flushes once more at its end
            if isinstance(error, BrokenPipeError):  # as in `difftune methods | head`
                sys.exit(1)
            raise DiskError(f"cannot write to the standard output: {error.strerror}") from error


def _output() -> TextIO:
    stream = io.BufferedWriter(Output(sys.stdout.fileno(), "w", closefd=False))
    return io.TextIOWrapper(stream, sys.stdout.encoding, sys.stdout.errors, line_buffering=sys.stdout.isatty())


def _stop(message: str, code: int) -> None:
    click.echo(f"difftune: {message}", err=True)
    sys.exit(code)


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="`difftune demo` shows all of it in minutes, without a GPU or a download; `difftune COMMAND --help` has the "
    "flags of a command and an example; `difftune methods` lists what --guidance, --reward and the others take.",
)
@click.version_option(__version__)
def cli() -> None:
    """Guide, search, optimise and fine-tune diffusion models with any reward."""


def main() -> None:
    with ending(), redirect_stdout(_output()):
        cli(prog_name="difftune")


COMMANDS = (sample, evaluate, compare, score, train, export, optimize, search, label, rewards, methods, doctor, demo)
for _command in COMMANDS:
    cli.add_command(_command)
