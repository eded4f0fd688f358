"""Every family of the table against its own pipelines: levels, conditions, latents, images and gradients."""

from dataclasses import replace
from functools import partial
from itertools import product
from typing import NamedTuple

import diffusers
import pytest
import torch
from diffusers import FluxPipeline

from guidance.guided import guided as by_method
from guidance.methods.catalogue import CFG, CFGMP, CFGpp, Plain
from solvers.denoiser import Path
from solvers.errors import Caution
from solvers.families.flux2 import empirical_mu
from solvers.families.prompts import tokenizers_of
from solvers.families.table import FAMILIES, REFUSED, family_of
from solvers.families.tokens import packed, unpacked
from solvers.latent import LatentModel
from solvers.levels import Clock, prediction_type
from solvers.memory.checkpointing import block_checkpointing, has_blocks
from solvers.noise import Noise
from solvers.noise import flow as flow_level
from solvers.samplers.catalogue import ancestral, dpmpp_2m, end, euler, renoise, sample
from tests.support.dits import (
    DPM,
    chroma,
    flow,
    flux,
    flux2,
    pixart,
    sana,
    sd3,
    wan,
)
from tests.support.families import MADE
from tests.support.pipelines import ddim, sd, sdxl

PROMPTS, NEGATIVES = ["a red circle", "two blue squares"], ["a square", "red"]
STEPS, SCALE = 4, 3.0
TRUE_CFG = {"guidance_scale": 3.5, "true_cfg_scale": SCALE}
UNBINNED = {"guidance_scale": SCALE, "use_resolution_binning": False}


def consistency(predict, path, now, then, noise=None):
    """LCM's step: x' = alpha' x0 + sigma' noise."""
    p = predict(path, now)
    return end(path, renoise(p._replace(eps=noise), then), then, p)


class Case(NamedTuple):
    pipe: object
    step: object = euler
    size: tuple = (16, 16)
    call: dict = {"guidance_scale": SCALE}
    embedded: float | None = None
    own_clock: bool = False  # DPM-Solver cuts a flow's timesteps down to integers
    tolerance: float = 1e-5
    frames: int = 1


def alpha_1024():
    """With size and aspect ratio as conditions."""
    size = {"sample_size": 128, "num_attention_heads": 3, "cross_attention_dim": 24}  # a third for each condition
    return pixart(diffusers.PixArtAlphaPipeline, use_additional_conditions=True, **size)


def turbo(kind):
    """Sampled in 1 to 4 steps without guidance."""
    table = ("beta_start", "beta_end", "beta_schedule", "steps_offset")
    config = {**{key: ddim().config[key] for key in table}, "timestep_spacing": "trailing"}
    return kind(scheduler=diffusers.EulerAncestralDiscreteScheduler(**config))


def lcm():
    table = {key: ddim().config[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    scheduler = diffusers.LCMScheduler(**table, clip_sample=False, set_alpha_to_one=False)
    return sd(scheduler=scheduler, unet_config={"time_cond_proj_dim": 8})


FULL = {
    "sd3": Case(MADE["sd3"]),
    "sd3.5": Case(MADE["sd3.5"]),
    "sd3-shift-by-size": Case(partial(MADE["sd3"], flow(use_dynamic_shifting=True)), size=(24, 16)),
    "flux-dev": Case(MADE["flux-dev"], call=TRUE_CFG, embedded=3.5, size=(16, 24)),
    "flux-schnell": Case(partial(MADE["flux"], flow(shift=1.0)), call=TRUE_CFG),
    "flux2-klein": Case(MADE["flux2"], size=(16, 24)),
    "chroma": Case(MADE["chroma"], size=(16, 24)),
    "qwen": Case(MADE["qwen"], call={"true_cfg_scale": SCALE, "guidance_scale": None}, size=(16, 24)),
    "zimage": Case(MADE["zimage"], call={"guidance_scale": SCALE - 1}, size=(16, 24)),
    "wan": Case(partial(MADE["wan"], flow()), size=(16, 32)),
    "wan-experts": Case(
        partial(MADE["wan-experts"], flow()),
        call={"guidance_scale": SCALE, "num_frames": 5},
        size=(16, 32),
        frames=5,
    ),
    "lumina2": Case(MADE["lumina2"], call={"guidance_scale": SCALE, "cfg_normalization": False}, size=(32, 48)),
    "pixart-sigma": Case(MADE["pixart-sigma"], dpmpp_2m, call=UNBINNED),
    "pixart-alpha": Case(partial(MADE["pixart-alpha"], ddim()), call=UNBINNED),
    "pixart-alpha-1024": Case(alpha_1024, dpmpp_2m, size=(16, 24), call=UNBINNED),
    "sana": Case(MADE["sana"], dpmpp_2m, (32, 32), UNBINNED, own_clock=True),
    "sana-euler": Case(partial(MADE["sana-sigma"], flow(), timestep_scale=0.5), euler, (32, 32), UNBINNED),
    "sana-eps": Case(partial(MADE["sana"], diffusers.DPMSolverMultistepScheduler()), dpmpp_2m, (32, 32), UNBINNED),
}
UNBINNED_SPRINT = {"guidance_scale": 4.5, "use_resolution_binning": False}
FEW_STEPS = {
    "flux2-dev": Case(MADE["flux2-dev"], euler, (16, 24), {"guidance_scale": 4.0}, embedded=4.0),
    "sana-sprint": Case(MADE["sana-sprint"], consistency, (32, 64), UNBINNED_SPRINT, embedded=4.5),
    "sd-turbo": Case(partial(turbo, sd), ancestral, call={"guidance_scale": 0.0}),
    "sdxl-turbo": Case(partial(turbo, sdxl), ancestral, call={"guidance_scale": 0.0}),
    "lcm": Case(lcm, consistency, call={"guidance_scale": 7.5}, embedded=7.5, tolerance=1e-4),  # its c_out is about 1
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sized(case):
    return {"height": case.size[0], "width": case.size[1]}


def modelled(case, steps=STEPS):
    """The model and its denoiser, with the pipeline's clock."""
    model = LatentModel(case.pipe(), case.embedded, num_frames=case.frames)
    if not case.own_clock:
        return model, model.denoiser
    model.pipe.scheduler.set_timesteps(steps)
    return model, replace(model.denoiser, clock=Clock(model.pipe.scheduler, own=True))


def guided(denoiser, conds, scale=SCALE):
    """CFG as a user has it; the conditional prediction alone for None."""
    return by_method(denoiser, Plain() if scale is None else CFG(scale), conds)


def stock(model, case, steps=STEPS, **more):
    options = {"num_inference_steps": steps, "generator": seeded(), **sized(case), **case.call, **more}
    negatives = {} if case.call["guidance_scale"] == 0 or case.embedded == 7.5 else {"negative_prompt": list(NEGATIVES)}
    if model.family.name == "sana-sprint":
        negatives = {}
        options |= {} if steps == 2 else {"intermediate_timesteps": None}
    if type(model.pipe) is diffusers.Flux2Pipeline:
        negatives = {}
    elif model.family.name == "flux2":  # it takes no negative prompt, but its embedding
        negatives = {"negative_prompt_embeds": model.pipe.encode_prompt(NEGATIVES)[0]}
    if model.family.name != "wan":
        return model.pipe(prompt=list(PROMPTS), **negatives, **options).images
    frames = model.pipe(prompt=list(PROMPTS), **negatives, **{"num_frames": 1, **options}).frames
    if options["output_type"] == "latent":
        return frames
    return frames[:, 0] if case.frames == 1 else frames.transpose(1, 2)


TOKENS = FluxPipeline | diffusers.QwenImagePipeline | diffusers.ChromaPipeline  # their latents are given as tokens


def stock_latents(model, case, steps=STEPS, **more):
    """The pipeline's latents, as pictures."""
    found = stock(model, case, steps, output_type="latent", **more)
    return unpacked(found, (case.size[0] // 4, case.size[1] // 4)) if isinstance(model.pipe, TOKENS) else found


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", FULL)
@torch.no_grad()
def test_own_loop_is_the_pipeline(name):
    case = FULL[name]
    model, denoiser = modelled(case)
    conds = model.encode(PROMPTS, NEGATIVES, **sized(case))
    start = Path(model.noise(2, seeded(), **sized(case)))
    *_, last = sample(case.step, guided(denoiser, conds), start, model.levels(STEPS, **sized(case)))
    theirs = stock_latents(model, case)
    ours = model.family.latents.to_vae(model.pipe.vae, last.x) if model.family.name == "flux2" else last.x
    assert last.x.shape == (2, *model.shape(**sized(case))) and theirs.std() > 0.1
    assert relative(ours, theirs) < case.tolerance
    assert relative(model.decode(last.x), stock(model, case, output_type="pt")) < 1e-5


def test_a_method_without_a_guided_prediction_is_refused_where_the_pipeline_matches_norms():
    model, denoiser = modelled(FULL["qwen"])
    conds, size = model.encode(PROMPTS, NEGATIVES, **sized(FULL["qwen"])), sized(FULL["qwen"])
    for method, name in ((CFGpp(0.6), "CFGpp"), (CFGMP(), "CFGMP")):
        with pytest.raises(ValueError, match=f"{name} has no guided prediction for the pipeline's rule that"):
            euler(by_method(denoiser, method, conds), Path(model.noise(2, seeded(), **size)), *model.levels(1))


@pytest.mark.parametrize("name, steps", [*product(FEW_STEPS, (1, 4)), ("sana-sprint", 2)])
@torch.no_grad()
def test_few_steps_without_guidance(name, steps):
    case = FEW_STEPS[name]
    model, denoiser = modelled(case)
    levels, draws = model.levels(steps, **sized(case)), seeded()
    x = model.noise(2, draws, **sized(case)) * (levels[0].sigma if case.step is ancestral else 1.0)
    predict = guided(denoiser, model.encode(PROMPTS), scale=None)
    for now, then in zip(levels, levels[1:], strict=False):
        path = case.step(predict, Path(x), now, then, torch.randn(x.shape, generator=draws))
        x = path.x
    theirs = stock(model, case, steps, output_type="latent")
    theirs = theirs.transpose(1, 2).unflatten(2, x.shape[2:]) if name == "flux2-dev" else theirs  # it gives its tokens
    assert relative(x, theirs) < case.tolerance
    assert relative(model.decode(x), stock(model, case, steps, output_type="pt")) < case.tolerance


@pytest.mark.parametrize("name", [*FULL, "sana-sprint"])
@pytest.mark.sampled(4)
def test_gradient_is_the_slope(name):
    """The gradient of the sample, along the gradient's own direction in noise, conditions and parameters each."""
    case = {**FULL, **FEW_STEPS}[name]
    model, denoiser = modelled(case, steps=2)
    model.pipe.to(torch.float64)
    with torch.no_grad():
        conds = model.encode(PROMPTS[:1], NEGATIVES[:1], **sized(case))
    hidden = conds["cond"]["encoder_hidden_states"].double()
    conds["cond"] = {**conds["cond"], "encoder_hidden_states": hidden}
    weight = max(model.parameters(), key=lambda p: p.numel())
    leaves = [model.noise(1, seeded(), **sized(case)).double().requires_grad_(), hidden.requires_grad_(), weight]
    levels = model.levels(2, **sized(case))

    def loss():
        x, predict = leaves[0], guided(denoiser, conds, None if name in FEW_STEPS else 1.5)
        if name in FEW_STEPS:
            return predict(Path(x), levels[0]).x0.square().mean()
        *_, last = sample(case.step, predict, Path(x), levels)
        return last.x.square().mean()

    grads = torch.autograd.grad(loss(), leaves)
    floor = next(floor for part, floor in FLOORS.items() if name.startswith(part))
    for leaf, grad in zip(leaves, grads, strict=True):
        slopes = [slope_along(leaf, grad / grad.norm(), loss, h) for h in floor.widths]
        assert min(abs(grad.norm() - slope) / slope for slope in slopes) < floor.error and min(slopes) > 1e-7


class Floor(NamedTuple):
    """How near a gradient comes to central differences, of some widths: a network's parts in float32 want wide ones."""

    error: float
    widths: tuple = (1e-2, 1e-4)


FLOORS = {
    "sana": Floor(3e-3, (1e-2, 1e-3)),
    "wan": Floor(3.9e-4, (1e-1, 1e-2)),
    "zimage": Floor(4.8e-5, (5e-3, 1e-4)),
    "chroma": Floor(1.2e-4),
    "lumina2": Floor(1.2e-4, (1e-2, 1e-3)),
    "": Floor(1.5e-5),
}


@torch.no_grad()
def slope_along(leaf, direction, loss, h):
    origin = leaf.clone()
    ends = [(leaf.copy_(origin + sign * h * direction), loss())[1] for sign in (1, -1)]
    leaf.copy_(origin)
    return (ends[0] - ends[1]) / (2 * h)


def half_way(model):
    return flow_level(0.5) if prediction_type(model.pipe.scheduler) == "flow" else model.levels(2)[1]


LEAN = ("flux2-klein", "zimage", "wan-experts")


@pytest.mark.parametrize(
    "name", [name if name in LEAN else pytest.param(name, marks=pytest.mark.slow) for name in FULL]
)
def test_gradient_is_the_same_with_recomputed_blocks_and_close_in_bfloat16(name):
    case = FULL[name]._replace(embedded=4.0 if name == "flux-dev" else None)  # bfloat16 holds 4000, and not 3500
    model, denoiser = modelled(case, steps=2)
    with torch.no_grad():
        conds, x = model.encode(PROMPTS[:1], NEGATIVES[:1], **sized(case)), model.noise(1, seeded(), **sized(case))

    def gradient():
        """Of the velocity, at a timestep that bfloat16 holds: networks round it themselves."""
        start = x.clone().requires_grad_()
        p = guided(denoiser, conds, 1.5)(Path(start), half_way(model))
        return torch.autograd.grad((p.eps - p.x0).square().mean(), start)[0]

    whole = gradient()
    if has_blocks(model.network):
        with block_checkpointing(*denoiser.networks):
            assert torch.equal(gradient(), whole)
    for network in denoiser.networks:
        network.to(torch.bfloat16)
    half = gradient()
    assert bool(half.isfinite().all()) and torch.cosine_similarity(half.flatten(), whole.flatten(), dim=0) > 0.95
    assert has_blocks(model.network) or name == "chroma"


def alike(a, b):
    return float(torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@pytest.mark.parametrize("name", FULL)
@pytest.mark.sampled(6)
@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_the_pipelines_own(name):
    """One evaluation to a cosine of .999; of two guided steps, which can carry its rounding far, what stock has."""
    case = FULL[name]
    if name == "flux-dev":  # bfloat16 holds 4000, and not 3500
        case = case._replace(embedded=4.0, call={**case.call, "guidance_scale": 4.0})
    x = modelled(case)[0].noise(2, seeded(), **sized(case)).bfloat16().float()
    own, theirs, alone = [], [], []
    for dtype in (torch.float32, torch.bfloat16):
        model, denoiser = modelled(case, steps=2)
        model.pipe.to(dtype)
        conds, start = model.encode(PROMPTS, NEGATIVES, **sized(case)), x.to(dtype)
        once = denoiser(x, half_way(model), conds["cond"])
        *_, last = sample(case.step, guided(denoiser, conds), Path(x), model.levels(2, **sized(case)))
        start = packed(start) if isinstance(model.pipe, TOKENS) else start
        alone.append(once.eps - once.x0), own.append(last.x)
        theirs.append(stock_latents(model, case, 2, latents=start))
    assert alike(*alone) > 0.999 and all(bool(part.isfinite().all()) for part in own)
    assert alike(*own) > alike(*theirs) - 2e-3


@torch.no_grad()
def test_an_autoencoder_without_a_posterior():
    model = LatentModel(sana())
    images = torch.rand(2, 3, 16, 16, generator=seeded())
    z = model.encode_images(images)
    expected = model.pipe.vae.encode(2 * images - 1).latent * 0.41
    torch.testing.assert_close(z, expected)
    with torch.enable_grad():
        z.requires_grad_()
        ours = torch.autograd.grad(model.decode(z, checkpointed=True).sum(), z)[0]
        theirs = torch.autograd.grad((model.pipe.vae.decode(z / 0.41).sample / 2 + 0.5).clamp(0, 1).sum(), z)[0]
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().sum() > 0


@torch.no_grad()
def test_latents_of_flux2_are_patches_under_the_vaes_batch_norm():
    """Against the pipeline's own reading of a picture, and back."""
    pipe = flux2()
    model, images = LatentModel(pipe), torch.rand(2, 3, 16, 24, generator=seeded())
    x = model.encode_images(images)
    torch.testing.assert_close(x, pipe._encode_vae_image(2 * images - 1, None))
    posterior = pipe.vae.encode(2 * images - 1).latent_dist.mode()
    torch.testing.assert_close(model.family.latents.to_vae(pipe.vae, x), posterior)
    assert x.shape == (2, *model.shape(16, 24)) == (2, 16, 4, 6)


def test_flux2s_shift_is_the_published_fit():
    found = [empirical_mu(*of) for of in ((4096, 50), (4096, 4), (1024, 28), (4300, 50), (4301, 50))]
    assert found == pytest.approx([2.023351, 2.291180, 1.859177, 2.044694, 1.184697], abs=1e-6)


def test_tokens_are_two_by_two_patches():
    x = torch.randn(2, 4, 6, 8, generator=seeded())
    tokens = packed(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpacked(tokens, (3, 4)), x)


@torch.no_grad()
def test_long_prompts_are_cut_where_the_pipelines_call_cuts_them():
    """Whose default is another than that of its encode_prompt."""
    model, long = LatentModel(MADE["qwen"]()), "red circle " * 60
    with pytest.warns(Caution, match="does not read all of"):
        hidden = model.encode([long])["cond"]["encoder_hidden_states"]
    theirs, _ = model.pipe.encode_prompt([long], max_sequence_length=512)
    assert hidden.shape[1] == 512 and torch.equal(hidden, theirs)
    rooms = [{room for _, room in tokenizers_of(MADE[name]())} for name in ("wan", "qwen")]
    assert rooms == [{512}, {512}]


@torch.no_grad()
def test_levels_follow_the_size():
    model = LatentModel(flux(guidance_embeds=True), 3.5)
    small, large = (model.levels(4, height=side, width=side) for side in (16, 256))
    assert small[1].sigma < large[1].sigma and small[0] == large[0] == Noise(torch.tensor(0.0), torch.tensor(1.0))
    model.pipe(PROMPTS, num_inference_steps=4, height=256, width=256, output_type="latent", max_sequence_length=8)
    assert [at.sigma.item() for at in large] == model.pipe.scheduler.sigmas.tolist()


def test_what_latent_model_refuses():
    with pytest.raises(ValueError, match="num_frames is 4: give 1 more than a multiple of 4, as in 17"):
        LatentModel(wan(), num_frames=4)
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline makes pictures: leave num_frames=5 out"):
        LatentModel(sd3(), num_frames=5)
    with pytest.raises(ValueError, match="AutoencoderKLWan cannot decode in tiles"):
        LatentModel(wan(), tiled=True)
    with pytest.raises(ValueError, match="guidance_embeds=True: pass embedded_guidance"):
        LatentModel(flux(guidance_embeds=True)).encode("red")
    with pytest.raises(ValueError, match="guidance_embeds=False: do not pass embedded_guidance"):
        LatentModel(flux(), 3.5).encode("red")
    with pytest.raises(ValueError, match="do not pass embedded_guidance"):
        LatentModel(sd3(), 3.5).encode("red")
    with pytest.raises(ValueError, match="18 x 16 pixels: both must be multiples of 4"):
        LatentModel(sd3()).shape(18, 16)


def test_chromas_blocks_are_not_recomputed():
    """diffusers gives another output under gradient checkpointing, which would go unseen."""
    pipe = chroma()
    assert not has_blocks(pipe.transformer)
    with (
        pytest.raises(ValueError, match="ChromaTransformer2DModel drops the mask"),
        block_checkpointing(pipe.transformer),
    ):
        pass
    model = LatentModel(pipe)
    at, x = model.levels(2)[1], model.noise(1, seeded(), 16, 16)
    cond = model.encode(PROMPTS[:1])["cond"]
    whole = model.denoiser(x, at, cond).eps.detach()
    pipe.transformer.enable_gradient_checkpointing()
    assert relative(model.denoiser(x, at, cond).eps, whole) > 1e-3  # else diffusers is mended, and so can this be


def test_no_pipeline_is_in_two_families():
    names = [name for family in FAMILIES.values() for name in family.pipelines]
    assert len(set(names)) == len(names) and all(hasattr(diffusers, name) for name in names)
    assert all(name == family.name for name, family in FAMILIES.items())
    assert family_of(flux()) is FAMILIES["flux"] and DPM["use_flow_sigmas"]


def test_pipelines_that_are_refused_say_why():
    assert all(hasattr(diffusers, name) and why for name, why in REFUSED.items())
    pipe = object.__new__(diffusers.HiDreamImagePipeline)
    with pytest.raises(ValueError, match="no family for HiDreamImagePipeline: its experts run under no_grad"):
        family_of(pipe)


class Asked(Exception):
    """Raised by a network that is called, with its timestep."""


DOORS = {name: FULL[name].pipe for name in ("sd3", "flux-dev", "flux2-klein", "pixart-sigma", "sana")} | {
    "sd": sd,
    "sdxl": sdxl,
}


@pytest.mark.parametrize("name", DOORS)
@torch.no_grad()
def test_timesteps_are_float32_up_to_the_network(name):
    """Also where the network is in bfloat16, of which 8 bits hold no timestep of a flow."""
    pipe = DOORS[name]().to(torch.bfloat16)
    embedded = 3.5 if name == "flux-dev" else None
    model, told = LatentModel(pipe, embedded), torch.tensor(737.125)

    def halt(module, args, kwargs):
        raise Asked(kwargs["timestep"])

    hook = model.network.register_forward_pre_hook(halt, with_kwargs=True)
    conds = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in model.encode(["red"])["cond"].items()}
    with pytest.raises(Asked) as asked:
        model.family.call(model.network, model.noise(1).to(torch.bfloat16), told, conds)
    hook.remove()
    heard = asked.value.args[0]
    divisor = 1000.0 if name.startswith("flux") else 1.0
    divisor = 1 / pipe.transformer.config.timestep_scale if name == "sana" else divisor
    assert heard.dtype == torch.float32 and torch.equal(heard.flatten()[:1], told[None] / divisor)
