"""Sana."""

import inspect
from typing import Any

from torch import Tensor

from solvers.denoiser import Cond
from solvers.families.family import (
    TEXT_INPUTS,
    call_transformer,
    guidance_told,
    predicting_half,
    transformer_family,
)
from solvers.families.patches import SELF_ATTENTION_PATCHES

SANA_INPUTS = (*TEXT_INPUTS, "encoder_attention_mask")


def encode_sana(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """Gemma's hidden states (B, L, D) and their mask (B, L); the prompt follows the pipeline's own instruction."""
    guidance_told(pipe.transformer, "guidance_embeds", embedded_guidance)
    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    cond, mask, uncond, unmask = pipe.encode_prompt(
        prompts, True, negatives or "", complex_human_instruction=instruction
    )
    return {
        "cond": {"encoder_hidden_states": cond, "encoder_attention_mask": mask},
        "uncond": {"encoder_hidden_states": uncond, "encoder_attention_mask": unmask},
    }


def call_sana(network: Any, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    return call_transformer(SANA_INPUTS, network, x, timestep * network.config.timestep_scale, cond)


SANA = transformer_family(
    name="sana",
    patches=SELF_ATTENTION_PATCHES,
    pipelines=("SanaPipeline",),
    batch_first=SANA_INPUTS,
    encode=encode_sana,
    call=call_sana,
    prediction=lambda out, x: predicting_half(out.float(), x),
    draws_float32=True,
    time=lambda network, timestep: timestep * network.config.timestep_scale,
)
