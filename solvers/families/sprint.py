"""Sana-Sprint: a network of a flow whose pipeline and scheduler count in the angles of TrigFlow."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from solvers.denoiser import Cond
from solvers.families.family import call_network, thousandth, transformer_family
from solvers.families.flux import told_scale
from solvers.families.patches import SELF_ATTENTION_PATCHES
from solvers.families.sana import SANA_INPUTS

SPRINT_INPUTS = (*SANA_INPUTS, "guidance")


def encode_sprint(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """As Sana's, with the embedded guidance scale (B,)."""
    scale = pipe.transformer.config.guidance_embeds_scale
    more = {name: scale * value for name, value in told_scale(pipe, len(prompts), embedded_guidance).items()}
    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    conds: dict[str, Cond] = {}
    for branch, texts in {"cond": prompts, "uncond": negatives or [""] * len(prompts)}.items():
        hidden, mask = pipe.encode_prompt(texts, complex_human_instruction=instruction)
        conds[branch] = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask, **more}
    return conds


def call_sprint(network: Any, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """The network hears the level of its flow itself, in [0, 1]."""
    return call_network(SPRINT_INPUTS, network, x, (timestep.to(x.device) / 1000).expand(len(x)), cond)


def in_trigflow(out: Tensor, sample: Tensor, rows: Mapping[str, Any], scheduler: Any) -> Tensor:
    """sigma_data v of the flow's velocity u: the pipeline's own arithmetic, in its order."""
    s = rows["timestep"].view(-1, 1, 1, 1)
    length = torch.sqrt(s**2 + (1 - s) ** 2)
    x = sample / scheduler.config.sigma_data * length
    v = ((1 - 2 * s) * x + (1 - 2 * s + 2 * s**2) * out) / length
    return v.float() * scheduler.config.sigma_data


def angles(steps: int) -> dict[str, Any]:
    """The scheduler has an angle in the middle for two steps alone."""
    return {} if steps == 2 else {"intermediate_timesteps": None}


SPRINT = transformer_family(
    name="sana-sprint",
    patches=SELF_ATTENTION_PATCHES,
    pipelines=("SanaSprintPipeline",),
    batch_first=SPRINT_INPUTS,
    encode=encode_sprint,
    call=call_sprint,
    model_output=in_trigflow,
    options=lambda pipe, latent, steps: angles(steps),
    asked=angles,
    draws_float32=True,
    time=thousandth,
)
