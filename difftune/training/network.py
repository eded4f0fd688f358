"""The networks of a run: the one that is trained, as accelerate prepared it, and its reference before training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
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
    """The model that training began with: the same network without its adapter, or a copy of it.

    The adapter and the dropout are off inside the call alone, so that a call which is recomputed on the way back is
    without them too, and no weight's `requires_grad` changes. Nothing is differentiated.
    """

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        learning = self.prepared.training
        try:
            with lora.off(self.prepared):
                return self.prepared.eval()(*args, **kwargs)
        finally:
            self.prepared.train(learning)

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())


@dataclass(frozen=True)
class FrozenNetwork(TrainedNetwork):
    """The model that training began with, differentiable in its input alone: for a gradient that is taken at once, and
    not by way of DDP, which would wait for one of its weights."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        learning = self._network.training
        try:
            with lora.off(self.prepared):
                return self._network.eval()(*args, **kwargs)
        finally:
            self._network.train(learning)

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())
