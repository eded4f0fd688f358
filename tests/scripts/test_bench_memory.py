"""scripts/bench_memory.py: tensors without contents weigh what those with contents do."""

import pytest

from tests.support.benches import script


@pytest.fixture(scope="module")
def bench():
    with script("bench_memory") as module:
        yield module


@pytest.mark.slow
@pytest.mark.timeout(1800)  # fake tensors are dispatched by Python
def test_the_bytes_without_contents_are_those_of_a_real_step(bench):
    pipe = bench.sd15("cpu", small=True)
    with bench.session_of(pipe) as session:
        bench.take(session, 2, 2)  # the texts are kept from here on
        real = [bench.peak_of(lambda: bench.take(session, 2, 1)), bench.peak_of(lambda: bench.judge(session, 2))]
        bench.forget(pipe)
        found = [bench.peak_of(lambda: bench.take(session, 2, 1)), bench.peak_of(lambda: bench.judge(session, 2))]
    assert found == pytest.approx(real, rel=0.02)  # gradients of weights without contents are added out of place


@pytest.mark.slow
@pytest.mark.timeout(1800)  # fake tensors are dispatched by Python
def test_a_row_for_each_way(bench, capsys):
    bench.main(2, small=True)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    whole, single, blocks, one, eight = (float(size) for _, size in lines[1:])
    assert single < whole and blocks < whole and eight < 1.2 * one
