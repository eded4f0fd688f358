"""Toys for the tests of the gradient modes: a small network, a mixture, and the gradients of one loss on them."""

import numpy as np
import torch
from torch import nn

from solvers.denoiser import predicted
from solvers.exact import Mixture, bind
from solvers.noise import Noise, cosine, flow, grid, noise
from solvers.rollout.modes import rollout

MEANS = torch.tensor([[-1.0, 0.6], [1.2, 0.5], [0.2, -1.0]], dtype=torch.float64)


class Net(nn.Module):
    """A conditioned flow network with dropout, and its own `Predict`."""

    def __init__(self, cond, dtype=torch.float64, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Dropout(dropout), nn.Linear(16, 2)).to(dtype)
        self.cond, self.calls = cond, 0

    @property
    def tensors(self):
        return [self.cond, *self.parameters()]

    def forward(self, path, at):
        self.calls += 1
        tau = (at.sigma / (at.alpha + at.sigma)).to(path.x).expand(len(path.x), 1)
        return predicted("flow", path.x, at, self.body(torch.cat([path.x, self.cond, tau], 1)))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def mixture(means=MEANS):
    """The exact flow of a mixture, whose means are a parameter."""
    stds, weights = torch.tensor([0.5, 0.7, 0.4]).double(), torch.tensor([1.0, 2.0, 1.5]).double()
    return bind(Mixture(means, stds, weights), {}, [means])


def loss_of(x):
    return (x**2 * x.new_tensor([1.0, -0.7])).sum() + x.sum()


def of_mixture(run):
    """(end, gradient for x, gradient for the means) of `run(predict, x) -> x_N`."""
    means, x = MEANS.clone().requires_grad_(), randn(6, 2).requires_grad_()
    end = run(mixture(means), x)
    return end.detach(), *torch.autograd.grad(loss_of(end), (x, means))


def through(mode, levels, step=None):
    """`of_mixture` of a gradient mode."""
    return of_mixture(lambda predict, x: rollout(step, predict, x, levels, mode).x)


def vp(steps) -> list[Noise]:
    """Stable Diffusion's range of levels, uniform in lambda."""
    alpha_bar = torch.linspace(-2 * np.log(14.6146), -2 * np.log(0.029168), steps + 1, dtype=torch.float64).sigmoid()
    return [noise(a.sqrt(), (1 - a).sqrt()) for a in alpha_bar]


GRIDS = {"vp": vp, "flow": lambda n: grid(flow, n), "cosine": lambda n: grid(cosine, n)}


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


def slope(steps, errors):
    """The order that errors at so many steps show."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]
