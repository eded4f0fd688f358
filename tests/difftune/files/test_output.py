"""Whole files and folders: complete under their names, or not there."""

import os
import re
import resource
import stat

import pytest
import torch
from safetensors.torch import save_file

from difftune.errors import RunError
from difftune.files import output
from difftune.pipelines import full_weights, lora
from guidance.search import saved
from guidance.search.problem import Saved
from rewards import hub
from rewards.errors import WeightsMissing
from tests.support import pipelines


def tree(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fill(folder):
    folder.mkdir()
    (folder / "a").write_text("new")


def test_a_file_and_a_folder_take_the_place_of_earlier_ones(tmp_path):
    for text in ("old", "new"):
        output.write(tmp_path / "in" / "file", text)
        with output.whole_folder(tmp_path / "folder") as partial:
            (partial / text).write_text(text)
    assert tree(tmp_path) == {"in/file": b"new", "folder/new": b"new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_writer_that_fails_leaves_what_was_there(tmp_path, error):
    output.write(tmp_path / "file", "old")
    with output.whole_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("old")
    expected = RunError if isinstance(error, OSError) else KeyboardInterrupt
    for write in (output.whole_file, output.whole_folder):
        with pytest.raises(expected), write(tmp_path / "folder" if write is output.whole_folder else tmp_path / "file"):
            raise error
    assert tree(tmp_path) == {"file": b"old", "folder/a": b"old"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_disk_that_is_full_is_one_sentence(tmp_path):
    """Under a limit on file sizes, for every writer, that of safetensors too."""
    tensors = {"x": torch.zeros(100_000)}

    def by_safetensors():
        with output.whole_folder(tmp_path / "folder") as partial:
            save_file(tensors, partial / "x.safetensors")

    (tmp_path / "lines").write_text("{}\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        said = []
        for what in (
            lambda: output.write(tmp_path / "file", "x" * 2000),
            lambda: output.append(tmp_path / "lines", "x" * 2000),
            by_safetensors,
            lambda: hub._write(tmp_path / "record.json", b"x" * 2000),
        ):
            with pytest.raises((RunError, WeightsMissing), match=f"cannot write {tmp_path}") as error:
                what()
            said.append(str(error.value))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert all("\n" not in line for line in said)
    assert tree(tmp_path) == {"lines": b"{}\n"} and [p.name for p in tmp_path.iterdir()] == ["lines"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027, 0o002])
def test_modes_follow_the_umask_whoever_writes(tmp_path, umask):
    pipe = pipelines.sd()
    lora.add(pipe)
    before = os.umask(umask)
    try:
        output.write(tmp_path / "file", "x")
        lora.save(pipe, tmp_path / "lora")
        full_weights.save(pipe, tmp_path / "full", {})
        saved.save(tmp_path / "search.safetensors", Saved({"x": torch.zeros(1)}, {}))
        hub._write(tmp_path / "record.json", b"{}")
        with output.whole_folder(tmp_path / "folder") as partial:
            save_file({"x": torch.zeros(1)}, partial / "x.safetensors")
    finally:
        os.umask(before)
    modes = {p.relative_to(tmp_path).as_posix(): stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert len(modes) == 11
    assert {name for name, mode in modes.items() if mode not in (0o666 & ~umask, 0o777 & ~umask)} == set()


def test_sweep_clears_up_what_killed_writers_left_and_nothing_else(tmp_path):
    partial, again = output.beside(tmp_path / "a"), output.beside(tmp_path / "b")
    fill(partial)
    again.write_text("half")
    fill(output.beside(tmp_path / "gone", output.OLD))  # killed between the two renames
    fill(output.beside(tmp_path / "kept", output.OLD))  # and after them
    fill(tmp_path / "kept")
    for name in (".a.partial", ".a.1234567.partial", ".a.1234567G.partial", "a.12345678.partial", ".hidden"):
        (tmp_path / name).write_text("mine")
    output.sweep(tmp_path)
    output.sweep(tmp_path / "nowhere")
    names = {".a.partial", ".a.1234567.partial", ".a.1234567G.partial", "a.12345678.partial", ".hidden"}
    assert tree(tmp_path).keys() == {"gone/a", "kept/a", *names}


def test_every_writer_uses_names_that_a_sweep_knows(tmp_path, monkeypatch):
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(os.fspath(a)), replace(a, b)))
    pipe = pipelines.sd()
    lora.add(pipe)
    output.write(tmp_path / "file", "x")
    lora.save(pipe, tmp_path)
    saved.save(tmp_path / "search.safetensors", Saved({"x": torch.zeros(1)}, {}))
    parts = [re.search(r"\.[^/]*\.partial", path)[0] for path in seen]
    assert len(parts) == 3 and all(output.TEMPORARY.fullmatch(part) for part in parts)
