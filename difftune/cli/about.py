"""`difftune methods`, `doctor` and `demo`."""

from collections.abc import Mapping
from typing import Any

import click

from difftune.cli import options as o
from difftune.cli.command import Command, Flag
from difftune.cli.config_file import CONFIG
from difftune.cli.output import paragraphs, said, show, summary
from difftune.configs.noise import RenoConfig
from difftune.recipes import RECIPES, Recipe


@click.command(
    cls=Command,
    params=[o.JSON],
    short_help="List all methods, rewards and recipes.",
    example="difftune methods --json",
)
def methods(as_json: bool) -> None:
    """List guidance methods, samplers, searches, noise optimisation, rewards and recipes, a line each, with their
    classes in Python."""
    found = _methods()
    listed = {kind: [(entry["name"], _worded(entry)) for entry in entries] for kind, entries in found.items()}
    show(found, as_json, "\n\n".join(f"{kind}:\n{paragraphs(entries, 2)}" for kind, entries in listed.items()))


def _worded(entry: Mapping[str, Any]) -> str:
    """What an entry is, after its name in Python where it has one."""
    said = f"{entry['python']}: {entry['summary']}" if "python" in entry else entry["summary"]
    if "forwards" not in entry:
        return said
    judge = "Needs a gradient" if entry["needs_gradient"] else "Needs no gradient"
    cost = f"{entry['forwards']} forwards an image without guidance"
    return f"{said} {judge}; {entry['policy']}; {cost}; tested: {entry['families']}."


def _methods() -> dict[str, list[dict[str, Any]]]:
    from guidance.methods.catalogue import GUIDANCE
    from guidance.search.catalogue import SEARCHES
    from rewards.registry import REWARDS
    from solvers.samplers.catalogue import SAMPLERS

    return {
        "guidance": _described({name: (method.__name__, method) for name, method in GUIDANCE.items()}),
        "samplers": [{"name": name, "summary": summary(step)} for name, step in SAMPLERS.items()],
        "searches": _described({name: (search.config.__name__, search.config) for name, search in SEARCHES.items()}),
        "noise": _described({"reno": ("ReNO", RenoConfig)}),
        "rewards": [
            {"name": name, "summary": r.summary, "differentiable": r.differentiable, "needs_prompt": r.needs_prompt}
            for name, r in REWARDS.items()
        ],
        "recipes": [_recipe(recipe) for recipe in RECIPES.values()],
    }


def _recipe(recipe: Recipe) -> dict[str, Any]:
    """What a recipe is, needs and costs."""
    (about,) = _described({recipe.name: (recipe.config.__name__, recipe.config)})
    return {**about, "needs_gradient": recipe.reward == "gradient", **recipe.facts._asdict()}


def _described(found: Mapping[str, tuple[str, Any]]) -> list[dict[str, Any]]:
    """Name on the command line, name in Python, and what it is."""
    return [{"name": name, "python": python, "summary": summary(thing)} for name, (python, thing) in found.items()]


@click.command(
    cls=Command,
    params=[o.JSON],
    short_help="Show versions, devices, models and caches.",
    example="difftune doctor",
)
def doctor(as_json: bool) -> None:
    """Versions, devices, attention backends, embedded models, cache."""
    from difftune.environment import report

    found = report()
    show(found, as_json, "\n".join(_lines(found)))


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    """A nested dict as indented lines."""
    lines = []
    for key, inner in value.items():
        for item in inner if isinstance(inner, list) and inner and isinstance(inner[0], dict) else [inner]:
            nested = isinstance(item, dict)
            lines += [f"{indent}{key}:", *_lines(item, indent + "  ")] if nested else [f"{indent}{key}: {said(item)}"]
    return lines


@click.command(
    cls=Command,
    params=[
        CONFIG,
        o.SEED,
        Flag(["--output_dir"], default="runs/demo", metavar="FOLDER", help="Folder of the report; it may hold a demo."),
        o.JSON,
    ],
    short_help="Show the main job on the embedded models.",
    example="difftune demo --output_dir demo",
)
def demo(seed: int, output_dir: str, as_json: bool) -> None:
    """The main job on the embedded models, offline: guidance, a LoRA, an optimised noise, a search; a report with
    pictures."""
    from difftune.demo.run import run_demo, summarise

    found = run_demo(output_dir, seed)
    show(found, as_json, f"{output_dir}/report.html\n{summarise(found)}")
