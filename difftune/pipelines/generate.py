"""Images from a diffusers pipeline under a guidance method."""

import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from difftune.configs.images import SampleConfig
from difftune.errors import UserError
from difftune.files import output
from difftune.files.claim import fresh
from difftune.files.films import check_films, mp4, stills
from difftune.files.noises import noises_of
from difftune.files.pictures import pil, read_picture
from difftune.files.versions import versions
from difftune.lookup import guidance_named
from difftune.pipelines import lora
from difftune.pipelines.annealed import SHARES, Extra, annealed
from difftune.pipelines.compiled import check_compile, compiled
from difftune.pipelines.fingerprint import digest_of
from difftune.pipelines.first_order import first_order, say_first_order, scheduler_name
from difftune.pipelines.method_parts import Equipped, equip, prepared, scale_setting
from difftune.pipelines.noise_lora import moved_by
from difftune.pipelines.opened import open_pipeline
from difftune.pipelines.shared import claimed_by_main, own_share, told_by_each
from difftune.processes import process
from difftune.reports.sheets import Cell, sheet
from guidance.attach.handle import attach, needs_uncond
from guidance.contract import Guidance
from rewards.checks import finite
from solvers.families.prompts import caution_unread
from solvers.families.table import family_of
from solvers.families.tokens import packed
from solvers.latent import LatentModel


@dataclass(frozen=True)
class Sampling:
    """How images are drawn, whatever the guidance.

    eta: the noise of DDIM's steps, 1 is DDPM. embedded_guidance: the scale told to a network distilled over scales; the
    pipeline's own default if None. lora_anneal: of `annealed.SHARES`; None is the whole LoRA at each step. num_frames:
    of each film, if the model makes films; one frame is a picture. shared: the batches are divided among the processes
    that were launched together. image: the file of a picture to begin from. decode_batch: where a batch has more images
    than that, they are decoded one by one; None decodes all at once. enable_vae_tiling: a large one in tiles.
    """

    num_inference_steps: int = 25
    batch_size: int = 16
    eta: float = 0.0
    embedded_guidance: float | None = None
    lora_anneal: str | None = None
    num_frames: int | None = None
    shared: bool = False
    image: str | None = None
    decode_batch: int | None = None
    enable_vae_tiling: bool = False


class Batch(NamedTuple):
    """A batch of pictures and what made them."""

    images: Tensor  # (B, 3, H, W) in [0, 1], float32, on the CPU; films of several frames are (B, 3, F, H, W)
    prompts: list[str]
    seeds: list[int]
    nfe: float  # rows that went through the network, per image
    branches: dict[str, float]  # of them, those of each branch ("cond", "uncond", ...)
    first: int = 0  # number of its first picture


@torch.no_grad()
def generate_batches(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance: Guidance,
    sampling: Sampling = Sampling(),
    noises: Tensor | None = None,
) -> Iterator[Batch]:
    """One image per (prompt, seed), batch by batch. An image's noise is that of its own seed, whatever the batch, or of
    `noises` (B, C, h, w) its own.

    Of batches that are shared, this process's alone. What a method needs and only names (a classifier, a weaker
    network, a negative prompt) is found by `difftune.pipelines.method_parts`; one that looks ahead is drawn with the
    first-order form of the pipeline's scheduler, which is said once.
    Raises UserError for an eta that the scheduler does not take.
    """
    steps = sampling.num_inference_steps
    given: dict[str, Any] = {"num_inference_steps": steps, **family_of(pipe).asked(steps)}
    given |= frames_for(pipe, sampling.num_frames) | image_for(pipe, sampling.image)
    if sampling.eta:
        takes_eta(pipe)
        given["eta"] = sampling.eta
    if sampling.embedded_guidance is not None:
        given["guidance_scale"] = sampling.embedded_guidance
    pipe.set_progress_bar_config(disable=True)
    caution_unread(pipe, prompts)
    say_first_order(pipe, guidance)
    equipped = equip(pipe, prepared(pipe, guidance, prompts, steps))
    size = batch_for(pipe, sampling.batch_size)
    starts = range(0, len(prompts), size)
    for start in own_share(starts) if sampling.shared else starts:
        chosen = slice(start, start + size)
        latents = {} if noises is None else for_pipeline(pipe, noises[chosen])
        with annealing(pipe, sampling) as extra, first_order(pipe, guidance), decoding(pipe, sampling):
            batch = _batch(pipe, list(prompts[chosen]), list(seeds[chosen]), equipped, given | latents)
        yield batch._replace(nfe=batch.nfe + extra.rows / len(batch.prompts), first=start)


def annealing(pipe: Any, sampling: Sampling) -> AbstractContextManager[Extra]:
    """Around one run: the LoRA grows along it, if that is asked for. UserError if there is no LoRA."""
    if sampling.lora_anneal is None:
        return nullcontext(Extra())
    if not lora.adapted(network := lora.network_of(pipe)):
        raise UserError("--lora_anneal lets a LoRA grow along the steps: give the --lora of a training run")
    return annealed(network, SHARES[sampling.lora_anneal], sampling.num_inference_steps)


def _batch(pipe: Any, prompts: list[str], seeds: list[int], equipped: Equipped, given: Mapping[str, Any]) -> Batch:
    """A batch by the pipeline, which is told what is `given` besides."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    method = equipped.method(prompts)
    prepared = uncond_for(pipe, method, len(prompts))
    with attach(pipe, method, equipped.networks) as handle:
        handle.said = bool(prepared)  # the pipeline's scale is then nobody's choice
        made = pipe(prompt=list(prompts), generator=generators, output_type="pt", **given, **prepared)
    images = pictures_of(made)
    images = finite(images.float().cpu(), "a generated picture")
    branches = {name: rows / len(prompts) for name, rows in handle.branches.items()}
    return Batch(images, prompts, seeds, handle.nfe / len(prompts), branches)


@contextmanager
def decoding(pipe: Any, sampling: Sampling) -> Iterator[None]:
    """Within, the pipeline decodes as `sampling` says, as far as its VAE can."""
    vae = pipe.components.get("vae")
    own = {} if vae is None else vars(vae)
    one_by_one = (sampling.decode_batch or sampling.batch_size) < sampling.batch_size
    wanted = {"use_slicing": one_by_one, "use_tiling": sampling.enable_vae_tiling}
    before = {name: own[name] for name, on in wanted.items() if on and name in own}
    own.update(dict.fromkeys(before, True))
    try:
        yield
    finally:
        own.update(before)


def uncond_for(pipe: Any, method: Guidance, batch: int) -> dict[str, Any]:
    """What a pipeline that guides on demand is told so that it prepares the unconditional branch, if the method needs
    it. Nothing for a network that was distilled over guidance scales, which a method of that branch is no use to."""
    return family_of(pipe).uncond_call(batch) if needs_uncond(method) and not scale_setting(pipe) else {}


def frames_for(pipe: Any, num_frames: int | None) -> dict[str, int]:
    """The frames that a pipeline of films is asked for; nothing of another. UserError for a number it cannot make."""
    if not family_of(pipe).latents.frames and num_frames is None:
        return {}
    LatentModel(pipe, num_frames=num_frames or 1)
    return {"num_frames": num_frames or 1} if family_of(pipe).latents.frames else {}


def batch_for(pipe: Any, batch_size: int) -> int:
    """The pictures at a time: one of a pipeline that reads its prompt with the picture, which takes one prompt."""
    return 1 if "QwenImageEdit" in type(pipe).__name__ else batch_size


def image_for(pipe: Any, file: str | None) -> dict[str, Any]:
    """The picture that a pipeline begins from, or that a ControlNet reads. UserError for one that takes none, or cannot
    do without, or without a mask, or without a second picture for its ControlNet."""
    name, taken = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    if "Inpaint" in name:
        raise UserError(f"{name} fills a mask, which cannot be given here: attach to it in Python")
    if "ControlNet" in name and "control_image" in taken:
        raise UserError(f"{name} takes a control_image, which cannot be given here: attach to it in Python")
    if file is None and any(word in name for word in ("Img2Img", "Kontext", "Edit", "ControlNet")):
        raise UserError(f"{name} begins from a picture: give its file as --image")
    if file is not None and "image" not in taken:
        raise UserError(f"{name} takes no picture: leave --image out")
    return {} if file is None else {"image": pil(read_picture(Path(file))[None])[0]}


def pictures_of(made: Any) -> Tensor:
    """The pictures (B, 3, H, W), or films of several frames (B, 3, F, H, W), of a pipeline's result."""
    if "frames" not in made:
        return made.images
    return made.frames[:, 0] if made.frames.shape[1] == 1 else made.frames.transpose(1, 2)


def takes_eta(pipe: Any) -> None:
    """UserError unless the pipeline and its scheduler take an eta: others would leave it out without a word."""
    for thing, function in ((pipe, type(pipe).__call__), (pipe.scheduler, pipe.scheduler.step)):
        if "eta" not in inspect.signature(function).parameters:
            raise UserError(f"{type(thing).__name__} takes no eta: leave it out, or use a pipeline with DDIM")


def for_pipeline(pipe: Any, noises: Tensor) -> dict[str, Any]:
    """Noises (B, C, h, w) as a pipeline is called with them, at their size; FLUX, Chroma and Qwen-Image want them
    packed into tokens.

    The pipeline multiplies them by its scheduler's first sigma, as it does its own. UserError for other channels.
    """
    family = family_of(pipe)
    films = {"num_frames": 1 + (noises.shape[2] - 1) * pipe.vae_scale_factor_temporal} if family.latents.frames else {}
    model = LatentModel(pipe, **films)
    height, width = (side * model.factor for side in noises.shape[-2:])
    if noises.shape[1:] != (shape := model.shape(height, width)):
        raise UserError(f"the noise is {tuple(noises.shape[1:])}, and the model's latents are {shape}")
    tokens = family.grid is not None and family.patch > 1  # FLUX.2's pipeline makes its tokens itself
    latents = (packed(noises) if tokens else noises).to(model.device, model.noise_dtype)
    return {"latents": latents, "height": height, "width": width, **films}


class Pictures(NamedTuple):
    """All the images of a call, and what they cost."""

    images: Tensor  # (N, 3, H, W) in [0, 1], float32, on the CPU
    nfes: list[float]  # of each image: rows that went through the network
    branches: dict[str, float]  # of the mean, those of each branch ("cond", "uncond", ...)
    seconds: float

    @property
    def nfe(self) -> float:
        """The mean over the images."""
        return sum(self.nfes) / len(self.nfes)

    def cost(self) -> dict[str, Any]:
        """The cost as results write it down."""
        return {"nfe": self.nfe, "nfe_by_branch": self.branches, "seconds": round(self.seconds, 3)}


def draw_pictures(batches: Iterator[Batch], total: int, label: str) -> Pictures:
    """The `total` images of all batches and processes, with a progress bar if a person watches."""
    began = time.perf_counter()

    def drawn() -> list[Batch]:
        made = []
        with tqdm(total=total, desc=label, disable=None if process().is_main_process else True) as bar:
            for batch in batches:
                made.append(batch)
                bar.update(len(batch.images))
        return made

    every = {batch.first: batch for batches in told_by_each(drawn) for batch in batches}
    made = [every[first] for first in sorted(every)]
    names = dict.fromkeys(name for batch in made for name in batch.branches)
    rows = {name: sum(b.branches.get(name, 0) * len(b.images) for b in made) for name in names}
    return Pictures(
        torch.cat([batch.images for batch in made]),
        [batch.nfe for batch in made for _ in batch.prompts],
        {name: count / total for name, count in rows.items()},
        time.perf_counter() - began,
    )


def pixels(images: Tensor) -> list[Any]:
    """(B, 3, H, W) as B arrays (H, W, 3)."""
    return list(images.permute(0, 2, 3, 1).numpy())


def generate(config: SampleConfig, guidance: Guidance | None = None) -> dict[str, Any]:
    """Draw pictures, as `difftune sample` does: PNGs, grid.png and sample.json, whose contents are returned.

        generate(SampleConfig(model="tiny", prompt=["a red circle"], output_dir="out"), CFG(3.0))["nfe"]

    guidance: a method in place of the one that `config` names. Nothing is written before all images are made.
    Raises UserError, before anything is loaded, for invalid settings; DiskError if the folder cannot be written.
    """
    method = guidance_named(config.guidance, None, config.guidance_options) if guidance is None else guidance
    texts, seeds = jobs_of(config.prompt, config.num_images, config.seed)
    if config.noise is not None and config.noise_lora is not None:
        raise UserError("--noise gives the noises and --noise_lora moves drawn ones: leave one of them out")
    check_compile(config)
    noises = None if config.noise is None else noises_of(config.noise, len(texts))
    if (config.num_frames or 1) > 1:
        check_films()
    sampling = Sampling(
        config.num_inference_steps,
        config.batch_size,
        config.eta,
        lora_anneal=config.lora_anneal,
        num_frames=config.num_frames,
        shared=True,
        image=config.image,
    )
    with claimed_by_main(config.output_dir, fresh) as claim:
        if config.noise_lora is not None:
            noises = moved_by(config.noise_lora, config.model, texts, seeds, config.num_inference_steps)
        pipe = open_pipeline(config.model, config.lora)
        with compiled(pipe, config.compile, dynamic=None, guidance=method):
            made = draw_pictures(generate_batches(pipe, texts, seeds, method, sampling, noises), len(texts), "sample")
        settings = config.written() | {
            "guidance": config.guidance if guidance is None else type(guidance).__name__,
            "guidance_options": method_settings(method),
            "model_digest": digest_of(pipe),
            "scheduler": scheduler_name(pipe, method),
        }
        images = [
            {
                "file": f"{i:05d}-seed{seed}.{'png' if made.images.ndim == 4 else 'mp4'}",
                "prompt": prompt,
                "seed": seed,
                "nfe": nfe,
            }
            for i, (prompt, seed, nfe) in enumerate(zip(texts, seeds, made.nfes, strict=True))
        ]
        found = {"settings": settings, "images": images, **made.cost(), "versions": versions()}
        if claim is not None:
            claim.results(_results(made.images, found, config.prompt))
    return found


def jobs_of(prompts: Sequence[str], count: int, seed: int) -> tuple[list[str], list[int]]:
    """The prompt and the seed of each image: `count` images of each prompt, with seeds seed, seed + 1, ..."""
    return [p for p in prompts for _ in range(count)], [seed + i for _ in prompts for i in range(count)]


def _results(images: Tensor, found: Mapping[str, Any], prompts: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the pictures or films, the grid (of the films' middle frames) and sample.json, in the order
    in which they are written."""
    pictures = pixels(stills(images))
    for i, (about, picture) in enumerate(zip(found["images"], pictures, strict=True)):
        yield about["file"], output.png(picture) if images.ndim == 4 else mp4(images[i])
    yield "grid.png", labelled(pictures, prompts)
    yield "sample.json", output.as_json(found)


def labelled(pictures: Sequence[Any], prompts: Sequence[str]) -> bytes:
    """The pictures (H, W, 3), as many of each prompt, in a row beside it; those of a single prompt in a square."""
    count = len(pictures) // len(prompts)
    columns = count if len(prompts) > 1 else math.ceil(math.sqrt(count))
    parts = [pictures[i * count : (i + 1) * count] for i in range(len(prompts))]
    return sheet((prompt, [Cell(part, columns=columns)]) for prompt, part in zip(prompts, parts, strict=True))


def method_settings(guidance: Any) -> dict[str, Any]:
    """The settings of a guidance method, with those of a method inside it."""
    return asdict(guidance)
