"""Rewards as the Python calls take them: a name, several, weights, or a function."""

import pytest
import torch

from difftune.errors import UserError
from difftune.lookup import guidance_named, reward_named
from rewards.errors import RewardError

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def red(images, prompts):
    return images[:, 0].mean(dim=(1, 2))


def a_list(images, prompts):
    return [0.0 for _ in images]


def without_gradient(images, prompts):
    return images[:, 0].detach().mean(dim=(1, 2))


@pytest.mark.parametrize(("name", "meant"), [("CFG++", "cfgpp"), ("mambo_g", "mambo-g"), ("APG", "apg")])
def test_another_spelling_is_told_the_name(name, meant):
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        guidance_named(name)


def test_one_name_is_one_reward():
    assert reward_named("saturation=0.5").weights == {"saturation": 0.5}


def test_a_function_is_a_reward_under_its_name():
    """Whether a gradient reaches the picture is tried, if the function does not say."""
    reward = reward_named(red)
    assert reward.weights == {"red": 1.0} and reward.differentiable
    assert torch.equal(reward(IMAGES, ["a", "b"]), red(IMAGES, []))
    assert not reward_named(without_gradient, gradient=False).differentiable


def test_what_is_no_reward_is_said_in_one_sentence():
    with pytest.raises(RewardError, match="the reward 'a_list' gives a list for 1 image; a reward is a function of"):
        reward_named(a_list)
    with pytest.raises(RewardError, match="the reward '<lambda>' cannot be called with images and prompts"):
        reward_named(lambda images: images)
    with pytest.raises(UserError, match="reward 'without_gradient' is not differentiable"):
        reward_named(without_gradient)
