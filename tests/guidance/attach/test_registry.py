"""Every method of the registry beside diffusers' own callbacks and beside an IP-Adapter."""

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    PipelineCallback,
    SD3CFGCutoffCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
    SDXLControlnetCFGCutoffCallback,
)

from guidance.attach.handle import attach
from guidance.methods.catalogue import APG, CFG, GUIDANCE
from guidance.methods.linear_ag import LinearFit
from guidance.methods.scales import time
from solvers.noise import noise
from tests.guidance.attach.test_matrix import classify, weak_of
from tests.guidance.attach.test_processors import IMAGES, ip_adapter
from tests.support.dits import sd3
from tests.support.pipelines import TOKENS, WIDTH, sd, sdxl

STEPS, SCALE = 3, 4.0
CALL = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": SCALE}
TEXT = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def run(pipe, callback=None, **more):
    texts = {"prompt_embeds": TEXT[:1], "negative_prompt_embeds": TEXT[1:]} if "prompt" not in more else {}
    more = {**({"callback_on_step_end": callback} if callback else {}), **texts, **more}
    return pipe(**{**CALL, **more}, generator=torch.Generator().manual_seed(5))[0]


@pytest.fixture(scope="module")
def pipe():
    return sd()


@pytest.fixture(scope="module")
def adapter():
    return ip_adapter()


def times_of(pipe):
    pipe.scheduler.set_timesteps(STEPS)
    levels = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]
    return tuple(float(time(noise(a.sqrt(), (1 - a).sqrt()))) for a in levels)


def example(pipe, name):
    """The method as one prompt of SD has it, every one with a scale at which it does something."""
    other = {"encoder_hidden_states": TEXT[1:].flip(1)}
    options = {
        "ag": {"threshold": -1.0, "min_cfg_steps": 2},
        "linear-ag": {"fit": LinearFit(times_of(pipe), tuple((0.9,) + (0.1,) * 2 * i for i in range(STEPS)))},
        "gfcg": {
            "classify": classify,
            "classes": {"encoder_hidden_states": TEXT},
            "target": torch.tensor(0),
            "tolerance": 0.0,
        },
        "interval": {"low": 0.0, "high": 5.0},
        "cfg-zero": {"zero_steps": 0},
        "fbg": {"delta": -1.0, "tau": 0.01},
        "cfg": {"scale": SCALE},
        "classifier": {"classify": classify, "target": torch.tensor(0), "scale": 0.1},
        "dynamic": {"scorers": (lambda x0: x0.flatten(1).sum(1), lambda x0: x0.flatten(1).std(1))},
        "perpneg": {"negatives": (other,)},
        "multi": {"conds": ("cond", other), "scales": (3.0, 1.0)},
        "nasa": {"negative": TEXT[1:]},
        "nag": {"negative": TEXT[1:]},
        "null-text": {"times": times_of(pipe), "nulls": TEXT[1:].expand(STEPS, 1, -1, -1).flip(2)},
    }
    return GUIDANCE[name](**options.get(name, {}))


ENDED = {  # those that guide by the unconditional branch
    *("cfg", "cfgpp", "apg", "ag", "linear-ag", "interval", "rescale", "perpneg", "cfg-zero", "tcfg", "fdg"),
    *("dynamic", "multi", "null-text", "rectified-cfgpp", "cfg-mp", "apg-mix", "mambo-g", "fbg"),
}


class Noted(PipelineCallback):
    """diffusers' cutoff after the second step, whose latents are written down, or put in place of the run's own."""

    def __init__(self, latents=None):
        super().__init__(cutoff_step_index=1, cutoff_step_ratio=None)
        self.cutoff, self.latents = SDCFGCutoffCallback(cutoff_step_index=1, cutoff_step_ratio=None), latents

    @property
    def tensor_inputs(self):
        return ["prompt_embeds", "latents"]

    def callback_fn(self, pipeline, step_index, timestep, tensors):
        if step_index == 1 and self.latents is None:
            self.latents = tensors["latents"]
        elif step_index == 1:
            tensors["latents"] = self.latents
        return self.cutoff.callback_fn(pipeline, step_index, timestep, tensors)


OWN_SCALE = pytest.mark.filterwarnings("ignore:.*guides with its own scale")


@OWN_SCALE
@pytest.mark.parametrize("name", GUIDANCE)
def test_a_cutoff_ends_every_method_that_guides_by_the_unconditional_branch(pipe, name):
    """From its latents on, the run is the stock pipeline's after the same cutoff, bit for bit; the others go on."""
    noted, more = Noted(), {"networks": {"weak": weak_of(pipe)}} if name == "autoguidance" else {}
    with attach(pipe, example(pipe, name), **more):
        ours = run(pipe, noted)
        whole = run(pipe) if name not in ENDED else None
    rest = run(pipe, Noted(noted.latents))
    assert torch.equal(ours, rest) == (name in ENDED or name == "none") and bool(ours.isfinite().all())
    if whole is not None:
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


def controlled():
    base = sdxl()
    net = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 16))
    pipe = StableDiffusionXLControlNetPipeline(**base.components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    return pipe


OTHERS = {
    SDXLCFGCutoffCallback: (sdxl, {"prompt": "red"}),
    SD3CFGCutoffCallback: (sd3, {"prompt": "red"}),
    SDXLControlnetCFGCutoffCallback: (controlled, {"prompt": "red", "image": torch.rand(1, 3, 16, 16)}),
}


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_the_cutoffs_of_other_families_are_stock_under_cfg(kind):
    make, more = OTHERS[kind]
    pipe, cutoff = make(), lambda: kind(cutoff_step_index=1, cutoff_step_ratio=None)
    stock = run(pipe, cutoff(), **more)
    with attach(pipe, CFG(SCALE)) as handle:
        assert torch.equal(run(pipe, cutoff(), **more), stock) and handle.nfe == 2 * STEPS - (STEPS - 2)
    with attach(pipe, APG(SCALE)):
        assert bool(run(pipe, cutoff(), **more).isfinite().all())


@OWN_SCALE
@pytest.mark.parametrize("name", GUIDANCE)
def test_every_method_beside_an_ip_adapter_and_its_cutoff(pipe, adapter, name):
    """The image prompt is seen until the callback ends it, and without its share nothing of it remains."""
    images = {"ip_adapter_image_embeds": [IMAGES]}
    stop = lambda: IPAdapterScaleCutoffCallback(cutoff_step_index=0, cutoff_step_ratio=None)  # noqa: E731
    stock = run(adapter, stop(), **images) if name == "cfg" else None
    runs = {}
    weak = {"weak": weak_of(pipe)} if name == "autoguidance" else {}
    with attach(pipe, example(pipe, name), weak):
        without = run(pipe)
    with attach(adapter, example(adapter, name), weak):
        for case, share in (("all", 1.0), ("cut", 1.0), ("none", 0.0)):
            adapter.set_ip_adapter_scale(share)
            runs[case] = run(adapter, stop() if case == "cut" else None, **images)
        adapter.set_ip_adapter_scale(1.0)
    close = {"rtol": 1e-4, "atol": 1e-4 * float(without.abs().max())}
    torch.testing.assert_close(runs["none"], without, **close)
    for one, other in (("all", "cut"), ("cut", "none"), ("all", "none")):
        assert not torch.allclose(runs[one], runs[other], **close)
    assert stock is None or torch.equal(runs["cut"], stock)
