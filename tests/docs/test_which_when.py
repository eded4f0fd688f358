"""The page that says which method when names them all, with the costs of the catalogue, and each page says when."""

import re
from pathlib import Path

import pytest

from difftune.recipes import RECIPES
from guidance.methods.catalogue import GUIDANCE
from guidance.search.catalogue import SEARCHES

DOCS = Path(__file__).parents[2] / "docs"
ROWS = [line.strip("| ").split(" | ") for line in (DOCS / "choose.md").read_text().splitlines() if line[:1] == "|"]
PAGES = [*(f"guidance/{name}" for name in GUIDANCE), *(f"recipes/{name}" for name in RECIPES), "reno"]
PAGES += [f"search/{page.stem}" for page in (DOCS / "search").glob("*.md")]


def test_every_name_is_there():
    named = {name for row in ROWS for name in re.findall(r"`([\w-]+)`", row[1])}
    assert not {*GUIDANCE, *RECIPES, *SEARCHES} - named


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_cost_is_that_of_difftune_methods(name):
    (row,) = [row for row in ROWS if f"`{name}`" in row[1] and f"recipes/{name}.md" in row[-1]]
    assert re.split("[:;]", row[2])[0] == RECIPES[name].facts.forwards


def test_each_page_says_when_and_at_what_cost():
    for page in PAGES:
        text = (DOCS / f"{page}.md").read_text()
        assert text.count("**When.** ") == 1 and re.search(r"\bCost\b", text), page
