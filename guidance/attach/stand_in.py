"""The answers that stand in for a network's until the scheduler's step, and the guidance scale that they show.

A pipeline combines whatever its network answers by its own CFG. Known answers in place of the network's come out as a
multiple that tells the scale; the scheduler's step then throws them away.
"""

import functools

import torch
from torch import Tensor


def stand_in(sample: Tensor, unconditional: range) -> Tensor:
    """A denoiser's answer, like `sample`, from which `scale_in` can tell what the pipeline does with it: along the last
    dimension (0, 1, 0, ...) in the `unconditional` rows, and (1, 0, 0, ...) in the others."""
    rows = _marks(sample.shape[-1], unconditional, len(sample), sample.dtype, sample.device)
    return rows.view(-1, *[1] * (sample.ndim - 2), sample.shape[-1]).repeat(1, *sample.shape[1:-1], 1)


@functools.lru_cache(maxsize=16)  # a pipeline wants the same in every step
def _marks(size: int, unconditional: range, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        places = torch.tensor([row in unconditional for row in range(count)]).long()
        return torch.eye(2, size)[places].to(device, dtype)


def scale_in(model_output: Tensor) -> tuple[float, float]:
    """(s, its round-off) for a multiple of (s, 1 - s, 0, ...): what CFG of scale s makes of `stand_in`."""
    a, b = model_output[(0,) * (model_output.ndim - 1)][:2].tolist()
    scale = a / (a + b) if a + b else float("inf")
    return scale, 4 * torch.finfo(model_output.dtype).eps * (1 + abs(scale)) ** 2
