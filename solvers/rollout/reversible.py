"""Samplers that run backwards exactly: their gradients need no stored states, and real images can be inverted.

Each is a chain of shears on a pair of states (a, b): one of the two becomes

    a' = scale a + move(b),        hence        a = (a' - move(b)) / scale,

where move, which calls the network, sees only the other. A shear inverts, and its gradient is found, with one network
call. What rounding adds is multiplied by 1 / scale on the way back; where the product would exceed 1e-3 the method is
refused. u and tau are those of `solvers.rollout.ode`, so all but `edict` run from alpha = 0 to sigma = 0.

    sampler = reversible_sampler("alf", predict, levels)
    noise = sampler.up(sampler.pair(image_latents))         # exact inversion, of any latents
    same = sampler.latent(sampler.down(noise))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.denoiser import Path, Predict, widen
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.rollout.ode import TABLEAUX, Checked, Flow, clean, increment, scale, tau
from solvers.rollout.run import Run, no_noise, no_step, observe
from solvers.rollout.sweep import Down, Gradients, Totals, given, pulled, swept, vjp
from solvers.samplers.catalogue import renoise
from solvers.samplers.singlestep import between

Pair = tuple[Tensor, Tensor]
LIMIT = 1e-3  # of the round-off on the way back, relative
DRIFT = 1e-2  # of the start as recovered, relative: a half-precision network may cost 1e-3


class Shear(NamedTuple):
    """pair[target] becomes scale * pair[target] + move(pair[1 - target])."""

    target: int
    scale: float | Tensor
    move: Callable[[Tensor], Tensor]

    def down(self, pair: Pair) -> Pair:
        return self._put(pair, self.scale * pair[self.target] + self.move(pair[1 - self.target]))

    def up(self, pair: Pair, moved: Tensor | None = None) -> Pair:
        """The pair before; `moved` is what move gives, where it is known."""
        moved = self.move(pair[1 - self.target]) if moved is None else moved
        return self._put(pair, (pair[self.target] - moved) / self.scale)

    def _put(self, pair: Pair, value: Tensor) -> Pair:
        return (value, pair[1]) if self.target == 0 else (pair[0], value)


@dataclass(frozen=True)
class Reversible:
    """A reversible sampler at fixed levels. Its pairs are in coordinates of its own; `latent` and `pair` convert."""

    levels: Sequence[Noise]
    unit: Callable[[Noise], Tensor]  # latent / its own coordinates
    begin: Callable[[Tensor], Pair]  # the pair that starts from one state
    source: int  # where that state is in the pair
    legs: Sequence[Sequence[Shear]]
    finish: int  # where the run's end is in the last pair
    invert: Callable[[Tensor], Pair]  # a last pair of one state
    growth: float  # of round-off, from the end to the start

    def start(self, x: Tensor) -> Pair:
        """The first pair of a run from a latent (B, ...) at levels[0]."""
        return self.begin(widen(x) / self.unit(self.levels[0]))

    def down(self, pair: Pair) -> Pair:
        """The last pair of the run that starts with this one."""
        for leg in self.legs:
            for shear in leg:
                pair = shear.down(pair)
        return pair

    def up(self, pair: Pair) -> Pair:
        """The first pair of the run that ends with this one: the exact inverse of `down`."""
        for leg in reversed(self.legs):
            for shear in reversed(leg):
                pair = shear.up(pair)
        return pair

    def latent(self, pair: Pair) -> Tensor:
        """The latent (B, ...) at levels[-1] of a last pair."""
        return self.unit(self.levels[-1]) * pair[self.finish]

    def pair(self, x: Tensor) -> Pair:
        """A last pair whose latent is x (B, ...) at levels[-1]: what an inversion starts from."""
        return self.invert(widen(x) / self.unit(self.levels[-1]))

    def noise(self, pair: Pair) -> Tensor:
        """The latent (B, ...) at levels[0] of a first pair; it names the run where the pair is start(noise(pair))."""
        return self.unit(self.levels[0]) * pair[self.source]


def reversible(run: Run, option: str) -> Path:
    """Exact for its own sampler, from the last pair of states alone: one of `REVERSIBLE`, as in "bdia" or
    "mccallum-foster:midpoint", and for some a coefficient, as in "edict:0.95"."""
    _parsed(option)
    no_step(f"reversible:{option}", run)
    no_noise(f"reversible:{option}", run)
    levels = [run.legs[0][0], *(then for _, then, _ in run.legs)]
    build = partial(reversible_sampler, option, levels=levels, dtype=widen(run.x).dtype)
    (x,), _ = swept(run, Invert(run, build(run.predict), build(Checked(run))))
    return Path(x, clean(x, levels[-1]))


def reversible_sampler(
    option: str, predict: Predict, levels: Sequence[Noise], dtype: torch.dtype = torch.float32
) -> Reversible:
    """The sampler of the gradient mode "reversible:OPTION", forward and inverse.

    dtype: of the states; ValueError where round-off in it would grow beyond 1e-3 on the way back.
    """
    method, coefficient = _parsed(option)
    sampler = method(Flow(predict, f"reversible:{option}"), levels, coefficient)
    error = sampler.growth * torch.finfo(dtype).eps
    if error > LIMIT:
        raise UserError(
            f"reversible:{option} over {len(levels) - 1} steps in {dtype} would let round-off grow to {error:.0e}, more"
            f" than {LIMIT:.0e}: use 'reversible:bdia' or 'reversible:alf', fewer steps, or x in float64"
        )
    return sampler


@dataclass(frozen=True)
class Invert:
    """A reversible run, and its gradient along the inverse run."""

    run: Run
    sampler: Reversible
    checked: Reversible  # the same, for the first step

    def down(self, x: Tensor, check: bool) -> Down:
        sampler = self.checked if check else self.sampler
        pair = sampler.start(x)
        pair = replace(sampler, legs=sampler.legs[:1]).down(pair)
        pair = replace(self.sampler, legs=self.sampler.legs[1:]).down(pair)
        return Down([self.sampler.latent(pair)], [x, *pair])

    def up(self, down: Down, cotangents: Gradients, totals: Totals) -> Tensor | None:
        (x, *ends), sampler = down.kept, self.sampler
        pair, own = (ends[0], ends[1]), given(cotangents) * sampler.unit(sampler.levels[-1])
        pulls = [own if i == sampler.finish else torch.zeros_like(own) for i in range(2)]
        for i, leg in reversed(list(enumerate(sampler.legs))):
            for shear in reversed(leg):
                pair = _back(shear, pair, pulls, totals)
            observe(self.run, i, *pulls)
        self._check_drift(x, pair, ends[sampler.finish])
        _, (pull,), own_start = vjp(sampler.start, [x], totals.tensors, pulls)
        totals.add(own_start)
        return pull

    def _check_drift(self, x: Tensor, pair: Pair, end: Tensor) -> None:
        drift = ((self.sampler.noise(pair) - x).norm() / torch.maximum(x.norm(), end.norm())).item()
        if not drift <= DRIFT:
            raise FloatingPointError(
                f"the inverse run misses its start by {drift:.1e} (relative), so its gradient is wrong: the network has"
                " changed since the run, or is too stiff for this method; use 'checkpoint' with a step, or more steps"
            )


def _back(shear: Shear, pair: Pair, pulls: list[Tensor], totals: Totals) -> Pair:
    """The pair before a shear; `pulls`, the gradients for the pair, move along."""
    target, other = shear.target, 1 - shear.target
    moved, pull, own = pulled(shear.move, pair[other], pulls[target], totals)
    totals.add(own)
    pulls[other] = pulls[other] + pull
    pulls[target] = shear.scale * pulls[target]
    return shear.up(pair, moved)


Method = Callable[[Flow, Sequence[Noise], float], Reversible]


def bdia(flow: Flow, levels: Sequence[Noise], gamma: float) -> Reversible:
    """BDIA (https://arxiv.org/abs/2307.10829), from DDIM's steps in both directions:

    x_{i+1} = DDIM(x_i -> i+1) + gamma (x_{i-1} - DDIM(x_i -> i-1)),        pair (x_{i-1}, x_i), x_1 by DDIM.

    Order 2 with gamma = 1, order 1 below, where round-off grows by 1 / gamma a step.
    """

    def move(i: int, x: Tensor) -> Tensor:
        said = flow.said(x, levels[i])
        return renoise(said, levels[i + 1]) - gamma * renoise(said, levels[i - 1])

    def ddim(now: Noise, then: Noise, x: Tensor) -> Tensor:
        return renoise(flow.said(x, now), then)

    return _leapfrog(levels, lambda at: torch.ones(()), ddim, [gamma] * len(levels), move, gamma ** (2 - len(levels)))


def belm(flow: Flow, levels: Sequence[Noise], _: float) -> Reversible:
    """O-BELM (https://arxiv.org/abs/2410.07273) in tau, the leapfrog rule on a grid of any widths h:

    w_{i+1} = q w_{i-1} + (1 - q) w_i + h_i (1 + h_i / h_{i-1}) u_i,        q = (h_i / h_{i-1})^2,        order 2.
    """
    h = _widths(levels)
    q = [1.0, *((b / a) ** 2 for a, b in pairwise(h))]

    def move(i: int, w: Tensor) -> Tensor:
        return (1 - q[i]) * w + h[i] * (1 + h[i] / h[i - 1]) * flow(w, levels[i])

    def euler(now: Noise, then: Noise, w: Tensor) -> Tensor:
        return w + (tau(then) - tau(now)) * flow(w, now)

    return _leapfrog(levels, scale, euler, q, move, max((width / h[-1]) ** 2 for width in h))


def _leapfrog(
    levels: Sequence[Noise],
    unit: Callable[[Noise], Tensor],
    step: Callable[[Noise, Noise, Tensor], Tensor],
    scales: Sequence[float],
    move: Callable[[int, Tensor], Tensor],
    growth: float,
) -> Reversible:
    """A two-step method: the state i+1 takes the place of i-1, so state i is at place i % 2; `step` makes state 1."""
    n = len(levels) - 1

    def pair(first: int, then: int, x: Tensor) -> Pair:
        """State `first`, which is x, and its neighbour `then`, each in its place."""
        other = step(levels[first], levels[then], x)
        return (x, other) if first % 2 == 0 else (other, x)

    legs = [[Shear((i + 1) % 2, scales[i], partial(move, i))] if i else [] for i in range(n)]
    return Reversible(levels, unit, partial(pair, 0, 1), 0, legs, n % 2, partial(pair, n, n - 1), growth)


def alf(flow: Flow, levels: Sequence[Noise], _: float) -> Reversible:
    """Asynchronous leapfrog (https://arxiv.org/abs/2102.04668), pair (w, v), v_0 = u(w_0):

    k = w + h/2 v,        v' = 2 u(k, tau + h/2) - v,        w' = k + h/2 v',        order 2.
    """

    def leg(now: Noise, then: Noise) -> list[Shear]:
        half = Shear(0, 1.0, lambda v: (tau(then) - tau(now)) / 2 * v)
        return [half, Shear(1, -1.0, lambda k: 2 * flow(k, between(now, then, 0.5))), half]

    begin = lambda at, w: (w, flow(w, at))  # noqa: E731
    legs = [leg(now, then) for now, then in pairwise(levels)]
    return Reversible(levels, scale, partial(begin, levels[0]), 0, legs, 0, partial(begin, levels[-1]), 1.0)


def reversible_heun(flow: Flow, levels: Sequence[Noise], _: float) -> Reversible:
    """Reversible Heun (https://arxiv.org/abs/2105.13493) with one call a step:

    z' = 2 y - z + h u(z, tau),        y' = y + h/2 (u(z, tau) + u(z', tau')),        y_0 = z_0,        order 2.

    The pair is (y + h/2 u(z), z) with h the width of the step that follows, so that z' = 2 a - z.
    """
    h = [*_widths(levels), 0.0]

    def leg(i: int) -> list[Shear]:
        pushed = lambda z: (h[i] + h[i + 1]) / 2 * flow(z, levels[i + 1])  # noqa: E731
        return [Shear(1, -1.0, lambda a: 2 * a), Shear(0, 1.0, pushed)]

    begin = lambda w: (w + h[0] / 2 * flow(w, levels[0]), w)  # noqa: E731
    return Reversible(levels, scale, begin, 1, [leg(i) for i in range(len(levels) - 1)], 0, _twice, 1.0)


def mccallum_foster(tableau: str, flow: Flow, levels: Sequence[Noise], zeta: float) -> Reversible:
    """McCallum and Foster's reversible form of any one-step method Psi (https://arxiv.org/abs/2410.11648):

    y' = zeta y + (1 - zeta) z + Psi_h(z, tau),        z' = z - Psi_{-h}(y', tau'),        y_0 = z_0,

    at least of Psi's order; round-off grows by 1 / zeta a step. Of a Psi with stages, one graph at a time is kept.
    """
    method, flow = TABLEAUX[tableau], replace(flow, recomputed=len(TABLEAUX[tableau].b) > 1)

    def leg(now: Noise, then: Noise) -> list[Shear]:
        forth = lambda z: (1 - zeta) * z + increment(method, flow, z, now, then)  # noqa: E731
        return [Shear(0, zeta, forth), Shear(1, 1.0, lambda y: -increment(method, flow, y, then, now))]

    legs = [leg(now, then) for now, then in pairwise(levels)]
    return Reversible(levels, scale, _twice, 0, legs, 0, _twice, zeta ** -len(legs))


def edict(flow: Flow, levels: Sequence[Noise], p: float) -> Reversible:
    """EDICT (https://arxiv.org/abs/2211.12446), two coupled DDIM runs, x' = A x + B eps(y) and y' = A y + B eps(x'),

    mixed after each step as x = p x' + (1 - p) y' and y = p y' + (1 - p) x. Order 1 with a large constant; round-off
    grows by p^-2 a step. A = alpha' / alpha: ValueError if the run starts from alpha = 0.
    """
    if levels[0].alpha == 0:
        raise UserError("reversible:edict divides by alpha, which is 0 at the start: use 'reversible:bdia'")

    def leg(now: Noise, then: Noise) -> list[Shear]:
        a = then.alpha / now.alpha
        step = lambda other: (then.sigma - a * now.sigma) * flow.said(other, now).eps  # noqa: E731
        mix = lambda other: (1 - p) * other  # noqa: E731
        return [Shear(0, a, step), Shear(1, a, step), Shear(0, p, mix), Shear(1, p, mix)]

    legs = [leg(now, then) for now, then in pairwise(levels)]
    return Reversible(levels, lambda at: torch.ones(()), _twice, 0, legs, 0, _twice, p ** (-2 * len(legs)))


def _twice(x: Tensor) -> Pair:
    return x, x


def _widths(levels: Sequence[Noise]) -> list[float]:
    """The steps in tau."""
    return [(tau(then) - tau(now)).item() for now, then in pairwise(levels)]


REVERSIBLE: dict[str, tuple[Method, float | None]] = {  # with the coefficient that may follow, and its default
    "bdia": (bdia, 1.0),
    "alf": (alf, None),
    "belm": (belm, None),
    "reversible-heun": (reversible_heun, None),
    **{f"mccallum-foster:{name}": (partial(mccallum_foster, name), 0.999) for name in TABLEAUX},
    "edict": (edict, 0.93),
}


def _parsed(option: str) -> tuple[Method, float]:
    """A method and its coefficient: "edict:0.95" -> (edict, 0.95)."""
    if option in REVERSIBLE:
        method, default = REVERSIBLE[option]
        return method, default or 0.0
    name, _, number = option.rpartition(":")
    if name in REVERSIBLE and REVERSIBLE[name][1] is not None:
        if not (number.replace(".", "", 1).isdecimal() and 0 < float(number) <= 1):
            raise UserError(f"'reversible:{option}' wants a coefficient above 0 and up to 1, got {number!r}")
        return REVERSIBLE[name][0], float(number)
    raise UserError(
        f"no reversible sampler {option!r}; known: {', '.join(REVERSIBLE)}, where a coefficient may follow bdia,"
        " mccallum-foster:TABLEAU and edict, as in 'reversible:edict:0.95'"
    )
