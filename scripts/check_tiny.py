"""Measures the embedded models against what they promise, and draws the grid of the docs.

    python scripts/check_tiny.py [--images_per_prompt 4] [--grid docs/images/tiny.png]

Prints one JSON object: the oracle on fresh scenes, drawn, through the VAE and under noise; ShapeEval of `tiny` with and
without guidance and of `tiny-turbo` in 1 to 4 steps, ShapeEval-hard of `tiny`, and how many of the pictures are scenes;
how often `tiny-clip` ranks the true caption first, its AUC for the oracle's verdict on drawn pictures, and by how much
small changes move it; the classifier's accuracy.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from difftune import models
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


def shapeeval(
    model: str, guidance: str, options: dict, steps: int, images_per_prompt: int, prompts: str = "shapeeval"
) -> dict[str, float]:
    """The scores of a list of prompts, and the share of pictures that are scenes."""
    method, entries = GUIDANCE[guidance](**options), evaluate.entries_of(None, prompts)
    found = evaluate.evaluate(models.load(model), method, entries, images_per_prompt, steps, 0, 30)
    whole = Coverage()(found.made.images, [""] * len(found.made.images)) >= SCENE_COVERAGE
    scores = {name: round(e.score, 4) for name, e in evaluate.scores(found.results).items()}
    return scores | {"nfe": found.made.nfe, "scenes": round(whole.float().mean().item(), 4)}


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


DRAWN = (("tiny", "none", {}, 25), ("tiny", "cfg", {"scale": 3.0}, 25), ("tiny", "cfg", {"scale": 6.0}, 25))
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images_per_prompt", type=int, default=4)
    parser.add_argument("--scales", type=float, nargs="+", default=[3.0, 5.0, 7.5])
    parser.add_argument("--grid", type=Path)
    options = parser.parse_args()
    n = options.images_per_prompt
    found = {"oracle": oracle()}
    found["tiny-clip"] = {"ranked_first": ranked_first(), "auc": judges_drawn(), "change": steadiness()}
    found["tiny-classifier"] = {"accuracy": classified()}
    found["tiny"] = {"none": shapeeval("tiny", "none", {}, 25, n)}
    found["tiny"] |= {f"cfg {w}": shapeeval("tiny", "cfg", {"scale": w}, 25, n) for w in options.scales}
    found["tiny, hard"] = {
        f"cfg {w}": shapeeval("tiny", "cfg", {"scale": w}, 25, n, "shapeeval-hard") for w in options.scales
    }
    found["tiny-turbo"] = {f"{k} steps": shapeeval("tiny-turbo", "none", {}, k, n) for k in (1, 2, 4)}
    if options.grid:
        best = max(options.scales, key=lambda w: found["tiny"][f"cfg {w}"]["overall"])
        grid(options.grid, best)
    print(json.dumps(found, indent=2))
