"""The guidance method that flags and file describe."""

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from difftune.cli.command import DOTTED
from difftune.cli.config_file import FILE_SETTINGS
from difftune.cli.fields import click_type


def guidance_of(ctx: click.Context) -> tuple[str, dict[str, Any]]:
    """The chosen guidance method and its settings, each in its field's type; the command line wins over the file."""
    chosen = ctx.params
    name = chosen["guidance"]
    given = dict(pair.partition("=")[::2] for pair in chosen["guidance_options"])
    settings = {key: str(value) for key, value in ctx.meta.get(FILE_SETTINGS, {}).items()} | given
    explicit = ctx.get_parameter_source("guidance_scale") in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    if chosen["guidance_scale"] is not None and (explicit or "scale" not in settings):
        settings["scale"] = str(chosen["guidance_scale"])
    return name, _typed(name, settings)


def _typed(name: str, settings: Mapping[str, str]) -> dict[str, Any]:
    from difftune.lookup import guidance_field, guidance_kinds

    methods = guidance_kinds(name)
    places = {key: guidance_field(name, key) for key in settings}
    hints = {key: get_type_hints(methods[depth])[field] for key, (depth, field) in places.items()}
    return {key: _converted(key, value, hints[key]) for key, value in settings.items()}


def _converted(key: str, value: str, hint: Any) -> Any:
    """A setting in its field's type; the values of a tuple are separated by semicolons, `none` is None."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if get_origin(hint) is tuple:
        return tuple(_converted(key, part.strip(), get_args(hint)[0]) for part in value.split(";"))
    if value.lower() == "none" and type(None) in kinds:
        return None
    kind = click_type(hint) if get_origin(hint) is Literal else next((k for k in BASIC if k in kinds), None)
    if kind is None:
        raise click.UsageError(f"{DOTTED}{key} is an object, which can be set from Python alone")
    try:
        return click.types.convert_type(kind).convert(value, None, None)
    except click.BadParameter as error:
        raise click.UsageError(f"{DOTTED}{key}: {error.message}") from error


BASIC = (bool, int, float, str)
