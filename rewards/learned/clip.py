"""Cosine similarity of pictures and captions: CLIP models of open_clip and transformers, PickScore and HPS."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPVisionConfig

from rewards import hub
from rewards.checks import dtype_of, paired
from rewards.errors import RewardError, WeightsMissing
from rewards.learned.layouts import built, clip_from_open_clip, under
from rewards.learned.preprocess import Preprocess, transformers_preprocess

TINY = Path(__file__).parent.parent / "weights" / "tiny-clip"
FITS: dict[str, Literal["crop", "squash"]] = {"shortest": "crop", "squash": "squash"}  # open_clip's names for ours

Tokenize = Callable[[Sequence[str]], Tensor]  # prompts -> ids (B, length)

VIT_L: dict[str, Any] = {  # openai/clip-vit-large-patch14
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14,
    },
}  # fmt: skip
VIT_H: dict[str, Any] = {  # laion/CLIP-ViT-H-14-laion2B-s32B-b79K
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "patch_size": 14, "hidden_act": "gelu",
    },
}  # fmt: skip


class Cosine:
    """scale cos(f(image), g(prompt)) by two frozen towers, which move to the device of the images."""

    differentiable = True
    scale = 1.0
    model: Any  # a network of open_clip or transformers
    tokenize: Tokenize
    preprocess: Preprocess

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        return self.scale * (self.image_features(images) * self.text_features(prompts, images.device)).sum(dim=1)

    def image_features(self, images: Tensor) -> Tensor:
        """Features of unit length: images (B, 3, H, W) in [0, 1] -> (B, D) in float32."""
        self.model.to(images.device)
        x = self.preprocess(images).to(next(self.model.parameters()).dtype)
        return F.normalize(self._see(x).float(), dim=1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Features of unit length, (B, D) in float32."""
        self.model.to(device)
        return F.normalize(self._read(self.tokenize(list(prompts)).to(device)).float(), dim=1)

    def _see(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _read(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


class CLIPScore(Cosine):
    """cos(f(image), g(prompt)) in [-1, 1], without the logit scale (https://arxiv.org/abs/2104.08718).

    `folder` holds an open_clip model in its own format (`open_clip_config.json`, `open_clip_model.safetensors`, the
    tokenizer's files). Raises FileNotFoundError if there is no model, ValueError for a preprocessing it does not know.
    """

    def __init__(self, folder: str | Path, dtype: str = "float32"):
        if not (Path(folder) / "open_clip_config.json").is_file():
            raise WeightsMissing(f"no open_clip model in {folder}: it has no open_clip_config.json")
        name = f"local-dir:{folder}"
        self.model = open_clip.create_model(name).to(dtype_of(dtype)).eval().requires_grad_(False)
        self.tokenize = open_clip.get_tokenizer(name)
        self.preprocess = _open_clip_preprocess(self.model.visual.preprocess_cfg, folder)

    def _see(self, x: Tensor) -> Tensor:
        return self.model.encode_image(x)

    def _read(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)


class TransformersCLIP(Cosine):
    """scale cos(f(image), g(prompt)) by a CLIPModel of transformers."""

    def __init__(self, model: CLIPModel, tokenize: Tokenize, preprocess: Preprocess, scale: float = 1.0):
        self.model, self.tokenize, self.preprocess, self.scale = model, tokenize, preprocess, scale

    def _see(self, x: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output)

    def _read(self, ids: Tensor) -> Tensor:
        return self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output)


def _open_clip_preprocess(config: Mapping[str, Any], folder: str | Path) -> Preprocess:
    for key, known in (("resize_mode", FITS), ("interpolation", ("bicubic", "bilinear"))):
        if config[key] not in known:
            raise RewardError(f"{folder}: {key} {config[key]!r} is not supported, only {', '.join(known)}")
    size = config["size"] if isinstance(config["size"], int) else config["size"][0]
    return Preprocess(size, FITS[config["resize_mode"]], config["mean"], config["std"], config["interpolation"])


# ------------------------------------------------------------------------------------------------ by name


def tiny_clip(folder: str | Path = TINY) -> CLIPScore:
    """The CLIP of the world of shapes that comes with the package (`scripts/train_tiny.py` trains it)."""
    return CLIPScore(folder)


def open_clip_score(model: str = "ViT-B-32", pretrained: str = "laion2b_s34b_b79k", dtype: str = "float32") -> Cosine:
    """The CLIP score of any model of open_clip, by its name and pretrained tag, as `open_clip.list_pretrained()` has
    them. Raises ValueError for a pair that open_clip does not know or has not on the Hub."""
    return CLIPScore(hub.snapshot(repository(model, pretrained)), dtype)


def repository(model: str, pretrained: str) -> str:
    """The Hub id of a model of open_clip. Raises ValueError for a pair that open_clip does not know."""
    config = open_clip.get_pretrained_cfg(model, pretrained)
    found = str(config.get("hf_hub", "")).rstrip("/") if config else ""
    if found.count("/") != 1:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none, and no model of that name"
        raise RewardError(f"open_clip has no model {model!r} with tag {pretrained!r} on the Hub; its tags: {tags}")
    return found


def fetch_open_clip(model: str, pretrained: str, **_: Any) -> list[Path]:
    """What `open_clip_score` and `clip_logit` download."""
    return [hub.snapshot(repository(model, pretrained))]


def models_of_open_clip(model: str, pretrained: str, **_: Any) -> list[str]:
    """The model of the Hub that these are."""
    return [repository(model, pretrained)]


def clip_logit(model: str = "ViT-H-14", pretrained: str = "laion2b_s32b_b79k", dtype: str = "float32") -> Cosine:
    """exp(logit_scale) cos(f(image), g(prompt)) by a model of open_clip; by default CLIP ViT-H/14, about 100 cos, as in
    ReNO's mixture (https://arxiv.org/abs/2406.04312)."""
    reward = open_clip_score(model, pretrained, dtype)
    reward.scale = float(reward.model.logit_scale.exp())
    return reward


def clip_score(
    model: str | None = None,
    weights: str | Path | None = None,
    sizes: Mapping[str, Any] = VIT_L,
    dtype: str = "float32",
) -> TransformersCLIP:
    """cos(f(image), g(prompt)) by openai/clip-vit-large-patch14, or by `model`: a folder or Hub id of a CLIPModel."""
    if model is not None:
        return _from_folder(hub.snapshot(model), dtype)
    return _from_state(under(_state(weights, "clip-vit-l-14"), ""), sizes, dtype, Preprocess())


def fetch_clip_score(model: str | None, **_: Any) -> list[Path]:
    """What `clip_score` downloads."""
    return [hub.weights("clip-vit-l-14") if model is None else hub.snapshot(model)]


def pickscore(
    weights: str | Path | None = None, sizes: Mapping[str, Any] = VIT_H, dtype: str = "float32"
) -> TransformersCLIP:
    """PickScore v1: exp(logit_scale) cos(f(image), g(prompt)), about 18 to 24 (https://arxiv.org/abs/2305.01569).

    `weights` is a local file in place of the pinned one, `sizes` its CLIPConfig.
    """
    reward = _from_state(under(_state(weights, "pickscore-v1"), ""), sizes, dtype, Preprocess())
    reward.scale = float(reward.model.logit_scale.exp())
    return reward


def hps(
    version: Literal["2", "2.1"] = "2.1",
    weights: str | Path | None = None,
    sizes: Mapping[str, Any] = VIT_H,
    dtype: str = "float32",
) -> TransformersCLIP:
    """HPS v2 and v2.1: cos(f(image), g(prompt)), about 0.2 to 0.35 (https://arxiv.org/abs/2306.09341).

    The longer side is resized and the picture padded with black, never cropped. Scores compare pictures of one prompt.
    """
    if version not in ("2", "2.1"):
        raise RewardError(f"HPS has the versions 2 and 2.1, not {version!r}")
    state = clip_from_open_clip(_state(weights, f"hps-v{version}"))
    return _from_state(state, sizes, dtype, Preprocess(fit="pad"))


def hps_v2(weights: str | Path | None = None, sizes: Mapping[str, Any] = VIT_H, dtype: str = "float32") -> Cosine:
    """`hps` of version 2."""
    return hps("2", weights, sizes, dtype)


def _state(weights: str | Path | None, name: str) -> dict[str, Tensor]:
    return hub.state(name) if weights is None else hub.read(weights)


def _from_state(state: Mapping[str, Tensor], sizes: Mapping[str, Any], dtype: str, see: Preprocess) -> TransformersCLIP:
    config = CLIPConfig(**sizes)
    model = built(CLIPModel, config, state, dtype)
    tokenize = _tokenizer(config.text_config.max_position_embeddings)
    size = config.vision_config.image_size
    return TransformersCLIP(model, tokenize, Preprocess(size, see.fit))


@cache
def _tokenizer(length: int) -> open_clip.SimpleTokenizer:
    """CLIP's own, whose vocabulary comes with open_clip."""
    return open_clip.SimpleTokenizer(context_length=length)


def _from_folder(folder: Path, dtype: str) -> TransformersCLIP:
    config = CLIPConfig.from_pretrained(folder)
    state = under(hub.read(folder / "model.safetensors"), "")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = config.text_config.max_position_embeddings

    def tokenize(prompts: Sequence[str]) -> Tensor:
        return tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    looks = folder / "preprocessor_config.json"
    seen = Preprocess(config.vision_config.image_size)  # CLIP's own, if the folder says nothing else
    if looks.is_file():
        seen = transformers_preprocess(json.loads(looks.read_text()))
    return TransformersCLIP(built(CLIPModel, config, state, dtype), tokenize, seen)


def vision_config(sizes: Mapping[str, Any]) -> CLIPVisionConfig:
    """The image tower's part of a CLIPConfig, with the projection."""
    return CLIPVisionConfig(**sizes["vision_config"], projection_dim=sizes["projection_dim"])
