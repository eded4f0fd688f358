"""The smoothed reward: by hand, as an identity, and through the command line's spelling."""

import pytest
import torch

from difftune.lookup import reward_weights
from rewards.compose import parse_rewards, weighted
from rewards.registry import entry, load, spelled
from rewards.wrappers.smoothed import Smoothed, View

IMAGES = torch.rand(3, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red circle", "a red circle left of a blue square", 'a sign that says "stop"']


class Weighted:
    """sum of weights times squared pixels: it knows where a pixel is."""

    differentiable = True
    weights = torch.rand(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def __call__(self, images, prompts):
        return (self.weights * images**2).sum(dim=(1, 2, 3))


def moved(image: torch.Tensor, view: View) -> torch.Tensor:
    """Pixel by pixel, (3, H, W)."""
    height, width = image.shape[1:]
    made = torch.empty_like(image)
    for y in range(height):
        for x in range(width):
            row, column = min(max(y - view.down, 0), height - 1), min(max(x - view.right, 0), width - 1)
            made[:, y, x] = image[:, row, width - 1 - column if view.mirrored else column]
    return made


def test_mean_of_the_shifted_rewards_by_hand():
    smoothed = Smoothed(Weighted(), shifts=4, pixels=2, seed=3)
    views = smoothed.views()
    assert len({view[:2] for view in views}) == 4 and all(max(abs(v.down), abs(v.right)) <= 2 for v in views)
    expected = [sum(Weighted()(moved(image, view)[None], [""])[0] for view in views) / 4 for image in IMAGES]
    torch.testing.assert_close(smoothed(IMAGES, PROMPTS), torch.stack(expected))


def test_gradient_is_the_mean_of_the_gradients():
    smoothed, images = Smoothed(Weighted(), shifts=3, pixels=1), IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(smoothed(images, PROMPTS).sum(), images)
    one_by_one = []
    for view in smoothed.views():
        scores = Weighted()(torch.stack([moved(image, view) for image in images]), PROMPTS)
        one_by_one.append(torch.autograd.grad(scores.sum(), images)[0])
    torch.testing.assert_close(gradient, sum(one_by_one) / 3)


@pytest.mark.parametrize("seed", [0, None])
def test_one_view_that_is_not_moved_is_the_reward(seed):
    images, reward = IMAGES.float(), load("colorfulness")
    assert torch.equal(Smoothed(reward, 1, 0, seed=seed)(images, PROMPTS), reward(images, PROMPTS))


def test_all_views_give_each_shift_once_and_with_flips_its_mirror_image_too():
    offsets = {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    assert {view[:2] for view in Smoothed(Weighted(), 9, 1).views()} == offsets
    both = {view[:3] for view in Smoothed(Weighted(), 18, 1, flips=True).views()}
    assert both == {(*offset, mirrored) for offset in offsets for mirrored in (False, True)}


def test_prompts_with_sides_or_text_are_not_mirrored():
    smoothed = Smoothed(Weighted(), 2, 0, flips=True)
    assert [view[:3] for view in smoothed.views()] == [(0, 0, False), (0, 0, True)]
    still, mirrored = Weighted()(IMAGES, PROMPTS), Weighted()(IMAGES.flip(3), PROMPTS)
    expected = torch.stack([(still[0] + mirrored[0]) / 2, still[1], still[2]])
    torch.testing.assert_close(smoothed(IMAGES, PROMPTS), expected)


def test_scores_of_a_seed_repeat_and_do_not_depend_on_the_batch():
    smoothed = Smoothed(Weighted(), 4, 2, noise=0.1, flips=True, seed=5)
    scores = smoothed(IMAGES, PROMPTS)
    alone = [smoothed(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), scores, rtol=1e-12, atol=0)
    assert not torch.allclose(Smoothed(Weighted(), 4, 2, noise=0.1, seed=6)(IMAGES, PROMPTS), scores)


def test_without_a_seed_views_are_drawn_anew_from_the_global_generator():
    smoothed = Smoothed(Weighted(), 4, 2, seed=None)
    torch.manual_seed(0)
    first, second = smoothed(IMAGES, PROMPTS), smoothed(IMAGES, PROMPTS)
    torch.manual_seed(0)
    assert torch.equal(smoothed(IMAGES, PROMPTS), first) and not torch.equal(first, second)


def test_noise_has_its_deviation_and_keeps_to_the_range():
    """100 views of gray are 0.5 + 0.1 eps; those of white are clipped at 1, E min(0, eps) = -1 / sqrt(2 pi)."""

    class Mean:
        differentiable = True

        def __call__(self, images, prompts):
            assert images.min() >= 0 and images.max() <= 1
            return images.mean(dim=(1, 2, 3))

    class Variance(Mean):
        def __call__(self, images, prompts):
            return images.var(dim=(1, 2, 3))

    images = torch.stack([torch.full((3, 32, 32), 0.5), torch.ones(3, 32, 32)]).double()
    mean, variance = (Smoothed(of(), 100, 0, noise=0.1)(images, ["", ""]) for of in (Mean, Variance))
    torch.testing.assert_close(mean, torch.tensor([0.5, 1 - 0.1 / (2 * torch.pi) ** 0.5]).double(), rtol=0, atol=5e-4)
    torch.testing.assert_close(
        variance, torch.tensor([0.01, 0.01 * (0.5 - 0.5 / torch.pi)]).double(), rtol=0.01, atol=0
    )


# ---------------------------------------------------------------------------------------------- by its name


def test_name_with_another_name_inside():
    assert spelled("smooth[reward=vlm[model=x,yes=1],shifts=4]") == (
        "smooth",
        {"reward": "vlm[model=x,yes=1]", "shifts": 4},
    )
    twice = "smooth[shifts=2, reward=smooth[reward=jpeg[quality=40], pixels=1], noise=0.1]"
    inner = spelled(twice)[1]["reward"]
    assert inner == "smooth[reward=jpeg[quality=40], pixels=1]" and spelled(inner)[1]["reward"] == "jpeg[quality=40]"
    texts = "text-exemplar[texts=['a [b', 'c, d=e'], encoder=tiny-clip]"
    assert spelled(texts)[1] == {"texts": ["a [b", "c, d=e"], "encoder": "tiny-clip"}
    term = "smooth[reward=brightness[target=0.25],shifts=4,pixels=3]"
    assert parse_rewards([f"{term}=0.5", "jpeg"]) == {term: 0.5, "jpeg": 1.0}
    made = weighted({term: 2.0}).rewards[term]
    assert made == Smoothed(load("brightness", target=0.25), 4, 3)


def test_facts_are_those_of_the_reward_inside():
    assert entry("smooth[reward=pickscore]").range == entry("pickscore").range
    assert not entry("smooth[reward=symmetry]").needs_prompt and entry("smooth[reward=oracle]").needs_prompt
    assert reward_weights(["smooth[reward=tiny-clip]"], gradient=True) == {"smooth[reward=tiny-clip]": 1.0}
    with pytest.raises(ValueError, match=r"reward 'smooth\[reward=oracle\]' is not differentiable"):
        reward_weights(["smooth[reward=oracle]"], gradient=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("", r"reward 'smooth' needs the option 'reward': write smooth\[reward=...\]"),
        ("[reward=tiny-clp]", r"no reward 'tiny-clp' \(did you mean 'tiny-clip'\?\)"),
        ("[reward=brightness[targt=1]]", r"no option of reward 'brightness' 'targt'"),
        ("[reward=jpeg[quality=40]", r"the brackets of 'jpeg\[quality=40' in 'smooth\[reward=jpeg\[quality=40\]' do"),
        ("[reward=brightness, shifts=0]", "shifts of a smoothed reward is a whole number of 1 or more, not 0"),
        ("[reward=brightness, pixels=1.5]", "pixels of a smoothed reward is a whole number of 0 or more, not 1.5"),
        ("[reward=brightness, seed=-1]", "seed of a smoothed reward is a whole number of 0 or more, not -1"),
        ("[reward=brightness, noise=-1]", "noise of a smoothed reward is a deviation of 0 or more, not -1"),
        ("[reward=brightness, flips=yes]", "flips of a smoothed reward is True or False, not 'yes'"),
        ("[reward=brightness, pixels=0]", "4 shifts of at most 0 pixels are only 1 different views"),
    ],
)
def test_what_cannot_be_is_named_in_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        load(f"smooth{options}")
    assert "\n" not in str(caught.value)


def test_shift_must_leave_something_of_the_picture():
    with pytest.raises(ValueError, match="a shift of 5 pixels leaves nothing of a picture of 5 x 6"):
        Smoothed(Weighted(), 4, 5)(IMAGES, PROMPTS)
