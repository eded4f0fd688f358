"""`--config`: a YAML file whose keys become the defaults of the command."""

from pathlib import Path
from typing import Any

import click

from rewards.registry import unknown

EXAMPLES = Path(__file__).parent.parent / "examples"
FILE_SETTINGS = "difftune.guidance"  # where a context keeps the guidance.KEY of its file


def read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Make a YAML file the defaults of the command: flags win. Its keys are the names of the flags."""
    if path is None:
        return
    names = {flag.lstrip("-"): p for p in ctx.command.params if isinstance(p, click.Option) for flag in p.opts}
    for other in ("config", "guidance.KEY"):
        names.pop(other, None)
    defaults: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for key, value in _mapping(path).items():
        if key == "guidance_options" and "guidance" in names:
            settings |= value or {}
        elif key.startswith("guidance.") and "guidance" in names:
            settings[key.removeprefix("guidance.")] = value
        elif key not in names:
            raise click.UsageError(f"{path}: {unknown('key', key, names)}")
        elif value is not None:
            defaults[names[key].name] = _listed(value) if names[key].multiple else _text(path, key, value)
    ctx.default_map = defaults
    ctx.meta[FILE_SETTINGS] = settings


def config_file(name: str) -> Path:
    """The file of that path, or, where there is none, the example of that name."""
    example = EXAMPLES / f"{name.removesuffix('.yaml')}.yaml"
    return example if not Path(name).exists() and Path(name).name == name and example.is_file() else Path(name)


def _mapping(path: str) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(config_file(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.UsageError(f"cannot read --config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise click.UsageError(f"--config {path} must hold `key: value` lines")
    return {str(key): value for key, value in found.items()}


def _text(path: str, key: str, value: Any) -> str:
    """What would stand after the flag: click's own types read it, so that 7.5 is no integer here either."""
    if isinstance(value, list | dict):
        raise click.UsageError(f"{path}: {key} takes one value, not {value}")
    return str(value)


def _listed(value: Any) -> list[str]:
    """Values of a flag that takes several: `tiny-clip`, `[tiny-clip, jpeg=0.1]` or `{tiny-clip: 1.0}`."""
    if isinstance(value, dict):
        return [f"{name}={weight}" for name, weight in value.items()]
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


CONFIG = click.Option(
    ["--config"],
    type=click.Path(),
    is_eager=True,
    expose_value=False,
    callback=read_config,
    help="YAML file with the same keys, or the name of one in difftune/examples; flags win.",
)
