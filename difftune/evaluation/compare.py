"""Guidance methods side by side: the same prompts and seeds under each method and scale, as a grid and a table."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftune.files import output
from difftune.files.claim import fresh
from difftune.files.versions import versions
from difftune.lookup import guidance_kinds, guidance_named, reward_named, reward_weights, takes_scale
from difftune.pipelines.generate import generate_batches, mean_branches, mean_nfe, pixels, settings_of, watched
from difftune.pipelines.opened import opened
from difftune.reports import sheets
from guidance.contract import Guidance
from guidance.methods.cfgpp import CFGpp
from guidance.methods.classifier import GFCG
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
    images: Tensor  # (N, 3, H, W) in [0, 1]
    nfe: float  # of an image
    branches: dict[str, float]  # of them, those of each branch ("cond", "uncond", ...)
    seconds: float  # of all images


def at_cfg_scale(name: str, scale: float, pipe: Any, steps: int) -> Guidance:
    """The method at the scale of its own convention that corresponds to CFG's, where it has one (`from_cfg_scale`)."""
    kind: Any = guidance_kinds(name)[-1]
    if kind is CFGpp:
        scale = CFGpp.from_cfg_scale(scale, levels_of(pipe.scheduler, steps)).scale  # type: ignore[assignment]
    elif kind is GFCG:
        scale = GFCG.from_cfg_scale(scale).scale  # type: ignore[assignment]
    return guidance_named(name, scale)


def cells(
    pipe: Any,
    guidance: Sequence[str],
    scales: Sequence[float],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    batch_size: int = 16,
) -> Iterable[Cell]:
    """One cell per method and scale; a method without a scale has one cell."""
    for name in guidance:
        for scale in scales if takes_scale(name) else (None,):
            method = guidance_named(name) if scale is None else at_cfg_scale(name, scale, pipe, steps)
            began = time.perf_counter()
            made = generate_batches(pipe, prompts, seeds, method, steps, batch_size)
            batches = list(watched(made, len(prompts), name if scale is None else f"{name} {scale:g}"))
            images = torch.cat([batch.images for batch in batches])
            cost = mean_nfe(batches), mean_branches(batches), time.perf_counter() - began
            yield Cell(name, scale, method, images, *cost)


def row(cell: Cell, rewards: Sequence[str], prompts: Sequence[str]) -> dict[str, Any]:
    """A line of the table: mean scores of the cell's images, their NFE and seconds."""
    scores = {name: float(load(name)(cell.images, prompts).mean()) for name in dict.fromkeys((*rewards, *MEASURES))}
    about = {"guidance": cell.guidance, "cfg_scale": cell.scale, "options": settings_of(cell.method)}
    return about | scores | {"nfe": cell.nfe, "nfe_by_branch": cell.branches, "seconds": round(cell.seconds, 3)}


def default_rewards(prompts: Sequence[str]) -> list[str]:
    """The oracle, if it can judge all prompts."""
    try:
        for prompt in prompts:
            grammar.parse(prompt)
    except ValueError:
        return []
    return ["oracle"]


def run(
    model: str,
    guidance: Sequence[str],
    prompt: Sequence[str],
    output_dir: str | Path,
    scales: Sequence[float] = (7.5,),
    reward: Sequence[str] = (),
    num_images: int = 4,
    num_inference_steps: int = 25,
    seed: int = 0,
    batch_size: int = 16,
    lora: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """`difftune compare`: writes grid.png and compare.json; returns what compare.json holds."""
    for name in guidance:
        guidance_named(name)
    rewards = list(reward_weights(reward)) or default_rewards(prompt)
    with fresh(output_dir) as claim:
        reward_named(dict.fromkeys((*rewards, *MEASURES), 1.0), gradient=False)  # all can be loaded
        pipe = opened(model, lora)
        jobs = [(p, seed + i) for p in prompt for i in range(num_images)]
        texts, seeds = [p for p, _ in jobs], [s for _, s in jobs]
        made = list(cells(pipe, guidance, scales, texts, seeds, num_inference_steps, batch_size))
        found = {
            "settings": {
                "model": model,
                "lora": lora or None,
                "guidance": list(guidance),
                "scales": list(scales),
                "prompt": list(prompt),
                "reward": rewards,
                "num_images": num_images,
                "num_inference_steps": num_inference_steps,
                "seed": seed,
                "batch_size": batch_size,
                "scheduler": type(pipe.scheduler).__name__,
            },
            "rows": [row(cell, rewards, texts) for cell in made],
            "versions": versions(),
        }
        grid = labelled(made, scales, num_images)
        claim.results([("grid.png", grid), ("compare.json", output.as_json(found))])
    return found


# ------------------------------------------------------------------------------------------------ the picture


def labelled(made: Sequence[Cell], scales: Sequence[float], columns: int) -> bytes:
    """Rows of methods and columns of scales, each cell a block of its images `columns` wide under the method's own
    scale and its NFE, as PNG."""
    rows: dict[str, list[sheets.Cell | None]] = {}
    for cell in made:
        place = 0 if cell.scale is None else list(scales).index(cell.scale)
        row = rows.setdefault(cell.guidance, [None] * len(scales))
        row[place] = sheets.Cell(pixels(cell.images), caption(cell), columns)
    return sheets.sheet(rows)


def caption(cell: Cell) -> str:
    """The method's own scale, CFG's beside it where they differ, and the evaluations of an image."""
    own, nfe = own_scale(cell.method), f"{cell.nfe:g} NFE"
    if cell.scale is None or own is None:
        return nfe
    as_cfg = "" if abs(own - cell.scale) < 1e-6 else f" (CFG {cell.scale:g})"
    return f"scale {own:.3g}{as_cfg}, {nfe}"


def own_scale(method: Any) -> float | None:
    """The scale of a method, or of the one that it holds, where it is a number."""
    found = getattr(method, "scale", None)
    if found is None and hasattr(method, "method"):
        return own_scale(method.method)
    return float(found) if isinstance(found, int | float) else None
