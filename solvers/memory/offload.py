"""Latents that wait for the backward pass in the host's memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.autograd.graph import save_on_cpu

from solvers.errors import UserError


@contextmanager
def offloaded(device: torch.device | str, gradient: str = "checkpoint") -> Iterator[str]:
    """Around a rollout: the latents that it keeps for the backward pass wait in the host's memory, not the device's.

    Yields a sentence that says what is done; on a CPU it is nothing, as the latents are there already. Raises
    ValueError as `check_offload` does.
    """
    check_offload(gradient)
    with nullcontext() if _on_host(device) else save_on_cpu(pin_memory=torch.device(device).type == "cuda"):
        yield offload_line(device)


def check_offload(gradient: str) -> None:
    """ValueError for "full", which keeps whole graphs, and for the sweeps that hold their states where autograd does
    not see them."""
    if gradient.partition(":")[0] in ("revolve", "lean") or gradient == "adjoint:exact_endpoint":
        raise UserError(f"gradient mode {gradient!r} holds its states on the device: offload with 'checkpoint'")
    if gradient.partition(":")[0] == "full":
        raise UserError("gradient mode 'full' keeps whole graphs, not latents: offload with 'checkpoint'")


def offload_line(device: torch.device | str) -> str:
    """A line on what offloading from a device does."""
    if _on_host(device):
        return "nothing to do, the latents are in the host's memory already"
    return f"the latents that are kept wait in the host's memory, and come back to {device} one by one"


def _on_host(device: torch.device | str) -> bool:
    return torch.device(device).type == "cpu"
