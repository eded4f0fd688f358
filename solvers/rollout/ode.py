r"""The probability flow as an ordinary differential equation without stiff or singular ends, and Runge-Kutta on it.

With w = x / (alpha + sigma) and tau = sigma / (alpha + sigma), both finite from pure noise (alpha = 0) to data
(sigma = 0), the flow of every model is

    dw / dtau = u(w, tau) = eps - x0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from solvers.denoiser import Path, Predict, Prediction
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.rollout.recompute import NoGenerator
from solvers.rollout.run import Run, check_listed
from solvers.rollout.sweep import RandomState
from solvers.samplers.singlestep import between


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method."""

    a: Sequence[Sequence[float]]  # row j: the weights of the slopes before stage j
    b: Sequence[float]

    @property
    def c(self) -> list[float]:
        return [sum(row) for row in self.a]


TABLEAUX = {
    "euler": Tableau([[]], [1.0]),
    "midpoint": Tableau([[], [1 / 2]], [0.0, 1.0]),
    "heun": Tableau([[], [1.0]], [1 / 2, 1 / 2]),
    "rk4": Tableau([[], [1 / 2], [0.0, 1 / 2], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}


def scale(at: Noise) -> Tensor:
    """x / w."""
    return at.alpha + at.sigma


def tau(at: Noise) -> Tensor:
    return at.sigma / scale(at)


@dataclass(frozen=True)
class Flow:
    """A `Predict` as the vector field of the probability flow.

    It has no memory: a prediction that carries some, or CFG++'s shift, is an error that names it. `recomputed` drops
    what a call keeps for gradients and runs it again.
    """

    predict: Predict
    mode: str  # for the errors
    recomputed: bool = False

    def __call__(self, w: Tensor, at: Noise) -> Tensor:
        """u, in w's shape."""
        said = self.said(scale(at) * w, at)
        return said.eps - said.x0

    def said(self, x: Tensor, at: Noise) -> Prediction:
        """The prediction at (x, at)."""
        ask = lambda x: self._refused(self.predict(Path(x), at))  # noqa: E731
        return recompute(ask, x, use_reentrant=False) if self.recomputed and torch.is_grad_enabled() else ask(x)

    def _refused(self, said: Prediction) -> Prediction:
        carried = [*said.memory, *([] if said.shift is None else ["shift (CFG++)"])]
        if carried:
            raise UserError(
                f"the guidance carries {', '.join(carried)} from step to step, and gradient mode {self.mode!r} cannot:"
                " use 'checkpoint' or 'revolve:8' with a step, or guidance without memory"
            )
        return said


@dataclass(frozen=True)
class Checked:
    """`predict`, for the first step of a run: its graph tells whether `predict.tensors` is complete."""

    run: Run

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.run.predict.tensors

    def __call__(self, path: Path, at: Noise) -> Prediction:
        before = RandomState.now(path.x.device)
        with torch.enable_grad():
            with NoGenerator():
                said = self.run.predict(path, at)
            check_listed(self.run, [said.x0, said.eps])
        if before != RandomState.now(path.x.device):
            raise UserError(
                "the prediction draws random numbers (dropout?), and a mode that brings its own solver wants the same"
                " answer twice: call eval() on the network, or use 'checkpoint' or 'revolve:8' with a step"
            )
        return said._replace(x0=said.x0.detach(), eps=said.eps.detach())


def checked_flow(flow: Flow, run: Run) -> Flow:
    """`flow` for a run's first step, with its checks."""
    return replace(flow, predict=Checked(run))


def increment(tableau: Tableau, slope: Flow, w: Tensor, now: Noise, then: Noise) -> Tensor:
    """The increment of w in one step of a Runge-Kutta method."""
    h, slopes = tau(then) - tau(now), list[Tensor]()
    for row, c in zip(tableau.a, tableau.c, strict=True):
        slopes.append(slope(w + h * weighted(row, slopes), between(now, then, c)))
    return h * weighted(tableau.b, slopes)


def weighted(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor | float:
    """The sum of the terms with non-zero weights."""
    return sum((weight * term for weight, term in zip(weights, terms, strict=True) if weight), 0.0)


def clean(x: Tensor, at: Noise) -> Tensor | None:
    """The clean estimate at the end of a run: x / alpha at data, unknown elsewhere."""
    return x / at.alpha if at.sigma == 0 else None
