"""`difftune sample`, `eval`, `compare`, `score` and `export`."""

from collections.abc import Sequence
from typing import Any

import click

from difftune.cli import options as o
from difftune.cli.checks import spoken
from difftune.cli.command import Command, Flag, Values
from difftune.cli.config_file import CONFIG
from difftune.cli.guidance import guidance_of
from difftune.cli.output import planned, show, table
from difftune.configs.images import CompareConfig, EvalConfig, SampleConfig


@click.command(
    cls=Command,
    params=[
        CONFIG,
        o.MODEL,
        o.LORA,
        *o.GUIDANCE,
        o.PROMPT,
        o.STEPS,
        o.SEED,
        o.BATCH_SIZE,
        o.count("num_images", 1, "Images of each prompt."),
        Flag(["--image"], metavar="FILE", help="Picture that the pipeline edits (FLUX Kontext, Qwen-Image-Edit)."),
        o.count("num_frames", None, "Frames of each film, of a model of films (Wan); written as .mp4."),
        Flag(["--eta"], type=o.NOT_NEGATIVE, default=0.0, help="Noise of DDIM's steps; 1 is DDPM."),
        Flag(["--noise"], metavar="FILE", help="The noise.safetensors of `difftune optimize`: a noise for each image."),
        Flag(
            ["--lora_anneal"],
            type=click.Choice(["linear", "power", "switch"]),
            help="How the LoRA's share grows from 0 to 1 along the steps (DRaFT+). If not given: 1 throughout.",
        ),
        Flag(["--noise_lora"], metavar="FOLDER", help="Folder of `difftune train hypernoise`: moves the noise."),
        Flag(
            ["--compile/--no_compile"],
            default=False,
            help="Compile the blocks of the network and of the decoder by torch: it pays for many images.",
        ),
        o.OUTPUT_DIR,
        o.DRY_RUN,
        o.JSON,
    ],
    short_help="Draw images under a guidance method.",
    example='difftune sample --model tiny --prompt "a red circle" --num_images 4 --output_dir out',
)
@click.pass_context
def sample(ctx: click.Context, as_json: bool, dry_run: bool, guidance_scale: float | None, **flags: Any) -> None:
    """Draw images under a guidance method: PNGs, a grid and sample.json.

    Image i of a prompt is drawn with seed + i, whatever the batch.
    """
    spoken(flags["prompt"])
    name, settings = guidance_of(ctx)
    config = SampleConfig(**flags | {"guidance": name, "guidance_options": settings})
    from difftune.pipelines import dry_run as plan
    from difftune.pipelines.generate import generate

    found = plan.sample(config) if dry_run else generate(config)
    if dry_run:
        show(found, as_json, planned(found))
        return
    count = len(found["images"])
    drawn = f"{count} image{'s' * (count > 1)}"
    show(found, as_json, f"{drawn} in {flags['output_dir']}, {found['nfe']:g} NFE each")


@click.command(
    "eval",
    cls=Command,
    params=[
        CONFIG,
        Flag(
            ["--model", "--pretrained_model_name_or_path", "model"],
            metavar="NAME|FOLDER|HUB_ID",
            help="Model to draw with: tiny, tiny-turbo, a folder in diffusers' format, or an id on the Hub.",
        ),
        Flag(["--images"], metavar="FOLDER", help="Pictures with captions that are there, in place of a model's."),
        o.LORA,
        Flag(
            ["--prompts"],
            metavar="FILE|NAME",
            default="shapeeval",
            help="Prompts: shapeeval, shapeeval-hard, geneval, parti, t2i-compbench, hpd-v2, imagereward, ocr, a file "
            "(lines of text; .json, .jsonl, .csv or .tsv with categories), or dataset:NAME[:COLUMN].",
        ),
        Values(
            ["--reward"],
            metavar="NAME ...",
            help="Rewards of `difftune rewards list`, each reported by itself. If not given: the oracle.",
        ),
        Flag(["--baseline"], metavar="FILE", help="An earlier evaluation: adds the paired difference to it."),
        *o.GUIDANCE,
        o.STEPS,
        o.SEED,
        o.BATCH_SIZE,
        o.count("images_per_prompt", 4, "Images of each prompt."),
        o.count("prompts_per_category", None, "First prompts of each category that are used. If not given: all."),
        Flag(
            ["--output_dir"],
            metavar="FOLDER",
            help="Keep the pictures, the scores, eval.json, report.html and grid.png in this new or empty folder.",
        ),
        Flag(
            ["--resume_from_checkpoint"],
            type=click.Choice(["latest"]),
            help="Go on in the output folder: its pictures and scores are kept, also for another --reward.",
        ),
        o.JSON,
    ],
    short_help="Score a model on a list of prompts.",
    example="difftune eval --model tiny --guidance cfg --images_per_prompt 2",
)
@click.pass_context
def evaluate(ctx: click.Context, as_json: bool, guidance_scale: float | None, **flags: Any) -> None:
    """Score a model's images, or those of a folder, on a list of prompts, with 95 % intervals.

    Without --reward it is how often the oracle finds in the picture what its caption says. The images of a prompt are
    correlated, so the intervals resample prompts. A difference counts only when its interval excludes 0 and its
    p value is at most 0.05, adjusted by Holm's method if there are several rewards.
    """
    name, settings = guidance_of(ctx)
    config = EvalConfig(**flags | {"guidance": name, "guidance_options": settings})
    from difftune.evaluation.run_folder import run_eval

    found = run_eval(config)
    show(found, as_json, _eval_table(found) if "overall" in found else _reward_table(found["rewards"]))


@click.command(
    cls=Command,
    params=[
        CONFIG,
        o.MODEL,
        o.LORA,
        o.METHODS,
        o.SCALES,
        o.PROMPT,
        o.REWARDS,
        o.STEPS,
        o.SEED,
        o.BATCH_SIZE,
        o.count("num_images", 4, "Images of each prompt."),
        o.OUTPUT_DIR,
        o.JSON,
    ],
    short_help="Compare guidance methods on the same seeds.",
    example='difftune compare --model tiny --guidance cfg apg --prompt "a red circle" --output_dir out',
)
def compare(as_json: bool, **flags: Any) -> None:
    """Compare guidance methods on the same seeds: grid.png, compare.json and a table.

    A scale is CFG's; cfgpp and gfcg are given the one of their own that corresponds to it.
    """
    spoken(flags["prompt"])
    config = CompareConfig(**flags)
    from difftune.evaluation.compare import compare_methods

    found = compare_methods(config)
    show(found, as_json, _compare_table(found["rows"]))


@click.command(
    cls=Command,
    params=[
        CONFIG,
        o.REWARD,
        Flag(["--prompt"], multiple=True, metavar="TEXT", help="One for all images, or one for each, in order."),
        o.JSON,
        click.Argument(["image"], nargs=-1, required=True),
    ],
    short_help="Score image files by rewards.",
    example='difftune score --reward tiny-clip brightness=0.5 --prompt "a red circle" a.png b.png',
)
def score(reward: Sequence[str], prompt: Sequence[str], image: Sequence[str], as_json: bool) -> None:
    """Score image files by rewards, and by their weighted sum."""
    from difftune.evaluation.score import score_files

    found = score_files(reward, prompt, image)
    header = ["image", *found[0]["rewards"], "total"]
    rows = [[s["image"], *(f"{v:.4f}" for v in s["rewards"].values()), f"{s['total']:.4f}"] for s in found]
    show(found, as_json, table([header, *rows]))


@click.command(
    cls=Command,
    params=[
        Flag(["--lora"], metavar="FOLDER", required=True, help="Folder of a training run, whose LoRA is read."),
        Flag(
            ["--format", "layout"],
            type=click.Choice(["kohya", "comfyui"]),
            default="kohya",
            help="Layout: kohya, of kohya's scripts and Automatic1111, or comfyui.",
        ),
        click.Argument(["file"]),
    ],
    short_help="Write a LoRA for other programs.",
    example="difftune export --lora out --format kohya mine.safetensors",
)
def export(lora: str, layout: str, file: str) -> None:
    """Write a LoRA of `difftune train` to FILE in the layout of another program; the model is not needed."""
    from difftune.pipelines import lora_formats

    show({}, False, str(lora_formats.export(lora, file, layout)))


def _eval_table(found: dict[str, Any]) -> str:
    difference = found.get("difference", {})
    rows = [["", "score", "95 % interval", *(["difference", "95 % interval", ""] if difference else [])]]
    for name, e in ((n, e) for n, e in found.items() if isinstance(e, dict) and "score" in e):
        rows.append([name, *_interval(e), *(_change(difference[name]) if name in difference else [])])
    cost = f"{found['nfe']:g} NFE per image, " if "nfe" in found else ""
    return table(rows) + f"\n{cost}{found['seconds']:.0f} s"


CHANGE = ("difference", "95 % interval", "", "prompts won", "95 % interval", "p (Holm)")


def _reward_table(rewards: dict[str, Any]) -> str:
    """A row for each reward, and one for each of its categories."""
    paired = any("difference" in r for r in rewards.values())
    rows = [["", "score", "95 % interval", *(CHANGE if paired else ()), ""]]
    for name, r in rewards.items():
        change = [*_change(r["difference"]), *_wins(r)] if paired else []
        rows.append([name, *_interval(r["overall"]), *change, "TRAINED ON" if r["trained_on"] else ""])
        rows += [[f"  {kind}", *_interval(e)] for kind, e in r["categories"].items() if len(r["categories"]) > 1]
    return table(rows)


def _wins(r: dict[str, Any]) -> list[str]:
    wins = r["win_rate"]
    return [f"{wins['rate']:.0%}", f"{wins['low']:.0%} to {wins['high']:.0%}", f"{r['difference']['p_holm']:.2g}"]


# what is not a score in a row of a comparison
OF_A_ROW = ("guidance", "cfg_scale", "options", "scheduler", "nfe", "nfe_by_branch", "seconds")


def _compare_table(rows: Sequence[dict[str, Any]]) -> str:
    scores = [key for key in rows[0] if key not in OF_A_ROW]
    lines = [["guidance", "scale", *scores, "NFE", "seconds"]]
    for r in rows:
        scale = "" if r["cfg_scale"] is None else f"{r['cfg_scale']:g}"
        lines.append([r["guidance"], scale, *(f"{r[s]:.4f}" for s in scores), f"{r['nfe']:g}", f"{r['seconds']:.2f}"])
    return table(lines)


def _interval(e: dict[str, Any], form: str = ".3f") -> list[str]:
    low, high = ("?" if e[end] is None else format(e[end], form) for end in ("low", "high"))
    return [format(e["score"], form), f"{low} to {high}"]


def _change(e: dict[str, Any]) -> list[str]:
    return [*_interval(e, "+.3f"), "counts" if e["counts"] else "does not count"]
