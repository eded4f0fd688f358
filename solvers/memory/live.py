"""The memory that a computation needs, measured.

`LiveBytes` counts tensors as they come and go, on a CPU as on a GPU: what a CPU's allocator does not tell, and what the
hooks of saved tensors do not see (a closure's tensors, a state that an autograd function keeps by itself).
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Footprint(NamedTuple):
    """Bytes of a computation and its backward pass."""

    kept: int  # between the two: the graph, and the outputs
    peak: int  # the most at once


UNBOUNDED = Footprint(2**62, 2**62)  # of what there is no room for


def measured(function: Function, x: Tensor, limit: int | None = None) -> Footprint:
    """The memory of function(x) -> tensors with the gradient with respect to x; parameters' gradients are left out.

    Runs once, forwards and backwards, and leaves the random state as it was. UNBOUNDED where the device has no room for
    it, or where it would take more than `limit`: then it is stopped.
    """
    x = x.detach().requires_grad_()
    with _random_state(x.device), torch.enable_grad():
        try:
            return _measured(function, x, limit)
        except torch.OutOfMemoryError:
            return UNBOUNDED


def _measured(function: Function, x: Tensor, limit: int | None) -> Footprint:
    with _peak(x.device) as peak, LiveBytes(limit) as live:
        outputs = [out for out in function(x) if out.requires_grad]
        kept = live.now
        torch.autograd.grad(outputs, x, [torch.ones_like(out) for out in outputs], allow_unused=True)
    return Footprint(kept, peak() or live.peak)


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields what the device's allocator says of the most at once, beside what was there; 0 if it says nothing."""
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


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
