"""Random captions and scenes, and the prompt lists that training may not see."""

from collections import Counter

import numpy as np
import pytest

from rewards.world import draw, grammar
from rewards.world.render import Scene, Thing, render

LISTS = {"shapeeval": (draw.shapeeval, grammar.CATEGORIES), "hard": (draw.shapeeval_hard, grammar.HARD_CATEGORIES)}


@pytest.mark.parametrize("name", LISTS)
def test_lists_have_30_distinct_prompts_in_each_category(name):
    entries, kinds = LISTS[name][0](), LISTS[name][1]
    assert len({entry["prompt"] for entry in entries}) == 30 * len(kinds)
    assert Counter(entry["category"] for entry in entries) == dict.fromkeys(kinds, 30)
    for entry in entries:
        caption = grammar.parse(entry["prompt"])
        assert str(caption) == entry["prompt"]
        assert grammar.category(caption) == entry["category"]


def closed_captions() -> set[grammar.Caption]:
    """Every caption of the lists that training may not see, with its background."""
    entries = [*draw.shapeeval(), *draw.shapeeval_hard()]
    kinds = grammar.COMPOSITIONAL + grammar.HARD_CATEGORIES
    return {grammar.parse(entry["prompt"]) for entry in entries if entry["category"] in kinds}


def test_the_pair_of_every_bound_size_is_held_out_too_and_training_never_has_more_beside_a_size():
    hard = [grammar.parse(e["prompt"]) for e in draw.shapeeval_hard() if e["category"] == "bound_sizes"]
    pairs = [grammar.Caption(tuple(phrase for phrase in caption.phrases if phrase.size)) for caption in hard]
    assert {len(pair.phrases) for pair in pairs} == {2}
    assert {grammar.content(pair) for pair in pairs} <= draw.held_out()
    assert all(caption.relation or len(caption.phrases) == 3 for caption in hard)
    rng = np.random.default_rng(3)
    drawn = [draw.draw_caption(rng, "bound_sizes") for _ in range(500)]
    assert not any(caption.relation or len(caption.phrases) > 2 for caption in drawn)


def test_training_captions_say_nothing_that_the_lists_hold_out(monkeypatch):
    monkeypatch.setattr(draw, "draw_scene", lambda rng, caption: None)  # placing the objects is what takes time
    rng, kinds, held = np.random.default_rng(2), grammar.ALL_CATEGORIES, draw.held_out()
    captions = [draw.draw_caption(rng, kinds[i % len(kinds)]) for i in range(5000)]
    assert {grammar.category(c) for c in captions if grammar.content(c) in held} == {
        *grammar.COMPOSITIONAL,
        *grammar.HARD_CATEGORIES,
    }  # what `draw` has to reject
    training = [draw.draw(rng, kinds)[0] for _ in range(5000)]
    assert not held & set(map(grammar.content, training))
    assert not closed_captions() & set(training)


@pytest.mark.parametrize("kind", grammar.ALL_CATEGORIES)
def test_drawn_scenes_hold_and_their_objects_stand_apart(kind):
    rng = np.random.default_rng(0)
    for _ in range(15):
        caption, scene = draw.draw(rng, [kind])
        assert grammar.holds(caption, scene)
        for i, one in enumerate(scene.things):
            assert all(np.hypot(one.x - t.x, one.y - t.y) > 1.2 * (one.r + t.r) for t in scene.things[:i])


def test_every_harder_kind_is_drawn_in_all_its_sizes():
    rng = np.random.default_rng(0)
    counts = {
        kind: {tuple(sorted(Counter(draw.draw_caption(rng, kind).phrases).values())) for _ in range(200)}
        for kind in grammar.HARD_CATEGORIES
    }
    assert counts["three_objects"] == {(1, 1, 1)}
    assert counts["larger_counts"] == {(4,), (5,)}
    assert counts["bound_sizes"] == {(1, 1)}
    assert counts["mixed_counts"] == {(1, 2), (1, 3), (1, 4), (2, 2), (2, 3)}


@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_scene_scales_with_its_picture(size):
    """A red disc on white: its centre and its area, from what is missing of blue."""
    picture = render(Scene("white", (Thing("circle", "red", 20, 44, 9),)), size)
    missing = picture[..., 2].max() - picture[..., 2].astype(float)
    share, places, scale = missing / missing.max(), np.arange(size) + 0.5, size / 64
    assert share.sum() == pytest.approx(np.pi * (9 * scale) ** 2, rel=0.02)
    centre = [(share.sum(axis) * places).sum() / share.sum() for axis in (0, 1)]
    assert centre == pytest.approx([20 * scale, 44 * scale], abs=0.02)
