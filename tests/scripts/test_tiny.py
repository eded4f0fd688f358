"""The embedded models keep what they promise, on samples small enough for every run; `slow` measures in full."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from difftune import models
from difftune.evaluation import shapeeval
from difftune.pipelines.generate import Sampling, generate_batches
from guidance.attach import attach
from guidance.methods.catalogue import CFG, GUIDANCE
from rewards.registry import load
from rewards.world import draw
from solvers.levels import levels_of

ROOT = Path(__file__).parents[2]
SCALE = 2.0


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_tiny", ROOT / "scripts/check_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def score(model, guidance, steps, per_category, images=1):
    entries = shapeeval.entries_of(per_category)
    found = shapeeval.evaluate(models.load(model), guidance, entries, images, steps, 0, 30)
    return {name: e.score for name, e in shapeeval.scores(found.results).items()}


def test_plain_from_pretrained_works():
    """Stored in float16, loaded and run in float32 without a single option."""
    pipe = StableDiffusionPipeline.from_pretrained(models.path("tiny"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32
    assert pipe("a red circle", num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_every_word_of_the_grammar_is_one_token():
    tokenizer = models.load("tiny").tokenizer
    for entry in draw.shapeeval():
        assert len(tokenizer(entry["prompt"]).input_ids) == len(entry["prompt"].split()) + 2


def test_the_weights_stay_small():
    files = [f for folder in ("difftune/weights", "rewards/weights") for f in (ROOT / folder).rglob("*")]
    assert sum(f.stat().st_size for f in files if f.is_file()) < 40e6


def test_text_encoder_is_told_to_load_in_float32():
    config = json.loads((models.path("tiny") / "text_encoder/config.json").read_text())
    assert config["dtype"] == "float32"


@pytest.mark.slow
def test_oracle_survives_the_vae(check):
    images, captions, scenes = check.scenes(200)
    found = check.accepts(check.through_vae(images), captions, scenes)
    assert found["true"] >= 0.99
    assert found["one_word_wrong"] <= 0.01


@pytest.mark.slow
def test_guidance_makes_tiny_follow_its_captions():
    guided, free = (score("tiny", method, 15, 30) for method in (CFG(SCALE), GUIDANCE["none"]()))
    assert guided["overall"] >= free["overall"] + 0.05
    assert guided["overall"] >= 0.75
    assert guided["colors"] >= 0.9
    assert guided["position"] >= 0.75


@pytest.mark.slow
def test_turbo_follows_captions_in_four_steps():
    assert score("tiny-turbo", GUIDANCE["none"](), 4, 30)["overall"] >= 0.63


def test_flow_follows_captions_and_its_levels_go_from_noise_to_data():
    pipe = models.load("tiny-flow")
    first, *_, last = levels_of(pipe.scheduler, 10)
    assert (float(first.alpha), float(first.sigma)) == pytest.approx((0, 1), abs=1e-3)
    assert (float(last.alpha), float(last.sigma)) == (1, 0)
    assert score("tiny-flow", CFG(2.0), 15, 5)["overall"] >= 0.6


def test_attached_cfg_is_the_stock_pipeline_of_a_flow_model():
    pipe = models.load("tiny-flow")
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red circle", "num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "pt"}
    stock = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    with attach(pipe, CFG(2.0)):
        guided = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(guided, stock)


def test_clip_ranks_the_true_caption_first(check):
    assert check.ranked_first(100) >= 0.8


def test_auc_is_the_chance_of_the_right_order(check):
    scores, holds = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True])
    assert check.auc(scores, holds) == 3.5 / 4
    assert check.auc(-scores, holds) == 0.5 / 4
    assert check.auc(scores, np.array([True] * 4)) is None


def test_clip_gradient_reaches_the_pixels():
    images = next(
        generate_batches(models.load("tiny-turbo"), ["a red circle"], [0], GUIDANCE["none"](), Sampling(1))
    ).images
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(load("tiny-clip")(images, ["a blue circle"]).sum(), images)
    assert gradient.abs().sum() > 0


def test_classifier_knows_colour_and_shape(check):
    assert check.classified(200) >= 0.97


@pytest.mark.slow
def test_everything_in_full(check):
    oracle = check.oracle(2000)
    assert min(part["true"] for part in oracle.values()) >= 0.995
    assert max(part["one_word_wrong"] for part in oracle.values()) <= 0.005
    assert check.ranked_first(1000) >= 0.83
    assert score("tiny-turbo", GUIDANCE["none"](), 1, 30, 4)["overall"] >= 0.4
    found = check.shapeeval([check.Row("tiny", w, 4) for w in (1.0, SCALE)], 1)  # what the docs' rows are made of
    assert list(found) == ["tiny, shapeeval, none, 4 steps", "tiny, shapeeval, cfg 2, 4 steps"]
    assert "gain" in found["tiny, shapeeval, cfg 2, 4 steps"]
