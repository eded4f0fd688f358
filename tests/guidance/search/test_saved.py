"""Searches on disk: what is written is read, and the file is whole whatever happens to its writer."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from guidance import files
from guidance.search import saved
from guidance.search.problem import Saved

FIRST = Saved({"x": torch.arange(6.0).view(2, 3), "n": torch.tensor([3])}, {"spent": [1, 2], "best": None})
SECOND = Saved({"x": torch.zeros(4, dtype=torch.float64)}, {"spent": [5, 6]})


def same(a: Saved, b: Saved) -> bool:
    tensors = a.tensors.keys() == b.tensors.keys() and all(a.tensors[k].equal(b.tensors[k]) for k in a.tensors)
    return tensors and a.info == b.info


def test_what_is_saved_is_loaded_and_the_last_one_wins(tmp_path):
    file = tmp_path / "new" / "search.safetensors"
    for written in (FIRST, SECOND):
        saved.save(file, written)
        assert same(saved.load(file), written)
    assert [f.name for f in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("broken", ["dumps", "fsync", "replace"])
def test_a_writer_that_dies_leaves_the_last_whole_file(tmp_path, monkeypatch, broken):
    file = tmp_path / "search.safetensors"
    saved.save(file, FIRST)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    where = saved.json if broken == "dumps" else files.os
    monkeypatch.setattr(where, broken, die)
    with pytest.raises(KeyboardInterrupt):
        saved.save(file, SECOND)
    monkeypatch.undo()
    assert same(saved.load(file), FIRST)
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_the_file_is_never_seen_half_written(tmp_path, monkeypatch):
    """Nothing is written under the name itself: it changes by a rename, once the bytes are on the disk."""
    file, order = tmp_path / "search.safetensors", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (order.append("fsync"), fsync(handle))[1])

    def moved(temporary, target):
        assert same(saved.load(temporary), FIRST) and not file.exists()
        order.append("replace")
        replace(temporary, target)

    monkeypatch.setattr(files.os, "replace", moved)
    saved.save(file, FIRST)
    assert order[:2] == ["fsync", "replace"] and order.count("replace") == 1


def test_anything_else_is_refused_in_one_sentence(tmp_path):
    file = tmp_path / "search.safetensors"
    with pytest.raises(ValueError, match="is not a saved search"):
        saved.load(file)
    saved.save(file, FIRST)
    whole = file.read_bytes()
    for data in (b"", b"not a tree", whole[: len(whole) // 2], whole[:-1]):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="is not a saved search"):
            saved.load(file)
    save_file({"x": torch.zeros(1)}, file, {"about": json.dumps({})})
    with pytest.raises(ValueError, match="its format is None"):
        saved.load(file)
