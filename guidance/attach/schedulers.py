"""The noise levels of a diffusers scheduler: that of a network call, and that of the step it is part of.

`SCHEDULERS` has one function per scheduler. Each reads the scheduler between `scale_model_input` and `step`, and
changes nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from solvers.errors import UserError
from solvers.noise import Noise, angle, flow, noise, vp


class Where(NamedTuple):
    """One call of the network, as the scheduler sees it, with x = alpha * x0 + sigma * eps in its own coordinates.

    A step is one solver step, of one or more calls. `weights` (w1, w) is what makes CFG++ right for every one of them:
    the result of this call's stage is moved by then.alpha * (w1 * shift of the step's first call + w * its own shift),
    which equals CFG of scale lambda / (1 - k_end / k_start), k = sigma / alpha, in every stage. None: no such rule.
    """

    at: Noise  # of the network call
    then: Noise  # of what `scheduler.step` will return
    last: bool = True  # whether that ends the step
    weights: tuple[float, float] | None = (0.0, 1.0)


def where(scheduler: Any, timestep: Tensor) -> Where:
    """The place of `scheduler` at `timestep`, before its `step`.

    Raises ValueError, naming the known ones, for a scheduler that is not in `SCHEDULERS`.
    """
    return locator(scheduler)(scheduler, timestep)


def locator(scheduler: Any) -> Callable[[Any, Tensor], Where]:
    """The function of `SCHEDULERS` that knows the scheduler, or one that it inherits from."""
    for kind in type(scheduler).__mro__:
        if kind.__name__ in SCHEDULERS:
            return SCHEDULERS[kind.__name__]
    raise UserError(f"{type(scheduler).__name__} is not supported; replace it by one of {', '.join(SCHEDULERS)}")


def is_first_order(scheduler: Any) -> bool:
    """Whether each step of the scheduler is one of Euler's method, from the level of its one call to its end; DPM++ of
    order 1 is that, too, and a flow's stochastic sampling is not. Noise that a call asks for (DDIM's eta) is not seen
    here."""
    kinds, config = {kind.__name__ for kind in type(scheduler).__mro__}, scheduler.config
    if "DPMSolverMultistepScheduler" in kinds:
        return config["solver_order"] == 1 and not config["algorithm_type"].startswith("sde")
    return not kinds.isdisjoint(FIRST_ORDER) and not config.get("stochastic_sampling")


def index_of(scheduler: Any, timestep: Tensor) -> int:
    """The scheduler's step index, which some set only in their first `step`."""
    if scheduler.step_index is not None:
        return scheduler.step_index
    if scheduler.begin_index is not None:
        return scheduler.begin_index
    return int(scheduler.index_for_timestep(timestep.to(scheduler.timesteps.device)))


def noise_ratio(at: Noise) -> float:
    """k = sigma / alpha."""
    return float(at.sigma / at.alpha)


def trapezoid(start: Noise, end: Noise) -> tuple[float, float]:
    """Weights of the second call of a step that averages the slopes at both of its ends."""
    return 0.5, noise_ratio(start) / noise_ratio(end) / 2


def midpoint(start: float, middle: float, end: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Weights of the two calls of a step from k = start to end whose second call, at k = middle, gives the slope."""
    return (0.0, (start - middle) / (start - end)), (0.0, start / middle if middle else 1.0)


def stride(scheduler: Any) -> int:
    return scheduler.config.num_train_timesteps // scheduler.num_inference_steps


def trained(scheduler: Any, timestep: int) -> Noise:
    """The level of a training timestep; the one past the end for a negative one."""
    return vp(scheduler.alphas_cumprod[timestep] if timestep >= 0 else scheduler.final_alpha_cumprod)


def of_ddim(scheduler: Any, timestep: Tensor) -> Where:
    t = int(timestep)
    return Where(trained(scheduler, t), trained(scheduler, t - stride(scheduler)))


def of_ddpm(scheduler: Any, timestep: Tensor) -> Where:
    t, then = int(timestep), int(scheduler.previous_timestep(timestep))
    return Where(trained(scheduler, t), trained(scheduler, then) if then >= 0 else noise(1.0, 0.0))


def of_pndm(scheduler: Any, timestep: Tensor) -> Where:
    """Its first two calls are one step, and average the slopes at its ends; with Runge-Kutta, four are one step."""
    t, calls, step = int(timestep), scheduler.counter, stride(scheduler)
    at = trained(scheduler, t)
    if not scheduler.config.skip_prk_steps and calls < len(scheduler.prk_timesteps):
        return Where(at, trained(scheduler, t if calls % 2 else t - step // 2), calls % 4 == 3, None)
    if calls == 1:
        return Where(at, at, weights=trapezoid(trained(scheduler, t + step), at))
    return Where(at, trained(scheduler, t - step), last=calls > 0 or len(scheduler.timesteps) == 1)


def of_lcm(scheduler: Any, timestep: Tensor) -> Where:
    """It steps with c_skip * x + c_out * x0 in place of x0."""
    i, t = index_of(scheduler, timestep), int(timestep)
    end = i + 1 >= len(scheduler.timesteps)
    then = noise(1.0, 0.0) if end else trained(scheduler, int(scheduler.timesteps[i + 1]))
    _, out = scheduler.get_scalings_for_boundary_condition_discrete(t)
    return Where(trained(scheduler, t), then, weights=(0.0, float(out)))


def of_euler(scheduler: Any, timestep: Tensor) -> Where:
    i = index_of(scheduler, timestep)
    return Where(noise(1.0, scheduler.sigmas[i]), noise(1.0, scheduler.sigmas[i + 1]))


def of_heun(scheduler: Any, timestep: Tensor) -> Where:
    """Two calls a step; a step to sigma = 0 has only the first."""
    i = index_of(scheduler, timestep)
    at = noise(1.0, scheduler.sigmas[i])
    if not scheduler.state_in_first_order:
        return Where(at, at, weights=trapezoid(noise(1.0, scheduler.sigmas[i - 1]), at))
    return Where(at, noise(1.0, scheduler.sigmas[i + 1]), last=i + 1 >= len(scheduler.timesteps))


def of_kdpm2(scheduler: Any, timestep: Tensor) -> Where:
    """Two calls a step, the second at the middle (in log sigma); a step to sigma = 0 has only the first."""
    i = index_of(scheduler, timestep)
    start = i if scheduler.state_in_first_order else i - 1
    k, middle, end = scheduler.sigmas[start], scheduler.sigmas_interpol[start + 1], scheduler.sigmas[start + 1]
    return _two_calls(scheduler, i, k, middle, end, end)


def of_kdpm2_ancestral(scheduler: Any, timestep: Tensor) -> Where:
    """As KDPM2, down to sigma_down; the noise comes after."""
    i = index_of(scheduler, timestep)
    start = i if scheduler.state_in_first_order else i - 1
    k, middle, down = (s[start] for s in (scheduler.sigmas, scheduler.sigmas_interpol, scheduler.sigmas_down))
    return _two_calls(scheduler, i, k, middle, down, scheduler.sigmas[start + 1])


def _two_calls(scheduler: Any, i: int, k: Tensor, middle: Tensor, down: Tensor, end: Tensor) -> Where:
    first, second = midpoint(float(k), float(middle), float(down))
    if scheduler.state_in_first_order:
        return Where(noise(1.0, k), noise(1.0, middle), last=i + 1 >= len(scheduler.timesteps), weights=first)
    return Where(noise(1.0, middle), noise(1.0, end), weights=second)


def of_multistep(scheduler: Any, timestep: Tensor) -> Where:
    """DPM-Solver++ and DEIS, ordinary or stochastic, with sigmas of a diffusion or of a flow."""
    i = index_of(scheduler, timestep)
    at, then = (noise(*scheduler._sigma_to_alpha_sigma_t(s.double())) for s in scheduler.sigmas[i : i + 2])
    return Where(at, then)


def of_unipc(scheduler: Any, timestep: Tensor) -> Where:
    """Its corrector makes each sample again from the one before, and would drop a shift."""
    return of_multistep(scheduler, timestep)._replace(weights=None)


def of_flow(scheduler: Any, timestep: Tensor) -> Where:
    i = index_of(scheduler, timestep)
    return Where(flow(scheduler.sigmas[i]), flow(scheduler.sigmas[i + 1]))


def of_scm(scheduler: Any, timestep: Tensor) -> Where:
    """Its samples are scaled by the deviation of the data; the noise of each step is drawn anew."""
    i, scale = index_of(scheduler, timestep), scheduler.config.sigma_data
    at, then = (angle(a) for a in scheduler.timesteps[i : i + 2])
    return Where(noise(scale * at.alpha, scale * at.sigma), noise(scale * then.alpha, scale * then.sigma), weights=None)


FIRST_ORDER = ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")
SCHEDULERS: dict[str, Callable[[Any, Tensor], Where]] = {
    "DDIMScheduler": of_ddim,
    "DDPMScheduler": of_ddpm,
    "PNDMScheduler": of_pndm,
    "LCMScheduler": of_lcm,
    "EulerDiscreteScheduler": of_euler,
    "EulerAncestralDiscreteScheduler": of_euler,
    "LMSDiscreteScheduler": of_euler,
    "HeunDiscreteScheduler": of_heun,
    "KDPM2DiscreteScheduler": of_kdpm2,
    "KDPM2AncestralDiscreteScheduler": of_kdpm2_ancestral,
    "DPMSolverMultistepScheduler": of_multistep,
    "DEISMultistepScheduler": of_multistep,
    "UniPCMultistepScheduler": of_unipc,
    "FlowMatchEulerDiscreteScheduler": of_flow,
    "SCMScheduler": of_scm,
}
