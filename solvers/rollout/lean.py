"""The lean adjoint of adjoint matching (https://arxiv.org/abs/2409.08861).

On the states x_k of a memoryless run (eta = 1) of the model that is trained, with Phi the mean of one such step of the
frozen base model,

    a_N = dL/dx_N,        a_k = (dPhi_base / dx_k)^T a_{k+1}.

The base model's Jacobians stand in for the trained one's, and the control that separates the two has none: this is the
vector that adjoint matching regresses the control on, and the exact gradient only where the two models agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from solvers.denoiser import Path, Predict, Prediction, pack, unpack
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.rollout.revolve import Replay, replayed
from solvers.rollout.run import Leg, Run, no_option, no_step, observe
from solvers.rollout.sweep import Down, Gradients, Totals, given, replaying, swept, vjp
from solvers.samplers.catalogue import ancestral


@dataclass(frozen=True)
class WithBase:
    """A `Predict` that is trained, with the frozen one that it started from: what the mode `lean` differentiates."""

    predict: Predict
    base: Predict

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.predict.tensors

    def __call__(self, path: Path, at: Noise) -> Prediction:
        return self.predict(path, at)


def lean(run: Run, option: str) -> Path:
    """A memoryless run (`ancestral`, eta = 1) whose gradient for x is the lean adjoint a_0 of the base.

    Conditions and parameters get the sum of (dPhi / dtheta)^T a_{k+1} of the trained model: adjoint matching's gradient
    without the control's own term. Without a base (`WithBase`) the model is its own, and all are exact for its sampler.
    Noise is needed, one tensor a step. With guidance in the base, a_k grows; the paper's runs have none there.
    """
    no_option("lean", option)
    no_step("lean", run)
    if any(noise is None for *_, noise in run.legs):
        raise UserError(f"gradient mode 'lean' samples with eta = 1: pass {len(run.legs)} noise tensors of x's shape")
    if not isinstance(run.predict, WithBase):
        return replayed(run._replace(step=ancestral), max(len(run.legs), 1))
    ends, note = swept(run, Lean(run._replace(step=_alone), run.predict))
    return unpack(ends, note.end)


def lean_sweep(base: Predict, states: Sequence[Tensor], levels: Sequence[Noise], gradient: Tensor) -> list[Tensor]:
    """The lean adjoints a_0 ... a_N, each (B, ...), along the states x_0 ... x_N of a memoryless run at `levels`.

    gradient: a_N = dL/dx_N. N network calls with their graphs, one at a time; parameters get nothing.
    """
    adjoints = [gradient.detach()]
    legs = [(now, then, torch.zeros(())) for now, then in pairwise(levels)]
    for x, leg in reversed(list(zip(states[:-1], legs, strict=True))):
        _, pulls, _ = vjp(_moved(base, leg), [x], [], [adjoints[-1], None])
        adjoints.append(given(pulls))
    return adjoints[::-1]


@dataclass(frozen=True)
class Lean:
    """A stochastic run, and the sweep whose Jacobians of the states are the base's."""

    run: Run
    models: WithBase

    def down(self, x: Tensor, check: bool) -> Down:
        return Replay(self.run, max(len(self.run.legs), 1)).down(x, check)

    def up(self, down: Down, cotangents: Gradients, totals: Totals) -> Tensor | None:
        for i, path in reversed(down.note.states):
            with replaying(down.note.random.get(i)):
                _, _, own = vjp(_moved(self.models.predict, self.run.legs[i]), [path.x], totals.tensors, cotangents)
            totals.add(own)
            _, (pull,), _ = vjp(_moved(self.models.base, self.run.legs[i]), [path.x], [], cotangents)
            observe(self.run, i, pull)
            cotangents = [pull, None]
        return cotangents[0]


def _moved(predict: Predict, leg: Leg) -> Callable[[Tensor], Sequence[Tensor]]:
    """x -> (x', x0) of one step."""
    return lambda x: pack(_alone(predict, Path(x), *leg))[0]


def _alone(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """`ancestral`. Raises ValueError for guidance with memory, which the two models would not share."""
    path = ancestral(predict, path, now, then, noise)
    if path.memory:
        raise UserError(
            f"the guidance carries {', '.join(path.memory)} from step to step, which gradient mode 'lean' cannot with a"
            " base: use 'checkpoint' with a step, or guidance without memory"
        )
    return path
