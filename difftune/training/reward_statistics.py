"""Running statistics of the rewards of each prompt, as DDPO normalises by them (https://arxiv.org/abs/2305.13301)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEAST_STD = 1e-6  # added to a standard deviation that divides


class RewardMoments(NamedTuple):
    """Mean and deviation of one prompt's latest rewards."""

    number: int
    mean: float
    std: float  # with 1 / number


@dataclass(frozen=True)
class PerPrompt:
    """The latest `size` rewards of each of the `prompts` prompts that were met last.

    A prompt with fewer than `least` rewards has no statistics of its own: a batch's serve.
    """

    size: int = 32
    least: int = 16
    prompts: int = 4096
    history: dict[str, list[float]] = field(default_factory=dict)

    def update(self, prompts: Sequence[str], scores: Sequence[float]) -> None:
        """Take a batch of rewards in."""
        for prompt, score in zip(prompts, scores, strict=True):
            latest = [*self.history.pop(prompt, []), score]
            self.history[prompt] = latest[-self.size :]
        while len(self.history) > self.prompts:
            del self.history[next(iter(self.history))]

    def moments(self) -> dict[str, RewardMoments]:
        """The moments of each prompt, in the order in which the prompts were met last."""
        found = {prompt: torch.tensor(scores, dtype=torch.float64) for prompt, scores in self.history.items()}
        return {p: RewardMoments(len(s), s.mean().item(), s.std(correction=0).item()) for p, s in found.items()}

    def advantages(self, prompts: Sequence[str], scores: Tensor) -> Tensor:
        """A_b = (r_b - mean) / (std + 1e-6), (B,), by the prompt's own rewards, or the batch's if they are too few.

        The batch is to be taken in by `update` before, as DDPO does.
        """
        exact = scores.detach().cpu().double()  # their gaps may be small beside them
        batch = (exact.mean().item(), exact.std(correction=0).item())
        known = {p: (m.mean, m.std) for p, m in self.moments().items() if m.number >= self.least}
        means, stds = exact.new_tensor([known.get(p, batch) for p in prompts]).unbind(1)
        return ((exact - means) / (stds + LEAST_STD)).to(scores)

    def state(self) -> dict[str, list[float]]:
        """The history as JSON holds it."""
        return {prompt: list(scores) for prompt, scores in self.history.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self.history.clear()
        self.history.update({prompt: list(scores) for prompt, scores in state.items()})
