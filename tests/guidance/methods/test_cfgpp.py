"""CFG++: its closed forms, its equivalence with CFG of a changing scale, and loops written by hand beside attach."""

from functools import cache
from itertools import pairwise
from statistics import median

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from guidance.attach.handle import attach
from guidance.guided import guided
from guidance.methods.catalogue import CFG, CFGpp, Rescale
from guidance.methods.cfgpp import as_cfg, omega
from solvers.denoiser import Path
from solvers.exact import Mixture
from solvers.families import table
from solvers.levels import levels_of
from solvers.noise import Noise, cosine, flow, grid, noise
from solvers.samplers.catalogue import SAMPLERS, euler, sample
from tests.support.pipelines import ddim, sd, unet
from tests.support.toy import BLOBS, CONDS, predict, start

LAMBDA = 0.6
VARIANCE = torch.tensor(0.7, dtype=torch.float64)
STEPS = 5


# ------------------------------------------------------------------------------------------------ closed forms
@pytest.mark.parametrize(
    ("steps", "first", "middle", "highest", "last"),
    [
        (4, 1.65, 1.65, 3.40, 3.40),
        (10, 2.58, 3.17, 3.56, 3.40),
        (20, 4.18, 5.35, 6.62, 3.40),
        (50, 9.08, 12.83, 15.77, 3.40),
        (100, 17.3, 25.0, 31.0, 3.40),
    ],
)
def test_table_of_omega(steps, first, middle, highest, last):
    """omega / lambda of DDIM on Stable Diffusion's schedule."""
    found = omega(1.0, levels_of(ddim(), steps))
    # of an even number of steps the table's median is one of the two in the middle
    near = sorted(found)[(steps - 1) // 2 : steps // 2 + 1]
    for ours, theirs in ((found[0], first), (max(found), highest), (found[-1], last)):
        assert ours == pytest.approx(theirs, rel=4e-3)
    assert min(near) * 0.996 <= middle <= max(near) * 1.004 and median(found) == pytest.approx(sum(near) / 2)


def test_from_cfg_scale():
    assert CFGpp.from_cfg_scale(7.5).scale == pytest.approx(0.6)
    levels = levels_of(ddim(), 20)
    assert median(omega(CFGpp.from_cfg_scale(7.5, levels).scale, levels)) == pytest.approx(7.5)


@pytest.mark.parametrize(("steps", "shift"), ((10, 1.1994), (50, 5.1423), (200, 20.0263)))
def test_gaussian_recursion(steps, shift):
    """The mean's displacement between two Gaussians of variance 0.7, down Karras' levels from 14.6 to 0.03 to 0."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    ks = [*((14.6 ** (1 / 7) + ramp * (0.03 ** (1 / 7) - 14.6 ** (1 / 7))) ** 7).tolist(), 0.0]
    levels = [noise(1.0, k) for k in ks]
    pair = Mixture(torch.tensor([[0.0], [1.0]], dtype=torch.float64), VARIANCE**0.5)
    conds = {"cond": {"label": torch.ones(1, dtype=torch.long)}, "uncond": {"label": torch.zeros(1, dtype=torch.long)}}
    zero = Path(torch.zeros(1, 1, dtype=torch.float64))
    *_, end = sample(euler, guided(pair, CFGpp(LAMBDA), conds), zero, levels)
    expected = 0.0
    for k, then in pairwise(ks):
        expected = expected * (0.7 + k * then) / (0.7 + k**2) + LAMBDA * k**2 / (0.7 + k**2)
    assert float(end.x) == pytest.approx(expected, rel=1e-12) and float(end.x) == pytest.approx(shift, abs=6e-5)


def test_flow_variants():
    """omega of the later form is lambda t (1 - t') / (t - t'), at most 4.5 here; the appendix form begins with 16.8."""
    ts = torch.linspace(1, 0, 29, dtype=torch.float64).tolist()
    levels = [flow(t) for t in ts]
    later = [LAMBDA * t * (1 - s) / (t - s) for t, s in pairwise(ts)]
    assert omega(LAMBDA, levels) == pytest.approx(later) and later[0] == pytest.approx(LAMBDA)
    assert max(later) == pytest.approx(4.5, abs=0.05)
    assert omega(LAMBDA, levels, appendix=True)[0] == pytest.approx(16.8)
    by_hand = start().x
    predictor = predict(CFG(1.0))
    for now, then in pairwise(levels):
        c, u = (BLOBS(by_hand, now, CONDS[name]) for name in ("cond", "uncond"))
        x0 = u.x0 + LAMBDA * (c.x0 - u.x0)
        by_hand = x0 + then.sigma * (u.eps - u.x0)
    predictor = predict(as_cfg(LAMBDA, levels, appendix=True))
    *_, ours = sample(euler, predictor, start(), levels)
    torch.testing.assert_close(ours.x, by_hand, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", (flow, cosine))
def test_it_is_cfg_of_a_changing_scale(schedule):
    levels = grid(schedule, 7, start=0.95)
    *_, ours = sample(euler, predict(CFGpp(LAMBDA)), start(), levels)
    *_, theirs = sample(euler, predict(as_cfg(LAMBDA, levels)), start(), levels)
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="this schedule of scales was made for 7 noise levels"):
        predict(as_cfg(LAMBDA, levels))(start(), flow(0.123))


@pytest.mark.parametrize("step", SAMPLERS.values(), ids=SAMPLERS)
def test_with_every_sampler(step):
    """lambda = 0 is unconditional; a single step to data is CFG by lambda."""

    def end(method, levels) -> Tensor:
        *_, last = sample(step, predict(method), start(), levels, torch.Generator().manual_seed(0))
        return last.x

    levels = grid(flow, 5, start=0.95)
    torch.testing.assert_close(end(CFGpp(0.0), levels), end(CFG(0.0), levels), rtol=1e-10, atol=1e-10)
    one = [flow(0.9), flow(0.0)]
    torch.testing.assert_close(end(CFGpp(LAMBDA), one), end(CFG(LAMBDA), one), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(end(CFGpp(LAMBDA), levels), end(CFG(LAMBDA), levels))


def test_rescaled_cfgpp_rescales_the_clean_data():
    """Rescale(CFGpp): the shift goes to phi data std(c) / std(data) + ..., the noise stays unguided."""
    at = LEVEL
    p = predict(Rescale(CFGpp(LAMBDA), phi=1.0))(start(), at)
    c, u = (BLOBS(start().x, at, CONDS[name]) for name in ("cond", "uncond"))
    vc, vu = (q.eps - q.x0 for q in (c, u))
    data = vu + LAMBDA * (vc - vu)
    data = data * (vc.flatten(1).std(1) / data.flatten(1).std(1)).view(-1, 1, 1, 1)
    torch.testing.assert_close(p.x0, u.x0)
    torch.testing.assert_close(p.eps, u.eps)
    torch.testing.assert_close(p.shift, -at.sigma * (data - vu))


LEVEL: Noise = flow(0.6)


# ------------------------------------------------------------------------------------------------ by hand, on diffusers
TABLE = {key: ddim().config[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}


@cache
def given() -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return sd().encode_prompt(["a red circle", "two blue squares"], "cpu", 1, True)


def attached(pipe) -> Tensor:
    c, u = given()
    seeded = torch.Generator().manual_seed(1)
    with attach(pipe, CFGpp(LAMBDA)):
        return pipe(
            prompt_embeds=c,
            negative_prompt_embeds=u,
            num_inference_steps=STEPS,
            guidance_scale=2.0,
            generator=seeded,
            output_type="latent",
        ).images


@torch.no_grad()
def k_diffusion(pipe, kind: str) -> Tensor:
    """The official code's lines in VE coordinates, D = x - k eps."""
    s, (c, u), g = pipe.scheduler, given(), torch.Generator().manual_seed(1)
    s.set_timesteps(STEPS)
    x = torch.randn(2, 4, 8, 8, generator=g) * ((1 + s.sigmas[0] ** 2) ** 0.5 if kind == "2M" else s.init_noise_sigma)
    last = None
    for i, (k, k_then) in enumerate(pairwise(s.sigmas.tolist())):
        d_c, d_u = (x - k * pipe.unet(x / (k**2 + 1) ** 0.5, s.timesteps[i], t).sample for t in (c, u))
        d = d_u + LAMBDA * (d_c - d_u)
        h = torch.tensor(k / k_then if k_then else torch.inf).log()
        if kind == "Euler ancestral":
            up = min(k_then, (k_then**2 * (k**2 - k_then**2) / k**2) ** 0.5)
            x = d + (x - d_u) / k * (k_then**2 - up**2) ** 0.5 + torch.randn(x.shape, generator=g) * up
        elif kind == "Euler" or last is None or k_then == 0:
            x = d + (x - d_u) / k * k_then
        else:
            r = last[1] / h
            x = d - (-h).exp() * d_u - torch.expm1(-h) * (d_u - last[0]) / (2 * r) + (-h).exp() * x
        last = d_u, h
    return x


SCHEDULERS = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "2M": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "zero"}),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_by_hand(kind):
    name, options = SCHEDULERS[kind]
    pipe = sd(scheduler=getattr(diffusers, name)(**TABLE, **options))
    close(attached(pipe), k_diffusion(pipe, kind))


@torch.no_grad()
def test_ddim_by_hand():
    pipe, (c, u) = sd(), given()
    s = pipe.scheduler
    ours = attached(pipe)
    s.set_timesteps(STEPS)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in s.timesteps.tolist():
        power = s.alphas_cumprod[t]
        then = s.alphas_cumprod[t - 1000 // STEPS] if t >= 1000 // STEPS else s.final_alpha_cumprod
        eps_c, eps_u = (pipe.unet(x, t, text).sample for text in (c, u))
        x0 = (x - (1 - power) ** 0.5 * (eps_u + LAMBDA * (eps_c - eps_u))) / power**0.5
        x = then**0.5 * x0 + (1 - then) ** 0.5 * eps_u
    close(ours, x)


class Flow(DiffusionPipeline):
    """The loop of a flow pipeline around a UNet."""

    do_classifier_free_guidance = True

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, x, texts, steps):
        self.scheduler.set_timesteps(steps)
        with self.progress_bar(total=steps):
            for t in self.scheduler.timesteps:
                twice = torch.cat([x] * 2)
                out = self.unet(twice, t.expand(len(twice)), encoder_hidden_states=texts, return_dict=False)[0]
                x = self.scheduler.step(out.chunk(2)[0], t, x, return_dict=False)[0]
        return x


@torch.no_grad()
def test_flow_euler_by_hand(monkeypatch):
    family = table.FAMILIES["sd"]
    own = family.__class__(**{**vars(family), "name": "flow", "pipelines": ("Flow",)})
    monkeypatch.setattr(table, "FAMILIES", {**table.FAMILIES, "flow": own})
    pipe = Flow(unet(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    x, c, u = (torch.randn(2, *shape, generator=g) for shape in ((4, 8, 8), (8, 16), (8, 16)))
    with attach(pipe, CFGpp(LAMBDA)):
        ours = pipe(x, torch.cat([u, c]), STEPS)
    s = pipe.scheduler
    for i, (t, then) in enumerate(pairwise(s.sigmas.tolist())):
        u_c, u_u = (pipe.unet(x, s.timesteps[i].expand(2), text).sample for text in (c, u))
        x0 = x - t * (u_u + LAMBDA * (u_c - u_u))
        x = (1 - then) * x0 + then * (x + (1 - t) * u_u)
    close(ours, x)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    error = float((a - b).abs().max() / b.abs().max())
    assert error < tolerance, error
