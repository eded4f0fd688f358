"""LinearAG: the unconditional prediction as a linear function of the earlier ones (https://arxiv.org/abs/2312.12487)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guidance.contract import Branch, Guide, Guided
from guidance.methods.scales import Neutral, Scale, Scaled, step_of, strength, time
from solvers.denoiser import Path
from solvers.errors import UserError
from solvers.noise import Noise


@dataclass(frozen=True)
class LinearFit:
    """What `fit_linear_ag` found: at step i, eps_u is about sum_j weights[i][j] of (eps_c of steps 0..i, eps_u of steps
    0..i-1). `times` are sigma / (alpha + sigma) of the steps."""

    times: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LinearAG(Scaled):
    """CFG whose unconditional eps is predicted, in every other step, from the earlier ones by a linear `fit`.

    In the first half of the steps, CFG and CFG with eps_u = sum_i a_i eps_c(x_i) + sum_i b_i eps_u(x_i) take turns; the
    second half is conditional: T + T/4 evaluations. The fit is for one model, scheduler, number of steps and scale;
    make it with `fit_linear_ag`. One evaluation a step: two-stage samplers are refused.
    """

    scale: Scale = 7.5
    fit: LinearFit | None = None
    space = "eps"
    neutral = Neutral({"scale": 1.0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        if self.fit is None:
            raise UserError("LinearAG has no fit: make one with guidance.methods.linear_ag.fit_linear_ag")
        i = step_of(self.fit.times, at, "LinearAG")
        if 2 * i >= len(self.fit.times):
            preds = yield {"cond": Branch("cond")}
            return Guided(preds["cond"])
        preds = yield {"cond": Branch("cond"), **({} if i % 2 else {"uncond": Branch("uncond")})}
        c = preds.to("cond", "eps")
        seen_c = _longer(path, "linear_ag.cond", c, i)
        u = self._predicted(seen_c, path, i) if i % 2 else preds.to("uncond", "eps")
        seen_u = _longer(path, "linear_ag.uncond", u, i)
        out = u + strength(self.scale, at, path.x) * (c - u)
        return Guided(out, memory={"linear_ag.cond": seen_c, "linear_ag.uncond": seen_u})

    def _predicted(self, seen_c: Tensor, path: Path, i: int) -> Tensor:
        assert self.fit is not None
        regressors = torch.cat([seen_c, path.memory["linear_ag.uncond"]], dim=1)
        weights = torch.tensor(self.fit.weights[i], dtype=regressors.dtype, device=regressors.device)
        return torch.einsum("br...,r->b...", regressors, weights)


@dataclass(frozen=True)
class Recorded:
    """CFG that keeps all its eps in the path's memory, (B, steps, ...): what `fit_linear_ag` learns from."""

    scale: Scale = 7.5
    space = "eps"

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        c, u = preds.to("cond", "eps"), preds.to("uncond", "eps")
        kept = {f"recorded.{name}": _longer(path, f"recorded.{name}", p) for name, p in (("cond", c), ("uncond", u))}
        return Guided(u + strength(self.scale, at, path.x) * (c - u), memory=kept)


def _longer(path: Path, key: str, new: Tensor, i: int | None = None) -> Tensor:
    """The history under `key` (B, steps, ...), with `new` at its end; step i must have i before it."""
    before = path.memory.get(key, new[:, None][:, :0])
    if i is not None and before.shape[1] != i:
        raise UserError(
            f"LinearAG evaluates step {i} with {before.shape[1]} steps before it: run all steps of the fit, one"
            " evaluation each"
        )
    return torch.cat([before, new[:, None]], dim=1)


def fit_linear_ag(cond: Tensor, uncond: Tensor, levels: Sequence[Noise]) -> LinearFit:
    """Ordinary least squares of eps_u, for each step on its own, without intercept.

    cond, uncond: eps of M recorded runs (M, T, ...), `memory["recorded.cond"]` and `["recorded.uncond"]` of a run under
    `Recorded`. levels: the T + 1 levels of the runs. Solved in float64 by QR, so that nearly collinear regressors cost
    no accuracy; the minimum-norm solution if they are collinear.
    """
    c, u = cond.double().flatten(2), uncond.double().flatten(2)
    weights = [_least_squares(torch.cat([c[:, : i + 1], u[:, : i + 1]], dim=1)) for i in range(c.shape[1])]
    return LinearFit(tuple(map(time, levels[: c.shape[1]])), tuple(tuple(w.tolist()) for w in weights))


def _least_squares(columns: Tensor) -> Tensor:
    """Weights (R - 1,) of the first columns for the last one; columns (M, R, D)."""
    triangle = columns.new_zeros(0, columns.shape[1])
    for sample in columns:  # a QR of all samples, one at a time
        triangle = torch.linalg.qr(torch.cat([triangle, sample.T]), mode="r").R
    solution = torch.linalg.lstsq(triangle[:, :-1], triangle[:, -1:], driver="gelsd").solution
    return solution[:, 0]
