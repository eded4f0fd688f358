"""The gradient of every step, as it passes: its norm, and the step where it stops being finite."""

import pytest
import torch

from solvers.denoiser import predicted
from solvers.noise import cosine, grid
from solvers.rollout.modes import rollout, unchecked_gradients, watch_gradients
from solvers.samplers.catalogue import euler


class Sharp:
    """eps = w x, whose gradient is infinite at one step's level alone."""

    def __init__(self, level):
        self.tensors, self.level = (torch.tensor(0.5, requires_grad=True),), level

    def __call__(self, path, at):
        zero = (path.x - path.x.detach()).abs().sqrt() if at is self.level else 0.0
        return predicted("eps", path.x, at, self.tensors[0] * path.x + zero)


LEVELS = grid(cosine, 5, 0.95, 0.0)


@pytest.mark.parametrize("gradient", ["full", "checkpoint"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_gradient_that_is_not_finite_names_its_step(gradient, step):
    norms = {}
    with watch_gradients(norms.__setitem__):
        end = rollout(euler, Sharp(LEVELS[step]), torch.ones(1, 2, requires_grad=True), LEVELS, gradient).x
    with pytest.raises(FloatingPointError, match=f"not finite at step {step} of 5"):
        end.sum().backward()
    assert sorted(norms) == list(range(step + 1, 5)) and all(norm > 0 for norm in norms.values())


@pytest.mark.parametrize("gradient", ["full", "checkpoint"])
def test_norms_of_every_step_are_those_of_the_latents(gradient):
    """eps = w x: each latent's gradient is a product of scalars."""
    norms, x = {}, torch.ones(1, 4, requires_grad=True)
    with watch_gradients(norms.__setitem__):
        end = rollout(euler, Sharp(None), x, LEVELS, gradient).x
    (at_start,) = torch.autograd.grad(end.sum(), x)
    factor, expected = 1.0, {}
    for i in reversed(range(5)):
        now, then = LEVELS[i], LEVELS[i + 1]
        factor *= (then.alpha / now.alpha + 0.5 * (then.sigma - now.sigma * then.alpha / now.alpha)).item()
        expected[i] = abs(factor) * 2
    assert norms == pytest.approx(expected, rel=1e-5)
    assert norms[0] == pytest.approx(at_start.norm().item(), rel=1e-6)


@pytest.mark.parametrize("gradient", ["full", "checkpoint", "truncated:2", "truncated:2:drtune", "revolve:2"])
def test_a_gradient_that_comes_so_from_the_loss_blames_no_step(gradient):
    with watch_gradients(lambda index, norm: None):
        end = rollout(euler, Sharp(None), torch.ones(1, 2, requires_grad=True), LEVELS, gradient).x
    with pytest.raises(FloatingPointError, match="loss is not finite at the run's end, before any of its 5 steps"):
        (0 * end).sqrt().sum().backward()


def test_only_a_run_that_is_watched_is_checked_where_checks_are_off():
    x = torch.ones(1, 2, requires_grad=True)
    with unchecked_gradients():
        free = rollout(euler, Sharp(LEVELS[3]), x, LEVELS, "revolve:2").x
        with watch_gradients(lambda index, norm: None):
            ends = [rollout(euler, Sharp(LEVELS[3]), x, LEVELS, mode).x for mode in ("revolve:2", "checkpoint")]
    assert not torch.autograd.grad(free.sum(), x)[0].isfinite().any()
    ends.append(rollout(euler, Sharp(LEVELS[3]), x, LEVELS, "revolve:2").x)  # the block is left
    for end in ends:
        with pytest.raises(FloatingPointError, match="not finite at step 3 of 5"):
            end.sum().backward()
