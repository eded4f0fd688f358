"""A small classifier of the world of shapes: which colour and which shape a picture of one object shows."""

import json
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rewards.world.render import COLORS, SHAPES

CLASSES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)


class ShapeClassifier(nn.Module):
    """Logits over colour x shape, and the features below them.

    images (B, 3, 64, 64) in [0, 1] -> `features` (B, 64), `forward` logits (B, 18) in the order of `CLASSES`.
    """

    def __init__(self, width: int = 24, features: int = 64):
        super().__init__()
        self.config = {"width": width, "features": features, "classes": CLASSES}
        sizes = [3, width, 2 * width, 2 * width, features]
        blocks = [self._block(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(features, len(CLASSES))

    @staticmethod
    def _block(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(4, b), nn.SiLU())

    def features(self, images: Tensor) -> Tensor:
        return self.body(2 * images - 1).amax(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def load_classifier(folder: Path | str | None = None) -> ShapeClassifier:
    """The embedded classifier, frozen, in float32; `folder` holds config.json and model.safetensors."""
    root = Path(str(resources.files("rewards").joinpath("weights/tiny-classifier"))) if folder is None else Path(folder)
    config = json.loads((root / "config.json").read_text())
    model = ShapeClassifier(config["width"], config["features"])
    model.load_state_dict({k: v.to(torch.float32) for k, v in load_file(root / "model.safetensors").items()})
    return model.eval().requires_grad_(False)
