"""Every recipe has a page, which says its paper and shows it step by step and as a whole run."""

from pathlib import Path

import pytest

from difftune.recipes import RECIPES

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
