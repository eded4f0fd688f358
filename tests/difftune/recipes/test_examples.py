"""The example configurations: each is read by its command and makes a Config that its recipe accepts."""

import pytest
import yaml
from click.testing import CliRunner

from difftune.cli.config_file import EXAMPLES
from difftune.cli.program import cli
from difftune.cli.train import configured as configured_by
from difftune.cli.train import train
from difftune.recipes import RECIPES, check_recipe

FILES = sorted(EXAMPLES.glob("*.yaml"))


def recipe_of(path):
    """The one part of the name between hyphens that is a recipe."""
    (name,) = [name for name in RECIPES if f"-{name}-" in f"-{path.stem}-"]
    return name


def configured(path, *flags):
    recipe = recipe_of(path)
    ctx = train.commands[recipe].make_context(recipe, ["--config", str(path), *flags])
    return configured_by(ctx, RECIPES[recipe].config)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_read_and_its_config_is_accepted(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a snail\n")
    config = configured(path)
    check_recipe(config)
    written = yaml.safe_load(path.read_text())
    plain = {key: value for key, value in written.items() if key in vars(config) and key != "reward"}
    assert plain and {key: getattr(config, key) for key in plain} == plain
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_an_example_on_an_embedded_model(recipe):
    models = [configured(path).model for path in FILES if recipe_of(path) == recipe and path.stem.startswith("tiny")]
    assert models and set(models) <= {"tiny", "tiny-turbo", "tiny-flow"}


def test_an_example_is_found_by_its_bare_name_and_flags_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ctx = train.commands["alignprop"].make_context("alignprop", ["--config", "tiny-alignprop", "--rank", "7"])
    config = configured_by(ctx, RECIPES["alignprop"].config)
    assert (config.num_inference_steps, config.rank, config.guidance) == (10, 7, "none")


def test_a_file_of_ones_own_goes_before_an_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-alignprop").write_text("rank: 9\n")
    ctx = train.commands["alignprop"].make_context("alignprop", ["--config", "tiny-alignprop"])
    assert ctx.params["rank"] == 9


def test_a_name_that_is_no_example_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["train", "alignprop", "--config", "tinny-alignprop"])
    assert result.exit_code == 2 and "tinny-alignprop" in result.stderr
