"""A vision-language model as a judge: the probability that it answers yes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from rewards import hub
from rewards.checks import dtype_of, paired
from rewards.errors import RewardError

MATCH = 'Does this picture show "{prompt}"? Answer yes or no.'
BETTER = 'Which picture shows "{prompt}" better? Is image 1 better than image 2? Answer yes or no.'
ANSWERS = {"yes": ("yes", "Yes", " yes", " Yes"), "no": ("no", "No", " no", " No")}


class VLMJudge:
    """P(yes) / (P(yes) + P(no)) of the next token, in [0, 1], by any image-text model of transformers.

    Without `reference` the model is asked whether the picture shows the prompt. With it (one picture (3, H, W), or one
    for every prompt), it is asked whether the picture is better than the reference, in both orders, and
    r = (p(x, reference) + 1 - p(reference, x)) / 2, so that r(a, b) + r(b, a) = 1 (RewardDance,
    https://arxiv.org/abs/2509.08826). Pictures pass through the model's own processor as tensors, one at a time, so
    that no score depends on its neighbours; `differentiable` is found by trying. Raises ValueError if yes or no is not
    one token of the model.
    """

    def __init__(
        self,
        model: str | Path,
        reference: Tensor | Mapping[str, Tensor] | None = None,
        question: str | None = None,
        dtype: str = "float32",
    ):
        folder = hub.snapshot(model)
        self.processor = AutoProcessor.from_pretrained(folder)
        network = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, dtype=dtype_of(dtype))
        self.model = network.eval().requires_grad_(False)
        self.reference = reference
        self.question = question or (MATCH if reference is None else BETTER)
        self.yes, self.no = (self._tokens(word) for word in ANSWERS)
        self.differentiable = self._keeps_the_gradient()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        self.model.to(images.device)
        seen = images.float() if self.differentiable else images.detach().float()
        return torch.stack([self._score(x, prompt) for x, prompt in zip(seen, prompts, strict=True)])

    def _score(self, x: Tensor, prompt: str) -> Tensor:
        if self.reference is None:
            return self._yes([x], prompt)
        if isinstance(self.reference, Mapping) and prompt not in self.reference:
            raise RewardError(f"there is no reference picture of the prompt {prompt!r}: give one for every prompt")
        other = (self.reference[prompt] if isinstance(self.reference, Mapping) else self.reference).to(x)
        return (self._yes([x, other], prompt) + 1 - self._yes([other, x], prompt)) / 2

    def _yes(self, pictures: list[Tensor], prompt: str) -> Tensor:
        """The probability of yes against no, ()."""
        inputs = self._inputs(pictures, prompt)
        logits = self.model(**inputs, use_cache=False).logits[0, -1].float()
        return torch.sigmoid(logits[self.yes].logsumexp(0) - logits[self.no].logsumexp(0))

    def _inputs(self, pictures: list[Tensor], prompt: str) -> dict[str, Any]:
        ask: list[dict[str, str]] = [{"type": "image"} for _ in pictures]
        ask.append({"type": "text", "text": self.question.format(prompt=prompt)})
        chat = [{"role": "user", "content": ask}]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        found = self.processor(text=[text], images=[pictures], return_tensors="pt", do_rescale=False)
        found = found.to(self.model.device)
        return {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in found.items()}

    def _keeps_the_gradient(self) -> bool:
        probe = torch.full((3, 64, 64), 0.5, requires_grad=True)
        try:
            return bool(self._inputs([probe], "")["pixel_values"].requires_grad)
        except RuntimeError:  # a processor on Pillow or numpy makes an array of it
            return False

    def _tokens(self, word: str) -> list[int]:
        """Every single token that spells the word."""
        spelled = [self.processor.tokenizer.encode(form, add_special_tokens=False) for form in ANSWERS[word]]
        found = sorted({ids[0] for ids in spelled if len(ids) == 1} - {self.processor.tokenizer.unk_token_id})
        if not found:
            raise RewardError(f"{word!r} is not one token of this model, which cannot be a judge then")
        return found
