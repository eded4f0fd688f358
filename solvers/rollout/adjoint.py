"""The continuous adjoint: first the differential equation of the gradient, then a solver for it.

Along dw / dtau = u(w, tau) the gradient q = dL/dw = (alpha + sigma) dL/dx of a loss at the end obeys

    dq / dtau = -(du/dw)^T q,        dL/dtheta = integral of (du/dtheta)^T q dtau, from the end back to the start.

It is the gradient of the continuous flow, solved with an error of its own: not that of the sampler that was run.
States are stored, one latent a step, and each interval starts from its stored end, as torchdiffeq's odeint_adjoint on
the same grid does; on the way back each Runge-Kutta stage is one network call with its graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from solvers.denoiser import Path
from solvers.errors import UserError
from solvers.noise import Noise, log_snr
from solvers.rollout.ode import TABLEAUX, Flow, Tableau, checked_flow, clean, increment, scale, tau, weighted
from solvers.rollout.revolve import replayed
from solvers.rollout.run import Run, no_noise, no_step, observe
from solvers.rollout.sweep import Down, Gradients, Totals, given, plus, pulled, swept
from solvers.samplers.catalogue import euler, renoise
from solvers.samplers.singlestep import between


def adjoint(run: Run, option: str) -> Path:
    """The continuous adjoint by one of `ADJOINTS`; only "exact_endpoint" is exact for the sampler that it runs."""
    if option not in ADJOINTS:
        raise UserError(f"no adjoint method {option!r}; known: {', '.join(ADJOINTS)}, as in 'adjoint:heun'")
    no_step(f"adjoint:{option}", run)
    no_noise(f"adjoint:{option}", run)
    return ADJOINTS[option](run, f"adjoint:{option}")


def exact_endpoint(run: Run, mode: str) -> Path:
    """Euler's adjoint with each Jacobian taken at the start of its step, not at the end: then the sweep is that of the
    sampler itself, and exact. The same network calls; guidance with memory is carried."""
    return replayed(run._replace(step=euler), max(len(run.legs), 1))


def runge_kutta_adjoint(tableau: str) -> Callable[[Run, str], Path]:
    """A Runge-Kutta method in tau, both ways (AdjointDPM, https://arxiv.org/abs/2307.10711, which has Euler in rho)."""

    def solve(run: Run, mode: str) -> Path:
        return _solved(run, Continuous(run, Flow(run.predict, mode), TABLEAUX[tableau]))

    return solve


def deis_adjoint(order: int) -> Callable[[Run, str], Path]:
    """AdjointDEIS-1 or -2M (https://arxiv.org/abs/2405.15020) along a DDIM run."""

    def solve(run: Run, mode: str) -> Path:
        if any(now.alpha == 0 for now, *_ in run.legs):
            raise UserError(f"gradient mode {mode!r} divides by alpha, which is 0 at the start: use 'adjoint:heun'")
        return _solved(run, Exponential(run, Flow(run.predict, mode), order))

    return solve


ADJOINTS: dict[str, Callable[[Run, str], Path]] = {
    **{name: runge_kutta_adjoint(name) for name in TABLEAUX},
    "deis-1": deis_adjoint(1),
    "deis-2m": deis_adjoint(2),
    "exact_endpoint": exact_endpoint,
}


def _solved(run: Run, sweep: "Continuous | Exponential") -> Path:
    (x,), _ = swept(run, sweep)
    return Path(x, clean(x, run.legs[-1][1]))


@dataclass(frozen=True)
class Continuous:
    """A Runge-Kutta run in tau, and the same method on its adjoint equation."""

    run: Run
    flow: Flow
    tableau: Tableau

    def down(self, x: Tensor, check: bool) -> Down:
        w = x / scale(self.run.legs[0][0])
        states = [w]
        for i, (now, then, _) in enumerate(self.run.legs):
            flow = checked_flow(self.flow, self.run) if check and i == 0 else self.flow
            w = w + increment(self.tableau, flow, w, now, then)
            states.append(w)
        return Down([scale(self.run.legs[-1][1]) * w], states[1:])

    def up(self, down: Down, cotangents: Gradients, totals: Totals) -> Tensor | None:
        q = given(cotangents) * scale(self.run.legs[-1][1])
        for i, (now, then, _) in reversed(list(enumerate(self.run.legs))):
            q = q + self._back(down.kept[i], q, then, now, totals)
            observe(self.run, i, q / scale(now))
        return q / scale(self.run.legs[0][0])

    def _back(self, w: Tensor, q: Tensor, now: Noise, then: Noise, totals: Totals) -> Tensor:
        """One step of (w, q, dL/dtheta) against the sampler's direction; what it adds to q."""
        h = tau(then) - tau(now)
        slopes, pulls = list[Tensor](), list[Tensor]()
        for row, weight, c in zip(self.tableau.a, self.tableau.b, self.tableau.c, strict=True):
            at, at_q = w + h * weighted(row, slopes), q + h * weighted(row, pulls)
            u, pull, own = pulled(partial(self._slope, between(now, then, c)), at, at_q, totals)
            slopes.append(u)
            pulls.append(-pull)
            totals.add(own, -h * weight)
        return h * weighted(self.tableau.b, pulls)

    def _slope(self, at: Noise, w: Tensor) -> Tensor:
        return self.flow(w, at)


@dataclass(frozen=True)
class Exponential:
    """DDIM, and AdjointDEIS of order 1 or 2 on its states.

    With p = alpha dL/dx, rho = sigma / alpha and F = (d eps / dy)^T p for y = x / alpha, at t < s,

        p_s = p_t + (rho_t - rho_s) (F_t + (F_t - F_r) / (2 r)),    r = (lambda_t - lambda_r) / (lambda_s - lambda_t),

    where the second term is of the second order only, and vanishes where the earlier point r is at sigma = 0; the same
    for conditions and parameters, with F = (d eps / d theta)^T p. The order 1 is Euler's method in rho: AdjointDPM.
    """

    run: Run
    flow: Flow
    order: int

    def down(self, x: Tensor, check: bool) -> Down:
        states = []
        for i, (now, then, _) in enumerate(self.run.legs):
            flow = checked_flow(self.flow, self.run) if check and i == 0 else self.flow
            x = renoise(flow.said(x, now), then)
            states.append(x)
        return Down([x], states)

    def up(self, down: Down, cotangents: Gradients, totals: Totals) -> Tensor | None:
        before: Gradients | None = None
        p = given(cotangents) * self.run.legs[-1][1].alpha
        for i, (now, then, _) in reversed(list(enumerate(self.run.legs))):
            eps = lambda y, at=then: self.flow.said(at.alpha * y, at).eps  # noqa: E731
            _, pull, own = pulled(eps, down.kept[i] / then.alpha, p, totals)
            force: Gradients = [pull, *own]
            mean = force if before is None else extrapolated(force, before, self._weight(i))
            width = then.sigma / then.alpha - now.sigma / now.alpha
            p = p + width * given(mean)
            totals.add(mean[1:], width)
            observe(self.run, i, p / now.alpha)
            before = force if self.order == 2 else None
        return p / self.run.legs[0][0].alpha

    def _weight(self, i: int) -> Tensor:
        """1 / (2 r) of step i, which has a later one."""
        s, t, r = (log_snr(at) for at in (*self.run.legs[i][:2], self.run.legs[i + 1][1]))
        return (s - t) / (t - r) / 2


def extrapolated(force: Gradients, before: Gradients, weight: Tensor) -> Gradients:
    """f + weight (f - g), where None is zero."""
    return [
        plus(None if f is None else (1 + weight) * f, None if g is None else -weight * g)
        for f, g in zip(force, before, strict=True)
    ]
