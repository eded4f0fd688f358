"""solvers <- guidance, rewards alone, difftune on top of all: nobody imports upwards."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "solvers": {"solvers"},
    "guidance": {"guidance", "solvers"},
    "rewards": {"rewards"},
    "difftune": {"difftune", "guidance", "rewards", "solvers"},
}


def imported(file: Path) -> set[str]:
    """The top-level packages that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_what_lies_below_it(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    upwards = {str(f.relative_to(ROOT)): imported(f) & set(MAY_IMPORT) - MAY_IMPORT[package] for f in files}
    assert not {file: names for file, names in upwards.items() if names}


def test_imports_are_found_wherever_they_are(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import torch.nn as nn\ndef f():\n    from difftune.models import path\n    import rewards.learned.clip\n"
    )
    assert imported(file) == {"torch", "difftune", "rewards"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_is_typed_and_says_whose_it_is(package):
    assert (ROOT / package / "py.typed").is_file()
    assert '__distribution__ = "difftune"' in (ROOT / package / "__init__.py").read_text()
