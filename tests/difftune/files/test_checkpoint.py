"""Checkpoints: whole or not taken for one."""

import json
import random

import numpy as np
import pytest
import torch

from difftune.errors import RunError, UserError
from difftune.files import checkpoint, records
from difftune.files.checkpoint import State


def state(step: int) -> State:
    return State(
        step, {"lora.a": torch.full((3,), step / 7), "adam.step": torch.tensor(float(step))}, {"cursor": 4 * step}
    )


def names(folder) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(folder)]


def test_round_trip_is_exact(tmp_path):
    def more(folder):
        (folder / "unet").mkdir()
        for name in ("more.txt", "unet/more.txt"):
            (folder / name).write_text("x")

    path = checkpoint.save(tmp_path, state(3), also=more)
    loaded = checkpoint.load(path)
    assert (loaded.step, loaded.info) == (3, {"cursor": 12})
    assert all(torch.equal(loaded.tensors[k], v) for k, v in state(3).tensors.items())
    assert {"more.txt", "unet/more.txt"} < json.loads((path / checkpoint.MANIFEST).read_text()).keys()
    assert not [p for p in path.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".pkl")]


@pytest.mark.parametrize(("limit", "kept"), [(1, [100]), (2, [10, 100]), (None, [9, 10, 100])])
def test_oldest_are_removed_in_order_of_number(tmp_path, limit, kept):
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, state(step), limit)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]
    assert checkpoint.latest(tmp_path).name == "checkpoint-100"


def cut_short(path):
    (path / checkpoint.TENSORS).write_bytes((path / checkpoint.TENSORS).read_bytes()[:-1])


def one_bit(path):
    data = bytearray((path / checkpoint.TENSORS).read_bytes())
    data[-1] ^= 1
    (path / checkpoint.TENSORS).write_bytes(data)


def edited(path):
    (path / checkpoint.INFO).write_text("{}")


def no_manifest(path):
    (path / checkpoint.MANIFEST).unlink()


def odd_manifest(path):
    (path / checkpoint.MANIFEST).write_text("[]")


def empty_manifest(path):
    (path / checkpoint.MANIFEST).write_text("{}")


def edited_below(path):
    (path / "unet" / "more.txt").write_text("y")


def missing_file(path):
    (path / checkpoint.INFO).unlink()


HARMS = [cut_short, one_bit, edited, edited_below, no_manifest, odd_manifest, empty_manifest, missing_file]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path, harm):
    def more(folder):
        (folder / "unet").mkdir()
        (folder / "unet" / "more.txt").write_text("x")

    checkpoint.save(tmp_path, state(1))
    harm(checkpoint.save(tmp_path, state(2), also=more))
    with pytest.warns(UserWarning, match="checkpoint-2 was skipped"):
        assert checkpoint.latest(tmp_path).name == "checkpoint-1"
    with pytest.raises(RunError, match="checkpoint-2 cannot be resumed from"):
        checkpoint.load(tmp_path / "checkpoint-2")


def test_one_that_was_never_finished_is_skipped_and_replaced(tmp_path):
    partial = tmp_path / "checkpoint-5.tmp"
    partial.mkdir()
    (partial / checkpoint.TENSORS).write_bytes(b"half")
    said = []
    assert checkpoint.latest(tmp_path, said.append) is None
    assert said == [f"{partial} was skipped: it was never finished"]
    checkpoint.save(tmp_path, state(5))
    assert checkpoint.load(tmp_path / "checkpoint-5").step == 5
    checkpoint.save(tmp_path, State(5, {"lora.a": torch.ones(1)}, {}))  # again, as after a resumption from before it
    assert checkpoint.load(tmp_path / "checkpoint-5").tensors.keys() == {"lora.a"}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_writing_that_fails_leaves_the_last_one(tmp_path):
    def full(folder):
        raise OSError("no space left")

    checkpoint.save(tmp_path, state(1))
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path, state(2), limit=1, also=full)
    assert names(tmp_path) == ["checkpoint-1"]


def test_resumption_by_name(tmp_path):
    assert checkpoint.resumed(tmp_path, None) is None
    assert checkpoint.resumed(tmp_path, "latest") is None
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.resumed(tmp_path, str(tmp_path / "checkpoint-9"))
    path = checkpoint.save(tmp_path, state(1))
    assert checkpoint.resumed(tmp_path, "latest").step == checkpoint.resumed("/nowhere", str(path)).step == 1


def test_randomness_goes_through_a_file(tmp_path):
    kept = checkpoint.randomness()
    path = checkpoint.save(tmp_path, State(0, kept.tensors, {"rng": kept.info}))
    draws = [(torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn())]
    loaded = checkpoint.load(path)
    checkpoint.restore(checkpoint.Randomness(dict(loaded.tensors), loaded.info["rng"]))
    draws += [(torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn())]
    assert draws[0] == draws[1]


def test_metrics_are_rewound_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records.rewind(path, 0)
    assert not path.exists()
    for step in (1, 2, 3):
        records.append(path, {"step": step, "loss": step / 3})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    records.rewind(path, 2)
    assert list(records.records(path)) == [{"step": step, "loss": step / 3} for step in (1, 2)]
    with pytest.raises(ValueError, match="JSON"):
        records.append(path, {"step": 3, "loss": float("nan")})
    assert len(list(records.records(path))) == 2
