"""A reward in parts of a batch, for models that are larger than the memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rewards.checks import paired
from rewards.errors import RewardError
from rewards.registry import Reward


@dataclass(frozen=True)
class Batched:
    """`reward`, on `batch_size` images or films at a time (None: all), recomputed in the backward pass if asked for.

    Checkpointing keeps no activation of the forward pass: the peak is the graph of one part. Raises ValueError for a
    batch size under 1.
    """

    reward: Reward
    batch_size: int | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.batch_size is not None and not (isinstance(self.batch_size, int) and self.batch_size >= 1):
            raise RewardError(f"the batch size of a reward is at least 1, not {self.batch_size!r}")

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images[:, :, 0] if images.ndim == 5 else images, prompts)  # the films of `OverFrames`
        size = self.batch_size or len(images)
        parts = enumerate(images.split(size))  # not images[i : i + size], whose backward pass fills a batch for each
        return torch.cat([self._part(part, prompts[i * size : (i + 1) * size]) for i, part in parts])

    def _part(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.gradient_checkpointing and images.requires_grad and torch.is_grad_enabled():
            return checkpoint(self.reward, images, prompts, use_reentrant=False)
        return self.reward(images, prompts)
