"""A plan before the work: what is missing, how much is drawn, and time and memory by a small part of it."""

import re

import pytest
from click.testing import CliRunner

from difftune.cli.program import cli
from difftune.configs.images import SampleConfig
from difftune.configs.noise import RenoConfig
from difftune.configs.recipes import AlignPropConfig
from difftune.configs.search import SearchConfig
from difftune.errors import UserError
from difftune.pipelines import dry_run
from difftune.recipes import dry_run as of_training
from difftune.reno import dry_run as of_noise
from difftune.search_runs import dry_run as of_search
from tests.support import pipelines

QUICK = {"reward": ["brightness"], "num_inference_steps": 2, "guidance": "none"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipelines.sd().save_pretrained(folder)
    return str(folder)


def planned(kind, model, folder):
    """The plan of each command for the model, none of which writes."""
    common = {**QUICK, "model": model, "output_dir": str(folder / "out")}
    if kind == "sample":
        return dry_run.sample(SampleConfig(model=model, prompt=["a", "b"], output_dir="out", num_images=3))
    if kind == "search":
        return of_search.search(SearchConfig(prompt=["a", "b"], nfe_budget=40, method="best-of-n", **common))
    if kind == "optimize":
        return of_noise.optimize(RenoConfig(prompt=["a", "b"], iterations=9, **common))
    settings = {"train_batch_size": 2, "truncation_max": 2, "gradient_accumulation_steps": 3}
    return of_training.training(AlignPropConfig(max_train_steps=50, **settings, **common))


SLOW = ("search", "optimize")
WORK = {
    "sample": "6 images of 25 steps under cfg",
    "search": "best-of-n: at most 40 network evaluations of each of 2 prompts",
    "optimize": "2 noises, 9 iterations of 2 steps each",
    "train": "AlignProp: 50 optimiser steps of 6 images a process",
}


@pytest.mark.parametrize("kind", ["sample", "train", *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)])
def test_a_plan_says_what_it_takes_and_writes_nothing(kind, model, tmp_path):
    lines = planned(kind, model, tmp_path)
    assert lines["work"] == WORK[kind] and model in lines["model"]
    assert re.match(r"about [\d.]+ (s|minutes|hours) on .*: [\d.e+-]+ s an? ", lines["time"])
    assert re.match(r"about [\d.]+[KM]iB, weights included", lines["memory"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", WORK)
def test_what_is_not_here_is_named_and_not_fetched(kind, tmp_path):
    lines = planned(kind, "nobody/nothing", tmp_path)
    assert lines["model"] == "nobody/nothing would be DOWNLOADED from the Hub"
    assert lines["time"] == "not measured, since the model nobody/nothing would have to be downloaded first"


def test_the_files_of_rewards_are_named(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines = dry_run.reward_lines(["aesthetic", "brightness"])
    assert "would DOWNLOAD model.safetensors of openai/clip-vit-large-patch14 (1711 MB); " in lines["reward aesthetic"]
    assert lines["reward brightness"].startswith("nothing to download; licence: ")
    config = RenoConfig(model=model, prompt=["a"], reward=["aesthetic"], output_dir=str(tmp_path / "out"))
    assert "since the rewards aesthetic would have to be downloaded" in of_noise.optimize(config)["time"]


def test_accumulation_is_left_out_where_it_can_be_and_settings_are_checked(model, tmp_path):
    config = AlignPropConfig(model=model, gradient_accumulation_steps=3, max_train_steps=9, **QUICK)
    assert of_training.smaller(config).gradient_accumulation_steps == 1
    with pytest.raises(UserError, match="no sampler 'eulr'"):
        of_training.training(AlignPropConfig(model=model, sampler="eulr", **QUICK))


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3 s"), (600, "10 minutes"), (9000, "2.5 hours")])
def test_durations_are_said_as_people_say_them(seconds, text):
    assert dry_run.duration(seconds) == text


def test_the_flag_prints_the_plan(model):
    words = ["sample", "--model", model, "--prompt", "a red circle", "--output_dir", "out", "--dry_run"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    heads = [line.partition(":")[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert heads == ["model", "work", "time", "memory"]
