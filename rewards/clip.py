"""Cosine similarity of pictures and captions, by any open_clip model that lies in a folder."""

from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.checks import paired

TINY = Path(__file__).parent / "weights" / "tiny-clip"


class CLIPScore:
    """cos(f(image), g(prompt)) in [-1, 1], without the logit scale (https://arxiv.org/abs/2104.08718).

    `folder` holds an open_clip model in its own format (`open_clip_config.json`, `open_clip_model.safetensors`, the
    tokenizer's files). The preprocessing is differentiable, the weights are frozen, and the model moves to the device
    of the images. Raises FileNotFoundError if there is no model, ValueError for a preprocessing it does not know.
    """

    differentiable = True

    def __init__(self, folder: str | Path):
        if not (Path(folder) / "open_clip_config.json").is_file():
            raise FileNotFoundError(f"no open_clip model in {folder}: it has no open_clip_config.json")
        name = f"local-dir:{folder}"
        self.model = open_clip.create_model(name).eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.preprocess = self.model.visual.preprocess_cfg
        for key, known in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
            if self.preprocess[key] != known:
                raise ValueError(f"{folder}: {key} {self.preprocess[key]!r} is not supported, only {known!r}")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        return (self.image_features(images) * self.text_features(prompts, images.device)).sum(dim=1)

    def image_features(self, images: Tensor) -> Tensor:
        """Of unit length, (B, 3, H, W) in [0, 1] -> (B, D)."""
        self.model.to(images.device)
        size = self.preprocess["size"]
        x = shortest_side(images.float(), size if isinstance(size, int) else size[0])
        mean, std = (x.new_tensor(self.preprocess[key]).view(3, 1, 1) for key in ("mean", "std"))
        return self.model.encode_image((x - mean) / std, normalize=True)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Of unit length, (B, D)."""
        return self.model.to(device).encode_text(self.tokenizer(list(prompts)).to(device), normalize=True)


def shortest_side(images: Tensor, size: int) -> Tensor:
    """The shorter side resized to `size` (antialiased bicubic), then the centre cut out: (B, 3, H, W) -> (B, 3, s, s).

    A picture of that size is left as it is. Unlike Pillow's, the result of a resize is not clipped to [0, 1].
    """
    height, width = images.shape[-2:]
    if min(height, width) != size:
        shape = [side * size // min(height, width) for side in (height, width)]  # rounded down, as torchvision does
        images = F.interpolate(images, shape, mode="bicubic", antialias=True)
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def tiny_clip(folder: str | Path = TINY) -> CLIPScore:
    """The CLIP of the world of shapes that comes with the package (`scripts/train_tiny.py` trains it)."""
    return CLIPScore(folder)
