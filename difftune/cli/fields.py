"""The fields of a Config as options."""

import types
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from difftune.cli.command import DOTTED, Values
from difftune.cli.config_file import CONFIG

ALIASES = {
    "model": ["--pretrained_model_name_or_path"],
    "num_inference_steps": ["--steps"],
}
METAVARS = {"model": "NAME|FOLDER|HUB_ID", "reward": "NAME[=WEIGHT] ...", "guidance": "NAME", "output_dir": "FOLDER"}


def options_of(config: type) -> list[click.Parameter]:
    """One option per field, and --config."""
    hints = get_type_hints(config)
    return [CONFIG, *(_option(f, hints[f.name], f.metadata["help"]) for f in fields(config))]


def _option(f: Field, hint: Any, doc: str) -> click.Option:
    if get_origin(hint) is dict:
        return click.Option([DOTTED + "KEY", f.name], multiple=True, metavar="VALUE", help=doc)
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    flags = [f"--{f.name}", *ALIASES.get(f.name, []), f.name]
    about: dict[str, Any] = {"help": doc, "metavar": METAVARS.get(f.name)}
    if default == []:
        about["required"] = True
    elif default is not None:
        about |= {"default": default, "show_default": True}
    kind = _unwrapped(hint)
    if kind is bool:
        return click.Option([f"--{f.name}/--no_{f.name}"], **about)
    if get_origin(kind) is list:
        return Values(flags, type=click_type(get_args(kind)[0]), **about)
    return click.Option(flags, type=click_type(kind), **about)


def _unwrapped(hint: Any) -> Any:
    """X of X | None."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    return next(member for member in get_args(hint) if member is not type(None))


def click_type(kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return click.Choice([str(value) for value in get_args(kind)])
    return kind if kind in (int, float, str) else str
