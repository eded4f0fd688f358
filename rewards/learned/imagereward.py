"""ImageReward v1 (https://arxiv.org/abs/2304.05977): BLIP's text encoder reads the prompt while it sees the picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rewards import hub
from rewards.checks import paired
from rewards.learned.layouts import BLIP_VISION, built, renamed, under
from rewards.learned.preprocess import Preprocess

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the scores of its own training pairs
LENGTH = 35  # of the prompt, in tokens
PARTS = ("weight", "bias")
VISION: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512, "layer_norm_eps": 1e-12,
    "is_decoder": True,  # which gives the layers their cross-attention
}  # fmt: skip


class ImageReward:
    """(MLP(t) - mean) / std, about -2.3 to 2, with t the text encoder's first token, which attends to the picture.

    The MLP is five linear layers with nothing between them. `weights` is a local file in place of the pinned one,
    `vocabulary` BERT's vocab.txt; `vision` and `text` are the sizes of the towers.
    """

    differentiable = True

    def __init__(
        self,
        weights: str | Path | None = None,
        vocabulary: str | Path | None = None,
        vision: Mapping[str, Any] = VISION,
        text: Mapping[str, Any] = TEXT,
        dtype: str = "float32",
    ):
        state = hub.state("imagereward-v1") if weights is None else hub.read(weights)
        eyes = renamed(under(state, "blip.visual_encoder."), BLIP_VISION)
        self.vision = built(BlipVisionModel, BlipVisionConfig(**vision), eyes, dtype)
        words = under(state, "blip.text_encoder.")
        self.text = built(BlipTextModel, BlipTextConfig(**text), words, dtype, add_pooling_layer=False)
        self.head = head(under(state, "mlp.layers."))
        vocabulary = hub.weights("bert-vocabulary") if vocabulary is None else vocabulary
        self.tokenizer = BertTokenizer(str(vocabulary))
        self.preprocess = Preprocess(vision["image_size"])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        device = images.device
        seen = self.vision.to(device)(pixel_values=self.preprocess(images).to(self.vision.dtype)).last_hidden_state
        words = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(device)
        read = self.text.to(device)(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
        ).last_hidden_state[:, 0]
        return (self.head.to(device)(read.float()).squeeze(1) - MEAN) / STD


def head(layers: Mapping[str, Tensor]) -> nn.Sequential:
    """The linear layers `N.weight`, `N.bias` by rising N, frozen, in float32."""
    order = sorted({int(key.split(".")[0]) for key in layers})
    shapes = [layers[f"{n}.weight"].shape for n in order]
    stack = nn.Sequential(*[nn.Linear(into, out) for out, into in shapes])
    stack.load_state_dict({f"{i}.{part}": layers[f"{n}.{part}"].float() for i, n in enumerate(order) for part in PARTS})
    return stack.eval().requires_grad_(False)
