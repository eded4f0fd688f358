"""`--config`: a YAML file whose keys become the defaults of the command."""

from pathlib import Path
from typing import Any

import click

from difftune.cli.command import check_text
from difftune.files.text import read_text
from rewards.registry import unknown

EXAMPLES = Path(__file__).parent.parent / "examples"
FILE_SETTINGS = "difftune.guidance"  # where a context keeps the guidance.KEY of its file
NULL, FLOAT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:float"
INFINITE = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}  # as YAML writes them: as flags do
PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq")}


def read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Make a YAML file the defaults of the command: flags win. Its keys are the names of the flags."""
    if path is None:
        return
    options = [p for p in ctx.command.params if isinstance(p, click.Option)]
    names: dict[str, click.Parameter] = {flag.lstrip("-"): p for p in options for flag in p.opts}
    names |= {p.name: p for p in ctx.command.params if isinstance(p, click.Argument) and p.nargs == 1 and p.name}
    dotted = names.pop("guidance.KEY", None) is not None
    names.pop("config", None)
    defaults: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for key, value in _mapping(path).items():
        if dotted and (key == "guidance_options" or key.startswith("guidance.")):
            added = _options(path, value) if key == "guidance_options" else {key.removeprefix("guidance."): value}
            if both := added.keys() & settings.keys():
                raise click.UsageError(f"{path}: guidance.{min(both)} is given twice: give it once")
            settings |= added
        elif key not in names:
            raise click.UsageError(f"{path}: {unknown('key', key, names)}")
        elif names[key].name in defaults:
            raise click.UsageError(f"{path}: {key} is given twice, by two of its names: give it once")
        elif value is not None:
            defaults[names[key].name or key] = (
                _listed(path, key, value) if names[key].multiple else _text(path, key, value)
            )
    ctx.default_map = defaults
    ctx.meta[FILE_SETTINGS] = settings


def config_file(name: str) -> Path:
    """The file of that path, or, if there is none, the example of that name."""
    example = EXAMPLES / f"{name.removesuffix('.yaml')}.yaml"
    return example if not Path(name).exists() and Path(name).name == name and example.is_file() else Path(name)


def _mapping(path: str) -> dict[str, Any]:
    import yaml

    text = read_text(config_file(path), "--config")
    try:
        found = _value(path, yaml.compose(text, yaml.SafeLoader), set())
    except (yaml.YAMLError, RecursionError) as error:
        why = "its brackets are nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise click.UsageError(f"cannot read --config {path}: {' '.join(why.split())}") from error
    if not isinstance(found, dict):
        raise click.UsageError(f"--config {path} must hold `key: value` lines")
    return found


def _value(path: str, node: Any, seen: set[int]) -> Any:
    """What a YAML node holds: each scalar as the text that stands there, None for null.

    Flags read texts, so that 7.5 is not a whole number here either, and what a run wrote is read back as it was.
    """
    import yaml

    if node is None:
        return None
    if id(node) in seen or node.tag not in PLAIN:
        what = "an alias" if id(node) in seen else f"the tag {node.tag}"
        raise click.UsageError(
            f"--config {path}, line {node.start_mark.line + 1}: {what} is not read; write the value out"
        )
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        check_text(node.value)
        named = INFINITE if node.tag == FLOAT else {}
        return None if node.tag == NULL else named.get(node.value.lower(), node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_value(path, inner, seen) for inner in node.value]
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = _value(path, key_node, seen)
        line = f"--config {path}, line {key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            raise click.UsageError(f"{line}: a key is a name, not {key}")
        if key in found:
            raise click.UsageError(f"{line}: the key {key!r} is given twice: give it once")
        found[key] = _value(path, value_node, seen)
    return found


def _options(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise click.UsageError(f"{path}: guidance_options holds `key: value` lines, not {value}")
    return value or {}


def _text(path: str, key: str, value: Any) -> str:
    """What would stand after the flag."""
    if not isinstance(value, str):
        raise click.UsageError(f"{path}: {key} takes one value, not {value}")
    return value


def _listed(path: str, key: str, value: Any) -> list[str]:
    """Values of a flag that takes several: `tiny-clip`, `[tiny-clip, jpeg=0.1]` or `{tiny-clip: 1.0}`."""
    if isinstance(value, dict):
        value = [f"{name}={_text(path, key, weight)}" for name, weight in value.items()]
    return [_text(path, key, item) for item in value] if isinstance(value, list) else [value]


CONFIG = click.Option(
    ["--config"],
    metavar="FILE|NAME",
    is_eager=True,
    expose_value=False,
    callback=read_config,
    help="YAML file with flags as keys, or the name of one in difftune/examples; flags given beside it win.",
)
