"""Stable Diffusion 1 and 2."""

from typing import Any

from solvers.denoiser import Cond
from solvers.families.unet import TASKS, guidance_embedding, unet_family
from solvers.modules import execution_device


def encode_sd(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """Hidden states of the text encoder, (B, L, D)."""
    cond, uncond = pipe.encode_prompt(prompts, execution_device(pipe), 1, True, negative_prompt=negatives)
    more = guidance_embedding(pipe.unet, embedded_guidance, cond)
    return {"cond": {"encoder_hidden_states": cond, **more}, "uncond": {"encoder_hidden_states": uncond, **more}}


SD = unet_family(name="sd", pipelines=tuple(f"StableDiffusion{task}Pipeline" for task in TASKS), encode=encode_sd)
