"""Noise levels and clocks read from diffusers schedulers.

A scheduler is used as a table only: its `timesteps` and `sigmas` are copied, never recomputed, so that timestep
spacing, offsets, Karras and shifts are all honoured. Levels are in the network's own coordinates: VP for
VP-trained networks (k-diffusion's sigma is k = sigma / alpha), flow for flow models.
"""

from bisect import bisect
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise
from math import hypot, isclose, log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.errors import UserError
from solvers.noise import Noise, angle, flow, log_snr, noise, normalised, vp

Scheduler = Any  # diffusers declares none of the attributes that are read here

STEPS_IN_K = {
    f"{name}DiscreteScheduler" for name in ("Euler", "EulerAncestral", "Heun", "KDPM2", "KDPM2Ancestral", "LMS")
}
PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


def levels_of(scheduler: Scheduler, steps: int | None = None, **set_timesteps: Any) -> list[Noise]:
    """The N + 1 levels of a run, noisiest first, down to the scheduler's own final level.

    With `steps` (or `sigmas=`, `mu=`, ...) they are laid out on a copy by `set_timesteps`; without, they are those of
    the run that the scheduler was set to. DDIM and DDPM themselves step from t to t - 1000 // N, which is the next
    timestep of the run in the spacings "leading" and "trailing" (N dividing 1000) but not in "linspace".
    """
    read = _reader(scheduler)
    if steps is not None:
        set_timesteps["num_inference_steps"] = steps
    if set_timesteps:
        scheduler = deepcopy(scheduler)
        scheduler.set_timesteps(**set_timesteps)
    if vars(scheduler).get("num_inference_steps") is None:
        raise UserError(f"{_name(scheduler)} has no run yet: pass steps, or call its set_timesteps first")
    return read(scheduler)


def prediction_type(scheduler: Scheduler) -> str:
    """The space of the network's output: eps, v, x0 or flow."""
    if _name(scheduler).startswith(("FlowMatch", "SCM")):  # SCM's networks are flows, see `families.sprint`
        return "flow"
    name = scheduler.config.get("prediction_type")
    if name not in PREDICTION_TYPES:
        raise UserError(f"no prediction_type {name!r} of {_name(scheduler)}; known: {', '.join(PREDICTION_TYPES)}")
    return PREDICTION_TYPES[name]


def start_scale(scheduler: Scheduler, levels: Sequence[Noise]) -> float:
    """The factor of a pipeline's unit noise, in the coordinates of `levels`, those of its run (`levels_of`).

    1 for most schedulers and for all flows, whatever the first level is. Those of `STEPS_IN_K` start at k times the
    noise in the spacings "linspace" and "trailing", k = sigma / alpha, which is k / sqrt(1 + k^2) here; else at 1.
    """
    if _name(scheduler) not in STEPS_IN_K or scheduler.config["timestep_spacing"] == "leading":
        return 1.0
    k = float(levels[0].sigma / levels[0].alpha)
    return k / hypot(1, k)


class Clock:
    """The timestep that a network wants to hear at a noise level: `clock(at)`, a 0-dim float32 tensor.

    VP: log-SNR is interpolated against the integers t of `alphas_cumprod`, clamped to its two ends; at a table point
    the integer itself. Flow: 1000 sigma / (alpha + sigma).

    own: at the levels of the scheduler's current run, say what the scheduler says there, bit for bit. It differs
    where a scheduler rounds its timesteps (DPM++ with Karras) or interpolates sigma rather than log sigma (linspace).
    """

    def __init__(self, scheduler: Scheduler, own: bool = False):
        _reader(scheduler)
        if scheduler.config.get("timestep_type") == "continuous":
            raise UserError(f"{_name(scheduler)} with timestep_type 'continuous' has no table for a clock to read")
        self.scale = float(scheduler.config["num_train_timesteps"])
        self.table = None if _is_flow(scheduler) else _log_ratios(scheduler)  # rising in t
        self.own = _own(scheduler) if own else []

    def __call__(self, at: Noise) -> Tensor:
        ratio = -float(log_snr(at))
        for known, t in self.own:
            if isclose(known, ratio, rel_tol=0, abs_tol=1e-9):
                return torch.tensor(t, dtype=torch.float32)
        if self.table is None:
            return (self.scale * at.sigma / (at.alpha + at.sigma)).float()
        return torch.tensor(_interpolate(self.table, ratio), dtype=torch.float32)


def _interpolate(table: list[float], value: float) -> float:
    """Fractional position of `value` in a rising table; the integer itself within a thousandth of one.

    The thousandth covers the float32 rounding of the sigmas that schedulers keep (at most 1e-4 of a step).
    """
    i = min(max(bisect(table, value), 1), len(table) - 1)
    low, high = table[i - 1], table[i]
    t = i - 1 + min(max((value - low) / (high - low), 0.0), 1.0)
    return float(round(t)) if abs(t - round(t)) < 1e-3 else t


def _log_ratios(scheduler: Scheduler) -> list[float]:
    """log(sigma / alpha) at t = 0, 1, ...; a terminal SNR of zero reads as 2**-24, which is what Euler makes of it."""
    power = scheduler.alphas_cumprod.double().cpu()
    return [log(1 - p) / 2 - log(p) / 2 for p in power.where(power > 0, 2.0**-24).tolist()]


def _own(scheduler: Scheduler) -> list[tuple[float, float]]:
    """(log(sigma / alpha), timestep) at each level of the current run but the last."""
    levels, timesteps = levels_of(scheduler)[:-1], scheduler.timesteps.tolist()
    if len(levels) != len(timesteps):
        raise UserError(
            f"{_name(scheduler)} says {len(timesteps)} timesteps at {len(levels)} levels: no clock of its own"
        )
    return [(-float(log_snr(at)), t) for at, t in zip(levels, timesteps, strict=True)]


def _name(scheduler: Scheduler) -> str:
    return type(scheduler).__name__


def _is_flow(scheduler: Scheduler) -> bool:
    return _name(scheduler).startswith(("FlowMatch", "SCM")) or bool(scheduler.config.get("use_flow_sigmas"))


def _powers(scheduler: Scheduler, timesteps: Tensor, final: Tensor) -> list[Noise]:
    """Levels of a table of signal powers."""
    return [vp(p) for p in (*scheduler.alphas_cumprod.cpu()[timesteps.long().cpu()], final.cpu())]


def _ddim(scheduler: Scheduler) -> list[Noise]:
    return _powers(scheduler, scheduler.timesteps, scheduler.final_alpha_cumprod)


def _ddpm(scheduler: Scheduler) -> list[Noise]:
    return _powers(scheduler, scheduler.timesteps, scheduler.one)


def _lcm(scheduler: Scheduler) -> list[Noise]:
    """The last step gives clean data, whatever `final_alpha_cumprod` is."""
    return _powers(scheduler, scheduler.timesteps, torch.tensor(1.0))


def _pndm(scheduler: Scheduler) -> list[Noise]:
    """PNDM's `timesteps` list network calls, some of them twice; the grid is underneath."""
    grid = torch.from_numpy(np.sort(scheduler._timesteps)).flip(0)
    return _powers(scheduler, grid, scheduler.final_alpha_cumprod)


def _sigmas(scheduler: Scheduler) -> list[Noise]:
    """Levels of k = sigma / alpha, or of a flow's sigma."""
    sigmas = scheduler.sigmas.double().cpu()
    if not _is_flow(scheduler):
        return [noise(1 / (1 + k**2).sqrt(), k / (1 + k**2).sqrt()) for k in sigmas]
    if scheduler.config.get("invert_sigmas"):
        raise UserError(f"{_name(scheduler)} with invert_sigmas (Mochi) runs from 0 up to 1: not supported")
    return [flow(sigma) for sigma in sigmas]


def _stages(scheduler: Scheduler) -> list[Noise]:
    """Two-stage schedulers list each inner sigma twice."""
    levels = _sigmas(scheduler)
    return [levels[0]] + [b for a, b in pairwise(levels) if a != b]


def _angles(scheduler: Scheduler) -> list[Noise]:
    """TrigFlow's levels as those of the flow."""
    return [normalised("flow", angle(a))[1] for a in scheduler.timesteps]


READERS: dict[str, Callable[[Scheduler], list[Noise]]] = {
    "DDIMScheduler": _ddim,
    "DDIMParallelScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    "LCMScheduler": _lcm,
    "TCDScheduler": _ddim,
    "PNDMScheduler": _pndm,
    "EulerDiscreteScheduler": _sigmas,
    "EulerAncestralDiscreteScheduler": _sigmas,
    "LMSDiscreteScheduler": _sigmas,
    "HeunDiscreteScheduler": _stages,
    "KDPM2DiscreteScheduler": _stages,
    "KDPM2AncestralDiscreteScheduler": _stages,
    "DPMSolverMultistepScheduler": _sigmas,
    "DPMSolverSinglestepScheduler": _sigmas,
    "UniPCMultistepScheduler": _sigmas,
    "DEISMultistepScheduler": _sigmas,
    "SASolverScheduler": _sigmas,
    "FlowMatchEulerDiscreteScheduler": _sigmas,
    "FlowMatchHeunDiscreteScheduler": _stages,
    "FlowMatchLCMScheduler": _sigmas,
    "SCMScheduler": _angles,
}


def _reader(scheduler: Scheduler) -> Callable[[Scheduler], list[Noise]]:
    if _name(scheduler) not in READERS:
        raise UserError(f"no noise levels are known for {_name(scheduler)}; supported: {', '.join(READERS)}")
    return READERS[_name(scheduler)]
