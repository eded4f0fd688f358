"""The oracle's eyes: what it reads from pixels."""

import numpy as np
import pytest
import torch

from rewards.world import draw, grammar
from rewards.world.oracle import Coverage, Oracle
from rewards.world.reader import explained, read
from rewards.world.render import BACKGROUNDS, COLORS, RESOLUTION, SHAPES, Scene, Thing, coverage, render

KINDS = grammar.ALL_CATEGORIES


def acceptance(count: int, noise: float) -> tuple[float, float]:
    """Fractions of true captions and of captions one word away that the oracle accepts of rendered scenes."""
    rng, right, wrong = np.random.default_rng(1), [], []
    for i in range(count):
        caption, scene = draw.draw(rng, [KINDS[i % len(KINDS)]])
        picture = render(scene) + noise * rng.standard_normal((RESOLUTION, RESOLUTION, 3))
        seen = read(picture.clip(0, 1))
        right.append(grammar.holds(caption, seen))
        edits = grammar.edits(caption, scene)
        wrong.append(grammar.holds(edits[rng.integers(len(edits))], seen))
    return float(np.mean(right)), float(np.mean(wrong))


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_oracle_accepts_what_is_true_and_rejects_one_wrong_word(noise):
    right, wrong = acceptance(100, noise)
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
    (seen,) = read(render(Scene("gray", (thing,)))).things
    assert (seen.shape, seen.color) == ("triangle", "purple")
    np.testing.assert_allclose((seen.x, seen.y, seen.r), (thing.x, thing.y, thing.r), atol=0.5)


def touching(rng: np.random.Generator) -> Scene:
    """Two objects of one kind, pushed together until they share an edge or a corner."""
    shape, color, ground = (str(rng.choice(list(names))) for names in (SHAPES, COLORS, BACKGROUNDS))
    while True:
        x, y, angle = rng.uniform(18, 46), rng.uniform(18, 46), rng.uniform(0, 2 * np.pi)
        first, r = Thing(shape, color, x, y, float(rng.uniform(8.5, 12))), float(rng.uniform(8.5, 12))
        far = next(d for d in np.arange(8, 40, 0.25) if not _meet(first, _moved(first, d, angle, r)))
        second = _moved(first, far, angle, r)
        if all(1.25 * t.r < min(t.x, t.y) and max(t.x, t.y) < RESOLUTION - 1.25 * t.r for t in (first, second)):
            return Scene(ground, (first, second))


def _moved(thing: Thing, distance: float, angle: float, r: float) -> Thing:
    x, y = thing.x + distance * np.cos(angle), thing.y + distance * np.sin(angle)
    return Thing(thing.shape, thing.color, x, y, r)


def _meet(*things: Thing) -> bool:
    return np.minimum(*(coverage(t.shape, t.x, t.y, t.r) for t in things)).max() > 0


def test_objects_of_one_kind_that_touch_are_two():
    rng = np.random.default_rng(0)
    scenes = [touching(rng) for _ in range(60)]
    captions = [grammar.Caption((grammar.Phrase(s.things[0].shape, s.things[0].color),) * 2) for s in scenes]
    held = [grammar.holds(c, read(render(s))) for c, s in zip(captions, scenes, strict=True)]
    assert np.mean(held) >= 0.98


def oval(long: float, short: float) -> np.ndarray:
    y, x = np.indices((RESOLUTION, RESOLUTION)) - RESOLUTION / 2
    inside = np.clip((1 - np.hypot(x / long, y / short)) * 8 + 0.5, 0, 1)[..., None]
    return (1 - inside) * np.array(BACKGROUNDS["white"]) + inside * np.array(COLORS["red"])


@pytest.mark.parametrize("long", [14.0, 16.0, 20.0])
def test_an_oval_is_one_blob_and_not_two_circles(long):
    (seen,) = read(oval(long, 7.0)).things
    assert seen.shape == "blob"


def test_coverage_of_scenes_and_of_noise():
    rng = np.random.default_rng(0)
    scenes = [draw.draw(rng, [kind])[1] for kind in KINDS]
    assert min(explained(render(scene)) for scene in scenes) == 1
    assert explained(rng.random((RESOLUTION, RESOLUTION, 3))) < 0.3
    half = render(scenes[0]).copy()
    half[:, 32:] = rng.random((RESOLUTION, 32, 3))
    assert 0.3 < explained(half) < 0.8
    assert explained(oval(20.0, 7.0)) < 0.97  # a blob is not explained


def test_oracle_says_that_a_picture_is_no_scene():
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (why,) = Oracle().explain(noise, ["a red circle"])
    share = Coverage()(noise, [""]).item()
    assert why.endswith(f"the picture is not a scene: background and readable objects explain {share:.0%} of it")
    scene = torch.from_numpy(render(Scene("white", (Thing("circle", "red", 30, 30, 10),)))).permute(2, 0, 1)[None]
    assert "not a scene" not in Oracle().explain(scene, ["a blue circle"])[0]
    assert Oracle().explain(scene, ["a red circle"]) == [""]
