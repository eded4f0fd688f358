"""The vocabulary: CLIP's tokenizer with a token for each word of the grammar."""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

from torch import Tensor
from transformers import CLIPTokenizer

from rewards.world.grammar import RELATIONS, SIZES
from rewards.world.render import BACKGROUNDS, COLORS, SHAPES

LENGTH = 20  # tokens: three sized and coloured objects on a background have 18 words and commas, and two marks
FILE = Path(__file__).with_name(
    "vocabulary.json"
)  # learnt by a BPE trainer, which breaks ties by chance; then extended


@cache
def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of its own: every word of the grammar is one token, any text works."""
    vocab, merges = json.loads(FILE.read_text())
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in merges], model_max_length=LENGTH)


def tokens(texts: list[str]) -> Tensor:
    """Token ids (N, LENGTH)."""
    return tokenizer()(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def extended(vocab: dict[str, int], merges: list, texts: list[str]) -> tuple[dict[str, int], list]:
    """The vocabulary with a token for each of `texts`, the old tokens under their old numbers."""
    vocab, merges = dict(vocab), [tuple(pair) for pair in merges]
    for text in texts:
        pieces = _pieces(text, merges)
        while len(pieces) > 1:
            first, second, *rest = pieces
            merges.append((first, second))
            vocab.setdefault(first + second, len(vocab))
            pieces = [first + second, *rest]
    return vocab, merges


def _pieces(text: str, merges: list[tuple[str, str]]) -> list[str]:
    """The tokens of a word: of the pairs that stand side by side, the one that was learnt first is merged."""
    pieces, rank = [*text[:-1], text[-1] + "</w>"], {pair: i for i, pair in enumerate(merges)}
    while pairs := [(rank[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in rank]:
        i = min(pairs)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def grammar_words() -> list[str]:
    found = [*SIZES, *COLORS, *SHAPES, *(shape + "s" for shape in SHAPES), "one", "two", "three", "four", "five"]
    return [*found, *" ".join(RELATIONS).split(), *BACKGROUNDS, "and", "a", "an", "on", "background"]


def keep(vocab: dict[str, int], merges: list) -> None:
    FILE.write_text(json.dumps([vocab, [list(pair) for pair in merges]]) + "\n")
