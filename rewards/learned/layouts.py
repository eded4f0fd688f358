"""Names of weights: from the layouts that reward models are published in to those of transformers."""

import re
from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rewards.checks import dtype_of
from rewards.errors import RewardError

OPEN_CLIP = {
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^visual\.proj$": "visual_projection.weight",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"^text_projection$": "text_projection.weight",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"\.attn\.": ".self_attn.",
}
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")
BLIP_VISION = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^blocks\.": "encoder.layers.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"^norm\.": "post_layernorm.",
}


def renamed(state: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under the names that every rule of the table makes of theirs, in order."""
    out = {}
    for key, value in state.items():
        for pattern, name in table.items():
            key = re.sub(pattern, name, key)
        out[key] = value
    return out


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, without it; positions, which are not weights, are left out."""
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in found.items() if not key.endswith("position_ids")}


def clip_from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP of open_clip (built-in text and vision towers) in the names of transformers' CLIPModel."""
    out: dict[str, Tensor] = {}
    for key, value in renamed(state, OPEN_CLIP).items():
        if key in TRANSPOSED:
            out[key] = value.T.contiguous()
        elif ".in_proj_" in key:
            for name, part in zip(("q_proj.", "k_proj.", "v_proj."), value.chunk(3), strict=True):
                out[key.replace("in_proj_", name)] = part.clone()
        else:
            out[key] = value
    return under(out, "")


def built(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: Mapping[str, Tensor],
    dtype: str = "float32",
    **options: bool,
) -> PreTrainedModel:
    """A frozen network with exactly these weights. Raises ValueError if a tensor is missing, left over or of another
    shape, naming some of them."""
    model, info = kind.from_pretrained(
        None, config=config, state_dict=dict(state), dtype=dtype_of(dtype), output_loading_info=True, **options
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            some = ", ".join(sorted(map(str, info[what]))[:3])
            raise RewardError(f"the weights do not fit {kind.__name__}: {what.replace('_', ' ')} {some}")
    return model.eval().requires_grad_(False)
