import pytest
import torch

from rewards.checks import checked, finite
from rewards.compose import WeightedSum, parse_rewards, weighted
from rewards.registry import load

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


class Broken:
    """Not finite for the second prompt."""

    differentiable = True

    def __call__(self, images, prompts):
        return images.mean(dim=(1, 2, 3)) + torch.tensor([0.0, torch.nan, 0.0])


def test_weighted_sum_is_the_sum_of_its_parts():
    reward = weighted({"brightness": 0.5, "colorfulness": -2})
    brightness, colorfulness = (load(name)(IMAGES, PROMPTS) for name in reward.weights)
    torch.testing.assert_close(reward(IMAGES, PROMPTS), 0.5 * brightness - 2 * colorfulness)
    parts = reward.parts(IMAGES, PROMPTS)
    assert list(parts) == ["brightness", "colorfulness"]
    assert torch.equal(parts["brightness"], brightness) and torch.equal(parts["colorfulness"], colorfulness)


def test_sum_is_differentiable_only_if_all_members_are():
    assert weighted({"brightness": 1, "colorfulness": 1}).differentiable
    assert not weighted({"brightness": 1, "jpeg": 1}).differentiable


def test_gradient_of_the_sum_is_the_sum_of_the_gradients():
    images = IMAGES.clone().requires_grad_()
    reward = weighted({"brightness": 3.0, "colorfulness": 0.1})
    (whole,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    single = [torch.autograd.grad(load(n)(images, PROMPTS).sum(), images)[0] for n in reward.weights]
    torch.testing.assert_close(whole, 3.0 * single[0] + 0.1 * single[1])


def test_member_that_is_not_finite_is_named_with_its_prompts():
    reward = WeightedSum({"brightness": load("brightness"), "broken": Broken()}, {"brightness": 1.0, "broken": 0.0})
    with pytest.raises(ValueError, match=r"reward 'broken' is not finite for prompt 1 \('b'\)"):
        reward(IMAGES, PROMPTS)


def test_checks_name_every_index_and_pass_what_is_finite():
    scores = torch.tensor([torch.inf, 1.0, torch.nan])
    with pytest.raises(ValueError, match="reward 'x' is not finite for prompt 0, 2;"):
        checked(scores, "x")
    with pytest.raises(ValueError, match="a picture is not finite at index 0, 2 of the batch"):
        finite(scores.view(3, 1, 1, 1).expand(3, 3, 2, 2), "a picture")
    assert checked(scores[1:2], "x") is not None
    assert torch.equal(finite(IMAGES, "a picture"), IMAGES)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({}, "no reward was given"),
        ({"brightnes": 1}, r"no reward 'brightnes' \(did you mean 'brightness'\?\)"),
        ({"jpeg": float("inf")}, "the weight of reward 'jpeg' is inf, not a finite number"),
    ],
)
def test_sum_refuses(weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        weighted(weights)


def test_terms_of_the_command_line():
    terms = ["tiny-clip=0.5", "jpeg", "brightness=-1e-2"]
    assert parse_rewards(terms) == {"tiny-clip": 0.5, "jpeg": 1.0, "brightness": -0.01}


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        (["jpg"], r"no reward 'jpg' \(did you mean 'jpeg'\?\)"),
        (["jpeg="], "cannot read 'jpeg=': the weight after '=' is a finite number"),
        (["jpeg=two"], "cannot read 'jpeg=two'"),
        (["jpeg=nan"], "cannot read 'jpeg=nan'"),
        (["jpeg=1", "jpeg"], "reward 'jpeg' is given twice"),
        (["=1"], "no reward ''"),
    ],
)
def test_terms_that_cannot_be_read(terms, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        parse_rewards(terms)
    assert "\n" not in str(caught.value)
