"""A reward that is differentiated judges as many images at a time as are decoded: one, if nothing else is said."""

import pytest

from difftune.recipes import train
from difftune.reno.optimizer import ReNO
from rewards.simple import Brightness
from tests.support import pipelines
from tests.support.toys import toy

RECIPES = ("alignprop", "adjoint-matching")


class Judge:
    """Brightness, which notes how many images it is shown with a graph."""

    differentiable = True

    def __init__(self):
        self.shown = []

    def __call__(self, images, prompts):
        assert len(images) == len(prompts)
        if images.requires_grad:
            self.shown.append(len(images))
        return Brightness()(images, prompts)


@pytest.mark.parametrize("decode_batch", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["hypernoise", *(pytest.param(n, marks=pytest.mark.slow) for n in RECIPES)])
def test_a_recipe_judges_the_images_as_they_are_decoded(name, decode_batch, tmp_path):
    config = toy(name, tmp_path, max_train_steps=1, train_batch_size=3, decode_batch=decode_batch)
    judge = Judge()
    assert len([*train(config, pipe=pipelines.sd(), reward=judge)]) == 1
    assert set(judge.shown) == {1, decode_batch} and len(judge.shown) >= 3 // decode_batch


def test_an_optimised_noise_is_judged_alone():
    judge = Judge()
    ReNO(pipelines.sd(), judge, progress=False).optimize(["red", "blue", "red"], 2)
    assert set(judge.shown) == {1} and len(judge.shown) >= 3
