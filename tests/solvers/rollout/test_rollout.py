"""Gradients through whole runs against closed forms, finite differences and each other."""

from itertools import pairwise
from math import prod

import pytest
import torch
from torch import nn

from solvers.denoiser import Path, predicted
from solvers.exact import Gaussian, bind
from solvers.noise import cosine, flow, grid, vp
from solvers.rollout.modes import MODES, parse_gradient, rollout
from solvers.rollout.truncated import truncated
from solvers.samplers.catalogue import SAMPLERS, ancestral, euler, sample

LEVELS = grid(cosine, 5, 0.95, 0.0)
GOLDEN = [0.0, -0.3329696745, -0.7411062854, -1.1698132894, -1.7078450145]  # research/trainers.md 0.4, K = 0 ... 4


class Toy:
    """eps = w x."""

    def __init__(self, w):
        self.tensors = (w,)

    def __call__(self, path, at):
        return predicted("eps", path.x, at, self.tensors[0] * path.x)


class Net(nn.Module):
    """A conditioned flow network with dropout, and its own `Predict`."""

    def __init__(self, cond, dtype):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Dropout(0.2), nn.Linear(16, 2)).to(dtype)
        self.cond, self.calls = cond, 0

    @property
    def tensors(self):
        return [self.cond, *self.parameters()]

    def forward(self, path, at):
        self.calls += 1
        tau = at.sigma.to(path.x).expand(len(path.x), 1)
        return predicted("flow", path.x, at, self.body(torch.cat([path.x, self.cond, tau], 1)))


def gradients(name, gradient, dtype=torch.float64, levels=LEVELS):
    """The gradients of a nonlinear loss w.r.t. noise, condition and parameters, and the loss itself."""
    torch.manual_seed(0)
    x, cond = torch.randn(3, 2, dtype=dtype, requires_grad=True), torch.randn(3, 2, dtype=dtype, requires_grad=True)
    noise, net = torch.randn(len(levels) - 1, 3, 2, dtype=dtype), Net(cond, dtype)
    path = rollout(SAMPLERS[name], net, x, levels, gradient, noise)
    loss = (path.x**3).sum() + path.x0.square().sum()
    return loss, torch.autograd.grad(loss, [x, *net.tensors], allow_unused=True), net


@pytest.mark.parametrize("kept", range(5))
def test_golden_toy(kept):
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    levels = [vp(power) for power in (0.1, 0.3, 0.6, 0.9, 1.0)]
    x0 = rollout(euler, Toy(w), torch.ones(1, 1, dtype=torch.float64), levels, f"truncated:{kept}").x
    reward = -((x0 - 2) ** 2).sum() / 2
    assert x0.item() == pytest.approx(1.3369603448, abs=1e-9)
    assert reward.item() == pytest.approx(-0.2198107922, abs=1e-9)
    assert reward.requires_grad == (kept > 0)
    if kept:
        reward.backward()
        assert w.grad.item() == pytest.approx(GOLDEN[kept], abs=1e-9)


@pytest.mark.parametrize("gradient", ["full", "checkpoint"])
def test_golden_whole(gradient):
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    levels = [vp(power) for power in (0.1, 0.3, 0.6, 0.9, 1.0)]
    x0 = rollout(euler, Toy(w), torch.ones(1, 1, dtype=torch.float64), levels, gradient).x
    (-((x0 - 2) ** 2).sum() / 2).backward()
    assert w.grad.item() == pytest.approx(GOLDEN[-1], abs=1e-9)


@pytest.mark.parametrize("gradient", ["full", "checkpoint", "truncated:7"])
def test_gaussian_closed_form(gradient):
    """d y_N / d y_0 = prod (1 + (k' - k) k / (s^2 + k^2)) in y = x / alpha; and 1 - that w.r.t. the mean."""
    levels, s = grid(cosine, 7, 0.9, 0.0), 0.5
    ratios = [(at.sigma / at.alpha).item() for at in levels]
    exact = prod(1 + (then - k) * k / (s**2 + k**2) for k, then in pairwise(ratios))
    x, mean = (torch.randn(1, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    end = rollout(euler, bind(Gaussian(mean, s), {}, [mean]), x, levels, gradient).x
    for_x, for_mean = torch.autograd.grad(end.sum(), (x, mean))
    scale = (levels[-1].alpha / levels[0].alpha).item()
    torch.testing.assert_close(for_x, torch.full_like(x, exact * scale), rtol=1e-12, atol=0)
    torch.testing.assert_close(for_mean, torch.full_like(x, (1 - exact) * levels[-1].alpha.item()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gradient", ["full", "checkpoint", "revolve:1"])
def test_one_step_to_data_is_the_posterior_gradient(gradient):
    """The gradient of L(x0(x)), which posterior sampling (https://arxiv.org/abs/2209.14687) takes at every step."""
    x, mean = (torch.randn(1, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    predict, at = bind(Gaussian(mean, 0.5), {}, [mean]), LEVELS[2]
    ends = predict(Path(x), at).x0, rollout(euler, predict, x, [at, LEVELS[-1]], gradient).x
    posterior, ours = (torch.autograd.grad((end**3).sum(), (x, mean)) for end in ends)
    for a, b in zip(ours, posterior, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name, error", [("rk4", 1e-6), ("dpm_3", 1e-4), ("unipc_2", 1e-4)])
def test_gradients_of_the_exact_flow(name, error):
    """x' = alpha' mu + sqrt(v'/v) (x - alpha mu): for x, the mean and the deviation of the data, in 80 steps."""
    levels = [vp(torch.sigmoid(2 * snr)) for snr in torch.linspace(-2.6, 2.6, 81, dtype=torch.float64)]
    x, mean = (torch.randn(1, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    std = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    data = Gaussian(mean, std)
    end = rollout(SAMPLERS[name], bind(data, {}, [mean, std]), x, levels).x
    exact = torch.autograd.grad(data.flow(x, levels[0], levels[-1]).square().sum(), (x, mean, std))
    for ours, theirs in zip(torch.autograd.grad(end.square().sum(), (x, mean, std)), exact, strict=True):
        assert (ours - theirs).norm() <= error * theirs.norm()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gradient", ["checkpoint", "truncated:5"])
def test_recomputed_is_full_bit_for_bit(name, dtype, gradient):
    (loss, full, _), (other, again, _) = gradients(name, "full", dtype), gradients(name, gradient, dtype)
    assert torch.equal(loss, other) and all(torch.equal(a, b) for a, b in zip(full, again, strict=True))
    assert all(g.abs().max() > 0 for g in full)


@pytest.mark.parametrize("name", SAMPLERS)
def test_checkpoint_recomputes_and_truncation_does_not_look_back(name):
    _, _, full = gradients(name, "full")
    _, _, twice = gradients(name, "checkpoint")
    _, _, two = gradients(name, "truncated:2")
    assert twice.calls == 2 * full.calls
    assert full.calls < two.calls < twice.calls


@pytest.mark.parametrize("name", SAMPLERS)
def test_truncated_is_the_gradient_of_its_tail(name):
    """The last K steps from the path that the first N - K leave, memory included."""
    _, kept, _ = gradients(name, "truncated:2")
    torch.manual_seed(0)
    x, cond = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    noise, net = torch.randn(5, 3, 2, dtype=torch.float64), Net(cond, torch.float64)
    path = Path(x)
    for i, (now, then) in enumerate(pairwise(LEVELS)):
        with torch.set_grad_enabled(i >= 3):
            path = SAMPLERS[name](net, path, now, then, noise[i])
    loss = (path.x**3).sum() + path.x0.square().sum()
    assert kept[0] is None
    assert all(torch.equal(a, b) for a, b in zip(kept[1:], torch.autograd.grad(loss, net.tensors), strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_finite_differences(name):
    torch.manual_seed(0)
    x, cond = torch.randn(1, 2, dtype=torch.float64, requires_grad=True), torch.randn(1, 2, dtype=torch.float64)
    noise, net = torch.randn(3, 1, 2, dtype=torch.float64), Net(cond.requires_grad_(), torch.float64).eval()
    run = lambda *_: rollout(SAMPLERS[name], net, x, grid(flow, 3), noise=noise).x  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, cond))


def test_forward_is_sample():
    mean, x = torch.zeros(2, requires_grad=True), torch.randn(3, 2)
    predict = bind(Gaussian(mean, 0.5), {}, [mean])
    *_, last = sample(euler, predict, Path(x), LEVELS)
    for gradient in ("full", "checkpoint", "truncated:0", "truncated:3"):
        assert torch.equal(rollout(euler, predict, x, LEVELS, gradient).x, last.x)
    assert rollout(euler, predict, x.half(), LEVELS).x.dtype == torch.float32


@pytest.mark.parametrize("gradient", ["full", "checkpoint", "truncated:2"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_an_unlisted_leaf_is_named(name, gradient):
    hidden = torch.ones(7, 2, requires_grad=True)
    predict = bind(Gaussian(hidden.mean(0), 0.5), {})
    with pytest.raises(ValueError, match=r"\(7, 2\).*predict.tensors"):
        rollout(SAMPLERS[name], predict, torch.randn(3, 2), LEVELS, gradient, torch.randn(5, 3, 2))
    with torch.no_grad():
        rollout(SAMPLERS[name], predict, torch.randn(3, 2), LEVELS, gradient, torch.randn(5, 3, 2))


def test_what_listed_tensors_are_made_from_is_not_walked():
    """x, conditions and parameters may be the ends of graphs of their own."""
    seed, words, base = (torch.ones(2, requires_grad=True) for _ in range(3))
    mean = words * 2 + base
    x = seed * torch.randn(3, 2)
    rollout(euler, bind(Gaussian(mean, 0.5), {}, [mean]), x, LEVELS).x.sum().backward()
    assert all(t.grad is not None for t in (seed, words, base))


def test_gradient_reaches_the_noise_of_a_stochastic_run():
    noise = torch.randn(5, 3, 2, requires_grad=True)
    predict = bind(Gaussian(torch.zeros(2), 0.5), {})
    rollout(ancestral, predict, torch.randn(3, 2), LEVELS, noise=noise).x.sum().backward()
    assert (noise.grad[:-1] != 0).all() and (noise.grad[-1] == 0).all()  # nothing is added on the way to sigma = 0


def test_bad_requests_are_named():
    predict, x = bind(Gaussian(torch.zeros(2), 0.5), {}), torch.randn(3, 2)
    with pytest.raises(ValueError, match="backprop.*full, checkpoint, truncated"):
        rollout(euler, predict, x, LEVELS, "backprop")
    with pytest.raises(ValueError, match="takes no option"):
        rollout(euler, predict, x, LEVELS, "checkpoint:3")
    for option in ("", ":6", ":-1", ":x"):
        with pytest.raises(ValueError, match="0 to 5"):
            rollout(euler, predict, x, LEVELS, f"truncated{option}")
    with pytest.raises(ValueError, match="drawn outside"):
        rollout(ancestral, predict, x, LEVELS)
    with pytest.raises(ValueError, match="4 noise tensors for 5 steps"):
        rollout(ancestral, predict, x, LEVELS, noise=torch.randn(4, 3, 2))


def test_modes_are_read_from_strings():
    assert parse_gradient("truncated:10") == (truncated, "10")
    assert {parse_gradient(name)[0] for name in MODES} == set(MODES.values())
