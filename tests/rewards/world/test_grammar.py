"""What a caption may say, and of which scenes it holds."""

from collections import Counter

import numpy as np
import pytest

from rewards.world import draw, grammar
from rewards.world.reader import read
from rewards.world.render import Scene, Thing, render

KINDS = grammar.ALL_CATEGORIES


def drawn(count: int, seed: int = 0) -> list[tuple[grammar.Caption, Scene]]:
    rng = np.random.default_rng(seed)
    return [draw.draw(rng, [KINDS[i % len(KINDS)]]) for i in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_captions_survive_text(kind):
    rng = np.random.default_rng(0)
    for _ in range(50):
        caption = draw.draw_caption(rng, kind)
        assert grammar.parse(str(caption)) == caption
        assert grammar.category(caption) == kind


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("A red circle.", "a red circle"),
        ("an red circle", "a red circle"),
        ("one red circle", "a red circle"),
        ("a red circle and a red circle", "two red circles"),
        ("a red circle and a blue square and a green triangle", "a red circle, a blue square and a green triangle"),
        ("a red circle, a blue square, and a green triangle", "a red circle, a blue square and a green triangle"),
        ("two red circles and a blue square", "two red circles and one blue square"),
        ("a red small circle", "a small red circle"),
        ("two small circles on a white background", "two small circles on a white background"),
    ],
)
def test_what_means_the_same_is_written_in_one_way(text, same):
    assert str(grammar.parse(text)) == same


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "starts with 'a' or 'an'"),
        ("red circle", "starts with 'a' or 'an'"),
        ("a red", "'red' is none of circle, square, triangle"),
        ("a", "a shape is missing; known: circle, square, triangle"),
        ("two", "a shape is missing; known: circle, square, triangle"),
        ("a pink circle", "'pink' is none of red, green"),
        ("a red circle on a pink background", "'pink' is none of white, black, gray"),
        ("a red circle left of", "starts with 'a' or 'an'"),
        ("a photo of a dog", "'dog' is none of circle"),
        ("a red blue circle", "one object has one colour, not red and blue"),
        ("a red red circle", "one object has one colour, not red and red"),
        ("a small large circle", "one object has one size, not small and large"),
        ("two red circle", "after 'two' it is 'circles', not 'circle'"),
        ("a red circles", "'circles' is none of circle, square, triangle"),
        ("one red circles", "'circles' is none of circle, square, triangle"),
        ("six red circles", "several with 'two' to 'five'"),
        ("a red circle and", "'and' is none of circle"),
        ("a red circle,", "starts with 'a' or 'an'"),
        ("two red circles left of a blue square", "'left of' stands between one object and one object"),
        ("a red circle left of a blue square above a green circle", "'square' is none of red"),
        ("a red circle on a white background on a black background", "'background' is none of circle"),
        ("three red circles and three blue squares", "6 objects of 2 kinds; a caption names at most 5 objects of 3"),
        ("a circle, a square, a triangle and a red circle", "4 objects of 4 kinds"),
    ],
)
def test_grammar_names_what_it_cannot_take(text, reason):
    with pytest.raises(ValueError, match="cannot parse") as caught:
        grammar.parse(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a red circle and a blue square", ""),
        ("a red circle left of a blue square on a white background", ""),
        ("a small red circle and a large blue square", ""),
        ("a red circle on a black background", "the background is white, not black"),
        ("a red circle", "2 objects, not 1: "),
        ("a red circle and a green square", "not a red circle and a green square: "),
        ("a large red circle and a small blue square", "not a large red circle and a small blue square: "),
        ("a red circle above a blue square", "the red circle is left of the blue square: "),
        ("a green circle above a blue square", "not a green circle and a blue square: "),
    ],
)
def test_explain_says_why(text, why):
    scene = Scene("white", (Thing("circle", "red", 16, 30, 9), Thing("square", "blue", 46, 36, 13)))
    assert grammar.explain(text, read(render(scene))).startswith(why)
    assert grammar.holds(text, scene) == (why == "")


def test_mixed_counts_are_counted_by_kind():
    place = [(12, 12), (32, 12), (52, 12), (12, 40), (40, 40)]
    things = [Thing("circle", "red", x, y, 8) for x, y in place[:3]] + [Thing("square", "red", *place[3], 8)]
    scene = Scene("gray", tuple(things))
    assert grammar.holds("three red circles and one red square", scene)
    assert grammar.holds("one square and three circles", scene)
    for text in ("two red circles and two red squares", "four red circles", "one red circle and three red squares"):
        assert not grammar.holds(text, scene)


def test_edits_are_false_of_the_scene_and_one_step_away():
    for caption, scene in drawn(60):
        for text in grammar.edits(caption, scene):
            edit = grammar.parse(text)
            assert not grammar.holds(edit, scene)
            changed = sum(a != b for a, b in zip(caption.phrases, edit.phrases, strict=False))
            changed += edit.background != caption.background
            changed += edit.relation != caption.relation
            if Counter(caption.phrases).most_common(1)[0][1] == 1:  # else one word stands for several of them
                assert changed == 1, (str(caption), text)


@pytest.mark.parametrize(
    ("text", "edit", "swap"),
    [
        ("four red circles", "five red circles", None),
        ("two red circles and one blue square", "three red circles and one blue square",
         "two blue squares and one red circle"),
        ("a small red circle and a large blue square", "a large red circle and a large blue square",
         "a large red circle and a small blue square"),
        ("a red circle, a blue square and a green triangle", "a red circle, a blue square and a green circle",
         "a green circle, a blue square and a red triangle"),
    ],
)  # fmt: skip
def test_harder_captions_have_edits_and_swaps(text, edit, swap):
    caption = grammar.parse(text)
    scene = draw.draw_scene(np.random.default_rng(0), caption)
    assert edit in grammar.edits(caption, scene)
    assert text not in grammar.edits(caption, scene)
    assert swap is None or swap in grammar.swaps(caption, scene)


def test_swaps_are_false_and_say_the_same_words():
    for caption, scene in drawn(60):
        for text in grammar.swaps(caption, scene):
            assert words(text) == words(str(caption)), (str(caption), text)
            assert not grammar.holds(text, scene)


def words(text: str) -> list[str]:
    """Sorted, without what says the grammatical number and joins the parts."""
    return sorted(word.removesuffix("s") for word in text.replace(",", "").replace("an ", "a ").split())
