"""A reward of pictures as one of films: its mean over some of their frames."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.errors import RewardError
from rewards.registry import Reward


@dataclass(frozen=True)
class OverFrames:
    """r'(x, c) = mean_i r(x_i, c) over `frames` evenly spaced frames of a film x (B, 3, F, H, W), both ends among them,
    or over all if there are fewer; its gradient is the mean of theirs. Of pictures (B, 3, H, W) it is the reward.

    Raises ValueError unless `frames` is 1 or more; with 1 it is the first frame's.
    """

    reward: Reward
    frames: int = 4

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise RewardError(f"frames is {self.frames}: give the frames that are scored, 1 or more")

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if images.ndim == 4:
            return self.reward(images, prompts)
        count = min(self.frames, images.shape[2])
        chosen = torch.linspace(0, images.shape[2] - 1, count).round().long().tolist()
        pictures = images[:, :, chosen].movedim(2, 1).flatten(0, 1)
        return self.reward(pictures, [prompt for prompt in prompts for _ in chosen]).view(-1, count).mean(1)
