"""Runge-Kutta samplers: several network calls a step, no history.

With k = sigma / alpha, x0 and eps are constant along a straight line in two coordinates,

    w = x / (alpha + sigma),  tau = sigma / (alpha + sigma),   dw/dtau = eps - x0      finite at pure noise and at data,
    y = x / alpha,            rho = sigma / alpha = k,         dy/drho = eps           finite but at pure noise.

No stage is ever at sigma = 0, where a network that predicts x0 has no eps. A method that would call the network there
takes the last step of another method, which its docstring names.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isclose
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.denoiser import Path, Predict, Prediction
from solvers.noise import Noise, log_snr
from solvers.samplers.step import end, shift_of

Weights = Sequence[float | Tensor]
Stage = tuple[Noise, Weights]  # where the network is called, and what it weighs the moves of the stages before


class Axis(NamedTuple):
    """A coordinate z = x / scale in which the probability flow is dz/dtime = slope."""

    scale: Callable[[Noise], Tensor]
    time: Callable[[Noise], Tensor]
    slope: Callable[[Prediction], Tensor]


TAU = Axis(lambda at: at.alpha + at.sigma, lambda at: at.sigma / (at.alpha + at.sigma), lambda p: p.eps - p.x0)
RHO = Axis(lambda at: at.alpha, lambda at: at.sigma / at.alpha, lambda p: p.eps)
COORDINATES = (torch.hypot, lambda alpha, sigma: alpha)  # VP, VE: what is 1 at each level; a flow's sum if neither

LONGEST = 8.0  # in lambda: x / alpha grows by e^h, and a difference of two of those has to be right in float32


def runge_kutta(
    predict: Predict, path: Path, now: Noise, then: Noise, axis: Axis, stages: Sequence[Stage], weights: Weights
) -> Path:
    """z' = z + sum_j weights_j v_j, where v_j = (t' - t) slope_j is the whole step along the slope of stage j.

    A stage's shift s equals guidance of its x0 by s / (1 - k'/k), with the k of the step's two ends in every stage:
    that adds (alpha' / scale') (t / t_j) s to v_j. Every stage reads the memory that the step started with, and the
    step keeps what the first one wrote.
    """
    z = path.x / axis.scale(now)
    said: list[Prediction] = []
    moves: list[Tensor] = []
    for at, row in stages:
        stage = replace(path, x=axis.scale(at) * _moved(z, row, moves)) if row else path
        said.append(predict(stage, at))
        moves.append(_move(axis, said[-1], at, now, then))
    x, p = axis.scale(then) * _moved(z, weights, moves), said[-1]
    return end(path, x, then, Prediction(p.x0 + shift_of(p), p.eps, memory=said[0].memory))


def heun(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """Heun's method, the trapezoid rule, in tau. To sigma = 0 it is Euler's step.

    On the levels of a flow it is EDM's algorithm 1; elsewhere that is `edm_heun`, and this one is more accurate.
    """
    return _trapezoid(predict, path, now, then, TAU)


def edm_heun(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """Algorithm 1 of EDM (https://arxiv.org/abs/2206.00364), the trapezoid rule in k = sigma / alpha:

    d = eps(x, k),  x' = x + (k' - k) d,  x' = x + (k' - k) (d + eps(x', k')) / 2    with x / alpha for x,

    and Euler's step to sigma = 0. A step longer than `LONGEST` in lambda, as from pure noise, is that of `heun`.
    """
    return _trapezoid(predict, path, now, then, TAU if _too_long(now, then) else RHO)


def _trapezoid(predict: Predict, path: Path, now: Noise, then: Noise, axis: Axis) -> Path:
    if then.sigma == 0:
        return runge_kutta(predict, path, now, then, TAU, [(now, ())], (1,))
    return runge_kutta(predict, path, now, then, axis, [(now, ()), (then, (1,))], (1 / 2, 1 / 2))


def midpoint(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """The explicit midpoint rule: the slope halfway in tau carries the whole step."""
    middle = between(now, then, 1 / 2)
    return runge_kutta(predict, path, now, then, TAU, [(now, ()), (middle, (1 / 2,))], (0, 1))


def heun3(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """Heun's third-order rule in tau, at 0, 1/3 and 2/3 of the step: it never calls the network at `then`."""
    one, two = between(now, then, 1 / 3), between(now, then, 2 / 3)
    stages = [(now, ()), (one, (1 / 3,)), (two, (0, 2 / 3))]
    return runge_kutta(predict, path, now, then, TAU, stages, (1 / 4, 0, 3 / 4))


def rk4(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """Classical Runge-Kutta in tau. To sigma = 0 it is Heun's third-order rule: one step, so the order stays 4."""
    if then.sigma == 0:
        return heun3(predict, path, now, then)
    middle = between(now, then, 1 / 2)
    stages = [(now, ()), (middle, (1 / 2,)), (middle, (0, 1 / 2)), (then, (0, 0, 1))]
    return runge_kutta(predict, path, now, then, TAU, stages, (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def dpm_2(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """DPM-Solver-2 (https://arxiv.org/abs/2206.00927): in y, the slope halfway in lambda = log(alpha / sigma),

    x' = (alpha'/alpha) x - sigma' (e^h - 1) eps(lambda + h/2),      h = lambda' - lambda.

    A step longer than `LONGEST` in lambda, as from pure noise and to data, is that of `midpoint`.
    """
    if _too_long(now, then):
        return midpoint(predict, path, now, then)
    middle = along_lambda(now, then, 1 / 2)
    return runge_kutta(predict, path, now, then, RHO, [(now, ()), (middle, (_part(now, middle, then),))], (0, 1))


def dpm_3(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """DPM-Solver-3 (https://arxiv.org/abs/2206.00927), with slopes at 1/3 and 2/3 of the step in lambda:

    u2 = (alpha_2/alpha) x - sigma_2 (e^{2h/3} - 1) eps - 2 sigma_2 ((e^{2h/3} - 1) / (2h/3) - 1) D1,
    x' = (alpha'/alpha) x - sigma' (e^h - 1) eps - 3/2 sigma' ((e^h - 1) / h - 1) D2,      D = eps at the stage - eps.

    A step longer than `LONGEST` in lambda, as from pure noise and to data, is that of `heun3`, its limit for small h.
    """
    if _too_long(now, then):
        return heun3(predict, path, now, then)
    h = log_snr(then) - log_snr(now)
    one, two = along_lambda(now, then, 1 / 3), along_lambda(now, then, 2 / 3)
    first, second = _part(now, one, then), _part(now, two, then)
    bend = 2 * torch.exp(h / 3) * ((2 * h / 3).expm1() / (2 * h / 3) - 1) / h.expm1()
    last = 3 / 2 * (1 / h - 1 / h.expm1())
    stages = [(now, ()), (one, (first,)), (two, (second - bend, bend))]
    return runge_kutta(predict, path, now, then, RHO, stages, (1 - last, 0, last))


def between(now: Noise, then: Noise, part: float) -> Noise:
    """The level at a part of the way from now to then in tau."""
    return _level(now, then, torch.lerp(TAU.time(now), TAU.time(then), part))


def along_lambda(now: Noise, then: Noise, part: float) -> Noise:
    """The level at a part of the way from now to then in lambda."""
    return _level(now, then, torch.sigmoid(-torch.lerp(log_snr(now), log_snr(then), part)))


def _level(now: Noise, then: Noise, tau: Tensor) -> Noise:
    """The level of a tau in the coordinates of the step's ends: VP, VE, or else a flow's."""
    alpha, sigma = 1 - tau, tau
    for size in COORDINATES:
        if all(isclose(size(*at), 1, abs_tol=1e-6) for at in (now, then)):
            return Noise(alpha / size(alpha, sigma), sigma / size(alpha, sigma))
    return Noise(alpha, sigma)


def _part(now: Noise, at: Noise, then: Noise) -> Tensor:
    """The share of the step in rho that lies before a level."""
    return (RHO.time(at) - RHO.time(now)) / (RHO.time(then) - RHO.time(now))


def _too_long(now: Noise, then: Noise) -> bool:
    """Whether a step in y would lose float32's digits, or has no length at all."""
    return not 0 < (log_snr(then) - log_snr(now)).abs() < LONGEST


def _move(axis: Axis, p: Prediction, at: Noise, now: Noise, then: Noise) -> Tensor:
    move = (axis.time(then) - axis.time(now)) * axis.slope(p)
    if p.shift is None:
        return move
    return move + then.alpha / axis.scale(then) * (axis.time(now) / axis.time(at)) * p.shift


def _moved(z: Tensor, weights: Weights, moves: Sequence[Tensor]) -> Tensor:
    for weight, move in zip(weights, moves, strict=True):
        if weight:
            z = z + weight * move
    return z
