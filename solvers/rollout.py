"""A whole run of a sampler as one differentiable function: the `gradient` modes.

Storing the latents of a run is free; what costs memory is the graph of one network call. So the default recomputes
each network call from its stored input: exact, with the peak of a single call. `MODES` is the list.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from solvers.denoiser import Path, Predict, Prediction, widen
from solvers.noise import Noise
from solvers.samplers import Step, is_stochastic

Leg = tuple[Noise, Noise, Tensor | None]  # now, then, noise


class Run(NamedTuple):
    """What is to be differentiated."""

    step: Step
    predict: Predict
    x: Tensor  # (B, ...)
    legs: Sequence[Leg]


def rollout(
    step: Step,
    predict: Predict,
    x: Tensor,
    levels: Sequence[Noise],
    gradient: str = "checkpoint",
    noise: Sequence[Tensor] | Tensor | None = None,
) -> Path:
    """The end of a run from x, connected to x, to the conditions and to the parameters in `predict.tensors`.

    gradient: "full" keeps every graph; "checkpoint" recomputes each network call, and its gradients are the same bits;
    "truncated:K" lets only the last K steps carry gradient (DRaFT-K, https://arxiv.org/abs/2309.17400).
    noise: one tensor a step, for stochastic steps; drawn outside, since a recomputed region cannot draw it again.
    """
    mode, option = parse_gradient(gradient)
    return mode(Run(step, predict, x, _legs(step, levels, noise)), option)


def parse_gradient(gradient: str) -> tuple["Mode", str]:
    """A mode and what follows its colon: "truncated:10" -> (truncated, "10")."""
    name, _, option = gradient.partition(":")
    if name not in MODES:
        raise ValueError(
            f"no gradient mode {gradient!r}; known: {', '.join(MODES)}, as in 'checkpoint' or 'truncated:10'"
        )
    return MODES[name], option


def full(run: Run, option: str) -> Path:
    """Every graph is kept: N network calls of memory."""
    _no_option("full", option)
    return _descend(run, run.predict, Path(widen(run.x)), run.legs)


def checkpoint(run: Run, option: str) -> Path:
    """Each network call is recomputed from its input on the way back (https://arxiv.org/abs/1604.06174)."""
    _no_option("checkpoint", option)
    return _descend(run, Recomputed(run.predict), Path(widen(run.x)), run.legs)


def truncated(run: Run, option: str) -> Path:
    """The last K steps are checkpointed, those before run without a graph; K = N is "checkpoint"."""
    count = len(run.legs)
    if not option.isdecimal() or int(option) > count:
        raise ValueError(f"'truncated:{option}' wants the number of last steps that carry gradient, 0 to {count}")
    cut, path = count - int(option), Path(widen(run.x))
    if cut:
        with torch.no_grad():
            path = _descend(run, run.predict, replace(path, x=path.x.detach()), run.legs[:cut])
    return _descend(run, Recomputed(run.predict), path, run.legs[cut:])


Mode = Callable[[Run, str], Path]
MODES: dict[str, Mode] = {f.__name__: f for f in (full, checkpoint, truncated)}


@dataclass(frozen=True)
class Recomputed:
    """`predict`, whose inner activations are recomputed when gradients come back.

    x is an argument of its own because checkpointing reads from it which device's random state to restore.
    Non-reentrant only: reentrant checkpointing loses the gradients of parameters where x needs none.
    """

    predict: Predict

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.predict.tensors

    def __call__(self, path: Path, at: Noise) -> Prediction:
        return recompute(lambda x: self.predict(replace(path, x=x), at), path.x, use_reentrant=False)


def unlisted(outputs: Iterable[Tensor], listed: Iterable[Tensor]) -> Iterator[Tensor]:
    """Leaves that require grad under `outputs`, other than the `listed` tensors and what those were made from."""
    listed = list(listed)
    known = {id(t) for t in listed}
    seen: set[Any] = {None, *(t.grad_fn for t in listed)}
    front: list[Any] = [t.grad_fn for t in outputs]
    while front:
        node = front.pop()
        if node in seen:
            continue
        seen.add(node)
        front += [parent for parent, _ in node.next_functions]
        if node.name() == "torch::autograd::AccumulateGrad" and id(node.variable) not in known:
            yield node.variable


def _descend(run: Run, predict: Predict, path: Path, legs: Sequence[Leg]) -> Path:
    for i, (now, then, noise) in enumerate(legs):
        path = run.step(predict, path, now, then, noise)
        if i == 0:
            _check_listed(run, path)
    return path


def _check_listed(run: Run, path: Path) -> None:
    """One step's graph tells whether `predict.tensors` is complete."""
    outputs = [path.x, *path.memory.values()]
    noises = [noise for *_, noise in run.legs if noise is not None]
    for leaf in unlisted(outputs, [run.x, *noises, *run.predict.tensors]):
        raise ValueError(
            f"a tensor of shape {tuple(leaf.shape)} requires grad and the step depends on it, but it is not in"
            " predict.tensors: list it there, or call requires_grad_(False) on it"
        )


def _legs(step: Step, levels: Sequence[Noise], noise: Sequence[Tensor] | Tensor | None) -> list[Leg]:
    pairs = list(pairwise(levels))
    if noise is None and is_stochastic(step):
        raise ValueError(f"a stochastic step needs noise that is drawn outside: pass {len(pairs)} tensors of x's shape")
    if noise is not None and len(noise) != len(pairs):
        raise ValueError(f"{len(noise)} noise tensors for {len(pairs)} steps: pass one a step")
    noises: Iterable[Tensor | None] = [None] * len(pairs) if noise is None else noise
    return [(now, then, n) for (now, then), n in zip(pairs, noises, strict=True)]


def _no_option(name: str, option: str) -> None:
    if option:
        raise ValueError(f"gradient mode {name!r} takes no option, got {option!r}")
