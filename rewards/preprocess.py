"""How networks see pictures: a differentiable resize, then mean and standard deviation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """(B, 3, H, W) in [0, 1] of any float dtype -> (B, 3, size, size) in float32, normalised.

    `fit` says what becomes of pictures that are not square: "crop" resizes the shorter side and cuts out the centre,
    "pad" resizes the longer side and centres the picture on black, "squash" resizes both. With "crop", the shorter side
    becomes size / crop. Everything is torch with antialiasing, so that gradients reach the pixels; unlike Pillow's, the
    result of a resize is not clipped to [0, 1].
    """

    size: int = 224
    fit: Literal["crop", "pad", "squash"] = "crop"
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    crop: float = 1.0

    def __call__(self, images: Tensor) -> Tensor:
        x = self.pixels(images)
        mean, std = (x.new_tensor(list(values)).view(3, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    def pixels(self, images: Tensor) -> Tensor:
        """What is normalised: (B, 3, size, size)."""
        x = images.float()
        if self.fit == "squash":
            return self._resized(x, self.size, self.size)
        if self.fit == "pad":
            return padded(self._resized(x, *_sides(x, self.size, max(x.shape[-2:]))), self.size)
        return centre(self._resized(x, *_sides(x, int(self.size / self.crop), min(x.shape[-2:]))), self.size)

    def _resized(self, x: Tensor, height: int, width: int) -> Tensor:
        if x.shape[-2:] == (height, width):
            return x
        return F.interpolate(x, (height, width), mode=self.interpolation, antialias=True)


def _sides(x: Tensor, size: int, of: int) -> list[int]:
    """Both sides, scaled so that the side `of` becomes `size`; rounded down, as torchvision does."""
    return [max(1, side * size // of) for side in x.shape[-2:]]


def centre(x: Tensor, size: int) -> Tensor:
    """The centre of (B, 3, H, W), (B, 3, size, size)."""
    top, left = (round((side - size) / 2) for side in x.shape[-2:])
    return x[..., top : top + size, left : left + size]


def padded(x: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in the middle of black, (B, 3, size, size)."""
    height, width = (size - side for side in x.shape[-2:])
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
