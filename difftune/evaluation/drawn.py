"""The pictures of an evaluation: drawn batch by batch into a folder, so that one which was killed goes on where it was.

`images/sample.json` has the settings and every picture that is to be drawn, with its prompt and seed, as `difftune
sample` writes them; `batches.jsonl` has a line for each batch that is there.
"""

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from difftune.configs.images import EvalConfig
from difftune.errors import UserError
from difftune.files import output, records
from difftune.files.pictures import SAMPLES, list_captioned, list_pictures
from difftune.files.text import parse_json, read_text
from difftune.pipelines.fingerprint import check_resumed, digest_of
from difftune.pipelines.generate import Batch, Sampling, generate_batches, pixels
from difftune.pipelines.opened import open_pipeline
from difftune.pipelines.shared import made_by_main, told_by_each
from difftune.processes import process
from guidance.contract import Guidance

PICTURES, BATCHES = "images", "batches.jsonl"
OF_THE_SCORES = {"reward", "baseline", "images", "output_dir", "resume_from_checkpoint"}  # settings of no picture


@dataclass(frozen=True)
class EvalImage:
    """A picture that is to be judged."""

    file: str  # its name in the folder of pictures
    prompt: str
    category: str
    seed: int  # or, of a picture that was made elsewhere, its number among those of its prompt


@dataclass(frozen=True)
class Drawing:
    """Everything that decides the pictures, and what they are."""

    folder: Path  # of the evaluation
    settings: Mapping[str, Any]
    images: Sequence[EvalImage]

    @property
    def pictures(self) -> Path:
        return self.folder / PICTURES

    @property
    def plan(self) -> Path:
        return self.pictures / SAMPLES


def drawing_settings(config: EvalConfig, method: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the pictures depend on; method: those of the guidance method."""
    settings = config.written() | {"guidance_options": dict(method)}
    return {name: value for name, value in settings.items() if name not in OF_THE_SCORES}


def draw_missing(config: EvalConfig, guidance: Guidance, drawing: Drawing) -> str | None:
    """Draw the batches that the folder lacks, and let the model go: a large reward needs its room. Returns the digest
    of the model.

    UserError if the folder's pictures are of other settings or of another model.
    """
    begun, there = made_by_main(lambda: (read_plan(drawing), {batch["step"] for batch in batches_in(drawing)}))
    missing = [i for i in range(-(-len(drawing.images) // config.batch_size)) if i not in there]
    if begun is not None and not missing:
        return begun.get("model_digest")
    digest = draw_opened(config, guidance, drawing, missing, begun)
    release_memory()
    return digest


def draw_opened(
    config: EvalConfig,
    guidance: Guidance,
    drawing: Drawing,
    missing: Sequence[int],
    begun: Mapping[str, Any] | None,
) -> str | None:
    """Open the model, draw these batches, and return its digest. begun: the settings of those that are there."""
    assert config.model is not None
    pipe = open_pipeline(config.model, config.lora)
    if begun is None:
        made_by_main(lambda: write_plan(drawing, digest_of(pipe)))
    else:
        check_resumed(pipe, begun.get("model_digest"))
    told_by_each(lambda: draw_batches(pipe, config, guidance, drawing, missing))
    return digest_of(pipe)


def release_memory() -> None:
    """Free what is no longer used, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def draw_batches(pipe: Any, config: EvalConfig, guidance: Guidance, drawing: Drawing, missing: Sequence[int]) -> None:
    """Draw the batches of these numbers, this process's share of them; a batch is there when its line is."""
    size, sampling = config.batch_size, Sampling(config.num_inference_steps, config.batch_size, shared=True)
    parts = [drawing.images[i * size : (i + 1) * size] for i in missing]
    texts, seeds = [image.prompt for part in parts for image in part], [image.seed for part in parts for image in part]
    with tqdm(total=len(texts), desc="eval", disable=None if process().is_main_process else True) as bar:
        for batch in generate_batches(pipe, texts, seeds, guidance, sampling):
            place = batch.first // size
            write_batch(drawing, missing[place], parts[place], batch)
            bar.update(len(batch.prompts))


def write_batch(drawing: Drawing, number: int, images: Sequence[EvalImage], batch: Batch) -> None:
    """Write the pictures of a batch, and then its line."""
    for image, picture in zip(images, pixels(batch.images), strict=True):
        output.write(drawing.pictures / image.file, output.png(picture))
    cost = {"count": len(images), "nfe": batch.nfe, "nfe_by_branch": batch.branches}
    records.append(drawing.folder / BATCHES, {"step": number, **cost})


def batches_in(drawing: Drawing) -> list[dict[str, Any]]:
    """What is known of the batches that are there, in their order: several processes add them as they are drawn."""
    return sorted(records.records(drawing.folder / BATCHES), key=lambda batch: batch["step"])


def cost_of(drawing: Drawing) -> dict[str, Any]:
    """The mean number of network evaluations of a picture, in all and by branch."""
    batches = batches_in(drawing)
    total = sum(batch["count"] for batch in batches)
    names = dict.fromkeys(name for batch in batches for name in batch["nfe_by_branch"])
    rows = {name: sum(b["nfe_by_branch"].get(name, 0) * b["count"] for b in batches) for name in names}
    nfe = sum(batch["nfe"] * batch["count"] for batch in batches) / total
    return {"nfe": nfe, "nfe_by_branch": {name: count / total for name, count in rows.items()}}


# ------------------------------------------------------------------------------------------------ the plan on disk


def write_plan(drawing: Drawing, digest: str | None) -> None:
    settings = {**drawing.settings, "model_digest": digest}
    output.write_json(drawing.plan, {"settings": settings, "images": [asdict(image) for image in drawing.images]})


def read_plan(drawing: Drawing) -> dict[str, Any] | None:
    """The settings that the folder's pictures were begun with; None if there are none. UserError if they are others."""
    if not drawing.plan.is_file():
        return None
    try:
        found = parse_json(read_text(drawing.plan, "the pictures of"))
        settings, images = dict(found["settings"]), list(found["images"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{drawing.plan} is damaged: choose another --output_dir") from error
    for name, value in json.loads(json.dumps(drawing.settings)).items():
        if settings.get(name) != value:
            then = f"{name}={settings.get(name)!r}, not {value!r}"
            raise UserError(f"the pictures of {drawing.folder} were drawn with {then}: resume with that")
    if images != [asdict(image) for image in drawing.images]:
        raise UserError(f"the pictures of {drawing.folder} are of other prompts: choose another --output_dir")
    return settings


# ------------------------------------------------------------------------------------------------ made elsewhere


def images_in(folder: str | Path, needing: Sequence[str], categories: Mapping[str, str]) -> list[EvalImage]:
    """The pictures of a folder, whose captions are their prompts. needing: rewards that need one; if there is none, a
    picture without a caption is known by its name. UserError for a picture that lacks what it needs."""
    listed = list_captioned(folder) if needing else list_pictures(folder)
    numbers: dict[str, int] = {}
    found = []
    for picture in listed:
        prompt = picture.caption or picture.path.stem
        number = numbers.setdefault(prompt, 0)
        numbers[prompt] += 1
        found.append(EvalImage(picture.path.name, prompt, categories.get(prompt, ""), number))
    return with_seeds(Path(folder), found)


def with_seeds(folder: Path, images: Sequence[EvalImage]) -> list[EvalImage]:
    """The pictures with the seeds and the categories that `difftune sample` or `eval` wrote down, if it made them."""
    if not (folder / SAMPLES).is_file():
        return list(images)
    about = {image["file"]: image for image in parse_json(read_text(folder / SAMPLES, "the pictures of"))["images"]}
    told = [(image, about[image.file]) for image in images]
    return [
        replace(image, seed=int(its.get("seed", image.seed)), category=image.category or str(its.get("category", "")))
        for image, its in told
    ]
