"""HPSv3 (https://arxiv.org/abs/2508.03789): what people prefer, by Qwen2-VL reading the picture, then the prompt."""

import json
from collections.abc import Sequence
from math import ceil, floor, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, Qwen2VLModel

from rewards import hub
from rewards.checks import paired
from rewards.errors import RewardError
from rewards.learned.imagereward import head
from rewards.learned.layouts import built, under
from rewards.learned.preprocess import CLIP_MEAN, CLIP_STD

HUB, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
QUESTION: str = json.loads(Path(__file__).with_name("hpsv3_question.json").read_text(encoding="utf-8"))["question"]
REWARD = "<|Reward|>"  # the token whose hidden state is scored, the first one after the base's own
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{picture}<|vision_end|>{question}"
)  # Qwen2-VL's template, up to the reward token: what comes after it is not seen
PIXELS = 256 * 28 * 28  # of a picture as the network sees it, at most
UNIT = 28  # both sides are multiples: two patches of 14 become one token


class HPSv3:
    """mu of the preference N(mu, sigma^2), in float32; unbounded, about -5 to 15, and better pictures score higher.

        mu, log sigma = head(h),

    with h the last hidden state at the token <|Reward|>, which follows the picture, the question and the prompt. All
    tokens have plain positions, as in the authors' own code, which never computes Qwen2-VL's positions of a picture.
    The picture is resized once, to multiples of 28 with about 200,704 pixels. `weights` is a local file in place of the
    Hub's, `base` a folder of the base model's configuration and tokenizer. float32 takes 33 GB; dtype="bfloat16" half.

    Raises ValueError for a prompt that holds one of the tokenizer's special tokens, and for a picture 200 times as long
    as it is wide.
    """

    differentiable = True

    def __init__(self, weights: str | Path | None = None, base: str | Path | None = None, dtype: str = "float32"):
        folder = hub.snapshot(BASE if base is None else base, weights=False)
        state = hub.read(hub.snapshot(HUB) / FILE if weights is None else weights)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]}, replace_extra_special_tokens=False)
        config = configured(AutoConfig.from_pretrained(folder), state["model.embed_tokens.weight"])
        body = {key: value for key, value in state.items() if key.startswith(("visual.", "model."))}
        self.model = built(Qwen2VLModel, config, body, dtype)
        self.head = head(under(state, "rm_head."), nn.ReLU)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        return self.head.to(images.device)(self.hidden(images, prompts).float())[:, 0]

    def hidden(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The last hidden state at the reward token, (B, D)."""
        network = self.model.to(images.device)
        pixels, grid = patches(resized(images))
        seen = network.visual(pixels.to(network.dtype), grid_thw=grid).pooler_output
        ids, mask, last = (x.to(images.device) for x in self.tokens(prompts, len(seen) // len(images)))
        read = network.language_model.embed_tokens(ids)
        at_picture = (ids == self._id("<|image_pad|>"))[..., None].expand_as(read)
        read = read.masked_scatter(at_picture, seen.to(read.dtype))
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        found = network.language_model(
            inputs_embeds=read, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return found[torch.arange(len(ids), device=ids.device), last]

    def tokens(self, prompts: Sequence[str], picture: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (B, L), padded at their end, their mask, and where the reward token stands, (B,); `picture` is how many
        tokens a picture takes."""
        texts = [self._text(prompt, picture) for prompt in prompts]
        ids = [torch.tensor(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        last = torch.tensor([len(row) - 1 for row in ids])
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.arange(padded.shape[1]) <= last[:, None]
        return padded, mask.long(), last

    def _text(self, prompt: str, picture: int) -> str:
        for token in self.tokenizer.all_special_tokens:
            if token in prompt:
                raise RewardError(f"the prompt {prompt[:80]!r} holds {token}, which HPSv3 takes for a mark of its own")
        question = QUESTION.replace("{prompt}", prompt)
        return CHAT.format(picture="<|image_pad|>" * picture, question=question)

    def _id(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))


def configured(config: PreTrainedConfig, embedding: Tensor) -> PreTrainedConfig:
    """The base's configuration with as many tokens as HPSv3 has."""
    config.text_config.vocab_size = len(embedding)
    return config


# ------------------------------------------------------------------------------------------------ pictures


def size_of(height: int, width: int) -> tuple[int, int]:
    """The sides that a picture of so many pixels is resized to, by Qwen2-VL's rule within one budget of pixels."""
    if max(height, width) > 200 * min(height, width):
        raise RewardError(f"a picture of {width} x {height} pixels is too long for HPSv3: one side is 200 of the other")
    sides = [max(UNIT, round(side / UNIT) * UNIT) for side in (height, width)]
    scale = sqrt(height * width / PIXELS)
    if sides[0] * sides[1] > PIXELS:
        sides = [max(UNIT, floor(side / scale / UNIT) * UNIT) for side in (height, width)]
    elif sides[0] * sides[1] < PIXELS:
        sides = [ceil(side / scale / UNIT) * UNIT for side in (height, width)]
    return sides[0], sides[1]


def resized(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] at the network's size, normalised, in float32."""
    x = images.float()
    size = size_of(*x.shape[-2:])
    if x.shape[-2:] != size:
        x = F.interpolate(x, size, mode="bicubic", antialias=True)
    mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


def patches(x: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen2-VL's patches (B N, 1176) of (B, 3, H, W), in blocks of two by two, each twice in time; and the grid (B, 3)
    of frames, rows and columns."""
    count, (rows, columns) = len(x), (side // 14 for side in x.shape[-2:])
    split = x.view(count, 3, rows // 2, 2, 14, columns // 2, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    twice = split.unsqueeze(6).expand(*split.shape[:6], 2, 14, 14)  # frames stand between the colours and the pixels
    grid = torch.tensor([[1, rows, columns]], device=x.device).expand(count, 3)
    return twice.reshape(count * rows * columns, 3 * 2 * 14 * 14), grid


def fetch_hpsv3(weights: str | Path | None = None, base: str | Path | None = None, **_: Any) -> list[Path]:
    """What HPSv3 downloads: its weights, and the base's configuration and tokenizer."""
    folders = [] if weights is not None else [hub.snapshot(HUB)]
    return folders if base is not None else [*folders, hub.snapshot(BASE, weights=False)]


def models_of_hpsv3(weights: str | Path | None, base: str | Path | None, **_: Any) -> list[str]:
    """The models of the Hub that HPSv3 is made of, in place of which no file is given."""
    return [name for name, own in ((HUB, weights), (BASE, base)) if own is None]
