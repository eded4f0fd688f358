"""scripts/benching.py: rounds are paired, a measurement is made once, an interval holds the median."""

import random
from itertools import count

import pytest

from tests.support.benches import script


@pytest.fixture(scope="module")
def benching():
    with script("benching") as module:
        yield module


def test_every_round_has_every_run_once_in_an_order_of_its_own(benching):
    seen = []
    found = benching.paired({name: lambda name=name: seen.append(name) for name in "abc"}, 20)
    rounds = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert len(rounds) == 21 and all(sorted(r) == list("abc") for r in rounds)
    assert len({tuple(r) for r in rounds}) == 6
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 20, "b": 20, "c": 20}


def test_a_drift_of_the_machine_leaves_the_ratio(benching, monkeypatch):
    drift = count(1)
    monkeypatch.setattr(benching, "seconds_of", lambda run: run() * (1 + next(drift) / 100))
    seconds = benching.paired({"slow": lambda: 3.0, "fast": lambda: 2.0}, 40)
    assert benching.ratios(seconds, "fast")["slow"].median == pytest.approx(1.5, abs=0.02)


def test_the_interval_holds_the_median_as_often_as_it_says(benching):
    draw = random.Random(0)
    for n in (6, 15, 30):
        hits = 0
        for _ in range(2000):
            found = benching.spread([draw.expovariate(1.0) for _ in range(n)])
            hits += found.low <= 0.6931 <= found.high
            assert found.q1 <= found.median <= found.q3
        assert 0.945 <= hits / 2000 <= 0.985, n
    assert benching.spread([2.0])[:3] == (2.0, 2.0, 2.0)
    assert "[" not in str(benching.spread([1.0, 2.0, 3.0]))


def test_what_stands_in_the_file_is_not_measured_again(benching, tmp_path):
    store, made = benching.Store(tmp_path / "deep" / "bench.jsonl"), []
    measure = lambda n: lambda: made.append(n) or {"value": n}  # noqa: E731
    assert [store.measured(str(n), measure(n)) for n in (1, 2, 1)] == [{"value": 1}, {"value": 2}, {"value": 1}]
    with store.file.open("a") as out:
        out.write('{"key": "3", "val')  # killed while it wrote
    assert store.measured("3", measure(3)) == store.read()["3"] == {"value": 3}
    assert made == [1, 2, 3] and list(store.read()) == ["1", "2", "3"]


def test_a_table_is_markdown(benching):
    assert benching.table(["a", "b"], [[1, "x"]]).splitlines() == ["| a | b |", "|---|---|", "| 1 | x |"]
    assert "torch" in benching.hardware()
