import math

import pytest
import torch

from rewards.sets.mmd import cubic, gaussian, kid, mmd, mmd_of, replaced, sums, witness

GENERATOR = torch.Generator().manual_seed(0)
A, B = torch.randn(7, 3, generator=GENERATOR), torch.randn(9, 3, generator=GENERATOR) + 0.5


def by_hand(a: torch.Tensor, b: torch.Tensor, kernel) -> float:
    """The unbiased estimator, pair by pair."""
    n, m = len(a), len(b)
    within = [sum(kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) for x in (a, b)]
    between = sum(kernel(x, y) for x in a for y in b)
    return within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * between / (n * m)


@pytest.mark.parametrize(
    ("kernel", "pair"),
    [
        (cubic, lambda x, y: (float(x.double() @ y.double()) / 3 + 1) ** 3),
        (gaussian(0.7), lambda x, y: math.exp(-float(((x - y).double() ** 2).sum()) / (2 * 0.7**2))),
    ],
)
def test_estimator_is_the_sum_over_pairs(kernel, pair):
    found = mmd(A, B, kernel)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(by_hand(A, B, pair), rel=1e-6)
    torch.testing.assert_close(mmd(B, A, kernel), found)


def test_two_points_by_hand():
    """k((0), (1)) = exp(-1/2) in every pair between the sets, 1 within them: 2 - 2 exp(-1/2)."""
    a, b = torch.zeros(2, 1), torch.ones(2, 1)
    assert float(mmd(a, b, gaussian(1.0))) == pytest.approx(2 - 2 * math.exp(-0.5))


def test_mean_of_a_linear_kernel_is_the_distance_of_the_means():
    """With k = a . b, the biased MMD^2 is |mean a - mean b|^2; the unbiased one differs by the two variances."""
    found = mmd(A, B, lambda a, b: a @ b.T)
    a, b = A.double(), B.double()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = distance - a.var(0).sum() / len(a) - b.var(0).sum() / len(b)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kernel", [cubic, gaussian(1.0)])
def test_replacing_one_item_is_computing_anew(kernel):
    before, item = sums(A, B, kernel), torch.tensor([1.0, -2.0, 0.5])
    for index in (0, 3, 6):
        new = A.clone()
        new[index] = item
        found = replaced(before, index, item, kernel)
        torch.testing.assert_close(mmd_of(found), mmd(new, B, kernel), rtol=1e-10, atol=1e-10)
        assert torch.equal(found.a, new.double())
    back = replaced(replaced(before, 2, item, kernel), 2, A[2], kernel)
    torch.testing.assert_close(mmd_of(back), mmd_of(before), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", [cubic, gaussian(1.0)])
def test_gradient_is_the_finite_difference(kernel):
    assert torch.autograd.gradcheck(lambda a: mmd(a, B.double(), kernel), A.double().requires_grad_())


def test_equal_distributions_average_to_zero():
    generator = torch.Generator().manual_seed(1)
    draws = [mmd(*torch.randn(2, 8, 4, generator=generator).unbind(0)) for _ in range(400)]
    values = torch.stack(draws)
    assert abs(values.mean()) < 3 * values.std() / 20
    assert values.min() < 0


def test_kid_is_the_mean_over_subsets_of_equal_size():
    assert float(kid(A, B, subsets=1, size=7, generator=torch.Generator().manual_seed(0))) < 10
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kid(A, A[order], subsets=3, size=7), mmd(A, A))
    far, near = (kid(A, A + by, 20, 5, torch.Generator().manual_seed(0)) for by in (2.0, 0.5))
    assert far > near
    with pytest.raises(ValueError, match="KID draws subsets of 8 items, a set has 7: give a smaller size"):
        kid(A, B, size=8)


def test_witness_is_high_where_exemplars_are_missing():
    """An item at the exemplars has more than one among the samples; the mean over exemplars less that over samples
    is the biased MMD^2."""
    kernel = gaussian(1.0)
    at_b, at_a = witness(torch.cat([B, A]), A, B, kernel).split([len(B), len(A)])
    assert at_b.mean() > at_a.mean()
    a, b = A.double(), B.double()
    biased = kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean()
    torch.testing.assert_close(at_b.mean() - at_a.mean(), biased)


@pytest.mark.parametrize(("a", "b"), [(A[:1], B), (A, B[:, :2]), (A[0], B)])
def test_what_is_no_two_sets_is_refused(a, b):
    with pytest.raises(ValueError, match="MMD wants features"):
        mmd(a, b)
