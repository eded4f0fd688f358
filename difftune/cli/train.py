"""`difftune train`, `optimize` and `search`: the flags are the fields of a Config."""

from dataclasses import fields
from importlib import import_module
from typing import Any

import click
from click.core import ParameterSource

from difftune.cli import options as o
from difftune.cli.checks import spoken
from difftune.cli.command import Command
from difftune.cli.config_file import EXAMPLES
from difftune.cli.fields import options_of
from difftune.cli.guidance import guidance_of
from difftune.cli.output import planned, show, summary
from difftune.configs.noise import RenoConfig
from difftune.configs.search import SearchConfig
from difftune.recipes import RECIPES

LARGER = sorted(file.stem for file in EXAMPLES.glob("*.yaml") if not file.stem.startswith("tiny-"))


@click.group(
    short_help="Fine-tune a model on a reward.",
    epilog="Settings to begin with, for --config: tiny-RECIPE (minutes on two cores), and for larger models "
    f"{', '.join(LARGER)}. --dry_run says first what a run takes.",
)
def train() -> None:
    """Fine-tune a model on a reward. `accelerate launch -m difftune train ...` works too."""


SHORT = {  # of each recipe, what it learns from
    "alignprop": "Reward gradient through the sampler.",
    "draft": "Reward gradient through the last K steps.",
    "drtune": "Reward gradient through steps all along.",
    "refl": "Reward gradient of an early prediction.",
    "adjoint-matching": "Reward gradient, swept by the base model.",
    "hypernoise": "A LoRA that moves the noise, by gradients.",
    "ddpo": "Policy gradient (PPO) on any reward.",
    "grpo": "Groups of images, by any reward (GRPO).",
    "nft": "Noised images by any reward, no sampler.",
    "d3po": "Preferences, step by step.",
    "dpo": "Preference pairs (Diffusion-DPO).",
    "kto": "Good and bad images, each by itself.",
    "dro": "Preference pairs, by denoising errors alone.",
    "pso": "Preference pairs, for few-step models.",
    "dragon": "Sets of better and of worse images.",
}


def command_of(name: str, config: type, call: str, plan: str, short: str, example: str) -> click.Command:
    """The command that calls "module:function" with a Config, whose fields are its flags; `plan` for --dry_run."""

    @click.pass_context
    def run(ctx: click.Context, as_json: bool, dry_run: bool, **flags: Any) -> None:
        module, _, function = (plan if dry_run else call).partition(":")
        found = vars(import_module(module))[function](configured(ctx, config))
        show(found, as_json, planned(found) if dry_run else ending(found, flags["output_dir"]))

    params = [*options_of(config), o.DRY_RUN, o.JSON]
    return Command(name, params=params, callback=run, help=summary(config), short_help=short, example=example)


ENDS = (  # what a command says at its end, and the keys of its two numbers
    ("training reward, first and last step", "reward_first", "reward_last"),
    ("validation reward, before and after", "validation_first", "validation_last"),
    ("reward, before and after", "reward_before", "reward_after"),
    ("held-out reward, before and after", "held_out_first", "held_out_last"),
    ("held-out reward, before and after", "held_out_before", "held_out_after"),
)


def ending(found: dict[str, Any], folder: str) -> str:
    """The rewards before and after, what a search cost, and the folder: a line each."""
    pairs = [(about, found.get(first), found.get(last)) for about, first, last in ENDS]
    lines = [f"{about}: {a:.4g} -> {b:.4g}" for about, a, b in pairs if a is not None and b is not None]
    if "reward_calls" in found:
        spent = f"{found['nfe']:g} network evaluations and {found['reward_calls']:g} reward calls a prompt"
        lines.append(f"best reward: {found['reward']:.4g}, for {spent}")
    return "\n".join([*lines, folder])


def _search() -> click.Command:
    """`search METHOD`: the flags are the fields of SearchConfig."""
    example = 'difftune search dts-star --prompt "a red circle" --reward tiny-clip --output_dir out'
    call = "difftune.search_runs.run_folder:search_in_folder"
    plan = "difftune.search_runs.dry_run:search"
    command = command_of("search", SearchConfig, call, plan, "Search for images of high reward.", example)
    flags = [param for param in command.params if param.name != "method"]
    command.params = [click.Argument(["method"], metavar="METHOD"), *flags]
    return command


def configured(ctx: click.Context, config: type) -> Any:
    """The Config that file and flags describe."""
    given = {f.name: ctx.params[f.name] for f in fields(config) if not _by_default(ctx, f.name)}
    flags = vars(config()) | {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}
    if "prompt" in flags:
        spoken(flags["prompt"])
    name, settings = guidance_of(ctx)
    scale = settings.pop("scale", None)
    return config(**flags | {"guidance": name, "guidance_scale": scale, "guidance_options": settings})


def _by_default(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.DEFAULT


for _name, _recipe in RECIPES.items():
    _example = f"difftune train {_name} --config tiny-{_name} --output_dir out"
    _call, _plan = "difftune.recipes:train_in_folder", "difftune.recipes.dry_run:training"
    train.add_command(command_of(_name, _recipe.config, _call, _plan, SHORT[_name], _example))
optimize = command_of(
    "optimize",
    RenoConfig,
    "difftune.reno.run_folder:optimize_in_folder",
    "difftune.reno.dry_run:optimize",
    "Optimise the initial noise on a reward.",
    'difftune optimize --prompt "a red circle" --reward tiny-clip --output_dir out',
)
search = _search()
