"""The training scenes, drawn as they are needed: a thousand a shard, and a window of shards that moves on."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from rewards.world import draw, grammar
from rewards.world.render import Scene, render
from scripts.tiny import vae, words
from scripts.tiny.fit import Setup, save

SHARD = 1_000  # scenes
STEPS_PER_SHARD = 40  # after so many batches of 64 a new shard enters the window
WINDOW = 24  # shards
SHARES = {
    "one_object": 0.16,
    "two_objects": 0.12,
    "counting": 0.09,
    "colors": 0.07,
    "position": 0.15,
    "attribute_binding": 0.11,
    "three_objects": 0.09,
    "larger_counts": 0.07,
    "bound_sizes": 0.07,
    "mixed_counts": 0.07,
}


class Drawn(NamedTuple):
    """One shard: captions, their scenes, and the pictures (N, 3, 64, 64) uint8."""

    captions: list[grammar.Caption]
    scenes: list[Scene]
    images: Tensor


@lru_cache(maxsize=WINDOW + 2)
def drawn(seed: int, number: int, count: int = SHARD) -> Drawn:
    rng = np.random.default_rng([seed, 100, number])
    pairs = [draw.draw(rng, list(SHARES), list(SHARES.values())) for _ in range(count)]
    images = np.stack([(255 * render(scene)).round().astype(np.uint8) for _, scene in pairs])
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Drawn([caption for caption, _ in pairs], [scene for _, scene in pairs], pictures)


def window(setup: Setup, step: int) -> range:
    """The shards that the batches of a step are drawn from: fresh ones enter at the pace of the batches."""
    newest = 4 + step * setup.batch // (64 * STEPS_PER_SHARD)
    return range(max(0, newest - WINDOW), newest)


def pixels(images: Tensor, setup: Setup) -> Tensor:
    """uint8 images to [-1, 1]."""
    return images.to(setup.device).float() / 127.5 - 1


class Latents(NamedTuple):
    """What an image model is trained on."""

    z: Tensor  # (N, 4, 8, 8), of unit variance
    ids: Tensor  # (N, LENGTH)

    def draw(self, count: int, setup: Setup) -> "Latents":
        """A random batch; one caption of ten is empty."""
        chosen = torch.randint(len(self.z), (count,))
        ids = torch.where(torch.rand(count, 1) < 0.1, words.tokens([""]), self.ids[chosen])
        return Latents(self.z[chosen].to(setup.device), ids.to(setup.device))


def latents(setup: Setup, step: int) -> Latents:
    """The window's latents and tokens."""
    return _pool(setup, window(setup, step))


@lru_cache(maxsize=1)
def _pool(setup: Setup, shards: range) -> Latents:
    parts = [_encoded(setup, number) for number in shards]
    return Latents(*(torch.cat(values) for values in zip(*parts, strict=True)))


@lru_cache(maxsize=WINDOW + 2)
def _encoded(setup: Setup, number: int) -> Latents:
    file = setup.file(f"latents/{number}.safetensors")
    if not file.exists():
        encoder, scale = vae.encoder(setup)
        shard = drawn(setup.seed, number)
        parts = [encoder(pixels(part, setup)).cpu() for part in shard.images.split(250)]
        save({"z": torch.cat(parts) * scale, "ids": words.tokens([str(c) for c in shard.captions])}, file)
    found = load_file(file)
    return Latents(found["z"], found["ids"])
