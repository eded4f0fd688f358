"""Fast versions of lookups that torch and diffusers do by slow module walks."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

HOOKS = ("_hf_hook", "_diffusers_hook")  # where accelerate and diffusers keep what changes how a module runs


def within(networks: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Every module; ten times as fast as `modules()`."""
    front = list(networks)
    while front:
        m = front.pop()
        yield m
        front += (child for child in m._modules.values() if child is not None)


def hooked(networks: Iterable[nn.Module]) -> bool:
    """Whether any module is offloaded, cast layer by layer or otherwise run by a hook."""
    return any(HOOKS[0] in vars(m) or HOOKS[1] in vars(m) for m in within(networks))


def dtype_of(network: Any) -> torch.dtype:
    """`network.dtype`: what a diffusers model computes in."""
    kept = getattr(type(network), "_keep_in_fp32_modules", None)  # diffusers ignores these in `.dtype`, so ask it
    plain = isinstance(network, nn.Module) and not kept and not hooked([network])
    found = next((p.dtype for p in network.parameters() if p.is_floating_point()), None) if plain else None
    return found or network.dtype


def execution_device(pipe: Any) -> torch.device:
    """`pipe._execution_device`: where a pipeline runs, also under offloading."""
    parts = [part for part in vars(pipe).values() if isinstance(part, nn.Module)]
    devices = {p.device for p in (next(part.parameters(), None) for part in parts) if p is not None}
    return devices.pop() if len(devices) == 1 and not hooked(parts) else pipe._execution_device
