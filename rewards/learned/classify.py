"""Log-probability of a class, by any image classifier of timm or transformers, or the embedded one."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from rewards import hub
from rewards.checks import dtype_of, paired
from rewards.errors import RewardError
from rewards.learned.preprocess import RESAMPLE, Preprocess, transformers_preprocess
from rewards.registry import unknown
from rewards.world import grammar
from rewards.world.classifier import CLASSES, ShapeClassifier, load_classifier

IMAGENET = 1000  # classes


class ClassProbability:
    """log p(class | image), by a softmax over all classes; 0 at best.

    The class is `label`, a name or a number; without one, each prompt names its own. A name is read without regard to
    case, and one of several names that a class has ("tench, Tinca tinca") is enough. Raises ValueError for a class that
    the network does not have.
    """

    differentiable = True

    def __init__(
        self,
        model: nn.Module,
        logits: Callable[[Tensor], Tensor],
        labels: Sequence[str],
        preprocess: Preprocess,
        label: str | int | None = None,
    ):
        self.model, self.logits, self.labels, self.preprocess = model, logits, labels, preprocess
        self.names = _names(labels)
        self.label = label if label is None else self.index(label)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        index = [self.index(prompt) if self.label is None else self.label for prompt in prompts]
        return self.log_probabilities(images).gather(1, torch.tensor(index, device=images.device)[:, None]).squeeze(1)

    def log_probabilities(self, images: Tensor) -> Tensor:
        """The log probability of every class: images (B, 3, H, W) in [0, 1] -> (B, classes) in float32."""
        self.model.to(images.device)
        x = self.preprocess(images).to(next(self.model.parameters()).dtype)
        return self.logits(x).float().log_softmax(dim=1)

    def index(self, label: str | int) -> int:
        """The number of a class."""
        if str(label).isdecimal() and int(label) < len(self.labels):
            return int(label)
        if str(label).strip().lower() not in self.names:
            raise RewardError(unknown("class", str(label), self.names))
        return self.names[str(label).strip().lower()]


def _names(labels: Sequence[str]) -> dict[str, int]:
    """Each name of a class, and all of its names together, in lower case; the first class of a name has it."""
    found: dict[str, int] = {}
    for i, label in enumerate(labels):
        for name in (label, *label.split(",")):
            found.setdefault(name.strip().lower(), i)
    return found


def classifier(model: str | Path, label: str | int | None = None, dtype: str = "float32") -> ClassProbability:
    """`ClassProbability` by a folder or Hub id of timm or of transformers, with safetensors in it."""
    folder = hub.snapshot(model)
    config = json.loads((folder / "config.json").read_text())
    make = _timm if "architecture" in config else _transformers
    return make(folder, config, label, dtype_of(dtype))


def _timm(folder: Path, config: Mapping[str, Any], label: str | int | None, dtype: torch.dtype) -> ClassProbability:
    about = config.get("pretrained_cfg", config)
    network = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], **config.get("model_args", {})
    )
    network.load_state_dict(hub.read(folder / "model.safetensors"))
    network = network.to(dtype).eval().requires_grad_(False)
    return ClassProbability(network, network, _timm_labels(config), timm_preprocess(about), label)


def timm_preprocess(about: Mapping[str, Any]) -> Preprocess:
    """What timm's own evaluation transform does to a picture, from its pretrained_cfg. Raises ValueError for others
    than a square input by a centre crop or a squash."""
    _, height, width = about["input_size"]
    mode = about.get("crop_mode", "center")
    if height != width or mode not in ("center", "squash"):
        raise RewardError(f"a timm model with input {height} x {width} and crop mode {mode!r} is not supported")
    fit: Literal["crop", "squash"] = "squash" if mode == "squash" else "crop"
    how = about.get("interpolation", "bicubic")
    if how not in RESAMPLE.values():
        raise RewardError(f"a timm model with interpolation {how!r} is not supported, only bilinear, bicubic")
    return Preprocess(height, fit, about["mean"], about["std"], how, int(height / about.get("crop_pct", 0.875)))


def _timm_labels(config: Mapping[str, Any]) -> Sequence[str]:
    if "label_names" in config:
        about = config.get("label_descriptions", {})
        return [about.get(name, name) for name in config["label_names"]]
    if config["num_classes"] == IMAGENET:
        return list(ImageNetInfo().label_descriptions())
    return [str(i) for i in range(config["num_classes"])]


def _transformers(
    folder: Path, config: Mapping[str, Any], label: str | int | None, dtype: torch.dtype
) -> ClassProbability:
    network = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True, dtype=dtype)
    network = network.eval().requires_grad_(False)
    labels = [network.config.id2label[i] for i in range(network.config.num_labels)]
    about = json.loads((folder / "preprocessor_config.json").read_text())

    def logits(x: Tensor) -> Tensor:
        return network(pixel_values=x).logits

    return ClassProbability(network, logits, labels, transformers_preprocess(about), label)


class TinyClassifier:
    """log p(colour and shape of the caption | image), by the embedded classifier of one object.

    A caption without a colour has the probabilities of all its colours. Raises ValueError for captions outside the
    grammar of the world of shapes, and for those of more than one object.
    """

    differentiable = True

    def __init__(self, folder: str | Path | None = None):
        self.model: ShapeClassifier = load_classifier(folder)
        self.preprocess = Preprocess(64, "squash", (0, 0, 0), (1, 1, 1))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        wanted = torch.tensor([self._classes(prompt) for prompt in prompts], device=images.device)
        logits = self.model.to(images.device)(self.preprocess(images)).log_softmax(dim=1)
        return logits.masked_fill(~wanted, float("-inf")).logsumexp(dim=1)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 64)."""
        return self.model.to(images.device).features(self.preprocess(images))

    @staticmethod
    def _classes(prompt: str) -> list[bool]:
        phrases = grammar.parse(prompt).phrases
        if len(phrases) != 1:
            raise RewardError(f"the classifier knows pictures of one object, not {prompt!r}")
        (phrase,) = phrases
        named = [tuple(name.split()) for name in CLASSES]
        return [shape == phrase.shape and phrase.color in (None, color) for color, shape in named]
