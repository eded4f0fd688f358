"""The page of the families says what the tests' tables say."""

from pathlib import Path

from scripts import make_families
from solvers.families.table import FAMILIES

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text()


def test_the_tables_are_those_of_the_tests():
    assert make_families.block() in PAGE, "the families have changed: run python scripts/make_families.py"


def test_every_use_of_every_family_is_tested():
    for use, families in make_families.uses().items():
        assert families >= set(FAMILIES), use


def test_a_case_of_the_tests_tells_its_family():
    found = [make_families.family_named(case) for case in ("flux2-klein", "flux-dev", "sd3.5", "sana-sprint", "lcm")]
    assert found == ["flux2", "flux", "sd3", "sana-sprint", ""]
