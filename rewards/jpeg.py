"""Size of a picture as JPEG (DDPO's compressibility, https://arxiv.org/abs/2305.13301)."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from rewards.checks import eight_bit, paired


@dataclass(frozen=True)
class JPEG:
    """Size in kB (1000 bytes) of the picture in Pillow's JPEG encoding. Larger is higher: for compressible pictures
    give it a negative weight. Sizes depend on the version of libjpeg, so compare them on one machine."""

    quality: int = 95
    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        pictures = eight_bit(images).permute(0, 2, 3, 1).cpu().numpy()
        sizes = [self._kilobytes(Image.fromarray(picture)) for picture in pictures]
        return torch.tensor(sizes, dtype=torch.float32, device=images.device)

    def _kilobytes(self, picture: Image.Image) -> float:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=self.quality)
        return file.tell() / 1000
