"""The captions of the world of shapes, and when they hold. A caption names every object in the picture:

    caption = things [" on a " BACKGROUND " background"]
    things  = one RELATION one | group | group " and " group | group ", " group " and " group
    group   = one | ("two"|"three"|"four"|"five") [SIZE] [COLOR] SHAPE "s"
    one     = ("a"|"an"|"one") [SIZE] [COLOR] SHAPE

At most five objects, of at most three kinds.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby, permutations

from rewards.errors import RewardError
from rewards.world.render import BACKGROUNDS, COLORS, SHAPES, Scene, Thing

SIZES = ("small", "large")
SIZE_LIMIT = 11.0  # radius in pixels that divides small from large
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}
NUMBERS = {"a": 1, "an": 1, "one": 1} | COUNTS
MOST_OBJECTS, MOST_KINDS = 5, 3

# GenEval's six (https://arxiv.org/abs/2310.11513), and what is harder than they are
CATEGORIES = ("one_object", "two_objects", "counting", "colors", "position", "attribute_binding")
HARD_CATEGORIES = ("three_objects", "larger_counts", "bound_sizes", "mixed_counts")
ALL_CATEGORIES = CATEGORIES + HARD_CATEGORIES
COMPOSITIONAL = ("two_objects", "counting", "position", "attribute_binding")


@dataclass(frozen=True, order=True)
class Phrase:
    """A caption's description of one object; None is left open."""

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
    """A parsed caption, one phrase for each object; `str` gives its text again."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None
    background: str | None = None

    def __str__(self) -> str:
        where = f" on a {self.background} background" if self.background else ""
        return self.things() + where

    def things(self) -> str:
        """The text without the background."""
        if self.relation:
            first, second = self.phrases
            return f"{_article(first)} {self.relation} {_article(second)}"
        groups = self.groups()
        counted = len(groups) < len(self.phrases)
        *others, last = [_counted(phrase, n) if counted else _article(phrase) for phrase, n in groups]
        return f"{', '.join(others)} and {last}" if others else last

    def groups(self) -> list[tuple[Phrase, int]]:
        """Each phrase with the number of objects in a row that it names."""
        return [(phrase, len(list(several))) for phrase, several in groupby(self.phrases)]


def _article(phrase: Phrase) -> str:
    text = str(phrase)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _counted(phrase: Phrase, count: int) -> str:
    return f"one {phrase}" if count == 1 else f"{_word(count)} {phrase}s"


def _word(count: int) -> str:
    return next(word for word, n in COUNTS.items() if n == count)


# ------------------------------------------------------------------------------------------------ text to caption


def parse(text: str) -> Caption:
    """The caption that `text` spells.

    Raises ValueError, in one sentence, for a word that the grammar does not know, words that contradict each other
    ("a red blue circle", "two red circle"), and more than it can say.
    """
    things, background = _split_background(text.strip().removesuffix(".").lower(), text)
    for relation in RELATIONS:
        first, found, second = f" {things} ".partition(f" {relation} ")
        if found:
            pair = _group(first, text) + _group(second, text)
            if len(pair) != 2:
                raise RewardError(f"cannot parse {text!r}: {relation!r} stands between one object and one object")
            return Caption(pair, relation, background)
    groups = [_group(part, text) for part in re.split(r",\s+and\s|,|\sand\s", things)]
    phrases = tuple(phrase for group in groups for phrase in group)
    if len(groups) > MOST_KINDS or len(phrases) > MOST_OBJECTS:
        most = f"a caption names at most {MOST_OBJECTS} objects of {MOST_KINDS} kinds"
        raise RewardError(f"cannot parse {text!r}: {len(phrases)} objects of {len(groups)} kinds; {most}")
    return Caption(phrases, None, background)


def _split_background(things: str, text: str) -> tuple[str, str | None]:
    words = things.split()
    if len(words) > 4 and words[-1] == "background" and words[-4:-2] == ["on", "a"]:
        return " ".join(words[:-4]), _known(words[-2], BACKGROUNDS, text)
    return " ".join(words), None


def _group(part: str, text: str) -> tuple[Phrase, ...]:
    """The phrases of a group, as many as it has objects."""
    words = part.split()
    if not words or words[0] not in NUMBERS:
        start = "an object starts with 'a' or 'an', several with 'two' to 'five'"
        raise RewardError(f"cannot parse {text!r}: {start}, as in 'a red circle'")
    number, *rest = words
    return (_phrase(rest, number, text),) * NUMBERS[number]


def _phrase(words: list[str], number: str, text: str) -> Phrase:
    if not words:
        raise RewardError(f"cannot parse {text!r}: a shape is missing; known: {', '.join(SHAPES)}")
    *adjectives, shape = words
    if NUMBERS[number] > 1:
        shape = _singular(shape, number, text)
    _known(shape, SHAPES, text)
    sizes = [word for word in adjectives if word in SIZES]
    colors = [_known(word, COLORS, text) for word in adjectives if word not in SIZES]
    return Phrase(shape, _only(colors, "colour", text), _only(sizes, "size", text))


def _singular(shape: str, number: str, text: str) -> str:
    if shape in SHAPES:
        raise RewardError(f"cannot parse {text!r}: after {number!r} it is {shape + 's'!r}, not {shape!r}")
    return shape.removesuffix("s")


def _only(words: list[str], what: str, text: str) -> str | None:
    if len(words) > 1:
        raise RewardError(f"cannot parse {text!r}: one object has one {what}, not {' and '.join(words)}")
    return words[0] if words else None


def _known(word: str, words: Sequence[str] | dict, text: str) -> str:
    if word not in words:
        raise RewardError(f"cannot parse {text!r}: {word!r} is none of {', '.join(words)}")
    return word


# ------------------------------------------------------------------------------------------------ what holds


def holds(caption: Caption | str, scene: Scene) -> bool:
    """Whether the objects of the scene are exactly those that the caption names, if it says."""
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
        return f"not {replace(caption, relation=None).things()}: {scene}"
    if caption.relation and not any(relation(*order) == caption.relation for order in fitting):
        return f"the {caption.phrases[0]} is {relation(*fitting[0])} the {caption.phrases[1]}: {scene}"
    return ""


def relation(first: Thing, second: Thing) -> str:
    """The direction of the first object from the second, along the axis of larger centre distance; y points down."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def category(caption: Caption) -> str:
    """The one of `ALL_CATEGORIES` that a caption belongs to."""
    kinds = set(caption.phrases)
    if len(caption.phrases) == 1:
        return "colors" if caption.phrases[0].color else "one_object"
    if len(kinds) == 1 and not caption.relation:
        return "counting" if len(caption.phrases) <= 3 else "larger_counts"
    if any(phrase.size for phrase in kinds):
        return "bound_sizes"
    if caption.relation:
        return "position"
    if len(kinds) < len(caption.phrases):
        return "mixed_counts"
    if len(kinds) == 3:
        return "three_objects"
    return "attribute_binding" if all(phrase.color for phrase in kinds) else "two_objects"


def content(caption: Caption) -> tuple:
    """A caption's content, whatever the order of its objects and its background: captions are held out by it."""
    phrases, where = caption.phrases, caption.relation
    if where in ("right of", "below"):
        phrases, where = phrases[::-1], {"right of": "left of", "below": "above"}[where]
    return (tuple(phrases) if where else tuple(sorted(phrases, key=str)), where)


# ------------------------------------------------------------------------------------------------ false captions


def edits(caption: Caption, scene: Scene) -> list[str]:
    """Every caption one word away (colour, shape, size, count, relation, background) that is false of the scene."""
    changed = {str(c): c for c in _changes(caption)}
    return sorted(text for text, c in changed.items() if not holds(c, scene))


def _changes(caption: Caption) -> Iterator[Caption]:
    if caption.background:
        yield from (replace(caption, background=name) for name in BACKGROUNDS)
    if caption.relation:
        yield from (replace(caption, relation=name) for name in RELATIONS)
    groups = [(phrase, 1) for phrase in caption.phrases] if caption.relation else caption.groups()
    for i, (phrase, count) in enumerate(groups):
        counts = [] if caption.relation else _other_counts(groups, i)
        new = [(other, count) for other in _variants(phrase)] + [(phrase, n) for n in counts]
        for group in new:
            yield replace(caption, phrases=_flat([*groups[:i], group, *groups[i + 1 :]]))


def _variants(phrase: Phrase) -> Iterator[Phrase]:
    """The phrase with one of its words replaced."""
    yield from (replace(phrase, shape=shape) for shape in SHAPES)
    if phrase.color:
        yield from (replace(phrase, color=color) for color in COLORS)
    if phrase.size:
        yield from (replace(phrase, size=size) for size in SIZES)


def _other_counts(groups: list[tuple[Phrase, int]], i: int) -> list[int]:
    """What the i-th group may count instead, so that the caption still counts, and not too far."""
    rest = [count for j, (_, count) in enumerate(groups) if j != i]
    if groups[i][1] == 1 and max(rest, default=1) == 1:
        return []
    least = 1 if max(rest, default=1) > 1 else 2
    return list(range(least, MOST_OBJECTS - sum(rest) + 1))


def _flat(groups: Sequence[tuple[Phrase, int]]) -> tuple[Phrase, ...]:
    return tuple(phrase for phrase, count in groups for _ in range(count))


def swaps(caption: Caption, scene: Scene) -> list[str]:
    """Captions two of whose groups have traded colours, sizes, counts or places, where that makes them false."""
    groups = [(phrase, 1) for phrase in caption.phrases] if caption.relation else caption.groups()
    traded = [
        _flat([*groups[:i], first, *groups[i + 1 : j], second, *groups[j + 1 :]])
        for i, j in combinations(range(len(groups)), 2)
        for first, second in _trades(groups[i], groups[j])
    ]
    texts = dict.fromkeys(str(replace(caption, phrases=phrases)) for phrases in traded)
    return [text for text in texts if not holds(text, scene)]


def _trades(one: tuple[Phrase, int], other: tuple[Phrase, int]) -> Iterator[tuple[tuple[Phrase, int], ...]]:
    (a, n), (b, m) = one, other
    if a.color and b.color:
        yield (replace(a, color=b.color), n), (replace(b, color=a.color), m)
    if a.size or b.size:
        yield (replace(a, size=b.size), n), (replace(b, size=a.size), m)
    yield (b, n), (a, m)  # places, and counts where they differ
