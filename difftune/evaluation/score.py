"""Rewards of image files."""

from collections.abc import Sequence
from typing import Any

import torch

from difftune.errors import UserError
from difftune.files.pictures import read_picture
from difftune.lookup import reward_named, reward_weights
from rewards.registry import entry


def score_files(reward: Sequence[str], prompts: Sequence[str], images: Sequence[str]) -> list[dict[str, Any]]:
    """`difftune score`: {"image", "prompt", "rewards": {name: score}, "total"} of every file.

    One prompt serves all images; more must be one per image. Raises UserError, before anything is scored, for a missing
    prompt and for a file that is not an image.
    """
    weights = reward_weights(reward)
    texts = _one_each(prompts, images, [name for name in weights if entry(name).needs_prompt])
    pictures = [read_picture(path) for path in images]
    judge = reward_named(weights, gradient=False)
    found = []
    for path, text, picture in zip(images, texts, pictures, strict=True):
        with torch.no_grad():
            parts = judge.parts(picture[None], [text])
        total = float(judge.total(parts))
        found.append(
            {"image": path, "prompt": text, "rewards": {n: float(s) for n, s in parts.items()}, "total": total}
        )
    return found


def _one_each(prompts: Sequence[str], images: Sequence[str], needing: Sequence[str]) -> Sequence[str]:
    if needing and not prompts:
        raise UserError(f"reward {needing[0]!r} needs a prompt: give --prompt once, or once per image")
    if needing and not all(prompt.strip() for prompt in prompts):
        raise UserError(f"reward {needing[0]!r} needs a prompt, and one is empty: say what the picture is to show")
    if len(prompts) not in (0, 1, len(images)):
        raise UserError(f"{len(prompts)} prompts for {len(images)} images: give --prompt once, or once per image")
    return prompts if len(prompts) == len(images) else [*prompts, ""][:1] * len(images)
