"""scripts/bench_surrogates.py on the embedded flow model: a row for each mode, with its cost."""

import pytest

from tests.support.benches import script


@pytest.fixture(scope="module")
def bench():
    with script("bench_surrogates") as module:
        yield module


@pytest.mark.slow
def test_every_mode_has_a_row(bench, capsys):
    bench.measure(batches=1, size=1, draws=1)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 7 and rows[2].startswith("| draft, K = 3 | 19 |")


def test_forwards_of_an_image(bench):
    modes = ("truncated:3", "truncated:4:refl", "truncated:0,2,0.3:leap")
    assert [bench.forwards(mode) for mode in modes] == [19, 9, 16]
