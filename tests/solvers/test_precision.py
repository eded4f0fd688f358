"""A network in half precision, a state in float32: what is kept exact, and how far the gradient moves."""

import pytest
import torch

from difftune.models import load
from guidance.guided import guided
from guidance.methods import CFG
from solvers.denoiser import predicted
from solvers.latent import LatentModel
from solvers.noise import cosine, grid
from solvers.rollout import rollout
from solvers.samplers import SAMPLERS, euler
from tests import pipelines

HALVES = [torch.bfloat16, torch.float16]


class Seen:
    """A `Predict` that writes down the dtypes that pass through it."""

    def __init__(self, predict):
        self.predict, self.tensors, self.dtypes = predict, predict.tensors, set()

    def __call__(self, path, at):
        p = self.predict(path, at)
        memory = [*path.memory.values(), *p.memory.values()]
        self.dtypes |= {t.dtype for t in (path.x, p.x0, p.eps, *memory) if t.is_floating_point()}
        return p


def job(pipe, steps, prompt="red circle"):
    model = LatentModel(pipe)
    with torch.no_grad():
        conds = model.encode([prompt])
    x = model.noise(1, torch.Generator().manual_seed(0))
    return guided(model.denoiser, CFG(5.0), conds), x.float().requires_grad_(), model.levels(steps)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", HALVES)
def test_the_state_stays_in_float32(name, dtype):
    pipe = pipelines.sd().to(dtype=dtype)
    predict, x, levels = job(pipe, 2)
    seen, noise = Seen(predict), torch.randn(2, *x.shape)
    path = rollout(SAMPLERS[name], seen, x, levels, "checkpoint", noise)
    assert path.x.dtype == path.x0.dtype == torch.float32
    assert seen.dtypes <= {torch.float32, torch.float64} and torch.float32 in seen.dtypes
    (gradient,) = torch.autograd.grad(path.x.sum(), x)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()
    assert pipe.unet.dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_recomputed_is_full_bit_for_bit_in_half_precision(dtype):
    predict, x, levels = job(pipelines.sd().to(dtype=dtype), 2)
    full, again = (
        torch.autograd.grad(rollout(euler, predict, x, levels, mode).x.square().sum(), x)[0]
        for mode in ("full", "checkpoint")
    )
    assert torch.equal(full, again)


def test_a_bfloat16_network_keeps_the_gradients_direction():
    """tiny itself: cosine with the gradient of the float32 network at least .99, for the noise."""
    pipe, found = load("tiny"), []
    pipe.unet.requires_grad_(False)
    for dtype in (torch.float32, torch.bfloat16):
        pipe.unet.to(dtype)
        predict, x, levels = job(pipe, 2, "a red circle left of a blue square")
        end = rollout(euler, predict, x, levels).x
        found.append(torch.autograd.grad((end.sin() + end.square() / 2).mean(), x)[0].flatten())
    assert torch.nn.functional.cosine_similarity(*found, dim=0) >= 0.99
    assert not torch.equal(*found)


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
    from solvers.rollout import watch_gradients

    norms = {}
    with watch_gradients(norms.__setitem__):
        end = rollout(euler, Sharp(LEVELS[step]), torch.ones(1, 2, requires_grad=True), LEVELS, gradient).x
    with pytest.raises(FloatingPointError, match=f"not finite at step {step} of 5"):
        end.sum().backward()
    assert sorted(norms) == list(range(step + 1, 5)) and all(norm > 0 for norm in norms.values())


@pytest.mark.parametrize("gradient", ["full", "checkpoint"])
def test_norms_of_every_step_are_those_of_the_latents(gradient):
    """eps = w x: each latent's gradient is a product of scalars."""
    from solvers.rollout import watch_gradients

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
