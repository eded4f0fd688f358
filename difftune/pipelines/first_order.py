"""The scheduler that a pipeline steps with: for a guidance method that looks ahead, one of Euler's method."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from guidance.attach.schedulers import is_first_order
from guidance.contract import Guidance
from guidance.methods.compose import inside
from solvers.errors import Caution

# Schedulers of higher order -> the one of Euler's method that has the same noise levels (UniPC's flow levels to 0.003),
# and its settings.
FIRST_ORDER: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "DPMSolverMultistepScheduler": (DPMSolverMultistepScheduler, {"solver_order": 1}),
    "UniPCMultistepScheduler": (DPMSolverMultistepScheduler, {"solver_order": 1}),
    "PNDMScheduler": (DDIMScheduler, {}),
}


def scheduler_for(pipe: Any, guidance: Guidance) -> Any:
    """The pipeline's scheduler; for a method that looks ahead, which needs steps of Euler's method, the one that takes
    such steps down the same noise levels, if `FIRST_ORDER` has it. Stochastic ones stay, which `attach` refuses."""
    scheduler = pipe.scheduler
    name = type(scheduler).__name__
    stochastic = str(scheduler.config.get("algorithm_type", "")).startswith("sde")
    if not looks_ahead(guidance) or is_first_order(scheduler) or stochastic or name not in FIRST_ORDER:
        return scheduler
    kind, settings = FIRST_ORDER[name]
    return kind.from_config(scheduler.config, **settings)


def looks_ahead(guidance: Guidance) -> bool:
    """Whether a method, or one that it holds, asks the network where the step ends."""
    return any(getattr(method, "looks_ahead", False) for method in (guidance, *inside(guidance)))


def scheduler_name(pipe: Any, guidance: Guidance) -> str:
    """The scheduler of a run under the method, as results write it down."""
    found = scheduler_for(pipe, guidance)
    order = ", solver_order=1" if found is not pipe.scheduler and "solver_order" in found.config else ""
    return type(found).__name__ + order


@contextmanager
def first_order(pipe: Any, guidance: Guidance) -> Iterator[None]:
    """Inside, the pipeline steps with `scheduler_for`."""
    own = pipe.scheduler
    pipe.scheduler = scheduler_for(pipe, guidance)
    try:
        yield
    finally:
        pipe.scheduler = own


def say_first_order(pipe: Any, guidance: Guidance) -> None:
    """A Caution if another scheduler than the pipeline's own will step."""
    if scheduler_for(pipe, guidance) is not pipe.scheduler:
        warnings.warn(
            f"{type(guidance).__name__} looks ahead to where each step ends, so it is drawn with"
            f" {scheduler_name(pipe, guidance)} in place of the model's {type(pipe.scheduler).__name__}: another solver"
            " than that of other methods' pictures",
            Caution,
            stacklevel=3,
        )
