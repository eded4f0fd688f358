"""A reward that is smoothed: its mean over changes of the picture that its judge should not mind."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import isfinite, nan
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewards.checks import paired
from rewards.errors import RewardError
from rewards.registry import Reward, load

SIDED = re.compile(r"\b(left|right)\b|[\"“”]", re.IGNORECASE)  # a prompt that a mirror image does not fulfil


class View(NamedTuple):
    """One change of a picture."""

    down: int  # pixels
    right: int
    mirrored: bool
    seed: int  # of the noise


def smooth(
    reward: str | Reward,
    shifts: int = 4,
    pixels: int = 3,
    noise: float = 0.0,
    flips: bool = False,
    seed: int | None = 0,
) -> "Smoothed":
    """The reward, by name (with options in brackets) or itself, smoothed: see `Smoothed`."""
    return Smoothed(load(reward) if isinstance(reward, str) else reward, shifts, pixels, noise, flips, seed)


@dataclass(frozen=True)
class Smoothed:
    """r'(x, c) = mean_i r(T_i(x), c) over `shifts` views T_i(x) of the picture; its gradient is the mean of theirs.

    A view is the picture shifted by whole pixels, at most `pixels` of the picture down, up, left and right (the edge is
    repeated), plus Gaussian noise of deviation `noise` (clipped to [0, 1]). With `flips` every other view is the mirror
    image, except for prompts with the words left or right or with quoted text. Shifts differ until each was taken once.
    A gradient that is found in the grid of a judge's patches alone averages out; `shifts=1, pixels=0` is the reward.

    seed: draws the views once, the same for every picture and call, so that scores repeat. None draws others in every
    call from torch's global generator: scores then vary, and a gradient that is followed meets all views in time.

    Raises ValueError, in one sentence, for invalid settings, for views that would be the same, and for a picture
    that is not larger than the shifts.
    """

    reward: Reward
    shifts: int = 4
    pixels: int = 3
    noise: float = 0.0
    flips: bool = False
    seed: int | None = 0

    def __post_init__(self) -> None:
        _whole("shifts", self.shifts, 1)
        _whole("pixels", self.pixels, 0)
        if self.seed is not None:
            _whole("seed", self.seed, 0)
        if type(self.noise) not in (int, float) or not (self.noise >= 0 and isfinite(self.noise)):
            raise RewardError(f"noise of a smoothed reward is a deviation of 0 or more, not {self.noise!r}")
        if not isinstance(self.flips, bool):
            raise RewardError(f"flips of a smoothed reward is True or False, not {self.flips!r}")
        different = (2 * self.pixels + 1) ** 2 * (2 if self.flips else 1)
        if self.shifts > different and not self.noise:
            raise RewardError(
                f"{self.shifts} shifts of at most {self.pixels} pixels are only {different} different views: "
                "give more pixels, fewer shifts, or noise"
            )

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        if self.pixels >= min(images.shape[2:]):
            width = f"{images.shape[3]} x {images.shape[2]}"
            raise RewardError(f"a shift of {self.pixels} pixels leaves nothing of a picture of {width}: give fewer")
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        unsided = torch.tensor([not SIDED.search(prompt) for prompt in prompts], device=images.device)
        scores = [self.reward(self.viewed(images, view, unsided), prompts) for view in self.views()]
        whole = images.detach().isfinite().flatten(1).all(1)  # a shift may leave the pixel out that is not
        return torch.where(whole, torch.stack(scores).mean(dim=0), nan)

    def views(self) -> list[View]:
        """The views of one call."""
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        draw, steps = Random(seed), range(-self.pixels, self.pixels + 1)
        offsets = draw.sample(list(product(steps, steps)), len(steps) ** 2)
        flipped = [self.flips and i % 2 == 1 for i in range(self.shifts)]  # offsets are odd in number: none is left out
        return [View(*offsets[i % len(offsets)], mirrored, draw.getrandbits(62)) for i, mirrored in enumerate(flipped)]

    def viewed(self, images: Tensor, view: View, unsided: Tensor) -> Tensor:
        """The view of images (B, 3, H, W); those that are `unsided` (B,) may be mirrored."""
        if view.mirrored:
            images = torch.where(unsided[:, None, None, None], images.flip(3), images)
        images = _shifted(_shifted(images, view.down, 2), view.right, 3)
        if not self.noise:
            return images
        generator = torch.Generator().manual_seed(view.seed)
        noise = torch.randn(images.shape[1:], generator=generator).to(images)
        return (images + self.noise * noise).clamp(0, 1)


def fetch_smoothed(reward: str | Reward, **_: Any) -> list[Path]:
    """What the reward that is smoothed downloads."""
    from rewards.hub import prefetch

    return prefetch(reward) if isinstance(reward, str) else []


def _shifted(images: Tensor, by: int, dim: int) -> Tensor:
    """Moved by so many pixels along a dimension; the edge is repeated."""
    size = images.shape[dim]
    return (
        images.index_select(dim, (torch.arange(size, device=images.device) - by).clamp(0, size - 1)) if by else images
    )


def _whole(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise RewardError(f"{name} of a smoothed reward is a whole number of {least} or more, not {value!r}")
