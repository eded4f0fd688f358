"""Stage `export`: everything in float16, in the formats of diffusers and open_clip."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import nn

from scripts.tiny import classifier, clip, flow, judged, turbo, unet, vae, words
from scripts.tiny.fit import Setup


def tiny(setup: Setup, folder: Path) -> None:
    scheduler = DDIMScheduler(
        **unet.TABLE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    made = [_half(part) for part in (vae.finished(setup), clip.text_encoder(setup), unet.finished(setup))]
    parts = made[0], made[1], words.tokenizer(), made[2], scheduler
    StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False).save_pretrained(folder)
    encoder = folder / "text_encoder/config.json"  # transformers loads in the dtype named here
    encoder.write_text(json.dumps(json.loads(encoder.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for_transformers_4(folder)


PREFIX = "text_model."


def for_transformers_4(folder: Path) -> None:
    """Give a pipeline's text encoder and tokenizer the files of transformers 4 too, which transformers 5 reads as well.

    Version 4 looks for the names with a prefix, and leaves weights random, in silence, that it does not find; its
    tokenizer reads vocab.json and merges.txt.
    """
    file = folder / "text_encoder/model.safetensors"
    weights = {PREFIX + name.removeprefix(PREFIX): value for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    known = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]
    merges = ["#version: 0.2", *(" ".join(merge) for merge in known["merges"])]
    (folder / "tokenizer/vocab.json").write_text(json.dumps(known["vocab"], ensure_ascii=False))
    (folder / "tokenizer/merges.txt").write_text("\n".join(merges) + "\n")


def tiny_turbo(setup: Setup, folder: Path) -> None:
    _unet(turbo.trained(setup), folder)
    scheduler = LCMScheduler(
        **unet.TABLE, prediction_type="v_prediction", clip_sample=False, original_inference_steps=50, steps_offset=1
    )
    scheduler.save_pretrained(folder / "scheduler")


def tiny_flow(setup: Setup, folder: Path) -> None:
    _unet(flow.trained(setup), folder)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow.SHIFT, steps_offset=1
    )
    scheduler.save_pretrained(folder / "scheduler")


def tiny_weak(setup: Setup, folder: Path) -> None:
    _unet(unet.weak(setup), folder)


def tiny_clip(setup: Setup, folder: Path) -> None:
    _store(judged.trained(setup), folder / "open_clip_model.safetensors")
    half = [0.5, 0.5, 0.5]
    preprocess = {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": clip.config(), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    words.tokenizer().save_pretrained(folder)


def tiny_classifier(setup: Setup, folder: Path) -> None:
    model = classifier.trained(setup)
    _store(model, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")


def _half(model: nn.Module) -> nn.Module:
    """A copy in float16: the stages that are still to come train on the model itself."""
    return deepcopy(model).half().to(memory_format=torch.contiguous_format)


def _unet(model: UNet2DConditionModel, folder: Path) -> None:
    _half(model).save_pretrained(folder / "unet")


def _store(model: nn.Module, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous().cpu() for name, value in model.state_dict().items()}, file)


MODELS: dict[str, Callable[[Setup, Path], None]] = {
    "difftune/weights/tiny": tiny,
    "difftune/weights/tiny-turbo": tiny_turbo,
    "difftune/weights/tiny-flow": tiny_flow,
    "difftune/weights/tiny-weak": tiny_weak,
    "rewards/weights/tiny-clip": tiny_clip,
    "rewards/weights/tiny-classifier": tiny_classifier,
}


def write(setup: Setup, root: Path = Path()) -> None:
    """Every model into its folder below `root`, the repository's by default."""
    for name, export in MODELS.items():
        export(setup, root / name)
