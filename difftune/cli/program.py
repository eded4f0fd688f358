"""The command line. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

import sys
from typing import Any

import click

from difftune import __version__
from difftune.cli.about import demo, doctor, methods
from difftune.cli.images import compare, evaluate, sample, score
from difftune.cli.label import label
from difftune.cli.rewards import rewards
from difftune.cli.train import optimize, search, train
from difftune.errors import ERRORS


class Program(click.Group):
    """A group that ends with one sentence where a person can put it right, and with a traceback where we must."""

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


def _stop(message: str, code: int) -> None:
    click.echo(f"difftune: {message}", err=True)
    sys.exit(code)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Guide, search, optimise and align diffusion models with any reward."""


def main() -> None:
    cli(prog_name="difftune")


for _command in (sample, evaluate, compare, score, train, optimize, search, label, rewards, methods, doctor, demo):
    cli.add_command(_command)
