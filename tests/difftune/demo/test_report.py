"""The demo on small random pipelines, and the commands that its report quotes."""

import json
import math
import random
import re
import shlex

import pytest

from difftune import recipes
from difftune.cli.program import cli
from difftune.configs.noise import RenoConfig
from difftune.configs.recipes import AlignPropConfig
from difftune.demo import run
from difftune.errors import UserError
from difftune.reno import run_folder as reno_folder
from tests.support.crashes import crashing, killed_at, tree
from tests.support.pipelines import sd


def numbers(value):
    """The leaves of nested dicts."""
    return [n for inner in value.values() for n in numbers(inner)] if isinstance(value, dict) else [value]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model, folder = (tmp_path_factory.mktemp(name) for name in ("model", "demo"))
    sd().save_pretrained(model)
    sizes = {"steps": 2, "prompts_per_category": 1, "train_steps": 2, "train_batch": 1}
    budget = run.Budget(str(model), str(model), "brightness", reno_prompts_per_category=1, reno_iterations=2, **sizes)
    metrics = run.run_demo(folder / "demo", budget=budget)
    return folder / "demo", metrics, budget


def test_the_metrics_are_the_contracts_plain_numbers(made):
    folder, metrics, _ = made
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {"none", "cfg"} == metrics["guidance"].keys() and "shapeeval" in metrics["guidance"]["cfg"]
    four = {"reward_before", "reward_after", "oracle_before", "oracle_after", "seconds"}
    assert metrics["alignprop"].keys() == four | {"optimizer_steps"}
    assert metrics["reno"].keys() == four | {"iterations"}
    assert all(isinstance(n, int | float) and math.isfinite(n) for n in numbers(metrics))
    assert metrics["seconds_total"] >= metrics["alignprop"]["seconds"] > 0


def test_the_report_is_one_self_contained_file(made):
    page = (made[0] / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(sources) == 2 * 6 * 3 + 2  # before and after, six prompts, three stages; two curves
    assert page.count('id="alignprop"') == page.count('id="reno"') == page.count('id="guidance"') == 1
    assert "http" not in page


def test_the_quoted_commands_give_the_same_settings(made, monkeypatch):
    from click.testing import CliRunner

    budget = made[2]
    seen = []
    for module, name in ((recipes, "train_in_folder"), (reno_folder, "optimize_in_folder")):
        monkeypatch.setattr(module, name, lambda config: seen.append(config) or {})
    configs = [
        AlignPropConfig(model=budget.model, reward=["brightness"], guidance_scale=5.0, output_dir="a b", rank=2),
        RenoConfig(prompt=["a red circle", "it's"], model=budget.model, reward=["brightness"], iterations=3),
    ]
    for name, config in zip(("train alignprop", "optimize"), configs, strict=True):
        _, *arguments = shlex.split(run.command(name, config))
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.stderr
    assert seen == configs


def demo_of(folder, text):
    with run._replaced(folder) as claimed:
        (claimed / "alignprop").mkdir()
        (claimed / "alignprop" / "a").write_text(text)
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
