"""Work that is divided among processes: in threads that stand for them, and two real ones under `accelerate launch`."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from difftune.cli.program import cli
from difftune.errors import RunError, UserError
from difftune.files.claim import fresh
from difftune.pipelines import shared
from difftune.pipelines.shared import claimed_by_main, done_by_all, made_by_main, own_share
from tests.support import pipelines

HERE = threading.local()


class Group:
    """Threads that gather as processes do."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch):
        self.size, self.barrier, self.values = size, threading.Barrier(size), [None] * size
        monkeypatch.setattr(shared, "gathered", self.gathered)
        monkeypatch.setattr(shared, "process", self.process)

    def process(self):
        index = HERE.index
        return SimpleNamespace(num_processes=self.size, process_index=index, is_main_process=index == 0, device="cpu")

    def gathered(self, value):
        self.values[HERE.index] = value
        self.barrier.wait(60)
        found = list(self.values)
        self.barrier.wait(60)
        return found

    def run(self, work):
        """What each gives, or its error."""
        found = [None] * self.size

        def one(index):
            HERE.index = index
            try:
                found[index] = work(index)
            except Exception as error:
                found[index] = error

        threads = [threading.Thread(target=one, args=(i,)) for i in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found


class Pair(NamedTuple):
    x: torch.Tensor
    n: int


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_each_job_is_done_once_and_all_have_all_results_in_order(size, count, monkeypatch):
    done = []

    def job(i):
        done.append((HERE.index, i))
        return Pair(torch.tensor([i]), i)

    found = Group(size, monkeypatch).run(lambda _: done_by_all([lambda i=i: job(i) for i in range(count)]))
    assert found == [[Pair(torch.tensor([i]), i) for i in range(count)]] * size
    assert sorted(done, key=lambda pair: pair[1]) == [(i % size, i) for i in range(count)]


def test_an_error_of_one_is_raised_in_all(monkeypatch):
    def work(error):
        def failing():
            raise error

        return lambda _: done_by_all([lambda: 0, failing])

    group = Group(2, monkeypatch)
    assert [str(e) for e in group.run(work(UserError("no")))] == ["no", "no"]
    theirs, own = group.run(work(ZeroDivisionError("a by 0")))
    assert isinstance(theirs, RunError) and "failed with ZeroDivisionError: a by 0" in str(theirs)
    assert isinstance(own, ZeroDivisionError)


def test_the_main_process_alone_claims_and_makes(monkeypatch, tmp_path):
    group, made = Group(2, monkeypatch), []

    def work(index):
        with claimed_by_main(tmp_path / "out", fresh) as claim:
            value = made_by_main(lambda: made.append(index) or 7)
            share = own_share(range(5))
            if claim is not None:
                claim.results([("a.txt", "a")])
        return claim is not None, value, share

    assert group.run(work) == [(True, 7, [0, 2, 4]), (False, 7, [1, 3])] and made == [0]
    held = group.run(work)  # the folder holds a run now
    assert all(isinstance(e, UserError) and "holds another run" in str(e) for e in held)


# ------------------------------------------------------------------------------------------------ two processes
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=29751"]
SCRIPT = """
import json, os, sys
from difftune.cli.program import cli
for words in json.loads(sys.argv[1]):
    cli(words, standalone_mode=False)
from difftune.processes import process
print("ran as", process().process_index, "of", process().num_processes, file=sys.stderr)
"""
DYING = """
import os, sys
from difftune.cli.program import main
from difftune.pipelines import generate
stock = generate._batch
def dying(*arguments):
    if os.environ["RANK"] == "1":
        os._exit(3)
    return stock(*arguments)
generate._batch = dying
main()
"""


def launched(tmp_path, script, *arguments):
    (tmp_path / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *LAUNCH, str(tmp_path / "script.py"), *arguments]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def model(tmp_path):
    pipelines.sd().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def commands(model, folder):
    """Each with more batches than processes, and one that is not full."""
    captions = Path(model).parent / "captions.txt"
    captions.write_text("a red circle\na blue square\na red square\n")
    judged = ["--prompts", str(captions), "--reward", "brightness", "--images_per_prompt", "1", "--batch_size", "1"]
    prompts = ["--prompt", "red circle", "blue square", "red square", "--model", model, "--steps", "2"]
    out = [["--output_dir", f"{folder}/{name}"] for name in ("sample", "compare", "optimize", "search", "eval")]
    return [
        ["sample", *prompts, "--batch_size", "2", *out[0]],
        ["compare", *prompts, "--num_images", "1", "--batch_size", "2", "--scales", "2", "3", *out[1]],
        ["optimize", *prompts, "--reward", "brightness", "--batch_size", "1", "--iterations", "2", *out[2]],
        ["search", "fk", *prompts, "--reward", "brightness", "--nfe_budget", "8", *out[3]],
        ["eval", "--model", model, "--steps", "2", *judged, *out[4]],
    ]


OTHERS = ("seconds", "settings", "versions", "pictures")  # times and places


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in OTHERS}
    return [without_times(part) for part in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(model, tmp_path):
    """Pictures bit for bit; what a search finds as well, since these kernels give a row the same bits in any batch."""
    one, two = tmp_path / "one", tmp_path / "two"
    for words in commands(model, one):
        cli(words, standalone_mode=False)
    end = launched(tmp_path, SCRIPT, json.dumps(commands(model, two)))
    assert end.returncode == 0, end.stderr
    assert "ran as 0 of 2" in end.stderr and "ran as 1 of 2" in end.stderr
    assert end.stdout.count("3 images in") == 1  # one of them speaks
    files = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert files == {path.relative_to(two) for path in two.rglob("*") if path.is_file()} and len(files) > 20
    for name in files:
        ours, theirs = (one / name), (two / name)
        if name.suffix == ".json":
            a, b = (json.loads(path.read_text()) for path in (ours, theirs))
            assert without_times(a) == without_times(b), name
        elif name.name in ("noise.safetensors", "samples.safetensors"):
            a, b = load_file(ours), load_file(theirs)
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
        elif name.suffix == ".png" and name.parts[0] != "compare":  # whose sheet shows no time, but its fonts
            assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.slow
def test_if_one_process_dies_the_other_ends_and_nothing_is_left(model, tmp_path):
    words = commands(model, tmp_path)[0]
    end = launched(tmp_path, DYING, *words)
    assert end.returncode != 0 and "exitcode: 3" in end.stderr.replace(" ", "").replace("exitcode:3", "exitcode: 3")
    assert not Path(words[-1]).exists() or not list(Path(words[-1]).iterdir())
