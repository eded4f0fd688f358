"""Soft-TIFA: how probable a vision-language model finds the right answers to questions about the prompt's content."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rewards.checks import paired
from rewards.errors import RewardError
from rewards.learned.vlm import YES, VisionLanguageModel

ASK = "{question} Answer in one word."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LEAST = 1e-6  # floor of each probability in the geometric mean, which a single 0 would make 0

Mean = Literal["arithmetic", "geometric"]
Questions = Mapping[str, Sequence[tuple[str, str]]]  # prompt: its questions, each with the right answer


class SoftTIFA:
    """The mean probability of the right answers to the prompt's questions, in [0, 1] (GenEval2's Soft-TIFA,
    https://arxiv.org/abs/2512.16853).

    An answer's probability is that of the first token of the reply. Summed over every spelling of the answer that is a
    single token: for yes, 'yes'/'Yes' with or without a leading space; for a number, the word (either case) and the
    digit. `mean` is over the prompt's questions: arithmetic (AM) or geometric (GM, every probability at least 1e-6).
    original=True takes the first token of each spelling instead, even if the spelling has more tokens, and counts a
    token shared by two spellings twice, as the paper's code does.

    `questions` is a file of lines {"prompt": ..., "vqa_list": [[question, answer], ...]}, GenEval2's own for example
    (CC BY-NC 4.0, not bundled), or a mapping. Raises ValueError for a file of another form, and for a prompt without
    questions.
    """

    def __init__(
        self,
        model: str | Path,
        questions: str | Path | Questions,
        mean: Mean = "arithmetic",
        original: bool = False,
        dtype: str = "float32",
    ):
        if mean not in get_args(Mean):
            raise RewardError(f"the mean over questions is arithmetic or geometric, not {mean!r}")
        self.questions = questions if isinstance(questions, Mapping) else read_questions(questions)
        self.model = VisionLanguageModel(model, dtype)
        self.mean, self.original = mean, original

    @property
    def differentiable(self) -> bool:
        return self.model.differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        asked = [self._asked(prompt) for prompt in prompts]
        return torch.stack([self._score(x, questions) for x, questions in zip(images, asked, strict=True)])

    def _asked(self, prompt: str) -> Sequence[tuple[str, str]]:
        if not self.questions.get(prompt):
            raise RewardError(f"there are no questions about the prompt {prompt!r}: add a line for it to the questions")
        return self.questions[prompt]

    def _score(self, x: Tensor, questions: Sequence[tuple[str, str]]) -> Tensor:
        found = torch.stack([self.probability(x, question, answer) for question, answer in questions])
        return found.mean() if self.mean == "arithmetic" else found.clamp(min=LEAST).log().mean().exp()

    def probability(self, x: Tensor, question: str, answer: str) -> Tensor:
        """The probability, (), that the reply about the picture (3, H, W) is the answer."""
        chances = self.model.logits([x], ASK.format(question=question)).softmax(0)
        tokens = self.model.first_tokens if self.original else self.model.single_tokens
        return chances[tokens(forms(answer))].sum()


def forms(answer: str) -> tuple[str, ...]:
    """How a reply may spell an answer."""
    word = answer.lower()
    if word == "yes":
        return YES
    spelled = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
    if word not in NUMBERS:
        return spelled
    digit = str(NUMBERS.index(word))
    return (*spelled, digit, f" {digit}")


def read_questions(file: str | Path) -> dict[str, list[tuple[str, str]]]:
    """The questions of each prompt, from a file of JSON lines."""
    if not Path(file).is_file():
        raise RewardError(f"there is no file of questions at {file}")
    found = {}
    for number, line in enumerate(Path(file).read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            prompt, questions = _entry(line, f"line {number} of {file}")
            found[prompt] = questions
    return found


def _entry(line: str, where: str) -> tuple[str, list[tuple[str, str]]]:
    try:
        row = json.loads(line)
        prompt, pairs = row["prompt"], [(question, answer) for question, answer in row["vqa_list"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt, pairs = None, []
    if not isinstance(prompt, str) or not pairs or not _texts(pairs):
        raise RewardError(f'{where} is not {{"prompt": ..., "vqa_list": [[question, answer], ...]}}')
    return prompt, pairs


def _texts(pairs: Iterable[tuple[Any, Any]]) -> bool:
    return all(isinstance(text, str) and text.strip() for pair in pairs for text in pair)
