"""The reports of a run: metrics.jsonl always, one of accelerate's trackers on request."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, filter_trackers
from torch import Tensor

from difftune.errors import UserError

FOLDER = "difftune"  # of TensorBoard in the run's folder; the project's name for the others


def trackers(report_to: str, folder: Path, settings: Mapping[str, Any]) -> list[GeneralTracker]:
    """The trackers that `report_to` names, started; none for "none"."""
    if report_to == "none":
        return []
    if report_to not in {str(name) for name in LOGGER_TYPE_TO_CLASS}:
        raise UserError(f"no tracker {report_to!r}; known: none, {', '.join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))}")
    try:
        found = [LOGGER_TYPE_TO_CLASS[str(name)] for name in filter_trackers([report_to], folder)]
    except (ImportError, ValueError) as error:
        raise UserError(f"tracker {report_to!r} cannot be used: {error}") from error
    if not found:
        raise UserError(f"tracker {report_to!r} is not installed: pip install {report_to}, or --report_to none")
    started = [kind(FOLDER, *([folder] if kind.requires_logging_directory else [])) for kind in found]
    for tracker in started:
        tracker.store_init_configuration({k: v for k, v in settings.items() if isinstance(v, int | float | str | bool)})
    return started


WITH_IMAGES = ("tensorboard", "wandb")  # trackers that take pictures


def show(trackers: Iterable[GeneralTracker], name: str, record: Mapping[str, float], images: Tensor) -> None:
    """Give the trackers the numbers of a record with a step, as name/KEY, and the images (B, 3, H, W) in [0, 1]."""
    step = int(record["step"])
    numbers = {f"{name}/{key}": value for key, value in record.items() if key != "step"}
    for tracker in trackers:
        tracker.log(numbers, step=step)
        if tracker.name in WITH_IMAGES:
            bytes_of = (images * 255).round().to(torch.uint8)
            channels_last = tracker.name == "wandb"
            pictures = bytes_of.permute(0, 2, 3, 1) if channels_last else bytes_of
            tracker.log_images({name: pictures.numpy()}, step=step)
