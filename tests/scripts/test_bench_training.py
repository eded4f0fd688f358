"""scripts/bench_training.py on the embedded model: every row is there, and nothing stays replaced."""

from dataclasses import replace

import pytest
import torch

from difftune.configs.recipes import AlignPropConfig, DDPOConfig
from difftune.pipelines import engine
from difftune.recipes import RECIPES, check_recipe
from difftune.training import steps
from rewards.simple import Brightness
from tests.support import pipelines
from tests.support.benches import script


@pytest.fixture(scope="module")
def bench():
    with script("bench_training") as module:
        yield module


@pytest.mark.slow
@pytest.mark.sampled(2)
def test_a_row_for_a_recipe_with_and_without_block_checkpointing(bench, capsys):
    usual = engine.verdict
    bench.measure(["alignprop"], steps=1, small=True)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[:3] for row in rows] == [
        ["alignprop", "sdpa", "no"],
        ["alignprop", "sdpa", "yes"],
    ]
    assert all(float(row[3]) > 0 for row in rows) and engine.verdict is usual


class Ticking(torch.autograd.Function):
    """Means of images: 100 ticks, and 1000 on the way back."""

    @staticmethod
    def forward(ctx, images, ticks):
        ctx.ticks, ctx.shape = ticks, images.shape
        ticks[0] += 100
        return images.mean((1, 2, 3))

    @staticmethod
    def backward(ctx, gradient):
        ctx.ticks[0] += 1000
        return gradient.view(-1, 1, 1, 1).expand(ctx.shape) / ctx.shape[1:].numel(), None


@pytest.mark.parametrize(
    ("config", "spent"),
    [
        (
            AlignPropConfig(truncation_min=2),
            {"network": 2 * 2 + 2, "decoder": 40, "reward": 200 + 2000, "text": 2 * 20_000},
        ),
        (
            DDPOConfig(num_images_per_prompt=2),
            {"network": 2 + 2 * 2, "decoder": 2 * 10, "reward": 100, "text": 20_000},  # one prompt
        ),
    ],
)
def test_the_time_of_a_step_is_told_by_part(bench, config, spent, monkeypatch):
    """A clock of ticks: one for a call of the network and one on the way back through its last layer, ten for one of
    the decoder, 10,000 for one of the text encoder. Two images in two steps, recomputed on the way back, one image at a
    time from the decoder on; each prompt with the empty one."""
    pipe, ticks, usual = pipelines.sd(), [0], steps.differentiate
    monkeypatch.setattr(bench, "clock", lambda: ticks[0])

    def tick(count):
        return lambda *arguments: ticks.__setitem__(0, ticks[0] + count)

    def on_the_way_back(module, args):
        if args[0].requires_grad:
            args[0].register_hook(tick(1))

    pipe.unet.conv_in.register_forward_pre_hook(tick(1))
    pipe.unet.conv_out.register_forward_pre_hook(on_the_way_back)
    pipe.vae.decoder.conv_in.register_forward_pre_hook(tick(10))
    pipe.text_encoder.get_input_embeddings().register_forward_pre_hook(tick(10_000))

    class Reward:
        differentiable = True

        def __call__(self, images, prompts):
            return Ticking.apply(images, ticks)

    monkeypatch.setattr(bench, "reward_named", lambda *arguments, **more: Reward())
    small = {"prompts": "animals", "train_batch_size": 2, "num_inference_steps": 2}
    found = bench.shares_of_a_step(pipe, bench.replace(config, **small), rounds=1)
    assert found == {**spent, "rest": 0.0}
    assert steps.differentiate is usual
    assert not pipe.unet._forward_pre_hooks and not pipe.vae.decoder._forward_hooks


def test_the_examples_are_what_is_timed_small(bench):
    config = bench.example("ddpo")
    assert isinstance(config, DDPOConfig) and config.train_batch_size == 32 and config.model == "tiny"


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_settings_at_the_large_size_that_hold_together(bench, name, gpu):
    config = bench.large(name, gpu)
    check_recipe(replace(config, mixed_precision="no"))
    assert config.train_batch_size * config.num_inference_steps == (40 if gpu else 8)


@pytest.mark.slow
def test_a_row_of_shares_for_every_recipe_at_the_large_size(bench, capsys, monkeypatch):
    monkeypatch.setattr(bench, "large_model", lambda gpu: pipelines.sd())
    monkeypatch.setattr(bench, "TimedReward", lambda reward, parts: Brightness())
    monkeypatch.setattr(bench, "reward_named", lambda names, gradient: None)
    bench.tell_where(RECIPES, 1, small=False)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["recipe", *RECIPES]
    for _, seconds, network, *_ in rows[1:]:
        assert float(seconds) > 0 and float(network.rstrip("%")) > 0
