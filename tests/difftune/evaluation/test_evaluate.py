"""The statistics against closed forms and hand calculations; the seeds; the files."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from difftune.errors import UserError
from difftune.evaluation import intervals, shapeeval
from difftune.evaluation.intervals import Result, differences, estimate
from difftune.evaluation.shapeeval import scores
from rewards.world import draw, grammar
from rewards.world.render import render


def results(rows, category="colors"):
    """Results of {prompt: [holds of seed 0, of seed 1, ...]}."""
    return [Result(p, category, seed, bool(h)) for p, held in rows.items() for seed, h in enumerate(held)]


@pytest.mark.parametrize("n", [1, 10, 30])
def test_unanimous_scores_have_wilsons_interval(n):
    for value in (0.0, 1.0):
        wanted = binomtest(round(value * n), n).proportion_ci(method="wilson")
        e = estimate([value] * n)
        assert (e.low, e.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_bootstrap_has_the_unbiased_standard_error():
    values = np.random.default_rng(0).uniform(size=200)
    e = estimate(values)
    expected = intervals.Z95 * values.std(ddof=1) / np.sqrt(len(values))
    assert e.score == pytest.approx(values.mean())
    assert (e.high - e.low) / 2 == pytest.approx(expected, rel=0.05)


def test_bootstrap_covers():
    """Prompts of their own difficulty, four images each: the interval holds the true mean 95 % of the time."""
    rng = np.random.default_rng(1)
    difficulty = rng.beta(1, 1, size=(300, 30))
    values = rng.binomial(4, difficulty) / 4
    intervals = [estimate(v) for v in values]
    covered = np.mean([e.low <= 0.5 <= e.high for e in intervals])
    assert 0.91 <= covered <= 0.98


def test_images_of_a_prompt_count_as_one():
    once = scores(results({f"p{i}": [i % 2] for i in range(30)}))["overall"]
    four_times = scores(results({f"p{i}": [i % 2] * 4 for i in range(30)}))["overall"]
    assert once == four_times


def test_scores_by_category():
    found = scores(results({"a": [1, 0], "b": [1, 1]}, "colors") + results({"c": [0, 0]}, "position"))
    assert {name: e.score for name, e in found.items()} == {"overall": 0.5, "colors": 0.75, "position": 0.0}


def test_paired_difference_by_hand():
    before = results({"a": [0, 0, 1], "b": [1, 0, 0], "only before": [1]})
    after = results({"a": [1, 1, 1], "b": [1, 1, 0], "only after": [0]})
    assert differences(after, before)["overall"].score == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_a_difference_counts_only_when_its_interval_excludes_zero():
    flat = results({f"p{i}": [i % 2] for i in range(30)})
    better = results({f"p{i}": [1] for i in range(30)})
    half_up_half_down = results({f"p{i}": [(i + 1) % 2] for i in range(30)})
    same = differences(flat, flat)["overall"]
    assert (same.score, same.low) == (0, -same.high) and not same.excludes_zero
    assert differences(better, flat)["overall"].excludes_zero
    assert not differences(half_up_half_down, flat)["overall"].excludes_zero
    one_prompt = differences(results({"p": [1]}), results({"p": [0]}))["overall"]
    assert one_prompt.score == 1 and not one_prompt.excludes_zero


@pytest.mark.parametrize(("n", "counts"), [(2, False), (5, False), (6, True)])
def test_a_difference_of_few_prompts_does_not_count(n, counts):
    """However narrow its interval is: under random signs, n of one sign have p = 2 / 2^n."""
    then = results({f"p{i}": [0] * 4 for i in range(n)})
    now = results({f"p{i}": [1, 1, i % 2, 1] for i in range(n)})
    found = shapeeval.summary(now, then)["difference"]
    assert found["overall"]["low"] > 0 and found["overall"]["counts"] is found["colors"]["counts"] is counts


def test_nothing_in_common_is_an_error():
    with pytest.raises(UserError, match="shares no prompt and seed"):
        differences(results({"a": [1]}), results({"b": [1]}))


def test_seeds_depend_on_the_prompt_alone():
    all_of_them = dict(zip(*shapeeval.plan(draw.shapeeval(), 1, seed=0), strict=True))
    few = dict(zip(*shapeeval.plan(shapeeval.entries_of(2), 1, seed=0), strict=True))
    assert few.items() <= all_of_them.items() and len(few) == 12
    assert len(set(all_of_them.values())) == len(all_of_them)
    first, second = shapeeval.plan(shapeeval.entries_of(1), 2, 0)[1][:2]
    assert first == shapeeval.plan(shapeeval.entries_of(1), 1, 0)[1][0] and first != second
    assert shapeeval.plan(shapeeval.entries_of(1), 1, 1)[1][0] != first


def test_lists_of_prompts_by_name_and_of_a_file(tmp_path):
    hard = shapeeval.entries_of(2, "shapeeval-hard")
    assert [entry["category"] for entry in hard] == [name for name in grammar.HARD_CATEGORIES for _ in range(2)]
    file = tmp_path / "prompts.txt"
    file.write_text("four red circles\na red circle\n\nfour red circles\n")
    assert shapeeval.entries_of(prompts=str(file)) == [
        {"prompt": "a red circle", "category": "colors"},
        {"prompt": "four red circles", "category": "larger_counts"},
    ]
    file.write_text("a red circle\na cat\n")
    with pytest.raises(UserError, match=f"the oracle cannot judge {file}: cannot parse 'a cat'"):
        shapeeval.entries_of(prompts=str(file))
    with pytest.raises(UserError, match="cannot read the prompts of 'shapeval'"):
        shapeeval.entries_of(prompts="shapeval")


def test_scores_name_the_harder_categories():
    rows = [Result(e["prompt"], e["category"], 0, True) for e in shapeeval.entries_of(1, "shapeeval-hard")]
    assert list(shapeeval.scores(rows)) == ["overall", *grammar.HARD_CATEGORIES]


def test_the_oracle_judges():
    caption = grammar.parse("a red circle")
    picture = render(draw.draw_scene(np.random.default_rng(0), caption))
    images = torch.from_numpy(np.stack([picture, picture])).permute(0, 3, 1, 2)
    judged = shapeeval.judge_images(images, ["a red circle", "a blue circle"], [3, 4])
    assert judged == [Result("a red circle", "colors", 3, True), Result("a blue circle", "colors", 4, False)]


def test_results_survive_a_file(tmp_path):
    rows = results({"a": [1, 0], "b": [0, 0]})
    (tmp_path / "eval.json").write_text(json.dumps(shapeeval.summary(rows)))
    assert shapeeval.load_results(tmp_path / "eval.json") == rows
    (tmp_path / "other.json").write_text('{"images": 3}')
    for name in ("other.json", "absent.json"):
        with pytest.raises(UserError, match=name):
            shapeeval.load_results(tmp_path / name)
