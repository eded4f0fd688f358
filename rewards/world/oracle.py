"""The exact judge of the world of shapes, as a reward. It is for evaluation: never train on it and report it too."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.checks import eight_bit, nan_unless_finite, paired
from rewards.errors import RewardError
from rewards.world import grammar, reader
from rewards.world.render import RESOLUTION, Scene

SCENE_COVERAGE = 0.9  # of a picture's pixels; with less it is not a scene


@dataclass(frozen=True)
class Oracle:
    """1 if the caption holds of the picture, else 0 (`rewards.world.grammar.holds`).

    The picture is judged as a file would hold it, in 8 bits. Raises ValueError for a caption outside the grammar and
    for pictures that are not square.
    """

    differentiable = False

    @nan_unless_finite
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        captions = [grammar.parse(prompt) for prompt in prompts]
        held = [grammar.holds(c, reader.read(image)) for c, image in zip(captions, _seen(images), strict=True)]
        return torch.tensor(held, device=images.device).float()

    def explain(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        """Why each caption is false of its picture, in one sentence; empty if it holds.

        Where the picture is not a scene at all, the sentence ends in its coverage (see `Coverage`).
        """
        paired(images, prompts)
        captions = [grammar.parse(prompt) for prompt in prompts]
        return [_why(caption, image) for caption, image in zip(captions, _seen(images), strict=True)]


@dataclass(frozen=True)
class Coverage:
    """The share of pixels that the background and the readable objects explain (`rewards.world.reader.explained`).

    1 for a drawn scene; below `SCENE_COVERAGE` the picture is not a scene: colours run or noise remains. Raises
    ValueError for pictures that are not square.
    """

    differentiable = False

    @nan_unless_finite
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([reader.explained(image) for image in _seen(images)], device=images.device).float()


@dataclass(frozen=True)
class ObjectCount:
    """-|objects in the picture - objects that the caption names|, 0 at best; what they are does not matter."""

    differentiable = False

    @nan_unless_finite
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        wanted = [len(grammar.parse(prompt).phrases) for prompt in prompts]
        found = [len(reader.read(image).things) for image in _seen(images)]
        return -(torch.tensor(found) - torch.tensor(wanted)).abs().float().to(images.device)


@dataclass(frozen=True)
class Position:
    """1 if some two objects fit the caption's and stand in its relation, else 0; other objects do not matter.

    Raises ValueError for a caption without a relation.
    """

    differentiable = False

    @nan_unless_finite
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        captions = [_placed(prompt) for prompt in prompts]
        held = [_stands(c, reader.read(image)) for c, image in zip(captions, _seen(images), strict=True)]
        return torch.tensor(held, device=images.device).float()


def _why(caption: grammar.Caption, image: np.ndarray) -> str:
    why = grammar.explain(caption, reader.read(image))
    share = reader.explained(image) if why else 1.0
    if share >= SCENE_COVERAGE:
        return why
    return f"{why}; the picture is not a scene: background and readable objects explain {share:.0%} of it"


def _placed(prompt: str) -> grammar.Caption:
    caption = grammar.parse(prompt)
    if caption.relation is None:
        raise RewardError(f"{prompt!r} places nothing: say where, as in 'a red circle left of a blue square'")
    return caption


def _stands(caption: grammar.Caption, scene: Scene) -> bool:
    first, second = caption.phrases
    pairs = permutations(scene.things, 2)
    return any(first.fits(a) and second.fits(b) and grammar.relation(a, b) == caption.relation for a, b in pairs)


def _seen(images: Tensor) -> list:
    """The pictures as the oracle reads them: (B, 3, H, W) -> B arrays (64, 64, 3)."""
    if images.shape[-1] != images.shape[-2]:
        raise RewardError(f"the oracle reads square pictures, not {images.shape[-2]} x {images.shape[-1]} pixels")
    x = eight_bit(images).float() / 255
    if x.shape[-1] != RESOLUTION:
        x = F.interpolate(x, (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
    return list(x.permute(0, 2, 3, 1).cpu().numpy())
