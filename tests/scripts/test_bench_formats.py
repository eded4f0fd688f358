"""scripts/bench_formats.py: a format changes the rounding alone, and the table has a row for each."""

import pytest
import torch

from tests.support import pipelines
from tests.support.benches import script


@pytest.fixture(scope="module")
def bench():
    with script("bench_formats") as module:
        yield module


@pytest.mark.parametrize("backward", [False, True], ids=["forwards", "backwards"])
def test_every_format_gives_the_same_up_to_its_rounding(bench, backward):
    for part in bench.parts(pipelines.sd(), 2).values():
        usual, *others = (run() for run in bench.runs(*part, backward).values())
        for found, tolerance in zip(others, (1e-5, 0.05, 0.05), strict=True):
            assert float((found - usual).norm() / usual.norm()) < tolerance
        assert not torch.equal(others[1], usual)  # autocast was on


@pytest.mark.slow
def test_a_row_for_each_format(bench, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "load", lambda device: pipelines.sd())
    bench.main([1], 1, str(tmp_path / "formats.jsonl"), True)
    rows = [line.split(" | ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows == ["format", *list(bench.FORMATS) * 4]
