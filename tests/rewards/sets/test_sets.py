"""Measures of sets and of one picture: goldens, invariants, other implementations."""

import colorsys

import numpy as np
import pytest
import scipy.linalg
import torch

from rewards.registry import load
from rewards.sets.frechet import Moments, frechet, frechet_of, moments
from rewards.sets.vendi import directions, vendi, vendi_of, vendi_of_directions


def features(n: int = 50, d: int = 6, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) + seed


def one(mean: float, variance: float) -> Moments:
    return Moments(torch.tensor([mean]).double(), torch.tensor([[variance]]).double())


def test_frechet_in_one_dimension():
    """(m - m')^2 + (s - s')^2."""
    assert float(frechet_of(one(0, 1), one(1, 4))) == pytest.approx(2.0, abs=1e-12)


def test_frechet_against_scipy():
    a, b = features(seed=1), features(80, seed=2)
    (ma, sa), (mb, sb) = ((m.numpy(), s.numpy()) for m, s in (moments(a), moments(b)))
    np.testing.assert_allclose(sa, np.cov(a.double().numpy().T))
    expected = ((ma - mb) ** 2).sum() + np.trace(sa + sb - 2 * scipy.linalg.sqrtm(sa @ sb).real)
    assert float(frechet(a, b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_invariants():
    a, b = features(seed=1), features(seed=2)
    assert float(frechet(a, a)) == pytest.approx(0, abs=1e-10)
    assert float(frechet(a, b)) == pytest.approx(float(frechet(b, a))) and frechet(a, b) > 0
    assert float(frechet(a, a + 3)) == pytest.approx(6 * 9, rel=1e-6)
    few = features(3)  # a covariance without full rank
    assert frechet(few, few + 1).isfinite() and frechet(few, few).abs() < 1e-8


@pytest.mark.parametrize(("n", "shrinkage"), [(9, 0.0), (3, 0.0), (3, 0.1), (2, 0.5), (2, 1.0)])
def test_frechets_gradient_is_the_finite_difference(n, shrinkage):
    """In both sets; also where the covariance has no full rank, or equal eigenvalues."""
    few, many = features(n, 4).double(), features(12, 4, 1).double()
    assert torch.autograd.gradcheck(lambda x: frechet(x, many, shrinkage), few.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: frechet(many, x, shrinkage), few)


@pytest.mark.parametrize("score", [vendi, lambda x: vendi_of_directions(directions(x))])
@pytest.mark.parametrize(("n", "d"), [(5, 3), (3, 5)])
def test_vendis_gradient_is_the_finite_difference(score, n, d):
    assert torch.autograd.gradcheck(score, features(n, d).double().requires_grad_())
    for same in (torch.ones(n, d), torch.eye(n, d + n)):  # of copies and of orthogonal items, the extremes, it is 0
        x = same.double().requires_grad_()
        (gradient,) = torch.autograd.grad(score(x), x)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


def test_shrinkage():
    x = features()
    plain, ball = moments(x), moments(x, shrinkage=1.0)
    torch.testing.assert_close(ball.covariance, torch.eye(6).double() * plain.covariance.trace() / 6)
    half = moments(x, shrinkage=0.5)
    torch.testing.assert_close(half.covariance, (plain.covariance + ball.covariance) / 2)
    with pytest.raises(ValueError, match="shrinkage is 2"):
        moments(x, shrinkage=2)
    with pytest.raises(ValueError, match=r"features \(N, D\) of at least 2 items, not \(1, 6\)"):
        moments(x[:1])


def test_vendi():
    """n copies are one item, n orthogonal ones are n, two at cosine 0.5 are 1.7547653506."""
    assert float(vendi(torch.ones(5, 3))) == pytest.approx(1)
    assert float(vendi(torch.eye(5))) == pytest.approx(5)
    slanted = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64)
    assert float(vendi(slanted)) == pytest.approx(1.7547653506, abs=1e-9)
    x = features()
    assert float(vendi(x)) == pytest.approx(float(vendi(3 * x.flip(0)))) and 1 < vendi(x) < 50
    assert float(vendi_of(torch.eye(4))) == pytest.approx(4)
    with pytest.raises(ValueError, match=r"vendi wants features \(N, D\), not \(3,\)"):
        vendi(torch.ones(3))


def test_saturation_against_colorsys():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images[1, :, 0] = 0
    expected = [np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in image.flatten(1).T.tolist()]) for image in images]
    np.testing.assert_allclose(load("saturation")(images, ["", ""]).numpy(), expected, rtol=1e-5)


def test_contrast():
    halves = torch.zeros(1, 3, 4, 4)
    halves[..., 2:] = 1
    assert float(load("contrast")(halves, [""])) == pytest.approx(0.5)
    flat = torch.full((1, 3, 4, 4), 0.3, requires_grad=True)
    score = load("contrast")(flat, [""])
    score.sum().backward()
    assert float(score.detach()) == pytest.approx(0, abs=1e-6) and flat.grad.isfinite().all()
