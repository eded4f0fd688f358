"""What pipelines do to their guided prediction before the scheduler's step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers.families.tokens import packed, unpacked


@dataclass(frozen=True)
class After:
    """What a pipeline does to its guided prediction before the scheduler's step, when it evaluated several branches."""

    name: str
    active: Callable[[Any, int, Tensor], bool]  # (pipe, extra calls of the denoiser in this step, `stand_in` guided)
    apply: Callable[[Any, Tensor, Tensor, Sequence[Tensor]], Tensor]  # (pipe, guided, cond, answers to the extra calls)
    remedy: str  # how to call the pipeline without it, or what else to do
    always: Callable[[Tensor, Tensor], Tensor] | None = None  # (guided, cond), where no setting of a call changes it


def rescaled(out: Tensor, cond: Tensor, phi: float | Tensor) -> Tensor:
    """phi * out * std(cond) / std(out) + (1 - phi) * out (https://arxiv.org/abs/2305.08891), as diffusers rounds it."""
    axes = list(range(1, out.ndim))
    matched = out * (cond.std(dim=axes, keepdim=True) / out.std(dim=axes, keepdim=True))
    return phi * matched + (1 - phi) * out


def norm_matched(out: Tensor, cond: Tensor) -> Tensor:
    """(B, C, h, w) whose tokens have the norms of those of `cond`, 0 / 0 included, as in the pipeline."""
    tokens, like = packed(out), packed(cond)
    matched = tokens * (torch.norm(like, dim=-1, keepdim=True) / torch.norm(tokens, dim=-1, keepdim=True))
    return unpacked(matched, (out.shape[-2] // 2, out.shape[-1] // 2))


def row_norm_matched(out: Tensor, cond: Tensor) -> Tensor:
    """(..., w) whose rows have the norms of those of `cond`."""
    return out * (torch.norm(cond, dim=-1, keepdim=True) / torch.norm(out, dim=-1, keepdim=True))


def marks_were_normed(marks: Tensor) -> bool:
    """Whether a pipeline gave its guided rows the norms of the conditional ones: those of (w, 1 - w, 0, ...), which CFG
    makes of marks of norm 1 (`stand_in`)."""
    row = marks[(0,) * (marks.ndim - 1)].double()
    scale = row[0] / row[:2].sum()
    return bool(row.norm() < (1 + torch.hypot(scale, 1 - scale)) / 2)


def norm_limited(out: Tensor, cond: Tensor, limit: float) -> Tensor:
    """(B, ...), each sample shrunk to `limit` times the norm of `cond` if it is longer."""
    norms, most = (torch.stack([torch.linalg.vector_norm(each) for each in batch]) for batch in (out, cond))
    most = (most * limit).view(-1, *[1] * (out.ndim - 1))
    norms = norms.view_as(most)
    return torch.where(norms > most, out * (most / norms), out)


RESCALE = After(
    "guidance_rescale",
    lambda pipe, extra, marks: vars(pipe).get("_guidance_rescale", 0.0) > 0,  # img2img and inpaint have none
    lambda pipe, out, cond, extra: rescaled(out, cond, pipe.guidance_rescale),
    "call the pipeline with guidance_rescale=0",
)


SKIP_LAYERS = After(
    "skip_guidance_layers",
    lambda pipe, extra, marks: extra > 0,
    lambda pipe, out, cond, extra: out + (cond - extra[0]) * pipe._skip_layer_guidance_scale,
    "call the pipeline without skip_guidance_layers",
)


NORM = After(
    "rule that gives each token the norm of the conditional prediction",
    lambda pipe, extra, marks: True,
    lambda pipe, out, cond, extra: norm_matched(out, cond),
    "it cannot be switched off; use another method",
    always=norm_matched,
)


LIMITED_NORM = After(
    "cfg_normalization",
    lambda pipe, extra, marks: bool(pipe._cfg_normalization),
    lambda pipe, out, cond, extra: norm_limited(out, cond, float(pipe._cfg_normalization)),
    "call the pipeline with cfg_normalization=False",
)


ROW_NORM = After(
    "cfg_normalization",
    lambda pipe, extra, marks: marks_were_normed(marks),  # a setting of the call, which the pipeline keeps to itself
    lambda pipe, out, cond, extra: row_norm_matched(out, cond),
    "call the pipeline with cfg_normalization=False",
)
