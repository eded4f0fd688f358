"""Where a run starts: our own loops, training and search at the pipeline's own first latent (ReNO: its own tests)."""

import diffusers
import pytest
import torch

from difftune.rollouts.image_sampler import ImageSampler
from difftune.search_runs.problem import Adapter
from difftune.training.numbering import seed_of
from guidance.methods.cfg import Plain
from solvers.families.tokens import unpacked
from solvers.latent import LatentModel
from solvers.levels import READERS, levels_of, start_scale
from solvers.samplers.catalogue import euler
from tests.support import dits
from tests.support.pipelines import ddim, sd, sdxl

TABLE = {key: ddim().config[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
LINSPACE, LEADING = ({**TABLE, "timestep_spacing": spacing} for spacing in ("linspace", "leading"))


class Begun(Exception):
    """Raised by the first call of a network, with the latents that it is given."""


def first_latent(pipe, seed: int, steps: int) -> torch.Tensor:
    """What the pipeline hands its network first, (1, C, h, w)."""
    network = pipe.components["unet" if "unet" in pipe.components else "transformer"]

    def halt(module, args, kwargs):
        raise Begun(args[0] if args else kwargs["hidden_states"])

    hook = network.register_forward_pre_hook(halt, with_kwargs=True)
    try:
        scale = {"true_cfg_scale": 1.0} if isinstance(pipe, diffusers.FluxPipeline) else {"guidance_scale": 1.0}
        if type(pipe).__name__.startswith(("PixArt", "Sana")):
            scale |= {"use_resolution_binning": False}
        if isinstance(pipe, diffusers.SanaPipeline):
            scale |= {"height": 32, "width": 32}
        pipe("red", num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **scale)
    except Begun as begun:
        return begun.args[0].float()
    finally:
        hook.remove()
    raise AssertionError("the network was not called")


SCHEDULERS = {
    "ddim": lambda: ddim(),
    "ddpm": lambda: diffusers.DDPMScheduler(**LEADING),
    "pndm": lambda: diffusers.PNDMScheduler(**LEADING, skip_prk_steps=True),
    "lcm": lambda: diffusers.LCMScheduler(**{k: v for k, v in TABLE.items() if k != "steps_offset"}),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(**LINSPACE),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**LINSPACE),
    "deis": lambda: diffusers.DEISMultistepScheduler(**LINSPACE),
    "euler-linspace": lambda: diffusers.EulerDiscreteScheduler(**LINSPACE),
    "euler-leading": lambda: diffusers.EulerDiscreteScheduler(**LEADING),
    "euler-karras": lambda: diffusers.EulerDiscreteScheduler(**LINSPACE, use_karras_sigmas=True),
    "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**LEADING),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**LINSPACE),
    "kdpm2": lambda: diffusers.KDPM2DiscreteScheduler(**LINSPACE),
    "lms": lambda: diffusers.LMSDiscreteScheduler(**LINSPACE),
    "heun-leading": lambda: diffusers.HeunDiscreteScheduler(**LEADING),
    "ancestral-trailing": lambda: diffusers.EulerAncestralDiscreteScheduler(
        **{**TABLE, "timestep_spacing": "trailing"}
    ),
    "kdpm2-ancestral": lambda: diffusers.KDPM2AncestralDiscreteScheduler(**LINSPACE),
    "lms-karras": lambda: diffusers.LMSDiscreteScheduler(**LEADING, use_karras_sigmas=True),
    "euler-zero-snr": lambda: diffusers.EulerDiscreteScheduler(
        **{**TABLE, "timestep_spacing": "trailing"}, rescale_betas_zero_snr=True
    ),
    "ddim-parallel": lambda: diffusers.DDIMParallelScheduler(**LEADING, set_alpha_to_one=False),
    "ddpm-parallel": lambda: diffusers.DDPMParallelScheduler(**LEADING),
    "tcd": lambda: diffusers.TCDScheduler(**{k: v for k, v in TABLE.items() if k != "steps_offset"}),
    "singlestep": lambda: diffusers.DPMSolverSinglestepScheduler(
        **{k: v for k, v in TABLE.items() if k != "steps_offset"}
    ),
    "sa-solver": lambda: diffusers.SASolverScheduler(**LINSPACE),
}
FAMILIES = {
    "sdxl": lambda: sdxl(scheduler=SCHEDULERS["euler-linspace"]()),
    "sd3": dits.sd3,
    "flux": dits.flux,
    "pixart": dits.pixart,
    "sana": dits.sana,
    "sana-euler": lambda: dits.sana(dits.flow()),
    "sd3-heun": lambda: dits.sd3(diffusers.FlowMatchHeunDiscreteScheduler()),
    "sd3-lcm": lambda: dits.sd3(diffusers.FlowMatchLCMScheduler()),
}
PIPELINES = {**{name: lambda make=make: sd(scheduler=make()) for name, make in SCHEDULERS.items()}, **FAMILIES}


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
@pytest.mark.sampled(3)
def test_every_loop_starts_as_the_pipeline_does(name):
    """At 1 and 5 steps: the latents of training and of search, for their noise."""
    pipe = PIPELINES[name]()
    model = LatentModel(pipe)
    size = (32, 32) if "sana" in name else (None, None)  # it wants multiples of 32
    noise = model.noise(1, torch.Generator().manual_seed(3), *size)
    drawn = model.noise(1, [torch.Generator().manual_seed(seed_of(0, 0))])
    for steps in (1, 5):
        levels = model.levels(steps, *size)
        theirs = first_latent(pipe, 3, steps)
        theirs = theirs if theirs.ndim == 4 else unpacked(theirs, (noise.shape[2] // 2, noise.shape[3] // 2))
        torch.testing.assert_close(model.start_scale(levels) * noise, theirs, rtol=2e-6, atol=1e-6)
        problem = Adapter(model, ["red"], None).problem(levels, Plain())  # type: ignore[arg-type]
        torch.testing.assert_close(problem.start(0, 7).x, model.start_scale(levels) * problem.noise(0, 7))
        chain = ImageSampler(model, model.denoiser, Plain(), euler, levels, seed=0)
        x = chain.begin(lambda index: "red", [0], "full").x
        torch.testing.assert_close(x, model.start_scale(levels) * drawn)


def test_the_schedulers_of_all_levels_are_tried():
    flows = {name for name in READERS if name.startswith("FlowMatch")} | {"SCMScheduler"}
    assert {type(make()).__name__ for make in SCHEDULERS.values()} | flows == set(READERS)


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_a_run_of_sigmas_of_its_own_starts_at_its_own_first_level(spacing):
    """As Align Your Steps gives them: not where a run of as many ordinary steps would."""
    scheduler = diffusers.EulerDiscreteScheduler(**{**TABLE, "timestep_spacing": spacing})
    sigmas = [3.0, 1.0, 0.3]
    levels = levels_of(scheduler, sigmas=sigmas, num_inference_steps=None)
    scheduler.set_timesteps(sigmas=sigmas)
    theirs = float(scheduler.init_noise_sigma) / 10**0.5  # x / sqrt(1 + k^2) is what the network reads
    assert start_scale(scheduler, levels) == pytest.approx(theirs, rel=1e-6)
