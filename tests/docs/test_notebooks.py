"""The notebooks of examples/ run from top to bottom, and say what changes for a real model."""

import ast
import runpy
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
NAMES = [file.stem for file in FILES]


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_cells_are_marked_and_real_models_are_named(file):
    text = file.read_text()
    ast.parse(text)
    assert text.startswith("# %% [markdown]\n# # ") and text.count("# %%\n") >= 3
    end = text[text.index("## On a real model") :]
    assert all(name in end for name in ("stable", "-xl-" if "xl-base" in end else "sdxl", "FLUX.1"))
    assert f"`{file.name}`" in (file.parent / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_notebook_runs(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(file), run_name="__main__")
