"""Stages `tiny` and `weak`: the UNets of Stable Diffusion's layout, v-prediction on SD's schedule."""

from copy import deepcopy
from functools import lru_cache

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor, nn

from scripts.tiny import clip, scenes, words
from scripts.tiny.fit import Fit, Setup

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
LOG_RATIO = 0.5, 1.1  # mean and deviation of log(sigma / alpha) in training: most of it where the layout is decided
LATE = -0.4, 0.6  # of the second stage: where an object of which the caption names no colour takes one


def make(setup: Setup, name: str, channels: tuple[int, ...] = (64, 128)) -> UNet2DConditionModel:
    setup.seeded(name, "weights")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=clip.WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return unet.to(setup.device, memory_format=torch.channels_last)


@lru_cache(maxsize=1)
def trained(setup: Setup, steps: int = 24_000) -> UNet2DConditionModel:
    """`tiny`."""
    unet = make(setup, "tiny")
    network = setup.compiled(unet)
    Fit(setup, "tiny", {"unet": unet}, lambda step: v_loss(network, setup, step), steps, 1e-3).run()
    return unet.eval()


@lru_cache(maxsize=1)
def finished(setup: Setup, steps: int = 1500) -> UNet2DConditionModel:
    """`tiny` after its second stage, half of it at `LATE` noise levels: the first alone blends two colours there."""
    unet = deepcopy(trained(setup)).train()
    network = setup.compiled(unet)
    Fit(setup, "colour", {"unet": unet}, lambda step: v_loss(network, setup, step, late=0.5), steps, 3e-4).run()
    return unet.eval()


def weak(setup: Setup, steps: int = 900) -> UNet2DConditionModel:
    """`tiny-weak`: a ninth of the parameters, stopped early."""
    unet = make(setup, "weak", (32, 32))
    Fit(setup, "weak", {"unet": unet}, lambda step: v_loss(unet, setup, step), steps, 1.5e-3).run()
    return unet.eval()


def v_loss(unet: nn.Module, setup: Setup, step: int, late: float = 0.0) -> Tensor:
    """|v - (alpha eps - sigma x0)|^2 (https://arxiv.org/abs/2202.00512) at log-normal noise levels, a share `late` of
    them at the second stage's."""
    z, ids = scenes.latents(setup, step).draw(setup.batch, setup)
    alpha, sigma, t = noise_levels(setup, len(z), late)
    eps = torch.randn_like(z)
    with torch.no_grad():
        states = clip.text_encoder(setup)(ids).last_hidden_state
    with half(setup):
        v = unet((alpha * z + sigma * eps).contiguous(memory_format=torch.channels_last), t, states).sample
    return (v.float() - (alpha * eps - sigma * z)).square().mean()


def noise_levels(setup: Setup, count: int, late: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """alpha and sigma (B, 1, 1, 1) at random time steps (B,)."""
    power, wanted = alphas_cumprod(setup), torch.randn(count, device=setup.device)
    means, deviations = (torch.full_like(wanted, value) for value in LOG_RATIO)
    if late:
        second = torch.rand(count, device=setup.device) < late
        means[second], deviations[second] = LATE
    t = torch.searchsorted(0.5 * torch.log((1 - power) / power), means + deviations * wanted)
    t = t.clamp(max=len(power) - 1)
    chosen = power[t].view(-1, 1, 1, 1)
    return chosen.sqrt(), (1 - chosen).sqrt(), t


def alphas_cumprod(setup: Setup) -> Tensor:
    return DDIMScheduler(**TABLE).alphas_cumprod.to(setup.device)


@torch.no_grad()
def guided(setup: Setup, x: Tensor, ids: Tensor, steps: int, scale: float) -> tuple[Tensor, list[Tensor]]:
    """DPM++ 2M of the finished `tiny` under classifier-free guidance: the time steps, and the latents from `x` on."""
    scheduler = DPMSolverMultistepScheduler(
        **TABLE, prediction_type="v_prediction", timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    text, unet, xs = clip.text_encoder(setup), finished(setup), [x]
    cond = text(ids.to(setup.device)).last_hidden_state
    uncond = text(words.tokens([""]).to(setup.device)).last_hidden_state.expand(len(x), -1, -1)
    for t in scheduler.timesteps:
        u, c = unet(torch.cat([x, x]), t, torch.cat([uncond, cond])).sample.chunk(2)
        x = scheduler.step(u + scale * (c - u), t, x).prev_sample
        xs.append(x)
    return scheduler.timesteps, xs


def half(setup: Setup) -> torch.autocast:
    """bfloat16 on a GPU; on these CPUs it is slower than float32 (0.61 s against 0.52 s a step of 64, one thread)."""
    return torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.device.type == "cuda")
