"""Commands that are killed just before one of their file operations, each of them in the slow tests: what goes on from
there ends with the same bits, and leaves nothing else behind."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from difftune.configs.images import CompareConfig, EvalConfig, SampleConfig
from difftune.configs.noise import RenoConfig
from difftune.configs.recipes import AlignPropConfig
from difftune.configs.search import SearchConfig
from difftune.errors import ERRORS, UserError
from difftune.evaluation import compare
from difftune.evaluation.run_folder import run_eval
from difftune.files.claim import claimed
from difftune.labelling.label_file import LabelFile
from difftune.labelling.session import Session
from difftune.labelling.tasks import draw_tasks, pictures_to_label
from difftune.pipelines.generate import generate
from difftune.recipes import train_in_folder
from difftune.reno import run_folder as reno
from difftune.search_runs import run_folder as search
from rewards.errors import Unreachable
from tests.support import pipelines
from tests.support.crashes import crashing, failed_at, killed_at, tree


def trained(out: Path, resume: bool) -> None:
    config = AlignPropConfig(
        reward=["brightness"],
        prompts="animals",
        num_inference_steps=1,
        train_batch_size=1,
        max_train_steps=3,
        checkpointing_steps=1,
        checkpoints_total_limit=1,
        validation_steps=2,
        num_validation_images=1,
        output_dir=str(out),
        resume_from_checkpoint="latest" if resume else None,
    )
    train_in_folder(config, pipe=pipelines.sd(), show=quiet)


def optimized(out: Path, resume: bool) -> None:
    config = RenoConfig(
        prompt=["red", "blue"],
        reward=["brightness"],
        batch_size=1,
        iterations=2,
        checkpointing_steps=1,
        output_dir=str(out),
        resume_from_checkpoint="latest" if resume else None,
    )
    reno.optimize_in_folder(config, quiet, pipelines.sd())


def searched(out: Path, resume: bool) -> None:
    config = SearchConfig("best-of-n", ["red"], reward=["brightness"], nfe_budget=8, num_inference_steps=2)
    config = replace(
        config, output_dir=str(out), resume_from_checkpoint="latest" if resume else None, guidance_scale=2.0
    )
    search.search_in_folder(config, quiet, pipelines.sd())


def sampled(out: Path, resume: bool) -> None:
    generate(
        SampleConfig(
            model=str(out.parent / "model"), prompt=["red", "blue"], output_dir=str(out), num_inference_steps=1
        )
    )


def labelled(out: Path, resume: bool) -> None:
    todo = draw_tasks(pictures_to_label(out.parent / "pictures"), 3)
    session = Session(todo, LabelFile.open(out / "labels.jsonl"))
    try:
        for task in session.next(len(todo)):
            session.choose(task, task % 3)
    finally:
        session.labels.close()


def quiet(line: str) -> None:
    """Say nothing."""


@dataclass
class Case:
    run: Callable[[Path, bool], None]
    few: int  # operations, at least
    prepare: Callable[[Path], object] = lambda root: None
    worth: tuple[str, ...] = ("checkpoint-*", "checkpoints/*/checkpoint-*", search.STATE, reno.RESULT)

    def resumes(self, out: Path, k: int) -> bool:
        """Whether the command is told to resume: it must be where there is something to go on from, else it may be."""
        return k % 2 == 0 or any(any(out.glob(name)) for name in self.worth)


def saved_model(root: Path) -> None:
    pipelines.sd().save_pretrained(root / "model")


def some_pictures(root: Path) -> None:
    from PIL import Image

    (root / "pictures").mkdir()
    (root / "out").mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(root / "pictures" / f"{i}.png")
    table = {f"{i}.png": f"prompt {i // 3}" for i in range(6)}
    (root / "pictures" / "prompts.json").write_text(json.dumps(table))


CASES = {
    "train": Case(trained, 60),
    "optimize": Case(optimized, 60),
    "search": Case(searched, 20),
    "sample": Case(sampled, 20, saved_model),
    "label": Case(labelled, 4, some_pictures),
}


@pytest.fixture
def still(monkeypatch):
    """Clocks stand still, so that equal runs write equal bits; a search is saved after each step."""
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(search, "SAVE_SECONDS", -1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def started(case: Case, out: Path, resume: bool) -> None:
    """A new process: its global generators are as they always are."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    case.run(out, resume)


def contents(out: Path) -> dict[str, object]:
    """Every file of a folder; of labels, all but their times."""
    found: dict[str, object] = dict(tree(out))
    if "labels.jsonl" in found:
        lines = [json.loads(line) for line in (out / "labels.jsonl").read_text().splitlines()]
        holding = [line for i, line in enumerate(lines) if "undo" not in line and {"undo": i} not in lines]
        found["labels.jsonl"] = [{**line, "time": ""} for line in holding]
    return found


def check(case: Case, root: Path, chosen: Callable[[int], list[int]], fault: str = "killed") -> int:
    """Stop the command at each chosen operation, go on, and compare; returns how many operations there are."""
    case.prepare(root)
    out = root / "out"
    there = out.exists()
    with crashing(out) as whole:
        started(case, out, False)
    wanted = contents(out)
    for k in chosen(len(whole.seen)):
        shutil.rmtree(out)
        if there:
            out.mkdir()
        if stop(case, out, k, fault):
            started(case, out, case.resumes(out, k))
        found = contents(out)
        different = [name for name in wanted.keys() | found.keys() if wanted.get(name, 0) != found.get(name, 0)]
        assert not different, (k, whole.seen[k], sorted(different))
    return len(whole.seen)


def stop(case: Case, out: Path, k: int, fault: str) -> bool:
    """Run the command until its k-th operation; False where it came to its end all the same, as a full disk lets it.

    Where the disk failed it says so in one sentence, and what it could not clear up is cleared up by the next.
    """
    run = partial(started, case, out, False)
    if fault == "killed":
        return killed_at(out, k, run)
    error = failed_at(out, k, fault, run)
    if error is not None:
        assert isinstance(error, ERRORS) and "\n" not in str(error), (k, error)
        assert any(words in str(error) for words in ("No space left", "Read-only", "disk is full")), (k, error)
    return error is not None


@pytest.mark.parametrize("name", CASES)
def test_a_command_that_is_killed_goes_on_to_the_same_bits(name, tmp_path, still):
    draw = random.Random(f"crash {name}")
    count = check(CASES[name], tmp_path, lambda count: sorted(draw.sample(range(count), 2)))
    assert count >= CASES[name].few


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", CASES)
def test_a_command_that_is_killed_anywhere_goes_on_to_the_same_bits(name, tmp_path, still):
    count = check(CASES[name], tmp_path, lambda count: list(range(count)))
    print(f"{name}: {count} operations")


@pytest.mark.parametrize(("name", "fault"), list(zip(CASES, ["full", "read-only"] * 3, strict=False)))
def test_a_disk_that_fails_half_way_is_one_sentence_and_the_command_goes_on(name, fault, tmp_path, still):
    draw = random.Random(f"{fault} {name}")
    check(CASES[name], tmp_path, lambda count: [draw.randrange(count)], fault)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("fault", ["full", "read-only"])
@pytest.mark.parametrize("name", CASES)
def test_a_disk_that_fails_anywhere_is_one_sentence_and_the_command_goes_on(name, fault, tmp_path, still):
    check(CASES[name], tmp_path, lambda count: list(range(count)), fault)


@dataclass
class Stays:
    """Brightness, from a server that is out of reach from the n-th call on."""

    calls: float
    differentiable = True

    def __call__(self, images, prompts):
        if self.calls <= 0:
            raise Unreachable("no scores")
        self.calls -= 1
        return images.mean(dim=(1, 2, 3))


def rewarded(name: str, out: Path, reward: Stays, resume: bool) -> None:
    """A command with that reward, which saves nothing by itself but at its end."""
    word = "latest" if resume else None
    if name == "train":
        config = AlignPropConfig(reward=["brightness"], prompts="animals", num_inference_steps=1, max_train_steps=3)
        config = replace(config, train_batch_size=1, output_dir=str(out), resume_from_checkpoint=word)
        train_in_folder(config, quiet, pipelines.sd(), reward)
    if name == "optimize":
        config = RenoConfig(["red"], reward=["brightness"], iterations=3, checkpointing_steps=50, output_dir=str(out))
        reno.optimize_in_folder(replace(config, resume_from_checkpoint=word), quiet, pipelines.sd(), reward)
    if name == "search":
        config = SearchConfig("dts", ["red"], reward=["brightness"], nfe_budget=40, num_inference_steps=5)
        search.search_in_folder(
            replace(config, output_dir=str(out), resume_from_checkpoint="latest" if resume else None),
            quiet,
            pipelines.sd(),
            reward,
        )


@pytest.mark.parametrize("name", ["train", "optimize", "search"])
def test_after_an_error_the_last_whole_step_is_there_to_go_on_from(name, tmp_path, still, monkeypatch):
    monkeypatch.setattr(search, "SAVE_SECONDS", 5.0)
    out, wanted = tmp_path / "out", {}
    for calls, resume in ((9e9, False), (2, False), (9e9, True)):
        with pytest.raises(Unreachable) if calls < 9 else nullcontext():
            started(Case(lambda out, resume, calls=calls: rewarded(name, out, Stays(calls), resume), 0), out, resume)
        if not wanted:
            wanted = contents(out)
            shutil.rmtree(out)
        elif not resume:
            assert any(out.glob("checkpoint-2")) or any(out.glob("checkpoints/*/checkpoint-2")) or name == "search"
            assert (out / search.STATE).exists() == (name == "search")
    found = contents(out)
    assert found.keys() - wanted.keys() == {n for n in found if n.startswith("checkpoint-2")}  # which was not due
    assert all(found[n] == wanted[n] for n in wanted)


class Fails:
    """A reward that is out of reach."""

    differentiable = True

    def __call__(self, images, prompts):
        raise Unreachable("no scores")


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("name", ["train", "optimize", "search", "sample", "eval", "compare"])
def test_a_command_that_fails_before_it_has_something_leaves_nothing(name, deep, tmp_path):
    out = tmp_path / "a" / "out" if deep else tmp_path / "out"
    nothing, pipe = str(tmp_path / "nothing"), pipelines.sd() if name in ("train", "optimize") else None
    commands = {
        "train": lambda: train_in_folder(short(AlignPropConfig, out), quiet, pipe, Fails()),
        "optimize": lambda: reno.optimize_in_folder(short(RenoConfig, out, prompt=["red"]), quiet, pipe, Fails()),
        "search": lambda: search.search_in_folder(
            SearchConfig("fk", ["red"], nothing, nfe_budget=8, output_dir=str(out)), quiet
        ),
        "sample": lambda: generate(SampleConfig(model=nothing, prompt=["red"], output_dir=str(out))),
        "eval": lambda: run_eval(EvalConfig(model=nothing, output_dir=str(out))),
        "compare": lambda: compare.compare_methods(CompareConfig(model=nothing, prompt=["red"], output_dir=str(out))),
    }
    with pytest.raises(ERRORS):
        commands[name]()
    assert tree(tmp_path) == {}


def short(kind: type, out: Path, **more: object) -> object:
    return kind(reward=["brightness"], num_inference_steps=1, output_dir=str(out), checkpointing_steps=1, **more)


@pytest.mark.parametrize("name", ["train", "optimize", "search", "sample"])
def test_a_second_run_in_a_folder_is_refused_before_it_begins(name, tmp_path, still, monkeypatch):
    monkeypatch.setattr(pipelines, "sd", lambda: None)
    with claimed(tmp_path / "out"), pytest.raises(UserError, match=f"in use by process {os.getpid()}") as error:
        started(CASES[name], tmp_path / "out", False)
    assert error.value.exit_code == 2
