"""Checkpoints: safetensors for tensors, JSON for the rest, nothing pickled.

A checkpoint is written as a whole folder, and its manifest holds the SHA-256 of every file: it is whole, or it is not
taken for one. One that was damaged later is set aside as `checkpoint-STEP.damaged`.
"""

import hashlib
import json
import random
import re
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from difftune.configs.fields import with_one_scale
from difftune.errors import RunError, UserError
from difftune.files.output import remove, whole_folder, written

TENSORS, INFO, MANIFEST = "state.safetensors", "state.json", "manifest.json"
DAMAGED = ".damaged"
Say = Callable[[str], Any]


class State(NamedTuple):
    """All that a resumed run needs."""

    step: int  # optimiser steps done
    tensors: Mapping[str, Tensor]  # names carry their owner: "weights.*", "optimizer.*", "rng.*"
    info: Mapping[str, Any]  # what JSON holds: data cursor, settings, statistics


def save(folder: str | Path, state: State, limit: int | None = None, also: Callable[[Path], Any] | None = None) -> Path:
    """Write `folder/checkpoint-STEP`, then `prune` the others. `also(path)` adds files of its own.

    Raises DiskError if the disk refuses: those that were there stay.
    """
    final = Path(folder) / f"checkpoint-{state.step}"
    with whole_folder(final) as partial:
        save_file({k: v.detach().cpu().contiguous() for k, v in state.tensors.items()}, partial / TENSORS)
        (partial / INFO).write_text(json.dumps({"step": state.step, **state.info}))
        if also is not None:
            also(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        hashes = {path.relative_to(partial).as_posix(): digest(path) for path in files}
        (partial / MANIFEST).write_text(json.dumps(hashes, indent=2))
    prune(folder, limit, state.step)
    return final


def prune(folder: str | Path, limit: int | None, step: int) -> None:
    """Remove all checkpoints but that of `step` and the newest others, `limit` in all; None keeps all."""
    others = [path for path in checkpoints(folder) if path.name != f"checkpoint-{step}"]
    for path in others[: len(others) - limit + 1] if limit else ():
        remove(path)


def load(path: str | Path) -> State:
    """The state in a checkpoint. Raises UserError, in one sentence, if it is not whole."""
    path = Path(path)
    if fault := defect(path):
        raise RunError(f"{path} cannot be resumed from: {fault}")
    try:
        info = Info(json.loads((path / INFO).read_text()))
        info.path = path
        tensors = {name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()}  # as an allocator aligns
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise RunError(f"{path} cannot be resumed from: {type(error).__name__}: {error}") from error
    step = info.pop("step", None)
    if type(step) is not int or step < 0:
        raise RunError(f"{path} cannot be resumed from: its step is {step!r}")
    return State(step, tensors, info)


class Info(dict[str, Any]):
    """What JSON holds of a checkpoint; RunError for what a whole one would hold and this one, edited, does not."""

    path: Path

    def __missing__(self, key: str) -> Any:
        raise RunError(f"{self.path} cannot be resumed from: it lacks {key!r}")


@contextmanager
def going_on() -> Iterator[None]:
    """Around what makes a run of a checkpoint that is whole: RunError if it holds something else than was written."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RunError(
            f"the checkpoint was edited, and cannot be resumed from ({why}): resume from another, or begin anew"
        ) from error


def latest(folder: str | Path, say: Say = warnings.warn) -> Path | None:
    """The newest checkpoint, when the damaged ones are set aside."""
    sort_out(folder, say)
    return next(reversed(checkpoints(folder)), None)


def sort_out(folder: str | Path, say: Say = warnings.warn) -> None:
    """Set damaged checkpoints aside, so that none counts; `say` hears of each."""
    for path in checkpoints(folder):
        if fault := defect(path):
            say(f"{path} was set aside as {set_aside(path).name}: {fault}")


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, which a person may want to look at. An earlier one of its step makes way."""
    aside = path.with_name(path.name + DAMAGED)
    if aside.exists():
        remove(aside)
    with written(aside):
        return path.rename(aside)


def resumed(folder: str | Path, wanted: str | None) -> State | None:
    """The state that `--resume_from_checkpoint` names: "latest" in `folder`, or a checkpoint's path.

    `sort_out` the folder first. Raises UserError for a path that is not a folder, RunError for a damaged checkpoint.
    """
    if wanted is None:
        return None
    if wanted != "latest":
        if not Path(wanted).is_dir():
            raise UserError(f"no checkpoint {wanted!r}: give its folder, or 'latest'")
        return load(wanted)
    found = next(reversed(checkpoints(folder)), None)
    return None if found is None else load(found)


def same_settings(now: Mapping[str, Any], then: Mapping[str, Any], free: Container[str]) -> None:
    """UserError, naming the first, if settings are not those that a checkpoint was made with.

    They are compared as JSON holds them, to which a tuple is a list. free: the names of those that may differ.
    """
    then = with_one_scale(then)
    for name, value in json.loads(json.dumps(now)).items():
        if name not in free and then.get(name) != value:
            raise UserError(f"the checkpoint was made with {name}={then.get(name)!r}, not {value!r}: resume with that")


def checkpoints(folder: str | Path) -> list[Path]:
    """Finished checkpoints, whole or not, oldest first: 9 before 10."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]{1,18}", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def defect(path: Path) -> str:
    """Why a folder is not a whole checkpoint; empty if it is one."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        wrong = [name for name, expected in manifest.items() if digest(path / name) != expected]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"it is incomplete ({type(error).__name__}: {error})"
    missing = {TENSORS, INFO} - manifest.keys()
    return f"{', '.join(sorted([*wrong, *missing]))} is damaged" if wrong or missing else ""


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Randomness(NamedTuple):
    """The global generators of one process."""

    tensors: dict[str, Tensor]  # uint8
    info: dict[str, Any]


def randomness() -> Randomness:
    """The states of torch's, Python's and NumPy's global generators."""
    devices = {f"cuda.{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    legacy = np.random.get_state(legacy=False)
    numpy = {**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].tolist()}}
    return Randomness({"cpu": torch.get_rng_state(), **devices}, {"python": random.getstate(), "numpy": numpy})


def restore(state: Randomness) -> None:
    """Put back what `randomness` gave."""
    torch.set_rng_state(state.tensors["cpu"].cpu())
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in state.tensors:
            torch.cuda.set_rng_state(state.tensors[f"cuda.{i}"].cpu(), i)
    version, internal, gauss = state.info["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = state.info["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": np.array(numpy["state"]["key"], np.uint32)}})


@contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """The global generators begin at this seed; afterwards they are as they were."""
    before = randomness()
    try:
        set_seed(seed % 2**32)
        yield
    finally:
        restore(before)
