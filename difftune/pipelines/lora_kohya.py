"""A transformer's LoRA in the layout of kohya's scripts, which know its layers by the names of the published models.

Some of those are one layer where diffusers has several: queries, keys and values, also with the feed-forward layer of
FLUX.1's blocks of one stream. Their adapter has the parts' own in blocks, A = [A_1; A_2; ...] and
B = diag(s_1 B_1, s_2 B_2, ...) with s = alpha / rank, its alpha is its rank, and the update is exactly the same.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from difftune.errors import UserError

Names = Mapping[str, Sequence[str]]  # a layer of the published model -> the layers of diffusers', in their order


class Layer(NamedTuple):
    """One adapted layer: its update is alpha / rank B A."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    alpha: float


def _qkv(attention: str, names: Sequence[str]) -> list[str]:
    return [f"{attention}.{name}" for name in names]


OWN, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
DOUBLE, SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"

FLUX_ATTENTION: Names = {
    "double_blocks.{}.img_attn.qkv": _qkv(f"{DOUBLE}.attn", OWN),
    "double_blocks.{}.img_attn.proj": [f"{DOUBLE}.attn.to_out.0"],
    "double_blocks.{}.txt_attn.qkv": _qkv(f"{DOUBLE}.attn", ADDED),
    "double_blocks.{}.txt_attn.proj": [f"{DOUBLE}.attn.to_add_out"],
    "final_layer.linear": ["proj_out"],
}
FLUX: Names = {
    **FLUX_ATTENTION,
    "double_blocks.{}.img_mlp.0": [f"{DOUBLE}.ff.net.0.proj"],
    "double_blocks.{}.img_mlp.2": [f"{DOUBLE}.ff.net.2"],
    "double_blocks.{}.txt_mlp.0": [f"{DOUBLE}.ff_context.net.0.proj"],
    "double_blocks.{}.txt_mlp.2": [f"{DOUBLE}.ff_context.net.2"],
    "single_blocks.{}.linear1": [*_qkv(f"{SINGLE}.attn", OWN), f"{SINGLE}.proj_mlp"],
    "single_blocks.{}.linear2": [f"{SINGLE}.proj_out"],
}
FLUX2: Names = {
    **FLUX_ATTENTION,
    "double_blocks.{}.img_mlp.0": [f"{DOUBLE}.ff.linear_in"],
    "double_blocks.{}.img_mlp.2": [f"{DOUBLE}.ff.linear_out"],
    "double_blocks.{}.txt_mlp.0": [f"{DOUBLE}.ff_context.linear_in"],
    "double_blocks.{}.txt_mlp.2": [f"{DOUBLE}.ff_context.linear_out"],
    "single_blocks.{}.linear1": [f"{SINGLE}.attn.to_qkv_mlp_proj"],
    "single_blocks.{}.linear2": [f"{SINGLE}.attn.to_out"],
}
SD3: Names = {
    "joint_blocks.{}.x_block.attn.qkv": _qkv(f"{DOUBLE}.attn", OWN),
    "joint_blocks.{}.x_block.attn.proj": [f"{DOUBLE}.attn.to_out.0"],
    "joint_blocks.{}.x_block.attn2.qkv": _qkv(f"{DOUBLE}.attn2", OWN),
    "joint_blocks.{}.x_block.attn2.proj": [f"{DOUBLE}.attn2.to_out.0"],
    "joint_blocks.{}.x_block.mlp.fc1": [f"{DOUBLE}.ff.net.0.proj"],
    "joint_blocks.{}.x_block.mlp.fc2": [f"{DOUBLE}.ff.net.2"],
    "joint_blocks.{}.context_block.attn.qkv": _qkv(f"{DOUBLE}.attn", ADDED),
    "joint_blocks.{}.context_block.attn.proj": [f"{DOUBLE}.attn.to_add_out"],
    "joint_blocks.{}.context_block.mlp.fc1": [f"{DOUBLE}.ff_context.net.0.proj"],
    "joint_blocks.{}.context_block.mlp.fc2": [f"{DOUBLE}.ff_context.net.2"],
    "final_layer.linear": ["proj_out"],
}
LAYOUTS: dict[str, Names | None] = {  # None: the published model has diffusers' own names
    "sd3": SD3,
    "flux": FLUX,
    "flux2": FLUX2,
    "qwen": None,
    "zimage": None,
}
MLP = 4  # rows of FLUX.1's feed-forward layer for one of its queries, if the layer has no adapter


def kohya_layers(family: str, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The tensors lora_unet_NAME.lora_down.weight, .lora_up.weight and .alpha of all layers, by diffusers' names.

    Raises UserError for a family, or a layer of it, that the layout does not know.
    """
    if family not in LAYOUTS:
        raise UserError(
            f"kohya's layout is of UNets and of {', '.join(LAYOUTS)}, and this is a LoRA of {family}:"
            " keep pytorch_lora_weights.safetensors"
        )
    names = LAYOUTS[family]
    grouped = {name: {name: layer} for name, layer in layers.items()} if names is None else _grouped(names, layers)
    found: dict[str, Tensor] = {}
    for name, parts in grouped.items():
        joined = _joined(list(parts) if names is None else list(_parts(names, name)), parts)
        key = f"lora_unet_{name.replace('.', '_')}"
        found[f"{key}.lora_down.weight"], found[f"{key}.lora_up.weight"] = joined.a, joined.b
        found[f"{key}.alpha"] = torch.tensor(joined.alpha)
    return found


def _grouped(names: Names, layers: Mapping[str, Layer]) -> dict[str, dict[str, Layer]]:
    """The adapted layers under the published layer that they are part of."""
    grouped: dict[str, dict[str, Layer]] = {}
    for name, layer in layers.items():
        published = next(_published(names, name), None)
        if published is None:
            raise UserError(f"kohya's layout of this model has no layer {name}: take comfyui, or lora_layers attention")
        grouped.setdefault(published, {})[name] = layer
    return grouped


def _published(names: Names, name: str) -> Iterator[str]:
    for published, parts in names.items():
        for part in parts:
            if match := re.fullmatch(re.escape(part).replace(r"\{\}", r"(\d+)"), name):
                yield published.format(*match.groups())


def _parts(names: Names, published: str) -> Iterator[str]:
    """All of diffusers' layers that a published one has, adapted or not."""
    for pattern, parts in names.items():
        if match := re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), published):
            yield from (part.format(*match.groups()) for part in parts)


def _joined(order: Sequence[str], parts: Mapping[str, Layer]) -> Layer:
    """One adapter of the parts, in their order; a part without one has rows of zeros."""
    if len(order) == 1:
        return parts[order[0]]
    width = len(next((layer.b for name, layer in parts.items() if not name.endswith("proj_mlp"))))
    rows = {False: width, True: MLP * width}
    a = torch.cat([parts[name].a for name in order if name in parts])
    sizes = {name: len(parts[name].b) if name in parts else rows[name.endswith("proj_mlp")] for name in order}
    b, row, column = a.new_zeros(sum(sizes.values()), len(a)), 0, 0
    for name in order:
        if name in parts:
            own, rank = parts[name], len(parts[name].a)
            b[row : row + sizes[name], column : column + rank] = own.alpha / rank * own.b
            column += rank
        row += sizes[name]
    return Layer(a, b, float(len(a)))
