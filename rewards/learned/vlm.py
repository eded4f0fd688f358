"""A vision-language model as a judge: the probability that it answers yes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from rewards import hub
from rewards.checks import dtype_of, paired
from rewards.errors import RewardError

MATCH = 'Does this picture show "{prompt}"? Answer yes or no.'
BETTER = 'Which picture shows "{prompt}" better? Is image 1 better than image 2? Answer yes or no.'
VQASCORE = 'Does this figure show "{prompt}"? Please answer Yes or No.'
YES, NO = ("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No")

Normalise = Literal["answers", "vocabulary"]


class VisionLanguageModel:
    """Any image-text model of transformers, asked about pictures: the logits of the first token of its answer.

    Pictures pass through the model's own processor as tensors, one question at a time, so that no answer depends on its
    neighbours; whether a gradient reaches them is found by trying.
    """

    def __init__(self, model: str | Path, dtype: str = "float32"):
        folder = hub.snapshot(model)
        self.processor = AutoProcessor.from_pretrained(folder)
        network = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, dtype=dtype_of(dtype))
        self.network = network.eval().requires_grad_(False)
        self.differentiable = self._keeps_the_gradient()

    def logits(self, pictures: Sequence[Tensor], question: str) -> Tensor:
        """(V,), in float32, of pictures (3, H, W) in [0, 1]."""
        self.network.to(pictures[0].device)
        seen = [x.float() if self.differentiable else x.detach().float() for x in pictures]
        return self.network(**self.inputs(seen, question), use_cache=False).logits[0, -1].float()

    def inputs(self, pictures: Sequence[Tensor], question: str) -> dict[str, Any]:
        """The network's arguments."""
        ask: list[dict[str, str]] = [{"type": "image"} for _ in pictures]
        ask.append({"type": "text", "text": question})
        chat = [{"role": "user", "content": ask}]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        found = self.processor(text=[text], images=[list(pictures)], return_tensors="pt", do_rescale=False)
        found = found.to(self.network.device)
        return {k: v.to(self.network.dtype) if v.is_floating_point() else v for k, v in found.items()}

    def single_tokens(self, forms: Sequence[str]) -> list[int]:
        """Every single token that spells one of the forms. Raises ValueError where none does."""
        found = sorted({ids[0] for ids in self._spelled(forms) if len(ids) == 1} - {self._unknown})
        if not found:
            raise RewardError(f"{forms[0]!r} is not one token of this model, which cannot be a judge then")
        return found

    def first_tokens(self, forms: Sequence[str]) -> list[int]:
        """The first token of each form, whether it is the whole of it or not; the same one may come again."""
        return [ids[0] for ids in self._spelled(forms)]

    def _spelled(self, forms: Sequence[str]) -> list[list[int]]:
        return [self.processor.tokenizer.encode(form, add_special_tokens=False) for form in forms]

    @property
    def _unknown(self) -> int | None:
        return self.processor.tokenizer.unk_token_id

    def _keeps_the_gradient(self) -> bool:
        probe = torch.full((3, 64, 64), 0.5, requires_grad=True)
        try:
            return bool(self.inputs([probe], "")["pixel_values"].requires_grad)
        except RuntimeError:  # a processor on Pillow or numpy makes an array of it
            return False


class VLMJudge:
    """P(yes) / (P(yes) + P(no)) of the answer's first token, in [0, 1], by any image-text model of transformers.

    With normalise="vocabulary" it is P(yes) among all tokens. `question` holds the word {prompt} in braces. Without
    `reference` the model is asked whether the picture shows the prompt. With it (one picture (3, H, W), or one for
    every prompt), it is asked whether the picture is better than the reference, in both orders, and
    r = (p(x, reference) + 1 - p(reference, x)) / 2, so that r(a, b) + r(b, a) = 1 (RewardDance,
    https://arxiv.org/abs/2509.08826). Raises ValueError if yes or no is not one token of the model.
    """

    def __init__(
        self,
        model: str | Path,
        reference: Tensor | Mapping[str, Tensor] | None = None,
        question: str | None = None,
        dtype: str = "float32",
        normalise: Normalise = "answers",
        yes: Sequence[str] = YES,
    ):
        if normalise not in get_args(Normalise):
            raise RewardError(f"probabilities are normalised over answers or vocabulary, not {normalise!r}")
        self.question = question or (MATCH if reference is None else BETTER)
        if "{prompt}" not in self.question:
            raise RewardError(f"the question {self.question!r} does not say where the prompt stands: write {{prompt}}")
        self.model, self.reference = VisionLanguageModel(model, dtype), reference
        self.yes = self.model.single_tokens(yes)
        self.no = self.model.single_tokens(NO) if normalise == "answers" else None

    @property
    def differentiable(self) -> bool:
        return self.model.differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        return torch.stack([self._score(x, prompt) for x, prompt in zip(images, prompts, strict=True)])

    def _score(self, x: Tensor, prompt: str) -> Tensor:
        if self.reference is None:
            return self._yes([x], prompt)
        if isinstance(self.reference, Mapping) and prompt not in self.reference:
            raise RewardError(f"there is no reference picture of the prompt {prompt!r}: give one for every prompt")
        other = (self.reference[prompt] if isinstance(self.reference, Mapping) else self.reference).to(x)
        return (self._yes([x, other], prompt) + 1 - self._yes([other, x], prompt)) / 2

    def _yes(self, pictures: list[Tensor], prompt: str) -> Tensor:
        """The probability of yes, ()."""
        logits = self.model.logits(pictures, self.question.replace("{prompt}", prompt))
        others = logits if self.no is None else logits[self.yes + self.no]
        return (logits[self.yes].logsumexp(0) - others.logsumexp(0)).exp()


def vqascore(model: str | Path, question: str = VQASCORE, dtype: str = "float32") -> VLMJudge:
    """VQAScore (https://arxiv.org/abs/2404.01291): P("Yes" | picture, question) among all tokens, in [0, 1].

    The question is that of t2v_metrics for vision-language models; another moves the score.
    """
    return VLMJudge(model, question=question, dtype=dtype, normalise="vocabulary", yes=("Yes",))
