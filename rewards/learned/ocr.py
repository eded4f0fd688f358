"""Whether the text that a prompt asks for can be read, by RapidOCR, whose models come with it."""

import re
from collections.abc import Sequence
from importlib import import_module, util

import torch
from torch import Tensor

from rewards.checks import eight_bit, nan_unless_finite
from rewards.errors import ExtraMissing, RewardError

QUOTED = re.compile(r"[\"“]([^\"”]+)[\"”]|(?<!\w)'([^']+)'(?!\w)")


class OCR:
    """1 - d / n in [0, 1]: d the edit distance from what is read to the text of n characters that the prompt quotes.

    Spaces and case do not count, and d is at most n. Text that stands somewhere in what is read scores 1. Needs the
    extra `difftune[ocr]` (`rapidocr` and `onnxruntime`); raises ModuleNotFoundError without it, and ValueError for a
    prompt that quotes nothing.
    """

    differentiable = False

    def __init__(self) -> None:
        if util.find_spec("rapidocr") is None:
            raise ExtraMissing("the reward 'ocr' needs an extra: pip install 'difftune[ocr]'")
        self.engine = import_module("rapidocr").RapidOCR()

    @nan_unless_finite
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        wanted = [quoted(prompt) for prompt in prompts]
        pictures = eight_bit(images).flip(1).permute(0, 2, 3, 1).cpu().numpy()  # it takes BGR
        read = [self.engine(picture).txts or () for picture in pictures]
        scores = [legible("".join(lines), text) for lines, text in zip(read, wanted, strict=True)]
        return torch.tensor(scores, device=images.device)


def quoted(prompt: str) -> str:
    """The text between the quotation marks of a prompt; several are joined."""
    found = "".join(a or b for a, b in QUOTED.findall(prompt))
    if not found.strip():
        raise RewardError(f"{prompt!r} quotes no text to be read: write it in quotation marks")
    return found


def legible(read: str, wanted: str) -> float:
    """1 - min(edit distance, n) / n, without spaces and case; 1 if `wanted` is part of what is read."""
    a, b = ("".join(text.lower().split()) for text in (read, wanted))
    return 1.0 if b in a else 1 - min(edit_distance(a, b), len(b)) / len(b)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
    return row[-1]
