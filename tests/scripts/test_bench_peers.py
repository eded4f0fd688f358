"""TRL beside ours: how its answers are told, and what its program is asked, without its environment."""

import json
import sys
from argparse import Namespace

import pytest

from tests.support.benches import script


@pytest.fixture(scope="module")
def bench():
    with script("bench_peers") as module:
        yield module


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"error": "AssertionError: 50 | 10"}, "no: AssertionError: 50 / 10"),
        ({"moved": 0.1}, "yes"),
        ({"moved": 0.0}, "no: nothing changes"),
        ({"read_from_saved": 0.0, "epoch_after_resuming": 0.0}, "no: the epoch after it changes nothing"),
        ({"read_from_saved": 0.2, "epoch_after_resuming": 0.1}, "not where it was: it reads other weights"),
        ({"epoch_after_resuming": 0.1, "from_uninterrupted": 0.0}, "yes, to the bit"),
        ({"epoch_after_resuming": 0.1, "from_uninterrupted": 0.1}, "yes"),
    ],
)  # fmt: skip
def test_a_trial_is_told_as_it_went(found, words, bench):
    assert bench.answer(found) == words


def test_every_trial_is_a_column_and_every_recipe_a_row(bench):
    found = {(of, r, t): {"moved": 1.0} for of in ("trl", "difftune") for r in bench.TRIED for t in bench.TRIALS}
    head, _, *rows = bench.told_trials(found).splitlines()
    assert all(words in head for words in bench.TRIALS.values())
    assert [row.split(" | ")[0] for row in rows] == [
        "| trl alignprop",
        "| trl ddpo",
        "| difftune alignprop",
        "| difftune ddpo",
    ]


def test_a_program_that_fails_ends_the_bench_with_what_it_said(bench, tmp_path, monkeypatch):
    (tmp_path / "scripts").mkdir()
    program = tmp_path / "scripts/peer_trl.py"
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    job = {"kind": "train", "folder": str(tmp_path / "run")}
    program.write_text("import sys; sys.exit('no such model')")
    with pytest.raises(SystemExit, match="train failed in TRL's environment:\nno such model"):
        bench.asked(sys.executable, job)
    program.write_text("import sys; open(sys.argv[2], 'w').write(open(sys.argv[1]).read())")
    assert bench.asked(sys.executable, job) == job


def test_a_job_has_all_that_the_other_environment_must_know(bench, tmp_path):
    job = bench.peer_job("train", "ddpo", tmp_path, bench.PEERS["trl ddpo"][1], 3)
    assert json.loads(json.dumps(job)) == job
    assert len(job["prompts"]) == 2000 and job["seed"] == 3 and job["options"]["sample_num_steps"] == bench.STEPS


def test_the_table_has_a_row_for_each_point_and_means_over_seeds(bench):
    point = {"seconds": 10.0, "forward_equivalents": 100.0, "step": 4, "folder": "x"}
    for judge in ("reward", "oracle", "vendi", "coverage", "classifier"):
        point |= {f"{judge}_before": [0.5] * 4, f"{judge}_after": [0.6, 0.7, 0.8, 0.9]}
    late = point | {"seconds": 20.0}
    said = bench.told({"trl ddpo": [{"points": [point, late]}, {"points": [point, late | {"seconds": 40.0}]}]})
    assert [row.split(" | ")[:2] for row in said.splitlines()[2:]] == [["| trl ddpo", "10"], ["| trl ddpo", "30"]]
    assert "+0.250 [" in said


def test_points_and_sizes_of_a_quick_bench_are_small(bench):
    assert bench.sizes_of(Namespace(quick=True))["points"] == 1 < bench.sizes_of(Namespace(quick=False))["points"]
