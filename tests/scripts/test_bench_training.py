"""scripts/bench_training.py on the embedded model: every row is there, and nothing stays replaced."""

import pytest

from difftune.pipelines import engine
from tests.support.benches import script


@pytest.fixture(scope="module")
def bench():
    with script("bench_training") as module:
        yield module


@pytest.mark.slow
@pytest.mark.sampled(2)
def test_a_row_for_a_recipe_with_and_without_block_checkpointing(bench, capsys):
    usual = engine.verdict
    bench.measure(["alignprop"], steps=1, small=True)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[:3] for row in rows] == [
        ["alignprop", "sdpa", "no"],
        ["alignprop", "sdpa", "yes"],
    ]
    assert all(float(row[3]) > 0 for row in rows) and engine.verdict is usual
