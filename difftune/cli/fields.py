"""The fields of a Config as options."""

import types
from dataclasses import MISSING, Field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

import click

from difftune.cli.command import DOTTED, Flag, Number, Values
from difftune.cli.config_file import CONFIG
from solvers.ranges import choices_of, range_of

ALIASES = {
    "model": ["--pretrained_model_name_or_path"],
    "num_inference_steps": ["--steps"],
}
METAVARS = {
    "model": "NAME|FOLDER|HUB_ID",
    "lora": "FOLDER",
    "prompt": "TEXT ...",
    "prompts": "FILE|NAME",
    "validation_prompts": "FILE|NAME",
    "reward": "NAME[=WEIGHT] ...",
    "validation_reward": "NAME",
    "held_out": "NAME",
    "guidance": "NAME",
    "sampler": "NAME",
    "output_dir": "FOLDER",
    "labels": "FILE",
    "images": "FOLDER",
    "exemplars": "FOLDER|FILE",
    "encoder": "NAME",
    "caption": "TEXT",
    "start": "FILE",
    "gradient": "MODE",
    "memory_budget": "BYTES",
    "report_to": "NAME",
    "expert": "NAME=PROMPT ...",
}


def options_of(config: type) -> list[click.Parameter]:
    """One option per field, and --config."""
    hints = get_type_hints(config, include_extras=True)
    return [CONFIG, *(_option(f, hints[f.name]) for f in fields(config))]


def _option(f: Field, hint: Any) -> click.Option:
    doc = f.metadata["help"]
    if get_origin(hint) is dict:
        return Flag([DOTTED + "KEY", f.name], multiple=True, metavar="VALUE", help=doc)
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    about: dict[str, Any] = {"help": doc, "metavar": METAVARS.get(f.name), "required": default == []}
    if default not in (None, []):
        about["default"] = default
    flags = [f"--{f.name}", *ALIASES.get(f.name, []), f.name]
    if hint is bool:
        return Flag([f"--{f.name}/--no_{f.name}"], **about)
    if get_origin(unwrapped(hint)) is list:
        return Values(flags, type=str, **about | {"metavar": METAVARS.get(f.name, "KEY=VALUE ...")})
    return Flag(flags, type=click_type(hint), **about)


def unwrapped(hint: Any) -> Any:
    """X of X | None."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    return next(member for member in get_args(hint) if member is not type(None))


def click_type(hint: Any) -> Any:
    """What reads a value of that annotation: a number in its range, one of some names, or any text."""
    if names := choices_of(hint):
        return click.Choice(names)
    within = range_of(hint)
    return str if within is None else Number(within)
