"""Measures the embedded models against what they promise, and draws the grid of the docs.

    python scripts/check_tiny.py [PART ...] [--images_per_prompt 4] [--scales 2 3] [--grid docs/images/tiny.png]

Prints one JSON object: the oracle on fresh scenes, drawn, through the VAE, under noise; the image models on ShapeEval
and ShapeEval-hard with and without guidance, with 95 % intervals, and how many of the pictures are scenes; how often
`tiny-clip` ranks the true caption first, its AUC for the oracle's verdict on drawn pictures, and by how much changes
move it; the classifier's accuracy. Name parts to measure them alone.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from difftune import models
from difftune.evaluation import intervals
from difftune.evaluation import shapeeval as evaluate
from difftune.files import output
from difftune.pipelines.generate import Sampling, generate_batches, pixels
from guidance.methods.catalogue import GUIDANCE
from rewards.registry import load
from rewards.world import draw, grammar, reader
from rewards.world.classifier import CLASSES, load_classifier
from rewards.world.oracle import SCENE_COVERAGE, Coverage, Oracle
from rewards.world.render import render

STREAM = 99  # of random scenes; training uses others


def scenes(count: int, stream: int = STREAM) -> tuple[Tensor, list, list]:
    """Freshly rendered (images (N, 3, 64, 64), captions, scenes)."""
    rng = np.random.default_rng([1, stream])
    pairs = [draw.draw(rng) for _ in range(count)]
    images = torch.from_numpy(np.stack([render(scene) for _, scene in pairs])).permute(0, 3, 1, 2)
    return images, [caption for caption, _ in pairs], [scene for _, scene in pairs]


@torch.no_grad()
def through_vae(images: Tensor) -> Tensor:
    vae = models.load("tiny").vae
    parts = [vae.decode(vae.encode(2 * part - 1).latent_dist.mean).sample for part in images.split(64)]
    return ((torch.cat(parts) + 1) / 2).clamp(0, 1)


def accepts(images: Tensor, captions: list, scenes: list) -> dict[str, float]:
    """How often the oracle accepts the true caption, and one that is one word away."""
    rng, right, wrong = np.random.default_rng(2), [], []
    for image, caption, scene in zip(images.permute(0, 2, 3, 1).numpy(), captions, scenes, strict=True):
        seen, false = reader.read(image), grammar.edits(caption, scene)
        right.append(grammar.holds(caption, seen))
        wrong.append(grammar.holds(false[rng.integers(len(false))], seen))
    return {"true": float(np.mean(right)), "one_word_wrong": float(np.mean(wrong))}


def oracle(count: int = 2000) -> dict[str, dict[str, float]]:
    images, captions, truths = scenes(count)
    noisy = images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    seen = {"drawn": images, "vae": through_vae(images), "noise": noisy.clamp(0, 1)}
    return {name: accepts(part, captions, truths) for name, part in seen.items()}


class Row(NamedTuple):
    """One way of drawing a list of prompts."""

    model: str
    scale: float  # of CFG; 1 is no guidance
    steps: int = 25
    prompts: str = "shapeeval"

    def __str__(self) -> str:
        guidance = "none" if self.scale == 1 else f"cfg {self.scale:g}"
        return f"{self.model}, {self.prompts}, {guidance}, {self.steps} steps"


def pictures_of(row: Row, images_per_prompt: int) -> evaluate.Evaluation:
    method = GUIDANCE["none"]() if row.scale == 1 else GUIDANCE["cfg"](row.scale)
    entries = evaluate.entries_of(None, row.prompts)
    return evaluate.evaluate(models.load(row.model), method, entries, images_per_prompt, row.steps, 0, 30)


def scores(found: evaluate.Evaluation) -> dict[str, Any]:
    """The oracle's scores with their intervals, the share of pictures that are scenes, and of prompts of which at least
    one picture holds."""
    whole = Coverage()(found.made.images, [""] * len(found.made.images)) >= SCENE_COVERAGE
    shown = {name: str(e) for name, e in evaluate.scores(found.results).items()}
    held: dict[str, bool] = defaultdict(bool)
    for result in found.results:
        held[result.prompt] |= result.holds
    best = sum(held.values()) / len(held)
    return shown | {"scenes": round(whole.float().mean().item(), 4), "best of all": round(best, 4)}


def shapeeval(rows: Sequence[Row], images_per_prompt: int) -> dict[str, Any]:
    """Each row's scores, and as `gain` its paired difference from the model's first row on the same prompts."""
    found: dict[str, Any] = {}
    first: dict[tuple[str, str], evaluate.Evaluation] = {}
    for row in rows:
        made = pictures_of(row, images_per_prompt)
        base = first.setdefault((row.model, row.prompts), made)
        gain = {"gain": str(intervals.differences(made.results, base.results)["overall"])} if base is not made else {}
        found[str(row)] = scores(made) | gain
        print(f"{row}: {found[str(row)]}", file=sys.stderr, flush=True)
    return found


@torch.no_grad()
def ranked_first(count: int = 1000, edits: int = 7) -> float:
    """How often `tiny-clip` puts the true caption before 7 minimal edits, swaps first."""
    reward, rng, first = load("tiny-clip"), np.random.default_rng(3), []
    for image, caption, scene in zip(*scenes(count, STREAM + 1), strict=True):
        changed = grammar.edits(caption, scene)
        wrong = (grammar.swaps(caption, scene) + [changed[i] for i in rng.permutation(len(changed))])[:edits]
        scores = reward(image.expand(len(wrong) + 1, -1, -1, -1), [str(caption), *wrong])
        first.append(bool(scores[0] > scores[1:].max()))
    return float(np.mean(first))


def auc(scores: np.ndarray, holds: np.ndarray) -> float | None:
    """The chance that a picture whose caption holds scores above one whose caption does not, ties halved; None where
    all hold, or none."""
    yes, no = scores[holds], scores[~holds]
    if not len(yes) or not len(no):
        return None
    return float(
        (rankdata(np.concatenate([yes, no]))[: len(yes)].sum() - len(yes) * (len(yes) + 1) / 2) / len(yes) / len(no)
    )


DRAWN: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("tiny", "none", {}, 25),
    ("tiny", "cfg", {"scale": 3.0}, 25),
    ("tiny", "cfg", {"scale": 6.0}, 25),
)
DRAWN += (("tiny-turbo", "none", {}, 2),)


@torch.no_grad()
def judges_drawn(count: int = 2000) -> dict[str, float | None]:
    """The AUC of `tiny-clip` for the oracle's verdict on pictures that models drew, overall and in each category."""
    rng, reward, scores, holds, kinds = np.random.default_rng(5), load("tiny-clip"), [], [], []
    for model, guidance, options, steps in DRAWN:
        prompts = [str(draw_training(rng, grammar.CATEGORIES[i % 6])) for i in range(count // len(DRAWN))]
        method, seeds = GUIDANCE[guidance](**options), list(range(len(prompts)))
        made = generate_batches(models.load(model), prompts, seeds, method, Sampling(steps, 50))
        images = torch.cat([batch.images for batch in made])
        scores += reward(images, prompts).tolist()
        holds += Oracle()(images, prompts).bool().tolist()
        kinds += [grammar.category(grammar.parse(prompt)) for prompt in prompts]
    score, held, kind = np.array(scores), np.array(holds), np.array(kinds)
    each = {name: auc(score[kind == name], held[kind == name]) for name in grammar.CATEGORIES}
    return {"overall": auc(score, held), "holds": float(held.mean())} | each


def draw_training(rng: np.random.Generator, kind: str) -> grammar.Caption:
    """A caption that no list of prompts holds."""
    while True:
        caption = draw.draw_caption(rng, kind)
        if grammar.content(caption) not in draw.held_out():
            return caption


@torch.no_grad()
def steadiness(count: int = 200) -> dict[str, float]:
    """By how much a pixel's move and noise of .02 change `tiny-clip`'s score, in parts of the spread of a caption's
    score over pictures of its kind."""
    images, captions, _ = scenes(count, STREAM + 3)
    reward, texts = load("tiny-clip"), [str(caption) for caption in captions]
    scores = reward(images, texts)
    others = torch.stack([reward(images, [text] * count).std() for text in texts[:20]]).mean()
    noise = 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    changed = {"moved": images.roll((1, 1), (2, 3)), "noised": (images + noise).clamp(0, 1)}
    return {name: ((reward(x, texts) - scores).abs().mean() / others).item() for name, x in changed.items()}


@torch.no_grad()
def classified(count: int = 1000) -> float:
    images, _, truths = scenes(count, STREAM + 2)
    single = [i for i, scene in enumerate(truths) if len(scene.things) == 1]
    labels = [CLASSES.index(f"{truths[i].things[0].color} {truths[i].things[0].shape}") for i in single]
    return (load_classifier()(images[single]).argmax(1) == torch.tensor(labels)).float().mean().item()


def grid(file: Path, scale: float) -> None:
    """64 samples, uncurated: the first prompts of every category in turn, seed 0."""
    kinds = [[e["prompt"] for e in draw.shapeeval() if e["category"] == kind] for kind in grammar.CATEGORIES]
    prompts = [prompt for row in zip(*kinds, strict=True) for prompt in row][:64]
    seeds = [evaluate.image_seed(0, prompt, 0) for prompt in prompts]
    made = generate_batches(models.load("tiny"), prompts, seeds, GUIDANCE["cfg"](scale), Sampling(25, 32))
    file.parent.mkdir(parents=True, exist_ok=True)
    output.write(file, output.grid(pixels(torch.cat([batch.images for batch in made]))))


def parts(n: int, scales: Sequence[float]) -> dict[str, Callable[[], Any]]:
    """What is measured, by name: one process each, if there are as many cores."""
    ways = [1.0, *scales]
    return {
        "oracle": oracle,
        "tiny-clip": lambda: {"ranked_first": ranked_first(), "auc": judges_drawn(), "change": steadiness()},
        "tiny-classifier": classified,
        "tiny": lambda: shapeeval([Row("tiny", w) for w in ways], n),
        "tiny-flow": lambda: shapeeval([Row("tiny-flow", w) for w in ways], n),
        "tiny-turbo": lambda: shapeeval([Row("tiny-turbo", 1.0, steps) for steps in (1, 2, 4)], n),
        "tiny-weak": lambda: shapeeval([Row("tiny-weak", w) for w in ways[-1:]], 1),
        "hard": lambda: shapeeval(
            [Row(name, w, 25, "shapeeval-hard") for name in ("tiny", "tiny-flow") for w in ways]
            + [Row("tiny-turbo", 1.0, 4, "shapeeval-hard")],
            n,
        ),
        "best-of-20": lambda: shapeeval([Row("tiny", ways[-1], 25, "shapeeval-hard")], 20),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="all of them, if none is named")
    parser.add_argument("--images_per_prompt", type=int, default=4)
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0, 3.0], help="of CFG, beside no guidance")
    parser.add_argument("--grid", type=Path, help="where to draw 64 pictures, under the last of the scales")
    options = parser.parse_args()
    known = parts(options.images_per_prompt, options.scales)
    if unknown := sorted(set(options.parts) - known.keys()):
        parser.error(f"no part {unknown[0]!r}; known: {', '.join(known)}")
    print(json.dumps({name: known[name]() for name in options.parts or known}, indent=2))
    if options.grid:
        grid(options.grid, options.scales[-1])
