"""Denoising errors against diffusers' own noising and the network called by hand."""

import pytest
import torch
from diffusers import DDPMScheduler

from difftune.rollouts.denoising import denoising_errors, draw, levels, served, some_levels
from solvers.latent import LatentModel
from tests.support import dits, pipelines
from tests.support.families import MADE

SEEDS = ["a", "b", "c"]


def latents(model: LatentModel) -> torch.Tensor:
    return torch.randn(3, *model.shape(), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_errors_are_those_of_diffusers_schedulers_and_the_network_by_hand(prediction_type):
    model = LatentModel(pipelines.sd(prediction_type))
    x0, draws, cond = latents(model), draw(model, SEEDS), model.encode(["red", "blue", "red circle"])["cond"]
    own = DDPMScheduler.from_config(model.pipe.scheduler.config)
    t = draws.timestep.long()
    out = model.network(own.add_noise(x0, draws.eps, t), t, cond["encoder_hidden_states"]).sample
    wanted = {"epsilon": draws.eps, "v_prediction": own.get_velocity(x0, draws.eps, t), "sample": x0}[prediction_type]
    expected = torch.stack([torch.nn.functional.mse_loss(o, w) for o, w in zip(out, wanted, strict=True)])
    found = denoising_errors(model.denoiser, x0, draws, cond)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert len({round(v, 4) for v in found.tolist()}) == 3


@torch.no_grad()
@pytest.mark.parametrize("make", [dits.sd3, dits.flux, dits.sana])
def test_errors_of_a_flow_are_those_of_the_whole_batch_one_by_one(make):
    """And a perfect velocity would be eps - x0 on x = (1 - t) x0 + t eps."""
    model = LatentModel(make())
    x0, draws, conds = latents(model), draw(model, SEEDS), model.encode(["red", "blue", "red circle"])["cond"]
    found = denoising_errors(model.denoiser, x0, draws, conds)
    for i in range(3):
        one = {key: value[[i]] for key, value in conds.items()}
        t = draws.sigma[i]
        x = (1 - t) * x0[[i]] + t * draws.eps[[i]]
        v = model.family.call(model.network, x, (1000 * t)[None], one)
        assert found[i].item() == pytest.approx((v - (draws.eps[i] - x0[i])).square().mean().item(), rel=1e-4)


def test_conditions_of_sdxl_reach_the_network():
    model = LatentModel(pipelines.sdxl())
    conds = model.encode(["red", "blue", "red circle"])["cond"]
    with torch.no_grad():
        found = denoising_errors(model.denoiser, latents(model), draw(model, SEEDS), conds)
        other = denoising_errors(
            model.denoiser, latents(model), draw(model, SEEDS), {k: 0 * v for k, v in conds.items()}
        )
    assert (found - other).abs().min() > 1e-6


def test_a_draw_depends_on_its_seed_alone():
    model = LatentModel(pipelines.sd())
    together, alone = draw(model, SEEDS), draw(model, ["b"])
    assert all(torch.equal(one, many[[1]]) for one, many in zip(alone, together, strict=True))
    assert len({t.item() for t in together.timestep}) == 3
    assert torch.equal(together.rows([0, 0]).eps[0], together.rows([0, 0]).eps[1])


def test_t_is_uniform_over_the_timesteps_of_training():
    model, u = LatentModel(pipelines.sd()), (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    alpha, sigma, t = levels(model, u)
    assert torch.equal(t, torch.arange(1000).repeat_interleave(5))
    assert torch.allclose(alpha**2, model.pipe.scheduler.alphas_cumprod.double()[t])
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(()).double())
    alpha, sigma, t = levels(LatentModel(dits.sd3()), u)
    assert torch.equal(sigma, u) and torch.allclose(alpha, 1 - u) and torch.allclose(t, 1000 * u)


@pytest.mark.parametrize("make", [pipelines.sd, dits.sd3])
def test_levels_of_a_sampler_are_drawn_as_they_are(make):
    """Each as often as the others, and its timestep not rounded to an integer: a flow's shifted ones are none."""
    model, u = LatentModel(make()), (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    among = model.levels(4)[:-1]
    alpha, sigma, t = some_levels(model, u, among)
    for i, at in enumerate(among):
        rows = slice(1000 * i, 1000 * (i + 1))
        assert torch.allclose(alpha[rows], at.alpha.double()) and torch.allclose(sigma[rows], at.sigma.double())
        assert (t[rows] == model.denoiser.clock(at).double()).all()
    whole = (t == t.round()).all()
    assert whole if make is pipelines.sd else not whole and torch.allclose(t, 1000 * sigma)


def test_levels_of_the_second_expert_are_not_drawn():
    """Those below the boundary of Wan 2.2, where the network that is trained never serves."""
    model = LatentModel(MADE["wan-experts"](dits.flow()))
    among = model.levels(6)[:-1]
    seeds = [str(i) for i in range(40)]
    anywhere, some = draw(model, seeds).timestep, draw(model, seeds, among).timestep
    assert 700 <= anywhere.min() < 730 and anywhere.max() > 970
    assert len(served(model, among)) == 3 == len(set(some.tolist())) and some.min() >= 700
