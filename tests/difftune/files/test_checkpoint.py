"""Checkpoints: whole or not taken for one."""

import json
import random

import numpy as np
import pytest
import torch

from difftune.errors import RunError, UserError
from difftune.files import checkpoint, records
from difftune.files.checkpoint import State
from difftune.files.output import beside, sweep


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


def deep_manifest(path):
    (path / checkpoint.MANIFEST).write_text("[" * 100_000)


def empty_manifest(path):
    (path / checkpoint.MANIFEST).write_text("{}")


def edited_below(path):
    (path / "unet" / "more.txt").write_text("y")


def missing_file(path):
    (path / checkpoint.INFO).unlink()


HARMS = [
    cut_short,
    one_bit,
    edited,
    edited_below,
    no_manifest,
    odd_manifest,
    deep_manifest,
    empty_manifest,
    missing_file,
]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path, harm):
    def more(folder):
        (folder / "unet").mkdir()
        (folder / "unet" / "more.txt").write_text("x")

    checkpoint.save(tmp_path, state(1))
    harm(checkpoint.save(tmp_path, state(2), also=more))
    with pytest.raises(RunError, match="checkpoint-2 cannot be resumed from"):
        checkpoint.load(tmp_path / "checkpoint-2")
    with pytest.warns(UserWarning, match="checkpoint-2 was set aside as checkpoint-2.damaged"):
        assert checkpoint.latest(tmp_path).name == "checkpoint-1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2.damaged"]


def test_tensors_lie_in_memory_as_they_did(tmp_path):
    """The rounding of a dot product depends on that: a resumed run would write other metrics."""
    vectors = {f"v{i}": torch.randn(1003 + i) for i in range(8)}
    loaded = checkpoint.load(checkpoint.save(tmp_path, State(1, vectors, {})))
    assert all(vector.data_ptr() % 64 == 0 for vector in (*vectors.values(), *loaded.tensors.values()))
    assert all(loaded.tensors[k].dot(vectors[k]) == vectors[k].dot(vectors[k]) for k in vectors)


EDITED = {
    "[1]": "TypeError",
    "[" * 100_000: "RecursionError",
    "{": "JSONDecodeError",
    "{}": "its step is None",
    '{"step": "3"}': "its step is '3'",
    '{"step": true}': "its step is True",
    '{"step": -1}': "its step is -1",
    '{"step": 3}': "it lacks 'config'",
}


@pytest.mark.parametrize("text", EDITED)
def test_an_edited_checkpoint_with_a_manifest_to_match_is_one_sentence(tmp_path, text):
    path = checkpoint.save(tmp_path, state(3))
    (path / checkpoint.INFO).write_text(text)
    hashes = {name: checkpoint.digest(path / name) for name in (checkpoint.INFO, checkpoint.TENSORS)}
    (path / checkpoint.MANIFEST).write_text(json.dumps(hashes))
    with pytest.raises(RunError, match=f"checkpoint-3 cannot be resumed from: {EDITED[text]}"):
        checkpoint.load(path).info["config"]


@pytest.mark.parametrize("name", ["checkpoint-" + "9" * 240, "checkpoint-٣", "checkpoint-3.damaged", "checkpoint-"])
def test_what_we_never_name_so_is_no_checkpoint(tmp_path, name):
    (tmp_path / name).mkdir()
    checkpoint.save(tmp_path, state(1), limit=1)
    assert checkpoint.latest(tmp_path).name == "checkpoint-1" and (tmp_path / name).is_dir()


def test_one_that_was_never_finished_is_no_checkpoint(tmp_path):
    partial = beside(tmp_path / "checkpoint-5")
    partial.mkdir()
    (partial / checkpoint.TENSORS).write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, state(5))
    assert checkpoint.load(tmp_path / "checkpoint-5").step == 5
    checkpoint.save(tmp_path, State(5, {"lora.a": torch.ones(1)}, {}))  # again, as after a resumption from before it
    assert checkpoint.load(tmp_path / "checkpoint-5").tensors.keys() == {"lora.a"}
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("limit", [1, 2])
def test_damaged_checkpoints_neither_count_nor_displace_whole_ones(tmp_path, limit):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step))
    for step in (2, 3):
        one_bit(tmp_path / f"checkpoint-{step}")
    said = []
    checkpoint.sort_out(tmp_path, said.append)
    assert len(said) == 2 and checkpoint.resumed(tmp_path, "latest").step == 1
    assert names(tmp_path) == ["checkpoint-1"]
    checkpoint.save(tmp_path, state(2), limit)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"][-limit:]
    assert all(not checkpoint.defect(path) for path in checkpoint.checkpoints(tmp_path))
    assert sorted(p.name for p in tmp_path.glob("*.damaged")) == ["checkpoint-2.damaged", "checkpoint-3.damaged"]


def test_the_one_just_written_is_never_removed(tmp_path):
    for step in (2, 4, 6):
        checkpoint.save(tmp_path, state(step))
    assert checkpoint.resumed(tmp_path, str(tmp_path / "checkpoint-2")).step == 2
    checkpoint.save(tmp_path, state(3), limit=1)
    assert names(tmp_path) == ["checkpoint-3"]


def test_writing_that_fails_leaves_the_last_one(tmp_path):
    def full(folder):
        raise OSError("no space left")

    checkpoint.save(tmp_path, state(1))
    with pytest.raises(RunError, match="cannot write .*checkpoint-2: no space left"):
        checkpoint.save(tmp_path, state(2), limit=1, also=full)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


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


BAD_LINES = ["", "   ", '{"step": 4, "lo', "7", "null", "[]", '{"loss": 1}', '{"step": "4"}', "[" * 100_000, "\x00"]


@pytest.mark.parametrize("bad", [*(line.encode() for line in BAD_LINES), b"\xff\xfe", b'{"step": 2, "text": "\xff"}'])
def test_metrics_are_rewound_to_a_step_whatever_stands_between_them(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    records.rewind(path, 0)
    assert not path.exists()
    good = [{"step": step, "loss": step / 3} for step in (1, 2, 3)]
    for record in good:
        records.append(path, record)
        with path.open("ab") as file:
            file.write(bad + b"\n")
    with path.open("ab") as file:
        file.write(b'{"step": 4, "lo')
    assert list(records.records(path)) == good
    records.rewind(path, 2)
    records.append(path, good[2])
    assert path.read_text() == "".join(json.dumps(record) + "\n" for record in good)
