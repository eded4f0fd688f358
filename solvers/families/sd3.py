"""Stable Diffusion 3 and 3.5."""

from functools import partial
from typing import Any

from solvers.denoiser import Cond
from solvers.families.after import SKIP_LAYERS
from solvers.families.family import TEXT_INPUTS, call_transformer, guidance_told, shifted, transformer_family
from solvers.families.patches import SKIPPED_SD3
from solvers.families.streams import JOINT, NEGATIVE

SD3_INPUTS = (*TEXT_INPUTS, "pooled_projections", "joint_attention_kwargs.ip_adapter_image_embeds", *NEGATIVE)
SD3_RESIDUALS = ("block_controlnet_hidden_states",)
SD3_TASKS = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpainting")


def encode_sd3(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """Hidden states of the three text encoders (B, L, D), and the pooled ones of two (B, P)."""
    guidance_told(pipe.transformer, "guidance_embeds", embedded_guidance)
    cond, uncond, pooled, unpooled = pipe.encode_prompt(prompts, None, None, negative_prompt=negatives)
    return {
        "cond": {"encoder_hidden_states": cond, "pooled_projections": pooled},
        "uncond": {"encoder_hidden_states": uncond, "pooled_projections": unpooled},
    }


SD3 = transformer_family(
    name="sd3",
    patches={**SKIPPED_SD3, **JOINT},
    pipelines=tuple(f"StableDiffusion3{task}Pipeline" for task in SD3_TASKS),
    batch_first=(*SD3_INPUTS, *SD3_RESIDUALS),
    residuals=SD3_RESIDUALS,
    encode=encode_sd3,
    call=partial(call_transformer, SD3_INPUTS),
    options=shifted,
    patch=2,
    after=SKIP_LAYERS,
    extra="skip_layers",
)
