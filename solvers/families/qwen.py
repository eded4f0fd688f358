"""Qwen-Image."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from solvers.denoiser import Cond
from solvers.errors import UserError
from solvers.families.after import NORM
from solvers.families.family import TEXT_INPUTS, TRUE_CFG, sequential_family, thousandth
from solvers.families.flux import shifted_flux, told_scale
from solvers.families.latents import Latents
from solvers.families.patches import SKIPPED_JOINT
from solvers.families.streams import JOINT, NEGATIVE
from solvers.families.tokens import packed, unpacked

QWEN_TASKS = ("", "Img2Img", "Inpaint", "Edit", "EditPlus", "EditInpaint", "ControlNet", "ControlNetInpaint")
QWEN_INPUTS = (*TEXT_INPUTS, "encoder_hidden_states_mask", "guidance", *NEGATIVE)
QWEN_RESIDUALS = ("controlnet_block_samples",)
MAX_TOKENS = 512  # of QwenImagePipeline's call; its `encode_prompt` has another number


def encode_qwen(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """Qwen2.5-VL's hidden states (B, L, D), and their mask (B, L) unless every token counts."""
    if "Edit" in type(pipe).__name__:
        raise UserError(f"{type(pipe).__name__} reads its prompt with a picture, which LatentModel has not: use attach")
    more = told_scale(pipe, len(prompts), embedded_guidance)
    conds: dict[str, Cond] = {}
    for branch, texts in {"cond": prompts, "uncond": negatives or [" "] * len(prompts)}.items():
        hidden, mask = pipe.encode_prompt(texts, max_sequence_length=MAX_TOKENS)
        masked = {} if mask is None else {"encoder_hidden_states_mask": mask}
        conds[branch] = {"encoder_hidden_states": hidden, **masked, **more}
    return conds


def call_qwen(network: Any, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """Tokens of 2 x 2 patches, and a timestep in [0, 1]."""
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    timestep = timestep.to(x.device, torch.float32).expand(len(x)) / 1000
    shapes = [[(1, rows, columns)]] * len(x)
    out = network(packed(x), timestep=timestep, **cond, img_shapes=shapes, return_dict=False)[0]
    return unpacked(out, (rows, columns))


def grid_of_shapes(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """The grid of a call of the network: a sample's shape, or that before those of its reference pictures."""
    first = arguments["img_shapes"][0]
    _, rows, columns = first[0] if isinstance(first[0], Sequence) else first
    return rows, columns


QWEN = sequential_family(
    name="qwen",
    patches={**SKIPPED_JOINT, **JOINT},
    **TRUE_CFG,
    pipelines=tuple(f"QwenImage{task}Pipeline" for task in QWEN_TASKS),
    batch_first=(*QWEN_INPUTS, *QWEN_RESIDUALS),
    residuals=QWEN_RESIDUALS,
    encode=encode_qwen,
    call=call_qwen,
    latents=Latents(channels=lambda vae: vae.config.z_dim, film=True),
    grid=grid_of_shapes,
    options=shifted_flux,
    size=lambda network: 128,  # QwenImagePipeline.default_sample_size: the network has none
    patch=2,
    after=NORM,
    time=thousandth,
)
