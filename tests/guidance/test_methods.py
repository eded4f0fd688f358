"""Guidance methods: identities of CFG, and what holds for every member of GUIDANCE."""

import pytest
import torch
from torch import Tensor

from guidance.guided import guided
from guidance.methods import CFG, GUIDANCE, Plain
from solvers.denoiser import Path, Prediction
from solvers.exact import Gaussian, Mixture
from solvers.noise import Noise, cosine, flow, grid, noise
from solvers.samplers import SAMPLERS, euler, heun, sample

B, D = 4, 3
MEANS = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 2.0, 0.5]], dtype=torch.float64)
STD = torch.tensor(0.7, dtype=torch.float64)
BLOBS = Mixture(MEANS, STD)
LEVELS = {"vp": cosine(0.6), "ve": noise(1.0, 3.0), "flow": flow(0.4), "data": flow(0.0)}
CONDS = {"cond": {"label": torch.zeros(B, dtype=torch.long)}, "uncond": {"label": torch.ones(B, dtype=torch.long)}}


def start(n: int = B) -> Path:
    return Path(torch.randn(n, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def predict(method, conds=CONDS):
    return guided(BLOBS, method, conds, weak=BLOBS)


def said(method, at: Noise) -> Prediction:
    return predict(method)(start(), at)


def same(a: Prediction, b: Prediction, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a.x0, b.x0, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.eps, b.eps, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ every method
@pytest.mark.parametrize("name", GUIDANCE)
def test_rows_and_memory_follow_the_path(name):
    """path[index] half-way gives, sample for sample, what the whole batch gives."""
    index = torch.tensor([2, 0, 0])
    label = torch.tensor([0, 1, -1, 0])
    conds = {"cond": {"label": label}, "uncond": {"label": torch.full((B,), -1)}}
    part = {key: {"label": cond["label"][index]} for key, cond in conds.items()}
    levels = grid(flow, 6)
    *_, half = sample(euler, predict(GUIDANCE[name](), conds), start(), levels[:4])
    *_, whole = sample(euler, predict(GUIDANCE[name](), conds), half, levels[3:])
    *_, chosen = sample(euler, predict(GUIDANCE[name](), part), half[index], levels[3:])
    for ours, theirs in ((chosen.x, whole.x[index]), (chosen.x0, whole.x0[index])):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert all(len(value) == len(index) for value in chosen.memory.values())
    assert all(key.count(".") for key in whole.memory), "keys carry their owner"


@pytest.mark.parametrize("name", GUIDANCE)
@pytest.mark.parametrize("step", SAMPLERS.values(), ids=SAMPLERS)
def test_runs_with_every_sampler_and_leaves_no_state(name, step):
    method = GUIDANCE[name]()
    run = [list(sample(step, predict(method), start(), grid(flow, 4), torch.Generator().manual_seed(1))) for _ in "ab"]
    assert torch.equal(run[0][-1].x, run[1][-1].x) and run[0][-1].x.isfinite().all()


@pytest.mark.parametrize("name", GUIDANCE)
def test_equal_branches_need_no_guidance(name):
    """Where cond says what uncond says, every method gives just that."""
    alike = {"cond": CONDS["cond"], "uncond": CONDS["cond"]}
    for at in LEVELS.values():
        p = predict(GUIDANCE[name](), alike)(start(), at)
        shift = 0 if p.shift is None else p.shift
        torch.testing.assert_close(p.x0 + shift, BLOBS(start().x, at, CONDS["cond"]).x0, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", GUIDANCE)
def test_is_frozen(name):
    with pytest.raises(AttributeError):
        GUIDANCE[name]().scale = 2.0


# ------------------------------------------------------------------------------------------------ CFG and none
@pytest.mark.parametrize("at", LEVELS.values(), ids=LEVELS)
def test_cfg_scales(at):
    cond, uncond = (BLOBS(start().x, at, CONDS[name]) for name in ("cond", "uncond"))
    same(said(CFG(1.0), at), cond)
    same(said(CFG(0.0), at), uncond)
    same(said(Plain(), at), cond)
    for scale in (-1.0, 0.3, 7.5):
        x0, eps = (u + scale * (c - u) for c, u in zip(cond[:2], uncond[:2], strict=True))
        same(said(CFG(scale), at), Prediction(x0, eps))


def test_none_evaluates_cond_alone():
    only = guided(BLOBS, Plain(), {"cond": CONDS["cond"]})
    only(start(), flow(0.5))
    assert only.nfe == B


def test_scale_forms():
    """A float, one per sample, and a function of the noise level."""
    at, scales = cosine(0.6), torch.tensor([0.0, 1.0, 2.0, 7.5])
    p = said(CFG(scales), at)
    for i, scale in enumerate(scales):
        torch.testing.assert_close(p.x0[i], said(CFG(float(scale)), at).x0[i])
    same(said(CFG(torch.tensor(2.0)), at), said(CFG(2.0), at))
    interval = CFG(lambda at: 5.0 if 0.3 < at.sigma / at.alpha < 2 else 1.0)
    same(said(interval, cosine(0.5)), said(CFG(5.0), cosine(0.5)))
    same(said(interval, cosine(0.9)), said(CFG(1.0), cosine(0.9)))
    same(said(CFG(lambda at: scales), at), p)
    with pytest.raises(ValueError, match=r"a scale of shape \(3,\) for 4 samples; pass a float or a \(B,\) tensor"):
        said(CFG(torch.ones(3)), at)


@pytest.mark.parametrize("step", (euler, heun))
@pytest.mark.parametrize("schedule", (flow, cosine))
def test_cfg_on_gaussians_samples_the_extrapolated_one(step, schedule):
    """For p_u = N(m_u, v), p_c = N(m_c, v), CFG is at every step the sampler of N(m_u + w (m_c - m_u), v)."""
    scale = 2.5
    target = Gaussian(MEANS[1] + scale * (MEANS[0] - MEANS[1]), STD)
    levels = grid(schedule, 7, start=0.95)
    for ours, theirs in zip(
        sample(step, predict(CFG(scale)), start(), levels),
        sample(step, lambda path, at: target(path.x, at, {}), start(), levels),
        strict=True,
    ):
        torch.testing.assert_close(ours.x, theirs.x, rtol=1e-12, atol=1e-12)


def test_cfg_at_pure_noise() -> None:
    """Flow models begin at alpha = 0, where x0 and eps must both be there."""
    p: Prediction = said(CFG(3.0), flow(1.0))
    means: Tensor = MEANS[1] + 3 * (MEANS[0] - MEANS[1])
    torch.testing.assert_close(p.x0, means.expand(B, D))
    torch.testing.assert_close(p.eps, start().x)
