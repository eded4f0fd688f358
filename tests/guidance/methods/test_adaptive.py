"""Adaptive guidance: what it costs, when it latches; LinearAG: its fit, its plan."""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch

from guidance.attach.handle import attach
from guidance.contract import Branch, Guided
from guidance.guided import guided
from guidance.methods.adaptive import cosine
from guidance.methods.catalogue import CFG, AdaptiveGuidance, LinearAG, Plain
from guidance.methods.linear_ag import LinearFit, Recorded, fit_linear_ag
from solvers.denoiser import Path
from solvers.errors import Caution
from solvers.noise import cosine as cosine_schedule
from solvers.noise import flow, grid, vp
from solvers.samplers.catalogue import euler, heun, sample
from tests.support.pipelines import sd
from tests.support.toy import BLOBS, CONDS, MEANS, SHAPE, B, labels, predict, start

T = 12
LEVELS = grid(cosine_schedule, T, start=0.95, stop=0.01)
TWO = {"cond": labels(0, 0, 0, 0), "uncond": labels(1, 1, 1, 1)}


def run(method, conds=CONDS, levels=LEVELS, step=euler):
    predictor = predict(method, conds)
    return list(sample(step, predictor, start(), levels)), predictor.nfe


def cosines() -> torch.Tensor:
    """(T, B), along the CFG run."""
    found, path = [], start()
    for now, then in zip(LEVELS, LEVELS[1:], strict=False):
        c, u = (BLOBS(path.x, now, TWO[name]).eps for name in ("cond", "uncond"))
        found.append(cosine(c, u))
        path = euler(predict(CFG(), TWO), path, now, then)
    return torch.stack(found)


@pytest.mark.parametrize("crossing", ("cond", "cfg"))
def test_cost_is_t_plus_the_steps_that_evaluated_both(crossing):
    """Per sample and exactly, the crossing step included."""
    early = cosines()[:6].amax(0).sort().values
    threshold = float(early[1] + early[2]) / 2
    method = AdaptiveGuidance(threshold=threshold, crossing=crossing, of="eps")
    paths, nfe = run(method, TWO)
    settled = torch.stack([p.memory["ag.settled"] for p in paths])  # (T, B), after each step
    both = 1 + (~settled).sum(0).clamp(max=T - 1)
    assert nfe == B * T + int(both.sum()) and len(set(both.tolist())) > 1
    assert (settled[1:] >= settled[:-1]).all(), "latched"
    for i, steps in enumerate(both.tolist()):  # each sample alone costs its own share
        one = {name: {"label": cond["label"][i : i + 1]} for name, cond in TWO.items()}
        alone = predict(method, one)
        list(sample(euler, alone, start()[i : i + 1], LEVELS))
        assert alone.nfe == T + steps


def test_off_is_cfg_bit_for_bit():
    for method in (AdaptiveGuidance(threshold=1.0), AdaptiveGuidance(threshold=2.0)):
        paths, nfe = run(method)
        assert torch.equal(paths[-1].x, run(CFG())[0][-1].x) and nfe == 2 * B * T


def test_lowest_threshold_is_conditional_after_one_step():
    paths, nfe = run(AdaptiveGuidance(threshold=-1.0))
    torch.testing.assert_close(paths[-1].x, run(Plain())[0][-1].x)
    assert nfe == B * (2 + T - 1)
    assert run(AdaptiveGuidance(threshold=-1.0, min_cfg_steps=4))[1] == B * (4 + T)


def test_crossing_step():
    """`cond` uses the conditional prediction in the step that crosses, `cfg` the guided one; both cost the same."""
    first = [run(AdaptiveGuidance(threshold=-1.0, crossing=c), levels=LEVELS[:2]) for c in ("cond", "cfg")]
    torch.testing.assert_close(first[0][0][-1].x, run(Plain(), levels=LEVELS[:2])[0][-1].x)
    torch.testing.assert_close(first[1][0][-1].x, run(CFG(), levels=LEVELS[:2])[0][-1].x)
    assert first[0][1] == first[1][1] == 2 * B


def test_on_a_flow_the_velocities_tell_more_than_the_two_eps():
    """Close to pure noise the eps agree whatever the conditions say; a flow's network emits the velocities."""
    at, path = flow(0.95), start()
    told = [BLOBS(path.x, at, TWO[name]) for name in ("cond", "uncond")]
    eps, velocity = cosine(*(p.eps for p in told)), cosine(*(p.eps - p.x0 for p in told))
    assert float(velocity.max()) < float(eps.min())
    between = float(velocity.max() + eps.min()) / 2
    settled = {
        of: predict(AdaptiveGuidance(threshold=between, of=of), TWO)(path, at).memory["ag.settled"].tolist()
        for of in ("output", "eps")
    }
    assert settled == {"output": [False] * B, "eps": [True] * B} and AdaptiveGuidance.of == "output"


def test_a_run_without_a_guided_step_is_said():
    with pytest.warns(Caution, match=r"guides no step: the two predictions agree to its threshold=-1 at the first"):
        run(AdaptiveGuidance(threshold=-1.0))
    for method in (AdaptiveGuidance(threshold=-1.0, min_cfg_steps=2), AdaptiveGuidance(threshold=1.0)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(method)


def test_gradient_reaches_a_scale_of_settled_samples():
    """The rows that were not evaluated hold NaN, which must not leak into gradients."""
    scale = torch.ones(B, requires_grad=True)
    done = {"ag.settled": torch.tensor([True, False, True, False]), "ag.steps": torch.ones(B)}
    predictor = predict(AdaptiveGuidance(scale, threshold=0.99999))
    p = predictor(Path(start().x, memory=done), LEVELS[0])
    p.x0.sum().backward()
    assert scale.grad.isfinite().all() and scale.grad[0] == 0 != scale.grad[1]


# ------------------------------------------------------------------------------------------------ LinearAG
def fitted(conds=TWO, m: int = 16, scale: float = 3.0, space: str = "flow") -> LinearFit:
    many = {name: {"label": cond["label"][:1].expand(m)} for name, cond in conds.items()}
    predictor = guided(BLOBS, Recorded(scale), many)
    *_, end = sample(euler, predictor, start(m, seed=3), LEVELS)
    return fit_linear_ag(end.memory["recorded.cond"], end.memory["recorded.uncond"], LEVELS)


def test_fit_is_exact_on_isotropic_gaussians():
    """Scores lie in the span of x_T, m_c and m_u: held out, the prediction is the truth from the second step on."""
    fit = fitted()
    predictor = guided(BLOBS, Recorded(3.0), TWO)
    *_, end = sample(euler, predictor, start(seed=11), LEVELS)
    c, u = end.memory["recorded.cond"], end.memory["recorded.uncond"]
    for i in range(1, T):
        weights = torch.tensor(fit.weights[i], dtype=torch.float64)
        guess = torch.einsum("br...,r->b...", torch.cat([c[:, : i + 1], u[:, :i]], 1), weights)
        assert float((guess - u[:, i]).norm() / u[:, i].norm()) < 1e-10
    assert [len(w) for w in fit.weights] == [2 * i + 1 for i in range(T)]


def test_linear_ag_on_gaussians_is_cfg_in_the_first_half_and_saves():
    method = LinearAG(3.0, fitted())
    paths, nfe = run(method, TWO)
    cfg, _ = run(CFG(3.0), TWO)
    for i in range(T // 2):
        torch.testing.assert_close(paths[i].x, cfg[i].x, rtol=1e-8, atol=1e-8)
    assert nfe == B * (T + T // 4)
    tail = list(sample(euler, predict(Plain(), TWO), Path(paths[T // 2 - 1].x), LEVELS[T // 2 :]))
    torch.testing.assert_close(paths[-1].x, tail[-1].x)


def test_identity_regressor():
    """Where eps_u is itself among the regressors, its coefficient is 1."""
    g = torch.Generator().manual_seed(0)
    u = torch.randn(9, 2, 7, generator=g)
    weights = fit_linear_ag(u, u, LEVELS[:3]).weights  # eps_c = eps_u
    assert weights[0] == pytest.approx((1.0,)) and weights[1] == pytest.approx((0.0, 1.0, 0.0), abs=1e-6)


def test_linear_ag_is_refused_where_it_cannot_be():
    fit = fitted()
    with pytest.raises(ValueError, match="LinearAG has no fit: make one"):
        run(LinearAG(), TWO)
    with pytest.raises(ValueError, match="LinearAG was made for 12 noise levels, and k = 1 is none of them"):
        run(LinearAG(3.0, fit), TWO, [vp(0.5), vp(1.0)])
    with pytest.raises(ValueError, match="one evaluation each"):
        run(LinearAG(3.0, fit), TWO, step=heun)
    with pytest.raises(ValueError, match="LinearAG evaluates step 1 with 0 steps before it"):
        run(LinearAG(3.0, fit), TWO, LEVELS[1:])
    assert replace(LinearAG(3.0, fit), scale=2.0).fit is fit and MEANS.shape[1:] == SHAPE


@dataclass(frozen=True)
class Watched:
    """A method whose memory is written down as each step begins."""

    method: AdaptiveGuidance
    seen: list
    space = "any"

    def guide(self, path, at):
        self.seen.append(path.memory)
        return (yield from self.method.guide(path, at))


@dataclass(frozen=True)
class Cosines:
    """CFG that writes down the cosines of a pipeline's predictions."""

    seen: list
    space = "any"

    def guide(self, path, at):
        p = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        self.seen.append(cosine(p.to("cond", "eps"), p.to("uncond", "eps")))
        return Guided(p["uncond"] + 3.0 * (p["cond"] - p["uncond"]))


@torch.no_grad()
def test_attached_each_sample_costs_its_own_steps():
    """A threshold between the cosines of two prompts: one settles earlier, and alone costs as much as in the batch."""
    pipe, steps, angles = sd(), 5, []
    options = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "latent"}
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = ["a red circle", "blue"]
    with attach(pipe, Cosines(angles)):
        pipe(prompts, latents=noise, **options)
    highest = torch.stack(angles).amax(0).sort().values
    method, seen = AdaptiveGuidance(3.0, threshold=float(highest.mean())), []
    with attach(pipe, Watched(method, seen)) as handle:
        pipe(prompts, latents=noise, **options)
    before = torch.stack([memory.get("ag.settled", torch.zeros(2, dtype=torch.bool)) for memory in seen])
    both = (~before).sum(0)
    assert sorted(both.tolist())[0] < sorted(both.tolist())[1] == steps
    assert handle.nfe == 2 * steps + int(both.sum())
    for i in range(2):
        with attach(pipe, method) as handle:
            pipe(prompts[i], latents=noise[i : i + 1], **options)
        assert handle.nfe == steps + int(both[i])


@torch.no_grad()
def test_attached_to_a_pipeline_it_costs_what_it_says():
    """NFE = T + (steps that evaluated both) of each sample, and until the first sample settles every bit is CFG's."""
    pipe = sd()
    method = AdaptiveGuidance(3.0, threshold=-1.0, min_cfg_steps=3)
    options = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "latent"}

    def images(stop: int) -> torch.Tensor:
        def interrupt(pipe, i, t, kwargs):
            pipe._interrupt = i >= stop
            return kwargs

        seeded = torch.Generator().manual_seed(1)
        return pipe(["a red circle", "blue"], generator=seeded, callback_on_step_end=interrupt, **options).images

    stock = images(1)
    with attach(pipe, method):
        assert torch.equal(images(1), stock)
    with attach(pipe, method) as handle:
        images(9)
        assert handle.nfe == 2 * (6 + 3) and handle.counter.calls == 6
