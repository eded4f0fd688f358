"""Over-optimisation: the reward that is trained on rises while one that is held out falls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rewards.errors import RewardError


class Parting(NamedTuple):
    """When the two rewards parted, and how far, in their own units."""

    best: int  # the evaluation at which the held-out reward was highest
    rise: float  # of the trained reward since then
    drop: float  # of the held-out reward since then

    def __str__(self) -> str:
        return (
            f"over-optimised since evaluation {self.best}: the trained reward rose by {self.rise:.4g} and the held-out "
            f"reward fell by {self.drop:.4g}; take the checkpoint of evaluation {self.best}"
        )


@dataclass(frozen=True)
class Monitor:
    """Compares the curves of a trained and of a held-out reward, one value per evaluation.

    Both are smoothed by the mean of the last `window` values. They have parted when the held-out curve lies more than
    `errors` standard errors under its best, and the trained one lies over what it was then. The standard error is that
    of the difference of two such means, from the differences of successive values (which a trend hardly moves).
    """

    window: int = 3
    errors: float = 3.0

    def __call__(self, trained: Sequence[float], held_out: Sequence[float]) -> Parting | None:
        """None while they have not parted. Raises ValueError for curves of different lengths."""
        if len(trained) != len(held_out):
            raise RewardError(f"{len(trained)} values of the trained reward and {len(held_out)} of the held-out one")
        if len(trained) <= self.window + 1:
            return None
        t, h = (_smooth(np.asarray(curve, np.float64), self.window) for curve in (trained, held_out))
        best = int(h.argmax())
        rise, drop = float(t[-1] - t[best]), float(h[best] - h[-1])
        noise = np.median(np.abs(np.diff(held_out))) / 0.6745 / 2**0.5  # of one value, as a standard deviation
        parted = rise > 0 and drop > self.errors * noise * (2 / self.window) ** 0.5 and drop > 0
        return Parting(best + self.window - 1, rise, drop) if parted else None


def _smooth(curve: np.ndarray, window: int) -> np.ndarray:
    return np.convolve(curve, np.full(window, 1 / window), "valid")
