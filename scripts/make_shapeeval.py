"""Draws ShapeEval and ShapeEval-hard: 30 prompts in each of their categories, seed 0.

    python scripts/make_shapeeval.py rewards/world

ShapeEval has GenEval's six categories (https://arxiv.org/abs/2310.11513), ShapeEval-hard the four beyond them. In the
compositional categories with few contents a third of them come with two or three backgrounds, so that enough remain
for training: every content named here is held out from it (`rewards.world.draw.held_out`). The bound sizes of
ShapeEval-hard come with a third object or a relation, which no training caption has beside a size.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rewards.world.draw import draw_caption
from rewards.world.grammar import CATEGORIES, HARD_CATEGORIES, RELATIONS, Caption, Phrase, content, parse
from rewards.world.render import BACKGROUNDS, COLORS, SHAPES

CONTENTS = {"two_objects": 10, "counting": 12, "position": 30, "attribute_binding": 30}  # of 39, 42, 612, 153
HARD_CONTENTS = {"three_objects": 30, "larger_counts": 12, "bound_sizes": 30, "mixed_counts": 30}  # of 816, 42, ...


def variants(rng: np.random.Generator, caption: Caption, count: int) -> Iterator[Caption]:
    for background in rng.permutation(["", *BACKGROUNDS])[:count]:
        yield Caption(caption.phrases, caption.relation, str(background) or None)


def prompts(rng: np.random.Generator, kind: str, limits: dict[str, int], count: int = 30) -> list[str]:
    limit, chosen, texts = limits.get(kind, count), {}, []
    while len(chosen) < limit:
        caption = draw_caption(rng, kind)
        if not worth_asking(kind, caption):
            continue
        if kind in limits:
            chosen.setdefault(content(caption), caption)
        else:
            chosen.setdefault(str(caption), caption)
    if kind not in limits:
        return list(chosen)
    each = {key: list(variants(rng, caption, 3)) for key, caption in chosen.items()}
    for turn in range(3):
        texts += [str(captions[turn]) for captions in each.values()]
    return texts[:count]


def worth_asking(kind: str, caption: Caption) -> bool:
    """Whether the objects of a binding category differ in what is bound: two colours, two sizes."""
    if kind in ("position", "attribute_binding"):
        return caption.phrases[0].color != caption.phrases[1].color
    return kind != "bound_sizes" or None not in {phrase.size for phrase in caption.phrases}


def extended(texts: list[str]) -> Iterator[str]:
    """Captions of two sizes in which, in turn, a third object comes between or the two stand in a relation."""
    rng = np.random.default_rng(1)
    for i, text in enumerate(texts):
        caption = parse(text)
        first, second = caption.phrases
        if i % 2:
            yield str(Caption((first, second), str(rng.choice(RELATIONS)), caption.background))
            continue
        others = [Phrase(shape, color) for shape in SHAPES for color in COLORS]
        taken = {(phrase.shape, phrase.color) for phrase in caption.phrases}
        free = [phrase for phrase in others if (phrase.shape, phrase.color) not in taken]  # 16 or 17 of 18
        third = free[rng.integers(len(others) - 2)]
        yield str(Caption((first, third, second), None, caption.background))


def write(file: Path, categories: tuple[str, ...], limits: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    drawn = {kind: prompts(rng, kind, limits) for kind in categories}
    if "bound_sizes" in drawn:
        drawn["bound_sizes"] = list(extended(drawn["bound_sizes"]))
    rows = [{"category": kind, "prompt": text} for kind, texts in drawn.items() for text in texts]
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write(folder / "shapeeval.json", CATEGORIES, CONTENTS)
    write(folder / "shapeeval_hard.json", HARD_CATEGORIES, HARD_CONTENTS)
