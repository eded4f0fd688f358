"""Random captions and scenes of which they hold, and the prompt lists that training may not see."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources

import numpy as np

from rewards.world.grammar import (
    CATEGORIES,
    COMPOSITIONAL,
    HARD_CATEGORIES,
    MOST_OBJECTS,
    RELATIONS,
    SIZES,
    Caption,
    Phrase,
    content,
    parse,
    relation,
)
from rewards.world.render import BACKGROUNDS, COLORS, RESOLUTION, SHAPES, Scene, Thing


def draw(rng: np.random.Generator, kinds: Sequence[str] = CATEGORIES, p: Sequence[float] | None = None) -> tuple:
    """(caption, scene) for training: a random pair whose content neither list of prompts tests."""
    while True:
        caption = draw_caption(rng, str(rng.choice(kinds, p=p)))
        if content(caption) not in held_out():
            return caption, draw_scene(rng, caption)


# ------------------------------------------------------------------------------------------------ captions


def draw_caption(rng: np.random.Generator, kind: str) -> Caption:
    """A random caption of one of `ALL_CATEGORIES`, background named half of the time."""
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.5 else None
    if kind in HARD:
        return Caption(HARD[kind](rng), None, background)
    shapes, colors = [str(s) for s in rng.choice(list(SHAPES), 2)], [str(c) for c in rng.choice(list(COLORS), 2)]
    if kind == "one_object":
        size = str(rng.choice(SIZES)) if rng.random() < 0.6 else None
        return Caption((Phrase(shapes[0], None, size),), None, background)
    if kind == "colors":
        return Caption((Phrase(shapes[0], colors[0]),), None, background)
    if kind == "counting":
        color = colors[0] if rng.random() < 0.8 else None
        return Caption((Phrase(shapes[0], color),) * int(rng.choice([2, 3])), None, background)
    if kind == "two_objects":
        if shapes[0] == shapes[1]:
            return draw_caption(rng, kind)
        bare = int(rng.integers(3))  # which of the two has no colour; 2: neither has one
        phrases = [Phrase(s, None if bare in (2, i) else colors[i]) for i, s in enumerate(shapes)]
        return Caption(tuple(phrases), None, background)
    phrases = [Phrase(s, c) for s, c in zip(shapes, colors, strict=True)]
    if phrases[0] == phrases[1]:
        return draw_caption(rng, kind)
    where = str(rng.choice(RELATIONS)) if kind == "position" else None
    return Caption(tuple(phrases), where, background)


def _phrases(rng: np.random.Generator, count: int) -> list[Phrase]:
    """Phrases of `count` kinds, all different, each with a colour."""
    everything = [Phrase(shape, color) for shape in SHAPES for color in COLORS]
    return [everything[i] for i in rng.choice(len(everything), count, replace=False)]


def _three_objects(rng: np.random.Generator) -> tuple[Phrase, ...]:
    return tuple(_phrases(rng, 3))


def _larger_counts(rng: np.random.Generator) -> tuple[Phrase, ...]:
    (phrase,) = _phrases(rng, 1)
    return (phrase if rng.random() < 0.8 else Phrase(phrase.shape),) * int(rng.choice([4, 5]))


def _bound_sizes(rng: np.random.Generator) -> tuple[Phrase, ...]:
    """Two objects, at least one of them with a size; they may differ in nothing but the size."""
    one, other = _phrases(rng, 2)
    first, second = (str(size) for size in rng.permutation(SIZES))
    if rng.random() < 0.15:
        other = one
    elif rng.random() < 0.3:
        first, second = [(first, None), (None, second)][int(rng.integers(2))]  # type: ignore[assignment]
    return Phrase(one.shape, one.color, first), Phrase(other.shape, other.color, second)


def _mixed_counts(rng: np.random.Generator) -> tuple[Phrase, ...]:
    one, other = _phrases(rng, 2)
    pairs = [(n, m) for n in range(1, MOST_OBJECTS) for m in range(1, MOST_OBJECTS) if 3 <= n + m <= MOST_OBJECTS]
    n, m = pairs[int(rng.integers(len(pairs)))]
    return (one,) * n + (other,) * m


HARD: dict[str, Callable[[np.random.Generator], tuple[Phrase, ...]]] = dict(
    zip(HARD_CATEGORIES, (_three_objects, _larger_counts, _bound_sizes, _mixed_counts), strict=True)
)


# ------------------------------------------------------------------------------------------------ scenes


def draw_scene(rng: np.random.Generator, caption: Caption) -> Scene:
    """A random scene of which the caption holds; what the caption leaves open is drawn at random."""
    background = caption.background or str(rng.choice(list(BACKGROUNDS)))
    while True:
        things = _place(rng, [_radius(rng, phrase, len(caption.phrases)) for phrase in caption.phrases])
        if things is None:
            continue
        scene = Scene(
            background,
            tuple(
                Thing(phrase.shape, phrase.color or str(rng.choice(list(COLORS))), *place)
                for phrase, place in zip(caption.phrases, things, strict=True)
            ),
        )
        if _clear(caption, scene):
            return scene


def _radius(rng: np.random.Generator, phrase: Phrase, count: int) -> float:
    if count == 1:
        limits = {"small": (8.0, 9.5), "large": (12.5, 15.5)}.get(phrase.size or "", (8.5, 14.0))
    elif count > 3:
        limits = (8.2, 9.2)  # less does not survive the VAE: squares come out as circles
    else:
        limits = {"small": (8.0, 9.5), "large": (12.5, 14.0)}.get(phrase.size or "", (8.5, 12.0))
    return float(rng.uniform(*limits))


def _place(rng: np.random.Generator, radii: list[float]) -> list[tuple[float, float, float]] | None:
    places: list[tuple[float, float, float]] = []
    for r in radii:
        for _ in range(30):
            x, y = rng.uniform(1.25 * r + 1, RESOLUTION - 1.25 * r - 1, 2)
            if all(np.hypot(x - a, y - b) > 1.2 * (r + c) + 1 for a, b, c in places):
                places.append((float(x), float(y), r))
                break
        else:
            return None
    return places


def _clear(caption: Caption, scene: Scene) -> bool:
    """The relation is plain to see: a third longer along its axis than across it."""
    if not caption.relation:
        return True
    first, second = scene.things
    dx, dy = abs(first.x - second.x), abs(first.y - second.y)
    return relation(first, second) == caption.relation and max(dx, dy) > 1.33 * min(dx, dy)


# ------------------------------------------------------------------------------------------------ prompt lists


@cache
def _listed(name: str) -> tuple[dict[str, str], ...]:
    return tuple(json.loads(resources.files("rewards.world").joinpath(f"{name}.json").read_text()))


def shapeeval() -> tuple[dict[str, str], ...]:
    """ShapeEval: {"prompt", "category"} of every prompt, 30 in each of GenEval's six categories."""
    return _listed("shapeeval")


def shapeeval_hard() -> tuple[dict[str, str], ...]:
    """ShapeEval-hard: {"prompt", "category"} of every prompt, 30 in each of the four categories beyond GenEval's."""
    return _listed("shapeeval_hard")


@cache
def held_out() -> frozenset:
    """The contents that training captions may not have: ShapeEval's of the four compositional categories, all of
    ShapeEval-hard's, and the pairs of sizes within those."""
    tested = [parse(entry["prompt"]) for entry in shapeeval() if entry["category"] in COMPOSITIONAL]
    tested += (hard := [parse(entry["prompt"]) for entry in shapeeval_hard()])
    sized = [tuple(phrase for phrase in caption.phrases if phrase.size) for caption in hard]
    return frozenset(map(content, tested + [Caption(pair) for pair in sized if pair]))
