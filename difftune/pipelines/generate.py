"""Images from a diffusers pipeline under a guidance method."""

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from difftune.errors import UserError
from difftune.files import output
from difftune.files.claim import fresh
from difftune.files.noises import noises_of
from difftune.files.versions import versions
from difftune.lookup import guidance_named
from difftune.pipelines.fingerprint import digest_of
from difftune.pipelines.method_parts import Equipped, equip, prepared
from difftune.pipelines.opened import opened
from guidance.attach.handle import attach
from guidance.contract import Guidance
from rewards.checks import finite
from solvers.families.table import family_of
from solvers.families.tokens import packed
from solvers.latent import LatentModel


class Batch(NamedTuple):
    """A batch of pictures and what made them."""

    images: Tensor  # (B, 3, H, W) in [0, 1], float32, on the CPU
    prompts: list[str]
    seeds: list[int]
    nfe: float  # rows that went through the network, per image
    branches: dict[str, float]  # of them, those of each branch ("cond", "uncond", ...)


@torch.no_grad()
def generate_batches(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance: Guidance,
    steps: int = 25,
    batch_size: int = 16,
    eta: float = 0.0,
    noises: Tensor | None = None,
    embedded_guidance: float | None = None,
) -> Iterator[Batch]:
    """One image per (prompt, seed), batch by batch. An image's noise is that of its own seed, whatever the batch, or of
    `noises` (B, C, h, w) its own.

    eta: the noise of DDIM's steps, 1 is DDPM; UserError where the scheduler takes none. embedded_guidance: the scale
    told to a network distilled over scales; the pipeline's own default if None.
    What a method needs and only names (a classifier, a weaker network, a negative prompt) is found by
    `difftune.pipelines.method_parts`.
    """
    if eta:
        takes_eta(pipe)
    pipe.set_progress_bar_config(disable=True)
    equipped = equip(pipe, prepared(pipe, guidance, prompts, steps))
    for start in range(0, len(prompts), batch_size):
        chosen = slice(start, start + batch_size)
        given: dict[str, Any] = {"eta": eta} if eta else {}
        given |= {} if embedded_guidance is None else {"guidance_scale": embedded_guidance}
        if noises is not None:
            given |= for_pipeline(pipe, noises[chosen])
        yield _batch(pipe, list(prompts[chosen]), list(seeds[chosen]), equipped, steps, given)


def _batch(
    pipe: Any, prompts: list[str], seeds: list[int], equipped: Equipped, steps: int, given: Mapping[str, Any]
) -> Batch:
    """A batch by the pipeline, which is told what is `given` besides."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with attach(pipe, equipped.method(prompts), equipped.networks) as handle:
        images = pipe(prompts, generator=generators, num_inference_steps=steps, output_type="pt", **given).images
    images = finite(images.float().cpu(), "a generated picture")
    branches = {name: rows / len(prompts) for name, rows in handle.branches.items()}
    return Batch(images, prompts, seeds, handle.nfe / len(prompts), branches)


def takes_eta(pipe: Any) -> None:
    """UserError unless the pipeline and its scheduler take an eta: others would leave it out without a word."""
    for thing, function in ((pipe, type(pipe).__call__), (pipe.scheduler, pipe.scheduler.step)):
        if "eta" not in inspect.signature(function).parameters:
            raise UserError(f"{type(thing).__name__} takes no eta: leave it out, or use a pipeline with DDIM")


def for_pipeline(pipe: Any, noises: Tensor) -> dict[str, Any]:
    """Noises (B, C, h, w) as a pipeline is called with them, at their size; FLUX wants them packed into tokens.

    The pipeline multiplies them by its scheduler's first sigma, as it does its own. UserError for other channels.
    """
    family, model = family_of(pipe), LatentModel(pipe)
    height, width = (side * pipe.vae_scale_factor for side in noises.shape[2:])
    if noises.shape[1:] != (shape := model.shape(height, width)):
        raise UserError(f"the noise is {tuple(noises.shape[1:])}, and the model's latents are {shape}")
    latents = (noises if family.grid is None else packed(noises)).to(model.device, model.dtype)
    return {"latents": latents, "height": height, "width": width}


def watched(batches: Iterator[Batch], total: int, label: str) -> Iterator[Batch]:
    """The batches, with a bar where somebody watches."""
    with tqdm(total=total, desc=label, disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.images))


def mean_nfe(batches: Sequence[Batch]) -> float:
    """Rows that went through the network, per image."""
    return sum(b.nfe * len(b.images) for b in batches) / sum(len(b.images) for b in batches)


def mean_branches(batches: Sequence[Batch]) -> dict[str, float]:
    """The same of each branch."""
    images = sum(len(b.images) for b in batches)
    names = dict.fromkeys(name for b in batches for name in b.branches)
    return {name: sum(b.branches.get(name, 0) * len(b.images) for b in batches) / images for name in names}


def pixels(images: Tensor) -> list[Any]:
    """(B, 3, H, W) as B arrays (H, W, 3)."""
    return list(images.permute(0, 2, 3, 1).numpy())


def generate(
    model: str,
    prompt: str | Sequence[str],
    output_dir: str | Path,
    guidance: str | Guidance = "cfg",
    guidance_options: Mapping[str, Any] | None = None,
    num_images: int = 1,
    num_inference_steps: int = 25,
    seed: int = 0,
    batch_size: int = 16,
    lora: str | Sequence[str] | None = None,
    eta: float = 0.0,
    noise: str | None = None,
) -> dict[str, Any]:
    """Draw pictures, as `difftune sample` does: PNGs, grid.png and sample.json, whose contents are returned.

        generate("tiny", "a red circle", "out", CFG(3.0))["nfe"]

    Image i of a prompt is drawn with seed + i; `noise`, a file of `difftune optimize`, holds one noise for each image
    in place of that. guidance: a method, or its name with its options. Nothing is written before all images are made.
    Raises UserError, before anything is loaded, for what cannot be; DiskError where the folder cannot be written.
    """
    named = isinstance(guidance, str)
    method = guidance_named(guidance, None, guidance_options) if isinstance(guidance, str) else guidance
    prompt = [prompt] if isinstance(prompt, str) else list(prompt)
    jobs = [(p, seed + i) for p in prompt for i in range(num_images)]
    noises = None if noise is None else noises_of(noise, len(jobs))
    with fresh(output_dir) as claim:
        pipe, began = opened(model, lora), time.perf_counter()
        texts, seeds = [p for p, _ in jobs], [s for _, s in jobs]
        made = generate_batches(pipe, texts, seeds, method, num_inference_steps, batch_size, eta, noises)
        batches = list(watched(made, len(jobs), "sample"))
        found = {
            "settings": {
                "model": model,
                "model_digest": digest_of(pipe),
                "lora": lora or None,
                "guidance": guidance if named else type(method).__name__,
                "guidance_options": settings_of(method),
                "prompt": prompt,
                "num_images": num_images,
                "num_inference_steps": num_inference_steps,
                "eta": eta,
                "seed": seed,
                "noise": noise,
                "batch_size": batch_size,
                "scheduler": type(pipe.scheduler).__name__,
            },
            "images": list(_files(batches)),
            "nfe": mean_nfe(batches),
            "nfe_by_branch": mean_branches(batches),
            "seconds": round(time.perf_counter() - began, 3),
            "versions": versions(),
        }
        claim.results(_results(batches, found, num_images if len(prompt) > 1 else None))
    return found


def _results(batches: Sequence[Batch], found: Mapping[str, Any], columns: int | None) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the pictures, the grid and sample.json, in the order in which they are written."""
    pictures = [picture for batch in batches for picture in pixels(batch.images)]
    for about, picture in zip(found["images"], pictures, strict=True):
        yield about["file"], output.png(picture)
    yield "grid.png", output.grid(pictures, columns)
    yield "sample.json", output.as_json(found)


def settings_of(guidance: Any) -> dict[str, Any]:
    """A method's fields, which are its settings."""
    return asdict(guidance)


def _files(batches: Sequence[Batch]) -> Iterator[dict[str, Any]]:
    """Of each image, in order: its file and what made it."""
    jobs = [(prompt, seed, b.nfe) for b in batches for prompt, seed in zip(b.prompts, b.seeds, strict=True)]
    for i, (prompt, seed, nfe) in enumerate(jobs):
        yield {"file": f"{i:05d}-seed{seed}.png", "prompt": prompt, "seed": seed, "nfe": nfe}
