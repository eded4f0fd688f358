"""The guidance method that flags and file describe."""

import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from difftune.cli.command import DOTTED
from difftune.cli.config_file import FILE_SETTINGS
from difftune.cli.fields import click_type


def guidance_of(ctx: click.Context) -> tuple[str, dict[str, Any]]:
    """The chosen guidance method and its settings, each in its field's type; the command line wins over the file."""
    chosen = ctx.params
    name = chosen["guidance"]
    given: dict[str, Any] = {}
    for pair in chosen["guidance_options"]:
        key, _, value = pair.partition("=")
        if key in given:
            raise click.UsageError(f"{DOTTED}{key} is given twice: give it once")
        given[key] = value
    settings = ctx.meta.get(FILE_SETTINGS, {}) | given
    explicit = ctx.get_parameter_source("guidance_scale") in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    if chosen["guidance_scale"] is not None and (explicit or "scale" not in settings):
        settings["scale"] = str(chosen["guidance_scale"])
    return name, _typed(name, settings)


def _typed(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    from difftune.lookup import guidance_field, guidance_kinds

    methods = guidance_kinds(name)
    places = {key: guidance_field(name, key) for key in settings}
    hints = {key: get_type_hints(methods[depth], include_extras=True)[field] for key, (depth, field) in places.items()}
    return {key: _converted(key, value, hints[key]) for key, value in settings.items()}


def _converted(key: str, value: Any, hint: Any) -> Any:
    """A setting in its field's type. The values of a tuple are a list, or separated by semicolons; `none` is None."""
    if get_origin(hint) is tuple:
        return tuple(_converted(key, part, get_args(hint)[0]) for part in _parts(value))
    kinds = _kinds(hint)
    if type(None) in kinds and (value is None or str(value).lower() == "none"):
        return None
    if not isinstance(value, str):
        raise click.UsageError(f"{DOTTED}{key} takes one value, not {value}")
    if not kinds & {bool, int, float, str}:
        raise click.UsageError(f"{DOTTED}{key} is an object, which can be set from Python alone")
    try:
        return click.types.convert_type(bool if bool in kinds else click_type(hint)).convert(value, None, None)
    except click.BadParameter as error:
        raise click.UsageError(f"{DOTTED}{key}: {error.message}") from error


def _parts(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(";")] if value.strip() else []
    return value if isinstance(value, list) else [value]


def _kinds(hint: Any) -> set[Any]:
    """The types that a value may have."""
    if get_origin(hint) in (Union, types.UnionType):
        return {kind for member in get_args(hint) for kind in _kinds(member)}
    if get_origin(hint) is Annotated:
        return _kinds(get_args(hint)[0])
    return {type(name) for name in get_args(hint)} if get_origin(hint) is not None else {hint}
