"""What a person can put right is said by our own errors: the command line tells them by their class."""

import ast
from pathlib import Path

import pytest

from difftune.errors import ERRORS, DiskError, RunError, UserError
from rewards.errors import ExtraMissing, NotFinite, RewardError, Unreachable, WeightsMissing

ROOT = Path(__file__).parent.parent
PACKAGES = ("difftune", "guidance", "rewards", "solvers")
MEANT_FOR_PEOPLE = {"ValueError", "OSError", "FileNotFoundError", "ImportError", "ModuleNotFoundError"}
INTERNAL = {  # caught where they are raised, or raised before there is a command line
    ("difftune/__init__.py", "ImportError"),
    ("difftune/evaluation/prompt_lists.py", "ValueError"),
    ("difftune/files/output.py", "OSError"),
    ("difftune/labelling/label_file.py", "OSError"),
}


def raised(file: Path) -> set[str]:
    """The names of the classes that a file raises."""
    calls = [node.exc for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Raise)]
    return {call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_raises_a_builtin_in_place_of_our_error(package):
    files = sorted((ROOT / package).rglob("*.py"))
    found = {(str(f.relative_to(ROOT)), name) for f in files for name in raised(f) & MEANT_FOR_PEOPLE}
    assert found <= INTERNAL


def test_every_error_of_ours_has_a_base_and_an_exit_code():
    asked = (UserError, RewardError)
    ran = (RunError, DiskError, NotFinite, WeightsMissing, Unreachable, ExtraMissing)
    assert {kind.exit_code for kind in asked} == {2} and {kind.exit_code for kind in ran} == {1}
    assert all(str(kind("one sentence")) == "one sentence" and issubclass(kind, ERRORS) for kind in (*asked, *ran))
