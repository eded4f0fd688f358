"""A small world with an exact oracle: scenes of coloured shapes, and captions that hold of them or do not.

Grammar (a caption names every object in the picture):

    caption    = things [" on a " BACKGROUND " background"]
    things     = thing | thing " and " thing | thing RELATION thing | COUNT [COLOR] SHAPE "s"
    thing      = a|an [SIZE] [COLOR] SHAPE

`read` finds the objects of a picture again, `holds` decides whether a caption is true of them, `explain` says why.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import permutations

import numpy as np
from scipy import ndimage

from rewards.errors import RewardError
from rewards.world.render import BACKGROUNDS, COLORS, RESOLUTION, SHAPES, Scene, Thing, coverage

SIZES = ("small", "large")
SIZE_LIMIT = 11.0  # radius in pixels that divides small from large
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"two": 2, "three": 3}
CATEGORIES = ("one_object", "two_objects", "counting", "colors", "position", "attribute_binding")
COMPOSITIONAL = ("two_objects", "counting", "position", "attribute_binding")

MIN_AREA = 12.0  # pixels; less is a speck, not an object
MIN_FIT = 0.7  # intersection over union with the best-fitting ideal shape; less is no shape that we know


@dataclass(frozen=True, order=True)
class Phrase:
    """What a caption says of one object; None is left open."""

    shape: str
    color: str | None = None
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.color, self.shape) if word)

    def fits(self, thing: Thing) -> bool:
        size = "small" if thing.r < SIZE_LIMIT else "large"
        return self.shape == thing.shape and self.color in (None, thing.color) and self.size in (None, size)


@dataclass(frozen=True)
class Caption:
    """A parsed caption; `str` gives its text again."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None
    background: str | None = None

    def __str__(self) -> str:
        where = f" on a {self.background} background" if self.background else ""
        return self._things() + where

    def _things(self) -> str:
        first, *rest = self.phrases
        if self.relation:
            return f"{_article(first)} {self.relation} {_article(rest[0])}"
        if len(self.phrases) > 1 and len(set(self.phrases)) == 1:
            count = next(word for word, n in COUNTS.items() if n == len(self.phrases))
            return f"{count} {first}s"
        return " and ".join(map(_article, self.phrases))


def _article(phrase: Phrase) -> str:
    text = str(phrase)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def parse(text: str) -> Caption:
    """The caption that `text` spells; a ValueError names the word that the grammar does not know."""
    words = text.strip().removesuffix(".").lower().split()
    background = None
    if len(words) > 4 and words[-1] == "background" and words[-4:-2] == ["on", "a"]:
        background, words = _known(words[-2], BACKGROUNDS, text), words[:-4]
    if words and words[0] in COUNTS:
        phrase = _phrase([*words[1:-1], words[-1].removesuffix("s")], text)
        return Caption((phrase,) * COUNTS[words[0]], None, background)
    for relation in ("and", *RELATIONS):
        at = _find(words, relation.split())
        if at is not None:
            phrases = _thing(words[:at], text), _thing(words[at + len(relation.split()) :], text)
            return Caption(phrases, None if relation == "and" else relation, background)
    return Caption((_thing(words, text),), None, background)


def _find(words: list[str], part: list[str]) -> int | None:
    places = (i for i in range(len(words)) if words[i : i + len(part)] == part)
    return next(places, None)


def _thing(words: list[str], text: str) -> Phrase:
    if not words or words[0] not in ("a", "an"):
        raise RewardError(f"cannot parse {text!r}: an object starts with 'a' or 'an', as in 'a red circle'")
    return _phrase(words[1:], text)


def _phrase(words: list[str], text: str) -> Phrase:
    if not words:
        raise RewardError(f"cannot parse {text!r}: a shape is missing; known: {', '.join(SHAPES)}")
    *adjectives, shape = words
    size = color = None
    for word in adjectives:
        if word in SIZES:
            size = word
        else:
            color = _known(word, COLORS, text)
    return Phrase(_known(shape, SHAPES, text), color, size)


def _known(word: str, words: Sequence[str] | dict, text: str) -> str:
    if word not in words:
        raise RewardError(f"cannot parse {text!r}: {word!r} is none of {', '.join(words)}")
    return word


def holds(caption: Caption | str, scene: Scene) -> bool:
    """Whether the objects of the scene are exactly those that the caption names, where it says."""
    return explain(caption, scene) == ""


def explain(caption: Caption | str, scene: Scene) -> str:
    """Why the caption is false of the scene, in one sentence; empty if it holds."""
    caption = parse(caption) if isinstance(caption, str) else caption
    if caption.background not in (None, scene.background):
        return f"the background is {scene.background}, not {caption.background}"
    if len(scene.things) != len(caption.phrases):
        return f"{len(scene.things)} objects, not {len(caption.phrases)}: {scene}"
    fitting = [
        order
        for order in permutations(scene.things)
        if all(phrase.fits(thing) for phrase, thing in zip(caption.phrases, order, strict=True))
    ]
    if not fitting:
        return f"not {' and '.join(map(_article, caption.phrases))}: {scene}"
    if caption.relation and not any(relation(*order) == caption.relation for order in fitting):
        return f"the {caption.phrases[0]} is {relation(*fitting[0])} the {caption.phrases[1]}: {scene}"
    return ""


def relation(first: Thing, second: Thing) -> str:
    """Where the first object is from the second, along the axis of larger centre distance; y points down."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def read(image: np.ndarray) -> Scene:
    """The objects of a picture, read from its pixels: image (H, W, 3) in [0, 1].

    Every pixel is given the nearest colour of the palette; each connected region that is not background is an object,
    and the ideal shape that overlaps it best names it. A region that fits no shape is "blob", one that is no pure
    colour "mixed": no caption names those.
    """
    image = np.asarray(image, np.float64)
    smooth = ndimage.median_filter(image, size=(3, 3, 1))
    palette = BACKGROUNDS | COLORS
    labels = _nearest(smooth, np.array(list(palette.values())))
    names = list(palette)
    border = np.concatenate([labels[:2].ravel(), labels[-2:].ravel(), labels[:, :2].ravel(), labels[:, -2:].ravel()])
    ground = np.bincount(border[border < len(BACKGROUNDS)], minlength=len(BACKGROUNDS)).argmax()
    base = np.median(smooth[labels == ground], axis=0) if (labels == ground).any() else np.zeros(3)
    things = []
    for value, name in enumerate(names):
        if value != ground:
            things += [_thing_at(image, region, name, base) for region in _regions(labels == value)]
    return Scene(names[ground], tuple(things))


def _nearest(image: np.ndarray, palette: np.ndarray) -> np.ndarray:
    return np.square(image[:, :, None] - palette).sum(-1).argmin(-1)


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """Connected regions that survive an opening: the mixed pixels along an edge do not."""
    core = ndimage.binary_opening(mask, np.ones((3, 3)))
    marks, count = ndimage.label(core)
    regions = [marks == i + 1 for i in range(count)]
    return [region for region in regions if region.sum() >= MIN_AREA]


def _thing_at(image: np.ndarray, region: np.ndarray, name: str, base: np.ndarray) -> Thing:
    near = ndimage.binary_dilation(region, np.ones((3, 3)), iterations=2)
    inside = ndimage.binary_erosion(region) if ndimage.binary_erosion(region).any() else region
    tone = np.median(image[inside], axis=0) - base
    cover = ((image - base) @ tone / max(tone @ tone, 1e-6)).clip(0, 1) * near
    area = cover.sum()
    y, x = ndimage.center_of_mass(cover) if area > 0 else ndimage.center_of_mass(region)
    shape, r, fit = _best_shape(cover, x, y, area)
    color = name if name in COLORS else "mixed"
    return Thing(shape if fit >= MIN_FIT else "blob", color, float(x) + 0.5, float(y) + 0.5, r)


def _best_shape(cover: np.ndarray, x: float, y: float, area: float) -> tuple[str, float, float]:
    fits = []
    for shape, unit_area in SHAPES.items():
        r = float(np.sqrt(area / unit_area))
        ideal = coverage(shape, x + 0.5, y + 0.5, r, cover.shape[0])
        fits.append((np.minimum(cover, ideal).sum() / np.maximum(cover, ideal).sum(), shape, r))
    fit, shape, r = max(fits)
    return shape, r, float(fit)


# ------------------------------------------------------------------------------------------------ scenes and captions


def category(caption: Caption) -> str:
    """GenEval's category (https://arxiv.org/abs/2310.11513) that a caption belongs to."""
    colored = sum(phrase.color is not None for phrase in caption.phrases)
    if len(caption.phrases) == 1:
        return "colors" if colored else "one_object"
    if caption.relation:
        return "position"
    if len(set(caption.phrases)) == 1:
        return "counting"
    return "attribute_binding" if colored == len(caption.phrases) else "two_objects"


def content(caption: Caption) -> tuple:
    """What a caption says, whatever the order of its objects and the background: what is held out from training."""
    phrases, where = caption.phrases, caption.relation
    if where in ("right of", "below"):
        phrases, where = phrases[::-1], {"right of": "left of", "below": "above"}[where]
    return (tuple(phrases) if where else tuple(sorted(phrases, key=str)), where)


def draw_caption(rng: np.random.Generator, kind: str) -> Caption:
    """A random caption of one of GenEval's categories, background named half of the time."""
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.5 else None
    shapes, colors = [str(s) for s in rng.choice(list(SHAPES), 2)], [str(c) for c in rng.choice(list(COLORS), 2)]
    if kind == "one_object":
        size = str(rng.choice(SIZES)) if rng.random() < 0.6 else None
        return Caption((Phrase(shapes[0], None, size),), None, background)
    if kind == "colors":
        return Caption((Phrase(shapes[0], colors[0]),), None, background)
    if kind == "counting":
        color = colors[0] if rng.random() < 0.8 else None
        return Caption((Phrase(shapes[0], color),) * int(rng.choice(list(COUNTS.values()))), None, background)
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
    limits = {"small": (8.0, 9.5), "large": (12.5, 15.5)}.get(phrase.size or "", (8.5, 14.0 if count == 1 else 12.0))
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


@cache
def shapeeval() -> tuple[dict, ...]:
    """ShapeEval: {"prompt", "category"} of every prompt, 30 in each of GenEval's six categories."""
    return tuple(json.loads(resources.files("rewards.world").joinpath("shapeeval.json").read_text()))


@cache
def held_out() -> frozenset:
    """The contents that training captions may not have: ShapeEval's of the four compositional categories."""
    captions = [parse(entry["prompt"]) for entry in shapeeval() if entry["category"] in COMPOSITIONAL]
    return frozenset(map(content, captions))


def draw(rng: np.random.Generator, kinds: Sequence[str] = CATEGORIES, p: Sequence[float] | None = None) -> tuple:
    """(caption, scene) for training: a random pair whose content ShapeEval does not test."""
    while True:
        caption = draw_caption(rng, str(rng.choice(kinds, p=p)))
        if content(caption) not in held_out():
            return caption, draw_scene(rng, caption)


def edits(caption: Caption, scene: Scene) -> list[str]:
    """Every caption one word away (colour, shape, size, count, relation, background, swapped colours) that is false."""
    changed = [str(c) for c in _changes(caption)]
    return sorted({text for text in changed if not holds(text, scene)})


def _changes(caption: Caption) -> list[Caption]:
    same = len(caption.phrases) > 1 and len(set(caption.phrases)) == 1
    out = [Caption(caption.phrases, caption.relation, b) for b in BACKGROUNDS if caption.background]
    out += [Caption(caption.phrases, r, caption.background) for r in RELATIONS if caption.relation]
    for i, phrase in enumerate(caption.phrases[:1] if same else caption.phrases):
        options = [Phrase(shape, phrase.color, phrase.size) for shape in SHAPES]
        options += [Phrase(phrase.shape, color, phrase.size) for color in COLORS if phrase.color]
        options += [Phrase(phrase.shape, phrase.color, size) for size in SIZES if phrase.size]
        for new in options:
            phrases = (new,) * len(caption.phrases) if same else caption.phrases[:i] + (new,) + caption.phrases[i + 1 :]
            out.append(Caption(phrases, caption.relation, caption.background))
    if same:
        out += [Caption(caption.phrases[:1] * n, None, caption.background) for n in COUNTS.values()]
    return out


def swaps(caption: Caption, scene: Scene) -> list[str]:
    """Captions whose two objects have traded colours, shapes or places, where that makes them false."""
    if len(set(caption.phrases)) != 2:
        return []
    a, b = caption.phrases
    traded = [
        (Phrase(a.shape, b.color, a.size), Phrase(b.shape, a.color, b.size)),
        (b, a),
    ]
    texts = [str(Caption(pair, caption.relation, caption.background)) for pair in traded]
    return [text for text in texts if not holds(text, scene)]
