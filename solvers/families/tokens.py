"""Latents as tokens: the 2x2 patches that FLUX and Qwen read."""

from torch import Tensor


def packed(x: Tensor) -> Tensor:
    """(B, C, h, w) as tokens (B, h w / 4, 4 C), one for every 2x2 patch."""
    batch, channels, rows, columns = x.shape
    patches = x.reshape(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows * columns // 4, 4 * channels)


def unpacked(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """`packed` undone: tokens of a grid of (rows, columns) patches as (B, C, 2 rows, 2 columns)."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, *grid, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, 2 * grid[0], 2 * grid[1])
