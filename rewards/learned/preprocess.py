"""The preprocessing of networks: a differentiable resize, then mean and standard deviation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from rewards.errors import RewardError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """(B, 3, H, W) in [0, 1] of any float dtype -> (B, 3, size, size) in float32, normalised.

    `fit` says what becomes of pictures that are not square: "crop" resizes the shorter side and cuts out the centre,
    "pad" resizes the longer side and centres the picture on black, "squash" resizes both. With "crop", the shorter side
    becomes `edge` (None: `size`). Everything is torch with antialiasing, so that gradients reach the pixels; unlike
    Pillow's, the result of a resize is not clipped to [0, 1].
    """

    size: int = 224
    fit: Literal["crop", "pad", "squash"] = "crop"
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    edge: int | None = None

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
            return padded(self._resized(x, *_longer(x, self.size)), self.size)
        return centre(self._resized(x, *_shorter(x, self.edge or self.size)), self.size)

    def _resized(self, x: Tensor, height: int, width: int) -> Tensor:
        if x.shape[-2:] == (height, width):
            return x
        return F.interpolate(x, (height, width), mode=self.interpolation, antialias=True)


def _shorter(x: Tensor, size: int) -> list[int]:
    """Both sides, scaled so that the shorter becomes `size`; rounded down, as torchvision does."""
    short = min(x.shape[-2:])
    return [side * size // short for side in x.shape[-2:]]


def _longer(x: Tensor, size: int) -> list[int]:
    """Both sides, scaled so that the longer becomes `size`; rounded to the nearest, as HPS does."""
    scale = size / max(x.shape[-2:])
    return [max(1, round(side * scale)) for side in x.shape[-2:]]


def centre(x: Tensor, size: int) -> Tensor:
    """The centre of (B, 3, H, W), (B, 3, size, size)."""
    top, left = (round((side - size) / 2) for side in x.shape[-2:])
    return x[..., top : top + size, left : left + size]


def padded(x: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in the middle of black, (B, 3, size, size)."""
    height, width = (size - side for side in x.shape[-2:])
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


RESAMPLE: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
EXPECTED = {  # what an image processor does or does not do, beside the resize and the crop
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": False, "rescale_offset": False,
    "include_top": False, "do_flip_channel_order": False,
}  # fmt: skip


def transformers_preprocess(about: Mapping[str, Any]) -> Preprocess:
    """What an image processor of transformers does to a picture, from its preprocessor_config.json. Raises ValueError
    for others than a square input by a squash or by a resize of the shorter side and a centre crop."""
    for key, expected in EXPECTED.items():
        if about.get(key, expected) not in (expected, None):
            raise RewardError(f"an image processor with {key} {about[key]} is not supported")
    size = about["size"] if isinstance(about["size"], dict) else {"height": about["size"], "width": about["size"]}
    how = RESAMPLE.get(about.get("resample", 2))
    if how is None:
        raise RewardError(f"an image processor with resample {about['resample']} is not supported, only {RESAMPLE}")
    mean, std = about["image_mean"], about["image_std"]
    if "height" in size and size["height"] == size["width"] and not about.get("do_center_crop"):
        return Preprocess(size["height"], "squash", mean, std, how)
    if "shortest_edge" not in size:
        raise RewardError(f"an image processor with size {size} is not supported")
    edge = size["shortest_edge"]
    if "crop_pct" in about:  # ConvNeXt: small inputs are resized to more than they show
        return Preprocess(edge, "crop" if edge < 384 else "squash", mean, std, how, int(edge / about["crop_pct"]))
    cut = about.get("crop_size", {}).get("height", edge) if about.get("do_center_crop") else edge
    return Preprocess(cut, "crop", mean, std, how, edge)
