"""scripts/bench_surrogates.py on the embedded flow model: a row for each mode, with its cost."""

import pytest

from tests.support.benches import script

bench = script("bench_surrogates")


@pytest.mark.slow
def test_every_mode_has_a_row(capsys):
    bench.measure(batches=1, size=1, draws=1)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 7 and rows[2].startswith("| draft, K = 3 | 19 |")


def test_forwards_of_an_image():
    assert [bench.forwards(mode) for mode in ("truncated:3", "truncated:4:refl", "truncated:0,2,0.3:leap")] == [
        19,
        9,
        16,
    ]
