"""The modes that are exact for the same sampler train alike."""

from dataclasses import replace

import pytest
import torch

from difftune.configs.recipes import AlignPropConfig
from difftune.models import load
from difftune.recipes import train
from rewards.simple import Brightness
from tests.support import pipelines

EXACT = ["checkpoint", "revolve:2", "adjoint:exact_endpoint"]
CONFIG = AlignPropConfig(max_train_steps=4, train_batch_size=2, num_inference_steps=4, learning_rate=1e-2)


def curve(gradient, pipe, reward=None) -> torch.Tensor:
    config = replace(CONFIG, gradient=gradient)
    return torch.tensor([metrics["loss"] for metrics, _ in train(config, None, pipe, reward)], dtype=torch.float64)


@pytest.fixture(scope="module")
def full():
    return curve("full", pipelines.sd(), Brightness())


@pytest.mark.parametrize("gradient", EXACT)
def test_exact_modes_give_the_same_loss_curve(full, gradient):
    """On a random pipeline; from update to update the loss moves far more than the tolerance."""
    found = curve(gradient, pipelines.sd(), Brightness())
    assert (found - full).abs().max() <= 1e-5
    assert (full[1:] - full[:-1]).abs().max() > 1e-3


@pytest.mark.slow
def test_exact_modes_give_the_same_loss_curve_on_tiny():
    """tiny, and tiny-clip as the reward."""
    curves = {gradient: curve(gradient, load("tiny")) for gradient in ("full", *EXACT)}
    for gradient in EXACT:
        assert (curves[gradient] - curves["full"]).abs().max() <= 1e-5, gradient
    assert (curves["full"][-1] - curves["full"][0]).abs() > 1e-3
