"""Draws ShapeEval: 30 prompts in each of GenEval's six categories (https://arxiv.org/abs/2310.11513), seed 0.

    python scripts/make_shapeeval.py rewards/world/shapeeval.json

In the four compositional categories a third of the contents come with two or three backgrounds, so that enough
contents are left for training: every content named here is held out from it (`rewards.world.shapes.held_out`).
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rewards.world.render import BACKGROUNDS
from rewards.world.shapes import CATEGORIES, Caption, content, draw_caption

CONTENTS = {"two_objects": 10, "counting": 12, "position": 30, "attribute_binding": 30}  # of 39, 42, 612, 153


def variants(rng: np.random.Generator, caption: Caption, count: int) -> Iterator[Caption]:
    for background in rng.permutation(["", *BACKGROUNDS])[:count]:
        yield Caption(caption.phrases, caption.relation, str(background) or None)


def prompts(rng: np.random.Generator, kind: str, count: int = 30) -> list[str]:
    limit, chosen, texts = CONTENTS.get(kind, count), {}, []
    while len(chosen) < limit:
        caption = draw_caption(rng, kind)
        if kind in ("position", "attribute_binding") and caption.phrases[0].color == caption.phrases[1].color:
            continue
        if kind in CONTENTS:
            chosen.setdefault(content(caption), caption)
        else:
            chosen.setdefault(str(caption), caption)
    if kind not in CONTENTS:
        return list(chosen)
    each = {key: list(variants(rng, caption, 3)) for key, caption in chosen.items()}
    for turn in range(3):
        texts += [str(captions[turn]) for captions in each.values()]
    return texts[:count]


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    rows = [{"category": kind, "prompt": text} for kind in CATEGORIES for text in prompts(rng, kind)]
    Path(sys.argv[1]).write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
