"""A folder belongs to one run at a time."""

import json
import os
import subprocess
import sys

import pytest

from difftune.errors import UserError
from difftune.files.claim import LOCK, claimed, fresh
from difftune.files.output import beside
from tests.support.crashes import crashing, killed_at, tree

FILES = [("a.png", b"a"), ("b.png", b"b"), ("all.json", b"{}")]


def write_all(folder):
    with fresh(folder) as claim:
        claim.results(FILES)


def test_a_folder_is_made_locked_and_let_go(tmp_path):
    folder = tmp_path / "a" / "b"
    with fresh(folder) as claim:
        assert (folder / LOCK).exists() and claim.held() == []
        claim.results(FILES)
    assert tree(tmp_path) == {"a": None, "a/b": None, **{f"a/b/{name}": data for name, data in FILES}}
    with pytest.raises(UserError, match=r"holds another run \(a.png\)"), fresh(folder):
        pass
    assert len(tree(folder)) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(143), ValueError("no")])
@pytest.mark.parametrize("there", [True, False])
def test_a_run_that_fails_leaves_nothing(tmp_path, error, there):
    folder = tmp_path / "a" / "b"
    if there:
        folder.mkdir(parents=True)
    with pytest.raises(type(error) if isinstance(error, BaseException) else error), fresh(folder) as claim:
        claim.results(FILES)
        raise error
    assert tree(tmp_path) == ({"a": None, "a/b": None} if there else {})


def test_what_is_worth_keeping_is_kept(tmp_path):
    with pytest.raises(ValueError, match="later"), claimed(tmp_path) as claim:
        claim.write("metrics", "1")
        claim.keep()
        claim.write("half", "2")
        raise ValueError("later")
    assert tree(tmp_path) == {"metrics": b"1"}


HOLDS = """
import sys
from difftune.files.claim import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_which_holds_it(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"is in use by process {first.pid}: wait, or choose another") as error:
        write_all(tmp_path)
    assert error.value.exit_code == 2
    first.kill()
    first.wait()
    assert list(tree(tmp_path)) == [LOCK]
    write_all(tmp_path)
    assert tree(tmp_path).keys() == {name for name, _ in FILES}


BAD = ["", " ", "\0", "\ud800", "x" * 300, "file", "file/in", "closed/in", "/proc/nothing", "/dev/null", "/dev/full/x"]


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_cannot_be_is_one_sentence(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if name.startswith("closed") and os.access(closed, os.W_OK):
        pytest.skip("root may write anywhere")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"--output_dir|is a file") as error, fresh(name):
        pass
    assert "\n" not in str(error.value) and str(error.value).isprintable() and tree(tmp_path) == before


def test_killed_at_any_operation_the_command_runs_again_to_the_same_files(tmp_path):
    with crashing(tmp_path) as whole:
        write_all(tmp_path / "whole")
    for k in range(len(whole.seen)):
        folder = tmp_path / str(k)
        folder.mkdir()
        assert killed_at(folder, k, lambda folder=folder: write_all(folder / "out")), whole.seen[k]
        write_all(folder / "out")
        assert tree(folder / "out") == dict(FILES), whole.seen[k]
    assert len(whole.seen) > 25


def test_what_is_not_the_runs_stays_and_a_torn_lock_says_nothing(tmp_path):
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "a.png").write_text("half")
    (tmp_path / "b.png").write_text("mine")
    told = [json.dumps({"pid": 1}), json.dumps({"writes": ["a.png", "../x", "/etc", 7]}), '{"writes": ["b.p']
    (tmp_path / LOCK).write_text("\n".join(told))
    beside(tmp_path / "c.png").mkdir()
    with pytest.raises(UserError, match=r"holds another run \(b.png\)"), fresh(tmp_path):
        pass
    assert tree(tmp_path) == {"notes": b"mine", "b.png": b"mine"}
