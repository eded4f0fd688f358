"""`--dry_run`: what a command would load, download and draw, with time and memory measured on its smallest part.

The smallest part is run for real where the model and the rewards are on this machine: nothing is downloaded or written.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants, try_to_load_from_cache

from difftune import models
from difftune.configs.images import SampleConfig
from difftune.lookup import guidance_named, reward_weights
from difftune.pipelines.generate import Sampling, generate_batches
from difftune.pipelines.opened import open_pipeline
from rewards import hub
from rewards.registry import entry
from solvers.memory.budget import parameters_bytes, size_text
from solvers.memory.live import LiveBytes

Lines = dict[str, str]
STEPS = 2  # sampler steps of the picture that is drawn to measure


class Cost(NamedTuple):
    """What the smallest part took."""

    seconds: float
    peak: int  # bytes, weights included


def here(model: str) -> bool:
    """Whether a model is on this machine: embedded, a folder, or in the Hub's cache."""
    where = models.source(model)
    return isinstance(where, Path) or isinstance(try_to_load_from_cache(where, "model_index.json"), str)


def model_line(model: str) -> str:
    """Where a model is, or that it would be downloaded."""
    where = models.source(model)
    if isinstance(where, Path):
        return f"{model}, {where.resolve()}"
    if here(model):
        return f"{model}, in the cache {constants.HF_HUB_CACHE}"
    return f"{model} would be DOWNLOADED from the Hub"


def reward_lines(names: Iterable[str]) -> Lines:
    """What each reward would download, and under what licence it is."""
    found = {}
    for name in names:
        about = entry(name)
        missing = [hub.locks()[part] for part in about.weights if not hub.fetched(part)]
        sizes = [f"{lock.bytes / 1e6:.0f} MB" if lock.bytes else "size unknown" for lock in missing]
        files = ", ".join(
            f"{lock.file} of {lock.hub_id or lock.url} ({s})" for lock, s in zip(missing, sizes, strict=True)
        )
        text = f"would DOWNLOAD {files}" if missing else "nothing to download"
        found[f"reward {name}"] = (
            f"{'its own model may be downloaded' if about.fetch else text}; licence: {about.licence}"
        )
    return found


def rewards_here(names: Iterable[str]) -> bool:
    return all(not entry(n).fetch and all(map(hub.fetched, entry(n).weights)) for n in names)


def measured(part: Callable[[], Any], pipe: Any) -> Cost:
    """Memory of a part in its first run, which also makes what is made once, and time in its second."""
    peak = peak_of(part, pipe)
    began = time.perf_counter()
    part()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Cost(time.perf_counter() - began, peak)


def peak_of(part: Callable[[], Any], pipe: Any) -> int:
    """The most bytes that are there at once while a part runs: all of this process's on a GPU; on a CPU the pipeline's
    weights and the tensors made meanwhile."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        part()
        return torch.cuda.max_memory_allocated()
    with LiveBytes() as live:
        part()
    return live.peak + parameters_bytes(*pipe.components.values())


def picture_cost(pipe: Any, method: Any, num_inference_steps: int) -> tuple[Cost, float]:
    """One picture in `STEPS` steps under a method, and how many network evaluations that are."""
    sampling, nfe = Sampling(min(STEPS, num_inference_steps), 1), [0.0]

    def part() -> None:
        (batch,) = generate_batches(pipe, ["a red circle"], [0], method, sampling)
        nfe[0] = batch.nfe

    return measured(part, pipe), nfe[0]


def cost_lines(seconds: float, peak: int, basis: str) -> Lines:
    """Time and memory as lines, with what they are made of."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "this machine's processor"
    return {
        "time": f"about {duration(seconds)} on {device}: {basis}",
        "memory": f"about {size_text(peak)}, weights included",
    }


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def not_measured(model: str, rewards: Iterable[str] = ()) -> str:
    """Why time and memory cannot be told."""
    what = f"the model {model}" if not here(model) else f"the rewards {', '.join(rewards)}"
    return f"not measured, since {what} would have to be downloaded first"


def named(rewards: Any) -> list[str]:
    """The names of rewards as the settings have them."""
    return list(reward_weights(rewards))


def sample(config: SampleConfig) -> Lines:
    """What `difftune sample` would do."""
    method = guidance_named(config.guidance, None, config.guidance_options)
    count, steps = len(config.prompt) * config.num_images, config.num_inference_steps
    lines = {"model": model_line(config.model), "work": f"{count} images of {steps} steps under {config.guidance}"}
    if not here(config.model):
        return {**lines, "time": not_measured(config.model)}
    cost, _ = picture_cost(open_pipeline(config.model, config.lora), method, steps)
    each = cost.seconds / min(STEPS, steps)
    basis = f"{each:.2g} s a step of one image, decoding included; a batch of {config.batch_size} takes more memory"
    return lines | cost_lines(each * count * steps, cost.peak, basis)
