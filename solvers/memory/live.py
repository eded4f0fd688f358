"""What a computation needs of memory, measured, and the three ways to need less that leave its result alone.

`LiveBytes` counts tensors as they come and go, on a CPU as on a GPU: what a CPU's allocator does not tell, and what the
hooks of saved tensors do not see (a closure's tensors, a state that an autograd function keeps by itself).
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as recompute

from solvers.errors import InputError

Function = Callable[[Tensor], Sequence[Tensor]]


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of tensors made inside it and still there: `now`, and `peak`, the most at once.

    Each storage counts once, whatever views there are of it. What an operator allocates and frees itself is not seen.
    Raises OutOfMemoryError at the first tensor that makes it more than `limit`.
    """

    def __init__(self, limit: int | None = None):
        super().__init__()
        self.now = self.peak = 0
        self.limit = limit
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self._note(tensor.untyped_storage(), 0)  # it was here before
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            self._note(storage, storage.nbytes())
        return out

    def _note(self, storage: Any, size: int) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)
            if self.limit is not None and self.now > self.limit:
                raise torch.OutOfMemoryError(f"{self.now} bytes, where {self.limit} are allowed")

    def _drop(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size


class Memory(NamedTuple):
    """Bytes of a computation and its backward pass."""

    kept: int  # between the two: the graph, and the outputs
    peak: int  # the most at once


UNBOUNDED = Memory(2**62, 2**62)  # of what there is no room for


def measured(function: Function, x: Tensor, limit: int | None = None) -> Memory:
    """What function(x) -> tensors needs, with the gradient with respect to x; parameters' gradients are left out.

    Runs once, forwards and backwards, and leaves the random state as it was. UNBOUNDED where the device has no room for
    it, or where it would take more than `limit`: then it is stopped.
    """
    x = x.detach().requires_grad_()
    with _random_state(x.device), torch.enable_grad():
        try:
            return _measured(function, x, limit)
        except torch.OutOfMemoryError:
            return UNBOUNDED


def _measured(function: Function, x: Tensor, limit: int | None) -> Memory:
    with _peak(x.device) as peak, LiveBytes(limit) as live:
        outputs = [out for out in function(x) if out.requires_grad]
        kept = live.now
        torch.autograd.grad(outputs, x, [torch.ones_like(out) for out in outputs], allow_unused=True)
    return Memory(kept, peak() or live.peak)


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields what the device's allocator says of the most at once, beside what was there; 0 where it says nothing."""
    if device.type != "cuda":
        yield lambda: 0
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def block_checkpointing(*models: Any) -> Iterator[None]:
    """Within, each block of these diffusers models keeps only its input and is recomputed on the way back.

    The gradients are the same bits. The backward pass must run within, too: a checkpointed call that is recomputed
    without it saves other tensors than it did, which torch refuses. Raises ValueError for a model without such blocks.
    """
    for model in models:
        if not has_blocks(model):
            name = type(model).__name__
            raise InputError(f"{name} has no blocks that can be recomputed: leave block checkpointing off")
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
    return bool(model._supports_gradient_checkpointing and _blocks(model))


def _blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "gradient_checkpointing" in vars(module)]


def apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, recomputed on the way back: of several rewards, one graph at a time is there."""
    return lambda *args: recompute(function, *args, use_reentrant=False)


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
        raise InputError(f"gradient mode {gradient!r} holds its states on the device: offload with 'checkpoint'")
    if gradient.partition(":")[0] == "full":
        raise InputError("gradient mode 'full' keeps whole graphs, not latents: offload with 'checkpoint'")


def offload_line(device: torch.device | str) -> str:
    """What offloading from a device does."""
    if _on_host(device):
        return "nothing to do, the latents are in the host's memory already"
    return f"the latents that are kept wait in the host's memory, and come back to {device} one by one"


def _on_host(device: torch.device | str) -> bool:
    return torch.device(device).type == "cpu"


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
