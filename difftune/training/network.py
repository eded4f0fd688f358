"""The networks of a run: the one that is trained, as accelerate prepared it, and its reference before training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from difftune.pipelines import lora

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainedNetwork:
    """The network that accelerate prepared: under DDP, gradients meet only where the wrapper itself is called."""

    prepared: nn.Module
    dtype: torch.dtype  # that it is called with

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.prepared(*args, **kwargs)

    @property
    def config(self) -> Any:
        """The network's settings, which some families' calls look into."""
        return self._network.config

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The network's modules, which a guidance method patches."""
        return self._network.named_modules()

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        return self._network.named_children()

    @property
    def _network(self) -> Any:
        return self.prepared.module if isinstance(self.prepared, DistributedDataParallel) else self.prepared

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.prepared.parameters()


@dataclass(frozen=True)
class ReferenceNetwork(TrainedNetwork):
    """The model before training: without its adapter, with the adapter's weights `start`, or a copy of it.

    The adapter and the dropout are off inside the call alone, so that a call which is recomputed on the way back is
    without them too, and no weight's `requires_grad` changes. Nothing is differentiated.
    """

    start: Mapping[str, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call_as_before(self.prepared if self.start is None else self._network, self.start, args, kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())


@dataclass(frozen=True)
class FrozenNetwork(TrainedNetwork):
    """The model before training, differentiable in its input alone: for a gradient that is taken at once, and not by
    way of DDP, which would wait for one of its weights."""

    start: Mapping[str, Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call_as_before(self._network, self.start, args, kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())


def call_as_before(network: nn.Module, start: Mapping[str, Tensor] | None, args: Any, kwargs: Any) -> Any:
    """A call of the network in evaluation mode without its adapter, or with other weights of the adapter."""
    with evaluated(network):
        if start is not None:
            return functional_call(network, dict(start), args, kwargs)
        with lora.off(network):
            return network(*args, **kwargs)


@contextmanager
def evaluated(network: nn.Module) -> Iterator[None]:
    """Within, the network is in evaluation mode: without dropout."""
    learning = network.training
    try:
        network.eval()
        yield
    finally:
        network.train(learning)
