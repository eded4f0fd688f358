"""Rewards of a set that changes by one item: the family's properties, and DRAGON's greedy swap."""

import itertools

import pytest
import torch

from rewards.sets.catalogue import MMD, SETS, Frechet, Mean, greedy_swap
from rewards.sets.frechet import frechet
from rewards.sets.mmd import mmd
from rewards.sets.vendi import vendi


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EXEMPLARS = features(20, 3, seed=9) + 0.5
MADE = {
    "frechet": (Frechet(EXEMPLARS), lambda x: -frechet(x, EXEMPLARS, 0.1)),
    "mmd": (MMD(EXEMPLARS), lambda x: -mmd(x, EXEMPLARS)),
    "vendi": (SETS["vendi"](), vendi),
    "mean": (Mean(), lambda x: x.mean()),
}


def sets(name: str, *shape: int) -> torch.Tensor:
    """Features of the width that the reward takes."""
    return features(*shape, 1 if name == "mean" else 3)


def test_whole_family_is_tested():
    assert MADE.keys() == SETS.keys()


@pytest.mark.parametrize("name", SETS)
def test_value_is_the_measures(name):
    reward, measure = MADE[name]
    x = sets(name, 8)
    torch.testing.assert_close(reward.value(reward.begin(x)), measure(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(reward.value(reward.begin(x.flip(0))), measure(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SETS)
def test_replacing_items_is_beginning_anew(name):
    reward, measure = MADE[name]
    x, new = sets(name, 8), sets(name, 30) + 1
    of = reward.begin(x)
    for i, item in enumerate(new):
        of = reward.replaced(of, i % 8, x[i % 8], item)
        x[i % 8] = item
    torch.testing.assert_close(reward.value(of), measure(x), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ the greedy swap


def chosen_value(name: str, pairs: torch.Tensor, chosen: torch.Tensor) -> float:
    return float(MADE[name][1](pairs[range(len(pairs)), chosen]))


@pytest.mark.parametrize("name", SETS)
def test_swap_never_falls_and_brute_force_is_the_most(name):
    ends = []
    for seed in range(3):
        pairs = sets(name, 10, 2) + 3 * features(10, 2, 1, seed=seed)
        start = (features(10, seed=seed) > 0).long()
        values = [chosen_value(name, pairs, start)]
        for sweeps in (1, 2, 50):
            values.append(chosen_value(name, pairs, greedy_swap(MADE[name][0], pairs, start, sweeps)))
        assert values == sorted(values) and values[1] > values[0]
        ends.append(values[-1])
    best = max(chosen_value(name, pairs, torch.tensor(c)) for c in itertools.product((0, 1), repeat=10))
    assert ends[-1] <= best + 1e-9


@pytest.mark.parametrize("name", SETS)
def test_no_single_swap_helps_at_the_end(name):
    pairs = sets(name, 10, 2)
    end = greedy_swap(MADE[name][0], pairs, torch.zeros(10).long(), 50)
    for i in range(10):
        other = end.clone()
        other[i] = 1 - other[i]
        assert chosen_value(name, pairs, other) <= chosen_value(name, pairs, end) + 1e-9


def test_swap_of_a_mean_is_the_better_of_every_pair_after_one_sweep():
    scores = features(50, 2, 1)
    found = greedy_swap(Mean(), scores, (features(50, seed=1) > 0).long(), sweeps=1)
    assert torch.equal(found, scores[..., 0].argmax(1))


def test_equal_items_are_not_swapped():
    pairs = features(6, 1, 3).expand(6, 2, 3)
    start = torch.tensor([0, 1, 0, 1, 1, 0])
    for name in ("frechet", "mmd", "vendi"):
        assert torch.equal(greedy_swap(MADE[name][0], pairs, start, 50), start)


WRONG = [((4, 3, 2), 4, 1), ((4, 2), 4, 1), ((4, 2, 3), 5, 1), ((4, 2, 3), 4, 0)]


@pytest.mark.parametrize(("pairs", "start", "sweeps"), WRONG)
def test_what_is_no_pairs_is_refused(pairs, start, sweeps):
    with pytest.raises(ValueError, match=r"greedy_swap wants pairs \(P, 2, D\)"):
        greedy_swap(Mean(), torch.zeros(pairs), torch.zeros(start).long(), sweeps)
