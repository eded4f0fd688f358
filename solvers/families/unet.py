"""The common part of the families with UNets: Stable Diffusion 1, 2 and XL."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from solvers.denoiser import Cond
from solvers.families.after import RESCALE
from solvers.families.family import Family, call_network, guidance_told
from solvers.families.patches import UNET_PATCHES

UNET_INPUTS = (
    "sample",
    "encoder_hidden_states",
    "timestep_cond",
    "class_labels",
    "attention_mask",
    "encoder_attention_mask",
    "added_cond_kwargs.text_embeds",
    "added_cond_kwargs.time_ids",
    "added_cond_kwargs.image_embeds",  # a list: one entry per IP-Adapter
    "down_block_additional_residuals",  # a tuple: one entry per ControlNet output
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",  # a tuple: T2I-Adapter
    "cross_attention_kwargs.negative_hidden_states",  # of NASA and NAG, for their patches
    "cross_attention_kwargs.negative_scale",
)
CONTROLNET_INPUTS = (
    "sample",
    "encoder_hidden_states",
    "controlnet_cond",  # a list for several ControlNets
    "control_type",
    "timestep_cond",
    "class_labels",
    "attention_mask",
    "added_cond_kwargs.text_embeds",
    "added_cond_kwargs.time_ids",
)
TASKS = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")


def guidance_embedding(unet: Any, scale: float | None, like: Tensor) -> Cond:
    """{"timestep_cond": (B, D)} for a UNet distilled over guidance scales (LCM), nothing for any other.

    Its entries are sin and cos of 1000 (w - 1) / 10000^(i / (D/2 - 1)), as in diffusers
    (https://arxiv.org/abs/2310.04378). Raises ValueError where w = `scale` is missing, or is given to a network that
    has no use for it.
    """
    width = unet.config.get("time_cond_proj_dim")
    if not guidance_told(unet, "time_cond_proj_dim", scale) or scale is None:
        return {}
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = torch.tensor(scale - 1) * 1000.0 * rates
    waves = nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))
    return {"timestep_cond": waves.to(like).repeat(len(like), 1)}


unet_family = partial(
    Family,
    denoisers=("unet",),
    batched=True,
    order=("uncond", "cond"),
    batch_first=UNET_INPUTS,
    call=partial(call_network, UNET_INPUTS),
    after=RESCALE,
    embeds="time_cond_proj_dim",
    patches=UNET_PATCHES,
)
