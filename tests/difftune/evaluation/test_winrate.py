"""Win rates: published figures, and the exact binomial."""

from math import comb

import pytest
from scipy.optimize import brentq

from difftune.evaluation.win_rate import win_rate


@pytest.mark.parametrize(
    ("wins", "rate", "bound", "p"), [(256, 0.6095, 0.5687, 4.15e-6), (253, 0.6024, 0.5615, 1.58e-5)]
)
def test_dragons_human_study(wins, rate, bound, p):
    found = win_rate(wins, 0, 420)
    assert found.rate == pytest.approx(rate, abs=5e-5)
    assert found.lower_bound == pytest.approx(bound, abs=5e-5)
    assert found.p == pytest.approx(p, rel=0.005 / 1.58)  # its last digit


def tail(k: int, n: int, q: float) -> float:
    """P(X >= k) of a binomial."""
    return sum(comb(n, i) * q**i * (1 - q) ** (n - i) for i in range(k, n + 1))


@pytest.mark.parametrize(("wins", "n"), [(1, 7), (5, 9), (6, 7)])
def test_bounds_are_where_the_binomial_tail_is_the_level(wins, n):
    found = win_rate(wins, 0, n)
    assert found.low == pytest.approx(brentq(lambda q: tail(wins, n, q) - 0.025, 0, 1))
    assert found.high == pytest.approx(brentq(lambda q: 1 - tail(wins + 1, n, q) - 0.025, 0, 1))
    assert found.lower_bound == pytest.approx(brentq(lambda q: tail(wins, n, q) - 0.05, 0, 1))
    assert found.p == pytest.approx(tail(wins, n, 0.5))


def test_exchanging_the_models_is_one_minus():
    for wins, ties, n in ((3, 0, 10), (3, 4, 10), (0, 0, 5), (0, 5, 5)):
        a, b = win_rate(wins, ties, n), win_rate(n - wins - ties, ties, n)
        assert (a.rate, a.low, a.high) == pytest.approx((1 - b.rate, 1 - b.high, 1 - b.low))


def test_ties_count_half_and_the_ends_are_kept():
    assert win_rate(3, 4, 10).rate == 0.5 and win_rate(3, 4, 10) == win_rate(5, 0, 10)
    assert (win_rate(0, 0, 5).low, win_rate(5, 0, 5).high, win_rate(0, 0, 5).p) == (0.0, 1.0, 1.0)
    assert win_rate(5, 0, 5).p == pytest.approx(0.5**5)
    assert str(win_rate(256, 0, 420)) == "61.0% [56.1%, 65.6%] of 420"


@pytest.mark.parametrize(("wins", "ties", "n"), [(-1, 0, 5), (3, 3, 5), (0, 0, 0), (1, -1, 5)])
def test_what_cannot_be_is_refused(wins, ties, n):
    with pytest.raises(ValueError, match="comparisons cannot be"):
        win_rate(wins, ties, n)
    with pytest.raises(ValueError, match="confidence is 1.5"):
        win_rate(1, 0, 2, confidence=1.5)
