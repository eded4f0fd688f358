"""Every sampler against closed forms and against diffusers."""

from functools import cache, partial
from itertools import pairwise
from math import log2

import diffusers
import numpy as np
import pytest
import torch

from solvers.denoiser import Path, Prediction, predicted
from solvers.exact import Gaussian, Mixture, bind
from solvers.levels import Clock, levels_of, prediction_type
from solvers.noise import Noise, cosine, flow, grid, log_snr, noise, vp
from solvers.samplers.catalogue import ORDERS, SAMPLERS, STOCHASTIC, ancestral, euler, is_stochastic, sample, transition
from solvers.samplers.multistep import deis, dpmpp_2m, sde_dpmpp_2m, unipc_1, unipc_2
from solvers.samplers.singlestep import dpm_2, edm_heun, heun3, midpoint

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
def reference(start, stop):
    """x, the probability flow's end by classical Runge-Kutta in tau, and the gradient of its squared norm."""

    def slope(w, tau):
        p = MIXTURE(Path(w), flow(tau))
        return p.eps - p.x0

    x = randn(4, 2).requires_grad_()
    w = x / (start.alpha + start.sigma)
    ends = [at.sigma / (at.alpha + at.sigma) for at in (start, stop)]
    for t, t_then in pairwise(torch.linspace(*ends, 601, dtype=torch.float64)):
        h = t_then - t
        a = slope(w, t)
        b = slope(w + h / 2 * a, t + h / 2)
        c = slope(w + h / 2 * b, t + h / 2)
        w = w + h / 6 * (a + 2 * b + 2 * c + slope(w + h * c, t_then))
    end = w * (stop.alpha + stop.sigma)
    return x, end.detach(), torch.autograd.grad(end.square().sum(), x)[0]


ENDS = {schedule: tuple(grid(schedule, 1, 0.95, 0.05)) for schedule in (flow, cosine)}


@pytest.mark.parametrize("schedule", [flow, cosine])
@pytest.mark.parametrize("name", ODE)
@pytest.mark.sampled(2)
def test_order(name, schedule):
    x, exact, _ = reference(*ENDS[schedule])
    errors = []
    for n in (80, 160):
        end = last(SAMPLERS[name], MIXTURE, Path(x.detach()), grid(schedule, n, 0.95, 0.05))
        errors.append((end.x - exact).norm())
    assert log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.15)


def even(n):
    """n + 1 VP levels, even in lambda."""
    return [vp(torch.sigmoid(2 * snr)) for snr in torch.linspace(-2.6, 2.6, n + 1, dtype=torch.float64)]


def slope(errors):
    """Least-squares fit of -log(error) against log(N)."""
    return -np.polyfit(np.log(list(errors)), np.log(list(errors.values())), 1)[0]


ENDS[even] = tuple(even(1))


@pytest.mark.parametrize("name", ODE)
def test_order_of_the_run_and_of_its_gradient(name):
    """Over N = 20 ... 160: the gradient of the discrete run converges as fast as the run."""
    x, exact, gradient = reference(*ENDS[even])
    errors, off = {}, {}
    for n in (20, 40, 80, 160):
        end = last(SAMPLERS[name], MIXTURE, Path(x), even(n)).x
        errors[n] = (end - exact).norm().item()
        off[n] = (torch.autograd.grad(end.square().sum(), x)[0] - gradient).norm().item()
    assert slope(errors) == pytest.approx(ORDERS[name], abs=0.15)
    assert slope(off) == pytest.approx(ORDERS[name], abs=0.15)


SCALES = {"vp": lambda k: 1 / (1 + k**2).sqrt(), "ve": torch.ones_like, "flow": lambda k: 1 / (1 + k)}
SIZES = {"vp": torch.hypot, "ve": lambda alpha, sigma: alpha, "flow": torch.add}


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_coordinates_are_one(name):
    """VP, VE and flow levels of the same ratios give the same run, and every stage stays in the step's coordinates."""
    said = {}
    for kind, scale in SCALES.items():
        levels = [Noise(scale(k), k * scale(k)) for k in torch.tensor([20.0, 9.0, 2.0, 0.4, 0.0], dtype=torch.float64)]
        sizes, path = [], Path(randn(4, 2) * (levels[0].alpha + levels[0].sigma))

        def predict(p, at):
            assert at.sigma > 0  # where a network that predicts x0 has no eps
            sizes.append(SIZES[kind](*at))  # noqa: B023
            return MIXTURE(p, at)

        for i, (now, then) in enumerate(pairwise(levels)):
            path = SAMPLERS[name](predict, path, now, then, randn(4, 2, seed=i))
        said[kind] = path.x
        torch.testing.assert_close(torch.stack(sizes), torch.ones(len(sizes), dtype=torch.float64))
    torch.testing.assert_close(said["vp"], said["ve"])
    torch.testing.assert_close(said["vp"], said["flow"])


def carried(step, levels, mean, std):
    """Mean and deviation after a run on N(mean, std^2) data: it is affine in x and in each noise, so read that off."""
    x, *noises = torch.eye(len(levels) + 1, dtype=torch.float64)[1:, :, None]  # row 0: neither; 1: x; 2 ...: a noise
    path = Path(x)
    for fresh, (now, then) in zip(noises, pairwise(levels), strict=True):
        path = step(bind(Gaussian(mean, std), {}), path, now, then, fresh)
    base, gains = path.x[0, 0], path.x[1:, 0] - path.x[0, 0]
    start = levels[0]
    variance = gains[0] ** 2 * (start.alpha**2 * std**2 + start.sigma**2) + (gains[1:] ** 2).sum()
    return base + gains[0] * start.alpha * mean, variance.sqrt()


@pytest.mark.parametrize("schedule", [flow, cosine])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if SAMPLERS[name] in STOCHASTIC])
def test_order_in_distribution(name, schedule):
    mean, std, errors = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64), []
    stop = ENDS[schedule][1]
    for n in (80, 160):
        m, s = carried(SAMPLERS[name], grid(schedule, n, 0.95, 0.05), mean, std)
        errors.append((s - torch.hypot(stop.alpha * std, stop.sigma)).abs())
        torch.testing.assert_close(m, stop.alpha * mean)
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
@pytest.mark.parametrize("start, stop", [(0.7, 0.4), (0.7, 0.0), (1.0, 0.6)])
@pytest.mark.parametrize("name", ODE)
def test_shift_is_guidance_of_a_scale_that_follows_the_step(name, start, stop, schedule):
    """CFG++ of lambda is CFG of lambda / (1 - k'/k), k = sigma / alpha, in every stage of the step."""
    step, now, then, x, scale = SAMPLERS[name], schedule(start), schedule(stop), randn(4, 2), 0.6
    omega = scale / (1 - then.sigma / then.alpha * now.alpha / now.sigma)
    shifted = step(Guide(scale, True), Path(x), now, then)
    torch.testing.assert_close(shifted.x, step(Guide(omega, False), Path(x), now, then).x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [flow, cosine])
def test_shift_of_a_stochastic_step(schedule, eta):
    """There k' is that of the mean: sqrt(sigma'^2 - std^2) / alpha'."""
    now, then, x, fresh = schedule(0.7), schedule(0.4), randn(4, 2), randn(4, 2, seed=1)
    _, std = transition(MIXTURE(Path(x), now), now, then, eta)
    omega = 0.6 / (1 - (then.sigma**2 - std**2).sqrt() / then.alpha * now.alpha / now.sigma)
    for step in (partial(ancestral, eta=eta), *([sde_dpmpp_2m] if eta == 1 else [])):
        shifted = step(Guide(0.6, True), Path(x), now, then, fresh)
        torch.testing.assert_close(shifted.x, step(Guide(omega, False), Path(x), now, then, fresh).x)


ONE_CALL = [name for name in SAMPLERS if name not in ("heun", "edm_heun", "midpoint", "rk4", "dpm_2", "dpm_3")]


@pytest.mark.parametrize("name", ONE_CALL)
@pytest.mark.parametrize("schedule", [flow, cosine])
def test_shift_is_added_once(name, schedule):
    """A step adds alpha' times the shift to x and the shift to x0, and its history stays unshifted."""
    step, levels, fresh = SAMPLERS[name], grid(schedule, 4), randn(4, 2, seed=2)
    path = Path(randn(4, 2))
    for now, then in pairwise(levels):
        shift = torch.full((4, 2), 0.1, dtype=torch.float64)
        predict = lambda p, at: MIXTURE(p, at)._replace(shift=shift)  # noqa: E731, B023
        plain, path = step(MIXTURE, path, now, then, fresh), step(predict, path, now, then, fresh)
        torch.testing.assert_close(path.x, plain.x + then.alpha * shift)
        torch.testing.assert_close(path.x0, plain.x0 + shift)
        histories = [{k: v for k, v in p.memory.items() if k != "unipc.shift"} for p in (path, plain)]
        torch.testing.assert_close(*histories)
        assert path.x.isfinite().all()


def written_unipc(order, x, levels, said):
    """The last step of `levels` as UniPC's paper writes it: corrected where `said` tells the prediction at its end.

    CFG of lambda / (1 - k'/k) = -lambda / B in both evaluations of the step; the history is unguided.
    """
    i = len(levels) - 2
    (now, then), snr = levels[i:], [log_snr(at) for at in levels]
    h = snr[i + 1] - snr[i]
    b = (-h).expm1()
    guided = [p.x0 - p.shift / b for p in said[i:]]
    order, ratios, rises, weights = min(order, i + 1), [], [], [0.5]
    if order == 2:
        ratios.append((snr[i - 1] - snr[i]) / h)
        rises.append((said[i - 1].x0 - said[i].x0) / ratios[-1])
    if len(guided) == 2:
        ratios.append(torch.ones_like(h))
        rises.append(guided[1] - guided[0])
    if len(ratios) == 2:
        phi = b / -h - 1
        right = torch.stack([phi / b, 2 * (phi / -h - 0.5) / b])
        weights = torch.linalg.solve(torch.stack([torch.ones(2).double(), torch.stack(ratios)]), right)
    rise = sum(weight * rise for weight, rise in zip(weights, rises, strict=False))
    return then.sigma / now.sigma * x - then.alpha * b * (guided[0] + rise)


@pytest.mark.parametrize("order", [1, 2])
def test_shift_under_a_corrector(order):
    guide, levels, said = Guide(0.6, True), even(6), []
    path, x = Path(randn(4, 2)), randn(4, 2)
    for i, (now, then) in enumerate(pairwise(levels)):
        path = SAMPLERS[f"unipc_{order}"](guide, path, now, then)
        said.append(guide(Path(x), now))
        start = written_unipc(order, start, levels[: i + 1], said) if i else x  # noqa: F821
        x = written_unipc(order, start, levels[: i + 2], said)
        torch.testing.assert_close(path.x, x)


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


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_step_keeps_the_memory_of_its_first_stage(name):
    def predict(path, at):
        return MIXTURE(path, at)._replace(memory={"own.sigma": at.sigma.expand(len(path.x))})

    now, then = flow(0.7), flow(0.4)
    path = SAMPLERS[name](predict, Path(randn(2, 2)), now, then, randn(2, 2, seed=1))
    assert path.memory["own.sigma"].tolist() == [now.sigma] * 2


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


def test_sde_dpmpp_2m_is_dpm_solver_multistep():
    s = diffusers.DPMSolverMultistepScheduler(**SD, algorithm_type="sde-dpmsolver++")
    s.set_timesteps(20)
    x, noises, levels = randn(2, 3, dtype=torch.float32), randn(20, 2, 3, seed=1, dtype=torch.float32), levels_of(s)
    path, predict, reference = Path(x), Net(s, own=True), x
    for i, t in enumerate(s.timesteps):
        path = sde_dpmpp_2m(predict, path, levels[i], levels[i + 1], noises[i])
        reference = s.step(net(reference, t.float()), t, reference, variance_noise=noises[i]).prev_sample
    compare(path.x, reference)


NO_CORRECTOR = {"disable_corrector": [*range(20)]}
MULTISTEP = {
    "deis": (deis, diffusers.DEISMultistepScheduler, {"solver_order": 2}),
    "unipc_1": (unipc_1, diffusers.UniPCMultistepScheduler, {"solver_order": 1}),
    "unipc_2": (unipc_2, diffusers.UniPCMultistepScheduler, {"solver_order": 2}),
    "deis of order 1": (euler, diffusers.DEISMultistepScheduler, {"solver_order": 1}),
    "dpm++ of order 1": (euler, diffusers.DPMSolverMultistepScheduler, {"solver_order": 1}),
    "uni-p of order 1": (euler, diffusers.UniPCMultistepScheduler, {"solver_order": 1, **NO_CORRECTOR}),
    "uni-p of order 2": (dpmpp_2m, diffusers.UniPCMultistepScheduler, NO_CORRECTOR),
}


@pytest.mark.parametrize("space", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("case", MULTISTEP)
def test_multistep_is_diffusers(case, space):
    step, scheduler, options = MULTISTEP[case]
    s, x = scheduler(**SD, **options, prediction_type=space), randn(2, 3, dtype=torch.float32)
    s.set_timesteps(20)
    compare(last(step, Net(s, own=True), Path(x), levels_of(s)).x, theirs(s, x))


@pytest.mark.parametrize("options", [{}, {"use_karras_sigmas": True}])
def test_edm_heun_is_diffusers_heun(options):
    """Which is EDM's algorithm 1; `heun` is another discretisation but on the levels of a flow."""
    s, x = diffusers.HeunDiscreteScheduler(**SD, **options), randn(2, 3, dtype=torch.float32)
    s.set_timesteps(12)
    levels = levels_of(s)
    y = x / levels[0].alpha
    for t in s.timesteps:
        y = s.step(net(s.scale_model_input(y, t), t), t, y).prev_sample
    run = Net(s)
    compare(last(edm_heun, run, Path(x), levels).x, y * levels[-1].alpha)
    assert (last(SAMPLERS["heun"], run, Path(x), levels).x - y).abs().max() > 1e-3


def test_edm_heun_by_hand():
    """EDM's algorithm 1 on VE levels, and Heun's method on those of a flow, where both are one."""
    x, levels = randn(4, 2), [noise(1.0, k) for k in (3.0, 1.0, 0.4, 0.0)]
    expected = x
    for now, then in pairwise(levels):
        d, h = MIXTURE(Path(expected), now).eps, then.sigma - now.sigma
        guess = expected + h * d
        expected = guess if then.sigma == 0 else expected + h * (d + MIXTURE(Path(guess), then).eps) / 2
    torch.testing.assert_close(last(edm_heun, MIXTURE, Path(x), levels).x, expected)


def test_dpm_2_is_k_diffusions():
    """But for the last step, to sigma = 0, which theirs makes of infinities."""
    s, x = diffusers.KDPM2DiscreteScheduler(**SD), randn(2, 3, dtype=torch.float32)
    s.set_timesteps(20)
    levels = levels_of(s)[:-1]
    y = x / levels[0].alpha
    for t in s.timesteps[: 2 * len(levels) - 2]:
        y = s.step(net(s.scale_model_input(y, t), t), t, y).prev_sample
    compare(last(dpm_2, Net(s), Path(x), levels).x, y * levels[-1].alpha)


def test_every_sampler_declares_its_order():
    assert ORDERS.keys() == SAMPLERS.keys() and set(SAMPLERS.values()) >= STOCHASTIC


@pytest.mark.parametrize("name", ODE)
def test_a_step_of_no_length_changes_nothing(name):
    """Schedulers may end on one level twice; the history must survive it."""
    step, at = SAMPLERS[name], noise(0.9, 0.3)
    path = step(MIXTURE, Path(randn(2, 2)), noise(0.8, 0.6), noise(0.85, 0.5))
    path = once = step(MIXTURE, path, noise(0.85, 0.5), at)
    for _ in range(2):
        path = step(MIXTURE, path, at, at)
    if not name.startswith("unipc"):  # which corrects the step before
        torch.testing.assert_close(path.x, once.x)
    assert step(MIXTURE, path, at, noise(1.0, 0.0)).x.isfinite().all()


@pytest.mark.parametrize("name", ["dpm_2", "dpm_3"])
def test_steps_that_have_no_middle_in_lambda(name):
    """From pure noise and to data DPM-Solver is the Runge-Kutta method that it is at small h."""
    plain = {"dpm_2": midpoint, "dpm_3": heun3}[name]
    for now, then in ((flow(1.0), flow(0.8)), (cosine(1.0), cosine(0.8)), (flow(0.1), flow(0.0))):
        ours = SAMPLERS[name](MIXTURE, Path(randn(2, 2)), now, then)
        torch.testing.assert_close(ours.x, plain(MIXTURE, Path(randn(2, 2)), now, then).x, rtol=0, atol=0)
    near, off = flow(0.5 - 1e-4), SAMPLERS[name](MIXTURE, Path(randn(2, 2)), flow(0.5), flow(0.5 - 1e-4)).x
    torch.testing.assert_close(off, plain(MIXTURE, Path(randn(2, 2)), flow(0.5), near).x, rtol=0, atol=1e-11)
