"""The picture that a reward compares with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from rewards.errors import RewardError, WeightsMissing

Picture = str | Path | Tensor  # a file, or (3, H, W) in [0, 1]


class Reference:
    """One picture for all prompts, or one for each; resized (antialiased bicubic) to the size of what is compared."""

    def __init__(self, pictures: Picture | Mapping[str, Picture]):
        self.one: Tensor | None = None
        self.pictures: dict[str, Tensor] | None = None
        if isinstance(pictures, Mapping):
            self.pictures = {prompt: opened(picture) for prompt, picture in pictures.items()}
        else:
            self.one = opened(pictures)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The reference (B, 3, H, W) of each image (B, 3, H, W), in float32, without a gradient."""
        return torch.cat([self.sized(prompt, images) for prompt in prompts])

    def sized(self, prompt: str, images: Tensor) -> Tensor:
        picture = self.one if self.pictures is None else self.pictures.get(prompt)
        if picture is None:
            raise RewardError(f"there is no reference picture of the prompt {prompt!r}: give one for every prompt")
        x, size = picture[None].to(images.device), images.shape[-2:]
        return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)


def opened(picture: Picture) -> Tensor:
    """(3, H, W) in [0, 1], float32. WeightsMissing for a file that is not a picture."""
    if isinstance(picture, Tensor):
        return picture.detach().float()
    try:
        with Image.open(picture) as image:
            return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise WeightsMissing(f"cannot read the reference picture {str(picture)!r}: {error}") from error
