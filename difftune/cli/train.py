"""`difftune train`, `optimize` and `search`: the flags are the fields of a Config."""

import sys
from contextlib import redirect_stdout
from dataclasses import fields
from importlib import import_module
from typing import Any

import click

from difftune.cli import options as o
from difftune.cli.checks import spoken
from difftune.cli.command import Command
from difftune.cli.fields import options_of
from difftune.cli.guidance import guidance_of
from difftune.cli.output import show, summary
from difftune.configs.noise import RenoConfig
from difftune.configs.search import SearchConfig
from difftune.recipes import RECIPES


@click.group()
def train() -> None:
    """Fine-tune a model on a reward. `accelerate launch -m difftune train ...` works too."""


def command_of(name: str, config: type, module: str, function: str = "run") -> click.Command:
    """The command that calls a module's function with a Config, whose fields are its flags."""

    @click.pass_context
    def run(ctx: click.Context, as_json: bool, **flags: Any) -> None:
        with redirect_stdout(sys.stderr):
            found = vars(import_module(module))[function](configured(ctx, config))
        show(found if isinstance(found, dict) else {"output_dir": flags["output_dir"]}, as_json, flags["output_dir"])

    return Command(name, params=[*options_of(config), o.JSON], callback=run, help=summary(config))


def _search() -> click.Command:
    """`search METHOD`: the flags are the fields of SearchConfig."""
    command = command_of("search", SearchConfig, "difftune.search_runs.run_folder")
    flags = [param for param in command.params if param.name != "method"]
    command.params = [click.Argument(["method"], metavar="METHOD"), *flags]
    return command


def configured(ctx: click.Context, config: type) -> Any:
    """The Config that file and flags describe."""
    from rewards.compose import parse_rewards

    flags = {f.name: ctx.params[f.name] for f in fields(config)}
    flags |= {name: list(value) for name, value in flags.items() if isinstance(value, tuple)}
    parse_rewards(flags["reward"])
    if "prompt" in flags:
        spoken(flags["prompt"])
    name, settings = guidance_of(ctx)
    scale = settings.pop("scale", None)
    return config(**flags | {"guidance": name, "guidance_scale": scale, "guidance_options": settings})


for _recipe in RECIPES.values():
    train.add_command(command_of(_recipe.name, _recipe.config, "difftune.recipes", "train_in_folder"))
optimize = command_of("optimize", RenoConfig, "difftune.reno.run_folder")
search = _search()
