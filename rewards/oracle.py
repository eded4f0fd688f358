"""The exact judge of the world of shapes, as a reward. It is for evaluation: never train on it and report it too."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards import shapes
from rewards.checks import eight_bit, paired
from rewards.render import RESOLUTION


@dataclass(frozen=True)
class Oracle:
    """1 if the caption holds of the picture, else 0 (`rewards.shapes.holds`).

    The picture is judged as a file would hold it, in 8 bits. Raises ValueError for a caption outside the grammar and
    for pictures that are not square.
    """

    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([not why for why in self.explain(images, prompts)], device=images.device).float()

    def explain(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        """Why each caption is false of its picture, in one sentence; empty where it holds."""
        paired(images, prompts)
        captions = [shapes.parse(prompt) for prompt in prompts]
        return [shapes.explain(c, shapes.read(image)) for c, image in zip(captions, _seen(images), strict=True)]


def _seen(images: Tensor) -> list:
    """The pictures as the oracle reads them: (B, 3, H, W) -> B arrays (64, 64, 3)."""
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"the oracle reads square pictures, not {images.shape[-2]} x {images.shape[-1]} pixels")
    x = eight_bit(images).float() / 255
    if x.shape[-1] != RESOLUTION:
        x = F.interpolate(x, (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
    return list(x.permute(0, 2, 3, 1).cpu().numpy())
