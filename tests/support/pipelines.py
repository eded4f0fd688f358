"""Tiny random diffusers pipelines: every part real, seeded, and small enough to build in a fraction of a second."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 16  # of a text encoder
BLOCKS = (8, 16)  # channels of a UNet and of a VAE
TOKENS = 16  # that a prompt may have, each byte outside WORDS being one
LATENT = 8  # side of a latent; the VAE halves once, so an image has 16 pixels
WORDS = ("red", "blue", "circle", "square")


@cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE: each byte, each byte at the end of a word, merges for four words, and the two special tokens."""
    tokens = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    merges = [pair for word in WORDS for pair in _merges(word)]
    tokens = [*tokens, *(t + "</w>" for t in tokens), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, list(dict.fromkeys(merges))


def _merges(word: str) -> list[tuple[str, str]]:
    parts = [*word[:-1], word[-1] + "</w>"]
    return [("".join(parts[:i]), parts[i]) for i in range(1, len(parts))]


def tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    vocab, merges = vocabulary()
    return CLIPTokenizer(vocab=dict(vocab), merges=list(merges), pad_token=pad_token, model_max_length=TOKENS)


def text_encoder(kind: type = CLIPTextModel, **config) -> CLIPTextModel | CLIPTextModelWithProjection:
    vocab, _ = vocabulary()
    ids = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": len(vocab) - 1}
    size = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2}
    return kind(CLIPTextConfig(vocab_size=len(vocab), max_position_embeddings=TOKENS, **ids, **size, **config)).eval()


def unet(**config) -> UNet2DConditionModel:
    defaults = {
        "sample_size": LATENT,
        "layers_per_block": 1,
        "block_out_channels": BLOCKS,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "cross_attention_dim": WIDTH,
    }
    return UNet2DConditionModel(**{**defaults, **config}).eval()


def vae(**config) -> AutoencoderKL:
    defaults = {
        "block_out_channels": BLOCKS,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 2 * LATENT,
    }
    return AutoencoderKL(**{**defaults, **config}).eval()


def ddim(prediction_type: str = "epsilon", **config) -> DDIMScheduler:
    """The scheduler settings that the Stable Diffusion checkpoints ship."""
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    rules = {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": prediction_type}
    return DDIMScheduler(**{**table, **rules, **config})


def sd(
    prediction_type: str = "epsilon",
    seed: int = 0,
    scheduler: SchedulerMixin | None = None,
    unet_config: dict | None = None,
    vae_config: dict | None = None,
) -> StableDiffusionPipeline:
    """A Stable Diffusion of about 90k parameters with 8-pixel latents and 16-pixel images.

    `scheduler` replaces the DDIM one and is left as it is; `unet_config` and `vae_config` override the tiny sizes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusionPipeline(
            vae=vae(**(vae_config or {})),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
            unet=unet(**(unet_config or {})),
            scheduler=scheduler or ddim(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd_turbo() -> StableDiffusionPipeline:
    """A random checkpoint of the layout of stabilityai/sd-turbo, at its 512 pixels.

    Euler, trailing timesteps, eps, linear projections, heads by block, and a VAE that halves three times.
    """
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    layout = {"sample_size": 64, "use_linear_projection": True, "attention_head_dim": (1, 2)}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    size = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "sample_size": 512}
    scheduler = EulerDiscreteScheduler(**table, timestep_spacing="trailing")
    return sd(scheduler=scheduler, unet_config=layout, vae_config={**blocks, **size})


@contextmanager
def kinked(pipe, steps: int, index: int, words: torch.Tensor | None = None) -> Iterator[None]:
    """A UNet whose answer stays as it is, and whose gradient is not finite, at step `index` of `steps`; for the rows
    with the embedding `words` alone, if it is given."""
    scheduler = deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    broken = float(scheduler.timesteps[index])

    def kink(unet, args, kwargs, out):
        if abs(float(kwargs["timestep"].flatten()[0]) - broken) > 0.5:
            return out
        rows = [words is None or torch.equal(own, words) for own in kwargs["encoder_hidden_states"]]
        bent = [(0 * row).sqrt() if bad else 0 * row for row, bad in zip(args[0], rows, strict=True)]
        return (out[0] + torch.stack(bent), *out[1:])

    hook = pipe.unet.register_forward_hook(kink, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def sdxl(
    prediction_type: str = "epsilon",
    seed: int = 0,
    scheduler: SchedulerMixin | None = None,
    unet_config: dict | None = None,
    vae_config: dict | None = None,
    force_zeros: bool = True,
) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL of the same size: two text encoders, pooled embedding, micro-conditioning."""
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "cross_attention_dim": 2 * WIDTH}
    added["projection_class_embeddings_input_dim"] = 6 * 8 + WIDTH
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusionXLPipeline(
            vae=vae(**(vae_config or {})),
            text_encoder=text_encoder(),
            text_encoder_2=text_encoder(CLIPTextModelWithProjection, projection_dim=WIDTH, hidden_act="gelu"),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(pad_token="!"),
            unet=unet(**{**added, **(unet_config or {})}),
            scheduler=scheduler or ddim(prediction_type),
            force_zeros_for_empty_prompt=force_zeros,
            add_watermarker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
