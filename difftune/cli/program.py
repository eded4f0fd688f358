"""The command line. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

import dis
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, fields
from importlib import import_module
from math import isfinite
from types import TracebackType
from typing import Any

import click

from difftune import __version__
from difftune.cli import options as o
from difftune.cli.label import label
from difftune.configs.noise import RenoConfig
from difftune.configs.recipes import (
    AlignPropConfig,
    D3POConfig,
    DDPOConfig,
    DPOConfig,
    DraftConfig,
    DragonConfig,
    DROConfig,
    DrtuneConfig,
    KTOConfig,
    PSOConfig,
    ReflConfig,
)
from difftune.configs.search import SearchConfig
from difftune.errors import RunError, UserError

RECIPES: dict[str, type] = {
    "alignprop": AlignPropConfig,
    "draft": DraftConfig,
    "drtune": DrtuneConfig,
    "refl": ReflConfig,
    "ddpo": DDPOConfig,
    "d3po": D3POConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "dro": DROConfig,
    "pso": PSOConfig,
    "dragon": DragonConfig,
}
OURS = ("difftune", "guidance", "rewards", "solvers")


class Program(click.Group):
    """A group that ends with one sentence where the user can put it right, and with a traceback where we must."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            return super().main(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _stop(error.format_message(), error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            _stop("interrupted", 130)
        except UserError as error:
            _stop(str(error), error.exit_code)
        except (ImportError, ValueError, OSError) as error:
            if not _raised_by_us(error.__traceback__):
                raise
            _stop(str(error), RunError.exit_code)


def _stop(message: str, code: int) -> None:
    click.echo(f"difftune: {message}", err=True)
    sys.exit(code)


def _raised_by_us(trace: TracebackType | None) -> bool:
    """Whether the exception comes from a `raise` statement of this project: then it is a sentence for the user."""
    assert trace is not None
    while trace.tb_next:
        trace = trace.tb_next
    ours = trace.tb_frame.f_globals["__name__"].split(".")[0] in OURS
    return ours and trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Guide, search, optimise and align diffusion models with any reward."""


def main() -> None:
    cli(prog_name="difftune")


# ------------------------------------------------------------------------------------------------ pictures


@cli.command(
    cls=o.Command,
    params=[o.CONFIG, o.MODEL, o.LORA, *o.GUIDANCE, o.PROMPT, o.STEPS, o.SEED, o.BATCH_SIZE, o.OUTPUT_DIR, o.JSON],
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
        _spoken(flags["prompt"])
        name, settings = o.guidance_of(ctx)
        from difftune.pipelines.generate import sample as run

        as_json = _taken(flags, "as_json", "guidance_scale")
        found = run(**flags | {"guidance": name, "guidance_options": settings})
    _print(found, as_json, f"{len(found['images'])} images in {flags['output_dir']}, {found['nfe']:g} NFE each")


@cli.command(
    "eval",
    cls=o.Command,
    params=[o.CONFIG, o.MODEL, o.LORA, *o.GUIDANCE, o.STEPS, o.SEED, o.BATCH_SIZE, o.JSON],
)
@click.option("--images_per_prompt", type=o.AT_LEAST_ONE, default=4, show_default=True, help="Images of each prompt.")
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
        name, settings = o.guidance_of(ctx)
        from difftune.evaluation.shapeeval import run

        as_json = _taken(flags, "as_json", "guidance_scale")
        found = run(**flags | {"guidance": name, "guidance_options": settings})
    _print(found, as_json, _eval_table(found))


@cli.command(
    cls=o.Command,
    params=[o.CONFIG, o.MODEL, o.LORA, o.METHODS, o.SCALES, o.PROMPT, o.REWARDS, o.STEPS, o.SEED, o.BATCH_SIZE]
    + [o.OUTPUT_DIR, o.JSON],
)
@click.option("--num_images", type=o.AT_LEAST_ONE, default=4, show_default=True, help="Images of each prompt.")
def compare(as_json: bool, **flags: Any) -> None:
    """Guidance methods side by side on the same seeds: grid.png, compare.json and a table.

    A scale is CFG's; cfgpp and gfcg are given the one of their own that corresponds to it.
    """
    with redirect_stdout(sys.stderr):
        _spoken(flags["prompt"])
        if flags["reward"]:
            _known_rewards(flags["reward"])
        from difftune.evaluation.compare import run

        found = run(**flags)
    _print(found, as_json, _compare_table(found["rows"]))


@cli.command(cls=o.Command, params=[o.CONFIG, o.REWARD, o.JSON])
@click.option("--prompt", multiple=True, metavar="TEXT", help="One for all images, or one per image.")
@click.argument("image", nargs=-1, required=True)
def score(reward: Sequence[str], prompt: Sequence[str], image: Sequence[str], as_json: bool) -> None:
    """Rewards of image files, and their weighted sum."""
    with redirect_stdout(sys.stderr):
        from difftune.evaluation.score import run

        found = run(_known_rewards(reward), prompt, image)
    header = ["image", *found[0]["rewards"], "total"]
    rows = [[s["image"], *(f"{v:.4f}" for v in s["rewards"].values()), f"{s['total']:.4f}"] for s in found]
    _print(found, as_json, _table([header, *rows]))


# ------------------------------------------------------------------------------------------------ recipes


@cli.group(cls=click.Group)
def train() -> None:
    """Fine-tune a model on a reward. `accelerate launch -m difftune train ...` works too."""


def _recipe(name: str, config: type, module: str) -> click.Command:
    """The command of a recipe: its flags are the fields of its Config."""

    @click.pass_context
    def run(ctx: click.Context, as_json: bool, **flags: Any) -> None:
        with redirect_stdout(sys.stderr):
            found = import_module(module).run(_configured(ctx, config))
        _print(found if isinstance(found, dict) else {"output_dir": flags["output_dir"]}, as_json, flags["output_dir"])

    return o.Command(name, params=[*o.options_of(config), o.JSON], callback=run, help=_summary(config))


def _search() -> click.Command:
    """`search METHOD`: the flags are the fields of SearchConfig."""
    command = _recipe("search", SearchConfig, "difftune.search_runs.run_folder")
    flags = [param for param in command.params if param.name != "method"]
    command.params = [click.Argument(["method"], metavar="METHOD"), *flags]
    return command


def _configured(ctx: click.Context, config: type) -> Any:
    """The Config that file and flags describe."""
    flags = {f.name: ctx.params[f.name] for f in fields(config)}
    flags |= {name: list(value) for name, value in flags.items() if isinstance(value, tuple)}
    _known_rewards(flags["reward"])
    if "prompt" in flags:
        _spoken(flags["prompt"])
    name, settings = o.guidance_of(ctx)
    scale = settings.pop("scale", None)
    return config(**flags | {"guidance": name, "guidance_scale": scale, "guidance_options": settings})


# ------------------------------------------------------------------------------------------------ rewards


@cli.group(cls=click.Group)
def rewards() -> None:
    """The rewards that there are, and what they download."""


@rewards.command("list", params=[o.JSON])
def list_rewards(as_json: bool) -> None:
    """Every reward, those of other distributions too: what it asks for and gives."""
    from rewards.registry import REWARDS, plugins

    for why in plugins():
        click.echo(f"difftune: {why}", err=True)
    found = [_facts(name, entry) for name, entry in sorted(REWARDS.items())]
    header = ["name", "prompt", "gradient", "licence", "summary"]
    rows = [
        [f["name"], _said(f["needs_prompt"]), _said(f["differentiable"]), f["licence"], f["summary"]] for f in found
    ]
    _print(found, as_json, _table([header, *rows]))


@rewards.command("info", params=[o.JSON])
@click.argument("name")
def reward_info(name: str, as_json: bool) -> None:
    """All that is known of a reward: NAME, or module:attribute."""
    with redirect_stdout(sys.stderr):
        found = _facts(name, _known_entry(name))
        found["files"] = _locked(found.pop("weights"))
    _print(found, as_json, "\n".join(f"{key}: {_fact(value)}" for key, value in found.items()))


@rewards.command("prefetch")
@click.argument("name", nargs=-1, required=True)
@click.option("--model", metavar="HUB_ID", help="The model to fetch, of rewards that take any: the option `model`.")
def prefetch(name: Sequence[str], model: str | None) -> None:
    """Download and verify all that the rewards need: then they load with HF_HUB_OFFLINE=1.

    NAME may have options, which decide what that is: "open-clip[model=ViT-B-16, pretrained=laion2b_s34b_b88k]".
    """
    with redirect_stdout(sys.stderr):
        for one in name:
            _known_entry(one)
        from rewards.hub import prefetch as fetch

        files = [file for one in name for file in fetch(one, **({"model": model} if model else {}))]
    _print(None, False, "\n".join(map(str, files)) or "nothing to download")


@rewards.command("serve", params=[o.JSON])
@click.argument("name")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; elsewhere needs a token.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0 takes a free one.")
@click.option("--token", envvar="DIFFTUNE_REWARD_TOKEN", default="", help="What clients must know.")
@click.option("--batch_size", type=o.AT_LEAST_ONE, help="Images that the reward scores at a time.")
@click.option("--max_images", type=o.AT_LEAST_ONE, default=64, show_default=True, help="Images of one request.")
@click.option("--device", default="cpu", show_default=True, help="Where the reward runs.")
def serve(
    name: str, host: str, port: int, token: str, batch_size: int | None, max_images: int, device: str, as_json: bool
) -> None:
    """Serve a reward over HTTP, for `--reward http://HOST:PORT` elsewhere; Ctrl-C ends it.

    The token is better given in DIFFTUNE_REWARD_TOKEN than on the command line, where other users see it.
    """
    with redirect_stdout(sys.stderr):
        _known_entry(name)
        from rewards.registry import load
        from rewards.remote import Limits, Server

        server = Server(load(name, batch_size), host, port, token, Limits(images=max_images), device)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    _print({"url": server.url, "reward": name}, as_json, f"{name} at {server.url}")
    with server:
        server.serve_forever()


def _known_entry(name: str) -> Any:
    from rewards.registry import entry

    try:
        return entry(name)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _facts(name: str, entry: Any) -> dict[str, Any]:
    facts = {f.name: getattr(entry, f.name) for f in fields(entry) if f.name not in ("make", "fetch")}
    low, high = entry.range
    return {"name": name, **facts, "range": [low, high] if isfinite(low) and isfinite(high) else None}


def _locked(names: Sequence[str]) -> list[dict[str, Any]]:
    """What lock.json says of those files."""
    if not names:
        return []
    from rewards.hub import locks

    return [asdict(locks()[name]) for name in names]


def _fact(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "".join(f"\n  {key}: {_fact(inner)}" for item in value for key, inner in item.items())
    if isinstance(value, list):
        return " to ".join(map(str, value)) or "none"
    return _said(value) if isinstance(value, bool) else "none" if value is None else str(value)


# ------------------------------------------------------------------------------------------------ what there is


@cli.command(params=[o.JSON])
def methods(as_json: bool) -> None:
    """Guidance methods, samplers, rewards and recipes, one line each."""
    found = _methods()
    lines = [line for kind, entries in found.items() for line in (f"{kind}:", *_named(entries), "")]
    _print(found, as_json, "\n".join(lines[:-1]))


def _methods() -> dict[str, list[dict[str, Any]]]:
    from guidance.methods.catalogue import GUIDANCE
    from rewards.registry import REWARDS
    from solvers.samplers.catalogue import SAMPLERS

    return {
        "guidance": [{"name": name, "summary": _summary(method)} for name, method in GUIDANCE.items()],
        "samplers": [{"name": name, "summary": _summary(step)} for name, step in SAMPLERS.items()],
        "rewards": [
            {"name": name, "summary": r.summary, "differentiable": r.differentiable, "needs_prompt": r.needs_prompt}
            for name, r in REWARDS.items()
        ],
        "recipes": [{"name": name, "summary": _summary(c)} for name, c in {**RECIPES, "reno": RenoConfig}.items()],
    }


def _summary(thing: Any) -> str:
    """The first sentence of the docstring."""
    paragraph = " ".join((thing.__doc__ or "").strip().partition("\n\n")[0].split())
    sentence, dot, _ = paragraph.partition(". ")
    return sentence + dot.strip()


def _named(entries: Sequence[dict[str, Any]]) -> list[str]:
    width = max(len(entry["name"]) for entry in entries)
    return [f"  {entry['name']:<{width}}  {entry['summary']}" for entry in entries]


@cli.command(params=[o.JSON])
def doctor(as_json: bool) -> None:
    """Versions, devices, attention backends, embedded models, cache."""
    with redirect_stdout(sys.stderr):
        from difftune.environment import report

        found = report()
    _print(found, as_json, "\n".join(_lines(found)))


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    """A nested dict as indented lines."""
    lines = []
    for key, inner in value.items():
        for item in inner if isinstance(inner, list) and inner and isinstance(inner[0], dict) else [inner]:
            nested = isinstance(item, dict)
            lines += [f"{indent}{key}:", *_lines(item, indent + "  ")] if nested else [f"{indent}{key}: {_said(item)}"]
    return lines


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value or "not installed")


@cli.command(cls=o.Command, params=[o.CONFIG, o.SEED, o.JSON])
@click.option("--output_dir", default="runs/demo", show_default=True, metavar="FOLDER", help="It may hold a demo.")
def demo(seed: int, output_dir: str, as_json: bool) -> None:
    """The main job on the embedded models, offline: guidance, a LoRA, an optimised noise; a report with pictures."""
    with redirect_stdout(sys.stderr):
        from difftune.demo.run import run

        found = run(output_dir, seed)
    _print(found, as_json, f"{output_dir}/report.html")


# ------------------------------------------------------------------------------------------------ parts


def _taken(flags: dict[str, Any], first: str, *names: str) -> Any:
    """flags[first]; it and `names` leave the flags."""
    for name in names:
        del flags[name]
    return flags.pop(first)


def _spoken(prompts: Sequence[str]) -> None:
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise click.UsageError(f"prompt {i + 1} of {len(prompts)} is empty: say what to draw")


def _known_rewards(terms: Sequence[str]) -> Sequence[str]:
    """The terms, if each is a known reward with a number; a usage error otherwise."""
    from rewards.compose import parse_rewards

    try:
        parse_rewards(terms)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return terms


def _print(found: Any, as_json: bool, text: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of the processes that accelerate launched, one speaks
        click.echo(json.dumps(found) if as_json else text)


def _eval_table(found: dict[str, Any]) -> str:
    difference = found.get("difference", {})
    rows = [["", "score", "95 % interval", *(["difference", "95 % interval", ""] if difference else [])]]
    for name, e in ((n, e) for n, e in found.items() if isinstance(e, dict) and "score" in e):
        rows.append([name, *_interval(e), *(_change(difference[name]) if name in difference else [])])
    return _table(rows) + f"\n{found['nfe']:g} NFE per image, {found['seconds']:.0f} s"


OF_A_ROW = ("guidance", "cfg_scale", "options", "nfe", "nfe_by_branch", "seconds")  # what is no score in it


def _compare_table(rows: Sequence[dict[str, Any]]) -> str:
    scores = [key for key in rows[0] if key not in OF_A_ROW]
    table = [["guidance", "scale", *scores, "NFE", "seconds"]]
    for r in rows:
        scale = "" if r["cfg_scale"] is None else f"{r['cfg_scale']:g}"
        table.append([r["guidance"], scale, *(f"{r[s]:.4f}" for s in scores), f"{r['nfe']:g}", f"{r['seconds']:.2f}"])
    return _table(table)


def _interval(e: dict[str, float]) -> list[str]:
    return [f"{e['score']:.3f}", f"{e['low']:.3f} to {e['high']:.3f}"]


def _change(e: dict[str, Any]) -> list[str]:
    return [f"{e['score']:+.3f}", f"{e['low']:+.3f} to {e['high']:+.3f}", "counts" if e["counts"] else "does not count"]


def _table(rows: Sequence[Sequence[str]]) -> str:
    width = max(len(row) for row in rows)
    full = [[*row, *[""] * (width - len(row))] for row in rows]
    columns = [max(map(len, column)) for column in zip(*full, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, columns, strict=True)).rstrip() for row in full)


for _name, _config in RECIPES.items():
    train.add_command(_recipe(_name, _config, f"difftune.recipes.{_name}"))
cli.add_command(_recipe("optimize", RenoConfig, "difftune.reno.run_folder"))
cli.add_command(label)
cli.add_command(_search())
