"""The guidance method that flags and file describe."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from difftune.cli.command import DOTTED
from difftune.cli.config_file import FILE_SETTINGS
from difftune.cli.fields import click_type


def guidance_of(ctx: click.Context) -> tuple[str, dict[str, Any]]:
    """The chosen guidance method and its settings, each in its field's type; the command line wins over the file."""
    file = dict(ctx.meta.get(FILE_SETTINGS, {}))
    given = _pairs(ctx.params["guidance_options"])
    scale = ctx.params["guidance_scale"]
    if scale is not None:
        place = given if ctx.get_parameter_source("guidance_scale") is ParameterSource.COMMANDLINE else file
        if "scale" in place:
            raise click.UsageError(f"--guidance_scale and {DOTTED}scale are the same setting: give one of them")
        place["scale"] = str(scale)
    name = ctx.params["guidance"]
    return name, _typed(name, file, _from_file) | _typed(name, given, _from_flag)


def _pairs(options: Sequence[str]) -> dict[str, str]:
    """What the flags --guidance.KEY say, as KEY=VALUE, by key."""
    given: dict[str, str] = {}
    for pair in options:
        key, _, value = pair.partition("=")
        if key in given:
            raise click.UsageError(f"{DOTTED}{key} is given twice: give it once")
        given[key] = value
    return given


def _typed(name: str, settings: Mapping[str, Any], convert: Callable[[str, Any, Any], Any]) -> dict[str, Any]:
    from difftune.lookup import guidance_field, guidance_kinds

    methods = guidance_kinds(name)
    places = {key: guidance_field(name, key) for key in settings}
    hints = {key: get_type_hints(methods[depth], include_extras=True)[field] for key, (depth, field) in places.items()}
    return {key: convert(key, value, hints[key]) for key, value in settings.items()}


def _from_flag(key: str, text: str, hint: Any) -> Any:
    """A flag's text in its field's type. The values of a tuple are separated by semicolons; `none` is None."""
    if get_origin(hint) is tuple:
        return tuple(_from_flag(key, part.strip(), get_args(hint)[0]) for part in text.split(";") if text.strip())
    return None if text.lower() == "none" and type(None) in _kinds(hint) else _converted(key, text, hint)


def _from_file(key: str, value: Any, hint: Any) -> Any:
    """A file's value in its field's type, where a list is a tuple's values, and null None; a text as for a flag, but
    that one which stands for a text is that text, be it `none`."""
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_from_file(key, part, get_args(hint)[0]) for part in value)
    if value is None and type(None) in _kinds(hint):
        return None
    if not isinstance(value, str):
        raise click.UsageError(f"{DOTTED}{key} takes one value, not {value}")
    return _converted(key, value, hint) if str in _kinds(hint) else _from_flag(key, value, hint)


def _converted(key: str, text: str, hint: Any) -> Any:
    """A text as what a field holds: a truth value, a number in its range, one of some names, or any text."""
    kinds = _kinds(hint)
    if not kinds & {bool, int, float, str}:
        raise click.UsageError(f"{DOTTED}{key} is an object, which can be set from Python alone")
    try:
        return click.types.convert_type(bool if bool in kinds else click_type(hint)).convert(text, None, None)
    except click.BadParameter as error:
        raise click.UsageError(f"{DOTTED}{key}: {error.message}") from error


def _kinds(hint: Any) -> set[Any]:
    """The types that a value may have."""
    if get_origin(hint) in (Union, types.UnionType):
        return {kind for member in get_args(hint) for kind in _kinds(member)}
    if get_origin(hint) is Annotated:
        return _kinds(get_args(hint)[0])
    return {type(name) for name in get_args(hint)} if get_origin(hint) is not None else {hint}
