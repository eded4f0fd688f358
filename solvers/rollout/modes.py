"""A whole run of a sampler as one differentiable function: the `gradient` modes.

Storing the latents of a run is free; what costs memory is the graph of one network call. So the default recomputes
each network call from its stored input: exact, with the peak of a single call. `MODES` is the list.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from torch import Tensor

from solvers.denoiser import Path, Predict, widen
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.rollout.adjoint import adjoint
from solvers.rollout.lean import lean
from solvers.rollout.recompute import Recomputed, check_noise, check_step
from solvers.rollout.reversible import reversible
from solvers.rollout.revolve import revolve
from solvers.rollout.run import (
    Leg,
    Run,
    checked,
    descend,
    no_option,
    unchecked_gradients,
    unlisted,
    watch_gradients,
    watching,
)
from solvers.rollout.truncated import truncated
from solvers.samplers.catalogue import Step, is_stochastic

__all__ = [
    "MODES",
    "Recomputed",
    "Run",
    "parse_gradient",
    "rollout",
    "unchecked_gradients",
    "unlisted",
    "watch_gradients",
]


def rollout(
    step: Step | None,
    predict: Predict,
    x: Tensor,
    levels: Sequence[Noise],
    gradient: str = "checkpoint",
    noise: Sequence[Tensor] | Tensor | None = None,
) -> Path:
    """Run the sampler from x to its end, differentiable in x, the conditions and the parameters in `predict.tensors`.

    gradient: "full" keeps every graph; "checkpoint" recomputes each network call, and its gradients are the same bits;
    "truncated:K" or "truncated:K:STYLE" lets only some steps carry gradient, in a style of `truncated.STYLES`.
    "revolve:C" stores C states at most; "adjoint:METHOD", "reversible:METHOD" and "lean" bring their own solver, with
    step=None. All modes are in docs/gradients.md.
    noise: one tensor a step, for stochastic steps; drawn outside, since a recomputed region cannot draw it again.

    Raises ValueError if nothing that the run depends on requires grad (outside of `torch.no_grad`), for a leaf that
    requires grad and is not in `predict.tensors`, for a scheduler as a step, and for a generator in it; the backward
    pass raises it if the network has changed in the meantime.
    """
    if step is not None:
        check_step(step)
    check_noise(noise)
    mode, option = parse_gradient(gradient)
    return mode(Run(step, predict, x, _legs(step, levels, noise), watching(), checked()), option)


def parse_gradient(gradient: str) -> tuple["Mode", str]:
    """A mode and what follows its colon: "truncated:10" -> (truncated, "10")."""
    name, _, option = gradient.partition(":")
    if name not in MODES:
        raise UserError(
            f"no gradient mode {gradient!r}; known: {', '.join(MODES)}, as in 'checkpoint' or 'truncated:10'"
        )
    return MODES[name], option


def full(run: Run, option: str) -> Path:
    """Every graph is kept: N network calls of memory."""
    no_option("full", option)
    return descend(run, run.predict, Path(widen(run.x)))


def checkpoint(run: Run, option: str) -> Path:
    """Each network call is recomputed from its input on the way back (https://arxiv.org/abs/1604.06174)."""
    no_option("checkpoint", option)
    return descend(run, Recomputed(run.predict), Path(widen(run.x)))


Mode = Callable[[Run, str], Path]
MODES: dict[str, Mode] = {f.__name__: f for f in (full, checkpoint, truncated, revolve, adjoint, reversible, lean)}


def _legs(step: Step | None, levels: Sequence[Noise], noise: Sequence[Tensor] | Tensor | None) -> list[Leg]:
    pairs = list(pairwise(levels))
    if noise is None and is_stochastic(step):
        raise UserError(f"a stochastic step needs noise that is drawn outside: pass {len(pairs)} tensors of x's shape")
    if noise is not None and len(noise) != len(pairs):
        raise UserError(f"{len(noise)} noise tensors for {len(pairs)} steps: pass one a step")
    noises: Iterable[Tensor | None] = [None] * len(pairs) if noise is None else noise
    return [(now, then, n) for (now, then), n in zip(pairs, noises, strict=True)]
