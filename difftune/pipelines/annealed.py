"""A LoRA whose share grows along a run, as DRaFT+ samples: early steps keep the base's variety, late ones the LoRA's
quality.

    out = w out_LoRA + (1 - w) out_base,    w from 0 at the first step to 1 at the last

With w = 0 or 1 the network is called once, and its output is the base's or the LoRA's to the bit; else it is called
twice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from difftune.pipelines import lora

SHARES: dict[str, Callable[[float], float]] = {  # of the part of the run that is done, 0 to 1
    "linear": lambda done: done,
    "power": lambda done: done**2,
    "switch": lambda done: float(done >= 0.6),
}


@dataclass
class Extra:
    """Rows that went through the network for a second time."""

    rows: int = 0


@contextmanager
def annealed(network: Any, share: Callable[[float], float], steps: int) -> Iterator[Extra]:
    """Around one run of a pipeline, whose `steps` are counted by the network's timesteps: its output is the mixture."""
    forward, own, extra = network.forward, vars(network).get("forward"), Extra()
    met: list[float] = []

    def mixed(*args: Any, **kwargs: Any) -> Any:
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        now = float(time.flatten()[0]) if isinstance(time, Tensor) else float(time)
        if now not in met:
            met.append(now)
        weight = share(min(met.index(now) / max(steps - 1, 1), 1.0) if steps > 1 else 1.0)
        if weight == 1:
            return forward(*args, **kwargs)
        with lora.off(network):
            base = forward(*args, **kwargs)
        if weight == 0:
            return base
        tuned = forward(*args, **kwargs)
        extra.rows += len(_tensor(tuned))
        out = weight * _tensor(tuned) + (1 - weight) * _tensor(base)
        return (out, *tuned[1:]) if isinstance(tuned, tuple) else replace(tuned, sample=out)

    network.forward = mixed
    try:
        yield extra
    finally:
        del network.forward
        if own is not None:
            network.forward = own


def _tensor(out: Any) -> Tensor:
    return out[0]
