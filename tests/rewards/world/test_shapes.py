"""The world of shapes: its grammar, its oracle and ShapeEval."""

from collections import Counter

import numpy as np
import pytest

from rewards.world import shapes
from rewards.world.render import RESOLUTION, Scene, Thing, render

KINDS = shapes.CATEGORIES


def drawn(count: int, seed: int = 0) -> list[tuple[shapes.Caption, Scene]]:
    rng = np.random.default_rng(seed)
    return [shapes.draw(rng) for _ in range(count)]


def acceptance(count: int, noise: float) -> tuple[float, float]:
    """Fractions of true captions and of captions one word away that the oracle accepts of rendered scenes."""
    rng = np.random.default_rng(1)
    right, wrong = [], []
    for caption, scene in drawn(count):
        picture = render(scene) + noise * rng.standard_normal((RESOLUTION, RESOLUTION, 3))
        seen = shapes.read(picture.clip(0, 1))
        right.append(shapes.holds(caption, seen))
        edits = shapes.edits(caption, scene)
        wrong.append(shapes.holds(edits[rng.integers(len(edits))], seen))
    return float(np.mean(right)), float(np.mean(wrong))


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_oracle_accepts_what_is_true_and_rejects_one_wrong_word(noise):
    right, wrong = acceptance(300, noise)
    assert right >= 0.99
    assert wrong <= 0.01


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_oracle_on_2000_scenes(noise):
    right, wrong = acceptance(2000, noise)
    assert right >= 0.99
    assert wrong <= 0.01


def test_oracle_reads_place_and_size():
    thing = Thing("triangle", "purple", 20.0, 41.0, 10.0)
    (seen,) = shapes.read(render(Scene("gray", (thing,)))).things
    assert (seen.shape, seen.color) == ("triangle", "purple")
    np.testing.assert_allclose((seen.x, seen.y, seen.r), (thing.x, thing.y, thing.r), atol=0.5)


def test_edits_are_false_of_the_scene_and_one_step_away():
    for caption, scene in drawn(60):
        for text in shapes.edits(caption, scene):
            edit = shapes.parse(text)
            changed = sum(a != b for a, b in zip(caption.phrases, edit.phrases, strict=False))
            changed += edit.background != caption.background
            changed += edit.relation != caption.relation
            if Counter(caption.phrases).most_common(1)[0][1] == 1:  # else one word stands for all of them
                assert changed == 1, (str(caption), text)
            assert not shapes.holds(edit, scene)


def test_swaps_are_false_and_say_the_same_words():
    for caption, scene in drawn(60):
        for text in shapes.swaps(caption, scene):
            assert sorted(text.replace("an ", "a ").split()) == sorted(str(caption).replace("an ", "a ").split())
            assert not shapes.holds(text, scene)


def test_shapeeval_is_180_distinct_prompts_30_in_each_category():
    prompts = [entry["prompt"] for entry in shapes.shapeeval()]
    assert len(set(prompts)) == 180
    assert Counter(entry["category"] for entry in shapes.shapeeval()) == dict.fromkeys(KINDS, 30)
    for entry in shapes.shapeeval():
        caption = shapes.parse(entry["prompt"])
        assert str(caption) == entry["prompt"]
        assert shapes.category(caption) == entry["category"]


def test_training_captions_say_nothing_that_shapeeval_holds_out():
    rng = np.random.default_rng(2)
    held = shapes.held_out()
    captions = [shapes.draw_caption(rng, KINDS[i % len(KINDS)]) for i in range(5000)]
    assert any(shapes.content(caption) in held for caption in captions)  # what `draw` has to reject
    training = [caption for caption, _ in drawn(600, seed=3)]
    assert not held & set(map(shapes.content, training))
    tested = {shapes.parse(e["prompt"]) for e in shapes.shapeeval() if e["category"] in shapes.COMPOSITIONAL}
    assert not tested & set(training)


def test_no_held_out_content_in_5000_training_captions(monkeypatch):
    monkeypatch.setattr(shapes, "draw_scene", lambda rng, caption: None)  # placing the objects is what takes time
    assert not shapes.held_out() & {shapes.content(caption) for caption, _ in drawn(5000)}


@pytest.mark.parametrize("kind", KINDS)
def test_captions_survive_text(kind):
    rng = np.random.default_rng(0)
    for _ in range(50):
        caption = shapes.draw_caption(rng, kind)
        assert shapes.parse(str(caption)) == caption
        assert shapes.category(caption) == kind


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "starts with 'a' or 'an'"),
        ("red circle", "starts with 'a' or 'an'"),
        ("a red", "'red' is none of circle, square, triangle"),
        ("a", "a shape is missing; known: circle, square, triangle"),
        ("a pink circle", "'pink' is none of red, green"),
        ("a red circle on a pink background", "'pink' is none of white, black, gray"),
        ("a red circle left of", "starts with 'a' or 'an'"),
        ("two", "'two' is none of circle, square, triangle"),
        ("a photo of a dog", "'photo' is none of red, green"),
    ],
)
def test_grammar_names_the_word_that_it_does_not_know(text, reason):
    with pytest.raises(ValueError, match="cannot parse") as caught:
        shapes.parse(text)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a red circle and a blue square", ""),
        ("a red circle left of a blue square on a white background", ""),
        ("a red circle on a black background", "the background is white, not black"),
        ("a red circle", "2 objects, not 1: "),
        ("a red circle and a green square", "not a red circle and a green square: "),
        ("a red circle above a blue square", "the red circle is left of the blue square: "),
    ],
)
def test_explain_says_why(text, why):
    scene = Scene("white", (Thing("circle", "red", 16, 30, 10), Thing("square", "blue", 46, 36, 10)))
    assert shapes.explain(text, shapes.read(render(scene))).startswith(why)
    assert shapes.holds(text, scene) == (why == "")
