"""The checks of a reward's arguments, and the forms in which rewards see pictures."""

import io
from collections.abc import Callable, Sequence
from functools import wraps
from math import isfinite, nan
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.errors import NotFinite, RewardError
from rewards.registry import unknown

Score = Callable[[Any, Tensor, Sequence[str]], Tensor]  # the __call__ of a reward

OVERSHOOT = 0.25  # how far pixels may lie beyond black and white, as a decoder's do
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def paired(images: Tensor, prompts: Sequence[str]) -> None:
    """Raises ValueError unless images are floats (B, 3, H, W) in [0, 1], up to `OVERSHOOT`, with B prompts."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise RewardError(f"images are (B, 3, H, W) in [0, 1], not {tuple(images.shape)}")
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise RewardError(f"{len(images)} images need a list of {len(images)} prompts, not {prompts!r}")
    if not images.is_floating_point():
        raise RewardError(f"images are floats in [0, 1], not {images.dtype}: divide pixels of 8 bits by 255")
    low, high = (float(x) for x in images.detach().aminmax()) if images.numel() else (0.0, 1.0)
    if isfinite(low) and isfinite(high) and not -OVERSHOOT <= low <= high <= 1 + OVERSHOOT:
        raise RewardError(f"images are in [0, 1], not from {low:.3g} to {high:.3g}: (x + 1) / 2 brings [-1, 1] there")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a network by its name. Raises ValueError for another than those of `DTYPES`."""
    if name not in DTYPES:
        raise RewardError(unknown("dtype of a network", name, DTYPES))
    return DTYPES[name]


def finite(values: Tensor, what: str) -> Tensor:
    """`values` (B, ...), unless a row holds a NaN or an infinity: then a NotFinite that names `what` and the rows."""
    bad = ~values.detach().isfinite().flatten(1).all(1) if values.ndim > 1 else ~values.detach().isfinite()
    if bad.any():
        rows = ", ".join(map(str, bad.nonzero().flatten().tolist()))
        raise NotFinite(f"{what} is not finite at index {rows} of the batch")
    return values


def checked(scores: Tensor, name: str, prompts: Sequence[str] | None = None) -> Tensor:
    """`scores` (B,), unless one is not finite: then a NotFinite that names the reward, the indices and the prompts."""
    bad = (~scores.detach().isfinite()).nonzero().flatten().tolist()
    if bad:
        of = ", ".join(f"{i} ({prompts[i]!r})" if prompts is not None else str(i) for i in bad)
        raise NotFinite(f"reward {name!r} is not finite for prompt {of}; no step was taken with it")
    return scores


def seen(images: Tensor) -> Tensor:
    """Pixels in float32, within [0, 1] as a screen shows them; NaN where they are not finite, so that the score is."""
    x = images.float()
    return torch.where(x.isfinite(), x.clamp(0, 1), nan)


def nan_unless_finite(score: Score) -> Score:
    """The `__call__` of a reward without a gradient, which is then not asked about a picture with a NaN or an infinity:
    its score is NaN, and the other pictures of the batch have theirs."""

    @wraps(score)
    def scored(self: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        whole = images.detach().isfinite().flatten(1).all(1)
        if whole.all():
            return score(self, images, prompts)
        scores = torch.full((len(images),), nan, device=images.device)
        if whole.any():
            scores[whole] = score(self, images[whole], [prompts[i] for i in whole.nonzero().flatten().tolist()])
        return scores

    return scored


def eight_bit(images: Tensor) -> Tensor:
    """The pictures as a file would hold them: (B, 3, H, W) in [0, 1] -> uint8, rounded, detached."""
    return (finite(images.detach(), "a picture").float().clamp(0, 1) * 255).round().to(torch.uint8)


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
