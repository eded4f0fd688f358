"""Stages `vae` and `decoder`: the AutoencoderKL of all image models, 8x8 latents of 4 channels."""

from collections.abc import Callable
from functools import lru_cache

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from scripts.tiny import scenes
from scripts.tiny.fit import Fit, Setup


def make(setup: Setup) -> AutoencoderKL:
    setup.seeded("vae", "weights")
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
    ).to(setup.device)


@lru_cache(maxsize=1)
def trained(setup: Setup, steps: int = 2400) -> AutoencoderKL:
    """L1 + L2 + 1e-4 KL; bfloat16 for most of the way, float32 for the last stretch."""
    vae = make(setup)

    def loss(step: int) -> Tensor:
        x = _pictures(setup, step)
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=step < 0.85 * steps):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        gap = y.float() - x
        return gap.abs().mean() + gap.square().mean() + 1e-4 * posterior.kl().float().mean() / 256

    Fit(setup, "vae", {"vae": vae}, loss, steps, 1.5e-3).run()
    return vae.eval().requires_grad_(False)


def finished(setup: Setup, steps: int = 800) -> AutoencoderKL:
    """The VAE with its decoder trained on, under slightly noisy latents; the encoder stays, and so do the latents."""
    vae, scale = trained(setup), encoder(setup)[1]
    decoder = {"decoder": vae.decoder.requires_grad_(True), "post_quant_conv": vae.post_quant_conv.requires_grad_(True)}

    def loss(step: int) -> Tensor:
        x = _pictures(setup, step)
        z = encoder(setup)[0](x) * scale
        z = (z + 0.05 * torch.rand(len(z), 1, 1, 1, device=z.device) * torch.randn_like(z)) / scale
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=step < 0.6 * steps):
            y = vae.decode(z).sample
        gap = y.float() - x
        return gap.abs().mean() + gap.square().mean()

    Fit(setup, "decoder", decoder, loss, steps, 6e-4).run()
    vae.register_to_config(scaling_factor=scale)
    return vae.eval().requires_grad_(False)


def _pictures(setup: Setup, step: int) -> Tensor:
    """Half a batch of one shard, in [-1, 1]."""
    numbers = scenes.window(setup, step)
    images = scenes.drawn(setup.seed, numbers[int(torch.randint(len(numbers), ()))]).images
    return scenes.pixels(images[torch.randint(len(images), (setup.batch // 2,))], setup)


@lru_cache(maxsize=1)
def encoder(setup: Setup) -> tuple[Callable[[Tensor], Tensor], float]:
    """From pictures in [-1, 1] to the means of their latents, and the factor that gives these unit variance."""
    vae = trained(setup)

    @torch.no_grad()
    def encode(x: Tensor) -> Tensor:
        return vae.encode(x).latent_dist.mean

    pictures = scenes.drawn(setup.seed, 0).images
    return encode, 1 / encode(scenes.pixels(pictures, setup)).std().item()


@torch.no_grad()
def through(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Pictures in [-1, 1] after a round trip."""
    return vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
