"""FLUX.1."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.denoiser import Cond
from solvers.families.family import TRUE_CFG, guidance_told, sequential_family, shift, thousandth
from solvers.families.patches import SKIPPED_JOINT
from solvers.families.sd3 import SD3_INPUTS
from solvers.families.streams import JOINT
from solvers.families.tokens import packed, unpacked
from solvers.modules import execution_device

FLUX_INPUTS = (*SD3_INPUTS, "guidance")
FLUX_RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")
FLUX_TASKS = (
    *("", "Img2Img", "Inpaint", "Kontext", "KontextInpaint"),
    *("ControlNet", "ControlNetImg2Img", "ControlNetInpaint"),
)


def encode_flux(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """T5's hidden states (B, L, D), CLIP's pooled one (B, P), and the embedded guidance scale (B,) where it is told."""
    more = told_scale(pipe, len(prompts), embedded_guidance)
    conds: dict[str, Cond] = {}
    for branch, texts in {"cond": prompts, "uncond": negatives or [""] * len(prompts)}.items():
        hidden, pooled, _ = pipe.encode_prompt(texts, None)
        conds[branch] = {"encoder_hidden_states": hidden, "pooled_projections": pooled, **more}
    return conds


def told_scale(pipe: Any, count: int, scale: float | None) -> Cond:
    """The embedded guidance scale (B,) of a network that is told one; nothing of another."""
    if not guidance_told(pipe.transformer, "guidance_embeds", scale) or scale is None:
        return {}
    return {"guidance": torch.full([count], scale, device=execution_device(pipe))}


def call_flux(network: Any, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """FLUX reads tokens, with the place of each, and a timestep in [0, 1], in float32: it rounds that itself."""
    grid = x.shape[-2] // 2, x.shape[-1] // 2
    texts = x.new_zeros(cond["encoder_hidden_states"].shape[1], 3)
    timestep = timestep.to(x.device, torch.float32).expand(len(x)) / 1000
    out = network(
        packed(x), timestep=timestep, **cond, img_ids=places_of(grid).to(x), txt_ids=texts, return_dict=False
    )[0]
    return unpacked(out, grid)


def places_of(grid: tuple[int, int]) -> Tensor:
    """(0, row, column) of each token of a grid, (tokens, 3)."""
    return torch.cartesian_prod(torch.arange(1), *map(torch.arange, grid))


def grid_of_places(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """The grid of a call of the network, by the place of its last token: those of a reference picture, whose first
    number is not 0, do not count."""
    places = arguments["img_ids"]
    _, row, column = places[places[:, 0] == 0][-1]
    return int(row) + 1, int(column) + 1


def shifted_flux(pipe: Any, latent: tuple[int, int], steps: int) -> dict[str, Any]:
    """FLUX's levels before the shift are 1, ..., 1/N; a scheduler of another kind lays out its own."""
    config = pipe.scheduler.config
    sigmas = {} if config.get("use_flow_sigmas") else {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    return {**sigmas, "mu": shift(config, latent[0] * latent[1] // 4, 1.15)}


FLUX = sequential_family(
    name="flux",
    patches={**SKIPPED_JOINT, **JOINT},
    **TRUE_CFG,
    pipelines=tuple(f"Flux{task}Pipeline" for task in FLUX_TASKS),
    batch_first=(*FLUX_INPUTS, *FLUX_RESIDUALS),
    residuals=FLUX_RESIDUALS,
    encode=encode_flux,
    call=call_flux,
    grid=grid_of_places,
    options=shifted_flux,
    size=lambda network: 128,  # FluxPipeline.default_sample_size: the network has none
    patch=2,
    time=thousandth,
)
