"""`difftune sample`, `eval`, `compare` and `score`."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import click

from difftune.cli import options as o
from difftune.cli.checks import spoken
from difftune.cli.command import Command
from difftune.cli.config_file import CONFIG
from difftune.cli.guidance import guidance_of
from difftune.cli.output import show, table


@click.command(
    cls=Command,
    params=[CONFIG, o.MODEL, o.LORA, *o.GUIDANCE, o.PROMPT, o.STEPS, o.SEED, o.BATCH_SIZE, o.OUTPUT_DIR, o.JSON],
)
@click.option("--num_images", type=o.AT_LEAST_ONE, default=1, show_default=True, help="Images of each prompt.")
@click.option("--eta", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Noise of DDIM's steps.")
@click.option("--noise", metavar="FILE", help="The noise.safetensors of `difftune optimize`: a noise for each image.")
@click.pass_context
def sample(ctx: click.Context, **flags: Any) -> None:
    """Images under a guidance method: PNGs, a grid and sample.json.

    Image i of a prompt is drawn with seed + i, whatever the batch.
    """
    with redirect_stdout(sys.stderr):
        spoken(flags["prompt"])
        name, settings = guidance_of(ctx)
        from difftune.pipelines.generate import sample as run

        as_json = _taken(flags, "as_json", "guidance_scale")
        found = run(**flags | {"guidance": name, "guidance_options": settings})
    show(found, as_json, f"{len(found['images'])} images in {flags['output_dir']}, {found['nfe']:g} NFE each")


@click.command(
    "eval",
    cls=Command,
    params=[CONFIG, o.MODEL, o.LORA, *o.GUIDANCE, o.STEPS, o.SEED, o.BATCH_SIZE, o.JSON],
)
@click.option("--images_per_prompt", type=o.AT_LEAST_ONE, default=4, show_default=True, help="Images of each prompt.")
@click.option(
    "--prompts",
    metavar="LIST",
    default="shapeeval",
    show_default=True,
    help="shapeeval, shapeeval-hard, or a text file with a caption on each line.",
)
@click.option("--prompts_per_category", type=o.AT_LEAST_ONE, help="Only the first prompts of each category.")
@click.option("--baseline", metavar="FILE", help="An earlier evaluation: adds the paired difference to it.")
@click.option("--output_dir", metavar="FOLDER", help="Also write eval.json and grid.png to this new or empty folder.")
@click.pass_context
def evaluate(ctx: click.Context, **flags: Any) -> None:
    """ShapeEval: how often the oracle finds in the picture what its caption says, with 95 % intervals.

    The images of a prompt are correlated, so the intervals resample prompts. A difference counts only when its interval
    excludes 0.
    """
    with redirect_stdout(sys.stderr):
        name, settings = guidance_of(ctx)
        from difftune.evaluation.shapeeval import run

        as_json = _taken(flags, "as_json", "guidance_scale")
        found = run(**flags | {"guidance": name, "guidance_options": settings})
    show(found, as_json, _eval_table(found))


@click.command(
    cls=Command,
    params=[CONFIG, o.MODEL, o.LORA, o.METHODS, o.SCALES, o.PROMPT, o.REWARDS, o.STEPS, o.SEED, o.BATCH_SIZE]
    + [o.OUTPUT_DIR, o.JSON],
)
@click.option("--num_images", type=o.AT_LEAST_ONE, default=4, show_default=True, help="Images of each prompt.")
def compare(as_json: bool, **flags: Any) -> None:
    """Guidance methods side by side on the same seeds: grid.png, compare.json and a table.

    A scale is CFG's; cfgpp and gfcg are given the one of their own that corresponds to it.
    """
    with redirect_stdout(sys.stderr):
        spoken(flags["prompt"])
        from difftune.evaluation.compare import run

        found = run(**flags)
    show(found, as_json, _compare_table(found["rows"]))


@click.command(cls=Command, params=[CONFIG, o.REWARD, o.JSON])
@click.option("--prompt", multiple=True, metavar="TEXT", help="One for all images, or one per image.")
@click.argument("image", nargs=-1, required=True)
def score(reward: Sequence[str], prompt: Sequence[str], image: Sequence[str], as_json: bool) -> None:
    """Rewards of image files, and their weighted sum."""
    with redirect_stdout(sys.stderr):
        from difftune.evaluation.score import run

        found = run(reward, prompt, image)
    header = ["image", *found[0]["rewards"], "total"]
    rows = [[s["image"], *(f"{v:.4f}" for v in s["rewards"].values()), f"{s['total']:.4f}"] for s in found]
    show(found, as_json, table([header, *rows]))


def _taken(flags: dict[str, Any], first: str, *names: str) -> Any:
    """flags[first]; it and `names` leave the flags."""
    for name in names:
        del flags[name]
    return flags.pop(first)


def _eval_table(found: dict[str, Any]) -> str:
    difference = found.get("difference", {})
    rows = [["", "score", "95 % interval", *(["difference", "95 % interval", ""] if difference else [])]]
    for name, e in ((n, e) for n, e in found.items() if isinstance(e, dict) and "score" in e):
        rows.append([name, *_interval(e), *(_change(difference[name]) if name in difference else [])])
    return table(rows) + f"\n{found['nfe']:g} NFE per image, {found['seconds']:.0f} s"


OF_A_ROW = ("guidance", "cfg_scale", "options", "nfe", "nfe_by_branch", "seconds")  # what is no score in it


def _compare_table(rows: Sequence[dict[str, Any]]) -> str:
    scores = [key for key in rows[0] if key not in OF_A_ROW]
    lines = [["guidance", "scale", *scores, "NFE", "seconds"]]
    for r in rows:
        scale = "" if r["cfg_scale"] is None else f"{r['cfg_scale']:g}"
        lines.append([r["guidance"], scale, *(f"{r[s]:.4f}" for s in scores), f"{r['nfe']:g}", f"{r['seconds']:.2f}"])
    return table(lines)


def _interval(e: dict[str, float]) -> list[str]:
    return [f"{e['score']:.3f}", f"{e['low']:.3f} to {e['high']:.3f}"]


def _change(e: dict[str, Any]) -> list[str]:
    return [f"{e['score']:+.3f}", f"{e['low']:+.3f} to {e['high']:+.3f}", "counts" if e["counts"] else "does not count"]
