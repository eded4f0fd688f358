"""The argument of every gradient mode, and the checks and reports that they share."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.denoiser import Path, Predict
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.rollout.recompute import NoGenerator
from solvers.samplers.catalogue import Step

Leg = tuple[Noise, Noise, Tensor | None]  # now, then, noise
OnStep = Callable[[int, float], None]  # on_step(index, norm)

_WATCHING: ContextVar[OnStep | None] = ContextVar("watching", default=None)
_CHECKED: ContextVar[bool] = ContextVar("checked", default=True)


class Run(NamedTuple):
    """The run that is to be differentiated."""

    step: Step | None  # None: the mode brings its own solver
    predict: Predict
    x: Tensor  # (B, ...)
    legs: Sequence[Leg]
    on_step: OnStep | None = None
    checked: bool = True  # whether a sweep stops at a gradient that is not finite


@contextmanager
def watch_gradients(on_step: OnStep) -> Iterator[None]:
    """Runs that start inside this block call on_step(index, norm) on their way back, last step first.

    norm is that of the gradient with respect to the latent that step `index` starts from, so index 0 is x_T (a
    reversible sampler gives that of its pair of states). A gradient that is not finite raises FloatingPointError with
    the step's index, or says that it came so from the loss: under this block in every mode, and without it in the modes
    that are explicit sweeps, except inside `unchecked_gradients`.
    """
    token = _WATCHING.set(on_step)
    try:
        yield
    finally:
        _WATCHING.reset(token)


def watching() -> OnStep | None:
    """The callback of the innermost `watch_gradients`."""
    return _WATCHING.get()


@contextmanager
def unchecked_gradients() -> Iterator[None]:
    """Runs that start inside this block, and are not watched, let a gradient pass that is not finite, in every mode.

    For a caller that looks for it: a loss scaler, which finds its scale by overflowing, or one that leaves out the
    samples it is of.
    """
    token = _CHECKED.set(False)
    try:
        yield
    finally:
        _CHECKED.reset(token)


def checked() -> bool:
    """Whether a sweep that starts now stops at a gradient that is not finite."""
    return _CHECKED.get() or watching() is not None


def observe(run: Run, index: int, *gradients: Tensor | None) -> None:
    """Report the norm of step `index`'s gradient. Raises FloatingPointError if it is not finite."""
    if not run.checked:
        return
    there = [g for g in gradients if g is not None]
    norm = sum((g.detach().float().norm().item() ** 2 for g in there), 0.0) ** 0.5
    if not all(g.isfinite().all() for g in there):
        raise FloatingPointError(
            f"the gradient is not finite at step {index} of {len(run.legs)} (counted from the noise, from 0): lower the"
            " loss scale or the guidance scale, or run the network in float32"
        )
    if run.on_step is not None:
        run.on_step(index, norm)


def observe_end(run: Run, *gradients: Tensor | None) -> None:
    """Raises FloatingPointError if a gradient with respect to the run's end is not finite: no step is to blame."""
    if run.checked and not all(g.isfinite().all() for g in gradients if g is not None):
        raise FloatingPointError(
            f"the gradient of the loss is not finite at the run's end, before any of its {len(run.legs)} steps: look at"
            " that end, the decoder and the reward, or lower the loss scale"
        )


def watched(run: Run, index: int, path: Path) -> Path:
    """`path`, before step `index`, whose latent reports its gradient where the run is watched."""
    if run.on_step is None or not path.x.requires_grad:
        return path
    x = path.x.view_as(path.x)  # a hook on the caller's own x would outlive the run
    x.register_hook(lambda gradient: observe(run, index, gradient))
    return replace(path, x=x)


def differentiated(run: Run) -> list[Tensor]:
    """The conditions, parameters and noises that require grad, each once.

    Raises ValueError if one is made from another: a sweep would count the gradient of the second twice.
    """
    noises = [noise for *_, noise in run.legs if noise is not None]
    tensors = list({id(t): t for t in (*run.predict.tensors, *noises) if t.requires_grad}.values())
    origins = {_origin(t) for t in tensors}
    for tensor in tensors:
        above = [] if tensor.grad_fn is None else [parent for parent, _ in tensor.grad_fn.next_functions]
        if any((id(n.variable) if _is_leaf(n) else n) in origins for n in _ancestors(above, set())):
            raise UserError(
                f"predict.tensors lists a tensor of shape {tuple(tensor.shape)} beside one that it is made from: list"
                " only one of them, or use gradient='checkpoint'"
            )
    return tensors


def unlisted(outputs: Iterable[Tensor], listed: Iterable[Tensor]) -> Iterator[Tensor]:
    """Leaves that require grad under `outputs`, other than the `listed` tensors and what those were made from."""
    listed = list(listed)
    known = {id(t) for t in listed}
    for node in _ancestors([t.grad_fn for t in outputs], {t.grad_fn for t in listed}):
        if _is_leaf(node) and id(node.variable) not in known:
            yield node.variable


def descend(run: Run, predict: Predict, path: Path, start: int = 0, stop: int | None = None) -> Path:
    """The path after some of the run's steps, by `predict`; the first of them is checked."""
    for i in range(len(run.legs))[start:stop]:
        path = watched(run, i, path)
        path = first(run, predict, path, i) if i == start else step_of(run)(predict, path, *run.legs[i])
        if i == len(run.legs) - 1 and run.on_step is not None and path.x.requires_grad:
            path.x.register_hook(lambda gradient: observe_end(run, gradient))
    return path


def first(run: Run, predict: Predict, before: Path, index: int = 0) -> Path:
    """A step, with the checks that need one: generators inside, unlisted leaves, and nothing that requires grad."""
    with NoGenerator():
        path = step_of(run)(predict, before, *run.legs[index])
    check_listed(run, [path.x, *path.memory.values()], [before.x, *before.memory.values()])
    return path


def check_listed(run: Run, outputs: Iterable[Tensor], inputs: Sequence[Tensor] | None = None) -> None:
    """One step's graph tells whether `predict.tensors` is complete; inputs: what the step started from, x by default.

    Under a graph, something of all that must require grad.
    """
    inputs = [run.x] if inputs is None else inputs
    listed = [*(noise for *_, noise in run.legs if noise is not None), *run.predict.tensors]
    for leaf in unlisted(outputs, [run.x, *inputs, *listed]):
        raise UserError(
            f"a tensor of shape {tuple(leaf.shape)} requires grad and the step depends on it, but it is not in"
            " predict.tensors: list it there, or call requires_grad_(False) on it"
        )
    if torch.is_grad_enabled() and not any(t.requires_grad for t in (*inputs, *listed)):
        raise UserError(CUT_OFF if run.x.requires_grad else NOTHING)


CUT_OFF = (
    "only x requires grad, and this truncation cuts it off: use 'checkpoint', or 'truncated:K:alignprop', which keeps"
    " the linear path"
)
NOTHING = (
    "nothing that the run depends on requires grad: call requires_grad_() on x, on a condition or on the weights, or"
    " run under torch.no_grad()"
)


def _ancestors(front: Iterable[Any], seen: set[Any]) -> Iterator[Any]:
    """The nodes of a graph from `front` on, without the `seen` ones and what is only above those."""
    seen, front = {None, *seen}, list(front)
    while front:
        node = front.pop()
        if node in seen:
            continue
        seen.add(node)
        front += [parent for parent, _ in node.next_functions]
        yield node


def _is_leaf(node: Any) -> bool:
    return node.name() == "torch::autograd::AccumulateGrad"


def _origin(tensor: Tensor) -> Any:
    """The identity of a tensor's place in the graph."""
    return id(tensor) if tensor.grad_fn is None else tensor.grad_fn


def step_of(run: Run) -> Step:
    """The run's step, which a mode without a solver of its own needs."""
    if run.step is None:
        raise UserError(
            "this gradient mode needs a step, such as solvers.samplers.catalogue.euler: only adjoint, reversible and"
            " lean bring their own solver"
        )
    return run.step


def no_option(name: str, option: str) -> None:
    if option:
        raise UserError(f"gradient mode {name!r} takes no option, got {option!r}")


def no_step(name: str, run: Run) -> None:
    """UserError for a step that is given to a mode with a solver of its own."""
    if run.step is not None:
        raise UserError(f"gradient mode {name!r} brings its own solver: pass step=None, or 'checkpoint' with a step")
    if not run.legs:
        raise UserError(f"gradient mode {name!r} needs two levels or more, got one")


def no_noise(name: str, run: Run) -> None:
    if any(noise is not None for *_, noise in run.legs):
        raise UserError(
            f"gradient mode {name!r} is deterministic and takes no noise: leave the noise out, or use 'checkpoint' or"
            " 'revolve:8' with a stochastic step"
        )
