"""What a training costs, counted as it runs: forwards of the UNet, and the backward passes through them.

It needs torch and diffusers alone, so that it counts in the environments of other libraries too.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@dataclass
class Forwards:
    """Rows that went through the network, and twice those that came back; the first of them starts the clock."""

    total: float = 0.0
    limit: float = float("inf")
    clock: threading.Thread | None = None

    def add(self, rows: float) -> None:
        if self.clock is not None and self.total == 0:
            self.clock.start()
        reached = self.total >= self.limit
        self.total += rows
        if self.total >= self.limit and not reached:
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def counted(forwards: Forwards) -> Iterator[Forwards]:
    """Counts the UNet of an embedded model as it runs: a call that is made again on the way back counts again."""

    def out(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, UNet2DConditionModel):
            forwards.add(len(args[0]))

    def back(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = output[0] if isinstance(module, UNet2DConditionModel) else None
        if found is not None and found.requires_grad:
            found.register_hook(lambda gradient: forwards.add(2 * len(gradient)))

    handles = [register_module_forward_pre_hook(out), register_module_forward_hook(back)]
    try:
        yield forwards
    finally:
        for handle in handles:
            handle.remove()
