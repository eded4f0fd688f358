"""Every family is trained, by gradients, by a policy and by preferences, and searched; `test_reno_families` optimises
its noise."""

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from difftune.configs.recipes import AlignPropConfig, DPOConfig, GRPOConfig
from difftune.recipes import train
from difftune.search_runs.search import search
from rewards.simple import Brightness
from solvers.families.table import FAMILIES
from solvers.latent import LatentModel
from tests.support.families import EVERY, slow_but

BRIGHT = Brightness()
SIDE = 32
PROMPTS = ["red circle", "a blue square and a red circle"]  # which are not of one length
SHORT = {"max_train_steps": 1, "num_inference_steps": 2, "guidance_scale": 2.0, "learning_rate": 1e-2}
RECIPES = {
    "alignprop": AlignPropConfig(train_batch_size=2, truncation_max=2, **SHORT),
    "grpo": GRPOConfig(
        train_batch_size=4, gradient_accumulation_steps=1, num_images_per_prompt=2, sde_window=0, **SHORT
    ),
}


@pytest.fixture
def small(monkeypatch):
    """Pictures of 32 pixels, where a family's own size is not asked for."""
    monkeypatch.setattr(LatentModel, "size", lambda self, height=None, width=None: (height or SIDE, width or SIDE))


@pytest.fixture
def given(tmp_path):
    """Two pairs of pictures, which `labels` reads."""
    for name, colour in {"better": "red", "worse": "blue"}.items():
        Image.new("RGB", (40, 32), colour).save(tmp_path / f"{name}.png")
    rows = [{"prompt": prompt, "chosen": "better.png", "rejected": "worse.png"} for prompt in PROMPTS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "pairs.jsonl"


def test_every_family_has_a_small_pipeline():
    assert set(EVERY) == {name for name, family in FAMILIES.items() if family.encode is not None}


@pytest.mark.parametrize("name", slow_but(EVERY, "qwen", "wan", "zimage"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_of_training(small, tmp_path, name, recipe):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    pipe, told = EVERY[name]
    config = replace(RECIPES[recipe], prompts=str(tmp_path / "prompts.txt"), embedded_guidance=told)
    torch.manual_seed(0)
    ((metrics, state),) = train(config, None, pipe(), BRIGHT)
    moved = [value for key, value in state.tensors.items() if "lora_B" in key]
    assert metrics["grad_norm"] > 0 and moved and all(value.isfinite().all() for value in moved)
    assert max(value.abs().max() for value in moved) > 0


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.sampled(6)
def test_a_step_on_given_pictures(small, given, name):
    """DPO begins where the model is its own reference, at a loss of ln 2, and goes towards the better picture."""
    pipe, told = EVERY[name]
    config = DPOConfig(labels=str(given), train_batch_size=2, beta=10.0, embedded_guidance=told,
                       **{**SHORT, "max_train_steps": 2, "learning_rate": 1e-3})  # fmt: skip
    torch.manual_seed(0)
    (first, _), (second, state) = train(config, None, pipe())
    moved = [value for key, value in state.tensors.items() if "lora_B" in key]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["grad_norm"] > 0
    assert second["loss"] != first["loss"] and second["grad_norm"] > 0
    assert moved and all(value.isfinite().all() for value in moved)


@pytest.mark.parametrize("name", slow_but(EVERY, "wan"))
def test_a_search(name):
    pipe, told = EVERY[name]
    options = {"num_inference_steps": 2, "height": SIDE, "width": SIDE, "embedded_guidance": told, "progress": False}
    found = search(pipe(), PROMPTS, "fk", {"brightness": 1.0}, nfe_budget=16, **options).run()
    assert found.images.shape == (2, 3, SIDE, SIDE) and found.images.std() > 0
