"""LatentModel against the pipelines themselves, finite differences and the VAE called by hand."""

from dataclasses import replace

import accelerate
import pytest
import torch
from diffusers import DDIMPipeline, EulerDiscreteScheduler, ModelMixin, StableDiffusionControlNetPipeline
from torch import nn
from torch.nn.functional import conv2d

from difftune import models
from guidance.guided import guided
from guidance.methods.catalogue import Plain
from rewards.wrappers.batched import Batched
from solvers.denoiser import SPACES, Path, Prediction, lines, predicted
from solvers.families.family import keywords
from solvers.families.table import FAMILIES, family_of
from solvers.latent import LatentModel
from solvers.memory.live import LiveBytes
from solvers.modules import dtype_of, execution_device
from solvers.noise import Noise, flow, noise, normalised
from solvers.samplers.catalogue import euler, sample
from tests.support.pipelines import ddim, sd, sdxl

PROMPTS, NEGATIVES = ["a red circle", "two blue squares"], ["a square", "red"]
STEPS, SCALE = 4, 3.0
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [0.5, 1.5, 2.0, 0.8]}


def discrete(spacing="leading"):
    return EulerDiscreteScheduler.from_config(ddim().config, timestep_spacing=spacing)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cfg(denoiser, conds):
    def predict(path, at):
        c, u = (denoiser(path.x, at, conds[name]) for name in ("cond", "uncond"))
        return Prediction(u.x0 + SCALE * (c.x0 - u.x0), u.eps + SCALE * (c.eps - u.eps))

    return predict


def run(model, x, conds, steps=STEPS):
    """Latents at the end of plain CFG in our own loop."""
    *_, last = sample(euler, cfg(model.denoiser, conds), Path(x), model.levels(steps))
    return last.x


def stock(pipe, output_type, generator, **inputs):
    options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "generator": generator, **inputs}
    return pipe(PROMPTS, negative_prompt=NEGATIVES, output_type=output_type, **options).images


PIPELINES = {
    "sd-eps": lambda: sd(),
    "sd-v": lambda: sd("v_prediction"),
    "sdxl-ddim": lambda: sdxl(),
    "sdxl-v": lambda: sdxl("v_prediction"),
    "sdxl-euler": lambda: sdxl(scheduler=discrete()),
    "sdxl-statistics": lambda: sdxl(vae_config=STATISTICS),
}


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_own_loop_equals_the_pipeline(name):
    model = LatentModel(PIPELINES[name]())
    x = run(model, model.noise(2, seeded()), model.encode(PROMPTS, NEGATIVES))
    torch.testing.assert_close(x, stock(model.pipe, "latent", seeded()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode(x), stock(model.pipe, "pt", seeded()), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_linspace_euler_starts_at_sigma_times_noise():
    """Not at sqrt(1 + sigma^2) * noise as "leading" does; its timesteps are no table points."""
    model, steps = LatentModel(sd(scheduler=discrete("linspace"))), 5
    model.pipe.scheduler.set_timesteps(steps)
    assert model.pipe.scheduler.timesteps.frac().any()
    x = model.noise(2, seeded()) * model.levels(steps)[0].sigma
    x = run(model, x, model.encode(PROMPTS, NEGATIVES), steps)
    expected = stock(model.pipe, "latent", seeded(), num_inference_steps=steps)
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_a_list_of_generators_is_its_runs_one_by_one():
    model = LatentModel(sd())
    conds = model.encode(PROMPTS, NEGATIVES)
    both = run(model, model.noise(2, [seeded(3), seeded(4)]), conds)
    for i in range(2):
        one = {name: {key: value[i : i + 1] for key, value in cond.items()} for name, cond in conds.items()}
        torch.testing.assert_close(
            both[i : i + 1], run(model, model.noise(1, seeded(3 + i)), one), atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(both, stock(model.pipe, "latent", [seeded(3), seeded(4)]), atol=1e-5, rtol=1e-5)


def test_gradient_against_finite_differences():
    """d loss / d direction, over a whole sampled and decoded image, for each thing that can be learnt."""
    model = LatentModel(sdxl().to(torch.float64))
    conds = {name: {k: v.detach() for k, v in cond.items()} for name, cond in model.encode(PROMPTS[:1]).items()}
    target = torch.rand(1, 3, 16, 16, dtype=torch.float64, generator=seeded(1))
    weight = model.network.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k.weight
    hidden = conds["cond"]["encoder_hidden_states"]
    leaves = [model.noise(1, seeded()).requires_grad_(), hidden.requires_grad_(), weight]
    assert leaves[0].dtype == torch.float64

    def loss():
        x = run(model, leaves[0], conds, steps=2)
        return (model.decode(x) - target).square().sum()

    grads = torch.autograd.grad(loss(), leaves)
    for leaf, grad in zip(leaves, grads, strict=True):
        direction = torch.randn(leaf.shape, dtype=torch.float64, generator=seeded(2))
        with torch.no_grad():
            origin, h = leaf.clone(), 1e-5
            ends = [(leaf.copy_(origin + sign * h * direction), loss())[1] for sign in (1, -1)]
            leaf.copy_(origin)
        expected = (ends[0] - ends[1]) / (2 * h)
        assert expected.abs() > 1e-6
        torch.testing.assert_close((grad * direction).sum(), expected, rtol=1e-5, atol=1e-9)


def test_checkpointed_decode_is_the_same_function_with_the_same_gradient():
    model = LatentModel(sd())
    z = model.noise(2, seeded()).requires_grad_()
    plain, checkpointed = model.decode(z), model.decode(z, checkpointed=True)
    assert torch.equal(plain, checkpointed)
    grads = [torch.autograd.grad(images.square().sum(), z)[0] for images in (plain, checkpointed)]
    torch.testing.assert_close(*grads)


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"shift_factor": 0.3, "scaling_factor": 1.5}, STATISTICS])
def test_images_go_through_the_vae_and_back(config):
    model = LatentModel(sd(vae_config=config))
    vae, images = model.pipe.vae, torch.rand(2, 3, 16, 16, generator=seeded())
    raw = vae.encode(2 * images - 1).latent_dist.mode()
    mean, std = (
        torch.tensor(config.get(k, d)).view(1, -1, 1, 1) for k, d in (("latents_mean", [0.0]), ("latents_std", [1.0]))
    )
    expected = (raw - mean - config.get("shift_factor", 0)) * config.get("scaling_factor", 0.18215) / std
    z = model.encode_images(images)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(model.decode(z), (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=1e-5)


def test_float16_vae_runs_in_float32_and_is_left_as_it_was():
    pipe = sdxl()
    pipe.vae.half()
    model, exact = LatentModel(pipe), LatentModel(sdxl())
    exact.pipe.vae.load_state_dict(pipe.vae.state_dict())
    z = model.noise(1, seeded()).requires_grad_()
    for method, x in (("decode", z), ("encode_images", torch.rand(1, 3, 16, 16))):
        torch.testing.assert_close(getattr(model, method)(x), getattr(exact, method)(x))
    model.decode(z, checkpointed=True).square().sum().backward()
    weight, reference = pipe.vae.decoder.conv_in.weight, exact.pipe.vae.decoder.conv_in.weight
    exact.decode(z.detach()).square().sum().backward()
    assert weight.dtype == torch.float16 and z.grad.abs().sum() > 0
    torch.testing.assert_close(weight.grad.float(), reference.grad, rtol=2e-3, atol=1e-4)


def seen(pipe, **inputs):
    """What the pipeline calls its UNet with."""
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    pipe(PROMPTS, num_inference_steps=1, guidance_scale=SCALE, output_type="latent", **inputs)
    handle.remove()
    return calls[0]


@torch.no_grad()
@pytest.mark.parametrize("negatives", [None, NEGATIVES])
@pytest.mark.parametrize("make", [sd, sdxl, lambda: sdxl(force_zeros=False)])
def test_conditions_are_those_that_the_pipeline_passes(make, negatives):
    model = LatentModel(make())
    call = seen(model.pipe, negative_prompt=negatives, height=24, width=32)
    conds = model.encode(PROMPTS, negatives, height=24, width=32)
    expected = {"encoder_hidden_states": call["encoder_hidden_states"], **(call["added_cond_kwargs"] or {})}
    assert conds["cond"].keys() == conds["uncond"].keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(torch.cat([conds["uncond"][key], conds["cond"][key]]), value), key


@torch.no_grad()
def test_one_prompt_and_one_negative_may_be_strings():
    model = LatentModel(sd())
    conds, lists = model.encode("red", "blue"), model.encode(["red"], ["blue"])
    shared = model.encode(PROMPTS, "blue")
    for name in ("cond", "uncond"):
        assert torch.equal(conds[name]["encoder_hidden_states"], lists[name]["encoder_hidden_states"])
    torch.testing.assert_close(*shared["uncond"]["encoder_hidden_states"])
    torch.testing.assert_close(shared["uncond"]["encoder_hidden_states"][:1], lists["uncond"]["encoder_hidden_states"])


@torch.no_grad()
@pytest.mark.parametrize("width", [8, 9])
def test_guidance_scale_is_embedded_for_a_distilled_network(width):
    pipe = sd(unet_config={"time_cond_proj_dim": width})
    model = LatentModel(pipe, embedded_guidance=SCALE)
    conds = model.encode(PROMPTS)
    assert torch.equal(conds["cond"]["timestep_cond"], seen(pipe)["timestep_cond"])
    x, at = model.noise(2, seeded()), model.levels(1)[0]
    without = {"encoder_hidden_states": conds["cond"]["encoder_hidden_states"]}
    assert not torch.allclose(model.denoiser(x, at, conds["cond"]).x0, model.denoiser(x, at, without).x0)


@torch.no_grad()
@pytest.mark.parametrize("space", ["eps", "v", "x0", "flow"])
def test_a_prediction_does_not_depend_on_the_coordinates(space):
    model = LatentModel(sd())
    denoiser, cond = replace(model.denoiser, prediction_type=space), model.encode(PROMPTS)["cond"]
    x, at = model.noise(2, seeded()), model.levels(STEPS)[1]
    here = denoiser(x, at, cond)
    torch.testing.assert_close(at.alpha * here.x0 + at.sigma * here.eps, x, atol=2e-6, rtol=1e-5)
    own = denoiser.own(x, noise(3.0, 4.0))[1]
    assert own == pytest.approx((3 / 7, 4 / 7) if space == "flow" else (3 / 5, 4 / 5))
    for factor in (at.alpha, at.alpha + at.sigma, 1 / at.sigma):  # VE, flow, and one that nobody uses
        there = denoiser(x / factor, noise(at.alpha / factor, at.sigma / factor), cond)
        torch.testing.assert_close((there.x0, there.eps), (here.x0, here.eps), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_network_runs_in_its_dtype_and_the_prediction_is_float32():
    model = LatentModel(sdxl())
    conds, x, at = model.encode(PROMPTS), model.noise(2, seeded()), model.levels(STEPS)[1]
    exact = model.denoiser(x, at, conds["cond"])
    model.pipe.unet.bfloat16()
    p = model.denoiser(x, at, conds["cond"])
    assert p.x0.dtype == p.eps.dtype == torch.float32 and model.dtype == torch.bfloat16
    drawn = torch.randn(2, 4, 8, 8, dtype=model.dtype, generator=seeded())
    torch.testing.assert_close(model.noise(2, seeded()), drawn.float(), atol=0, rtol=0)  # and in float32
    assert 0 < (p.eps - exact.eps).abs().max() < 0.1 * exact.eps.abs().max()
    torch.testing.assert_close(at.alpha * p.x0 + at.sigma * p.eps, x, atol=1e-5, rtol=1e-5)


def test_no_module_changes_mode_or_requires_grad():
    model = LatentModel(sd())
    modules = [m for m in model.pipe.components.values() if isinstance(m, nn.Module)]
    for i, module in enumerate(modules):
        module.train().requires_grad_(i % 2 == 0)

    def flags():
        return [m.training for p in modules for m in p.modules()], [
            q.requires_grad for p in modules for q in p.parameters()
        ]

    before = flags()
    x = run(model, model.noise(1, seeded()), model.encode(["red"]), steps=1)
    model.encode_images(model.decode(x, checkpointed=True))
    assert flags() == before


@pytest.mark.parametrize(
    "height, width, expected", [(None, None, (4, 8, 8)), (24, None, (4, 12, 8)), (10, 32, (4, 5, 16))]
)
def test_shape_is_that_of_encoded_images(height, width, expected):
    model = LatentModel(sd())
    assert model.shape(height, width) == expected
    assert model.noise(3, height=height, width=width).shape == (3, *expected)
    assert model.encode_images(torch.rand(1, 3, *model.size(height, width))).shape == (1, *expected)


def test_what_is_not_supported_is_refused_by_name():
    pipe = sd()
    model = LatentModel(pipe)
    unknown = DDIMPipeline(pipe.unet, pipe.scheduler)
    with pytest.raises(ValueError, match="DDIMPipeline.*StableDiffusionPipeline.*StableDiffusionXLPipeline"):
        LatentModel(unknown)
    with pytest.raises(ValueError, match="9 channels"):
        LatentModel(sd(unet_config={"in_channels": 9}))
    parts = {**pipe.components, "controlnet": None, "requires_safety_checker": False}
    with pytest.raises(ValueError, match="ControlNet"):
        LatentModel(StableDiffusionControlNetPipeline(**parts))
    with pytest.raises(ValueError, match="no patch 'cat'; known: pag, slg, seg, nasa, nag"):
        model.denoiser.patched("cat")
    with pytest.raises(ValueError, match="3 generators for a batch of 2"):
        model.noise(2, [seeded()] * 3)
    with pytest.raises(ValueError, match="17 x 16 pixels.* 2"):
        model.shape(height=17)
    with pytest.raises(ValueError, match="do not pass embedded_guidance"):
        LatentModel(pipe, embedded_guidance=2.0).encode("red")
    with pytest.raises(ValueError, match="time_cond_proj_dim=8: pass embedded_guidance"):
        LatentModel(sd(unet_config={"time_cond_proj_dim": 8})).encode("red")


def test_keywords_nest_by_the_table():
    family = family_of(sdxl())
    assert family is FAMILIES["sdxl"]
    arguments = keywords(family.batch_first, {"encoder_hidden_states": 1, "text_embeds": 2, "time_ids": 3})
    assert arguments == {"encoder_hidden_states": 1, "added_cond_kwargs": {"text_embeds": 2, "time_ids": 3}}
    with pytest.raises(ValueError, match="takes no text_embedding; known: .*text_embeds"):
        keywords(family.batch_first, {"text_embedding": 1})


def test_what_is_read_once_a_run_is_read_anew_by_the_next():
    """A network that is cast, replaced or offloaded between two runs is followed."""
    pipe = sd()
    model, x = LatentModel(pipe), torch.randn(1, 4, 8, 8)
    denoiser, at = model.denoiser, model.levels(4)[1]
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    for dtype in (torch.float32, torch.bfloat16):
        pipe.unet.to(dtype)
        predict = guided(denoiser, Plain(), {"cond": model.encode(["a"])["cond"]})
        predict(Path(x), at)
        other = replace(predict.networks["main"], network=sd().unet)
        assert other.dtype == torch.float32  # of the other network, whatever was read of this one
        assert model.dtype == dtype
    assert seen == [torch.float32, torch.bfloat16]


def test_walks_are_those_of_diffusers():
    """Also under layerwise casting and offloading, of whose hooks a quick look must not miss one."""
    pipe = sd()
    pipe.unet.conv_norm_out.to(torch.bfloat16)
    assert dtype_of(pipe.unet) == pipe.unet.dtype == torch.float32
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert dtype_of(pipe.unet) == pipe.unet.dtype == torch.bfloat16
    assert execution_device(pipe) == pipe._execution_device == torch.device("cpu")
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        accelerate.hooks.add_hook_to_module(part, accelerate.hooks.AlignDevicesHook("meta"))
    assert execution_device(pipe) == pipe._execution_device == torch.device("meta")


def test_the_dtype_of_a_kind_of_network_that_inherits_what_it_keeps_in_float32():
    class Own(Kept):
        pass

    network = Own().to(torch.bfloat16)
    network.first.float()
    assert dtype_of(network) == network.dtype == torch.bfloat16


class Kept(ModelMixin):
    _keep_in_fp32_modules = ["first"]

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)


def test_a_level_that_is_kept_is_on_the_cpu_whatever_the_default_device():
    at = flow(0.123456)
    with torch.device("meta"):
        scale, own = normalised("eps", at)
    assert own.alpha.device == own.sigma.device == torch.device("cpu") and scale == normalised("eps", at)[0]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_that_are_kept_multiply_to_the_same_bits(space, dtype):
    x, out = torch.randn(2, 3, 8, 8, dtype=dtype), torch.randn(2, 3, 8, 8, dtype=dtype)
    for at in (noise(0.3, 0.954), noise(1.0, 14.6), flow(0.37), noise(1.0, 0.0), noise(0.0, 1.0)):
        p, q, m, n = lines(space, at)
        with torch.inference_mode():  # what is kept must not be bound to it
            predicted(space, x, at, out)
        found = predicted(space, x.clone().requires_grad_(), at, out)
        assert all(
            a.equal(b) for a, b in zip(found[:2], (p * x + q * out, m * x + n * out), strict=True) if a.isfinite().all()
        )
        assert found.x0.isfinite().all() == (p * x + q * out).isfinite().all()
        scale, own = normalised(space, at)
        assert torch.equal(x / scale, x / (at.alpha + at.sigma if space == "flow" else torch.hypot(*at)))
        assert not own.alpha.is_inference()


def test_a_level_with_a_gradient_or_one_per_sample_is_not_kept():
    alpha = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 1)
    (slope,) = torch.autograd.grad(predicted("eps", x, Noise(alpha, alpha.detach()), x).x0.sum(), alpha)
    assert slope.abs() > 0
    each = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    assert predicted("eps", x, Noise(each, 1 - each), x).x0.shape == (2, 1)


def test_images_are_decoded_one_at_a_time_to_the_same_gradient():
    """One image and the batch: a convolution of a batch is that of its images, so the bits are the same here; a
    reward with a matrix product over the batch may differ in the last one."""
    model, z = LatentModel(sd()), torch.randn(3, 4, 8, 8)
    seen = []
    model.pipe.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    found = []
    for size in (1, 2, 3):
        x = z.clone().requires_grad_()
        images = replace(model, decode_batch=size).decode(x, checkpointed=True)
        found.append((images.detach(), *torch.autograd.grad(images.square().sum(), x)))
    assert seen == [1, 1, 1] * 2 + [2, 1] + [1, 2] + [3] * 2  # there, and last part first on the way back
    for images, gradient in found[1:]:
        assert torch.allclose(images, found[0][0], atol=1e-6) and torch.allclose(gradient, found[0][1], atol=1e-5)
    with pytest.raises(ValueError, match="decode_batch is 0"):
        LatentModel(sd(), decode_batch=0)


def peak_of(model, reward, batch):
    """Most live bytes of decoding and rewarding, and of the way back."""
    x = torch.randn(batch, 4, 16, 16).requires_grad_()
    with LiveBytes() as live:
        torch.autograd.grad(reward(model.decode(x, checkpointed=True), ["a"] * batch).sum(), x)
    return live.peak


@pytest.mark.slow
def test_the_peak_of_decoding_and_rewarding_does_not_grow_with_the_batch():
    pipe, weights = models.load("tiny"), torch.randn(8, 3, 5, 5)
    whole = lambda images, prompts: conv2d(images, weights).tanh().mean((1, 2, 3))  # noqa: E731
    parts = Batched(whole, 1, gradient_checkpointing=True)
    one, eight = (peak_of(LatentModel(pipe), parts, batch) for batch in (1, 8))
    assert eight / one <= 1.2, (one, eight)
    assert peak_of(LatentModel(pipe, decode_batch=8), whole, 8) > 4 * one  # what it was


@pytest.mark.slow
def test_a_large_image_is_decoded_in_tiles_that_are_recomputed_one_by_one():
    pipe = models.load("tiny")
    vae = pipe.vae
    vae.tile_latent_min_size, vae.tile_sample_min_size = 16, 64
    model, x = LatentModel(pipe, tiled=True), torch.randn(1, 4, 40, 40)
    found = model.decode(x)
    vae.enable_tiling()
    with torch.no_grad():
        stock = vae.decode(x / vae.config.scaling_factor, return_dict=False)[0]
    vae.disable_tiling()
    assert torch.equal(found.detach(), (stock / 2 + 0.5).clamp(0, 1))
    peaks, gradients = [], []
    for recomputed in (True, False):
        z = x.clone().requires_grad_()
        with LiveBytes() as live:
            gradients += torch.autograd.grad(model.decode(z, checkpointed=recomputed).square().sum(), z)
        peaks.append(live.peak)
    assert torch.equal(*gradients) and not vae.use_tiling and "forward" not in vars(vae.decoder)
    z = x.clone().requires_grad_()
    with LiveBytes() as live:
        torch.autograd.grad(LatentModel(pipe).decode(z, checkpointed=True).square().sum(), z)
    assert max(peaks) < 0.4 * live.peak
    pipe.vae.__dict__.pop("use_tiling")
    with pytest.raises(ValueError, match="cannot decode in tiles: leave enable_vae_tiling out"):
        LatentModel(pipe, tiled=True)
