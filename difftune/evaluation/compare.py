"""Guidance methods side by side: the same prompts and seeds under each method and scale, as a grid and a table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from difftune.configs.images import CompareConfig
from difftune.errors import UserError
from difftune.files import output
from difftune.files.claim import fresh
from difftune.files.versions import versions
from difftune.lookup import guidance_kinds, guidance_named, reward_named, reward_weights, takes_scale
from difftune.pipelines.first_order import scheduler_name
from difftune.pipelines.generate import (
    Pictures,
    Sampling,
    draw_pictures,
    generate_batches,
    jobs_of,
    method_settings,
    pixels,
)
from difftune.pipelines.opened import open_pipeline
from difftune.pipelines.shared import claimed_by_main
from difftune.reports import sheets
from guidance.contract import Guidance
from guidance.methods.ahead import RectifiedCFGpp
from guidance.methods.cfgpp import CFGpp
from guidance.methods.classifier import GFCG
from guidance.methods.feedback import FBG
from guidance.methods.scales import converting
from rewards.registry import load
from rewards.world import grammar
from solvers.levels import levels_of

MEASURES = ("saturation", "contrast")


@dataclass(frozen=True)
class Cell:
    """The images of one method at one scale, and what they cost."""

    guidance: str
    scale: float | None  # the column's: that of CFG
    method: Guidance
    scheduler: str
    made: Pictures


def at_cfg_scale(name: str, scale: float, pipe: Any, steps: int) -> Guidance:
    """The method at the scale of its own convention that corresponds to CFG's, if it has one (`from_cfg_scale`); of
    FBG, whose scale is its own, that is the largest, and up to 1 it is CFG of the scale."""
    kind: Any = guidance_kinds(name)[-1]
    options: dict[str, Any] = {"scale": scale}
    if kind is CFGpp:
        options = {"scale": CFGpp.from_cfg_scale(scale, levels_of(pipe.scheduler, steps)).scale}
    elif kind in (GFCG, RectifiedCFGpp):
        options = {"scale": kind.from_cfg_scale(scale).scale}
    elif kind is FBG:
        options = {"largest": scale} if scale > 1 else {"scale": scale, "prior": 1.0}
    with converting():
        return guidance_named(name, options=options)


def cells(
    pipe: Any,
    guidance: Sequence[str],
    scales: Sequence[float],
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
) -> Iterable[Cell]:
    """One cell per method and scale; a method without a scale has one cell."""
    for name in guidance:
        for scale in scales if takes_scale(name) else (None,):
            method = (
                guidance_named(name) if scale is None else at_cfg_scale(name, scale, pipe, sampling.num_inference_steps)
            )
            batches = generate_batches(pipe, prompts, seeds, method, sampling)
            label = name if scale is None else f"{name} {scale:g}"
            made = draw_pictures(batches, len(prompts), label)
            yield Cell(name, scale, method, scheduler_name(pipe, method), made)


def row(cell: Cell, rewards: Sequence[str], prompts: Sequence[str]) -> dict[str, Any]:
    """A line of the table: mean scores of the cell's images, their NFE and seconds."""
    scores = {
        name: float(load(name)(cell.made.images, prompts).mean()) for name in dict.fromkeys((*rewards, *MEASURES))
    }
    about = {"guidance": cell.guidance, "cfg_scale": cell.scale, "options": method_settings(cell.method)}
    about["scheduler"] = cell.scheduler
    return about | scores | cell.made.cost()


def default_rewards(prompts: Sequence[str]) -> list[str]:
    """The oracle, if it can judge all prompts."""
    try:
        for prompt in prompts:
            grammar.parse(prompt)
    except ValueError:
        return []
    return ["oracle"]


def check_cells(config: CompareConfig) -> None:
    """UserError for a method or a scale that is there twice, and for none at all: cells are told apart by them."""
    for name, values in {"guidance": config.guidance, "scales": config.scales}.items():
        if not values:
            raise UserError(f"there is nothing to compare: give at least one of --{name}")
        if again := [value for value in values if list(values).count(value) > 1]:
            raise UserError(f"--{name} has {again[0]} twice: give it once")


def compare_methods(config: CompareConfig) -> dict[str, Any]:
    """`difftune compare`: writes grid.png and compare.json; returns what compare.json holds."""
    for name in config.guidance:
        guidance_named(name)
    check_cells(config)
    rewards = list(reward_weights(config.reward)) or default_rewards(config.prompt)
    with claimed_by_main(config.output_dir, fresh) as claim:
        reward_named(dict.fromkeys((*rewards, *MEASURES), 1.0), gradient=False)  # all can be loaded
        pipe = open_pipeline(config.model, config.lora)
        texts, seeds = jobs_of(config.prompt, config.num_images, config.seed)
        sampling = Sampling(config.num_inference_steps, config.batch_size, shared=True)
        made = list(cells(pipe, config.guidance, config.scales, texts, seeds, sampling))
        found = {
            "settings": config.written() | {"reward": rewards, "scheduler": type(pipe.scheduler).__name__},
            "rows": [row(cell, rewards, texts) for cell in made],
            "versions": versions(),
        }
        if claim is not None:
            grid = draw_sheet(made, config.scales, config.num_images)
            claim.results([("grid.png", grid), ("compare.json", output.as_json(found))])
    return found


# ------------------------------------------------------------------------------------------------ the picture


def draw_sheet(made: Sequence[Cell], scales: Sequence[float], columns: int) -> bytes:
    """Rows of methods and columns of scales, each cell a block of its images `columns` wide under the method's own
    scale and its NFE, as PNG."""
    rows: dict[str, list[sheets.Cell | None]] = {}
    for cell in made:
        place = 0 if cell.scale is None else list(scales).index(cell.scale)
        row = rows.setdefault(cell.guidance, [None] * len(scales))
        row[place] = sheets.Cell(pixels(cell.made.images), caption(cell), columns)
    return sheets.sheet(rows.items())


def caption(cell: Cell) -> str:
    """The method's own scale, of FBG the largest, CFG's beside it if they differ, and the evaluations of an image."""
    own, nfe = own_scale(cell.method), f"{cell.made.nfe:.4g} NFE"
    if cell.scale is None or own is None:
        return nfe
    word, value = own
    as_cfg = "" if abs(value - cell.scale) < 1e-6 else f" (CFG {cell.scale:g})"
    return f"{word} {value:.3g}{as_cfg}, {nfe}"


def own_scale(method: Any) -> tuple[str, float] | None:
    """What sets the strength of a method, or of the one that it holds, if it is a number: ("scale", 3.0)."""
    if isinstance(method, FBG) and method.prior < 1:
        return "largest", method.largest
    found = getattr(method, "scale", None)
    if found is None and hasattr(method, "method"):
        return own_scale(method.method)
    return ("scale", float(found)) if isinstance(found, int | float) else None
