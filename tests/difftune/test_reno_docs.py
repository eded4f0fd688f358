"""docs/reno.md: its Python runs as it stands, and it names every choice that there is."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from difftune.noise_named import OPTIMIZERS
from difftune.regularize import REGULARIZERS
from difftune.reno import ReNO
from difftune.reno_settings import PAPER

PAGE = (Path(__file__).parents[2] / "docs" / "reno.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["intro", "prompts", "steps", "edit"])
def test_the_examples_run_as_they_stand(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(block, "docs/reno.md", "exec"), scope)
    best = scope["best"]
    assert (best.rewards >= best.rewards_before).all() and best.images.isfinite().all()


def test_every_choice_is_on_the_page():
    names = {*OPTIMIZERS, *REGULARIZERS, *PAPER, *(f.name for f in fields(ReNO)), "prompt", "both"}
    names -= {"pipe", "rewards", "progress", "timesteps"}
    assert not [name for name in names if f"`{name}`" not in PAGE]
