"""docs/reno.md: its Python runs as it stands, and it names every choice that there is."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from difftune.reno.named import OPTIMIZERS
from difftune.reno.optimizer import ReNO
from difftune.reno.paper import PAPER, setting_of
from difftune.reno.regularizers import REGULARIZERS
from tests.support import pipelines

PAGE = (Path(__file__).parents[3] / "docs" / "reno.md").read_text()
FOUND = re.findall(r"^(<!-- not run[^\n]*\n)?```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
BLOCKS = [block for not_run, block in FOUND if not not_run]


NAMES = ["intro", "prompts", "steps", "edit"]
MODEL = re.compile(r'load_model\("tiny(?:-turbo)?"\)(,?)  # or ("stabilityai/sd-turbo")')


def executed(block: str) -> dict:
    scope: dict = {}
    exec(compile(block, "docs/reno.md", "exec"), scope)
    best = scope["best"]
    assert (best.rewards >= best.rewards_before).all() and best.images.isfinite().all()
    return scope


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_the_examples_run_as_they_stand(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    executed(block)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_the_same_lines_run_with_the_model_id_of_sd_turbo(block, tmp_path, monkeypatch, capsys):
    """The id changed and nothing else; a random checkpoint of its layout lies where the id is looked up first."""
    monkeypatch.chdir(tmp_path)
    pipelines.sd_turbo().save_pretrained("stabilityai/sd-turbo")
    changed, count = MODEL.subn(r"load_model(\2)\1", block)
    assert count == block.count("load_model(") == 1
    scope = executed(changed)
    best, pipe = scope["best"], scope["pipe"] if "pipe" in scope else scope["reno"].pipe
    assert best.images.shape[1:] == (3, 512, 512) and best.noises.shape[1:] == (4, 64, 64)
    assert setting_of(pipe, None) is PAPER["sd-turbo"] and (best.rewards > best.rewards_before).any()
    if 'load_model("tiny-turbo' in block:  # one step: the pipeline's own call makes the picture again
        call = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "pt"}
        again = pipe(best.prompts, latents=best.noises, **call).images
        assert torch.allclose(again, best.images, atol=1e-3)


def test_every_choice_is_on_the_page():
    names = {*OPTIMIZERS, *REGULARIZERS, *PAPER, *(f.name for f in fields(ReNO) if f.repr), "prompt", "both"}
    names -= {"pipe", "reward", "progress", "timesteps"}
    assert not [name for name in names if f"`{name}`" not in PAGE]
