"""Groups: the images of a prompt, whose rewards are compared with each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from difftune.rollouts.session import Session
from difftune.training.state import Metrics
from difftune.training.steps import statistics
from rewards.compose import WeightedSum
from rewards.registry import Reward


@dataclass(frozen=True)
class Parted:
    """A reward that keeps what each of its members gave in every call."""

    reward: Reward
    calls: list[Tensor] = field(default_factory=list)  # (B, K) each

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    @property
    def weights(self) -> list[float]:
        """The weights of the members, in the order of `calls`."""
        return list(self.reward.weights.values()) if isinstance(self.reward, WeightedSum) else [1.0]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if not isinstance(self.reward, WeightedSum):
            scores = self.reward(images, prompts)
            self.calls.append(scores.detach()[:, None])
            return scores
        parts = self.reward.parts(images, prompts)
        self.calls.append(torch.stack([parts[name].detach() for name in self.reward.weights], 1))
        return self.reward.total(parts)


def part_rewards(session: Session[Any]) -> tuple[Session[Any], Parted]:
    """The session with its reward taken apart, for `judge_groups`."""
    parted = Parted(session.reward)
    return replace(session, judge=parted), parted


def judge_groups(
    session: Session[Any], numbers: Sequence[range], scores: Sequence[Tensor], parted: Parted
) -> tuple[Sequence[Tensor], Metrics]:
    """The advantages (B,) of this process's batches, by the scores of all processes, and what is reported of them.

    numbers, scores (B,): of each batch, as are the calls of `parted`. A group is its numbers, whichever process
    made them.
    """
    config, run = session.config, session.run
    group, everyone = config.num_images_per_prompt, run.accelerator.gather(torch.cat(list(scores)))
    own = torch.tensor([number for part in numbers for number in part], device=everyone.device)
    order = run.accelerator.gather(own).argsort()
    found = torch.empty_like(everyone)
    if config.reward_scaling == "group":
        parts = run.accelerator.gather(torch.cat(parted.calls))
        found[order] = scaled_advantages(parts[order], parted.weights, group, config.adv_clip_max).to(found)
    else:
        found[order] = group_advantages(everyone[order], group, config.advantage_std, config.adv_clip_max)
    metrics = {**statistics(everyone), **group_statistics(everyone[order], group)}
    return found.view(run.world, len(numbers), -1)[run.rank].unbind(), metrics


def group_advantages(scores: Tensor, group: int, deviation: str = "residual", limit: float = 5.0) -> Tensor:
    """A (N,) of scores (N,), of which every `group` in a row are of one prompt: (r - mean of the prompt) / deviation,
    kept within [-limit, limit]. Where all scores of a prompt are equal, its A are 0.

    deviation: "group", of the prompt's own scores; "raw", of all scores; "residual", of all scores minus
    their prompts' means. All are the population's; 1e-4 is added to the first two, as in Flow-GRPO's code.
    """
    groups = scores.double().view(-1, group)
    alike = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    gaps = (groups - groups.mean(1, keepdim=True)).masked_fill(alike, 0.0)
    divisor = {
        "group": groups.std(1, correction=0, keepdim=True) + 1e-4,
        "raw": groups.std(correction=0) + 1e-4,
        "residual": gaps.square().mean().sqrt() + 1e-8,
    }[deviation]
    return (gaps / divisor).clamp(-limit, limit).flatten().to(scores)


def scaled_advantages(parts: Tensor, weights: Sequence[float], group: int, limit: float = 5.0) -> Tensor:
    """A (N,) of several rewards' scores (N, K), each scaled in its group before they are summed (GDPO,
    https://arxiv.org/abs/2601.05242):

        A = sum over k of w_k (r_k - mean of the prompt) / deviation of the prompt,

    brought to mean 0 and deviation 1 over all prompts, and kept within [-limit, limit]. No reward's scale counts, and
    one that is the same for all images of a prompt says nothing there.
    """
    groups = parts.double().view(-1, group, parts.shape[1])
    alike = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    gaps = (groups - groups.mean(1, keepdim=True)).masked_fill(alike, 0.0)
    scaled = gaps / groups.std(1, correction=0, keepdim=True).clamp(min=1e-6)
    total = (scaled * scaled.new_tensor(weights)).sum(2).flatten()
    return ((total - total.mean()) / total.std(correction=0).clamp(min=1e-6)).clamp(-limit, limit)


def group_statistics(scores: Tensor, group: int) -> Metrics:
    """The mean deviation within a prompt, and the share of prompts whose scores are all equal: they teach nothing."""
    groups = scores.double().view(-1, group)
    dead = groups.amax(1) == groups.amin(1)
    return {"group_std": groups.std(1, correction=0).mean().item(), "dead_groups": dead.double().mean().item()}
