"""Single terms of the methods' formulas, each against numbers worked out by hand."""

from math import exp

import pytest
import torch

from guidance.contract import drive
from guidance.methods.catalogue import CFG, PerpNeg, Rescale
from guidance.methods.dynamic import DynamicCFG, _best, _weights
from solvers.denoiser import Path
from solvers.families.patches import blurred
from solvers.noise import cosine

AT = cosine(0.5)
F64 = torch.float64


def made(method, **answers):
    path = Path(answers["cond"])
    return drive(method, lambda asked: {name: answers[name] for name in asked}, path, AT, "eps", "eps").out


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=F64).view(1, 1, 1, -1)


def test_perp_neg_with_two_negatives():
    """Each negative by itself loses its part along d = c - u; neither sees the other."""
    c, u = row(2.0, 0.0, 0.0), row(0.0, 0.0, 0.0)
    first, second = row(3.0, 1.0, 0.0), row(-5.0, 1.0, 2.0)
    method = PerpNeg(4.0, negatives=("a", "b"), weights=(0.5, 0.25))
    out = made(method, cond=c, uncond=u, negative0=first, negative1=second)
    expected = 4 * (row(2.0, 0.0, 0.0) - 0.5 * row(0.0, 1.0, 0.0) - 0.25 * row(0.0, 1.0, 2.0))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("size", (0.01, 0.3, 7.0))
def test_rescale_has_the_conditionals_deviation_whatever_its_size(size):
    """Also below 1: out std(c) / std(out), and phi of it."""
    g = torch.Generator().manual_seed(0)
    c, u = (size * torch.randn(2, 3, 4, 4, generator=g, dtype=F64) for _ in range(2))
    guided = u + 5 * (c - u)
    std = lambda x: x.flatten(1).std(1).view(-1, 1, 1, 1)  # noqa: E731
    full = made(Rescale(CFG(5.0), phi=1.0), cond=c, uncond=u)
    torch.testing.assert_close(std(full), std(c))
    part = made(Rescale(CFG(5.0), phi=0.3), cond=c, uncond=u)
    torch.testing.assert_close(part, 0.3 * guided * std(c) / std(guided) + 0.7 * guided)


def test_dynamic_cfg_weighs_scorers_by_their_relative_rise():
    """a_e = max(0, (e - e_last) / |e_last|); all alike at first and where none rises."""
    last, now = torch.tensor([[2.0, -4.0, 1.0]], dtype=F64), torch.tensor([[3.0, -3.0, 0.5]], dtype=F64)
    torch.testing.assert_close(_weights(now, last), torch.tensor([[0.5, 0.25, 0.0]], dtype=F64))
    torch.testing.assert_close(_weights(now, None), torch.ones(1, 3, dtype=F64))
    torch.testing.assert_close(_weights(last, last), torch.ones(1, 3, dtype=F64))
    scores = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]], dtype=F64)  # two candidates, one sample, two scorers
    for risen, best in (
        ([[0.1, 0.4]], 1),
        ([[0.4, 0.1]], 0),
    ):  # the first rises by 400 % or 25 %
        chosen, mean = _best(scores, torch.tensor(risen, dtype=F64))
        assert int(chosen) == best and torch.equal(mean, torch.tensor([[0.5, 0.5]], dtype=F64))
    levels = DynamicCFG((1.0, 2.0), (lambda x0: x0.flatten(1).sum(1), lambda x0: -x0.flatten(1).sum(1)))
    assert torch.equal(made(levels, cond=row(1.0, 0.0), uncond=row(0.0, 0.0)), row(1.0, 0.0))  # a tie: the lowest


def test_seg_blurs_by_a_gaussian_of_sigma_tokens():
    """exp(-distance^2 / (2 sigma^2)), normalised over the line."""
    spike = torch.zeros(1, 9, 1, dtype=F64)
    spike[0, 4] = 1
    for sigma in (0.7, 1.5):
        weights = torch.tensor([[exp(-((i - j) ** 2) / (2 * sigma**2)) for j in range(9)] for i in range(9)], dtype=F64)
        expected = (weights / weights.sum(1, keepdim=True))[:, 4]
        torch.testing.assert_close(blurred(spike, 1, 9, sigma).flatten(), expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(blurred(spike, 9, 1, sigma).flatten(), expected, rtol=1e-6, atol=1e-8)
