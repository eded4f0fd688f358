"""Methods that look elsewhere, on Gaussians whose velocities are known, and those that follow a measure of the gap."""

from dataclasses import replace
from math import exp, log

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedMixGuidance
from diffusers.guiders.magnitude_aware_guidance import mambo_guidance

from guidance.contract import drive
from guidance.guided import guided
from guidance.methods.apg import HUNYUAN_LATENT
from guidance.methods.catalogue import (
    CFG,
    CFGMP,
    FBG,
    APGMix,
    Between,
    Interval,
    MamboG,
    Plain,
    RectifiedCFGpp,
    Rescale,
)
from guidance.methods.feedback import transition
from solvers.denoiser import Path
from solvers.exact import Mixture
from solvers.noise import Noise, cosine, flow, grid, noise
from solvers.rollout import rollout
from solvers.samplers.catalogue import euler, sample
from tests.support.toy import LEVELS, Toy, at_step, labels, predict, said, same, start

F64 = torch.float64
VARIANCE = 0.7
LINE = Mixture(torch.tensor([[0.0], [1.0]], dtype=F64), torch.tensor(VARIANCE, dtype=F64).sqrt())
PAIR = {"cond": labels(1), "uncond": labels(0)}


def end(method, steps: int, schedule=flow) -> float:
    *_, last = sample(euler, guided(LINE, method, PAIR), Path(torch.zeros(1, 1, dtype=F64)), grid(schedule, steps))
    return float(last.x)


def velocity(z: float, t: float, mean: float) -> float:
    """u = eps - x0 of N(mean, v) at z and the flow's time t."""
    power = (1 - t) ** 2 * VARIANCE + t**2
    return (t - (1 - t) * VARIANCE) / power * (z - (1 - t) * mean) - mean


# ------------------------------------------------------------------------------------------------ Rectified-CFG++
@pytest.mark.parametrize(("steps", "expected"), [(5, 4.447798), (10, 4.949191), (28, 5.296744)])
def test_rectified_on_a_gaussian(steps, expected):
    assert end(RectifiedCFGpp(4.5), steps) == pytest.approx(expected, abs=1e-6)
    assert end(CFG(5.5), steps) == pytest.approx(5.5, abs=1e-9) and end(RectifiedCFGpp(0.0), steps) == pytest.approx(
        1.0
    )


def test_rectified_of_one_step_is_conditional_and_many_are_cfg():
    assert end(RectifiedCFGpp(4.5), 1) == pytest.approx(end(Plain(), 1), abs=1e-12)
    assert end(RectifiedCFGpp(4.5), 200) == pytest.approx(5.5, abs=5e-2)


def test_rectified_within_another_method_is_converted_at_its_own_points():
    """A network that emits eps, on a path that is no flow: the gap is one of velocities at the end of the step."""
    at, toy = LEVELS["vp"], Toy("eps")
    path = at_step(start(), at)
    alone, cond = (predict(method, toy=toy)(path, at) for method in (RectifiedCFGpp(2.0), Plain()))
    same(predict(Rescale(RectifiedCFGpp(2.0), 0.0), toy=toy)(path, at), alone)
    spread = [p.eps.flatten(1).std(1).view(-1, 1, 1, 1) for p in (cond, alone)]
    ours = predict(Rescale(RectifiedCFGpp(2.0), 0.7), toy=toy)(path, at)
    torch.testing.assert_close(ours.eps, alone.eps * (0.7 * spread[0] / spread[1] + 0.3), rtol=1e-10, atol=1e-10)


def test_rectified_asks_three_times_and_once_at_the_end():
    bound = predict(RectifiedCFGpp(2.0))
    list(sample(euler, bound, start(), grid(flow, 4)))
    assert bound.branches == {"cond": 16, "cond2": 12, "uncond2": 12} and bound.counter.calls == 7
    spared = predict(RectifiedCFGpp(torch.tensor([0.0, 2.0, 0.0, 2.0])))
    list(sample(euler, spared, start(), grid(flow, 4)))
    assert spared.branches == {"cond": 16, "cond2": 6, "uncond2": 6}


# ------------------------------------------------------------------------------------------------ CFG-MP
def by_hand(method: CFGMP, z: float, t: float, then: float) -> float:
    """One step of CFG-MP in its own letters."""
    h = (then - t) / 2
    halves = [(0.0, -h), (1.0, h)] if t < 0.95 else [(1.0, h), (0.0, -h)]
    last = None
    for _ in range(method.repeats if t > method.above else 0):
        moved = z
        for mean, way in halves:
            moved += way * velocity(moved, t, mean)
        f = moved - z
        step = f
        if method.anderson and last is not None:
            dz, df = z - last[0], f - last[1]
            step = f - df * f / (df**2 + 1e-4) * (dz + df)
        z, last = z + step, (z, f)
    u = velocity(z, t, 0.0)
    return z + (then - t) * (u + method.scale * (velocity(z, t, 1.0) - u))


@pytest.mark.parametrize("method", (CFGMP(2.0), CFGMP(2.0, repeats=5, anderson=True), CFGMP(3.0, repeats=1, above=0.2)))
def test_projected_cfg_on_a_gaussian(method):
    levels = grid(flow, 6)
    times = [float(at.sigma) for at in levels]
    z, x = 0.3, Path(torch.tensor([[0.3]], dtype=F64))
    bound, moves = guided(LINE, method, PAIR), 0
    for now, then in zip(levels, levels[1:], strict=False):
        z, x = by_hand(method, z, float(now.sigma), float(then.sigma)), euler(bound, x, now, then)
        assert float(x.x) == pytest.approx(z, abs=1e-9)
        moves += float(now.sigma) > method.above
    assert bound.nfe == 2 * (len(times) - 1) + 2 * method.repeats * moves


def test_projected_cfg_without_repeats_is_cfg():
    for at in LEVELS.values():
        same(said(CFGMP(3.0, repeats=0), at), said(CFG(3.0), at))
        same(said(CFGMP(3.0, above=1.0), at), said(CFG(3.0), at))
    assert end(CFGMP(3.0, repeats=0), 7) == pytest.approx(3.0, abs=1e-9)
    assert end(CFGMP(3.0, repeats=2), 7) != pytest.approx(3.0, abs=1e-2)


def test_projection_goes_down_the_gap():
    """z after one repeat, less z, is h (u_c - u_u) up to O(h^2)."""
    x, t, h = 0.3, 0.8, -1 / 56
    then = flow(t + 2 * h)
    bound = guided(LINE, CFGMP(1.0, repeats=1), PAIR)
    path = Path(torch.tensor([[x]], dtype=F64), then=then)
    made = bound(path, flow(t))
    u = float(made.eps - made.x0)
    slope = velocity(1.0, t, 1.0) - velocity(0.0, t, 1.0)  # of u_c, which is affine in z
    move = (u - velocity(x, t, 1.0)) / (slope + 1 / (2 * h))  # u = u_c(x + move) + move / 2h
    gap = h * (velocity(x, t, 1.0) - velocity(x, t, 0.0))
    assert move == pytest.approx(0.02129, abs=1e-5) and gap == pytest.approx(0.02139, abs=1e-5)


@pytest.mark.parametrize("method", (RectifiedCFGpp(), CFGMP(), Interval(RectifiedCFGpp(), 0.0, float("inf"))))
def test_a_step_that_does_not_tell_its_end_is_refused(method):
    with pytest.raises(ValueError, match="looks ahead to where the step ends, .* use the sampler euler, or on a pipe"):
        predict(method)(start(), flow(0.5))
    with pytest.raises(ValueError, match="Rescale cannot hold CFGMP: its prediction also carries"):
        Rescale(CFGMP())


# ------------------------------------------------------------------------------------------------ MAMBO-G
def made(method, c, u, memory=None):
    """What the method makes of a network's own answers."""
    answers = {"cond": c, "uncond": u}
    return drive(
        method, lambda asked: {n: answers[n] for n in asked}, Path(c, memory=memory or {}), flow(0.5), *["flow"] * 2
    )


def test_mambo_by_hand():
    c, u = torch.zeros(1, 4, dtype=F64), torch.zeros(1, 4, dtype=F64)
    c[0, 0], u[0, 0] = 3.0, 2.0
    out = made(MamboG(10.0, 8.0), c, u).out
    assert float(out[0, 0]) == pytest.approx(3.164840750, abs=1e-9) == 3 + 9 * exp(-4)
    assert torch.equal(made(MamboG(), c, 0 * u).out, c) and torch.equal(made(MamboG(), 0 * c, 0 * u).out, 0 * c)
    assert torch.equal(made(MamboG(alpha=0.0), c, 0 * u).out, 10 * c)


def test_mambo_is_diffusers_own():
    g = torch.Generator().manual_seed(0)
    c, u = (torch.randn(3, 8, 4, generator=g, dtype=F64) for _ in range(2))
    torch.testing.assert_close(made(MamboG(6.0, 0.7), c, u).out, mambo_guidance(c, u, 6.0, 0.7))
    same(said(MamboG(4.0, 0.0), LEVELS["vp"]), said(CFG(4.0), LEVELS["vp"]))


# ------------------------------------------------------------------------------------------------ APG-mix
def test_apg_mix_is_diffusers_own():
    """Nine steps of HunyuanImage's guider, momentum and change of rule included."""
    shape, g = (2, 2, 4, 4), torch.Generator().manual_seed(1)
    radius = 10 * (2 * 4 * 4 / HUNYUAN_LATENT) ** 0.5
    guider, memory, method = AdaptiveProjectedMixGuidance(adaptive_projected_guidance_rescale=radius), {}, APGMix()
    for step in range(9):
        c, u = (torch.randn(shape, generator=g, dtype=F64) for _ in range(2))
        guider.set_state(step, 9, torch.tensor(0))
        guider.prepare_inputs({"x": (c, u)})
        ours = made(method, c, u, memory)
        torch.testing.assert_close(ours.out, guider.forward(c, u).pred)
        memory = ours.memory


def test_apg_mix_identities():
    at = LEVELS["vp"]
    same(said(APGMix(4.0, cfg_steps=0, eta=1.0, momentum=0.0, radius=None), at), said(CFG(4.0), at))
    same(said(APGMix(cfg_scale=2.5), at), said(CFG(2.5), at))
    g = torch.Generator().manual_seed(2)
    c, u = (torch.randn(2, 3, 5, generator=g, dtype=F64) for _ in range(2))
    away = made(APGMix(7.0, cfg_steps=0), c, u).out - u
    torch.testing.assert_close((away * c).flatten(1).sum(1), torch.zeros(2, dtype=F64), atol=1e-12, rtol=0)
    late = made(APGMix(), c, u, {"apg_mix.step": torch.tensor([0.0, 6.0]), "apg_mix.update": 0 * c}).out
    torch.testing.assert_close(late[0], made(CFG(3.5), c, u).out[0])
    torch.testing.assert_close(late[1], made(APGMix(cfg_steps=0), c, u).out[1])


# ------------------------------------------------------------------------------------------------ FBG
def lambda_of(method: FBG, path: Path, at: Noise) -> torch.Tensor:
    """The scale that guides, of each sample."""
    ours, c, u = (guided(LINE, m, pair(len(path.x)))(path, at).x0 for m in (method, Plain(), CFG(0.0)))
    return ((ours - u) / (c - u)).flatten()


def pair(n: int):
    return {"cond": labels(*[1] * n), "uncond": labels(*[0] * n)}


def test_feedback_constants():
    levels = [noise(1.0, k) for k in torch.linspace(80.0, 0.0, 65, dtype=F64)]
    method = FBG.of_levels(levels)
    assert method.delta == pytest.approx(-0.080946, abs=1e-6)
    now, then = (k / (1 + k) for k in (80 * (1 - 38 / 64), 80 * (1 - 39 / 64)))
    k, k2 = 80 * (1 - 38 / 64), 80 * (1 - 39 / 64)
    assert transition(now, then)[1] == pytest.approx((k**2 - k2**2) * k2**2 / k**2)
    assert method.tau == pytest.approx(2 * (k**2 - k2**2) * k2**2 / k**2 * 0.080946 / 10, rel=1e-5)
    x = Path(torch.tensor([[0.4]], dtype=F64))
    for prior, expected in ((0.95, 1.0526316), (0.5, 2.0), (1.0, 1.0)):
        assert float(lambda_of(replace(method, prior=prior), x, flow(0.5))) == pytest.approx(expected)
    with pytest.raises(ValueError, match="FBG needs delta and tau, .* FBG.of_levels"):
        said(FBG(), flow(0.5))


@pytest.mark.parametrize("schedule", (flow, cosine, lambda k: noise(1.0, 4 * k)), ids=("flow", "vp", "ve"))
def test_feedback_by_hand(schedule):
    """Two steps' posterior, with k = sigma / alpha and x / alpha as the paper has them."""
    method = FBG(delta=-0.3, tau=0.4, prior=0.8)
    levels = [schedule(t) for t in (0.8, 0.6, 0.5)]
    path, likelihood = Path(torch.tensor([[-1.5], [0.2], [2.5]], dtype=F64)), torch.zeros(3, dtype=F64)
    bound = guided(LINE, method, pair(3))
    for now, then in zip(levels, levels[1:], strict=False):
        p = likelihood.exp()
        torch.testing.assert_close(lambda_of(method, path, now), p / (p - 0.2), rtol=1e-8, atol=1e-8)
        c, u = (guided(LINE, m, pair(3))(path, now).x0 for m in (Plain(), CFG(0.0)))
        after = euler(bound, path, now, then)
        k, k2 = now.sigma / now.alpha, then.sigma / then.alpha
        variance, r = (k**2 - k2**2) * k2**2 / k**2, (k2 / k) ** 2
        far = [(after.x / then.alpha - r * path.x / now.alpha - (1 - r) * d).pow(2).sum(1) for d in (c, u)]
        likelihood = (likelihood - method.tau / (2 * variance) * (far[0] - far[1]) + method.delta).clamp(
            log(0.2 * 10 / 9), 3
        )
        path = after
    torch.testing.assert_close(lambda_of(method, path, levels[-1]), likelihood.exp() / (likelihood.exp() - 0.2))


def test_feedback_rises_to_its_largest_and_is_finite_from_pure_noise():
    path = Path(torch.tensor([[0.3]], dtype=F64))
    method, levels = FBG(delta=-1.0, tau=0.0), grid(flow, 8)
    scales = []
    for now, then in zip(levels, levels[1:], strict=False):
        scales.append(float(lambda_of(method, path, now)))
        path = euler(guided(LINE, method, PAIR), path, now, then)
    assert scales[0] == pytest.approx(1 / 0.95) and scales[3:] == pytest.approx([10.0] * 5)
    assert scales[1:3] == pytest.approx([exp(-i) / (exp(-i) - 0.05) for i in (1, 2)])
    assert float(path.memory["fbg.log"]) == pytest.approx(-2.890372, abs=1e-6)


def test_feedback_falls_to_its_least():
    """l stays at 3 where the conditional model explains the sample well."""
    path, method, levels = Path(torch.tensor([[0.3]], dtype=F64)), FBG(delta=2.0, tau=0.0), grid(flow, 5)
    scales = []
    for now, then in zip(levels, levels[1:], strict=False):
        scales.append(float(lambda_of(method, path, now)))
        path = euler(guided(LINE, method, PAIR), path, now, then)
    assert scales == pytest.approx([exp(log_p) / (exp(log_p) - 0.05) for log_p in (0, 2, 3, 3, 3)], rel=1e-6)


def test_feedback_with_a_scale_beside_it():
    at = LEVELS["vp"]
    both = said(FBG(3.0, prior=1.0), at)
    same(both, said(CFG(3.0), at))
    hybrid = FBG(Between(3.0, 0.1, 9.0), prior=1.0)
    same(said(hybrid, at), both)
    assert at_step(start(), at).then is not None


@pytest.mark.parametrize("method", (RectifiedCFGpp(2.0), CFGMP(2.0), FBG(delta=-0.3, tau=0.1)))
def test_recomputed_steps_look_ahead_too(method):
    """The level where a step ends goes with the path through every recomputation: the gradient is that of the graph."""
    levels, found = grid(flow, 3), []
    for mode in ("full", "checkpoint", "revolve:2"):
        x = torch.tensor([[0.4]], dtype=F64, requires_grad=True)
        end = rollout(euler, guided(LINE, method, PAIR), x, levels, mode)
        found.append(float(torch.autograd.grad(end.x.sum(), x)[0]))
    assert found[0] != 0 and found == pytest.approx([found[0]] * 3, rel=1e-12)
