"""Size of a picture as JPEG (DDPO's compressibility, https://arxiv.org/abs/2305.13301)."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from rewards.checks import eight_bit, nan_unless_finite, paired, seen
from rewards.errors import RewardError


@dataclass(frozen=True)
class JPEG:
    """Size in kB (1000 bytes) of the picture in Pillow's JPEG encoding. Larger is higher: for compressible pictures
    give it a negative weight. Sizes depend on the version of libjpeg, so compare them on one machine."""

    quality: int = 95
    differentiable = False

    def __post_init__(self) -> None:
        quantised(LUMA, self.quality)

    @nan_unless_finite
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pictures = eight_bit(images).permute(0, 2, 3, 1).cpu().numpy()
        sizes = [self._kilobytes(Image.fromarray(picture)) for picture in pictures]
        return torch.tensor(sizes, dtype=torch.float32, device=images.device)

    def _kilobytes(self, picture: Image.Image) -> float:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=self.quality)
        return file.tell() / 1000


LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, *[99] * 38,
)  # fmt: skip
HEADER = 623  # bytes of a file of Pillow's without its coefficients


@dataclass(frozen=True)
class JPEGProxy:
    """A differentiable estimate of the size in kB as JPEG: the bits of the quantised coefficients.

    Like the encoder: luma and halved chroma (4:2:0), the DCT of blocks of 8 x 8, c, divided by the standard tables of
    `quality`, q. Then bits = `bits_per_log2` sum log2(1 + (c / q)^2) / 2, which has a gradient where rounding has none,
    and kB = (header + bits / 8) / 1000.
    """

    quality: int = 95
    bits_per_log2: float = 3.0
    differentiable = True

    def __post_init__(self) -> None:
        quantised(LUMA, self.quality)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        luma, chroma = ycc(seen(images))
        bits = self._bits(luma, LUMA) + self._bits(F.avg_pool2d(chroma, 2), CHROMA)
        return (HEADER + self.bits_per_log2 * bits / 8) / 1000

    def _bits(self, planes: Tensor, table: Sequence[int]) -> Tensor:
        """sum log2(1 + (c / q)^2) / 2, (B, C, H, W) -> (B,)."""
        quantum = planes.new_tensor(quantised(table, self.quality)).view(8, 8)
        return (torch.log2(1 + (dct_blocks(planes) / quantum) ** 2) / 2).flatten(1).sum(dim=1)


def quantised(table: Sequence[int], quality: int) -> list[int]:
    """The standard table at a quality from 1 to 100, as libjpeg scales it. Raises ValueError for another."""
    if not 1 <= quality <= 100:
        raise RewardError(f"the quality of a JPEG is 1 to 100, not {quality}")
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return [min(max((entry * scale + 50) // 100, 1), 255) for entry in table]


def ycc(images: Tensor) -> tuple[Tensor, Tensor]:
    """JFIF's luma (B, 1, H', W') and chroma (B, 2, H', W'), 0 in the middle, edges repeated to multiples of 16."""
    height, width = images.shape[-2:]
    red, green, blue = (255 * F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")).split(1, dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return luma - 128, torch.cat([(blue - luma) / 1.772, (red - luma) / 1.402], dim=1)


def dct_blocks(planes: Tensor) -> Tensor:
    """The orthonormal DCT-II of every block of 8 x 8, (B, C, H, W) -> (B, C, H / 8, W / 8, 8, 8)."""
    blocks = planes.unfold(2, 8, 8).unfold(3, 8, 8)
    k, n = torch.arange(8.0, device=planes.device).view(8, 1), torch.arange(8.0, device=planes.device)
    basis = torch.cos(torch.pi * k * (2 * n + 1) / 16) / 2
    basis[0] /= 2**0.5
    return basis @ blocks @ basis.T
