"""What holds of every recipe: it resumes bit for bit, skips what is not finite, and leaves the frozen weights alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

from difftune.errors import RunError
from difftune.files import checkpoint
from difftune.files.checkpoint import State
from difftune.files.claim import claimed
from difftune.pipelines import lora
from difftune.recipes import RECIPES, train, train_in_folder
from rewards.network.judge import Judge
from rewards.simple import Brightness
from tests.support import pipelines
from tests.support.judge_server import judging
from tests.support.toys import VARIANTS, Bright, toy


def final(name: str, config, state: State | None = None, steps: int | None = None) -> State:
    *_, (_, last) = islice(train(config, state, pipelines.sd(), Bright()), steps)
    return last


def different(a: State, b: State) -> list[str]:
    assert a.tensors.keys() == b.tensors.keys()
    return [name for name in a.tensors if not torch.equal(a.tensors[name], b.tensors[name])]


SURROGATES = ("flowbp", "leapalign", "direct-align")
EVERY_STEP = ("alignprop", *SURROGATES, "draft", "refl", "drtune", "adjoint-matching", "hypernoise")
NO_ROUNDS = (*EVERY_STEP, "d3po", "pso")  # every step makes new images
NO_DROPOUT = ("ddpo", "d3po", "pso", "grpo", "guard", "awm", "dgpo")  # a ratio of probabilities refuses it


def dropout_of(name: str) -> float:
    return 0.0 if name in NO_DROPOUT else 0.3


def rounds(name: str, length: int) -> dict[str, int]:
    return {} if name in NO_ROUNDS else {"updates_per_round": length}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.sampled(2)
def test_resumed_equals_uninterrupted_bit_for_bit(name, tmp_path):
    """Weights, optimiser, average, generators and statistics; the reward and the dropout draw from the generators.

    A round of images is under way at the checkpoint, and another is made afterwards.
    """
    config = toy(name, tmp_path, max_train_steps=4, lora_dropout=dropout_of(name), ema_decay=0.9, **rounds(name, 3))
    torch.manual_seed(5)
    whole = final(name, config)
    torch.manual_seed(5)
    half = final(name, config, steps=2)
    assert different(half, whole)
    path = checkpoint.save(tmp_path / "out", half)
    torch.manual_seed(99)
    resumed = final(name, config, checkpoint.load(path))
    assert resumed.step == whole.step == 4
    assert not different(whole, resumed)
    found, expected = (json.loads(json.dumps(state.info)) for state in (resumed, whole))
    assert found["metrics"].pop("seconds") and expected["metrics"].pop("seconds")
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_settings_with_a_way_of_their_own_are_resumed_too(name, tmp_path):
    test_resumed_equals_uninterrupted_bit_for_bit(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3, 40])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_at_any_number_of_steps(name, steps, tmp_path):
    """Or says in one sentence that it needs two: nothing is written for one number of them."""
    own = {"drtune": "truncation_steps", "grpo": "sde_window", "nft": "levels_per_image"}
    fitting = {own[name]: min(2, steps)} if name in own else {}
    config = toy(name, tmp_path, max_train_steps=2, num_inference_steps=steps, **fitting)
    if (name, steps) in [("adjoint-matching", 1), ("grpo", 1), ("pso", 1)]:
        with pytest.raises(ValueError, match="num_inference_steps is 1: .*at least 2"):
            list(train(config, None, pipelines.sd(), Bright()))
        return
    for metrics, state in train(config, None, pipelines.sd(), Bright()):
        assert isfinite(metrics["loss"]) and metrics["skipped"] == 0
        assert all(bool(t.isfinite().all()) for t in state.tensors.values() if t.is_floating_point())


@pytest.mark.parametrize("more", [{"low_variance_copies": 2}, {"lora_dropout": 0.3}], ids=["draft_lv", "dropout"])
def test_the_seed_decides_what_the_global_generators_draw(more, tmp_path):
    """They begin at the seed, whatever was drawn before, and another seed is another run."""
    ends = []
    for before, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(before)
        random.seed(before)
        ends.append(final("draft", toy("draft", tmp_path, max_train_steps=1, seed=seed, **more)))
    assert not different(ends[0], ends[1]) and different(ends[0], ends[2])


LOADS: dict[str, dict[str, Any]] = {"alignprop": {}, "pso": {}, "dragon": {"objective": "vendi"}}


@pytest.mark.parametrize("name", LOADS)
def test_what_is_loaded_after_a_checkpoint_is_read_changes_no_generator(name, tmp_path):
    """A network that is loaded draws its first weights; the steps afterwards find the generators as they were."""
    config = toy(name, tmp_path, max_train_steps=2, reward=["tiny-clip"], **rounds(name, 1), **LOADS[name])
    states = [state for _, state in train(config, None, pipelines.sd())]
    torch.manual_seed(99)
    ((_, resumed),) = train(config, states[0], pipelines.sd())
    assert not different(states[1], resumed)


class Faulty(Bright):
    """Not a number for one picture of each batch while `now` is not empty."""

    def __init__(self):
        object.__setattr__(self, "now", [])

    def __call__(self, images, prompts):
        scores = super().__call__(images, prompts)
        return torch.cat([scores[:1] * float("nan"), scores[1:]]) if self.now else scores


@contextmanager
def faulty_reward(reward: Faulty, pipe: Any) -> Iterator[None]:
    reward.now.append(True)
    yield
    reward.now.clear()


@contextmanager
def faulty_gradient(reward: Faulty, pipe: Any) -> Iterator[None]:
    """One weight's, behind a loss that is finite."""
    weight = next(weight for weight in pipe.unet.parameters() if weight.requires_grad)
    hook = weight.register_hook(lambda gradient: gradient / 0)
    yield
    hook.remove()


FAULTS = {"reward": faulty_reward, "gradient": faulty_gradient}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.sampled(4)
def test_what_is_not_finite_is_skipped_counted_and_never_saved(name, fault, tmp_path):
    """The second step of five is skipped, the third moves the weights again, and the next fault ends the run."""
    config = toy(name, tmp_path, max_skipped_steps=1, max_train_steps=5, ema_decay=0.9, **rounds(name, 1))
    pipe, reward = pipelines.sd(), Faulty()
    run, found = train(config, None, pipe, reward), []
    for step in (1, 2, 3):
        with FAULTS[fault](reward, pipe) if step == 2 else nullcontext():
            found.append(next(run))
    with FAULTS[fault](reward, pipe), pytest.raises(RunError, match=r"step 4: .*not finite.*checkpoints are as they"):
        next(run)
    assert [metrics["skipped"] for metrics, _ in found] == [0, 1, 1]
    assert ["loss" in metrics for metrics, _ in found] == [True, False, True]
    (_, first), (_, second), (_, third) = found
    learnt = {key for key in first.tensors if key.startswith(("weights.", "optimizer.", "ema."))}
    assert not learnt & set(different(first, second)) and learnt & set(different(second, third))
    for state in (first, second, third):
        assert all(tensor.isfinite().all() for tensor in state.tensors.values())
        json.dumps(state.info, allow_nan=False)


def test_a_judge_that_is_gone_costs_steps_and_then_ends_a_run_that_resumes(tmp_path, monkeypatch):
    """Its server dies in the second step: that one is skipped, the next ends the run, and all is as after the first."""
    monkeypatch.setattr("rewards.network.client.time.sleep", lambda seconds: None)
    folder = tmp_path / "run"
    more: dict[str, Any] = {"max_skipped_steps": 1, "max_train_steps": 4, "output_dir": str(folder)}
    config = toy("ddpo", tmp_path, checkpointing_steps=100, **more, **rounds("ddpo", 1))

    def told() -> list[int]:
        return [json.loads(line)["skipped"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    with judging() as (url, process):
        kills = Kills(Judge(url, "m", retries=1), process, after=1)
        with pytest.warns(UserWarning, match="have no score"), pytest.raises(RunError, match="not finite"):
            train_in_folder(config, pipe=pipelines.sd(), reward=kills)
    assert told() == [0, 1]
    with judging() as (url, _):
        resumed = replace(config, resume_from_checkpoint="latest")
        train_in_folder(resumed, pipe=pipelines.sd(), reward=Judge(url, "m"))
    assert told() == [0, 1, 1, 1]


@dataclass
class Kills:
    """A judge whose server dies after so many calls."""

    judge: Judge
    process: Any
    after: int
    differentiable = False

    def __call__(self, images, prompts):
        if not self.after:
            self.process.kill()
            self.process.wait()
        self.after -= 1
        return self.judge(images, prompts)


# ------------------------------------------------------------------------------------------------ real processes

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from difftune.recipes import RECIPES, train_in_folder
from tests.support import pipelines
from tests.support.toys import Bright
name, settings = sys.argv[1], json.loads(sys.argv[2])
torch.manual_seed(5)
train_in_folder(RECIPES[name].config(**settings), pipe=pipelines.sd(), reward=Bright())
"""
ROOT = str(Path(__file__).parents[3])
ENVIRONMENT = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


TWICE = """
import json, sys
import torch
torch.set_num_threads(1)
from difftune.recipes import RECIPES, train, train_in_folder
from tests.support import pipelines
from tests.support.toys import Bright
for name, (recipe, settings) in json.loads(sys.argv[1]).items():
    *_, (_, state) = train(RECIPES[recipe].config(**settings), None, pipelines.sd(), Bright())
    torch.save(dict(state.tensors), f"{sys.argv[2]}/{name}.pt")
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_runs_from_nothing_in_two_processes_are_equal_bit_for_bit(tmp_path):
    """Processes of other hashes and times; the rewards, dropout and DRaFT-LV draw from the global generators."""
    more = {"draft": {"low_variance_copies": 2}}
    known = {name: name for name in RECIPES} | {name: recipe for name, (recipe, _) in VARIANTS.items()}
    settings = {
        name: [
            recipe,
            asdict(toy(name, tmp_path, max_train_steps=2, lora_dropout=dropout_of(name), **more.get(name, {}))),
        ]
        for name, recipe in known.items()
    }
    for run in ("1", "2"):
        (tmp_path / run).mkdir()
        command = [sys.executable, "-c", TWICE, json.dumps(settings), str(tmp_path / run)]
        subprocess.run(command, check=True, env=ENVIRONMENT | {"PYTHONHASHSEED": run}, stderr=subprocess.DEVNULL)
    for name in known:
        first, second = (torch.load(tmp_path / run / f"{name}.pt") for run in ("1", "2"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name


def command(name: str, config) -> list[str]:
    return [sys.executable, "-c", SCRIPT, name, json.dumps(asdict(config))]


def killed_somewhere(name: str, config, after: int, delay: float) -> None:
    """Run until `after` checkpoints are there, and a moment longer, then SIGKILL."""
    process = subprocess.Popen(command(name, config), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    out = Path(config.output_dir)
    while len(checkpoint.checkpoints(out)) < after and process.poll() is None:
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [*RECIPES, *VARIANTS])
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(name, tmp_path):
    """Twice a recipe, at moments that differ from run to run of this test; the delay is printed."""
    config = toy(name, tmp_path, max_train_steps=12, checkpointing_steps=1, ema_decay=0.9, **rounds(name, 3))
    name, _ = VARIANTS.get(name, (name, {}))
    whole = replace(config, output_dir=str(tmp_path / "whole"))
    subprocess.run(command(name, whole), check=True, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    cut = replace(config, output_dir=str(tmp_path / "cut"))
    for after in (random.randint(1, 4), random.randint(6, 9)):
        delay = random.uniform(0, 0.5)
        print(f"{name}: killed {delay:.3f} s after checkpoint {after}")
        killed_somewhere(name, cut, after, delay)
        cut = replace(cut, resume_from_checkpoint="latest")
    end = subprocess.run(command(name, cut), capture_output=True, text=True, env=ENVIRONMENT)
    assert end.returncode == 0, end.stderr
    files = [tmp_path / run / lora.WEIGHTS for run in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    states = [checkpoint.load(tmp_path / run / "checkpoint-12") for run in ("whole", "cut")]
    assert not different(*states)


ACROSS = {"num_images_per_prompt": 4, "gradient_accumulation_steps": 2}  # groups of two processes' batches
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29741"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=29745"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alignprop", "ddpo"])
def test_what_is_not_finite_in_one_process_is_skipped_in_both(name, tmp_path):
    """The reward of the second process breaks in its second call, and both go on together."""
    config = toy(name, tmp_path, max_train_steps=3, max_skipped_steps=1, output_dir=str(tmp_path / "two"))
    faulty = """
import os
class Once(Bright):
    calls = []
    def __call__(self, images, prompts):
        self.calls.append(1)
        broken = os.environ["RANK"] == "1" and len(self.calls) == 2
        return super().__call__(images, prompts) * (float("nan") if broken else 1)
"""
    head, run = SCRIPT.replace("reward=Bright()", "reward=Once()").split("name, settings =")
    (tmp_path / "script.py").write_text(f"{head}{faulty}name, settings ={run}")
    launch = [sys.executable, *LAUNCHERS["torchrun"], str(tmp_path / "script.py"), name, json.dumps(asdict(config))]
    end = subprocess.run(launch, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert end.returncode == 0, end.stderr
    met = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [("loss" in metrics, metrics["skipped"]) for metrics in met] == [(True, 0), (False, 1), (True, 1)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_saves_once_and_ends_both(rank, tmp_path):
    """The process gets SIGTERM in its second step; the other would wait for it in the next collective call."""
    config = toy("alignprop", tmp_path, output_dir=str(tmp_path / "two"))
    stopped = f"""
import os, signal
class Stopped(Bright):
    calls = []
    def __call__(self, images, prompts):
        self.calls.append(1)
        if os.environ["RANK"] == "{rank}" and len(self.calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(images, prompts)
"""
    head, run = SCRIPT.replace("reward=Bright()", "reward=Stopped()").split("name, settings =")
    (tmp_path / "script.py").write_text(f"{head}{stopped}name, settings ={run}")
    here = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29749"}
    launch = [sys.executable, str(tmp_path / "script.py"), "alignprop", json.dumps(asdict(config))]
    both = [
        subprocess.Popen(launch, env=here | {"RANK": i, "LOCAL_RANK": i}, stderr=subprocess.PIPE, text=True)
        for i in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=500)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [143, 143], said
    assert said[0].count("stopped by SIGTERM after step 2") == 1
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "two")] == ["checkpoint-2"]
    assert checkpoint.load(tmp_path / "two" / "checkpoint-2").info["num_processes"] == 2
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_folder_in_use_is_refused_in_both_processes(tmp_path):
    """Only the first of the two claims the folder, and the other would wait for it."""
    config = toy("alignprop", tmp_path, output_dir=str(tmp_path / "two"))
    here = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29753"}
    line = command("alignprop", config)
    with claimed(tmp_path / "two"):
        both = [
            subprocess.Popen(line, env=here | {"RANK": i, "LOCAL_RANK": i}, stderr=subprocess.PIPE, text=True)
            for i in ("0", "1")
        ]
        said = [process.communicate()[1] for process in both]
    assert all(f"is in use by process {os.getpid()}: wait" in text for text in said), said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "name"),
    [
        ("torchrun", "alignprop"),
        ("accelerate", "alignprop"),
        ("torchrun", "ddpo"),
        ("torchrun", "grpo"),
        ("torchrun", "nft"),
        ("torchrun", "adjoint-matching"),
        ("torchrun", "hypernoise"),
    ],
)
def test_two_processes_equal_one_on_the_joined_batch(launcher, name, tmp_path):
    """Under gloo: Adam's first moments are a tenth of the synchronised gradient, which is that of the joined batch."""
    more = {"alignprop": {"truncation_min": 3}, "grpo": ACROSS, "nft": ACROSS}.get(name, {})
    config = toy(name, tmp_path, max_train_steps=1, output_dir=str(tmp_path / "two"), **more)
    count = 4 * config.gradient_accumulation_steps
    script = SCRIPT.replace("reward=Bright()", "reward=__import__('rewards.simple').simple.Brightness()")
    (tmp_path / "script.py").write_text(script)
    launch = [sys.executable, *LAUNCHERS[launcher], str(tmp_path / "script.py"), name]
    end = subprocess.run([*launch, json.dumps(asdict(config))], env=ENVIRONMENT, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    two = checkpoint.load(tmp_path / "two" / "checkpoint-1")
    joined = replace(config, train_batch_size=4)
    *_, (_, one) = train(joined, None, pipelines.sd(), Brightness())
    assert two.info["num_processes"] == 2 and two.info["cursor"] == count
    assert sum(map(len, two.info["seen"].values())) == count  # the rewards of both processes
    moments = [k for k in one.tensors if k.startswith("optimizer.exp_avg.")]
    scale = max(one.tensors[k].abs().max() for k in moments)
    for key in moments:
        assert (one.tensors[key] - two.tensors[key]).abs().max() <= 1e-5 * scale
    assert "rng.1.cpu" in two.tensors
