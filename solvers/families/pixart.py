"""PixArt-alpha and PixArt-sigma."""

from functools import partial
from typing import Any

import torch

from solvers.denoiser import Cond
from solvers.families.family import TEXT_INPUTS, call_transformer, guidance_told, predicting_half, transformer_family
from solvers.families.patches import SELF_ATTENTION_PATCHES

PIXART_INPUTS = (
    *TEXT_INPUTS,
    "encoder_attention_mask",
    "added_cond_kwargs.resolution",
    "added_cond_kwargs.aspect_ratio",
)


def encode_pixart(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """T5's hidden states (B, L, D), their mask (B, L), and for alpha at 1024 pixels size (B, 2) and ratio (B, 1)."""
    guidance_told(pipe.transformer, "guidance_embeds", embedded_guidance)
    cond, mask, uncond, unmask = pipe.encode_prompt(prompts, True, negatives or "", clean_caption=True)
    more = {}
    if pipe.transformer.use_additional_conditions:
        more["resolution"] = torch.tensor([size]).repeat(len(cond), 1).to(cond)
        more["aspect_ratio"] = torch.tensor([[size[0] / size[1]]]).repeat(len(cond), 1).to(cond)
    return {
        "cond": {"encoder_hidden_states": cond, "encoder_attention_mask": mask, **more},
        "uncond": {"encoder_hidden_states": uncond, "encoder_attention_mask": unmask, **more},
    }


PIXART = transformer_family(
    name="pixart",
    patches=SELF_ATTENTION_PATCHES,
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    batch_first=PIXART_INPUTS,
    encode=encode_pixart,
    call=partial(call_transformer, PIXART_INPUTS),
    prediction=predicting_half,
    patch=2,
)
