"""Surrogate gradients: the run's own end, with the gradient of a shorter or of a straighter one.

A step from x_i adds to the latent what the network emits there, and carries the rest along a line. What is emitted is a
velocity on the levels of a flow, v of a network that predicts v, and eps elsewhere. Held, it is taken as the
network's own and not as a function of x_i: then the gradient of the end passes around the network, and no product of
its Jacobians arises. On a flow with steps D_i = t_{i+1} - t_i, g_i = dv_i / dtheta and J_j = dv_j / dx, the end's
gradient is

    "MASK,SCALE:held"          SCALE sum of D_i g_i over the steps with a 1           (FlowBP, arXiv 2606.11075; DRTune)
    "MASK,SCALE,J,ALPHA:bridge"   the same, and where the J-th step is met, ALPHA of its Jacobian goes along
    "K,J,ALPHA[,TAU]:leap"     -t_j g_j + (1 - ALPHA t_j J_j) (t_j - t_k) g_k              (LeapAlign, arXiv 2604.15311)
    "I,J[,SCALE]:direct"       SCALE (t_j - t_i) / (1 - t_j) g_i, at the end, noised again     (SRPO, arXiv 2509.06942)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers.denoiser import Denoiser, Path, Predict, Prediction, lines, target, widen
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.rollout.recompute import Recomputed, reachable
from solvers.rollout.run import Run, descend, first, step_of
from solvers.samplers.step import renoise


def held_steps(run: Run, option: str) -> Path:
    """The network's output is held at all steps, and trained at those with a 1: "MASK[,SCALE]"."""
    mask, scale = parse_held(option, len(run.legs))
    path = Path(widen(run.x))
    for i, keep in enumerate(mask):
        path = descend(run, held(run, scale * keep), path, i, i + 1)
    return path


def bridge(run: Run, option: str) -> Path:
    """As `held_steps`, "MASK,SCALE,J,ALPHA": and the network's input at step J passes on ALPHA of the gradient, so that
    earlier steps learn what the later one makes of them."""
    mask, scale, join, alpha = parse_bridge(option, len(run.legs))
    path = Path(widen(run.x))
    for i, keep in enumerate(mask):
        path = descend(run, held(run, scale * keep, alpha if i == join else 0.0), path, i, i + 1)
    return path


def leap(run: Run, option: str) -> Path:
    """Two straight steps, from x_k to x_j and from x_j to the end, whose values are the run's own: "K,J,ALPHA[,TAU]".

    TAU: the gradient is divided by max(d_j, TAU) + max(d_0, TAU), the mean distances of a sample's two leaps from where
    the run came; left out: it is not.
    """
    start, join, alpha, tau = parse_leap(option, len(run.legs))
    before = without_graph(run, start)
    landed, there = _leap(run, before, start, join, 0.0)
    at_join = replace(there, x=_straight(landed, there.x))
    clean, end = _leap(run, at_join, join, len(run.legs), alpha)
    if tau is not None:
        gaps = _distance(landed, there.x).clamp(min=tau) + _distance(clean, end.x).clamp(min=tau)
        clean = scaled(clean, 1 / gaps.view(-1, *[1] * (clean.ndim - 1)))
    return replace(end, x=_straight(clean, end.x))


def _leap(run: Run, path: Path, start: int, stop: int, alpha: float) -> tuple[Tensor, Path]:
    """Where one straight step from level `start` to level `stop` would lead, under a graph, and where the run led."""
    then = run.legs[stop - 1][1]
    noted: list[Tensor] = []

    def predict_once(path: Path, at: Noise) -> Prediction:
        said = held(run, 1.0, alpha)(path, at)
        noted.append(renoise(said, then))
        return said

    after = first(run, Bound(run.predict, predict_once), path, start).detach()
    with torch.no_grad():
        for i in range(start + 1, stop):
            after = step_of(run)(run.predict, after, *run.legs[i])
    return noted[0], after


@dataclass(frozen=True)
class Bound:
    """A function as a `Predict` of another one's tensors."""

    predict: Predict
    call: Callable[[Path, Noise], Prediction]

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.predict.tensors

    def __call__(self, path: Path, at: Noise) -> Prediction:
        return self.call(path, at)


def direct(run: Run, option: str) -> Path:
    """The run's end is noised to level I by the noise that the run began with, one step leads to level J, and the clean
    image is found again from that noise: "I,J[,SCALE]". It is a step down if I comes first in the run, else one up,
    whose gradient is the other way: a SCALE of -1 turns it round (SRPO)."""
    now, then, scale = parse_direct(option, run)
    clean = without_graph(run, len(run.legs))
    eps = widen(run.x.detach()) / run.legs[0][0].sigma
    start = replace(clean, x=renoise(Prediction(clean.x, eps), now), x0=None)
    said = Recomputed(run.predict)(start, now)
    x0 = scaled((renoise(said, then) - then.sigma * eps) / then.alpha, scale)
    return replace(clean, x=x0, x0=x0)


# ------------------------------------------------------------------------------------------------ held outputs


@dataclass(frozen=True)
class Held:
    """`predict` whose output is held: gradients pass around the network, and `scale` times into its parameters.

    alpha: the share of the gradient that passes through the network's input too. With scale 0 the network is called
    without a graph. The numbers are those of `predict`, to the bit.
    """

    predict: Predict
    scale: float
    alpha: float
    space: str  # of what is held: flow, v or eps

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.predict.tensors

    def __call__(self, path: Path, at: Noise) -> Prediction:
        start = path.detach()
        if self.scale:
            inside = replace(start, x=scaled(path.x, self.alpha)) if self.alpha else start
            said = Recomputed(self.predict)(inside, at)
        else:
            with torch.no_grad():
                said = self.predict(start, at)
        space = "x0" if self.space == "eps" and at.alpha == 0 else self.space
        out = target(space, said.x0, said.eps, *at)
        p, q, m, n = lines(space, at)
        moved, learnt = path.x - start.x, self.scale * (out - out.detach())  # zeros, with the gradients
        x0 = said.x0.detach() + p * moved + q * learnt
        return said._replace(x0=x0, eps=said.eps.detach() + m * moved + n * learnt)


def held(run: Run, scale: float, alpha: float = 0.0) -> Held:
    """The run's `predict` with its output held."""
    return Held(run.predict, scale, alpha, held_space(run))


def held_space(run: Run) -> str:
    """What is held: the velocity on the levels of a flow, v of networks that predict v, and eps otherwise.

    On its way around a held eps the gradient is multiplied by alpha_{i+1} / alpha_i at every step, around a held v by
    less than 1. The papers mean the former, of networks that predict eps. For one that predicts v it would give the
    noisiest steps up to 1 / alpha times their weight.
    """
    levels = [run.legs[0][0], *(then for _, then, _ in run.legs)]
    if all(abs(float(at.alpha + at.sigma) - 1) < 1e-6 for at in levels):
        return "flow"
    return "v" if {network.prediction_type for network in reachable(run.predict, Denoiser)} == {"v"} else "eps"


def scaled(x: Tensor, scale: float | Tensor) -> Tensor:
    """x itself, with so much of its gradient."""
    return x.detach() + scale * (x - x.detach())


def _straight(x: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of x."""
    return value.detach() + (x - x.detach())


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """The mean distance (B,) of each sample."""
    return (x - y).detach().abs().flatten(1).mean(1)


def without_graph(run: Run, count: int) -> Path:
    """The path after the first steps, cut off from x; x itself where there are none."""
    path = Path(widen(run.x))
    if not count:
        return path
    with torch.no_grad():
        return descend(run, run.predict, path.detach(), 0, count)


# ------------------------------------------------------------------------------------------------ what is written


def parse_held(option: str, steps: int) -> tuple[list[bool], float]:
    """([False, True, False, True], 1.5) of "0101,1.5"; the scale is 1 if left out."""
    mask, scale = _numbers(option, 1, 2, "MASK[,SCALE]:held")
    return _mask(option, mask, steps), float(scale or 1.0)


def parse_bridge(option: str, steps: int) -> tuple[list[bool], float, int, float]:
    """Reads "0101,1,3,0.5": the mask, the scale, the step J, and the share of the gradient that its input passes on."""
    mask, scale, join, alpha = _numbers(option, 4, 4, "MASK,SCALE,J,ALPHA:bridge")
    kept = _mask(option, mask, steps)
    if not (join.isdecimal() and int(join) < steps and kept[int(join)]):
        raise UserError(f"'truncated:{option}' joins at step {join}, which its mask does not train")
    return kept, float(scale), int(join), float(alpha)


def parse_leap(option: str, steps: int) -> tuple[int, int, float, float | None]:
    """Reads "0,2,0.3,0.1": the two steps, the share of the gradient between them, and the least distance."""
    start, join, alpha, tau = _numbers(option, 3, 4, "K,J,ALPHA[,TAU]:leap")
    if not (start.isdecimal() and join.isdecimal() and int(start) < int(join) < steps):
        raise UserError(f"'truncated:{option}' wants two steps, 0 <= K < J < {steps}, as in '0,2,0.3:leap'")
    if tau and float(tau) == 0:
        raise UserError(f"'truncated:{option}' divides by a distance of at least TAU: give it above 0, or leave it out")
    return int(start), int(join), float(alpha), float(tau) if tau else None


def parse_direct(option: str, run: Run) -> tuple[Noise, Noise, float]:
    """Reads "2,3" or "3,2,-1": the two levels, which are between the run's first and last, and the scale, which is 1 if
    left out."""
    now, then, scale = _numbers(option, 2, 3, "I,J[,SCALE]:direct", signed=True)
    inner = range(1, len(run.legs))
    if not (now.isdecimal() and then.isdecimal() and int(now) in inner and int(then) in inner and now != then):
        raise UserError(f"'truncated:{option}' wants two levels of 1 to {len(run.legs) - 1}, as in '2,3:direct'")
    return run.legs[int(now)][0], run.legs[int(then)][0], float(scale or 1.0)


def _numbers(option: str, least: int, most: int, form: str, signed: bool = False) -> list[str]:
    """What stands between the commas, filled up with nothing. UserError unless all are numbers, of at least 0 if
    they are not `signed`."""
    parts = option.rpartition(":")[0].split(",")
    if not least <= len(parts) <= most or not all(
        _is_number(part.removeprefix("-") if signed else part) for part in parts
    ):
        raise UserError(f"'truncated:{option}' is written {form}")
    return [*parts, *[""] * (most - len(parts))]


def _is_number(text: str) -> bool:
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False


def _mask(option: str, digits: str, steps: int) -> list[bool]:
    if set(digits) - {"0", "1"} or len(digits) != steps:
        raise UserError(
            f"'truncated:{option}' wants {steps} digits, 1 for a step that carries gradient and 0 for others"
        )
    return [digit == "1" for digit in digits]


SURROGATES: dict[str, Callable[[Run, str], Path]] = {
    "held": held_steps,
    "bridge": bridge,
    "leap": leap,
    "direct": direct,
}
