"""ReNO on every family that `LatentModel` knows: a gradient of noise and embedding, and a noise for the pipeline."""

from functools import partial

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
)

from difftune.pipelines.generate import for_pipeline
from difftune.reno.optimizer import ReNO
from solvers.families.table import family_of
from tests.support import dits, pipelines
from tests.support.families import EVERY, slow_but

PROMPTS = ["red circle", "blue square"]


class Left:
    """The picture's left half minus its right."""

    differentiable = True

    def __call__(self, images, prompts):
        left, right = images.chunk(2, dim=3)
        return left.mean(dim=(1, 2, 3)) - right.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("name", slow_but(EVERY, "sdxl", "flux", "zimage", "wan", "sana-sprint"))
def test_noise_and_embedding_are_optimised(name):
    pipe = EVERY[name].make()
    settings = ReNO(pipe, Left(), num_inference_steps=2, optimizer="adam[learning_rate=0.1]", variables="both",
                    height=16, width=16, regularization_weight=0.0, progress=False,
                    embedded_guidance=EVERY[name].embedded)  # fmt: skip
    result = settings.optimize(PROMPTS, 4)
    assert (result.rewards > result.rewards_before).all() and result.history[0].grad_norm.min() > 0
    assert not torch.equal(result.noises, result.noises_before)


OWN = {"sana-sprint": {"guidance_scale": 4.5}, "zimage": {"guidance_scale": 0.0}, "qwen": {}}
UNBINNED = {"use_resolution_binning": False}
OWN |= {name: {**UNBINNED, **OWN.get(name, {"guidance_scale": 1.0})} for name in ("pixart", "sana", "sana-sprint")}


@pytest.mark.parametrize("name", slow_but(EVERY, "flux2", "qwen", "zimage", "wan", "sana-sprint"))
def test_the_pipeline_makes_the_picture_from_the_noise_at_its_size(name):
    pipe, told = EVERY[name].make(), EVERY[name].embedded
    pipe.scheduler = dits.flow() if name == "sana" else pipe.scheduler  # its own cuts timesteps down to integers
    side = 32 if name in ("lumina2", "sana", "sana-sprint", "wan") else 16
    result = ReNO(pipe, Left(), num_inference_steps=1, height=side, width=2 * side, progress=False,
                  embedded_guidance=told).optimize(PROMPTS, 2)  # fmt: skip
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt", **OWN.get(name, {})}
    made = pipe(prompt=list(PROMPTS), **for_pipeline(pipe, result.noises), **call, **family_of(pipe).asked(1))
    made = made.frames[:, 0] if name == "wan" else made.images
    assert made.shape == (2, 3, side, 2 * side)
    assert torch.allclose(made.float(), result.images.float(), atol=1e-3)


TABLE = {key: pipelines.ddim().config[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
ancestral = partial(EulerAncestralDiscreteScheduler, **TABLE, timestep_spacing="trailing")
consistency = partial(LCMScheduler, **TABLE, clip_sample=False, set_alpha_to_one=False)
ONE_STEP = {  # the pipeline, the settings of ReNO, and of the pipeline's own call
    "sd-turbo": (lambda: pipelines.sd(scheduler=ancestral()), {}, {}),
    "sdxl-turbo": (lambda: pipelines.sdxl(scheduler=ancestral()), {}, {}),
    "lcm": (
        lambda: pipelines.sd(scheduler=consistency(), unet_config={"time_cond_proj_dim": 8}),
        {"embedded_guidance": 7.5},
        {"guidance_scale": 7.5},
    ),
    "hyper-sdxl": (
        lambda: pipelines.sdxl(scheduler=consistency()),
        {"setting": "hyper-sdxl"},
        {"timesteps": [800]},
    ),
    "pixart-dmd": (
        lambda: dits.pixart(PixArtAlphaPipeline, DDPMScheduler(clip_sample=False)),
        {"setting": "pixart-dmd"},
        {"timesteps": [400], "guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False},
    ),
    "flux-schnell": (lambda: dits.flux(FlowMatchEulerDiscreteScheduler(shift=1.0)), {}, {}),
}


@pytest.mark.parametrize("name", ONE_STEP)
def test_a_one_step_models_own_call_makes_the_picture_from_the_noise(name):
    """Under the scheduler, the timesteps and the embedded scale that each is run with."""
    make, settings, call = ONE_STEP[name]
    pipe, more = make(), {"regularization_weight": 0.0, "learning_rate": 2.0, "progress": False}
    result = ReNO(pipe, Left(), height=16, width=16, **more, **settings).optimize(PROMPTS, 4)
    assert (result.rewards > result.rewards_before).all()
    options = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "pt", **call}
    made = pipe(PROMPTS, **for_pipeline(pipe, result.noises), **options).images
    assert torch.allclose(made.float(), result.images.float(), atol=1e-5)
