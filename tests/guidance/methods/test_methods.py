"""What holds for every member of GUIDANCE, and the identities of CFG."""

from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch

from guidance.branches import Counter, evaluate
from guidance.contract import Combined, convert, drive
from guidance.methods.catalogue import CFG, GUIDANCE, Between, Plain
from solvers.denoiser import SPACES, Path, Prediction
from solvers.exact import Gaussian
from solvers.noise import cosine, flow, grid
from solvers.samplers.catalogue import SAMPLERS, euler, heun, sample
from tests.support.toy import (
    ALIKE,
    BLOBS,
    CONDS,
    LEVELS,
    MEANS,
    SHAPE,
    STD,
    B,
    Toy,
    at_step,
    example,
    labels,
    predict,
    said,
    same,
    start,
)

ONE_EACH = {"linear-ag", "null-text"}  # made for the levels of one run, one evaluation each
OF_EULER = {"rectified-cfgpp", "cfg-mp"}  # for steps of Euler's method
TWO = {"cond": labels(0, 0, 0, 0), "uncond": labels(1, 1, 1, 1)}


# ------------------------------------------------------------------------------------------------ every method
@pytest.mark.parametrize("name", GUIDANCE)
def test_rows_and_memory_follow_the_path(name):
    """path[index] half-way gives, sample for sample, what the whole batch gives."""
    index, levels = torch.tensor([2, 0, 0]), grid(flow, 6)
    method = example(name, levels)
    part = {key: {"label": cond["label"][index]} for key, cond in CONDS.items()}
    *_, half = sample(euler, predict(method), start(), levels[:4])
    *_, whole = sample(euler, predict(method), half, levels[3:])
    *_, chosen = sample(euler, predict(own_rows(method, index), part), half[index], levels[3:])
    for ours, theirs in ((chosen.x, whole.x[index]), (chosen.x0, whole.x0[index])):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert all(len(value) == len(index) for value in chosen.memory.values())
    assert all(key.count(".") for key in whole.memory), "keys carry their owner"


def own_rows(method, index):
    """The method with the rows of its own conditions, as a caller who resamples must choose them."""
    if hasattr(method, "nulls"):
        return replace(method, nulls=method.nulls[:, index])
    return replace(method, negative=method.negative[index]) if hasattr(method, "negative") else method


@pytest.mark.parametrize("name", GUIDANCE)
@pytest.mark.parametrize("step", SAMPLERS.values(), ids=SAMPLERS)
def test_runs_with_every_sampler_and_leaves_no_state(name, step):
    levels = grid(flow, 4)
    method = example(name, levels)
    try:
        run = [list(sample(step, predict(method), start(), levels, torch.Generator().manual_seed(1))) for _ in "ab"]
    except ValueError as error:
        if name in OF_EULER and step is not euler:
            assert "looks ahead to where the step ends, which only Euler's method tells" in str(error)
            return
        assert name in ONE_EACH and ("one evaluation each" in str(error) or "none of them" in str(error))
        return
    assert torch.equal(run[0][-1].x, run[1][-1].x) and run[0][-1].x.isfinite().all()


@pytest.mark.parametrize("name", GUIDANCE)
def test_equal_branches_need_no_guidance(name):
    """Where all branches say the same, every method gives just that."""
    for at in LEVELS.values():
        method = example(name, [at, flow(0.0)], alike=True)
        if name == "rescale":
            method = replace(method, phi=0.7)
        p = predict(method, ALIKE, Toy(perturbed=BLOBS))(at_step(start(), at), at)
        shift = 0 if p.shift is None else p.shift
        torch.testing.assert_close(p.x0 + shift, BLOBS(start().x, at, ALIKE["cond"]).x0, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", GUIDANCE)
def test_equal_branches_have_the_gradient_of_one(name):
    """Norms and ratios of a gap that is 0 have no infinite slope."""
    at, x = LEVELS["vp"], start().x.requires_grad_()
    path = at_step(Path(x), at)
    p = predict(example(name, [at, flow(0.0)], alike=True), ALIKE, Toy(perturbed=BLOBS))(path, at)
    ours, plain = p.x0 + (0 if p.shift is None else p.shift), BLOBS(x, at, ALIKE["cond"]).x0
    found, expected = (torch.autograd.grad((out**2).sum(), x)[0] for out in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", GUIDANCE)
@pytest.mark.parametrize("at", LEVELS.values(), ids=LEVELS)
def test_neutral_settings(name, at):
    """The setting that a method declares to do nothing, against what it says it then is."""
    method = example(name, [at, flow(0.0)])
    settings, equals = method.neutral
    if name == "multi":
        settings = {**settings, "conds": ("cond",), "scales": ()}
    plain = {"none": Plain(), "cfg": CFG(), "uncond": CFG(0.0)}[equals]
    ours = said(replace(method, **settings), at)
    same(ours, said(plain, at), 1e-11)
    assert ours.shift is None or not ours.shift.any()


def in_space(method, path: Path, at, space: str, dtype=torch.float64) -> Prediction:
    """What the method makes of answers in a space, as (x0, eps)."""
    made = driven(method, at_step(path, at), at, space, dtype)
    assert made.out.dtype == dtype
    x0, eps = (convert(made.out, space, to, path.x, at) for to in ("x0", "eps"))
    return Prediction(x0 + (0 if made.shift is None else made.shift), eps)


def driven(method, path: Path, at, space: str, dtype=torch.float64) -> Combined:
    """What `drive` makes of a network's answers in a space and a dtype."""
    toy = Toy()

    def inputs(branch):
        cond = CONDS[branch.cond] if isinstance(branch.cond, str) else {**CONDS["cond"], **branch.cond}
        return {"x": path.x if branch.x is None else branch.x, "cond": cond}

    def call(branch, given):
        here = branch.at or at
        with nullcontext() if branch.patch is None else toy.patched(branch.patch):
            p = (toy if branch.network == "main" else toy.perturbed)(given["x"], here, given["cond"])
        return convert(p.eps - p.x0, "flow", space, given["x"], here).to(dtype)

    def answer(request):
        return evaluate(request, inputs, call, path.x.to(dtype), Counter())

    return drive(method, answer, path, at, space, "flow")


@pytest.mark.parametrize("name", GUIDANCE)
@pytest.mark.parametrize("space", SPACES)
def test_the_space_of_the_answers_does_not_matter(name, space):
    """An affine method is the same in every space; one with a space of its own is converted to it and back."""
    at = LEVELS["vp"]
    method = example(name, [at, flow(0.0)])
    same(in_space(method, start(), at, space), in_space(method, start(), at, "flow"), 1e-10)


@pytest.mark.parametrize("name", GUIDANCE)
@pytest.mark.parametrize("space", ("eps", "flow"))
def test_networks_in_bfloat16(name, space):
    """The sampler gets the network's own dtype, and about what float64 gives."""
    at = LEVELS["flow"]
    method = example(name, [at, flow(0.0)])
    path = Path(start().x.float())
    rough, exact = in_space(method, path, at, space, torch.bfloat16), in_space(method, start(), at, space)
    assert rough.x0.isfinite().all()
    if name == "perpneg":  # some samples of the toy have c = u up to rounding, which is then perpneg's direction
        return
    assert float((rough.x0 - exact.x0).norm() / exact.x0.norm()) < 0.1


@pytest.mark.parametrize("name", [n for n in GUIDANCE if n not in ("none", "null-text", "interval", "dynamic")])
def test_scales_per_sample_and_per_level(name):
    """A (B,) tensor, and a function of the level, are that scale in each sample and at each level."""
    at = LEVELS["vp"]
    method = example(name, [at, flow(0.0)])
    field = "phi" if name == "rescale" else "scale"
    if name == "multi":
        method = replace(method, scales=())
    one, two = (said(replace(method, **{field: s}), at) for s in (0.25, 0.75))
    mixed = said(replace(method, **{field: torch.tensor([0.25, 0.75, 0.25, 0.75])}), at)
    scheduled = said(replace(method, **{field: Between(0.25, high=9.0, outside=0.75)}), at)
    for ours, theirs in ((mixed.x0[::2], one.x0[::2]), (mixed.x0[1::2], two.x0[1::2]), (scheduled.x0, one.x0)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    moved = one.x0 if one.shift is None else one.x0 + one.shift
    assert not torch.allclose(moved, two.x0 if two.shift is None else two.x0 + two.shift)


@pytest.mark.parametrize("name", GUIDANCE)
def test_is_frozen_and_says_what_it_is(name):
    method = GUIDANCE[name]()
    with pytest.raises(AttributeError):
        setattr(method, fields(method)[0].name, 2.0)
    assert method.space in (*SPACES, "any", "output") and "\n\n" in method.__doc__ + "\n\n"


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
    same(said(CFG.from_original(2.0), at), said(CFG(3.0), at))


def test_none_evaluates_cond_alone():
    only = predict(Plain(), {"cond": CONDS["cond"]})
    only(start(), flow(0.5))
    assert only.nfe == B


def test_scale_forms():
    """A float, one per sample, and a function of the noise level."""
    at, scales = cosine(0.6), torch.tensor([0.0, 1.0, 2.0, 7.5])
    p = said(CFG(scales), at)
    for i, scale in enumerate(scales):
        torch.testing.assert_close(p.x0[i], said(CFG(float(scale)), at).x0[i])
    same(said(CFG(torch.tensor(2.0)), at), said(CFG(2.0), at))
    interval = CFG(Between(5.0, 0.3, 2.0))
    same(said(interval, cosine(0.5)), said(CFG(5.0), cosine(0.5)))
    same(said(interval, cosine(0.9)), said(CFG(1.0), cosine(0.9)))
    same(said(CFG(lambda at: scales), at), p)
    with pytest.raises(ValueError, match=r"a scale of shape \(3,\) for 4 samples; pass a float or a \(B,\) tensor"):
        said(CFG(torch.ones(3)), at)
    with pytest.raises(ValueError, match=r"a scale is a float, a \(B,\) tensor or a function of Noise, not CFG"):
        said(CFG(CFG()), at)


@pytest.mark.parametrize("step", (euler, heun))
@pytest.mark.parametrize("schedule", (flow, cosine))
def test_cfg_on_gaussians_samples_the_extrapolated_one(step, schedule):
    """For p_u = N(m_u, v), p_c = N(m_c, v), CFG is at every step the sampler of N(m_u + w (m_c - m_u), v)."""
    scale = 2.5
    target = Gaussian(MEANS[1] + scale * (MEANS[0] - MEANS[1]), STD)
    levels = grid(schedule, 7, start=0.95)
    for ours, theirs in zip(
        sample(step, predict(CFG(scale), TWO), start(), levels),
        sample(step, lambda path, at: target(path.x, at, {}), start(), levels),
        strict=True,
    ):
        torch.testing.assert_close(ours.x, theirs.x, rtol=1e-12, atol=1e-12)


def test_cfg_at_pure_noise() -> None:
    """Flow models begin at alpha = 0, where x0 and eps must both be there."""
    p = said(CFG(3.0), flow(1.0), TWO)
    torch.testing.assert_close(p.x0, (MEANS[1] + 3 * (MEANS[0] - MEANS[1])).expand(B, *SHAPE))
    torch.testing.assert_close(p.eps, start().x)
