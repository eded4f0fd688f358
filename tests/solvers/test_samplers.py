"""Every sampler against closed forms and against diffusers."""

from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from math import log2

import diffusers
import pytest
import torch

from solvers.denoiser import Path, Prediction, predicted
from solvers.exact import Gaussian, Mixture, bind
from solvers.levels import Clock, levels_of, prediction_type
from solvers.noise import Noise, cosine, flow, grid, noise, vp
from solvers.samplers import (
    ORDERS,
    SAMPLERS,
    STOCHASTIC,
    ancestral,
    dpmpp_2m,
    euler,
    heun,
    is_stochastic,
    sample,
    transition,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers under numpy 2

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MEANS = torch.tensor([[-1.0, 0.6], [1.2, 0.5], [0.2, -1.0]], dtype=torch.float64)
MIXTURE = bind(Mixture(MEANS, torch.tensor([0.5, 0.7, 0.4]), torch.tensor([1.0, 2.0, 1.5])), {})
SPREAD = bind(Gaussian(torch.zeros(3), 0.5), {})
ODE = [name for name in SAMPLERS if SAMPLERS[name] not in STOCHASTIC]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def last(step, predict, path, levels, generator=None):
    *_, end = sample(step, predict, path, levels, generator)
    return end


@cache
def reference(schedule):
    """The probability flow, by classical Runge-Kutta in tau."""

    def slope(w, tau):
        at = flow(tau)
        p = MIXTURE(Path(w), at)
        return p.eps - p.x0

    start, stop = grid(schedule, 1, 0.95, 0.05)
    ends = [at.sigma / (at.alpha + at.sigma) for at in (start, stop)]
    w, taus = randn(4, 2) / (start.alpha + start.sigma), torch.linspace(*ends, 201, dtype=torch.float64)
    for t, t_then in pairwise(taus):
        h = t_then - t
        a = slope(w, t)
        b = slope(w + h / 2 * a, t + h / 2)
        c = slope(w + h / 2 * b, t + h / 2)
        w = w + h / 6 * (a + 2 * b + 2 * c + slope(w + h * c, t_then))
    return w * (stop.alpha + stop.sigma)


@pytest.mark.parametrize("schedule", [flow, cosine])
@pytest.mark.parametrize("name", ODE)
def test_order(name, schedule):
    errors = []
    for n in (80, 160):
        end = last(SAMPLERS[name], MIXTURE, Path(randn(4, 2)), grid(schedule, n, 0.95, 0.05))
        errors.append((end.x - reference(schedule)).norm())
    assert log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.15)


def carried(step, levels, mean, std):
    """Mean and deviation after a run on N(mean, std^2) data: each step is affine in x and in noise, so read it off."""
    g, probe, one = (
        bind(Gaussian(mean, std), {}),
        torch.tensor([[0.0], [1.0], [0.0]]).double(),
        torch.ones(3, 1).double(),
    )
    m, v = levels[0].alpha * mean, levels[0].alpha ** 2 * std**2 + levels[0].sigma ** 2
    for now, then in pairwise(levels):
        b, ab, bc = step(g, Path(probe), now, then, one * torch.tensor([[0.0], [0.0], [1.0]])).x[:, 0]
        m, v = b + (ab - b) * m, (ab - b) ** 2 * v + (bc - b) ** 2
    return m, v.sqrt()


@pytest.mark.parametrize("schedule", [flow, cosine])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if SAMPLERS[name] in STOCHASTIC])
def test_order_in_distribution(name, schedule):
    mean, std, errors = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64), []
    for n in (80, 160):
        m, s = carried(SAMPLERS[name], grid(schedule, n, 0.95, 0.0), mean, std)
        errors.append((s - std).abs())
        assert (m - mean).abs() < 0.02
    assert log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.15)


def test_ancestral_is_exact_for_a_point():
    """Where the data is one point, x0 is known, and eta = 1 is the exact posterior at any step size."""
    for schedule in (flow, cosine):
        levels = grid(schedule, 3, 1.0, 0.3)
        m, s = carried(
            ancestral, levels, torch.tensor(0.7, dtype=torch.float64), torch.tensor(1e-9, dtype=torch.float64)
        )
        torch.testing.assert_close((m, s), (0.7 * levels[-1].alpha, levels[-1].sigma))


@pytest.mark.parametrize("schedule", [flow, cosine])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_from_pure_noise_to_data(name, schedule, dtype):
    x = randn(2000, 3, dtype=dtype)
    end = last(SAMPLERS[name], SPREAD, Path(x), grid(schedule, 80), torch.Generator().manual_seed(1))
    assert end.x.isfinite().all() and end.x.dtype == torch.float32
    assert end.x.std().item() == pytest.approx(0.5, rel=0.06)


@pytest.mark.parametrize("name", SAMPLERS)
def test_memory_follows_the_paths(name):
    step, levels, index = SAMPLERS[name], grid(cosine, 5), torch.tensor([4, 4, 0])
    *_, path = sample(step, MIXTURE, Path(randn(5, 2)), levels[:4], torch.Generator().manual_seed(0))
    fresh = randn(5, 2, seed=3)
    whole = step(MIXTURE, path, *levels[3:5], fresh)[index]
    picked = step(MIXTURE, path[index], *levels[3:5], fresh[index])
    torch.testing.assert_close((picked.x, picked.x0, picked.memory), (whole.x, whole.x0, whole.memory))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_continues_from_any_path(name):
    levels, generator = grid(flow, 6), torch.Generator().manual_seed(0)
    half = last(SAMPLERS[name], MIXTURE, Path(randn(3, 2)), levels[:4], generator)
    two = last(SAMPLERS[name], MIXTURE, half, levels[3:], generator)
    one = last(SAMPLERS[name], MIXTURE, Path(randn(3, 2)), levels, torch.Generator().manual_seed(0))
    torch.testing.assert_close((two.x, two.x0), (one.x, one.x0), rtol=0, atol=0)


def test_a_generator_for_each_sample():
    x, levels = randn(3, 2), grid(flow, 5)
    seeds = lambda *numbers: [torch.Generator().manual_seed(n) for n in numbers]  # noqa: E731
    whole = last(ancestral, MIXTURE, Path(x), levels, seeds(7, 8, 9)).x
    single = [last(ancestral, MIXTURE, Path(x[i : i + 1]), levels, seeds(7 + i)[0]).x for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(single))


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_stochastic_steps_draw(name):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    last(SAMPLERS[name], MIXTURE, Path(randn(2, 2)), grid(flow, 2), generator)
    assert torch.equal(before, generator.get_state()) != is_stochastic(SAMPLERS[name])


def test_noise_is_required_where_it_is_used():
    with pytest.raises(ValueError, match="stochastic"):
        ancestral(MIXTURE, Path(randn(2, 2)), cosine(0.5), cosine(0.4))
    assert is_stochastic(partial(ancestral, eta=0.5)) and not is_stochastic(partial(euler))


def test_transition_golden():
    at, then = vp(0.3), vp(0.6)
    p = predicted("eps", torch.tensor([1.0]).double(), at, torch.tensor([0.5]).double())
    mean, std = transition(p, at, then)
    golden = torch.tensor([1.0619792425, 0.5345224838, 0.9916364350], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([p.x0[0], std, mean[0]]), golden, rtol=0, atol=1e-9)
    assert std.ndim == 0


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_transition_in_all_coordinates(eta):
    """x / (alpha + sigma) of VP, VE and flow levels of one ratio is one state: so are the mean and the deviation."""
    said = []
    for scale in (lambda k: 1 / (1 + k**2).sqrt(), torch.ones_like, lambda k: 1 / (1 + k)):
        now, then = (Noise(scale(k), k * scale(k)) for k in torch.tensor([2.0, 0.8], dtype=torch.float64))
        mean, std = transition(Prediction(randn(2, 2), randn(2, 2, seed=1)), now, then, eta)
        said.append((mean / then.alpha, std / then.alpha))
    torch.testing.assert_close(said[0], said[1])
    torch.testing.assert_close(said[0], said[2])


def test_eta_zero_is_euler():
    levels = grid(flow, 6)
    quiet = last(partial(ancestral, eta=0.0), MIXTURE, Path(randn(3, 2)), levels).x
    torch.testing.assert_close(quiet, last(euler, MIXTURE, Path(randn(3, 2)), levels).x)


class Guide:
    """x0 of one mixture pushed away from another by `omega`, whole (CFG) or, with `split`, as CFG++'s shift."""

    tensors = ()
    free, wanted = MIXTURE, bind(Mixture(MEANS[:1], 0.5), {})

    def __init__(self, omega, split):
        self.omega, self.split, self.asked = omega, split, []

    def __call__(self, path, at):
        self.asked.append(dict(path.memory))
        p, memory = self.free(path, at), {"guide.count": path.memory.get("guide.count", torch.zeros(len(path.x))) + 1}
        push = self.omega * (self.wanted(path, at).x0 - p.x0)
        if self.split:
            return p._replace(shift=push, memory=memory)
        return Prediction(p.x0 + push, p.eps - at.alpha / at.sigma * push, memory=memory)


@pytest.mark.parametrize("schedule", [flow, cosine])
@pytest.mark.parametrize("stop", [0.4, 0.0])
@pytest.mark.parametrize("step", [euler, heun])
def test_shift_is_guidance_of_a_scale_that_follows_the_step(step, stop, schedule):
    """CFG++ of lambda is CFG of lambda / (1 - k'/k), k = sigma / alpha, in every stage of the step."""
    now, then, x, scale = schedule(0.7), schedule(stop), randn(4, 2), 0.6
    omega = scale / (1 - then.sigma / then.alpha * now.alpha / now.sigma)
    shifted = step(Guide(scale, True), Path(x), now, then)
    torch.testing.assert_close(shifted.x, step(Guide(omega, False), Path(x), now, then).x)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", [flow, cosine])
def test_shift_is_added_once(name, schedule):
    """A step adds alpha' times the shift to x and the shift to x0, and its history stays unshifted."""
    step, levels, fresh = SAMPLERS[name], grid(schedule, 3), randn(4, 2, seed=2)
    path = plain = Path(randn(4, 2))
    for now, then in pairwise(levels):
        shift = torch.full((4, 2), 0.1, dtype=torch.float64)
        predict = lambda p, at: MIXTURE(p, at)._replace(shift=shift)  # noqa: E731, B023
        plain, path = step(MIXTURE, path, now, then, fresh), step(predict, path, now, then, fresh)
        if name != "heun" or then.sigma == 0:
            torch.testing.assert_close(path.x, plain.x + then.alpha * shift)
            torch.testing.assert_close(path.x0, plain.x0 + shift)
        torch.testing.assert_close(path.memory, plain.memory)
        assert path.x.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_memory_belongs_to_the_step(name):
    """Every stage reads the memory that the step started with; the step keeps the first stage's."""
    guide, path = Guide(0.5, True), Path(randn(2, 2), memory={"other": torch.tensor([5, 6])})
    for count, (now, then) in enumerate(pairwise(grid(flow, 3)), start=1):
        guide.asked.clear()
        before = dict(path.memory)
        path = SAMPLERS[name](guide, path, now, then, randn(2, 2, seed=1))
        assert all(asked.keys() == before.keys() for asked in guide.asked)
        assert path.memory["guide.count"].tolist() == [count, count]
        assert path.memory["other"].tolist() == [5, 6]


def net(x, t):
    """A network that no closed form knows, whose output depends on the timestep."""
    return (x + t / 300).tanh() + 0.2 * (t / 170).sin()


class Net:
    tensors = ()

    def __init__(self, scheduler, own=False):
        self.clock, self.space = Clock(scheduler, own), prediction_type(scheduler)

    def __call__(self, path, at):
        return predicted(self.space, path.x, at, net(path.x, self.clock(at)))


def theirs(scheduler, x, **options):
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.float()), t, x, **options).prev_sample
    return x


def compare(ours, reference, atol=1e-5):
    torch.testing.assert_close(ours, reference, rtol=0, atol=atol * reference.abs().max().item())


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("space", ["epsilon", "v_prediction", "sample"])
def test_euler_is_ddim(to_one, space):
    config = SD | {"set_alpha_to_one": to_one, "clip_sample": False, "steps_offset": 1, "prediction_type": space}
    s, x = diffusers.DDIMScheduler(**config), randn(2, 3, dtype=torch.float32)
    s.set_timesteps(20)
    compare(last(euler, Net(s), Path(x), levels_of(s)).x, theirs(s, x))


def test_euler_is_flow_matching_euler():
    s, x = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), randn(2, 3, dtype=torch.float32)
    s.set_timesteps(20)
    compare(last(euler, Net(s), Path(x), levels_of(s)).x, theirs(s, x))


@pytest.mark.parametrize("config", [{}, {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}])
def test_euler_is_euler(config):
    """diffusers' Euler keeps y = x / alpha, and shows the network x."""
    s = diffusers.EulerDiscreteScheduler(**SD, **config)
    s.set_timesteps(20)
    levels, x = levels_of(s), randn(2, 3, dtype=torch.float32)
    y = x / levels[0].alpha
    for t in s.timesteps:
        y = s.step(net(s.scale_model_input(y, t), t), t, y).prev_sample
    compare(last(euler, Net(s, own=True), Path(x), levels).x, y * levels[-1].alpha)


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_ancestral_is_ddim_with_eta(to_one, eta):
    s = diffusers.DDIMScheduler(**SD, set_alpha_to_one=to_one, clip_sample=False, steps_offset=1)
    s.set_timesteps(20)
    x, noises = randn(2, 3, dtype=torch.float32), randn(20, 2, 3, seed=1, dtype=torch.float32)
    path, levels, predict, reference = Path(x), levels_of(s), Net(s), x
    for i, t in enumerate(s.timesteps):
        path = ancestral(predict, path, levels[i], levels[i + 1], noises[i], eta=eta)
        reference = s.step(net(reference, t.float()), t, reference, eta=eta, variance_noise=noises[i]).prev_sample
    compare(path.x, reference)


@pytest.mark.parametrize("space", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_2m_is_dpm_solver_multistep(karras, space):
    """20 steps: below 15 theirs also ends at lower order."""
    s = diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=karras, prediction_type=space)
    s.set_timesteps(20)
    x = randn(2, 3, dtype=torch.float32)
    compare(last(dpmpp_2m, Net(s, own=True), Path(x), levels_of(s)).x, theirs(s, x))


def test_every_sampler_declares_its_order():
    assert ORDERS.keys() == SAMPLERS.keys() and set(SAMPLERS.values()) >= STOCHASTIC


def test_a_step_of_no_length_changes_nothing():
    """Schedulers may end on one level twice; the history must survive it."""
    at, path = noise(0.9, 0.3), Path(randn(2, 2))
    for step in (euler, heun, dpmpp_2m):
        torch.testing.assert_close(step(MIXTURE, path, at, at).x, path.x)
    before = dpmpp_2m(MIXTURE, path, noise(0.8, 0.6), at)
    torch.testing.assert_close(dpmpp_2m(MIXTURE, replace(before), at, at).x, before.x)
