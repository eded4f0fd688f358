"""Closed forms against autograd, against each other and against their own samples."""

import pytest
import torch

from solvers.denoiser import Path
from solvers.exact import Gaussian, Mixture, bind
from solvers.noise import cosine, flow, noise

MEANS = torch.tensor([[-2.0, 1.0], [2.0, 0.5], [0.3, -1.5]], dtype=torch.float64)
STDS = torch.tensor([0.4, 0.6, 0.3], dtype=torch.float64)
MIXTURE = Mixture(MEANS, STDS, torch.tensor([1.0, 2.0, 1.0]))
EXACT = {"gaussian": Gaussian(MEANS[1], 0.6), "mixture": MIXTURE}
LEVELS = [cosine(0.6), flow(0.3), noise(1.0, 3.0), cosine(0.999)]


def points(n=5, dtype=torch.float64):
    return torch.randn(n, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("at", LEVELS)
def test_eps_is_the_score(name, at):
    """eps = -sigma grad log p (Tweedie), and x = alpha x0 + sigma eps."""
    x = points().requires_grad_()
    p = EXACT[name](x, at, {})
    score = torch.autograd.grad(EXACT[name].log_prob(x, at).sum(), x)[0]
    torch.testing.assert_close(p.eps, -at.sigma * score)
    torch.testing.assert_close(at.alpha * p.x0 + at.sigma * p.eps, x)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ends_are_finite(name, dtype):
    x = points(dtype=dtype)
    pure, data = (EXACT[name](x, flow(t), {}) for t in (1.0, 0.0))
    assert all(value.isfinite().all() for value in (*pure[:2], *data[:2]))
    torch.testing.assert_close(pure.eps, x, check_dtype=False)
    torch.testing.assert_close(data.x0, x, check_dtype=False)


def test_labels_choose():
    x, at = points(3), cosine(0.5)
    p = MIXTURE(x, at, {"label": torch.tensor([1, -1, 0])})
    one, zero = (Gaussian(MEANS[k], STDS[k])(x, at, {}) for k in (1, 0))
    torch.testing.assert_close(p.x0, torch.stack([one.x0[0], MIXTURE(x, at, {}).x0[1], zero.x0[2]]))
    torch.testing.assert_close(p.eps, torch.stack([one.eps[0], MIXTURE(x, at, {}).eps[1], zero.eps[2]]))
    torch.testing.assert_close(
        MIXTURE.log_prob(x, at, torch.tensor([1, 1, 1])), Gaussian(MEANS[1], STDS[1]).log_prob(x, at)
    )


def test_images_are_points():
    x = points(4).view(4, 2, 1, 1).expand(4, 2, 3, 1).contiguous()
    image = Mixture(MEANS.view(3, 2, 1, 1).expand(3, 2, 3, 1), STDS)
    flat = Mixture(image.means.flatten(1), STDS)
    torch.testing.assert_close(image(x, cosine(0.5), {}).x0.flatten(1), flat(x.flatten(1), cosine(0.5), {}).x0)


def test_flow_follows_the_probability_flow():
    """dw/dtau = eps - x0 with w = x / (alpha + sigma), by central differences at both ends."""
    g, x, h = EXACT["gaussian"], points(), 1e-5
    for t in (0.2, 0.8):
        slope = (g.flow(x, flow(t), flow(t + h)) - g.flow(x, flow(t), flow(t - h))) / (2 * h)
        p = g(x, flow(t), {})
        torch.testing.assert_close(slope, p.eps - p.x0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(g.flow(g.flow(x, cosine(1.0), cosine(0.4)), cosine(0.4), cosine(1.0)), x)


@pytest.mark.parametrize("name", EXACT)
def test_samples_have_the_density(name):
    x = EXACT[name].sample(20000, torch.Generator().manual_seed(1))
    weights = (
        torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
        if name == "mixture"
        else torch.tensor([0, 1.0, 0]).double()
    )
    mean = weights @ MEANS
    second = weights @ (MEANS**2 + STDS[:, None] ** 2)
    torch.testing.assert_close(x.mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close((x**2).mean(0), second, atol=0.1, rtol=0)
    axis = torch.linspace(-6, 6, 121, dtype=torch.float64)
    square = torch.cartesian_prod(axis, axis)
    assert (EXACT[name].log_prob(square).exp().sum() * 0.1**2).item() == pytest.approx(1, abs=1e-6)


def test_one_component_alone():
    x = MIXTURE.sample(4000, torch.Generator().manual_seed(1), label=2)
    torch.testing.assert_close(x.mean(0), MEANS[2], atol=0.03, rtol=0)


def test_no_patches():
    for exact in EXACT.values():
        with pytest.raises(ValueError, match="pag"):
            exact.patched("pag")


def test_bind():
    cond, weight = {"label": torch.tensor([1, 1, 1])}, torch.zeros(2)
    predict = bind(MIXTURE, cond, [weight])
    assert [id(t) for t in predict.tensors] == [id(cond["label"]), id(weight)]
    torch.testing.assert_close(predict(Path(points(3)), cosine(0.3)).x0, MIXTURE(points(3), cosine(0.3), cond).x0)
