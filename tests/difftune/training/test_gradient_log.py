"""The signal in gradients: against McCandlish's own formulas, and on gradients whose noise scale is known."""

import pytest
import torch

from difftune.training.gradient_log import GradientLog, Pair, noise_scale, share_error, signal_share

DIMENSION, B = 40, 8


def gradients(count: int, signal: float, seed: int = 0) -> torch.Tensor:
    """Means of B draws of N(G, I) with |G| = signal: B_simple = DIMENSION / signal^2."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, DIMENSION, generator=generator, dtype=torch.float64) / B**0.5
    return noise + signal * torch.ones(DIMENSION).double() / DIMENSION**0.5


def log_of(found: torch.Tensor) -> GradientLog:
    log = GradientLog(B)
    for gradient in found.float():
        log.see([gradient[:7], gradient[7:]])
    return log


def test_two_gradients_give_the_papers_estimates():
    """|G|^2 = (2B |g_big|^2 - B |g_small|^2) / B and S = (|g_small|^2 - |g_big|^2) / (1/B - 1/(2B)), appendix A.1."""
    g, h = gradients(2, 2.0)
    log = log_of(torch.stack([g, h]))
    small, big = (g @ g + h @ h) / 2, ((g + h) / 2) @ ((g + h) / 2)
    square, trace = (2 * B * big - B * small) / B, (small - big) / (1 / B - 1 / (2 * B))
    assert log.metrics["noise_scale"] == pytest.approx(float(trace / square), rel=1e-4)
    assert log.metrics["grad_cosine"] == pytest.approx(float(g @ h / (g.norm() * h.norm())), rel=1e-4)


def test_noise_scale_of_known_gradients_is_found():
    """B_simple = 40 / 4 = 10 images, by the latest 100 pairs."""
    logs = [log_of(gradients(300, 2.0, seed)) for seed in range(40)]
    assert logs[0].count == 299 and len(logs[0].pairs) == 100
    share = sum(signal_share(log.pairs) for log in logs) / len(logs)
    assert noise_scale(B, share) == pytest.approx(10, rel=0.03)
    assert logs[0].metrics["noise_scale"] == noise_scale(B, signal_share(logs[0].pairs))


def test_error_of_the_share_is_its_deviation():
    logs = [log_of(gradients(101, 0.5, seed)) for seed in range(200)]
    shares = torch.tensor([signal_share(log.pairs) for log in logs])
    errors = torch.tensor([share_error(log.pairs) for log in logs])
    assert float(errors.mean()) == pytest.approx(float(shares.std()), rel=0.2)
    assert float(shares.mean()) == pytest.approx(0.25 / (0.25 + DIMENSION / B), abs=3 * float(shares.std()) / 200**0.5)


def test_verdicts_come_after_20_pairs_40_and_80_and_hold_for_most_runs():
    """B_simple = 4000 images, for which a run of 40 is hopeless; and 10, for which one of 80 is not."""
    said = [log_of(gradients(n + 1, 0.1)).hopeless(5) is not None for n in (19, 20, 21, 39, 40, 41, 60, 80)]
    assert said == [False, True, False, False, True, False, False, True]
    assert sum(log_of(gradients(81, 0.1, seed)).hopeless(5) is not None for seed in range(40)) >= 38
    assert not any(log_of(gradients(21, 2.0, seed)).hopeless(10) for seed in range(40))


def test_gradient_of_zero_says_nothing():
    log = log_of(torch.stack([torch.ones(DIMENSION), torch.zeros(DIMENSION), torch.ones(DIMENSION)]).double())
    assert (
        log.count == 1 and log.cosine == pytest.approx(1) and log.metrics["noise_scale"] == pytest.approx(0, abs=1e-5)
    )


def test_no_signal_is_an_infinite_scale_which_no_record_holds():
    assert noise_scale(8, -0.1) == noise_scale(8, 0.0) == float("inf")
    log = log_of(torch.stack([torch.ones(DIMENSION), -torch.ones(DIMENSION)]).double())
    assert log.metrics == {"grad_cosine": pytest.approx(-1)} and log.pairs == [Pair(-DIMENSION, DIMENSION)]
