"""Network calls that are recomputed on the way back, and what would make the second call another than the first.

Recomputation trusts that a call repeats itself. Nothing in autograd says so where it does not: the gradient would be
wrong in silence. Each such trap is an error here, which names the remedy.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import chain, count
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode
from torch.utils.checkpoint import checkpoint

from solvers.denoiser import Path, Predict, Prediction, pack, unpack
from solvers.errors import UserError
from solvers.modules import within
from solvers.noise import Noise


@dataclass(frozen=True)
class Recomputed:
    """`predict`, whose inner activations are recomputed when gradients come back.

    The path's tensors are arguments of their own: what is kept of them goes through the hooks of saved tensors, as
    offloading wants, and checkpointing reads from them which device's random state to restore.
    Non-reentrant only: reentrant checkpointing loses the gradients of parameters where x needs none. Backward raises
    ValueError where weights, adapters or train/eval mode changed since the forward pass.
    """

    predict: Predict

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.predict.tensors

    @cached_property
    def networks(self) -> "Networks":
        """The networks of `predict`, looked for once a run: the search takes longer than all checks of a call."""
        return Networks.of(networks_of(self.predict))

    @cached_property
    def counted(self) -> list[Tensor]:
        """The tensors of `predict` that count their writes."""
        return counting(self.predict.tensors)

    def __call__(self, path: Path, at: Noise) -> Prediction:
        check = unchanged(self.networks, self.counted)
        tensors, shape = pack(path)
        calls = count()

        def call(*tensors: Tensor) -> Prediction:
            if next(calls):  # the first is the forward pass itself
                check()
            return self.predict(unpack(tensors, shape), at)

        return checkpoint(call, *tensors, use_reentrant=False)


def networks_of(predict: Predict) -> tuple[nn.Module, ...]:
    """The networks that `predict` holds, itself or in what it calls."""
    return tuple(reachable(predict, nn.Module))


@dataclass(frozen=True)
class Networks:
    """Networks with what their `Stamp` is read from, listed once: a walk through all modules at each call would cost
    more than anything else that we do there."""

    networks: tuple[nn.Module, ...]
    children: tuple[dict[str, nn.Module | None], ...]  # each module's own mapping of names to modules
    inside: list[nn.Module | None]  # all that these hold
    adapted: tuple[Any, ...]  # peft's layers

    @classmethod
    def of(cls, networks: Iterable[nn.Module]) -> "Networks":
        networks = tuple(networks)
        modules = list(within(networks))
        children = tuple(m._modules for m in modules if m._modules)
        return cls(networks, children, _inside(children), tuple(_adapted(modules)))

    def now(self) -> "Networks":
        """The same networks as they are now: `self`, if no module was added, replaced or removed since."""
        return self if _inside(self.children) == self.inside else Networks.of(self.networks)


def _inside(children: Iterable[dict[str, nn.Module | None]]) -> list[nn.Module | None]:
    return [*chain.from_iterable(map(dict.values, children))]


def counting(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that count how often they are written in place: all except those of inference mode."""
    return [t for t in tensors if not t.is_inference()]


def unchanged(networks: Networks, tensors: Sequence[Tensor] = ()) -> Callable[[], None]:
    """A check, for later, that these networks and these `counting` tensors are still as they are now."""
    before = stamp(tensors, networks)
    return lambda: _check_unchanged(before, stamp(tensors, networks))


class Stamp(NamedTuple):
    """The state of a network that its output depends on, besides its input."""

    adapters: tuple[Any, ...]
    training: tuple[bool, ...]
    versions: tuple[int, ...]  # how often each tensor was written in place


def stamp(tensors: Iterable[Tensor], networks: Networks) -> Stamp:
    versions = tuple(map(_version, tensors))
    adapters = tuple(_setting(layer) for layer in networks.now().adapted)
    return Stamp(adapters, tuple(n.training for n in networks.networks), versions)


_version = attrgetter("_version")


def _adapted(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """peft's layers among them; without importing peft, since nobody may have."""
    if "peft.tuners.tuners_utils" in sys.modules:
        layer = sys.modules["peft.tuners.tuners_utils"].BaseTunerLayer
        yield from (m for m in modules if isinstance(m, layer))


def _setting(layer: Any) -> tuple[Any, ...]:
    """The adapters that a layer of peft's applies, and their strengths."""
    scaling = tuple(vars(layer).get("scaling", {}).items())
    return id(layer), layer.disable_adapters, tuple(layer.active_adapters), tuple(layer.merged_adapters), scaling


def _check_unchanged(before: Stamp, after: Stamp) -> None:
    changed = {
        "the adapters were disabled, removed or changed": before.adapters != after.adapters,
        "train() or eval() was called": before.training != after.training,
        "a tensor in predict.tensors, or noise, was written in place": before.versions != after.versions,
    }
    for what, happened in changed.items():
        if happened:
            raise UserError(
                f"{what} between the forward and the backward pass, and the network is called again on the way back:"
                " call backward() first, or use gradient='full'"
            )


def check_step(step: Any) -> None:
    """UserError for a step that is not a function of its arguments: a scheduler, a name, a partial with a generator."""
    if isinstance(step, SchedulerMixin) or (inspect.ismethod(step) and isinstance(step.__self__, SchedulerMixin)):
        scheduler = step if isinstance(step, SchedulerMixin) else step.__self__
        raise UserError(
            f"{type(scheduler).__name__} as a step: a scheduler keeps its place in the run and cannot be recomputed;"
            " pass a step of solvers.samplers.catalogue.SAMPLERS, and levels_of(scheduler) as the levels"
        )
    if not callable(step):
        raise UserError(f"the step is {step!r}: pass a function, as in solvers.samplers.catalogue.SAMPLERS['euler']")
    if isinstance(step, partial):
        check_step(step.func)
    if any(True for _ in reachable(step, torch.Generator)):
        raise UserError(f"the step holds a torch.Generator: {DRAW_OUTSIDE}")


def check_noise(noise: Any) -> None:
    """ValueError for a generator where noise is wanted."""
    if any(True for _ in reachable(noise, torch.Generator)):
        raise UserError(f"noise is a torch.Generator: {DRAW_OUTSIDE}")


DRAW_OUTSIDE = "a recomputed region would draw other numbers; draw before the run, and pass noise, a tensor a step"


class NoGenerator(TorchFunctionMode):
    """A context in which a call with a torch.Generator is a ValueError: only the global generators are restored for a
    recomputed region."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(_is_generator, map(type, args))) or any(map(_is_generator, map(type, kwargs.values()))):
            raise UserError(f"a torch.Generator is used inside the step: {DRAW_OUTSIDE}")
        return func(*args, **kwargs)


@cache
def _is_generator(kind: type) -> bool:
    """By type, and each type once: `isinstance` asks Python code of torch's, at each argument of each operator."""
    return issubclass(kind, torch.Generator)


@contextmanager
def unwatched() -> Iterator[None]:
    """Within, the innermost `NoGenerator`s are as if they had not been entered."""
    watching = []
    while isinstance(_get_current_function_mode(), NoGenerator):
        watching.append(_pop_mode())
    try:
        yield
    finally:
        for mode in reversed(watching):
            _push_mode(mode)


def reachable(thing: Any, kind: type, seen: set[int] | None = None) -> Iterator[Any]:
    """Objects of a kind in a value, its containers, its fields and the closures of its functions."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, str | bytes | Tensor | type):
        return
    seen.add(id(thing))
    if isinstance(thing, kind):
        yield thing
        return
    for part in _parts(thing):
        yield from reachable(part, kind, seen)


def _parts(thing: Any) -> Iterable[Any]:
    if isinstance(thing, Mapping):
        return thing.values()
    if isinstance(thing, list | tuple):
        return thing
    if isinstance(thing, partial):
        return thing.func, *thing.args, *thing.keywords.values()
    if inspect.ismethod(thing):
        return (thing.__self__,)
    if isinstance(thing, FunctionType):
        return [cell.cell_contents for cell in thing.__closure__ or ()]
    if isinstance(thing, nn.Module) or inspect.ismodule(thing) or not type(thing).__dictoffset__:
        return ()
    return list(vars(thing).values())
