"""Groups: the images of a prompt, whose rewards are compared with each other."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difftune.rollouts.session import Session
from difftune.training.state import Metrics
from difftune.training.steps import statistics


def judge_groups(
    session: Session[Any], numbers: Sequence[range], scores: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Metrics]:
    """The advantages (B,) of this process's batches, by the scores of all processes, and what is reported of them.

    numbers, scores (B,): of each batch. A group is its samples' numbers, whichever process made them.
    """
    config, run = session.config, session.run
    group, everyone = config.num_images_per_prompt, run.accelerator.gather(torch.cat(list(scores)))
    own = torch.tensor([number for part in numbers for number in part], device=everyone.device)
    order = run.accelerator.gather(own).argsort()
    found = torch.empty_like(everyone)
    found[order] = group_advantages(everyone[order], group, config.advantage_std, config.adv_clip_max)
    metrics = {**statistics(everyone), **group_statistics(everyone[order], group)}
    return found.view(run.world, len(numbers), -1)[run.rank].unbind(), metrics


def group_advantages(scores: Tensor, group: int, deviation: str = "residual", limit: float = 5.0) -> Tensor:
    """A (N,) of scores (N,), of which every `group` in a row are of one prompt: (r - mean of the prompt) / deviation,
    kept within [-limit, limit]. Where all scores of a prompt are equal, its A are 0.

    deviation: "group", of the prompt's own scores; "raw", of all scores; "residual", of what all scores have left
    without their prompts' means. All are the population's; 1e-4 is added to the first two, as in Flow-GRPO's code.
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


def group_statistics(scores: Tensor, group: int) -> Metrics:
    """The mean deviation within a prompt, and the share of prompts whose scores are all equal: they teach nothing."""
    groups = scores.double().view(-1, group)
    dead = groups.amax(1) == groups.amin(1)
    return {"group_std": groups.std(1, correction=0).mean().item(), "dead_groups": dead.double().mean().item()}
