"""Surrogate gradients in training: what is drawn for each optimiser step, and what is refused."""

import random
from collections import Counter

import pytest
import torch

from difftune.recipes import check_recipe, train
from difftune.recipes.drtune import spread_steps
from difftune.recipes.reward_gradient import count_carrying
from difftune.recipes.surrogates import SURROGATES, DirectAlign, FlowBP, LeapAlign, surrogate_named
from rewards.simple import Brightness
from solvers.noise import flow, grid
from tests.support import dits, pipelines
from tests.support.toys import toy

LEVELS = grid(flow, 10)


def drawn(surrogate, count=2000, step=0):
    return [surrogate.draw(random.Random(i), LEVELS, step) for i in range(count)]


def test_flowbp_draws_steps_without_replacement_and_the_later_ones_more():
    """The first of one step is i with probability (i + 1) / 55; the scale is for what is left out."""
    found = drawn(FlowBP(active=1, rho=1.0))
    masks = [mode.split(":")[1].split(",")[0] for mode in found]
    assert {mask.count("1") for mask in masks} == {1}
    share = Counter(mask.index("1") for mask in masks)
    for i in range(10):
        p = (i + 1) / 55
        assert abs(share[i] / 2000 - p) < 4.5 * (p * (1 - p) / 2000) ** 0.5
    assert all(mode.split(",")[1] == "10:held" for mode in found)  # one step of ten
    assert FlowBP(active=99).draw(random.Random(0), LEVELS) == "truncated:1111111111,1:held"
    scaled = FlowBP(active=2, rho=0.5).draw(random.Random(0), LEVELS)
    assert scaled.endswith(",3:held")  # 1 + .5 (1 / .2 - 1)


def test_a_bridge_is_among_the_steps_and_its_count_is_split_by_length():
    for mode in drawn(FlowBP(active=5, alpha=0.5, rho=0.0), 300):
        mask, scale, join, alpha = mode.removeprefix("truncated:").removesuffix(":bridge").split(",")
        assert mask[int(join)] == "1" and 1 <= mask.count("1") <= 5 and (scale, alpha) == ("1", "0.5")
    assert len({mode.split(",")[2] for mode in drawn(FlowBP(alpha=0.5), 300)}) == 9  # the later of two of ten


def test_leaps_are_any_two_steps():
    found = Counter(mode.split(":")[1] for mode in drawn(LeapAlign(), 3000))
    assert len(found) == 45 and all(name.endswith(",0.3,0.1") for name in found)


def test_direct_align_goes_up_and_down_by_turns_between_the_levels_that_are_let():
    """Every second optimiser step goes up, with the reward against it. The first and the last level are left out."""
    down = {mode.split(":")[1] for mode in drawn(DirectAlign(), step=1)}
    assert down == {f"{i},{i + 1}" for i in range(1, 9)} == {mode.split(":")[1] for mode in drawn(DirectAlign(up=0))}
    assert {mode.split(":")[1] for mode in drawn(DirectAlign())} == {f"{i},{i - 1},-1" for i in range(2, 10)}
    few = DirectAlign(lowest=0.35, highest=0.75)  # t is .7, .6, .5 and .4 there
    assert {mode.split(":")[1] for mode in drawn(few, step=1)} == {f"{i},{i + 1}" for i in range(3, 7)}
    every = DirectAlign(up=3)
    assert ["-1" in every.draw(random.Random(0), LEVELS, step) for step in range(6)] == [True, False, False] * 2
    with pytest.raises(
        ValueError, match="direct-align has no level of the run between lowest, 0.95, and highest, 0.99"
    ):
        drawn(DirectAlign(lowest=0.95), 1)


def test_drtune_draws_its_offset_anew_and_trains_every_step_alike(tmp_path):
    modes = spread_steps(toy("drtune", tmp_path, num_inference_steps=10, truncation_steps=4))
    masks = [modes.of(step).split(":")[1] for step in range(2000)]
    assert {mask.count("1") for mask in masks} == {4} and len(set(masks)) > 3
    for i in range(10):
        share = sum(mask[i] == "1" for mask in masks) / 2000
        assert abs(share - 0.4) < 4.5 * (0.24 / 2000) ** 0.5
    for mask in set(masks):  # evenly spaced: 2 or 3 apart
        places = [i for i, digit in enumerate(mask) if digit == "1"]
        assert {b - a for a, b in zip(places[:-1], places[1:], strict=True)} <= {2, 3}
    whole = spread_steps(toy("drtune", tmp_path, num_inference_steps=3, truncation_steps=5))
    assert whole.of(7) == "truncated:111:held"


@pytest.mark.parametrize(
    ("mode", "count"),
    [
        ("0110:held", 2),
        ("0111,1.5:held", 3),
        ("0110,1,2,0.5:bridge", 2),
        ("0,2,0.3:leap", 2),
        ("2,3:direct", 1),
        ("3,2,-1:direct", 1),
    ],
)
def test_steps_that_carry_gradient(mode, count):
    assert count_carrying(f"truncated:{mode}", 4) == count


NAMES = ["flowbp[active=2]", "flowbp[active=2,alpha=0.5]", "leapalign[alpha=0.5]", "direct-align"]


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_is_drawn_by_the_seed(name, tmp_path):
    config = toy("alignprop", tmp_path, gradient=name, guidance="none", num_inference_steps=4, max_train_steps=2)
    said: list[str] = []
    ends = [list(train(config, None, dits.sd3(), Brightness(), said.append)) for _ in range(2)]
    for (metrics, one), (_, two) in zip(*ends, strict=True):
        assert metrics["grad_norm"] > 0 and metrics["K"] in (1, 2)
        assert all(torch.equal(value, two.tensors[key]) for key, value in one.tensors.items())
    assert any(line.startswith(f"gradient: {type(surrogate_named(name)).__name__}(") for line in said)


@pytest.mark.parametrize("name", NAMES[1:3])
def test_a_memory_budget_and_a_network_of_eps_work_too(name, tmp_path):
    more = {"gradient": name, "memory_budget": "1GiB", "num_inference_steps": 4, "max_train_steps": 1}
    ((metrics, _),) = train(toy("alignprop", tmp_path, **more), None, pipelines.sd(), Brightness())
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"gradient": "leapalign[alpah=1]"}, "option of leapalign 'alpah'"),
        ({"gradient": "flowbp[active=0]"}, "active is 0"),
        ({"gradient": "leapalign[alpha=2]"}, "alpha is 2"),
        ({"gradient": "leapalign[tau=0]"}, "tau is 0"),
        ({"gradient": "direct-align[highest=0.1]"}, "direct-align has no level of the run"),
        ({"gradient": "direct-align", "num_inference_steps": 2}, "num_inference_steps is 2: it must be at least 3"),
        ({"gradient": "leapalign", "sampler": "heun"}, "is of Euler's steps, not of 'heun'"),
        ({"gradient": "leepalign"}, "no gradient mode 'leepalign'"),
    ],
)
def test_bad_settings_are_one_sentence(more, what, tmp_path):
    with pytest.raises(ValueError, match=what) as error:
        check_recipe(toy("alignprop", tmp_path, **more))
    assert "\n" not in str(error.value)


def test_every_surrogate_is_listed():
    assert set(SURROGATES) == {"flowbp", "leapalign", "direct-align"}
