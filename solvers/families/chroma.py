"""Chroma: FLUX.1's layout with one text encoder, true guidance, and a mask over the text."""

from typing import Any

import torch
from torch import Tensor

from solvers.denoiser import Cond
from solvers.families.family import TEXT_INPUTS, guidance_told, sequential_family, thousandth
from solvers.families.flux import grid_of_places, places_of, shifted_flux
from solvers.families.patches import SKIPPED_JOINT
from solvers.families.streams import JOINT, NEGATIVE
from solvers.families.tokens import packed, unpacked

CHROMA_INPUTS = (*TEXT_INPUTS, "attention_mask", *NEGATIVE)


def encode_chroma(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """T5's hidden states (B, 512, D), and a mask (B, 512) of the text and one token after it."""
    guidance_told(pipe.transformer, "guidance_embeds", embedded_guidance)
    negatives = negatives or [""] * len(prompts)
    cond, _, mask, uncond, _, negative_mask = pipe.encode_prompt(prompts, negatives)
    return {
        "cond": {"encoder_hidden_states": cond, "attention_mask": mask},
        "uncond": {"encoder_hidden_states": uncond, "attention_mask": negative_mask},
    }


def call_chroma(network: Any, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """As FLUX, with the picture's tokens after the text's in the mask."""
    grid = x.shape[-2] // 2, x.shape[-1] // 2
    text, mask = cond["encoder_hidden_states"], cond["attention_mask"]
    out = network(
        packed(x),
        timestep=timestep.to(x.device, torch.float32).expand(len(x)) / 1000,
        encoder_hidden_states=text,
        attention_mask=torch.cat([mask, mask.new_ones(len(x), grid[0] * grid[1])], dim=1),
        img_ids=places_of(grid).to(x),
        txt_ids=x.new_zeros(text.shape[1], 3),
        return_dict=False,
    )[0]
    return unpacked(out, grid)


CHROMA = sequential_family(
    name="chroma",
    patches={**SKIPPED_JOINT, **JOINT},
    pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline"),
    batch_first=CHROMA_INPUTS,
    encode=encode_chroma,
    call=call_chroma,
    grid=grid_of_places,
    options=shifted_flux,
    size=lambda network: 128,  # ChromaPipeline.default_sample_size: the network has none
    patch=2,
    prepare="guidance_scale > 1",
    time=thousandth,
)
