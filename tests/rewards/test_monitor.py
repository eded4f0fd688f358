import numpy as np
import pytest

from rewards.monitor import Monitor

STEPS = np.arange(20)
RISING = STEPS * 0.1


def noisy(curve: np.ndarray, size: float = 0.02) -> np.ndarray:
    return curve + size * np.random.default_rng(0).standard_normal(len(curve))


def test_parting_is_found_at_the_best_held_out_evaluation():
    held_out = 1 - 0.02 * np.abs(STEPS - 9)
    found = Monitor(window=1)(RISING, held_out)
    assert found.best == 9
    assert found.rise == pytest.approx(1.0)
    assert found.drop == pytest.approx(0.2)
    assert "over-optimised since evaluation 9" in str(found)


def test_parting_is_found_in_noise():
    held_out = noisy(1 - 0.1 * np.abs(STEPS - 9))
    found = Monitor()(noisy(RISING), held_out)
    assert found is not None and abs(found.best - 10) <= 1  # the last of the window of 3 around 9


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        (RISING, RISING),  # both rise
        (-RISING, -RISING),  # both fall: training failed, and nothing is over-optimised
        (RISING, noisy(np.zeros(20))),  # the held-out reward only scatters
        (RISING, np.ones(20)),
        (RISING[:4], -RISING[:4]),  # too early to say
    ],
)
def test_curves_that_have_not_parted(trained, held_out):
    assert Monitor()(trained, held_out) is None


def test_scatter_is_rarely_taken_for_a_parting():
    """Among 200 pairs of a rising and a scattering curve, no more than 1 in 10 is reported at its end."""
    rng = np.random.default_rng(0)
    found = [Monitor()(RISING, rng.standard_normal(20)) for _ in range(200)]
    assert sum(parting is not None for parting in found) <= 20


def test_curves_must_pair():
    with pytest.raises(ValueError, match="2 values of the trained reward and 3 of the held-out one"):
        Monitor()([1, 2], [1, 2, 3])
