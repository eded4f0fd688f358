"""ImageReward v1 (https://arxiv.org/abs/2304.05977) and CycleReward: BLIP's text encoder reads the prompt, and sees the
picture while it does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rewards import hub
from rewards.checks import paired
from rewards.errors import RewardError
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


class Reader:
    """BLIP's text encoder as it reads a prompt over a picture: the state of its first token, in float32.

    `state` are the tensors of a checkpoint that has the towers under "blip."; a prompt is cut to `length` tokens.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        vocabulary: str | Path | None,
        vision: Mapping[str, Any],
        text: Mapping[str, Any],
        length: int,
        dtype: str,
    ):
        eyes = renamed(under(state, "blip.visual_encoder."), BLIP_VISION)
        self.vision = built(BlipVisionModel, BlipVisionConfig(**vision), eyes, dtype)
        words = under(state, "blip.text_encoder.")
        self.text = built(BlipTextModel, BlipTextConfig(**text), words, dtype, add_pooling_layer=False)
        vocabulary = hub.weights("bert-vocabulary") if vocabulary is None else vocabulary
        self.tokenizer, self.length = BertTokenizer(str(vocabulary)), length
        self.preprocess = Preprocess(vision["image_size"])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B, D)."""
        device = images.device
        seen = self.vision.to(device)(pixel_values=self.preprocess(images).to(self.vision.dtype)).last_hidden_state
        words = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(device)
        read = self.text.to(device)(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
        ).last_hidden_state[:, 0]
        return read.float()


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
        self.read = Reader(state, vocabulary, vision, text, LENGTH, dtype)
        self.head, self.preprocess = head(under(state, "mlp.layers.")), self.read.preprocess

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        return (self.head.to(images.device)(self.read(images, prompts)).squeeze(1) - MEAN) / STD


CYCLE = "carolineec/CycleReward-{}"
CYCLE_LENGTH = 128  # of the prompt, in tokens
Pairs = Literal["Combo", "T2I", "I2T"]


class CycleReward:
    """MLP(t) of CycleReward (https://arxiv.org/abs/2506.02095): how well picture and prompt can be made of each other.

    t is as in ImageReward, of longer prompts, and the MLP has a GELU after each of its layers but the last. `pairs`
    says what it was trained on: one prompt's pictures (T2I), one picture's prompts (I2T), or both (Combo).
    """

    differentiable = True

    def __init__(
        self,
        pairs: Pairs = "Combo",
        weights: str | Path | None = None,
        vocabulary: str | Path | None = None,
        vision: Mapping[str, Any] = VISION,
        text: Mapping[str, Any] = TEXT,
        dtype: str = "float32",
    ):
        if pairs not in get_args(Pairs):
            raise RewardError(f"CycleReward was trained on the pairs Combo, T2I and I2T, not {pairs!r}")
        file = hub.snapshot(CYCLE.format(pairs)) / "model.safetensors" if weights is None else weights
        state = hub.read(file)
        self.read = Reader(state, vocabulary, vision, text, CYCLE_LENGTH, dtype)
        self.head, self.preprocess = head(under(state, "mlp.layers."), nn.GELU), self.read.preprocess

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        return self.head.to(images.device)(self.read(images, prompts)).squeeze(1)


def fetch_cycle_reward(
    pairs: Pairs = "Combo", weights: str | Path | None = None, vocabulary: str | Path | None = None, **_: Any
) -> list[Path]:
    """What CycleReward downloads."""
    found = [] if weights is not None else [hub.snapshot(CYCLE.format(pairs))]
    return found if vocabulary is not None else [*found, hub.weights("bert-vocabulary")]


def models_of_cycle_reward(pairs: Pairs, weights: str | Path | None, **_: Any) -> list[str]:
    """The model of the Hub that CycleReward is, unless a file is given."""
    return [] if weights is not None else [CYCLE.format(pairs)]


def head(layers: Mapping[str, Tensor], between: type[nn.Module] | None = None) -> nn.Sequential:
    """The linear layers `N.weight`, `N.bias` by rising N, frozen, in float32; `between` is an activation, if any."""
    order = sorted({int(key.split(".")[0]) for key in layers})
    parts: list[nn.Module] = []
    for n in order:
        out, into = layers[f"{n}.weight"].shape
        linear = nn.Linear(into, out)
        linear.load_state_dict({part: layers[f"{n}.{part}"].float() for part in PARTS})
        parts += [linear] if between is None else [linear, between()]
    return nn.Sequential(*(parts if between is None else parts[:-1])).eval().requires_grad_(False)
