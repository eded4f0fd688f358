"""How often one model's images beat another's, with an interval that holds for any number of them."""

from dataclasses import dataclass

from scipy.special import betainc, betaincinv

from difftune.errors import UserError


@dataclass(frozen=True)
class WinRate:
    """How often the first of two wins among n comparisons; a tie counts one half."""

    rate: float  # (wins + ties / 2) / n
    low: float  # two-sided Clopper-Pearson interval
    high: float
    lower_bound: float  # one-sided, of the same confidence
    p: float  # of "it wins half of the time or less", exact and one-sided
    n: int

    def __str__(self) -> str:
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.n}"


def win_rate(wins: int, ties: int, n: int, confidence: float = 0.95) -> WinRate:
    """The rate (wins + ties / 2) / n with its exact interval (Clopper & Pearson 1934, https://doi.org/10.2307/2331986).

    The bounds are quantiles of the beta distribution, for k = wins + ties / 2:

        low = B^-1(a; k, n - k + 1),    high = B^-1(1 - a; k + 1, n - k),    p = I_1/2(k, n - k + 1),

    with a = (1 - confidence) / 2, or 1 - confidence for the one-sided bound. Without ties, p is the binomial tail
    P(X >= k). Raises ValueError unless 0 <= wins, 0 <= ties, wins + ties <= n, n >= 1 and confidence is in (0, 1).
    """
    if min(wins, ties) < 0 or wins + ties > n or n < 1:
        raise UserError(f"{wins} wins and {ties} ties of {n} comparisons cannot be")
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}: it must be between 0 and 1")
    k, a = wins + ties / 2, 1 - confidence
    return WinRate(k / n, _low(k, n, a / 2), 1 - _low(n - k, n, a / 2), _low(k, n, a), _tail(k, n), n)


def _low(k: float, n: int, a: float) -> float:
    return float(betaincinv(k, n - k + 1, a)) if k > 0 else 0.0


def _tail(k: float, n: int) -> float:
    return float(betainc(k, n - k + 1, 0.5)) if k > 0 else 1.0
