"""Sets that change by one item, and a test of whether two are of one distribution."""

import itertools

import numpy as np
import pytest
import torch

from rewards.sets.frechet import added, frames, frechet_of, moments, moments_of, removed, replaced, running, square_root
from rewards.sets.mmd import cubic, gaussian, mmd, mmd_of, permutation_test, sums
from rewards.sets.mmd import replaced as mmd_replaced
from rewards.sets.vendi import directions, vendi, vendi_of_directions
from rewards.sets.vendi import replaced as vendi_replaced


def features(n: int, d: int = 6, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g).double() + seed


def assert_near(found: torch.Tensor, expected: torch.Tensor, within: float = 1e-8) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=within)


def test_added_and_removed_against_numpy():
    x = features(9).numpy()
    more, fewer = added(running(torch.tensor(x[:8])), torch.tensor(x[8])), removed(running(torch.tensor(x)), x_of(x, 3))
    for of, expected in ((more, x), (fewer, np.delete(x, 3, axis=0))):
        assert of.n == len(expected)
        np.testing.assert_allclose(of.mean, expected.mean(0), atol=1e-12)
        np.testing.assert_allclose(moments_of(of).covariance, np.cov(expected.T), atol=1e-12)


def x_of(x: np.ndarray, index: int) -> torch.Tensor:
    return torch.tensor(x[index])


def test_many_swaps_stay_near_the_recomputation():
    """1000 swaps between two sets: moments, Fréchet distance, MMD^2 and Vendi score, at 1e-8 of computing anew."""
    g = torch.Generator().manual_seed(0)
    a, b, exemplars = features(40, seed=1), features(40, seed=2), features(60, seed=3)
    of, by_kernel, spread = running(a), sums(a, exemplars), directions(a)
    for i, j in torch.randint(40, (1000, 2), generator=g).tolist():
        old, new = a[i].clone(), b[j].clone()
        of, spread = replaced(of, old, new), vendi_replaced(spread, old, new)
        by_kernel = mmd_replaced(by_kernel, i, new)
        a[i], b[j] = new, old
    for shrinkage in (0.0, 0.1):
        expected = moments(a, shrinkage)
        assert_near(moments_of(of, shrinkage).mean, expected.mean)
        assert_near(moments_of(of, shrinkage).covariance, expected.covariance)
        assert_near(frechet_of(moments_of(of, shrinkage), moments(exemplars)), frechet_of(expected, moments(exemplars)))
    assert_near(mmd_of(by_kernel) / mmd(a, exemplars), torch.ones(()).double())
    assert_near(vendi_of_directions(spread), vendi(a))


def test_swap_candidate_without_recomputing_the_set():
    """The distance of every candidate from the statistics alone, the exemplars' square root taken once."""
    a, b, exemplars = features(12, seed=1), features(5, seed=2), moments(features(30, seed=3))
    of, root = running(a), square_root(exemplars.covariance)
    for i, j in itertools.product(range(12), range(5)):
        found = frechet_of(moments_of(replaced(of, a[i], b[j])), exemplars, root)
        swapped = a.clone()
        swapped[i] = b[j]
        assert_near(found, frechet_of(moments(swapped), exemplars))


def test_sets_too_small_are_refused():
    pair = running(features(2))
    one = removed(pair, features(2)[0])
    assert_near(one.mean, features(2)[1])
    assert_near(one.scatter, torch.zeros(6, 6).double())
    with pytest.raises(ValueError, match="a set of 1 items cannot lose one"):
        removed(one, features(2)[1])
    with pytest.raises(ValueError, match="moments want at least 2 items, not 1"):
        moments_of(one)
    with pytest.raises(ValueError, match=r"frames are features \(B, N, D\) of at least 2 places, not \(3, 1, 6\)"):
        frames(features(3)[:, None])


def test_frames_of_a_batch_are_the_moments_of_each():
    items = torch.stack([features(20, seed=s) for s in range(4)])
    exemplars = moments(features(50, seed=9), 0.1)
    found = frechet_of(frames(items, 0.1), exemplars)
    assert found.shape == (4,)
    assert_near(found, torch.stack([frechet_of(moments(item, 0.1), exemplars) for item in items]))


def test_frames_differentiate():
    items, exemplars = features(10, 3).view(2, 5, 3).requires_grad_(), moments(features(8, 3, 1))
    assert torch.autograd.gradcheck(lambda x: frechet_of(frames(x, 0.1), exemplars), items)


@pytest.mark.parametrize(("n", "m"), [(3, 4), (2, 5), (4, 4)])
@pytest.mark.parametrize("kernel", [cubic, gaussian(1.0)])
def test_exact_permutation_test_has_its_level(n, m, kernel):
    """Over all splits of one pool, which are equally likely under the null hypothesis, the p values of n != m are
    1/S, 2/S, ..., 1, once each; n = m gives every MMD^2 twice."""
    pool, p = features(n + m, 2), []
    for first in itertools.combinations(range(n + m), n):
        second = [i for i in range(n + m) if i not in first]
        p.append(permutation_test(pool[list(first)], pool[second], kernel))
    by = 2 if n == m else 1
    ranks = (np.arange(len(p)) // by + 1) * by
    np.testing.assert_allclose(sorted(p), ranks / len(p), rtol=1e-12)


def test_permutation_test_by_hand():
    """{0, 0} against {1, 1} is the greatest of 6 splits, with its mirror: 2/6. Where all points are equal, p is 1."""
    low, high = torch.zeros(2, 1), torch.ones(2, 1)
    assert permutation_test(low, high, gaussian(1.0)) == pytest.approx(2 / 6)
    assert permutation_test(low, low) == 1.0


def test_random_permutations():
    """p = 1 / (P + 1) where no split comes near the observed one; uniform under the null hypothesis."""
    g = torch.Generator().manual_seed(0)
    near, far = features(20, 3, 0), features(20, 3, 0) + 50
    assert permutation_test(near, far, permutations=99, generator=g) == pytest.approx(1 / 100)
    draws = torch.randn(200, 2, 10, 2, generator=g, dtype=torch.float64)
    p = np.array([permutation_test(a, b, gaussian(1.0), 19, g) for a, b in draws])
    assert abs((p <= 0.2).mean() - 0.2) < 3 * (0.2 * 0.8 / 200) ** 0.5
    assert abs(p.mean() - 0.525) < 3 * 0.2883 / 200**0.5  # uniform over 1/20, ..., 20/20
    with pytest.raises(ValueError, match="permutations is 0: it must be at least 1"):
        permutation_test(near, far, permutations=0)
    with pytest.raises(ValueError, match="MMD wants features"):
        permutation_test(near, far[:, :1])
