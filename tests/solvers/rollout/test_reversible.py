"""Reversible samplers: exact gradients for themselves, exact inversion, orders, and what is refused."""

import weakref
from itertools import pairwise

import pytest
import torch

from solvers.denoiser import Path
from solvers.noise import Noise, cosine, flow, grid
from solvers.rollout.modes import rollout
from solvers.rollout.reversible import REVERSIBLE, reversible_sampler
from solvers.samplers.catalogue import renoise
from tests.support.sweeps import GRIDS, MEANS, Net, loss_of, mixture, of_mixture, randn, rel, slope, through, vp

ORDERS = {  # at least (McCallum-Foster, EDICT), or within 0.15
    "bdia": 2,
    "alf": 2,
    "belm": 2,
    "reversible-heun": 2,
    "mccallum-foster:euler": 1,
    "mccallum-foster:midpoint": 2,
    "mccallum-foster:heun": 2,
    "mccallum-foster:rk4": 4,
    "edict": 0.85,
    "bdia:0.5": 1,
}
ANYWHERE = [name for name in REVERSIBLE if name != "edict"]  # from alpha = 0 to sigma = 0


def run_of(option, levels, dtype=torch.float64):
    """The sampler as a function under autograd."""

    def run(predict, x):
        sampler = reversible_sampler(option, predict, levels, dtype)
        return sampler.latent(sampler.down(sampler.start(x)))

    return run


@pytest.mark.parametrize("option", [*REVERSIBLE, "edict:0.97", "bdia:0.9", "mccallum-foster:midpoint:0.99"])
def test_gradient_is_autograds_through_the_same_sampler(option):
    """T4, for x and the parameters."""
    levels = vp(10 if option.endswith((":heun", ":rk4")) else 40)
    (end, *exact), (same, *ours) = of_mixture(run_of(option, levels)), through(f"reversible:{option}", levels)
    assert torch.equal(end, same)
    assert all(rel(a, b) <= 1e-10 for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("schedule", [flow, cosine])
@pytest.mark.parametrize("option", ANYWHERE)
def test_from_pure_noise_to_data(option, schedule):
    levels = grid(schedule, 4)
    (end, *exact), (same, *ours) = of_mixture(run_of(option, levels)), through(f"reversible:{option}", levels)
    assert torch.equal(end, same) and end.isfinite().all()
    assert all(rel(a, b) <= 1e-10 for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("option", REVERSIBLE)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_round_trip(option, dtype, most):
    """T5: down and up again, and an image's own inversion, up and down again."""
    x, predict = randn(6, 2).to(dtype), mixture(MEANS.to(dtype))
    sampler = reversible_sampler(option, predict, vp(10 if option.endswith((":heun", ":rk4")) else 50), dtype)
    assert rel(sampler.noise(sampler.up(sampler.down(sampler.start(x)))), x) <= most
    image = sampler.latent(sampler.down(sampler.start(x)))
    noise = sampler.up(sampler.pair(image))
    assert rel(sampler.latent(sampler.down(noise)), image) <= most
    assert rel(sampler.noise(noise), x) <= 0.1  # nearly the noise that it came from


@pytest.mark.parametrize("option", ORDERS)
@pytest.mark.sampled(2)
def test_order(option):
    """T11, against RK4 on a fine grid."""
    levels_of, predict, x = GRIDS["vp" if option == "edict" else "cosine"], mixture(), randn(6, 2)
    steps = [10, 20, 40]
    with torch.no_grad():
        exact = run_of("mccallum-foster:rk4", levels_of(200))(predict, x)
        errors = [rel(run_of(option, levels_of(n))(predict, x), exact) for n in steps]
    assert slope(steps, errors) >= ORDERS[option] - 0.15
    assert slope(steps, errors) <= ORDERS[option] + 0.15 or option.startswith(("mccallum", "edict"))


def x_form(levels, gamma):
    """BDIA as the paper has it, in x and eps."""

    def run(predict, x):
        p, t = x, renoise(predict(Path(x), levels[0]), levels[1])
        for before, now, then in zip(levels, levels[1:], levels[2:], strict=False):
            eps = predict(Path(t), now).eps
            ahead = then.alpha / now.alpha * t + (then.sigma - now.sigma * then.alpha / now.alpha) * eps
            back = before.alpha / now.alpha * t + (before.sigma - now.sigma * before.alpha / now.alpha) * eps
            p, t = t, gamma * p + ahead - gamma * back
        return t

    return run


def edict_by_hand(levels, p):
    def run(predict, x):
        y = x
        for now, then in pairwise(levels):
            a, b = then.alpha / now.alpha, then.sigma - now.sigma * then.alpha / now.alpha
            x = a * x + b * predict(Path(y), now).eps
            y = a * y + b * predict(Path(x), now).eps
            x = p * x + (1 - p) * y
            y = p * y + (1 - p) * x
        return x

    return run


def heun_by_hand(levels, _):
    """Reversible Heun with both slopes evaluated anew, in the flow's own coordinates."""
    slope_of = lambda predict, z, at: (lambda said: said.eps - said.x0)(predict(Path(z), at))  # noqa: E731

    def run(predict, y):
        z = y
        for now, then in pairwise(levels):
            h, u = then.sigma - now.sigma, slope_of(predict, z, now)
            z = 2 * y - z + h * u
            y = y + h / 2 * (u + slope_of(predict, z, then))
        return y

    return run


def belm_by_hand(levels, _):
    """O-BELM, in the flow's own coordinates, on a grid of unequal widths."""

    def run(predict, x):
        before, y = x, renoise(predict(Path(x), levels[0]), levels[1])
        for p, t, s in zip(levels, levels[1:], levels[2:], strict=False):
            h, q = s.sigma - t.sigma, ((s.sigma - t.sigma) / (t.sigma - p.sigma)) ** 2
            said = predict(Path(y), t)
            u = said.eps - said.x0
            before, y = y, q * before + (1 - q) * y + h * (1 + h / (t.sigma - p.sigma)) * u
        return y

    return run


@pytest.mark.parametrize(
    ("option", "by_hand", "coefficient", "levels"),
    [
        ("bdia", x_form, 1.0, vp(12)),
        ("bdia:0.9", x_form, 0.9, vp(12)),
        ("edict", edict_by_hand, 0.93, vp(12)),
        ("reversible-heun", heun_by_hand, None, [Noise(1 - at.sigma**2, at.sigma**2) for at in grid(flow, 9)]),
        ("belm", belm_by_hand, None, [Noise(1 - at.sigma**2, at.sigma**2) for at in grid(flow, 9, 0.9, 0.2)]),
    ],
)
def test_samplers_are_the_papers(option, by_hand, coefficient, levels):
    predict, x = mixture(), randn(6, 2)
    assert rel(run_of(option, levels)(predict, x), by_hand(levels, coefficient)(predict, x)) <= 1e-12


class Kept:
    def __init__(self, tensor):
        self.tensor = tensor


def saved(option, steps):
    """Bytes that autograd holds between the run and its backward pass."""
    kept, net = weakref.WeakSet(), Net(randn(3, 2, seed=3).requires_grad_())
    keep = lambda t: kept.add(one := Kept(t)) or one  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor):
        path = rollout(None, net, randn(3, 2).requires_grad_(), grid(cosine, steps, 0.95), f"reversible:{option}")
        total = sum(one.tensor.nbytes for one in kept)
        assert path.x.grad_fn.note is None
    return total


@pytest.mark.parametrize("option", REVERSIBLE)
def test_stored_bytes_do_not_grow_with_the_steps(option):
    """x and the last pair, and the alpha that x0 is divided by."""
    assert saved(option, 5) == saved(option, 20) == 3 * (3 * 2 * 8) + 8


@pytest.mark.parametrize(
    ("option", "calls"),
    [("bdia", (6, 12)), ("alf", (7, 14)), ("reversible-heun", (7, 14)), ("edict", (12, 24))]
    + [("mccallum-foster:euler", (12, 24)), ("mccallum-foster:midpoint", (24, 72))],
)
def test_network_calls(option, calls):
    """Forward, and with the backward pass; several stages are called once more, to keep one graph at a time."""
    net = Net(randn(3, 2, seed=3).requires_grad_())
    path = rollout(None, net, randn(3, 2).requires_grad_(), grid(cosine, 6, 0.95), f"reversible:{option}")
    forward = net.calls
    path.x.sum().backward()
    assert (forward, net.calls) == calls


@pytest.mark.parametrize(
    ("option", "steps", "dtype"),
    [
        ("bdia:0.5", 40, torch.float32),
        ("bdia:0.5", 60, torch.float64),
        ("edict", 160, torch.float32),
        ("mccallum-foster:euler:0.9", 160, torch.float32),
    ],
)
def test_round_off_that_would_grow_is_refused(option, steps, dtype):
    """T6: from the coefficient alone, before anything runs."""
    net = Net(randn(3, 2, seed=3).to(dtype), dtype)
    with pytest.raises(
        ValueError, match=rf"reversible:{option} over {steps} steps in {dtype}.*'reversible:bdia'.*float64"
    ):
        rollout(None, net, randn(3, 2).to(dtype), vp(steps), f"reversible:{option}")
    assert net.calls == 0
    rollout(None, net, randn(3, 2).to(dtype), vp(10), f"reversible:{option}")


def test_o_belm_on_a_grid_that_shrinks_is_refused():
    levels = [Noise(1 - at.sigma**8, at.sigma**8) for at in grid(flow, 20)]
    with pytest.raises(ValueError, match="reversible:belm over 20 steps"):
        rollout(None, mixture(MEANS.float()), randn(3, 2).float(), levels, "reversible:belm")


def test_an_inverse_that_misses_its_start_is_an_error():
    """A network that changes between the run and its gradient is found out."""
    net, hidden = Net(randn(3, 2, seed=3)), randn(3, 2)
    shifted = lambda path, at: net(Path(path.x + hidden), at)  # noqa: E731
    shifted.tensors = net.tensors
    x = randn(3, 2).requires_grad_()
    end = rollout(None, shifted, x, grid(cosine, 6, 0.95), "reversible:alf").x
    hidden += 1  # not listed, and needing no grad, so nothing but the round trip can tell
    with pytest.raises(FloatingPointError, match="misses its start by"):
        loss_of(end).backward()


def test_bad_options_are_named():
    for option in ("", ":heun", ":mccallum-foster", ":mccallum-foster:rk5", ":alf:0.5"):
        with pytest.raises(ValueError, match="no reversible sampler.*known: bdia, alf, belm.*mccallum-foster:midpoint"):
            rollout(None, mixture(), randn(3, 2), vp(5), f"reversible{option}")
    for option in ("edict:", "edict:2", "bdia:0", "bdia:x"):
        with pytest.raises(ValueError, match="coefficient above 0 and up to 1"):
            rollout(None, mixture(), randn(3, 2), vp(5), f"reversible:{option}")
    with pytest.raises(ValueError, match="edict divides by alpha.*'reversible:bdia'"):
        rollout(None, mixture(), randn(3, 2), grid(flow, 5), "reversible:edict")
