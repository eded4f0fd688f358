"""An explicit sweep as one node of autograd: what the modes `revolve`, `adjoint`, `reversible` and `lean` share.

The run itself keeps no graph. On the way back a sweep rebuilds the graph of one network call at a time and gathers the
gradients of the latents, conditions and parameters, which leave through a single autograd function: optimizers, hooks
and graphs upstream of the conditions see ordinary gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from solvers.denoiser import widen
from solvers.rollout.recompute import Networks, counting, networks_of, unchanged
from solvers.rollout.run import Run, differentiated, observe_end

Gradients = Sequence[Tensor | None]


class Down(NamedTuple):
    """The record of a run without a graph."""

    ends: Sequence[Tensor]  # what is differentiated
    kept: Sequence[Tensor]  # all that the way back needs, beside the conditions and parameters
    note: Any = None  # how to read `kept`


class Sweep(Protocol):
    """A sampler and its gradient, both explicit; neither is called under a graph."""

    @property
    def run(self) -> Run: ...
    def down(self, x: Tensor, check: bool) -> Down:
        """The run from x; `check` that its first step depends on no unlisted tensor that requires grad."""
        ...

    def up(self, down: Down, cotangents: Gradients, totals: "Totals") -> Tensor | None:
        """The gradient for x; those for the conditions and parameters are added to `totals`."""
        ...


class Totals:
    """Sums of gradients, in float32 or better."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tensors
        self.sums: list[Tensor | None] = [None] * len(tensors)

    def add(self, gradients: Gradients, scale: float | Tensor = 1.0) -> None:
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                wide = widen(gradient)
                self.sums[i] = plus(self.sums[i], wide if isinstance(scale, float) and scale == 1.0 else scale * wide)

    def cast(self) -> list[Tensor | None]:
        """The sums in the dtypes of their tensors."""
        return [None if s is None else s.to(t.dtype) for s, t in zip(self.sums, self.tensors, strict=True)]


@dataclass(frozen=True)
class Ambient:
    """The autocast setting of a device, off included. Weights are not cached: where torch caches under no_grad too, a
    copy made without a graph would stand in for one with a graph, and the weight would get no gradient."""

    device: str
    enabled: bool
    dtype: torch.dtype

    def __call__(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, self.dtype, enabled=self.enabled, cache_enabled=False)


def ambient(device: str) -> Ambient:
    """The setting in force."""
    return Ambient(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))


def swept(run: Run, sweep: Sweep) -> tuple[Sequence[Tensor], Any]:
    """The ends of a run, connected to run.x and to what `predict` depends on, and the run's note.

    There is no second derivative: RuntimeError under create_graph=True. A condition, a parameter or noise that is
    changed in place before the backward pass is an error too, and so are other adapters, train() and eval().
    """
    x, setting, connected = widen(run.x), ambient(run.x.device.type), torch.is_grad_enabled()
    tensors = differentiated(run) if connected else []
    with torch.no_grad(), setting():
        down = sweep.down(x.detach(), connected)
    used = (*run.predict.tensors, *(noise for *_, noise in run.legs if noise is not None))
    check = unchanged(Networks.of(networks_of(run.predict)), counting(used))
    return _Swept.apply(sweep, down, setting, check, x, *tensors), down.note


class _Swept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sweep, down, setting, check, x, *tensors):
        ctx.sweep, ctx.note, ctx.setting, ctx.check, ctx.tensors = sweep, down.note, setting, check, tensors
        ctx.versions = [t._version for t in tensors]
        ctx.save_for_backward(*down.kept)
        ctx.set_materialize_grads(False)
        ends = tuple(t.clone() for t in down.ends)  # the caller may change them in place, and what is kept must not
        ctx.mark_non_differentiable(*(t for t in ends if not t.is_floating_point()))
        return ends

    @staticmethod
    def backward(ctx, *cotangents):
        _once(ctx)
        ctx.check()
        if all(c is None for c in cotangents):
            return (None,) * (5 + len(ctx.tensors))
        observe_end(ctx.sweep.run, *cotangents)
        totals = Totals(ctx.tensors)
        with ctx.setting():
            x = ctx.sweep.up(Down((), ctx.saved_tensors, ctx.note), cotangents, totals)
        return None, None, None, None, x, *totals.cast()


def _once(ctx: Any) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("this gradient mode has no second derivative: use gradient='full' or 'checkpoint'")
    for tensor, version in zip(ctx.tensors, ctx.versions, strict=True):
        if tensor._version != version:
            raise RuntimeError(
                f"a condition or parameter of shape {tuple(tensor.shape)} was changed in place after the run: call"
                " backward before the optimizer's step"
            )


def vjp(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    cotangents: Gradients,
) -> tuple[Sequence[Tensor], Gradients, Gradients]:
    """Outputs of function(*inputs), and the cotangents times its Jacobians with respect to inputs and to tensors.

    One graph, which is gone on return; None stands for zero.
    """
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
        outputs = function(*leaves)
    ends = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None and o.requires_grad]
    wanted = [t for t in (*leaves, *tensors) if t.requires_grad]
    found: Gradients = [None] * len(wanted)
    if ends:
        found = torch.autograd.grad([o for o, _ in ends], wanted, [c for _, c in ends], allow_unused=True)
    gradients = dict(zip(map(id, wanted), found, strict=True))
    at = lambda those: [gradients.get(id(t)) for t in those]  # noqa: E731
    return [o.detach() for o in outputs], at(leaves), at(tensors)


def pulled(
    function: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor, totals: Totals
) -> tuple[Tensor, Tensor, Gradients]:
    """`vjp` of a function of one tensor: the gradient for x is a tensor even where it is zero."""
    (out,), (pull,), own = vjp(lambda x: [function(x)], [x], totals.tensors, [cotangent])
    return out, torch.zeros_like(x) if pull is None else pull, own


def given(gradients: Gradients) -> Tensor:
    """The first gradient, which is there."""
    assert gradients[0] is not None
    return gradients[0]


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


@dataclass(frozen=True)
class RandomState:
    """The global random state of the CPU and of a device."""

    device: torch.device
    states: tuple[Tensor, ...]

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        if device.type == "cuda":
            return cls(device, (torch.get_rng_state(), torch.cuda.get_rng_state(device)))
        return cls(device, (torch.get_rng_state(),))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RandomState) and all(map(torch.equal, self.states, other.states))

    def restore(self) -> None:
        torch.set_rng_state(self.states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.states[1], self.device)


@contextmanager
def replaying(state: RandomState | None) -> Iterator[None]:
    """A context that begins with a random state of old, and leaves today's as it was."""
    if state is None:
        yield
        return
    today = RandomState.now(state.device)
    state.restore()
    try:
        yield
    finally:
        today.restore()
