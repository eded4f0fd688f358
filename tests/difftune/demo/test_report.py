"""The demo on small random pipelines, and the commands that its report quotes."""

import io
import json
import logging
import math
import random
import re
import shlex
import sys
import warnings

import pytest
import torch
from tqdm import tqdm

from difftune import recipes
from difftune.cli.program import cli
from difftune.configs.noise import RenoConfig
from difftune.configs.recipes import DrtuneConfig
from difftune.configs.search import SearchConfig
from difftune.demo import run, screen, stages
from difftune.demo.budget import Budget
from difftune.errors import UserError
from difftune.evaluation.intervals import Result
from difftune.reno import run_folder as reno_folder
from difftune.search_runs import run_folder as search_folder
from tests.support.browsers import check_widths
from tests.support.crashes import crashing, killed_at, tree
from tests.support.pipelines import sd


def numbers(value):
    """The leaves of nested dicts."""
    return [n for inner in value.values() for n in numbers(inner)] if isinstance(value, dict) else [value]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model, folder = (tmp_path_factory.mktemp(name) for name in ("model", "demo"))
    sd().save_pretrained(model)
    budget = Budget(
        str(model),
        str(model),
        "brightness",
        "smooth[reward=brightness,shifts=2,pixels=1]",
        steps=2,
        prompts_per_category=1,
        recipe_options={"truncation_steps": 2, "learning_rate": 1e-3},
        train_sampler_steps=2,
        train_steps=2,
        train_batch=1,
        held_out_prompts_per_category=1,
        held_out_images=2,
        reno_prompts_per_category=1,
        reno_iterations=2,
        search_prompts_per_category=1,
        search_sampler_steps=5,
        search_nfe=20,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", told := io.StringIO())
        metrics = run.run_demo(folder / "demo", budget=budget)
    return folder / "demo", metrics, told.getvalue()


def test_the_metrics_are_the_contracts_numbers_each_difference_with_its_interval(made):
    folder, metrics, _ = made
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics.keys() == {"guidance", "alignprop", "reno", "search", "seconds_total"}
    assert {"none", "cfg"} < metrics["guidance"].keys() and "shapeeval" in metrics["guidance"]["cfg"]
    common = {"reward_before", "reward_after", "oracle_before", "oracle_after", "seconds"}
    common |= {"reward_difference", "oracle_difference"}
    assert metrics["alignprop"].keys() == common | {"optimizer_steps", "recipe"}
    assert metrics["alignprop"]["recipe"] == "draft" and metrics["alignprop"]["optimizer_steps"] == 2
    assert metrics["reno"].keys() == common | {"iterations"}
    assert metrics["search"].keys() == common | {"method", "baseline", "nfe"}
    found = [n for n in numbers(metrics) if not isinstance(n, str)]
    assert all(isinstance(n, int | float) and math.isfinite(n) for n in found)
    for name in ("alignprop", "reno", "search"):
        for what in ("reward", "oracle"):
            change, m = metrics[name][f"{what}_difference"], metrics[name]
            assert change["score"] == pytest.approx(m[f"{what}_after"] - m[f"{what}_before"], abs=1e-6)
            assert change["low"] <= change["score"] <= change["high"]
    assert metrics["seconds_total"] >= metrics["alignprop"]["seconds"] > 0


def test_a_person_sees_one_line_of_each_stage_and_the_rest_is_in_the_log(made):
    folder, metrics, told = made
    lines = told.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["guidance", "draft", "reno", "search"]
    assert all(re.search(r"[+-]\d\.\d+ \[[+-].*\] (in|ex)cludes 0.* \(\d+ s\)$", line) for line in lines)
    log = (folder / "log.txt").read_text()
    assert "gradient: truncated:" in log and lines[1] in log and "\n\n" not in log and "\x1b" not in log
    assert (
        "draft" in run.summarise(metrics) and run.summarise(metrics).count("+") + run.summarise(metrics).count("-") >= 3
    )


def test_pictures_of_a_long_list_are_spread_over_it():
    results = [Result(f"prompt {i // 2}", "colors", i % 2, True) for i in range(2 * 130)]
    way = stages.Judged(results, torch.zeros(260), torch.zeros(260, 3, 2, 2))
    stage = stages.Stage("", "", ("", ""), way, way, {}, "", [])
    assert [pair["prompt"] for pair in stage.pictures] == [f"prompt {i}" for i in range(0, 130, 3)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_screen_shows_a_bar_and_lines_and_logs_warnings(kind, monkeypatch):
    terminal, log = kind(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with screen.shown(log) as view:
        for _ in tqdm(range(3), "work", mininterval=0):
            print("a library speaks")
        for _ in tqdm(range(3), "Loading weights", mininterval=0):
            logging.getLogger("another").warning("it warns")
        with pytest.warns(UserWarning):
            warnings.warn("deprecated", stacklevel=1)
        view.line("work: done")
    assert sys.stderr is terminal
    assert log.getvalue() == 3 * "a library speaks\n" + "work: done\n"
    seen = terminal.getvalue()
    assert "speaks" not in seen and "Loading" not in seen and seen.count("\n") == 1
    assert ("work: 100%" in seen) == (kind is Terminal) and "work: done\n" in seen


def test_the_report_is_one_self_contained_file(made):
    page = (made[0] / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(sources) == 2 * (6 * 3 + 4) + 2  # before and after, six prompts in three stages, four hard; two curves
    assert all(page.count(f'id="{name}"') == 1 for name in stages.STAGES) and page.count("cludes 0") >= 4
    assert "http" not in page


def test_the_quoted_commands_give_the_same_settings(monkeypatch):
    from click.testing import CliRunner

    seen = []
    for module, name in (
        (recipes, "train_in_folder"),
        (reno_folder, "optimize_in_folder"),
        (search_folder, "search_in_folder"),
    ):
        monkeypatch.setattr(module, name, lambda config: seen.append(config) or {})
    smooth = "smooth[reward=brightness,shifts=2,pixels=1]"
    configs = [
        DrtuneConfig(reward=[smooth], guidance="none", output_dir="a b", rank=2),
        RenoConfig(prompt=["a red circle", "it's"], reward=["brightness"], iterations=3, held_out="oracle"),
        SearchConfig(prompt=["a red circle"], method="best-of-n", guidance_scale=3.0, nfe_budget=8),
    ]
    for name, config in zip(("train drtune", "optimize", "search best-of-n"), configs, strict=True):
        _, *arguments = shlex.split(stages.command(name, config))
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.stderr
    assert seen == configs


def demo_of(folder, text):
    with run._replaced(folder) as claimed:
        (claimed / "training").mkdir()
        (claimed / "training" / "a").write_text(text)
        (claimed / "report.html").write_text(text)


def test_a_demo_that_is_killed_anywhere_costs_neither_itself_nor_the_one_before(tmp_path):
    demo_of(tmp_path / "whole", "old")
    old = tree(tmp_path / "whole")
    with crashing(tmp_path) as counted:
        demo_of(tmp_path / "whole", "new")
    for k in sorted(random.Random(0).sample(range(len(counted.seen)), 10)):
        folder = tmp_path / str(k)
        demo_of(folder, "old")
        assert killed_at(tmp_path, k, lambda folder=folder: demo_of(folder, "new")), counted.seen[k]
        with pytest.raises(ZeroDivisionError), run._replaced(folder):
            raise ZeroDivisionError
        assert tree(folder) in (old, tree(tmp_path / "whole")), counted.seen[k]
        demo_of(folder, "new")
        assert tree(folder) == tree(tmp_path / "whole")
    assert len(counted.seen) > 20


def test_two_demos_do_not_share_a_folder(tmp_path):
    with run._replaced(tmp_path), pytest.raises(UserError, match="is in use by process"), run._replaced(tmp_path):
        pass


def test_a_demo_replaces_only_a_demo(tmp_path, made):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds another run"):
        run.run_demo(folder)
    assert (folder / "thesis.txt").read_text() == "precious"

    earlier = made[0]
    with pytest.raises(ZeroDivisionError), run._replaced(earlier) as fresh:
        assert not (fresh / "report.html").exists()
        raise ZeroDivisionError
    assert (earlier / "report.html").exists()
    with run._replaced(earlier) as fresh:
        (fresh / "report.html").write_text("new")
    assert [p.name for p in sorted(earlier.iterdir())] == [run.MARK, "report.html"]


@pytest.mark.browser
def test_the_report_is_no_wider_than_its_window(made, browser):
    check_widths(browser, (made[0] / "report.html").as_uri())
