import json

import pytest
import torch

from rewards.checks import checked, finite
from rewards.compose import (
    Clipped,
    Routed,
    ScaledSum,
    WeightedSum,
    dual_ascent,
    lagrangian,
    non_dominated,
    parse_rewards,
    seen,
    weighted,
)
from rewards.registry import load, spelled

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


def test_options_stand_in_brackets_after_the_name():
    terms = ["jpeg[quality=40]=-0.1", "brightness[target=0.25]", "symmetry[mirror=top-bottom]=2"]
    weights = parse_rewards(terms)
    assert weights == {"jpeg[quality=40]": -0.1, "brightness[target=0.25]": 1.0, "symmetry[mirror=top-bottom]": 2.0}
    parts = weighted(weights).parts(IMAGES, PROMPTS)
    assert torch.equal(parts["jpeg[quality=40]"], load("jpeg", quality=40)(IMAGES, PROMPTS))
    assert torch.equal(parts["symmetry[mirror=top-bottom]"], load("symmetry", mirror="top-bottom")(IMAGES, PROMPTS))
    parted = load("colorfulness[batch_size=2, gradient_checkpointing=True]")
    assert parted == load("colorfulness", batch_size=2, gradient_checkpointing=True) and parted.batch_size == 2
    assert torch.equal(parted(IMAGES, PROMPTS), load("colorfulness")(IMAGES, PROMPTS))
    texts = "text-exemplar[texts=['a red circle', 'a, b'], encoder=tiny-clip]"
    assert spelled(texts) == ("text-exemplar", {"texts": ["a red circle", "a, b"], "encoder": "tiny-clip"})
    assert parse_rewards([f"{texts}=3"]) == {texts: 3.0}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("jpeg[qualty=40]", r"no option of reward 'jpeg' 'qualty' \(did you mean 'quality'\?\)"),
        ("jpeg[40]", r"cannot read '40' in 'jpeg\[40\]': options are KEY=VALUE"),
        ("jpg[quality=40]", r"no reward 'jpg' \(did you mean 'jpeg'\?\)"),
        ("jpeg[batch_size=two]", "the batch size of a reward is at least 1, not 'two'"),
        ("vlm", r"reward 'vlm' needs the option 'model': write vlm\[model=...\]"),
    ],
)
def test_options_that_are_not_known_or_missing_are_named(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(name)


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


# ---------------------------------------------------------------------------------------------- one scale


def test_statistics_are_those_of_all_scores_whatever_the_batches():
    scores = torch.randn(30, generator=torch.Generator().manual_seed(0)) * 3 + 5
    statistics = None
    for batch in scores.split([7, 1, 12, 10]):
        statistics = seen(batch, statistics)
    assert statistics.number == 30
    assert statistics.mean == pytest.approx(float(scores.mean()), rel=1e-6)
    assert statistics.std == pytest.approx(float(scores.std()), rel=1e-6)


class Given:
    """Scores as they are given."""

    differentiable = True

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, images, prompts):
        return self.scores


def scaled(parts, scaling, weights=None, **more):
    weights = weights or dict.fromkeys(parts, 1.0)
    return ScaledSum({name: Given(scores) for name, scores in parts.items()}, weights, scaling, **more)


X = torch.zeros(4, 3, 2, 2), ["a", "a", "b", "b"]
PARTS = {"brightness": torch.tensor([-1.0, 0.0, -0.5, -0.25]), "jpeg": torch.tensor([100.0, 300.0, 200.0, 200.0])}


def test_rewards_are_shares_of_their_nominal_ranges():
    found = scaled(PARTS, "range", {"brightness": 2.0, "jpeg": -1.0})(*X)
    share = {"brightness": PARTS["brightness"] + 1, "jpeg": (PARTS["jpeg"] - 0.5) / 299.5}
    torch.testing.assert_close(found, 2 * share["brightness"] - share["jpeg"])
    with pytest.raises(ValueError, match="'remote' has no nominal range to be scaled by"):
        scaled({"remote": PARTS["jpeg"]}, "range")
    with pytest.raises(ValueError, match="scaled by none, range, running, group, not 'unit'"):
        scaled(PARTS, "unit")


def test_rewards_are_scaled_by_what_was_seen_before_the_step():
    """The nominal range until two scores are there; then (r - mean) / std, which does not move within a step."""
    reward = scaled({**PARTS, "unknown": torch.tensor([1.0, 2.0, 3.0, 4.0])}, "running")
    shares = (PARTS["brightness"] + 1) + (PARTS["jpeg"] - 0.5) / 299.5 + torch.arange(1.0, 5)
    for _ in range(2):
        reward.scales.listen()
        torch.testing.assert_close(reward(*X), shares)
        reward.scales.count(reward.scales.take())
    reward.scales.renew()
    own = {name: member.scores.repeat(2) for name, member in reward.rewards.items()}
    expected = sum((member.scores - own[n].mean()) / own[n].std() for n, member in reward.rewards.items())
    torch.testing.assert_close(reward(*X), expected)
    assert reward.scales.take() == {}  # it did not listen
    again = scaled({name: member.scores for name, member in reward.rewards.items()}, "running")
    again.scales.load(json.loads(json.dumps(reward.scales.state())))
    assert torch.equal(again(*X), reward(*X))


def test_rewards_are_scaled_within_the_images_of_a_prompt():
    found = scaled(PARTS, "group", {"brightness": 1.0, "jpeg": 2.0}, group=2)(*X)
    torch.testing.assert_close(found, torch.tensor([-3.0, 3.0, -1.0, 1.0]))  # the last two sizes are equal


def test_no_gradient_goes_through_a_scale():
    scores = torch.tensor([1.0, 2.0, 4.0, 4.0], requires_grad=True)
    reward = scaled({"jpeg": scores}, "running")
    reward.scales.count({"jpeg": [0.0, 4.0]})
    reward.scales.renew()
    (gradient,) = torch.autograd.grad(reward(*X).sum(), scores)
    torch.testing.assert_close(gradient, torch.full((4,), 1 / 8**0.5))


def test_clipped_reward_has_no_gradient_outside():
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.1, 0.5, 0.9)]).requires_grad_()
    reward = Clipped(load("brightness"), -0.6, -0.3)
    scores = reward(images, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor([-0.6, -0.5, -0.3]))
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.flatten(1).abs().sum(1).gt(0).tolist() == [False, True, False]
    assert reward.differentiable and not Clipped(load("jpeg"), 0).differentiable
    with pytest.raises(ValueError, match=r"a reward is clipped to \[low, high\], not to \[1, 0\]"):
        Clipped(load("jpeg"), 1, 0)


# ---------------------------------------------------------------------------------------------- several aims


def test_non_dominated_set_of_the_paper():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.2], [1.0, 0.0]])
    assert non_dominated(scores).nonzero().flatten().tolist() == [0, 1, 2, 4]  # duplicates stay


def swept(scores: torch.Tensor) -> list[bool]:
    """Two rewards by sorting: going down the first, an item stays if its second is higher than all before."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i, 0], -scores[i, 1]))
    kept, best, last = [False] * len(scores), float("-inf"), None
    for i in order:
        same = last is not None and torch.equal(scores[i], scores[last])
        kept[i] = kept[last] if same else bool(scores[i, 1] > best)
        best, last = max(best, float(scores[i, 1])), i
    return kept


@pytest.mark.parametrize("levels", [3, 1000])
def test_non_dominated_set_is_that_of_a_sorted_sweep(levels):
    for seed in range(20):
        scores = torch.randint(levels, (25, 2), generator=torch.Generator().manual_seed(seed)).float()
        assert non_dominated(scores).tolist() == swept(scores)


def test_non_dominated_set_ignores_scale_order_and_dominated_items():
    scores = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    kept = non_dominated(scores)
    assert 0 < kept.sum() < 12
    assert torch.equal(
        non_dominated(torch.stack([scores[:, 0].exp(), 5 * scores[:, 1] - 9, scores[:, 2] ** 3], 1)), kept
    )
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(non_dominated(scores[order]), kept[order])
    more = torch.cat([scores, scores[kept][:1] - 0.1])
    assert torch.equal(non_dominated(more), torch.cat([kept, torch.tensor([False])]))


def test_non_dominated_set_of_one_reward_is_its_maxima():
    assert non_dominated(torch.tensor([[1.0], [3.0], [3.0], [2.0]])).tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match=r"the scores of a batch are \(B, R\)"):
        non_dominated(torch.ones(3))


def test_dual_ascent_finds_the_constrained_optimum():
    """max -x^2 under x >= 1: x = 1 with multiplier 2, and the Lagrangian's gradient vanishes there."""
    x, multipliers = torch.zeros(1, requires_grad=True), {"floor": 0.0}
    optimiser = torch.optim.SGD([x], lr=0.1)
    for _ in range(600):
        parts = {"aim": -(x**2), "floor": x}
        optimiser.zero_grad()
        (-lagrangian(parts, "aim", {"floor": 1.0}, multipliers)).sum().backward()
        optimiser.step()
        multipliers = dual_ascent(multipliers, parts, {"floor": 1.0}, rate=0.1)
    assert x.item() == pytest.approx(1.0, abs=0.01)
    assert multipliers["floor"] == pytest.approx(2.0, abs=0.05)


def test_reward_above_its_floor_gets_no_weight():
    parts = {"aim": torch.tensor([1.0, 2.0]), "kept": torch.tensor([5.0, 6.0])}
    assert dual_ascent({"kept": 0.1}, parts, {"kept": 1.0}) == {"kept": 0.0}
    assert torch.equal(lagrangian(parts, "aim", {"kept": 1.0}, {"kept": 0.0}), parts["aim"])
    assert torch.equal(lagrangian(parts, "aim", {"kept": 1.0}, {}), parts["aim"])


def test_lagrangian_by_hand():
    """(2 + 0.5 (4 - 1) + 2.5 (3 - 5)) / (1 + 0.5 + 2.5), so that its scale stays that of a reward."""
    parts = {"aim": torch.tensor([2.0]), "a": torch.tensor([4.0]), "b": torch.tensor([3.0])}
    found = lagrangian(parts, "aim", {"a": 1.0, "b": 5.0}, {"a": 0.5, "b": 2.5})
    torch.testing.assert_close(found, torch.tensor([-0.375]))


def test_prompts_are_routed_to_their_rewards():
    bright, colorful = load("brightness"), load("colorfulness")
    reward = Routed({"^a": bright, "[bc]": colorful})
    expected = torch.cat([bright(IMAGES[:1], ["a"]), colorful(IMAGES[1:], ["b", "c"])])
    images = IMAGES.clone().requires_grad_()
    scores = reward(images, PROMPTS)
    torch.testing.assert_close(scores, expected)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    assert reward.differentiable and not Routed({"a": bright}, load("jpeg")).differentiable
    torch.testing.assert_close(Routed({"b": bright}, colorful)(IMAGES, PROMPTS)[0], colorful(IMAGES, PROMPTS)[0])
    with pytest.raises(ValueError, match="no reward is for the prompt 'd': add a route"):
        reward(IMAGES, ["a", "b", "d"])
