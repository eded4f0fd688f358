"""FLUX.2: klein, base and distilled, and dev."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.denoiser import Cond
from solvers.families.family import TEXT_INPUTS, sequential_family, thousandth
from solvers.families.flux import told_scale
from solvers.families.latents import Latents, of_batch_norm
from solvers.families.patches import SKIPPED_JOINT
from solvers.families.streams import JOINT, NEGATIVE

FLUX2_INPUTS = (*TEXT_INPUTS, "guidance", *NEGATIVE)


def encode_flux2(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """Three hidden states of Qwen3 (klein) or Mistral (dev) side by side, (B, 512, 3 D), and dev's embedded guidance
    scale (B,)."""
    more = told_scale(pipe, len(prompts), embedded_guidance)
    texts = {"cond": prompts, "uncond": negatives or [""] * len(prompts)}
    return {branch: {"encoder_hidden_states": pipe.encode_prompt(each)[0], **more} for branch, each in texts.items()}


def call_flux2(network: Any, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """One token for each place of the latents, with (0, row, column, 0); a text's have (0, 0, 0, position)."""
    rows, columns = x.shape[-2:]
    length = cond["encoder_hidden_states"].shape[1]
    out = network(
        x.flatten(2).transpose(1, 2),
        timestep=timestep.to(x.device, torch.float32).expand(len(x)) / 1000,
        **cond,
        img_ids=places(1, rows, columns, 1).to(x.device),
        txt_ids=places(1, 1, 1, length).to(x.device),
        return_dict=False,
    )[0]
    return out.transpose(1, 2).unflatten(2, (rows, columns))


def places(*sizes: int) -> Tensor:
    """The coordinates of a grid, (tokens, 4), the last one running first."""
    return torch.cartesian_prod(*[torch.arange(size) for size in sizes])


def grid_of_flux2(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """By the place of the last token that is not of a reference picture."""
    places = arguments["img_ids"].flatten(0, -2)
    _, row, column, _ = places[places[:, 0] == 0][-1]
    return int(row) + 1, int(column) + 1


def shifted_flux2(pipe: Any, latent: tuple[int, int], steps: int) -> dict[str, Any]:
    """Levels 1, ..., 1/N before the shift, which depends on the number of tokens and on N."""
    sigmas = {} if pipe.scheduler.config.get("use_flow_sigmas") else {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    return {**sigmas, "mu": empirical_mu(latent[0] * latent[1], steps)}


def empirical_mu(tokens: int, steps: int) -> float:
    """The published fit: linear in the tokens, and up to 4,300 tokens in the steps too, between its lines at 10 and at
    200 steps."""
    at_200, at_10 = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
    if tokens > 4300:
        return at_200
    slope = (at_200 - at_10) / 190
    return slope * steps + at_200 - 200 * slope


FLUX2 = sequential_family(
    name="flux2",
    patches={**SKIPPED_JOINT, **JOINT},
    pipelines=("Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2Pipeline"),
    batch_first=FLUX2_INPUTS,
    encode=encode_flux2,
    call=call_flux2,
    latents=Latents(channels=lambda vae: 4 * vae.config.latent_channels, patch=2, statistics=of_batch_norm),
    grid=grid_of_flux2,
    options=shifted_flux2,
    size=lambda network: 64,  # Flux2KleinPipeline.default_sample_size, in patches: the network has none
    prepare="guidance_scale > 1, of a klein that is not distilled",
    time=thousandth,
)
