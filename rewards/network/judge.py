"""A vision-language model behind a server as a judge: any server that speaks OpenAI's chat completions."""

import base64
import hashlib
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rewards.checks import eight_bit, nan_unless_finite, png
from rewards.errors import RewardError, Unreachable
from rewards.network import client
from rewards.registry import unknown

TOKENS = ("DIFFTUNE_JUDGE_TOKEN", "OPENAI_API_KEY")  # of the environment, the first that is set
TOP = 20  # most likely tokens that a server tells of; vLLM tells no more by default
NUMBER = r"([-+]?\d+(?:\.\d+)?)"


@dataclass(frozen=True)
class Template:
    """How a judge is asked, and how its answer is read."""

    question: str  # with {prompt}
    patterns: tuple[str, ...] = ()  # each finds a number of the answer, whose mean is the score; none: P(yes)
    range: tuple[float, float] = (0.0, 1.0)  # of a number; another one is no answer
    of_all: bool = False  # P(yes) among all tokens, not against no alone
    max_tokens: int = 1


def _axis(name: str) -> str:
    return rf"{name} Score(?: \(1-5\))?\s*:\s*{NUMBER}"


TEMPLATES = {
    "yes": Template('Does this picture show "{prompt}"? Answer yes or no.'),
    "vqascore": Template('Does this figure show "{prompt}"? Please answer Yes or No.', of_all=True),
    "score": Template(
        'How well does this picture show "{prompt}", from 1 (not at all) to 5 (exactly)? Answer with the number alone.',
        (NUMBER,),
        (1, 5),
        max_tokens=8,
    ),
    "unified-reward": Template(  # as its model card asks: https://huggingface.co/CodeGoat24/UnifiedReward-7b-v1.5 (MIT)
        "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
        "based on two key criteria:\n"
        "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the "
        "accuracy of depicted objects, their relationships, and attributes as described in the caption.\n"
        "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, "
        "color accuracy, and overall aesthetic appeal.\n"
        "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
        "Your task is provided as follows:\nText Caption: [{prompt}]",
        (rf"Final Score:\s*{NUMBER}",),
        (1, 5),
        max_tokens=512,
    ),
    "unified-reward-2": Template(  # https://huggingface.co/CodeGoat24/UnifiedReward-2.0-qwen-7b (MIT)
        "You are presented with a generated image and its associated text caption. Your task is to analyze the image "
        "across multiple dimensions in relation to the caption. Specifically:\n"
        "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
        "- Alignment Score: How well the image matches the caption in terms of content.\n"
        "- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, "
        "etc.).\n"
        "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
        "Output your evaluation using the format below:\n\n"
        "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
        "Your task is provided as follows:\nText Caption: [{prompt}]",
        (_axis("Alignment"), _axis("Coherence"), _axis("Style")),
        (1, 5),
        max_tokens=512,
    ),
}


@dataclass(frozen=True)
class Judge:
    """What the model behind `url` thinks of each picture, sent as PNG in 8 bits.

    `template` names the question of `TEMPLATES`, or is one with {prompt} in it, which is answered by yes or no: the
    score is then P(yes) / (P(yes) + P(no)) of the first token, from its log-probabilities. A template with patterns
    reads numbers from the answer, and the score is their mean. `concurrency` pictures are asked about at a time; no
    score depends on their order. Equal pictures under equal prompts are asked about once.

    A picture whose answer cannot be had, after `retries` of what may pass (429, 502 to 504, a broken connection), or
    cannot be read, has the score NaN, and a warning says how many there were and why: a training step is then skipped,
    and none is rewarded with a number that nobody gave. Raises ConnectionError if the server refuses the request
    itself (400, 401, 403, 404), ValueError for a template without {prompt} and a URL that is none.
    """

    url: str  # up to /v1, as in http://localhost:8000
    model: str
    template: str = "yes"
    concurrency: int = 16
    timeout: float = 60.0  # seconds of one answer
    retries: int = 5
    extra: Mapping[str, Any] = field(default_factory=dict)  # of the request, as chat_template_kwargs of vLLM
    answered: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    differentiable = False

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise RewardError(f"the URL of a judge starts with http:// or https://, not {self.url!r}")
        if self.concurrency < 1:
            raise RewardError(f"concurrency is {self.concurrency}: give 1 or more")
        if self.template not in TEMPLATES and "{prompt}" not in self.template:
            raise RewardError(
                f"{unknown('template', self.template, TEMPLATES)}; or give a question with {{prompt}} in it"
            )

    @nan_unless_finite
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pictures = [png(x) for x in eight_bit(images).permute(0, 2, 3, 1).cpu().numpy()]
        keys = [self._key(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
        todo = {
            key: (picture, prompt)
            for key, picture, prompt in zip(keys, pictures, prompts, strict=True)
            if key not in self.answered
        }
        with ThreadPoolExecutor(self.concurrency) as pool:
            found = dict(zip(todo, pool.map(lambda pair: self._asked(*pair), todo.values()), strict=True))
        self.answered.update({key: score for key, score in found.items() if isinstance(score, float)})
        self._warn([why for why in found.values() if isinstance(why, str)], len(prompts))
        scores = [self.answered.get(key, math.nan) for key in keys]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    @property
    def asks(self) -> Template:
        return TEMPLATES.get(self.template) or Template(self.template)

    def _key(self, picture: bytes, prompt: str) -> str:
        return hashlib.sha256(prompt.encode("utf-8", "surrogatepass") + b"\0" + picture).hexdigest()

    def _asked(self, picture: bytes, prompt: str) -> float | str:
        """The score, or why there is none."""
        server = f"the judge {self.url}"
        url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        read = partial(read_answer, template=self.asks)
        try:
            return client.post(url, self.body(picture, prompt), token(), read, server, self.timeout, self.retries)
        except client.Denied:
            raise
        except Unreachable as error:
            return str(error)

    def body(self, picture: bytes, prompt: str) -> dict[str, Any]:
        """The request about one picture."""
        shown = {"url": f"data:image/png;base64,{base64.b64encode(picture).decode()}"}
        text = self.asks.question.replace("{prompt}", prompt)
        content = [{"type": "image_url", "image_url": shown}, {"type": "text", "text": text}]
        asked = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        asked["max_tokens"] = self.asks.max_tokens
        if not self.asks.patterns:
            asked |= {"logprobs": True, "top_logprobs": TOP}
        return asked | dict(self.extra)

    @staticmethod
    def _warn(reasons: Sequence[str], count: int) -> None:
        if reasons:
            warnings.warn(f"{len(reasons)} of {count} pictures have no score: {reasons[0]}", stacklevel=4)


def token() -> str:
    """What the server is to know this client by: of the environment alone, so that no file holds it."""
    return next((os.environ[name] for name in TOKENS if os.environ.get(name)), "")


def read_answer(answer: Any, template: Template) -> float:
    """The score of a chat completion. Raises ValueError for one that gives none."""
    try:
        choice = answer["choices"][0]
        if template.patterns:
            return numbers_of(choice["message"]["content"], template)
        return probability_of_yes(choice["logprobs"]["content"][0]["top_logprobs"], template.of_all)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        wanted = "choices[0].message.content" if template.patterns else "choices[0].logprobs.content[0].top_logprobs"
        raise RewardError(f"it answered without {wanted}") from error


def probability_of_yes(tokens: Sequence[Mapping[str, Any]], of_all: bool) -> float:
    """P(yes) / (P(yes) + P(no)), or P(yes), over the tokens that are told; a token that is not told counts 0."""
    chance = {"yes": 0.0, "no": 0.0}
    for told in tokens:
        word, logarithm = told["token"].strip().lower(), told["logprob"]
        if word in chance and type(logarithm) in (int, float):
            chance[word] += math.exp(min(logarithm, 0.0))
    if not any(chance.values()):
        raise RewardError("neither yes nor no is among the tokens that it might have answered")
    return chance["yes"] if of_all else chance["yes"] / (chance["yes"] + chance["no"])


def numbers_of(text: str, template: Template) -> float:
    """The mean of the numbers that the patterns find, the last of each, where they lie in the range."""
    low, high = template.range
    found = []
    for pattern in template.patterns:
        numbers = [float(number) for number in re.findall(pattern, text, re.IGNORECASE)]
        if not numbers or not low <= numbers[-1] <= high:
            raise RewardError(f"its answer has no score from {low:g} to {high:g}: {client.quoted(text)}")
        found.append(numbers[-1])
    return sum(found) / len(found)
