"""The page of the families says what the tests' tables say."""

from pathlib import Path

import pytest

from difftune.recipes.catalogue import FACTS
from scripts import make_families
from solvers.families.table import FAMILIES

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text()


def test_the_tables_are_those_of_the_tests():
    assert make_families.block() in PAGE, "the families have changed: run python scripts/make_families.py"


def test_every_use_of_every_family_is_tested():
    for use, families in make_families.uses().items():
        assert families >= set(FAMILIES), use


def test_a_test_that_is_gone_is_gone_from_the_page(monkeypatch):
    before = make_families.block()
    monkeypatch.delattr(make_families.test_every_family, "test_a_search")
    assert make_families.uses()["search"] == set() and make_families.block() != before
    monkeypatch.delattr(make_families.test_conformance, make_families.SPRINT)
    assert "sana-sprint" not in make_families.uses()["`attach`"]
    lean = pytest.mark.parametrize("name", ["sd", pytest.param("wan", marks=pytest.mark.slow)])
    monkeypatch.setattr(
        make_families.test_reno_families.test_noise_and_embedding_are_optimised, "pytestmark", [lean.mark]
    )
    assert make_families.uses()["ReNO"] == {"sd", "wan"}


def test_a_case_of_the_tests_tells_its_family():
    found = [make_families.family_named(case) for case in ("flux2-klein", "flux-dev", "sd3.5", "sana-sprint", "lcm")]
    assert found == ["flux2", "flux", "sd3", "sana-sprint", ""]


def test_what_the_recipes_say_of_families_is_what_the_tests_train():
    tests = {
        "alignprop": "test_a_step_of_training",
        "grpo": "test_a_step_of_training",
        "dpo": "test_a_step_on_given_pictures",
    }
    for recipe, test in tests.items():
        assert set(FACTS[recipe].families.split()) == make_families.cases(make_families.test_every_family, test), recipe
    assert {name for facts in FACTS.values() for name in facts.families.split()} == set(FAMILIES)
