"""Every recipe has a page, which says its paper and shows it step by step and as a whole run."""

from dataclasses import fields
from pathlib import Path

import pytest

from difftune.configs.training import TrainingConfig
from difftune.recipes import RECIPES, check_recipe
from scripts import make_defaults

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_has_its_page(recipe):
    page = (DOCS / "recipes" / f"{recipe.name}.md").read_text()
    assert recipe.url in page and f"difftune train {recipe.name} " in page
    assert f"from difftune import {recipe.config.__name__}, train\n" in page
    assert f"train_in_folder({recipe.config.__name__}(" in page
    shared = (DOCS / "training.md").read_text()
    assert recipe.url in shared and f"(recipes/{recipe.name}.md)" in shared


def test_there_is_no_page_without_a_recipe():
    assert {page.stem for page in (DOCS / "recipes").glob("*.md")} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_its_settings_are_those_of_today(recipe):
    """The table is made of the Config and of the example; what it says of one GPU is a command that is accepted."""
    page = (DOCS / "recipes" / f"{recipe.name}.md").read_text()
    assert make_defaults.block(recipe) in page, "the settings have changed: run python scripts/make_defaults.py"
    assert "not given" not in make_defaults.settings_table(recipe)
    changed = make_defaults.ONE_GPU[recipe.name]
    check_recipe(recipe.config(**{"model": make_defaults.BASE, **changed}))
    defaults = recipe.config()
    assert not [name for name, value in changed.items() if getattr(defaults, name) == value]
    example = make_defaults.example_of(recipe)
    for name in make_defaults.SHARED:
        line = f"| `{name}` | {make_defaults.said(name, getattr(defaults, name, None))} |"
        assert not hasattr(defaults, name) or line in page
    shown = set(make_defaults.settings_of(recipe))
    own = set(vars(defaults)) - {field.name for field in fields(TrainingConfig)} - make_defaults.NOT_SHOWN
    assert own <= shown and set(example) <= shown | set(vars(defaults))
