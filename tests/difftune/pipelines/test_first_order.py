"""A method that looks ahead is drawn with the first-order form of a pipeline's scheduler, which is said."""

import diffusers
import pytest
import torch

from difftune.errors import UserError
from difftune.pipelines.first_order import scheduler_for, scheduler_name
from difftune.pipelines.generate import Sampling, draw_pictures, generate_batches
from guidance.attach.schedulers import is_first_order
from guidance.methods.catalogue import CFG, CFGMP, Interval, RectifiedCFGpp
from solvers.errors import Caution
from solvers.levels import levels_of
from tests.support.pipelines import sd

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
HIGHER = {
    "DPM++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(),
    "DPM++ 2M of a flow": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
    "UniPC of a flow": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
}
AHEAD = RectifiedCFGpp(2.0)


@pytest.mark.parametrize("name", HIGHER)
def test_it_takes_steps_of_eulers_method_down_the_same_levels(name):
    pipe = sd(scheduler=HIGHER[name]())
    own, found = pipe.scheduler, scheduler_for(pipe, AHEAD)
    assert not is_first_order(own) and is_first_order(found) and scheduler_for(pipe, CFG()) is own
    exactly = 3e-3 if "UniPC" in name else 1e-6  # it lays the levels of a flow out a little differently
    for mine, theirs in zip(levels_of(found, 7), levels_of(own, 7), strict=True):
        torch.testing.assert_close((mine.alpha, mine.sigma), (theirs.alpha, theirs.sigma), atol=exactly, rtol=0)
    assert scheduler_name(pipe, AHEAD) == "DPMSolverMultistepScheduler, solver_order=1"


def test_pndm_becomes_ddim():
    pipe = sd(scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1))
    found = scheduler_for(pipe, Interval(CFGMP()))
    found.set_timesteps(7)
    pipe.scheduler.set_timesteps(7)
    assert scheduler_name(pipe, CFGMP()) == "DDIMScheduler"
    assert found.timesteps.tolist() == pipe.scheduler.timesteps.unique().flip(0).tolist()
    assert torch.equal(found.alphas_cumprod, pipe.scheduler.alphas_cumprod)


def drawn(pipe, method):
    return draw_pictures(generate_batches(pipe, ["a red circle"], [0], method, Sampling(3)), 1, "x")


def test_the_pictures_are_those_of_the_first_order_form_and_the_pipeline_stays():
    pipe, plain = (
        sd(scheduler=HIGHER["DPM++ 2M of a flow"]()),
        sd(scheduler=diffusers.DPMSolverMultistepScheduler(solver_order=1, **FLOW)),
    )
    own = pipe.scheduler
    with pytest.warns(Caution, match="RectifiedCFGpp looks ahead .* DPMSolverMultistepScheduler, solver_order=1 in pl"):
        made = drawn(pipe, AHEAD)
    assert pipe.scheduler is own and made.nfe == 3 * 2 + 1
    assert torch.equal(made.images, drawn(plain, AHEAD).images)


def test_a_stochastic_or_unknown_scheduler_stays_and_is_refused():
    for scheduler in (
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        diffusers.HeunDiscreteScheduler(),
    ):
        with pytest.raises(UserError, match="RectifiedCFGpp looks ahead .* which only Euler's method tells"):
            drawn(sd(scheduler=scheduler), AHEAD)
