"""A vision-language model behind a server as a judge: any server that speaks OpenAI's chat completions."""

import base64
import hashlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rewards.checks import eight_bit, nan_unless_finite, png
from rewards.errors import RewardError, Unreachable
from rewards.network import client
from rewards.network.templates import Template, read_answer, template_named

TOKENS = ("DIFFTUNE_JUDGE_TOKEN", "OPENAI_API_KEY")  # of the environment, the first that is set
TOP = 20  # most likely tokens that a server tells of; vLLM tells no more by default


@dataclass(frozen=True)
class Judge:
    """What the model behind `url` thinks of each picture, sent as PNG in 8 bits.

    `template` names one of `TEMPLATES`, or a JSON file of one, or is a question with {prompt} in it that is answered by
    yes or no: the score is then P(yes) / (P(yes) + P(no)) of the first token, from its log-probabilities. A template
    with patterns reads numbers from the answer, and the score is their mean. `concurrency` pictures are asked about at
    a time; no score depends on their order. Equal pictures under equal prompts are asked about once.

    A request is sent again, `retries` times, if the server may soon answer (429, any 5xx, a broken connection): first
    after `pause` seconds, then after twice as many, and so on, 30 at most, or when the server says. A picture that has
    no answer then, or one that cannot be read, has the score NaN, and a warning says how many there were and why: a
    training step is then skipped, and none is rewarded with a number that nobody gave.

    Raises ConnectionError if the server refuses all requests: one by 401, 403 or 404, or every one of a batch by 400
    before it ever answered; a 400 beside answers is of that picture, which has NaN. Answers that came are kept. Raises
    ValueError for a template without {prompt}, and for a URL that does not start with http:// or https://.
    """

    url: str  # up to /v1, as in http://localhost:8000
    model: str
    template: str = "yes"
    concurrency: int = 16
    timeout: float | None = None  # seconds of one answer; None: the template's, 60 for most
    retries: int = 5
    pause: float = 1.0  # seconds before the first of them
    extra: Mapping[str, Any] = field(default_factory=dict)  # of the request, as chat_template_kwargs of vLLM
    answered: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    differentiable = False

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise RewardError(f"the URL of a judge starts with http:// or https://, not {self.url!r}")
        if self.concurrency < 1:
            raise RewardError(f"concurrency is {self.concurrency}: give 1 or more")
        if self.pause < 0 or self.retries < 0:
            raise RewardError(f"pause is {self.pause} and retries {self.retries}: give 0 or more")
        template_named(self.template)  # which must be one

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
        failures = [why for why in found.values() if isinstance(why, Unreachable)]
        if denied := next((why for why in failures if self._denies(why)), None):
            raise denied
        self._warn(failures, len(prompts))
        scores = [self.answered.get(key, math.nan) for key in keys]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _denies(self, why: Unreachable) -> bool:
        """Whether the server refuses every request, and not a picture alone."""
        return isinstance(why, client.Denied) and (why.status != 400 or not self.answered)

    @cached_property
    def asks(self) -> Template:
        return template_named(self.template)

    def _key(self, picture: bytes, prompt: str) -> str:
        return hashlib.sha256(prompt.encode("utf-8", "surrogatepass") + b"\0" + picture).hexdigest()

    def _asked(self, picture: bytes, prompt: str) -> float | Unreachable:
        """The score, or why there is none."""
        server = f"the judge {self.url}"
        url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        read = partial(read_answer, template=self.asks)
        timeout = self.asks.timeout if self.timeout is None else self.timeout
        patience = client.Patience(timeout, self.retries, self.pause, client.FAILED)
        try:
            return client.post(url, self.body(picture, prompt), token(), read, server, patience)
        except Unreachable as error:
            return error

    def body(self, picture: bytes, prompt: str) -> dict[str, Any]:
        """The request about one picture."""
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        before, place, after = self.asks.question.partition("{picture}")
        texts = (before, after) if place else ("", before)
        parts = [{"type": "text", "text": text.replace("{prompt}", prompt)} for text in texts]
        shown = {"type": "image_url", "image_url": {"url": url}}
        content = [parts[0], shown, parts[1]] if place else [shown, parts[1]]
        said = [{"role": "system", "content": self.asks.system}] if self.asks.system else []
        asked = {"model": self.model, "messages": [*said, {"role": "user", "content": content}], "temperature": 0}
        asked["max_tokens"] = self.asks.max_tokens
        if not self.asks.patterns:
            asked |= {"logprobs": True, "top_logprobs": TOP}
        return asked | dict(self.extra)

    @staticmethod
    def _warn(reasons: Sequence[Unreachable], count: int) -> None:
        if reasons:
            warnings.warn(f"{len(reasons)} of {count} pictures have no score: {reasons[0]}", stacklevel=4)


def token() -> str:
    """What the server is to know this client by: of the environment alone, so that no file holds it."""
    return next((os.environ[name] for name in TOKENS if os.environ.get(name)), "")
