"""Likeness to a set of texts, without a picture to copy (DRAGON's text exemplars, https://arxiv.org/abs/2504.15217)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards import hub
from rewards.checks import paired
from rewards.errors import RewardError
from rewards.registry import load


class Encoder(Protocol):
    """Pictures and texts in one space: every CLIP of `rewards.learned.clip` is one."""

    def image_features(self, images: Tensor) -> Tensor:
        """Features of unit length: images (B, 3, H, W) -> (B, D)."""

    def text_features(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Features of unit length, (B, D)."""


class TextExemplar:
    """cos(f(image), mean of g(texts)), in [-1, 1]; the prompt is not looked at.

    `encoder` is the name of a reward with two towers ("tiny-clip", "clip-score", "open-clip", "pickscore", "hps-v2.1"),
    the options its own. Raises ValueError without a text, and for a reward that has no text tower.
    """

    differentiable = True

    def __init__(self, texts: Sequence[str] = (), encoder: str = "tiny-clip", options: dict[str, Any] | None = None):
        if isinstance(texts, str) or not texts:
            raise RewardError(f"text exemplars are a list of one text or more, not {texts!r}")
        self.texts, self.encoder = list(texts), encoder_of(encoder, **(options or {}))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        mean = self.encoder.text_features(self.texts, images.device).mean(dim=0)
        return self.encoder.image_features(images) @ F.normalize(mean, dim=0)


def fetch_encoder(encoder: str, options: dict[str, Any] | None, **_: Any) -> list[Path]:
    """What `TextExemplar` downloads."""
    return hub.prefetch(encoder, **(options or {}))


def encoder_of(name: str, **options: Any) -> Encoder:
    """The towers of a reward. Raises ValueError for one without `image_features` and `text_features`."""
    reward: Any = load(name, **options)
    if not {"image_features", "text_features"} <= set(dir(reward)):
        raise RewardError(f"reward {name!r} has no towers for pictures and texts: take one of the CLIP rewards")
    return reward
