"""An attached pipeline beside others that share its parts, and callbacks that change it in the middle of a run."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableDiffusionXLImg2ImgPipeline
from diffusers.callbacks import (
    MultiPipelineCallbacks,
    SD3CFGCutoffCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)

from guidance.attach.calls import recorded
from guidance.attach.handle import attach
from guidance.methods.catalogue import APG, CFG, NASA, PAG, AdaptiveGuidance, CFGpp, Interval, Plain, Rescale
from tests.support.dits import TEXT, sd3, wan
from tests.support.pipelines import ddim, sd, sdxl, unet

CALL = {"prompt": "red", "num_inference_steps": 4, "output_type": "latent"}


def run(pipe, seed=5, **more):
    return pipe(**{**CALL, **more}, generator=torch.Generator().manual_seed(seed))[0]


def sibling(pipe, kind=StableDiffusionPipeline, **parts):
    other = kind(**{**pipe.components, "scheduler": ddim(), **parts}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.fixture(scope="module")
def pipe():
    return sd()


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


# ------------------------------------------------------------------------------------------------ siblings
@pytest.mark.parametrize("where", ["callback", "thread"])
@pytest.mark.parametrize("kind", ["constructed", "from_pipe", "img2img", "attached"])
def test_a_sibling_within_a_run_is_what_it_is_alone(pipe, kind, where):
    """It shares the UNet: within the attached run, in its callback or in another thread, both give what each gives
    alone."""
    other = sibling(pipe)
    if kind == "from_pipe":
        other = StableDiffusionPipeline.from_pipe(pipe, scheduler=ddim())
        other.set_progress_bar_config(disable=True)
    more = {}
    if kind == "img2img":
        other = sibling(pipe, StableDiffusionImg2ImgPipeline)
        more = {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), "strength": 0.9}
    second = attach(other, PAG(2.0)) if kind == "attached" else None
    alone, stock, got = run(other, **more), run(pipe, guidance_scale=4.0), []

    def callback(pipeline, i, t, tensors):
        if i == 1:
            job = lambda: run(other, **more)  # noqa: E731
            got.append(in_thread(job) if where == "thread" else job())
        return tensors

    with attach(pipe, CFG(4.0)):
        ours = run(pipe, guidance_scale=4.0, callback_on_step_end=callback)
    assert torch.equal(got[0], alone) and torch.equal(ours, stock) and torch.equal(run(other, **more), alone)
    if second is not None:
        second.detach()
    assert "forward" not in vars(pipe.unet) and "step" not in vars(pipe.scheduler)


def test_pipelines_of_one_network_run_at_the_same_time(pipe):
    """Three threads, two of them attached, in step with each other: neither takes the other's calls. The text is
    encoded before: transformers' encoders are not made for two threads."""
    cond, uncond = pipe.encode_prompt(CALL["prompt"], "cpu", 1, True, CALL.get("negative_prompt"))
    texts = {"prompt": None, "negative_prompt": None, "prompt_embeds": cond, "negative_prompt_embeds": uncond}
    pipes = [pipe, sibling(pipe), sibling(pipe)]
    methods = [CFG(4.0), None, APG(4.0)]
    attached = lambda i: attach(pipes[i], methods[i]) if methods[i] else None  # noqa: E731
    alone = []
    for i, one in enumerate(pipes):
        handle = attached(i)
        alone.append(run(one, seed=i, guidance_scale=4.0, **texts))
        if handle:
            handle.detach()
    gate = threading.Barrier(3, timeout=60)

    def wait(pipeline, i, t, tensors):
        gate.wait()
        return tensors

    more = {"guidance_scale": 4.0, "callback_on_step_end": wait, **texts}
    with ExitStack() as handles, ThreadPoolExecutor(3) as pool:
        for i in range(3):
            handles.enter_context(attached(i) or nullcontext())
        jobs = [pool.submit(run, one, i, **more) for i, one in enumerate(pipes)]
        for job, expected in zip(jobs, alone, strict=True):
            assert torch.equal(job.result(), expected)
    assert "forward" not in vars(pipe.unet)


def test_a_refiner_that_shares_the_vae_stays_stock():
    base, refiner = sdxl(), None
    parts = {**base.components, "unet": sdxl(seed=3).unet, "scheduler": ddim()}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts)
    refiner.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    alone, stock, got = run(refiner, image=image), run(base, guidance_scale=4.0), []

    def callback(pipeline, i, t, tensors):
        got.append(run(refiner, image=image))
        return tensors

    with attach(base, CFG(4.0)):
        assert torch.equal(run(base, guidance_scale=4.0, callback_on_step_end=callback), stock)
    assert all(torch.equal(one, alone) for one in got)


def test_what_two_runs_cannot_share_is_refused(pipe):
    """The pipeline itself, and a scheduler, whose state is one run's; afterwards all is as before."""
    same = sibling(pipe, scheduler=pipe.scheduler)

    def again(other):
        def callback(pipeline, i, t, tensors):
            run(other, guidance_scale=4.0)
            return tensors

        return callback

    stock = run(pipe, guidance_scale=4.0)
    with attach(pipe, CFG(4.0)):
        with pytest.raises(ValueError, match="this StableDiffusionPipeline is in the middle of a run already"):
            run(pipe, guidance_scale=4.0, callback_on_step_end=again(pipe))
        with attach(same, CFG(4.0)), pytest.raises(ValueError, match="another run steps with the same DDIMScheduler"):
            run(pipe, guidance_scale=4.0, callback_on_step_end=again(same))
        assert torch.equal(run(pipe, guidance_scale=4.0), stock)
    assert torch.equal(run(pipe, guidance_scale=4.0), stock)


# ------------------------------------------------------------------------------------------------ callbacks
CUTOFFS = {
    "sd": (sd, lambda **at: SDCFGCutoffCallback(**at)),
    "sdxl": (sdxl, lambda **at: SDXLCFGCutoffCallback(**at)),
    "sd3": (sd3, lambda **at: SD3CFGCutoffCallback(**at)),
    "several": (sd, lambda **at: MultiPipelineCallbacks([SDCFGCutoffCallback(**at)])),
}
AT = {"half": {"cutoff_step_ratio": 0.5}, "first": {"cutoff_step_ratio": None, "cutoff_step_index": 0}}
METHODS = [
    CFG(4.0),
    Rescale(CFG(4.0)),
    Interval(CFG(4.0), 0.0, 1e9),
    APG(4.0),
    AdaptiveGuidance(4.0),
    CFGpp(0.6),
    Plain(),
]


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize("name", CUTOFFS)
def test_cutoff_callbacks_of_diffusers(name, at):
    """They end the guidance in the middle of a run: stock, bit for bit, under CFG, and finite under other methods."""
    make, callback = CUTOFFS[name]
    one = make()
    more = {"guidance_scale": 4.0, "callback_on_step_end": callback(**AT[at])}
    stock = run(one, **more)
    assert not torch.equal(stock, run(one, guidance_scale=4.0))
    for method in METHODS if name == "sd" else METHODS[:1]:
        with attach(one, method) as handle:
            ours = run(one, **{**more, "callback_on_step_end": callback(**AT[at])})
        cut = 2 if at == "half" else 0
        assert bool(ours.isfinite().all()) and 4 <= handle.nfe <= 5 + cut
        if type(method) is CFG or (type(method) is Interval):
            assert torch.equal(ours, stock) and handle.nfe == 4 + cut + 1


def test_methods_that_ask_for_the_condition_alone_go_on_after_a_cutoff(pipe):
    """PAG and NASA are not what the callback ends."""
    tokens = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0))
    for method in (PAG(2.0), NASA(0.3, tokens)):
        with attach(pipe, method):
            whole = run(pipe)
            cut = run(pipe, guidance_scale=4.0, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))
        assert torch.allclose(whole, cut, atol=1e-5)


class Calling:
    """A callback that calls the network and the scheduler itself."""

    def __init__(self):
        g = torch.Generator().manual_seed(2)
        self.x, self.text = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 16, 16, generator=g)
        self.said, self.stepped = [], []

    def __call__(self, pipeline, i, t, tensors):
        self.said.append(pipeline.unet(self.x, 7, self.text)[0])
        self.stepped.append(pipeline.scheduler.step(self.x, t, tensors["latents"])[0])
        return tensors

    def method(self, *arguments):
        return self(*arguments)


@pytest.mark.parametrize(
    "form",
    [lambda c: c, lambda c: c.method, lambda c: partial(c), lambda c: lambda *a: c(*a)],
    ids=["object", "method", "partial", "function"],
)
def test_what_a_callback_itself_asks_of_the_network_and_the_scheduler_is_stock(pipe, form):
    theirs, ours = Calling(), Calling()
    stock = run(pipe, guidance_scale=4.0, callback_on_step_end=form(theirs))
    with attach(pipe, CFG(4.0)):
        assert torch.equal(run(pipe, guidance_scale=4.0, callback_on_step_end=form(ours)), stock)
    for a, b in zip(theirs.said + theirs.stepped, ours.said + ours.stepped, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(run(pipe, guidance_scale=4.0), stock)


def changing(**attributes):
    """A callback that sets attributes of the pipeline after the second step, or its tensors."""

    def callback(pipeline, i, t, tensors):
        if i == 1:
            for name, value in attributes.items():
                if name in tensors:
                    tensors[name] = value(tensors[name])
                else:
                    setattr(pipeline, name, value(pipeline))
        return tensors

    return callback


CHANGES = {
    "latents": {"latents": lambda x: 0.5 * x},
    "prompt_embeds": {"prompt_embeds": lambda x: x.flip(0)},
    "interrupt": {"_interrupt": lambda pipe: True},
    "rescale": {"_guidance_rescale": lambda pipe: 0.7},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_callback_changes_is_followed(pipe, change):
    names = [name for name in CHANGES[change] if not name.startswith("_")] or ["latents"]
    more = {"guidance_scale": 4.0, "callback_on_step_end_tensor_inputs": names}
    stock = run(pipe, callback_on_step_end=changing(**CHANGES[change]), **more)
    assert not torch.equal(stock, run(pipe, guidance_scale=4.0))
    with attach(pipe, CFG(4.0)):
        assert torch.equal(run(pipe, callback_on_step_end=changing(**CHANGES[change]), **more), stock)


BETAS = {key: ddim().config[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
SCHEDULERS = {
    "ddim": ddim,
    "euler": lambda: diffusers.EulerDiscreteScheduler(**BETAS),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**BETAS),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(**BETAS),
}


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_timesteps_that_a_callback_sets(name, steps):
    """The scheduler starts anew within the pipeline's loop: what stock makes of it, an error too, is made here."""
    own = sd(scheduler=SCHEDULERS[name]())

    def reset(pipeline, i, t, tensors):
        if i == 1:
            pipeline.scheduler.set_timesteps(steps)
        return tensors

    def said():
        try:
            return run(own, guidance_scale=4.0, callback_on_step_end=reset)
        except Exception as error:
            return repr(error)

    stock = said()
    with attach(own, CFG(4.0)):
        ours = said()
    assert ours == stock if isinstance(stock, str) else torch.equal(ours, stock)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_guidance_scale": lambda pipe: 2.0},
            r"guidance scale changed from 4 to 2 during the run \(by its callback changing.<locals>.callback\)",
        ),
        (
            {"scheduler": lambda pipe: ddim()},
            r"the scheduler of this StableDiffusionPipeline was replaced during the run \(by its callback changing",
        ),
        ({"unet": lambda pipe: unet()}, "the denoiser of this StableDiffusionPipeline was replaced"),
    ],
    ids=("scale", "scheduler", "network"),
)
def test_what_cannot_be_followed_is_one_sentence(change, message):
    own = sd()
    with attach(own, CFG(4.0)):
        with pytest.raises(ValueError, match=message):
            run(own, guidance_scale=4.0, callback_on_step_end=changing(**change))
        run(own, guidance_scale=4.0)  # the next call is as ever


def test_wan_with_a_scale_that_ends():
    """A family that calls for its branches in turn: after the cutoff, one call a step."""
    one = wan()
    stop = {"callback_on_step_end": changing(_guidance_scale=lambda pipe: 1.0)}
    texts = torch.randn(2, 1, 6, TEXT, generator=torch.Generator().manual_seed(0))
    more = {"guidance_scale": 4.0, "height": 16, "width": 32, "num_frames": 5, "prompt": None}
    more |= {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    stock = run(one, **more, **stop)
    with attach(one, CFG(4.0)) as handle:
        assert torch.equal(run(one, **more, **stop), stock)
    assert handle.nfe == 4 + 2


# ------------------------------------------------------------------------------------------------ distilled networks
def test_cfg_of_a_network_that_is_told_its_scale():
    """As the pipeline has it: the scale goes into the network, which is evaluated once a step."""
    one = sd(unet_config={"time_cond_proj_dim": 8}, scheduler=diffusers.LCMScheduler.from_config(ddim().config))
    stock = run(one, guidance_scale=6.0)
    with warnings.catch_warnings(), attach(one, CFG(6.0)) as handle:
        warnings.simplefilter("error")
        assert torch.equal(run(one, guidance_scale=6.0), stock) and handle.nfe == 4
    with attach(one, CFG(3.0)), pytest.warns(UserWarning, match="is told guidance_scale=6; the scale of CFG itself is"):
        assert torch.equal(run(one, guidance_scale=6.0), stock)
    with attach(one, APG(6.0)), pytest.raises(ValueError, match="guidance-distilled .* needs 'cond' alone"):
        run(one, guidance_scale=6.0)


def test_a_call_is_taken_apart_by_the_names_of_its_arguments():
    network, x, text = unet(), torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16)
    call = recorded(network, network.forward, (x, 3, text), {}, ("sample", "encoder_hidden_states"))
    assert call.sample is x and len(call) == 2 and call.shared == {"timestep": 3}
    assert call.rows == {"sample": x, "encoder_hidden_states": text}
