"""Random models of the sizes that people run: they cost what trained ones cost."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from difftune import models

DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
WIDTHS = (128, 256, 512, 512)  # of the VAE
TWO_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # of a small UNet
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def sd15(device: str, small: bool = False, side: int = 512) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's size, for pictures of `side` pixels; small: two thin levels in place of four."""
    unet = {"sample_size": side // 8, "cross_attention_dim": 768, "attention_head_dim": 8}
    if small:
        unet |= {"sample_size": 8, "cross_attention_dim": 32, "block_out_channels": (32, 32), **TWO_LEVELS}
    torch.manual_seed(0)
    with torch.device(device):
        network, encoder = UNet2DConditionModel(**unet), text_encoder(CLIPTextModel, 768, 12, small)
        vae = autoencoder(4, small)
    return quiet(
        StableDiffusionPipeline(
            vae=vae, text_encoder=encoder, tokenizer=tokenizer(), unet=network, scheduler=ddim(), **NO_CHECKER
        )
    )


def sdxl(device: str, small: bool = False) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL's size."""
    unet: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280,
    }
    if small:
        unet |= {"sample_size": 8, "block_out_channels": (32, 32), **TWO_LEVELS}
        unet |= {"transformer_layers_per_block": 1, "attention_head_dim": 8, "cross_attention_dim": 64}
        unet |= {"projection_class_embeddings_input_dim": 6 * 256 + 32}
    torch.manual_seed(0)
    with torch.device(device):
        network, vae = UNet2DConditionModel(**unet), autoencoder(4, small)
        first = text_encoder(CLIPTextModel, 768, 12, small)
        second = text_encoder(CLIPTextModelWithProjection, 1280, 32, small)
    return quiet(
        StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=first,
            text_encoder_2=second,
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=network,
            scheduler=ddim(),
            add_watermarker=False,
        )
    )


def sd35m(device: str, small: bool = False) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 Medium's size, without T5, as many run it."""
    size: dict[str, Any] = {"num_layers": 24, "num_attention_heads": 24, "dual_attention_layers": tuple(range(13))}
    if small:
        size = {"num_layers": 2, "num_attention_heads": 1, "dual_attention_layers": (0,)}
    wide, pooled = (64, 64) if small else (4096, 768 + 1280)
    torch.manual_seed(0)
    with torch.device(device):
        network = SD3Transformer2DModel(
            sample_size=8 if small else 128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            attention_head_dim=64,
            joint_attention_dim=wide,
            caption_projection_dim=64 * size["num_attention_heads"],
            pooled_projection_dim=pooled,
            pos_embed_max_size=16 if small else 384,
            qk_norm="rms_norm",
            **size,
        )
        vae = autoencoder(16, small, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609)
        first = text_encoder(CLIPTextModelWithProjection, 768, 12, small)
        second = text_encoder(CLIPTextModelWithProjection, 1280, 32, small)
    return quiet(
        StableDiffusion3Pipeline(
            vae=vae,
            text_encoder=first,
            text_encoder_2=second,
            text_encoder_3=None,
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            tokenizer_3=None,
            transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )


SIZES: dict[str, Callable[[str, bool], Any]] = {"SD 1.5": sd15, "SDXL": sdxl, "SD3.5-M": sd35m}


# ------------------------------------------------------------------------------------------------ their parts


def text_encoder(kind: type[nn.Module], width: int, layers: int, small: bool) -> nn.Module:
    """Its width is 64 a head, as CLIP's, or 32 in one head."""
    words = tokenizer()
    width, layers = (32, 1) if small else (width, layers)
    return kind(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            projection_dim=width,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def autoencoder(channels: int, small: bool, **more: Any) -> AutoencoderKL:
    widths = (32, 32) if small else WIDTHS
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1 if small else 2,
        latent_channels=channels,
        sample_size=16 if small else 512,
        **more,
    )


def tokenizer() -> CLIPTokenizer:
    """The tokenizer of `tiny`, whose ids are fewer than CLIP's, at CLIP's length."""
    found = CLIPTokenizer.from_pretrained(models.path("tiny") / "tokenizer")
    found.model_max_length = 77
    return found


def ddim() -> DDIMScheduler:
    return DDIMScheduler(**DIFFUSION, steps_offset=1, set_alpha_to_one=False)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
