"""Stable Diffusion XL and its refiner."""

from typing import Any

import torch
from torch import Tensor

from solvers.denoiser import Cond
from solvers.families.unet import TASKS, guidance_embedding, unet_family

AESTHETIC_SCORES = {"cond": 6.0, "uncond": 2.5}  # diffusers' defaults for the SDXL refiner


def encode_sdxl(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """Hidden states of both text encoders (B, L, D), the pooled embedding (B, P), and the time ids (B, 6).

    Without negatives, the unconditional embeddings are zeros if the pipeline has `force_zeros_for_empty_prompt`.
    """
    cond, uncond, pooled, unpooled = pipe.encode_prompt(prompts, negative_prompt=negatives)
    texts = {"cond": (cond, pooled), "uncond": (uncond, unpooled)}
    more = guidance_embedding(pipe.unet, embedded_guidance, cond)
    return {
        branch: {
            "encoder_hidden_states": hidden,
            "text_embeds": pooled.to(hidden.device),
            "time_ids": time_ids(pipe, size, branch).to(hidden).repeat(len(hidden), 1),
            **more,
        }
        for branch, (hidden, pooled) in texts.items()
    }


def time_ids(pipe: Any, size: tuple[int, int], branch: str) -> Tensor:
    """SDXL's micro-conditioning (1, 6): original size, crop corner, target size; (1, 5) for a refiner."""
    aesthetic = pipe.config.get("requires_aesthetics_score", False)
    return torch.tensor([[*size, 0.0, 0.0, *((AESTHETIC_SCORES[branch],) if aesthetic else size)]])


_PIPELINES = [
    f"StableDiffusionXL{task}Pipeline" for task in (*TASKS, *(f"ControlNetUnion{task}" for task in TASKS[:3]))
]

SDXL = unet_family(name="sdxl", pipelines=tuple(_PIPELINES), encode=encode_sdxl, upcast_vae=True)
