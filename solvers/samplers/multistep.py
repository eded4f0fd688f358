"""Samplers that remember: one network call a step, and the history in `path.memory`.

Each adds to the first-order step what a line through the present and the last prediction foretells. The history holds
unguided predictions, as CFG++ has it: the shift of a step is that of its own prediction, added by `end`.
"""

import torch
from torch import Tensor

from solvers.denoiser import Path, Predict, Prediction, along
from solvers.noise import Noise, log_snr
from solvers.samplers.step import drawn, end, renoise, shift_of, shrinkage, transition


def dpmpp_2m(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """DPM-Solver++(2M) (https://arxiv.org/abs/2211.01095): x0 is extrapolated in lambda = log(alpha / sigma),

    x' = (sigma'/sigma) x + alpha' (1 - e^-h) (x0 + h / (2 h_last) (x0 - x0_last)),      h = lambda' - lambda,

    first order on the first step and on the last, to sigma = 0.
    """
    p = predict(path, now)
    weight = then.alpha * (1 - shrinkage(now, then)) / 2
    x = renoise(p, then) + weight * _trend("dpmpp", path, p.x0, now, then)
    return end(path, x, then, p, {**p.memory, **_history("dpmpp", p.x0, now)})


def sde_dpmpp_2m(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """SDE-DPM-Solver++(2M) (https://arxiv.org/abs/2211.01095): `ancestral` with x0 extrapolated in lambda,

    x' = (sigma'/sigma) e^-h x + alpha' (1 - e^-2h) (x0 + h / (2 h_last) (x0 - x0_last)) + sigma' sqrt(1 - e^-2h) n.

    Its first-order form, which the first and the last step take, is DDPM's step.
    """
    noise = drawn(noise)
    p = predict(path, now)
    mean, std = transition(p, now, then)
    weight = then.alpha * (1 - shrinkage(now, then) ** 2) / 2
    x = mean + weight * _trend("sde_dpmpp", path, p.x0, now, then) + std * noise
    return end(path, x, then, p, {**p.memory, **_history("sde_dpmpp", p.x0, now)})


def deis(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """DEIS of order 2 in log rho (https://arxiv.org/abs/2204.13902): eps is extrapolated in lambda and integrated,

    x' = alpha' x0 + sigma' eps - sigma' (e^h - 1 - h) / h_last (eps - eps_last),      h = lambda' - lambda,

    first order on the first step and on the last, to sigma = 0.
    """
    p = predict(path, now)
    h = log_snr(then) - log_snr(now)
    weight = then.sigma * (h.expm1() / h - 1) if 0 < h.abs() < torch.inf else torch.zeros_like(h)
    x = renoise(p, then) - weight * _trend("deis", path, p.eps, now, then)
    return end(path, x, then, p, {**p.memory, **_history("deis", p.eps, now)})


def ab2(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """Adams-Bashforth of order 2 on u = eps - x0 in tau = sigma / (alpha + sigma),

    x' = alpha' x0 + sigma' eps + (alpha' + sigma') d^2 / (2 d_last) (u - u_last),      d = tau' - tau,

    first order on the first step only: nothing is infinite in tau.
    """
    p = predict(path, now)
    u, (tau, tau_then) = p.eps - p.x0, (at.sigma / (at.alpha + at.sigma) for at in (now, then))
    x = renoise(p, then)
    if "ab2.u" in path.memory:
        gap = tau - path.memory["ab2.tau"]  # (B,)
        weight = ((then.alpha + then.sigma) * (tau_then - tau) ** 2 / 2 / gap).where(gap != 0, 0.0)
        x = x + along(weight, x) * (u - path.memory["ab2.u"])
    return end(path, x, then, p, {**p.memory, "ab2.u": u, "ab2.tau": tau.to(x).expand(len(x))})


def unipc_1(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """UniPC-1 (https://arxiv.org/abs/2302.04867): Euler's step, corrected once x0 at its end is known,

    x <- x + alpha (1 - e^-h) / 2 (x0 - x0_last),

    before the next step, which needs that x0 anyway: so the order is 2 at one network call a step. What happened to x
    between two steps is kept. The corrector is a stage of the step before: under CFG++, the shift of that becomes the
    mean of the shifts at its two ends.
    """
    return _unipc(predict, path, now, then, 1)


def unipc_2(predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None) -> Path:
    """UniPC-2 (https://arxiv.org/abs/2302.04867), with B(h) = e^-h - 1 and prediction of data: order 3.

    UniP-2, which is DPM-Solver++(2M), corrected as in `unipc_1` by a parabola through three x0. The first step and the
    last, to sigma = 0, are UniP-1.
    """
    return _unipc(predict, path, now, then, 2)


def _unipc(predict: Predict, path: Path, now: Noise, then: Noise, order: int) -> Path:
    p = predict(path, now)
    x, zero = renoise(p, then), torch.zeros_like(p.x0)
    if "unipc.expected" in path.memory:
        x = x + then.sigma / now.sigma * _correction(path, p)
    trend = _trend("unipc", path, p.x0, now, then) if order == 2 else zero
    weight = then.alpha * (1 - shrinkage(now, then))
    share, lead = _corrector(path, now, then, order)
    own = {
        "unipc.expected": p.x0 + along(lead, x) * trend,
        "unipc.weight": (share * weight).to(x).expand(len(x)),
        "unipc.share": (share * then.alpha).to(x).expand(len(x)),
        "unipc.shift": shift_of(p),
    }
    return end(path, x + weight / 2 * trend, then, p, {**p.memory, **_history("unipc", p.x0, now), **own})


def _correction(path: Path, p: Prediction) -> Tensor:
    """UniC's correction of x at the end of the last step; weight / (1 - k'/k), that of guidance, is the share."""
    weight, share = along(path.memory["unipc.weight"], p.x0), along(path.memory["unipc.share"], p.x0)
    plain = weight * (p.x0 - path.memory["unipc.expected"])
    return plain if p.shift is None else plain + share * (p.shift - path.memory["unipc.shift"])


def _corrector(path: Path, now: Noise, then: Noise, order: int) -> tuple[Tensor, Tensor]:
    """(c, q), each () or (B,): UniC moves x by c alpha' (1 - e^-h) (x0' - x0 - q D), D the trend of x0 over the step.

    In the paper's letters c = rho_p and q = (1/2 - rho_1) / rho_2, of R rho = b with two unknowns.
    """
    h = log_snr(then) - log_snr(now)
    zero = torch.zeros_like(h)
    if order == 1 or "unipc.last" not in path.memory or not 0 < h.abs() < torch.inf:
        return (zero if then.sigma == 0 else zero + 1 / 2), zero
    b = (-h).expm1()
    phi = b / -h - 1
    b1, b2 = phi / b, 2 * (phi / -h - 1 / 2) / b
    first = (b1 - b2) / (1 + (log_snr(now) - path.memory["unipc.lambda"]) / h)
    return b1 - first, (1 / 2 - first) / (b1 - first)


def _history(owner: str, said: Tensor, now: Noise) -> dict[str, Tensor]:
    return {f"{owner}.last": said, f"{owner}.lambda": log_snr(now).to(said).expand(len(said))}


def _trend(owner: str, path: Path, said: Tensor, now: Noise, then: Noise) -> Tensor:
    """h / h_last (said - said_last): what a line in lambda foretells for the step. 0 without history, to sigma = 0,
    and after a step that had no length or came from pure noise."""
    if f"{owner}.last" not in path.memory or then.sigma == 0:
        return torch.zeros_like(said)
    h, h_last = log_snr(then) - log_snr(now), log_snr(now) - path.memory[f"{owner}.lambda"]
    return along((h / h_last).where(h_last != 0, 0.0), said) * (said - path.memory[f"{owner}.last"])
