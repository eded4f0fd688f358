"""Recomputing parts of a forward pass on the way back, in place of keeping their graphs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from solvers.errors import UserError

WRONG = {  # networks whose recomputed blocks give other gradients
    "ChromaTransformer2DModel": "drops the mask of its text where blocks are recomputed, in diffusers",
}


@contextmanager
def block_checkpointing(*models: Any) -> Iterator[None]:
    """Within, each block of these diffusers models keeps only its input and is recomputed on the way back.

    The gradients are the same bits. The backward pass must run within, too: a checkpointed call that is recomputed
    without it saves other tensors than it did, which torch refuses. Raises ValueError for a model without such blocks.
    """
    for model in models:
        if not has_blocks(model):
            name = type(model).__name__
            why = WRONG.get(name, "has no blocks that can be recomputed")
            raise UserError(f"{name} {why}: leave block checkpointing off")
    before = [(module, dict(vars(module))) for model in models for module in _blocks(model)]
    try:
        for model in models:
            model.enable_gradient_checkpointing()
        yield
    finally:
        for module, own in before:
            module.gradient_checkpointing = own["gradient_checkpointing"]
            module._gradient_checkpointing_func = own.get("_gradient_checkpointing_func")


def has_blocks(model: Any) -> bool:
    """Whether `block_checkpointing` works on a diffusers model."""
    return bool(model._supports_gradient_checkpointing and _blocks(model) and type(model).__name__ not in WRONG)


def _blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "gradient_checkpointing" in vars(module)]


def apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, recomputed on the way back: of several rewards, one graph at a time is there."""
    return lambda *args: recompute(function, *args, use_reentrant=False)
