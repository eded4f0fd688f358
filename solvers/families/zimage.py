"""Z-Image and Z-Image-Turbo, whose network takes lists with a tensor for each sample."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from solvers.denoiser import Cond
from solvers.families.after import LIMITED_NORM
from solvers.families.family import TEXT_INPUTS, guidance_told, remaining, transformer_family
from solvers.families.flux import shifted_flux
from solvers.families.patches import SKIPPED
from solvers.families.streams import NEGATIVE, OF_ZIMAGE

ZIMAGE_INPUTS = (*TEXT_INPUTS, "encoder_hidden_states_mask", *NEGATIVE)
ZIMAGE_RESIDUALS = ("controlnet_block_samples",)
ZIMAGE_TASKS = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpaint")


def encode_zimage(pipe: Any, prompts, negatives, size, embedded_guidance) -> dict[str, Cond]:
    """Qwen3's hidden states (B, L, D), zeros after the end of a text, and their mask (B, L)."""
    guidance_told(pipe.transformer, "guidance_embeds", embedded_guidance)
    negatives = negatives or [""] * len(prompts)  # copies: the pipeline writes its template into the lists
    texts = pipe.encode_prompt(list(prompts), negative_prompt=list(negatives))
    return {branch: padded(each) for branch, each in zip(("cond", "uncond"), texts, strict=True)}


def padded(texts: Sequence[Tensor]) -> Cond:
    """Texts (L_i, D) as one batch, with their mask."""
    marks = [text.new_ones(len(text), dtype=torch.bool) for text in texts]
    return {
        "encoder_hidden_states": pad_sequence(list(texts), batch_first=True),
        "encoder_hidden_states_mask": pad_sequence(marks, batch_first=True),
    }


def gathered(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The network's arguments as batches: pictures (B, C, h, w), and texts as `padded` has them."""
    rest = {name: value for name, value in arguments.items() if name not in ("x", "t", "cap_feats")}
    pictures = torch.stack(arguments["x"])[:, :, 0]
    return {"hidden_states": pictures, "timestep": arguments["t"], **padded(arguments["cap_feats"]), **rest}


def scattered(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`gathered` undone."""
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_mask")
    x, t, texts, masks = (arguments[name] for name in names)
    rest = {name: value for name, value in arguments.items() if name not in names}
    for name in ZIMAGE_RESIDUALS:
        if rest.get(name):
            rest[name] = {layer: value[:, : longest(x, masks)] for layer, value in rest[name].items()}
    return {"x": listed(x), "t": t, "cap_feats": [a[mask] for a, mask in zip(texts, masks, strict=True)], **rest}


def longest(x: Tensor, masks: Tensor) -> int:
    """The tokens of the longest sample of a batch, a picture's and a text's both being padded to multiples of 32."""
    return sum(-(-count // 32) * 32 for count in (x[0, 0].numel() // 4, int(masks.sum(1).max())))


def listed(x: Tensor) -> list[Tensor]:
    """Pictures (B, C, h, w) as the network takes and gives them: each as a film of one."""
    return list(x[:, :, None])


def predicted_zimage(out: list[Tensor] | Tensor, x: Tensor) -> Tensor:
    """eps - x0, where the network says x0 - eps; the pipeline guides in float32."""
    return flow_said(out).float() if isinstance(out, list) else out.float()


def flow_said(out: Sequence[Tensor]) -> Tensor:
    return -torch.stack(list(out))[:, :, 0]


def call_zimage(network: Any, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """The network's time runs from 0 at noise to 1."""
    t = ((1000 - timestep.to(x.device, torch.float32)) / 1000).expand(len(x))
    out = network(**scattered({"hidden_states": x, "timestep": t, **cond}), return_dict=False)[0]
    return flow_said(out)


ZIMAGE = transformer_family(
    name="zimage",
    order=("cond", "uncond"),
    patches={**SKIPPED, **OF_ZIMAGE},
    pipelines=tuple(f"ZImage{task}Pipeline" for task in ZIMAGE_TASKS),
    batch_first=(*ZIMAGE_INPUTS, *ZIMAGE_RESIDUALS),
    residuals=ZIMAGE_RESIDUALS,
    encode=encode_zimage,
    call=call_zimage,
    gathered=gathered,
    scattered=scattered,
    answered=listed,
    prediction=predicted_zimage,
    options=shifted_flux,
    size=lambda network: 128,  # 1024 pixels, the pipeline's default: the network has none
    patch=2,
    draws_float32=True,
    after=LIMITED_NORM,
    unguided=0.0,
    prepare="guidance_scale > 0",
    time=remaining,
)
