"""`report.html` of a training folder: curves, pictures before and after, settings, and the command."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftune.configs.training import TrainingConfig
from difftune.files import output, records
from difftune.files.films import stills
from difftune.files.versions import versions
from difftune.lookup import method_of
from difftune.pipelines import lora
from difftune.pipelines.generate import generate_batches, pixels
from difftune.reports import figures, pages
from difftune.training import validation
from difftune.training.run_folder import CONFIG, METRICS, REPORT
from rewards.monitor import Monitor, Parting

PICTURES = 6  # before and after, at most


@torch.no_grad()
def write_report(name: str, config: TrainingConfig, pipe: Any, trained_on: str, seconds: float) -> Path:
    """Write the report of the run in `config.output_dir`, whose adapter `pipe` holds. Pictures are drawn if the run
    had validations; those before training need a LoRA, which can be switched off."""
    folder = Path(config.output_dir)
    steps = list(records.records(folder / METRICS))
    checks = list(records.records(folder / validation.RECORDS)) if (folder / validation.RECORDS).exists() else []
    parting = parted(checks)
    prompts = shown_prompts(config)
    page = pages.render(
        "training.html.j2",
        title=f"{name}: {config.model} on {trained_on.removesuffix('=1.0')}",
        about=f"{len(steps)} optimiser steps of {images_of_a_step(config)} images, "
        f"{'all weights' if config.full_finetuning else f'a LoRA of rank {config.rank}'}, seed {config.seed}.",
        numbers=numbers(steps, checks, seconds),
        curves=curves(steps, checks, parting),
        parting=parting and f"from step {checks[parting.best]['step']} on, the held-out reward fell.",
        pictures=before_and_after(config, pipe, prompts) if prompts else [],
        command=f"difftune train {name} --config {folder / CONFIG} --output_dir NEW",
        settings=settings(config),
        versions=versions(),
    )
    output.write(folder / REPORT, page)
    return folder / REPORT


def images_of_a_step(config: TrainingConfig) -> int:
    return config.train_batch_size * config.gradient_accumulation_steps


def shown_prompts(config: TrainingConfig) -> list[str]:
    """The first prompts of the validation; [] for a run without validations, or without a LoRA to switch off."""
    if not config.validation_steps or config.full_finetuning:
        return []
    some = validation.validation_prompts(config)
    return [some[i % len(some)] for i in range(min(config.num_validation_images, PICTURES))]


def parted(checks: Sequence[Mapping[str, float]]) -> Parting | None:
    """The validation from which on the held-out reward no longer follows the trained one, if there is one."""
    both = [record for record in checks if {"reward_mean", "held_out_mean"} <= record.keys()]
    return Monitor()([r["reward_mean"] for r in both], [r["held_out_mean"] for r in both]) if both else None


def numbers(
    steps: Sequence[Mapping[str, float]], checks: Sequence[Mapping[str, float]], seconds: float
) -> list[tuple[str, str]]:
    """The numbers at the head of the page: the trained and the held-out reward, first and last, and the time."""
    found = []
    for title, key, some in (
        ("training reward, first and last step", "reward_mean", steps),
        ("validation, before and after", "reward_mean", checks),
        ("held out, before and after", "held_out_mean", checks),
        ("loss, first and last step", "loss", steps),
    ):
        values = [record[key] for record in some if key in record]
        if values:
            found.append((title, f"{values[0]:.4g} → {values[-1]:.4g}"))
    return [*found, ("seconds", f"{seconds:.0f}")]


def curves(
    steps: Sequence[Mapping[str, float]], checks: Sequence[Mapping[str, float]], parting: Parting | None
) -> bytes:
    """The trained reward with its validations, the held-out reward and the loss, over one axis of steps, as PNG."""
    wanted = [
        ("training reward", steps, "reward_mean", figures.MAIN),
        ("held-out reward", checks, "held_out_mean", figures.HELD),
        ("loss", steps, "loss", figures.PALE),
    ]
    drawn = [entry for entry in wanted if any(entry[2] in record for record in entry[1])]
    made, axes = figures.panels([name for name, *_ in drawn] or ["no metrics"], "optimiser step")
    for each, (_, some, key, color) in zip(axes, drawn, strict=False):
        x, y = points(some, key)
        if some is steps:
            each.plot(x, y, color=color, linewidth=0.6, alpha=0.5)
            y = figures.smoothed(y)
        figures.draw(each, x, y, color)
        if some is steps and key == "reward_mean":
            each.plot(*points(checks, key), "o", color=figures.BEST, markersize=5)
    if parting is not None:
        figures.shade(axes, checks[parting.best]["step"], checks[-1]["step"])
    return figures.as_png(made)


def points(some: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the records that have the key."""
    found = [record for record in some if key in record]
    return [record["step"] for record in found], [record[key] for record in found]


def before_and_after(config: TrainingConfig, pipe: Any, prompts: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Each prompt with its picture, drawn from the validation's seeds, without the adapter and with it."""
    with lora.off(lora.network_of(pipe)):
        before = draw(config, pipe, prompts)
    return list(zip(prompts, pixels(before), pixels(draw(config, pipe, prompts)), strict=True))


def draw(config: TrainingConfig, pipe: Any, prompts: Sequence[str]) -> Tensor:
    """Images (N, 3, H, W) in [0, 1], as a validation draws them; of films the frames in their middle."""
    method = method_of(config)
    seeds = [config.seed + i for i in range(len(prompts))]
    batches = generate_batches(pipe, prompts, seeds, method, validation.sampling_of(config))
    return torch.cat([stills(batch.images) for batch in batches])


def settings(config: TrainingConfig) -> list[tuple[str, str, bool]]:
    """(name, value, whether it was changed) of each setting that is not None; the changed ones first."""
    found = []
    for field in fields(config):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(config, field.name)
        if value not in (None, {}) and field.name != "resume_from_checkpoint":
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append((field.name, text, value != default))
    return sorted(found, key=lambda entry: not entry[2])
