"""scripts/bench_loops.py: what is compared does the same, and the table has a row for each."""

import pytest
import torch

from difftune.reno.optimizer import ReNO
from solvers.latent import LatentModel
from tests.support import pipelines
from tests.support.benches import script


@pytest.fixture(scope="module")
def bench():
    with script("bench_loops") as module:
        yield module


def test_the_hand_written_loop_takes_the_gradient_that_rollout_takes(bench, monkeypatch):
    pipe, found = pipelines.sd(), {}
    start = LatentModel(pipe).noise(2, torch.Generator().manual_seed(0))
    monkeypatch.setattr(LatentModel, "noise", lambda model, *args: start)
    runs = bench.gradients(pipe, 2, 3)
    for name in ("hand loop", "rollout(checkpoint)"):
        clone = start.clone()
        monkeypatch.setattr(start, "clone", lambda clone=clone: clone, raising=False)
        runs[name]()
        found[name] = clone.grad
    assert torch.allclose(found["hand loop"], found["rollout(checkpoint)"], rtol=1e-4, atol=1e-6)


def test_each_part_runs_and_is_told_with_its_interval(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.models, "load", lambda name: pipelines.sd())
    monkeypatch.setattr(bench, "load", lambda name: lambda images, prompts: images.mean((1, 2, 3)))
    monkeypatch.setattr(bench, "ReNO", lambda pipe, rewards, **more: ReNO(pipe, {"brightness": 1.0}, **more))
    for _ in range(2):  # the second time it is read
        bench.main([], [1], 1, str(tmp_path / "loops.jsonl"), True)
    rows = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = ["stock", "attach", "own loop", "no gradient", "hand loop", "rollout(checkpoint)"]
    names += ["rollout(checkpoint) / hand loop", "authors", "ours"]
    assert [row[2] for row in rows] == 2 * ["run", *names]
    assert len((tmp_path / "loops.jsonl").read_text().splitlines()) == 5  # three lines, and an empty one between
