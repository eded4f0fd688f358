"""The searches' bench: a file that is gone on with run by run, and how it is read, without a network."""

import json
from argparse import Namespace

import pytest

from tests.support.benches import script

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def bench():
    with script("bench_search") as module:
        yield module


def asked(**options) -> Namespace:
    given = {"methods": ["best-of-n", "fk", "dts-star"], "rewards": ["tiny-clip"], "seeds": [0, 1]}
    return Namespace(**given | {"budgets": [20, 40], "calls": []} | options)


def points(run) -> list:
    """A sample for each 10 evaluations, each better by 0.1; dts-star's by 0.2."""
    gain = 0.2 if run.method == "dts-star" else 0.1
    return [[(10 * n, n, round(gain * n, 6), 1.0) for n in range(1, run.nfe // 10 + 1)] for _ in PROMPTS]


@pytest.fixture
def runs_made(bench, monkeypatch):
    made = []
    fake = lambda run, *args: made.append(run) or {"seconds": 0.0, "points": points(run)}  # noqa: E731
    monkeypatch.setattr(bench, "measured", fake)
    return made


def test_a_stopped_bench_measures_what_is_missing_and_nothing_twice(bench, runs_made, tmp_path):
    file, plan, setting = tmp_path / "bench.jsonl", bench.planned(asked()), bench.Setting()
    assert len(plan) == len(set(plan)) == 2 * (1 + 2 + 1)
    whole = bench.measure_all(plan, PROMPTS, setting, file)
    assert runs_made == plan
    lines = [line for line in file.read_text().splitlines() if line]
    file.write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])  # killed while it wrote
    runs_made.clear()
    again = bench.measure_all(plan, PROMPTS, setting, file)
    assert json.dumps([*again.values()]) == json.dumps([*whole.values()])
    assert runs_made == plan[3:]
    runs_made.clear()
    bench.measure_all(plan, PROMPTS, setting, file)
    assert not runs_made
    bench.measure_all(plan[:1], PROMPTS, setting._replace(widening=2.0), file)
    assert runs_made == plan[:1]


def test_what_other_weights_gave_is_measured_again(bench, runs_made, tmp_path, monkeypatch):
    plan = bench.planned(asked(seeds=[0], methods=["fk"]))
    bench.measure_all(plan, PROMPTS, bench.Setting(), tmp_path / "bench.jsonl")
    monkeypatch.setattr(bench, "weights", lambda: "others")
    bench.measure_all(plan, PROMPTS, bench.Setting(), tmp_path / "bench.jsonl")
    assert runs_made == 2 * plan


def test_rows_hold_the_best_that_was_paid_for(bench, runs_made, tmp_path):
    args, setting = asked(), bench.Setting()
    found = bench.measure_all(bench.planned(args), PROMPTS, setting, tmp_path / "bench.jsonl")
    reader = bench.Reader(found, args.seeds, {"nfe": args.budgets, "calls": args.calls}, setting)
    assert [bench.mean_at(reader, "best-of-n", "tiny-clip", n) for n in (20, 39, 40)] == pytest.approx([0.2, 0.3, 0.4])
    assert bench.mean_at(reader, "cfg", "tiny-clip", 40) == pytest.approx(0.25)
    assert "dts-star reaches best-of-n's 0.4000 at 40 NFE after 20: 2.00 times fewer" in bench.verdict(
        reader, "tiny-clip"
    )
    assert bench.mean_at(reader, "dts-star", "tiny-clip", 9) is None
