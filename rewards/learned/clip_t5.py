"""VQAScore by CLIP-FlanT5 (https://arxiv.org/abs/2404.01291): CLIP's picture tokens before a question, read by T5."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPVisionModel, T5Config, T5ForConditionalGeneration

from rewards import hub
from rewards.checks import dtype_of, paired, seen
from rewards.errors import RewardError
from rewards.learned.imagereward import head
from rewards.learned.layouts import built, under
from rewards.learned.preprocess import CLIP_MEAN, Preprocess

MODEL, VISION, WORDS = "zhiqiulin/clip-flant5-xl", "openai/clip-vit-large-patch14-336", "google/flan-t5-xl"
QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: "
)
ANSWER = "Yes"
T5 = ("shared.", "encoder.", "decoder.", "lm_head.")


class CLIPFlanT5:
    """P("Yes" | picture, question) = exp(mean over the answer's tokens, with its end, of log p), in [0, 1].

    The picture is padded to a square with CLIP's mean colour; the tokens of CLIP's last layer but one go through two
    linear layers with a GELU, and stand among those of the question. `model`, `vision` and `words` are folders or
    models of the Hub: the T5 with `mm_projector`, the CLIP, the tokenizer. Names of tensors were read in the authors'
    code. Raises ValueError for weights that do not fit, and for a question without {prompt}; FileNotFoundError for a
    model without safetensors, in place of which a folder of your own conversion is given.
    """

    differentiable = True

    def __init__(
        self,
        model: str | Path = MODEL,
        vision: str | Path = VISION,
        words: str | Path = WORDS,
        question: str = QUESTION,
        dtype: str = "float32",
    ):
        if "{prompt}" not in question:
            raise RewardError(f"the question {question!r} does not say where the prompt stands: write {{prompt}}")
        folder = hub.snapshot(model)
        state = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in hub.read(file).items()}
        body = {name: tensor for name, tensor in state.items() if name.startswith(T5)}
        self.t5 = built(T5ForConditionalGeneration, t5_config(folder), body, dtype)
        self.project = head(under(state, "mm_projector."), nn.GELU)
        eyes = CLIPVisionModel.from_pretrained(hub.snapshot(vision), use_safetensors=True, dtype=dtype_of(dtype))
        self.eyes = eyes.eval().requires_grad_(False)
        self.look = Preprocess(self.eyes.config.image_size)
        self.tokenizer = AutoTokenizer.from_pretrained(hub.snapshot(words, weights=False))
        self.question = question

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        for network in (self.t5, self.eyes, self.project):
            network.to(images.device)
        tokens = self.picture_tokens(seen(images))
        return torch.stack([self.score(x, prompt) for x, prompt in zip(tokens, prompts, strict=True)])

    def picture_tokens(self, images: Tensor) -> Tensor:
        """(B, N, D) of pictures (B, 3, H, W)."""
        x = self.look(squared(images)).to(self.eyes.dtype)
        found = self.eyes(pixel_values=x, output_hidden_states=True).hidden_states[-2][:, 1:]
        return self.project(found.float())

    def score(self, tokens: Tensor, prompt: str) -> Tensor:
        """The probability of the answer, (), of a picture's tokens (N, D)."""
        embed, device = self.t5.get_input_embeddings(), tokens.device
        after = f"\n{self.question.replace('{prompt}', prompt)} ASSISTANT: "
        before, behind = (embed(self.ids(text).to(device)) for text in (BEFORE, after))
        read = torch.cat([before, tokens.to(before.dtype), behind])[None]
        answer = self.ids(ANSWER).to(device)[None]
        logits = self.t5(inputs_embeds=read, labels=answer).logits[0].float()
        return (-F.cross_entropy(logits, answer[0])).exp()

    def ids(self, text: str) -> Tensor:
        """The tokens of a part of the text, each with T5's end behind it, as the authors have them."""
        return torch.tensor(self.tokenizer(text).input_ids)


def squared(images: Tensor) -> Tensor:
    """(B, 3, H, W) in the middle of a square of CLIP's mean colour in 8 bits."""
    height, width = images.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    colour = images.new_tensor([int(255 * mean) / 255 for mean in CLIP_MEAN]).view(1, 3, 1, 1)
    pad = (left, side - width - left, top, side - height - top)
    return F.pad(images - colour, pad) + colour


def t5_config(folder: Path) -> T5Config:
    """The T5 part of a CLIP-FlanT5's configuration."""
    about: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return T5Config(**{key: value for key, value in about.items() if key not in ("model_type", "architectures")})


def fetch_clip_t5(
    model: str | Path = MODEL, vision: str | Path = VISION, words: str | Path = WORDS, **_: Any
) -> list[Path]:
    """What CLIP-FlanT5 downloads."""
    return [hub.snapshot(model), hub.snapshot(vision), hub.snapshot(words, weights=False)]
