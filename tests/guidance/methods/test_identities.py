"""The identities of each method, in float64, on raw predictions or on closed forms."""

from dataclasses import replace
from math import cos

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from torch import Tensor, nn

from guidance.contract import drive
from guidance.guided import guided
from guidance.methods.catalogue import (
    APG,
    CFG,
    FDG,
    GFCG,
    NAG,
    NASA,
    PAG,
    SEG,
    SLG,
    TCFG,
    AutoGuidance,
    Between,
    CFGpp,
    CFGZeroStar,
    ClassifierGuidance,
    DynamicCFG,
    Interval,
    LinearAG,
    MultiCondition,
    NullTextInversion,
    PerpNeg,
    Plain,
    Rescale,
)
from guidance.methods.classifier import RULES, rival_of, smoothed
from guidance.methods.compose import matched
from guidance.methods.dynamic import _best
from guidance.methods.frequency import low, mirrored
from guidance.methods.scales import dot
from solvers.denoiser import Path
from solvers.exact import Gaussian, Mixture
from solvers.noise import cosine, flow, grid, noise
from solvers.samplers.catalogue import euler, heun, sample
from tests.support.toy import BLOBS, CONDS, MEANS, SHAPE, B, classify, example, labels, predict, said, same, start

AT = cosine(0.5)


def randn(seed: int, n: int = 3) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


C, U, N = randn(1), randn(2), randn(3)


def made(method, c=C, u=U, memory=None, space=None, at=AT, **more):
    """What the method makes of raw predictions in its own space."""
    own = space or (method.space if method.space not in ("any", "output") else "eps")
    answers, path = {"cond": c, "uncond": u, **more}, Path(c, memory=memory or {})
    return drive(method, lambda asked: {name: answers[name] for name in asked}, path, at, own, own)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ APG
def test_apg_without_its_parts_is_cfg():
    off = APG(4.0, eta=1.0, momentum=0.0, radius=None)
    close(made(off).out, U + 4 * (C - U))
    for at in (cosine(0.6), flow(0.4), flow(1.0), noise(1.0, 3.0)):
        same(said(off, at), said(CFG(4.0), at), 1e-10)


def test_apg_projects():
    """eta = 0: what is added is orthogonal to x0_c, so ||out||^2 = ||c||^2 + (w - 1)^2 ||orth||^2."""
    out = made(APG(5.0, momentum=0.0, radius=None)).out
    close(dot(out - C, C), torch.zeros(3, 1, 1, 1).double(), 1e-10)
    orth = (out - C) / 4
    close(dot(out, out), dot(C, C) + 16 * dot(orth, orth), 1e-10)
    close(made(APG(1.0)).out, C)
    close(made(APG(5.0, momentum=0.0), u=0.3 * C).out, C)


def test_apg_bounds_the_norm_by_the_size_of_the_latent():
    small = APG(2.0, eta=1.0, momentum=0.0, radius=15.0)
    norm = dot(made(small).out - C, made(small).out - C).sqrt().flatten()
    close(norm, torch.full((3,), 15.0 * (32 / 65536) ** 0.5).double(), 1e-9)
    near = C - 1e-3 * (C - U)  # within the radius: untouched
    close(made(small, u=near).out, near + 2 * (C - near))
    for seed in range(5, 9):  # and with momentum, whatever came before
        kept = {"apg.update": 3 * randn(seed)}
        grown = made(replace(small, momentum=-0.75), memory=kept).out - C
        assert (dot(grown, grown).sqrt() <= 15.0 * (32 / 65536) ** 0.5 + 1e-12).all()


def test_apg_momentum():
    """A constant difference g tends to g / (1 - beta), and the bounded one is not what is kept."""
    method, memory = APG(2.0, eta=1.0, momentum=-0.5, radius=0.01), {}
    for _ in range(60):
        memory = dict(made(method, memory=memory).memory)
    close(memory["apg.update"], (C - U) / 1.5)


def test_apg_without_momentum_has_no_state():
    """beta = 0: it keeps nothing and reads nothing, so the order of its steps does not matter."""
    method = APG(6.0, 0.2, momentum=0.0)
    stray = {"apg.update": N}
    assert not made(method, memory=stray).memory
    assert torch.equal(made(method, memory=stray).out, made(method).out)
    assert not torch.equal(made(replace(method, momentum=-0.5), memory=stray).out, made(method).out)


def test_apg_turns_with_its_inputs():
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q

    def turned(x: Tensor) -> Tensor:
        return (x.flatten(1) @ turn).view(x.shape)

    close(made(APG(), turned(C), turned(U)).out, turned(made(APG()).out), 1e-10)


def test_apg_is_diffusers_original_formulation():
    """With guidance_scale = w - 1 and in one space; its default form is another method where eta < 1."""
    buffer, memory = MomentumBuffer(-0.5), {}
    for seed in (1, 3, 5):
        c, u = randn(seed), randn(seed + 1)
        ours = made(APG(6.0, 0.2, -0.5, radius=2.0 / (32 / 65536) ** 0.5), c, u, memory)
        memory = dict(ours.memory)
        close(ours.out, normalized_guidance(c, u, 5.0, buffer, 0.2, 2.0, use_original_formulation=True), 1e-10)
    default = normalized_guidance(C, U, 6.0, None, 0.0, 0.0)
    assert not torch.allclose(default, made(APG(6.0, 0.0, 0.0, None)).out, atol=1e-2)


# ------------------------------------------------------------------------------------------------ projections, rescale
def test_cfg_zero_star():
    method = CFGZeroStar(4.0, zero_steps=0)
    close(made(replace(method, scale=1.0)).out, C)
    close(made(method, c=0.7 * U).out, 0.7 * U, 1e-7)
    scaled = (4 * C - made(method).out) / 3  # s u
    close(dot(C - scaled, U), torch.zeros(3, 1, 1, 1).double(), 1e-7)
    orthogonal = C - dot(C, U) / dot(U, U) * U
    close(made(method, c=orthogonal).out, 4 * orthogonal, 1e-9)


def test_cfg_zero_star_stays_for_its_first_steps():
    levels = grid(flow, 5)
    ours = predict(CFGZeroStar(3.0, zero_steps=2))
    paths = list(sample(euler, ours, start(), levels))
    close(paths[0].x, start().x)
    close(paths[1].x, start().x)
    *_, rest = sample(euler, predict(CFGZeroStar(3.0, zero_steps=0)), start(), levels[2:])
    close(paths[-1].x, rest.x)
    assert ours.nfe == 3 * 2 * B
    with pytest.raises(ValueError, match="for flow models alone; set zero_steps=0"):
        said(CFGZeroStar(), AT)


def test_tcfg():
    close(made(TCFG(1.0)).out, C)
    close(made(TCFG(4.0), c=0.3 * U).out, U + 4 * (0.3 * U - U))
    for c, u in ((C, U), (0.1 * C, U), (C, 0.01 * U)):
        stacked = torch.stack([c.flatten(1), u.flatten(1)], 1)
        v = torch.linalg.svd(stacked, full_matrices=False).Vh[:, 0]
        damped = ((u.flatten(1) * v).sum(1, keepdim=True) * v).view(u.shape)
        close(made(TCFG(4.0), c, u).out, damped + 4 * (c - damped), 1e-9)


def test_rescale():
    out = made(Rescale(CFG(5.0), phi=1.0)).out
    close(out.flatten(1).std(1), C.flatten(1).std(1))
    cfg = U + 5 * (C - U)
    close(made(Rescale(CFG(5.0), phi=0.3)).out, 0.3 * out + 0.7 * cfg)
    assert torch.equal(matched(torch.zeros_like(C), C, 0.7), torch.zeros_like(C))


def test_rescale_around_a_method_with_a_space_of_its_own():
    """APG in x0, within Rescale on an eps network: the std of its eps is that of cond."""
    x = randn(4)
    method = APG(6.0, momentum=0.0)
    answers = {"cond": C, "uncond": U}
    inner = drive(method, lambda asked: answers, Path(x), AT, "eps", "eps").out
    outer = drive(Rescale(method, phi=1.0), lambda asked: answers, Path(x), AT, "eps", "eps").out
    close(outer, matched(inner, C, 1.0), 1e-10)


# ------------------------------------------------------------------------------------------------ FDG, Perp-Neg
def test_fdg():
    close(made(FDG(3.0, high=3.0)).out, made(CFG(3.0)).out)
    close(made(FDG(1.0, high=1.0)).out, C)
    d = C - U
    close(made(FDG(2.0, high=9.0)).out, U + 2 * low(d) + 9 * (d - low(d)))
    close(low(torch.full((1, 2, 5, 7), 3.0)), torch.full((1, 2, 5, 7), 3.0), 1e-6)
    with pytest.raises(ValueError, match=r"FDG wants latents \(B, ..., h, w\), not \(3, 9\)"):
        low(torch.zeros(3, 9))
    for shape in ((1, 4, 2, 8), (1, 4, 1, 5)):  # of a small video
        close(low(torch.ones(shape)), torch.ones(shape), 1e-6)
    assert [mirrored(side).tolist() for side in (1, 2, 4)] == [[0] * 5, [0, 1] * 3, [2, 1, 0, 1, 2, 3, 2, 1]]


def level(side: int) -> torch.Tensor:
    """The coarse level of a Laplacian pyramid of two along one axis, a matrix (side, side) for even sides, as kornia
    has it: binomial blur with mirrored borders, the mean of each pair, 3/4 and 1/4 of the two nearest, blur."""
    blur, halved, doubled = torch.zeros(side, side), torch.zeros(side // 2, side), torch.zeros(side, side // 2)
    for row in range(side):
        for offset, weight in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True):
            place = abs(row + offset)
            blur[row, min(place, 2 * (side - 1) - place)] += weight / 16
        halved[row // 2, row] = 1 / 2
        for half, weight in ((row // 2, 3 / 4), ((row // 2) + (1 if row % 2 else -1), 1 / 4)):
            doubled[row, min(max(half, 0), side // 2 - 1)] += weight
    return blur @ doubled @ halved @ blur


@pytest.mark.parametrize(("rows", "columns"), ((8, 8), (64, 64), (16, 24)))
def test_fdg_low_is_a_level_of_a_laplacian_pyramid(rows, columns):
    x = torch.randn(2, 4, rows, columns, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(low(x), level(rows) @ x @ level(columns).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", (32, 31))
def test_fdg_low_moves_nothing(side):
    """Ramps stay inside, and what is mirrored stays so; odd sides too."""
    ramp = torch.arange(float(side)).expand(1, 1, side, side)
    torch.testing.assert_close(low(ramp)[..., 6:-6], ramp[..., 6:-6], rtol=0, atol=1e-5)
    torch.testing.assert_close(low(ramp.mT)[..., 6:-6, :], ramp.mT[..., 6:-6, :], rtol=0, atol=1e-5)
    x = torch.randn(1, 3, side, side + 1, generator=torch.Generator().manual_seed(0))
    for axis in (-1, -2):
        torch.testing.assert_close(low(x.flip(axis)), low(x).flip(axis), rtol=0, atol=1e-6)


def test_fdg_low_keeps_low_frequencies_alone():
    """Its gain, of a wave of angle w a pixel: blur, the mean of a pair, interpolation and blur again."""
    place = torch.arange(64, dtype=torch.float64)
    for waves in (1, 4, 8):
        w = 2 * torch.pi * waves / 64
        blur = (6 + 8 * cos(w) + 2 * cos(2 * w)) / 16
        gain = blur**2 * cos(w / 2) * (3 / 4 * cos(w / 2) + 1 / 4 * cos(3 * w / 2))
        wave = torch.cos(w * (place + 0.5)).expand(1, 1, 64, 64)
        kept = (low(wave) * wave)[..., 8:-8].sum() / (wave * wave)[..., 8:-8].sum()
        assert abs(float(kept) - gain) < 5e-3, (waves, float(kept), gain)


def test_perp_neg():
    method, d = PerpNeg(4.0), C - U
    close(made(replace(method, negatives=())).out, made(CFG(4.0)).out)
    for parallel in (2.0, -0.5):
        close(made(method, negative0=U + parallel * d).out, made(CFG(4.0)).out, 1e-10)
    n = N - dot(N, d) / dot(d, d) * d
    out = made(replace(method, weights=(0.3,)), negative0=U + n).out
    close(out, made(CFG(4.0)).out - 4 * 0.3 * n, 1e-10)
    close(dot(made(method, negative0=N).out - U, d), 4 * dot(d, d), 1e-9)
    with pytest.raises(ValueError, match="PerpNeg has 2 weights for 1 conditions"):
        made(replace(method, weights=(1.0, 2.0)), negative0=N)


def test_perp_neg_with_tensors_of_its_own():
    at = AT
    own = replace(PerpNeg(3.0), negatives=(labels(2),))  # one row, for every sample
    same(said(own, at), said(PerpNeg(3.0), at))
    assert predict(own).guidance.negatives and predict(PerpNeg(3.0))(start(), at).x0.shape == start().x.shape


# ------------------------------------------------------------------------------------------------ weaker models
def test_autoguidance():
    """Away from a wider Gaussian: samples contract around the mean."""
    sharp, wide = Gaussian(MEANS[0], 0.5), Gaussian(MEANS[0], 0.8)
    levels = grid(flow, 20)

    def spread(scale: float) -> float:
        *_, end = sample(euler, guided(sharp, AutoGuidance(scale), {"cond": {}}, weak=wide), start(), levels)
        return float((end.x - MEANS[0]).std())

    assert spread(2.0) < spread(1.0) < spread(0.0)
    same(guided(sharp, AutoGuidance(3.0), {"cond": {}}, weak=sharp)(start(), AT), sharp(start().x, AT, {}))


@pytest.mark.parametrize("method", (PAG(3.0), SLG(2.8), SEG(3.0)), ids=lambda m: type(m).__name__)
def test_perturbed(method):
    s = method.scale
    close(made(method, weak=N).out, C + s * (C - N))
    close(made(replace(method, cfg_scale=4.0), weak=N).out, U + 4 * (C - U) + s * (C - N))
    spared = predict(replace(method, scale=torch.tensor([0.0, s, 0.0, 0.0], dtype=torch.float64)))
    p = spared(start(), AT)
    assert spared.nfe == B + 1
    full, plain = said(method, AT), said(Plain(), AT)
    close(p.x0[1], full.x0[1])
    assert torch.equal(p.x0[[0, 2, 3]], plain.x0[[0, 2, 3]])


# ------------------------------------------------------------------------------------------------ interval
def test_interval():
    levels = grid(cosine, 12, start=0.95)
    inside = [at for at in levels[:-1] if 0.5 < float(at.sigma / at.alpha) <= 2.0]
    ours = predict(Interval(CFG(3.0), 0.5, 2.0))
    *_, end = sample(euler, ours, start(), levels)
    assert ours.nfe == B * (12 + len(inside)) and 0 < len(inside) < 12
    *_, by_scale = sample(euler, predict(CFG(Between(3.0, 0.5, 2.0))), start(), levels)
    close(end.x, by_scale.x, 1e-10)
    same(said(Interval(CFG(3.0), 0.0, float("inf")), flow(1.0)), said(CFG(3.0), flow(1.0)))


def test_interval_boundaries():
    """low is outside, high is inside; each evaluation of a step goes by its own level."""
    three = Interval(CFG(3.0), 1.0, 3.0)
    same(said(three, noise(1.0, 3.0)), said(CFG(3.0), noise(1.0, 3.0)))
    same(said(three, noise(1.0, 1.0)), said(Plain(), noise(1.0, 1.0)))
    seen = predict(three)
    list(sample(heun, seen, start(), [noise(1.0, 2.0), noise(1.0, 1.0)]))
    assert seen.nfe == 2 * B + B  # Heun's corrector, at the lower bound, is conditional


def test_interval_of_apg_keeps_its_momentum():
    levels = grid(cosine, 6, start=0.95)
    *_, whole = sample(euler, predict(APG(4.0)), start(), levels)
    *_, ours = sample(euler, predict(Interval(APG(4.0), 0.0, float("inf"))), start(), levels)
    assert torch.equal(ours.x, whole.x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interval(CFGpp()), "Interval cannot hold CFGpp: it needs the unconditional prediction at every step"),
        (lambda: Interval(Rescale(CFGpp())), "Interval cannot hold CFGpp"),
        (lambda: Interval(LinearAG()), "Interval cannot hold LinearAG: its fit"),
        (lambda: Interval(NullTextInversion()), "Interval cannot hold NullTextInversion"),
        (lambda: Interval(CFGZeroStar()), "Interval cannot hold CFGZeroStar: .* set zero_steps=0"),
        (lambda: Rescale(Rescale()), "Rescale cannot hold Rescale: once is enough"),
        (lambda: Rescale(NASA()), "Rescale cannot hold NASA: it has no conditional prediction"),
        (lambda: Rescale(Interval(NAG())), "Rescale cannot hold NAG"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------ several conditions
def test_multi_condition():
    close(made(MultiCondition(4.0), cond0=C).out, made(CFG(4.0)).out)
    close(made(MultiCondition(4.0, fast=True), cond0=C).out, made(CFG(4.0)).out)
    two = MultiCondition(conds=("a", "b"), scales=(2.0, 3.0))
    close(made(two, cond0=C, cond1=N).out, U + 2 * (C - U) + 3 * (N - U))
    close(made(replace(two, scales=(3.0, 2.0)), cond0=N, cond1=C).out, made(two, cond0=C, cond1=N).out)
    close(made(replace(two, scales=(0.0, 3.0)), cond0=C, cond1=N).out, U + 3 * (N - U))
    assert torch.equal(made(replace(two, scales=(0.0, 0.0)), cond0=C, cond1=N).out, U)


def test_slow_and_fast_agree_as_the_noise_vanishes():
    """Two observations y_i = x0_i + noise of a Gaussian with correlated coordinates: independent given x0."""
    prior = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64).inverse()
    rows = torch.eye(2, dtype=torch.float64)

    def x0(observed: list[int], k: float) -> Tensor:
        """E[x0 | x = 1, y_i = 1 for the observed i] by the precisions, x = x0 + k eps, y of variance 0.5."""
        seen = rows[observed].sum(0) / 0.5
        precision = prior + rows / k**2 + seen.diag()
        return torch.linalg.solve(precision, 1 / k**2 + seen)[None]

    gaps = []
    for k in (1.0, 1e-3):
        u, a, b, both = (x0(seen, k) for seen in ([], [0], [1], [0, 1]))
        slow = made(MultiCondition(1.0, conds=("a", "b")), u, u, cond0=a, cond1=b).out
        fast = made(MultiCondition(1.0, fast=True), u, u, cond0=both).out
        gaps.append(float((slow - fast).abs().max()))
    assert gaps[0] > 0.02 and gaps[1] < 1e-5


# ------------------------------------------------------------------------------------------------ dynamic CFG
def test_dynamic_cfg_chooses_for_each_sample():
    seen = predict(DynamicCFG((1.0, 3.0, 9.0), (lambda x0: torch.tensor([1.0, -1.0, 1.0, -1.0]) * x0.sum((1, 2, 3)),)))
    p = seen(start(), AT)
    ends = {s: said(CFG(s), AT).x0 for s in (1.0, 3.0, 9.0)}
    for i, sign in enumerate((1, -1, 1, -1)):
        best = max(ends, key=lambda s: float(sign * ends[s][i].sum()))
        close(p.x0[i], ends[best][i])
    assert seen.nfe == 2 * B


def test_dynamic_cfg_invariants():
    same(said(DynamicCFG((3.0,)), AT), said(CFG(3.0), AT))
    rise = lambda x0: x0.flatten(1).norm(dim=1)  # noqa: E731
    alone = said(DynamicCFG(scorers=(rise,)), AT)
    same(said(DynamicCFG(scorers=(rise, lambda x0: torch.ones(len(x0)))), AT), alone)
    same(said(DynamicCFG(scorers=(lambda x0: 5 * rise(x0) + 2,)), AT), alone)
    same(said(DynamicCFG((1.0, 3.0, 7.5, 7.5, 11.0, 15.0), (rise,)), AT), alone)
    same(said(DynamicCFG((15.0, 3.0, 1.0), (lambda x0: torch.zeros(len(x0)),)), AT), said(CFG(1.0), AT))
    with pytest.raises(ValueError, match="DynamicCFG needs scorers, .* only the name 'tiny-clip'"):
        said(DynamicCFG(), AT)


def test_dynamic_cfg_weighs_scorers_by_their_rise():
    scores = torch.tensor([[[1.0, 9.0]], [[3.0, 1.0]]], dtype=torch.float64)  # (2 candidates, B = 1, 2 scorers)
    first, mean = _best(scores, None)
    assert first.tolist() == [0] and torch.equal(mean, torch.tensor([[2.0, 5.0]], dtype=torch.float64))
    risen, _ = _best(scores, torch.tensor([[1.0, 5.0]], dtype=torch.float64))  # only the first scorer rose
    fallen, _ = _best(scores, torch.tensor([[4.0, 8.0]], dtype=torch.float64))  # none did
    assert risen.tolist() == [1] and fallen.tolist() == [0]


# ------------------------------------------------------------------------------------------------ GFCG
def gfcg(**fields):
    return replace(example("gfcg", [AT]), tolerance=0.0, **fields)


def test_mixture_consistency():
    """eps_u = sum_k p(k | x) eps_k, exactly, for p the noisy posterior."""
    x = start().x
    logs = torch.stack([BLOBS.log_prob(x, AT, torch.full((B,), k)) for k in range(3)], 1)
    parts = torch.stack([BLOBS(x, AT, labels(*[k] * B)).eps for k in range(3)], 1)
    share = logs.softmax(1).view(B, 3, 1, 1, 1)
    close((share * parts).sum(1), BLOBS(x, AT, labels(*[-1] * B)).eps, 1e-10)


def test_gfcg_of_two_classes_is_cfg():
    """With the noisy posterior for a classifier and the rule "miss", s = s_max (1 - p_c) is CFG of 1 + s_max."""
    pair = Mixture(MEANS[:2], torch.tensor(2.0, dtype=torch.float64))
    conds = {"cond": labels(0, 1, 0, 1), "uncond": labels(-1, -1, -1, -1)}
    for at in (cosine(0.6), flow(0.4)):
        method = GFCG.from_cfg_scale(
            3.0,
            classify=lambda x0, at=at: torch.stack(
                [pair.log_prob(start().x, at, torch.full((B,), k)) for k in range(2)], 1
            ),
            classes=labels(0, 1),
            target=torch.tensor([0, 1, 0, 1]),
            tolerance=0.0,
        )
        same(guided(pair, method, conds)(start(), at), guided(pair, CFG(3.0), conds)(start(), at), 1e-9)


def test_gfcg_invariants():
    same(said(gfcg(scale=0.0), AT), said(Plain(), AT))
    sure = gfcg(classify=lambda x0: 100.0 * torch.nn.functional.one_hot(CONDS["cond"]["label"], 3).double())
    assert torch.equal(said(replace(sure, tolerance=1e-6), AT).x0, said(Plain(), AT).x0)
    spared = predict(replace(sure, tolerance=1e-6))
    spared(start(), AT)
    assert spared.nfe == B
    p, target = classify(start().x).softmax(1), CONDS["cond"]["label"]
    assert (rival_of(p, target) != target).all()
    order = torch.tensor([2, 0, 1])
    renamed = gfcg(
        classify=lambda x0: classify(x0)[:, order], classes=labels(*order.tolist()), target=order.argsort()[target]
    )
    same(said(renamed, AT), said(gfcg(), AT))


def test_gfcg_rules():
    p, target = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]]), torch.tensor([0, 1])
    rival = rival_of(p, target)
    assert rival.tolist() == [1, 2]
    expected = {"miss": [0.5, 0.7], "pair": [3 / 8, 2 / 3], "gate": [0.0, 1.0]}
    for name, rule in RULES.items():
        torch.testing.assert_close(rule(p, target, rival), torch.tensor(expected[name]))
    with pytest.raises(ValueError, match="no rule 'cat' of GFCG; known: miss, pair, gate"):
        said(gfcg(rule="cat"), AT)


def test_gfcg_with_cfg_and_with_autoguidance():
    both = said(gfcg(cfg_scale=3.0), AT)
    alone, cfg, plain = said(gfcg(), AT), said(CFG(3.0), AT), said(Plain(), AT)
    close(both.x0, alone.x0 + cfg.x0 - plain.x0, 1e-10)
    calm = gfcg(network="weak", rule=lambda p, target, rival: torch.zeros(len(p)))
    same(said(calm, AT), said(AutoGuidance(3.0), AT), 1e-10)  # c + 2 (c - weak)
    same(guided(BLOBS, calm, CONDS, weak=BLOBS)(start(), AT), plain, 1e-10)
    cost = predict(calm)
    cost(start(), AT)
    assert cost.nfe == 2 * B
    confused = replace(calm, rule=lambda p, target, rival: torch.ones(len(p)))
    assert not torch.allclose(said(confused, AT).x0, said(calm, AT).x0)


@pytest.mark.parametrize("field", ("classify", "classes", "target"))
def test_gfcg_says_what_is_missing(field):
    with pytest.raises(ValueError, match=f"GFCG needs {field}, .* was given none: pass it as {field}="):
        said(gfcg(**{field: None}), AT)
    with pytest.raises(ValueError, match="GFCG has 2 targets for 4 samples"):
        said(gfcg(target=torch.tensor([0, 1])), AT)


# ------------------------------------------------------------------------------------------------ classifier guidance
A = torch.randn(3, 32, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def linear(x0: Tensor) -> Tensor:
    return x0.flatten(1) @ A.T


def test_classifier_gradient_on_linear_logits():
    """f_k = a_k . x0: g = tau1 a_y - tau2 sum_k softmax(tau2 f)_k a_k, added as s sigma^2 / alpha in VP coordinates."""
    target, at = CONDS["cond"]["label"], cosine(0.6)
    plain = said(Plain(), at)
    for discount in (0.5, 1.0, 0.0):
        method = ClassifierGuidance(0.1, linear, target, joint=0.8, discount=discount, middle=0.0)
        tau = 0.8 * discount
        g = 0.8 * A[target] - tau * (tau * linear(plain.x0)).softmax(1) @ A
        expected = plain.x0 + 0.1 * at.sigma**2 / at.alpha * g.view(B, *SHAPE)
        close(said(method, at).x0, expected, 1e-10)
    close(said(method, at).eps, plain.eps - 0.1 * at.sigma * g.view(B, *SHAPE), 1e-10)
    shifted = replace(method, classify=lambda x0: linear(x0) + 5.0)
    same(said(shifted, at), said(method, at), 1e-10)


def test_classifier_guidance_does_not_depend_on_the_coordinates():
    """The same x0 and eps in VP and in VE coordinates are moved alike."""
    method = ClassifierGuidance(0.1, linear, CONDS["cond"]["label"])
    vp, x = cosine(0.6), start().x
    ve = noise(1.0, vp.sigma / vp.alpha)
    close(predict(method)(Path(x), vp).x0, predict(method)(Path(x / vp.alpha), ve).x0, 1e-10)
    assert torch.equal(said(method, flow(1.0)).x0, said(Plain(), flow(1.0)).x0)


def test_smoothed():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)))
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(smoothed(net, 1e4)(x), net(x), atol=1e-3)
    assert not torch.allclose(smoothed(net, 1.0)(x), net(x), atol=1e-2)
    assert isinstance(net[1], nn.ReLU) and isinstance(smoothed(net)[2][0], nn.Softplus)
