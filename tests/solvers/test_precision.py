"""A network in half precision, a state in float32: what is kept exact, and how far the gradient moves."""

import pytest
import torch

from difftune.models import load
from guidance.guided import guided
from guidance.methods.catalogue import CFG
from solvers.denoiser import predicted
from solvers.latent import LatentModel
from solvers.noise import cosine, grid
from solvers.rollout.modes import rollout
from solvers.samplers.catalogue import SAMPLERS, euler
from tests.support import pipelines

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


def job(pipe, steps):
    model = LatentModel(pipe)
    with torch.no_grad():
        conds = model.encode(["red circle"])
    x = model.noise(1, torch.Generator().manual_seed(0))
    return guided(model.denoiser, CFG(5.0), conds), x.float().requires_grad_(), model.levels(steps)


class Toy:
    """A flow network in half precision."""

    def __init__(self, dtype):
        torch.manual_seed(0)
        self.body = torch.nn.Linear(4, 4).to(dtype)
        self.tensors = (*self.body.parameters(),)

    def __call__(self, path, at):
        return predicted("flow", path.x, at, self.body(path.x.to(self.body.weight.dtype)).tanh())


def check_float32(name, predict, x, levels):
    """State, memory and gradient of a run."""
    seen, noise = Seen(predict), torch.randn(len(levels) - 1, *x.shape)
    path = rollout(SAMPLERS[name], seen, x, levels, "checkpoint", noise)
    assert path.x.dtype == path.x0.dtype == torch.float32
    assert seen.dtypes <= {torch.float32, torch.float64} and torch.float32 in seen.dtypes
    (gradient,) = torch.autograd.grad(path.x.sum(), x)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", HALVES)
def test_the_state_stays_in_float32(name, dtype):
    check_float32(name, Toy(dtype), torch.randn(2, 4).requires_grad_(), grid(cosine, 4, 0.95))


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_the_state_of_a_pipeline_stays_in_float32(name):
    pipe = pipelines.sd().to(dtype=torch.bfloat16)
    check_float32(name, *job(pipe, 2))
    assert pipe.unet.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", HALVES)
def test_recomputed_is_full_bit_for_bit_in_half_precision(dtype):
    predict, x, levels = job(pipelines.sd().to(dtype=dtype), 2)
    full, again = (
        torch.autograd.grad(rollout(euler, predict, x, levels, mode).x.square().sum(), x)[0]
        for mode in ("full", "checkpoint")
    )
    assert torch.equal(full, again)


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "least"), [(1.0, 0.97), (3.0, 0.9)])
def test_a_bfloat16_network_keeps_the_gradients_direction(scale, least):
    """tiny itself: the cosine with the gradient of the float32 network, for the noise, in the median of eight noises.

    A single one may be far off: the first step multiplies the rounding of eps by sigma / alpha, which is 14 there, and
    CFG by its scale. In 4 steps: 2 would start in the middle of the levels, where pure noise is not an input.
    """
    pipe, found = load("tiny"), []
    pipe.unet.requires_grad_(False)
    model = LatentModel(pipe)
    x = model.noise(8, [torch.Generator().manual_seed(seed) for seed in range(8)]).requires_grad_()
    with torch.no_grad():
        conds = model.encode(["a red circle left of a blue square"] * 8)
    for dtype in (torch.float32, torch.bfloat16):
        pipe.unet.to(dtype)
        end = rollout(euler, guided(model.denoiser, CFG(scale), conds), x, model.levels(4)).x
        found.append(torch.autograd.grad((end.sin() + end.square() / 2).mean(), x)[0].flatten(1))
    cosines = torch.nn.functional.cosine_similarity(*found, dim=1)
    assert cosines.median() >= least, cosines
    assert not torch.equal(*found)
