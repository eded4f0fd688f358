"""Lumina-Image 2.0."""

from typing import Any

import numpy as np
from torch import Tensor

from solvers.denoiser import Cond
from solvers.families.after import ROW_NORM
from solvers.families.family import TEXT_INPUTS, call_network, guidance_told, remaining, sequential_family, shift
from solvers.families.patches import SKIPPED

LUMINA2_INPUTS = (*TEXT_INPUTS, "encoder_attention_mask")


def encode_lumina2(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """Gemma's hidden states (B, 256, D) and their mask (B, 256); the pipeline's system prompt precedes a prompt, and
    does not precede a negative one."""
    guidance_told(pipe.transformer, "guidance_embeds", embedded_guidance)
    cond, mask, uncond, unmask = pipe.encode_prompt(prompts, True, negatives or "")
    return {
        "cond": {"encoder_hidden_states": cond, "encoder_attention_mask": mask},
        "uncond": {"encoder_hidden_states": uncond, "encoder_attention_mask": unmask},
    }


def call_lumina2(network: Any, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """The network's time runs from 0 at noise to 1, and it says x0 - eps."""
    timestep = (1 - timestep / 1000).to(x.device).expand(len(x))
    return -call_network(LUMINA2_INPUTS, network, x, timestep, cond)


def shifted_by_channels(pipe: Any, latent: tuple[int, int], steps: int) -> dict[str, Any]:
    """Levels 1, ..., 1/N before the shift, which the pipeline takes from the number of the latents' channels, where
    others take that of the tokens."""
    channels = pipe.transformer.config.in_channels
    return {
        "sigmas": np.linspace(1.0, 1 / steps, steps),
        "mu": shift(pipe.scheduler.config, channels, 1.15),
    }


LUMINA2 = sequential_family(
    name="lumina2",
    patches=SKIPPED,
    pipelines=("Lumina2Pipeline",),
    batch_first=LUMINA2_INPUTS,
    encode=encode_lumina2,
    call=call_lumina2,
    prediction=lambda out, x: -out,
    options=shifted_by_channels,
    patch=2,
    after=ROW_NORM,
    prepare="guidance_scale > 1",
    time=remaining,
)
