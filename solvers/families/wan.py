"""Wan 2.1 and 2.2, of films, and of pictures as films of one frame."""

from functools import partial
from typing import Any

from solvers.denoiser import Cond
from solvers.errors import UserError
from solvers.families.family import TEXT_INPUTS, call_transformer, guidance_told, sequential_family
from solvers.families.latents import Latents
from solvers.families.patches import SKIPPED
from solvers.families.streams import NEGATIVE, OF_WAN

WAN_INPUTS = (*TEXT_INPUTS, "encoder_hidden_states_image", *NEGATIVE)
MAX_TOKENS = 512  # of WanPipeline's call; its `encode_prompt` has another number


def encode_wan(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """umT5's hidden states (B, 512, D), zeros after the end of a text."""
    guidance_told(pipe.transformer, "guidance_embeds", embedded_guidance)
    if pipe.config.expand_timesteps:
        raise UserError("this Wan has a timestep for each token (TI2V), which LatentModel does not give; use attach")
    cond, uncond = pipe.encode_prompt(prompts, negatives or "", True, max_sequence_length=MAX_TOKENS)
    return {"cond": {"encoder_hidden_states": cond}, "uncond": {"encoder_hidden_states": uncond}}


def boundary_of(pipe: Any) -> float | None:
    """The timestep below which the second expert of Wan 2.2 takes over."""
    ratio = pipe.config.boundary_ratio
    return None if ratio is None else ratio * pipe.scheduler.config.num_train_timesteps


WAN = sequential_family(
    name="wan",
    patches={**SKIPPED, **OF_WAN},
    pipelines=("WanPipeline",),
    denoisers=("transformer", "transformer_2"),
    boundary=boundary_of,
    batch_first=WAN_INPUTS,
    encode=encode_wan,
    call=partial(call_transformer, WAN_INPUTS),
    latents=Latents(channels=lambda vae: vae.config.z_dim, film=True, frames=True),
    factor=lambda pipe: pipe.vae_scale_factor_spatial,
    size=lambda network: (60, 104),  # WanPipeline's default of 480 x 832: the network has none
    patch=2,
    draws_float32=True,
    prepare="guidance_scale > 1",
)
