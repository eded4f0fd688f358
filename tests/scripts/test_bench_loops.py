"""scripts/bench_loops.py: what is compared does the same, and the table has a row for each."""

import pytest
import torch

from rewards.simple import Brightness
from solvers.latent import LatentModel
from tests.support import pipelines
from tests.support.benches import script


@pytest.fixture(scope="module")
def bench():
    with script("benching"), script("bench_loops") as module:
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


class Counted:
    """Brightness, which counts the images that it scores and those that it differentiates."""

    differentiable = True

    def __init__(self):
        self.images = self.differentiated = 0

    def __call__(self, images, prompts):
        self.images += len(images)
        self.differentiated += len(images) * images.requires_grad
        return Brightness()(images, prompts)


def test_the_loop_of_renos_authors_finds_the_image_that_ours_finds_by_the_same_work(bench, monkeypatch):
    pipe = pipelines.sd(scheduler=pipelines.ddim(set_alpha_to_one=True))  # its step ends in clean latents
    reward, loaded = Counted(), []
    start = LatentModel(pipe).noise(1, torch.Generator().manual_seed(0))
    monkeypatch.setattr(LatentModel, "noise", lambda model, *args: start.clone())
    monkeypatch.setattr(bench, "load", lambda name: loaded.append(name) or reward)
    found, work = {}, {}
    for name, run in bench.reno(pipe, 1, 3).items():
        reward.images = reward.differentiated = 0
        found[name], work[name] = run(), (reward.images, reward.differentiated)
    assert torch.allclose(found["authors"], found[bench.PER_IMAGE], atol=1e-5)
    assert work == {"authors": (3, 2), bench.PER_IMAGE: (3, 2)} and loaded == ["tiny-clip"]


def test_what_is_said_per_image_is_divided_by_the_images(bench):
    seconds = {"authors": [2.0, 4.0], bench.PER_IMAGE: [8.0, 4.0]}
    assert bench.per_image(seconds, 8) == {"authors": [2.0, 4.0], bench.PER_IMAGE: [1.0, 0.5]}


def test_each_part_runs_and_is_told_with_its_interval(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.models, "load", lambda name: pipelines.sd())
    monkeypatch.setattr(bench, "load", lambda name: Brightness())
    file = tmp_path / "loops.jsonl"
    for _ in range(2):  # the second time it is read
        bench.main([], [1], 1, str(file), True)
    rows = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = ["stock", "attach", "own loop", "no gradient", "hand loop", "rollout(checkpoint)"]
    names += ["rollout(checkpoint) / hand loop", "authors", bench.PER_IMAGE]
    assert [row[2] for row in rows] == 2 * ["run", *names]
    assert len(file.read_text().splitlines()) == 5  # three lines, and an empty one between


def test_other_steps_and_other_weights_are_measured_anew(bench, tmp_path, monkeypatch):
    made, row = [], {"seconds": {"authors": [1.0]}, "ratios": {}}
    monkeypatch.setattr(bench, "measured", lambda part, batch, rounds, steps: made.append(steps) or row)
    for small in (True, True, False):
        bench.main(["reno"], [1], 1, str(tmp_path / "loops.jsonl"), small)
    monkeypatch.setattr(bench, "weights", lambda *names: "others")
    bench.main(["reno"], [1], 1, str(tmp_path / "loops.jsonl"), False)
    assert made == [2, 10, 10]
