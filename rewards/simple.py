"""Rewards that are one formula of the pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.checks import paired, seen
from rewards.errors import RewardError


@dataclass(frozen=True)
class Brightness:
    """-|mean pixel - target|, in [-1, 0]."""

    target: float = 1.0
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        return -(seen(images).mean(dim=(1, 2, 3)) - self.target).abs()


@dataclass(frozen=True)
class Colorfulness:
    """sqrt(var rg + var yb) + 0.3 sqrt(mean rg^2 + mean yb^2), with rg = R - G and yb = (R + G)/2 - B in [-255, 255].

    Hasler and Suesstrunk, "Measuring colourfulness in natural images" (2003), section 3 (their M^(3)): 0 is gray, 15
    slightly, 33 moderately, 59 quite, 82 highly, 109 extremely colourful. A gray picture has gradient 0.
    """

    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        red, green, blue = (255 * seen(images)).flatten(2).unbind(1)
        opponent = torch.stack([red - green, (red + green) / 2 - blue], dim=1)  # (B, 2, pixels)
        mean = opponent.mean(dim=2, keepdim=True)
        spread = _norm(opponent - mean) / red.shape[1] ** 0.5
        return spread + 0.3 * _norm(mean)


@dataclass(frozen=True)
class Saturation:
    """Mean saturation of HSV, (max - min) / max over the channels of a pixel, in [0, 1]; black has none."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        x = seen(images)
        high, low = x.amax(1), x.amin(1)
        return torch.where(high == 0, 0.0, (high - low) / high.clamp(min=1e-6)).mean(dim=(1, 2))


LUMA = (0.299, 0.587, 0.114)  # of Rec. 601


@dataclass(frozen=True)
class Contrast:
    """RMS contrast, the standard deviation of luma (Rec. 601), in [0, 0.5]; a flat picture has gradient 0."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        x = seen(images)
        luma = (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(1)
        return _norm(luma - luma.mean(dim=(1, 2), keepdim=True)) / luma[0].numel() ** 0.5


def _norm(x: Tensor) -> Tensor:
    """Length of each row, (B, ...) -> (B,); unlike sqrt's, its gradient at 0 is 0."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


@dataclass(frozen=True)
class Symmetry:
    """-mean |x - mirrored x|, in [-1, 0]; `mirror` is "left-right" or "top-bottom". Raises ValueError for another."""

    mirror: str = "left-right"
    differentiable = True

    def __post_init__(self) -> None:
        if self.mirror not in MIRRORS:
            raise RewardError(f"pictures are mirrored {' or '.join(MIRRORS)}, not {self.mirror!r}")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        x = seen(images)
        return -(x - x.flip(MIRRORS[self.mirror])).abs().mean(dim=(1, 2, 3))


MIRRORS = {"left-right": 3, "top-bottom": 2}
