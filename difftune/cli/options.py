"""How our flags are read: from dataclasses, from YAML files, several values after one flag, and `--guidance.KEY VALUE`.

Nothing here imports torch, so that `--help` answers at once.
"""

import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from rewards.registry import unknown

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # never a value of a flag before them
ALIASES = {
    "model": ["--pretrained_model_name_or_path"],
    "num_inference_steps": ["--steps"],
}
METAVARS = {"model": "NAME|FOLDER|HUB_ID", "reward": "NAME[=WEIGHT] ...", "guidance": "NAME", "output_dir": "FOLDER"}
EXAMPLES = Path(__file__).parent.parent / "examples"
DOTTED = "--guidance."  # the key is whatever follows
FILE_SETTINGS = "difftune.guidance"  # where a context keeps the guidance.KEY of its file


class Values(click.Option):
    """An option that takes several values after one flag, and repeats."""

    def __init__(self, flags: Sequence[str], **about: Any):
        super().__init__(flags, **about | {"multiple": True})


class Command(click.Command):
    """A command whose `Values` and `--guidance.KEY` are read, and whose defaults come from `--config`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._spelled_out(args)))

    def _spelled_out(self, args: Sequence[str]) -> Iterable[str]:
        """The arguments as click reads them: one flag per value, the key of a setting with its value."""
        flags = {flag for p in self.params if isinstance(p, Values) for flag in p.opts}
        files = any(isinstance(p, click.Argument) for p in self.params)
        rest = list(args)
        while rest:
            flag, equals, value = rest.pop(0).partition("=")
            if flag == "--":
                yield from ("--", *rest)
                return
            if flag.startswith(DOTTED):
                yield from _setting(flag, [value] if equals else rest)
            elif flag in flags:
                given = [value] if equals else []
                while rest and not rest[0].startswith("-") and not (files and rest[0].lower().endswith(IMAGES)):
                    given.append(rest.pop(0))
                yield from [word for v in given for word in (flag, v)] or [flag]
            else:
                yield flag + equals + value


def _setting(flag: str, rest: list[str]) -> tuple[str, str]:
    if not rest:
        raise click.UsageError(f"{flag} needs a value")
    return DOTTED + "KEY", f"{flag.removeprefix(DOTTED)}={rest.pop(0)}"


def known(kind: str, name: str, names: Collection[str]) -> str:
    """The name, if it is one of `names`; a usage error that suggests the nearest otherwise."""
    if name not in names:
        raise click.UsageError(unknown(kind, name, names))
    return name


# ------------------------------------------------------------------------------------------------ dataclass -> options


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
        return Values(flags, type=_click_type(get_args(kind)[0]), **about)
    return click.Option(flags, type=_click_type(kind), **about)


def _unwrapped(hint: Any) -> Any:
    """X of X | None."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    return next(member for member in get_args(hint) if member is not type(None))


def _click_type(kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return click.Choice([str(value) for value in get_args(kind)])
    return kind if kind in (int, float, str) else str


# ------------------------------------------------------------------------------------------------ YAML -> defaults


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


# ------------------------------------------------------------------------------------------------ guidance


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
    kind = _click_type(hint) if get_origin(hint) is Literal else next((k for k in BASIC if k in kinds), None)
    if kind is None:
        raise click.UsageError(f"{DOTTED}{key} is an object, which can be set from Python alone")
    try:
        return click.types.convert_type(kind).convert(value, None, None)
    except click.BadParameter as error:
        raise click.UsageError(f"{DOTTED}{key}: {error.message}") from error


BASIC = (bool, int, float, str)


# ------------------------------------------------------------------------------------------------ shared by commands

AT_LEAST_ONE = click.IntRange(min=1)
CONFIG = click.Option(
    ["--config"],
    type=click.Path(),
    is_eager=True,
    expose_value=False,
    callback=read_config,
    help="YAML file with the same keys, or the name of one in difftune/examples; flags win.",
)
MODEL = click.Option(
    ["--model", "--pretrained_model_name_or_path", "model"],
    metavar="NAME|FOLDER|HUB_ID",
    required=True,
    help="An embedded model (tiny, tiny-turbo, tiny-weak), a diffusers folder, or a Hub id.",
)
LORA = Values(
    ["--lora"], metavar="FOLDER[=SHARE] ...", help="Load what training wrote there; several LoRAs are mixed by shares."
)
GUIDANCE: list[click.Parameter] = [
    click.Option(
        ["--guidance"],
        metavar="NAME",
        default="cfg",
        show_default=True,
        help="One of `difftune methods`; interval:apg is APG in an interval.",
    ),
    click.Option([DOTTED + "KEY", "guidance_options"], metavar="VALUE", multiple=True, help="One of its settings."),
    click.Option(["--guidance_scale"], type=float, help="Short for --guidance.scale."),
]
REWARD = Values(
    ["--reward"], metavar="NAME[=WEIGHT] ...", required=True, help="Of `difftune methods`; weight 1 if not given."
)
REWARDS = Values(
    ["--reward"], metavar="NAME ...", help="Scores beside saturation and contrast; the oracle where it can judge."
)
METHODS = Values(
    ["--guidance"], metavar="NAME ...", default=["cfg"], show_default=True, help="Methods of `difftune methods`."
)
SCALES = Values(["--scales"], metavar="W ...", type=float, default=[5.0], show_default=True, help="CFG scales.")
PROMPT = Values(["--prompt"], metavar="TEXT ...", required=True, help="One prompt or several.")
STEPS = click.Option(
    ["--num_inference_steps", "--steps", "num_inference_steps"],
    type=AT_LEAST_ONE,
    default=25,
    show_default=True,
    help="Sampling steps.",
)
SEED = click.Option(["--seed"], type=click.IntRange(min=0), default=0, show_default=True, help="Of all random numbers.")
OUTPUT_DIR = click.Option(
    ["--output_dir"], type=click.Path(), metavar="FOLDER", required=True, help="A new or empty folder."
)
BATCH_SIZE = click.Option(
    ["--batch_size"], type=AT_LEAST_ONE, default=16, show_default=True, help="Images at a time; it changes no image."
)
JSON = click.Option(["--json", "as_json"], is_flag=True, help="Print JSON alone on stdout.")
