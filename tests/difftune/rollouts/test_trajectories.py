"""The sampler as a policy: goldens, the Gaussian's closed forms, and stored transitions under the same weights."""

import pytest
import torch

from difftune.rollouts.policy import KERNELS, Policy, flow_transition, kernel_of, kl, log_prob, log_ratio
from guidance.guided import guided
from guidance.methods.apg import APG
from guidance.methods.cfg import CFG
from guidance.methods.cfgpp import CFGpp
from solvers.denoiser import Prediction, predicted
from solvers.exact import Gaussian, bind
from solvers.latent import LatentModel
from solvers.noise import cosine, flow, grid, noise, vp
from solvers.samplers.catalogue import ancestral, sample
from solvers.samplers.step import transition
from tests.support import dits, pipelines


def scalar(value: float) -> torch.Tensor:
    return torch.full((1, 1), value, dtype=torch.float64)


def test_ddim_transition_golden():
    now, then = vp(0.3), vp(0.6)
    said = predicted("eps", scalar(1.0), now, scalar(0.5))
    mean, std = transition(said, now, then, 1.0)
    assert said.x0.item() == pytest.approx(1.0619792425, abs=1e-10)
    assert std.item() == pytest.approx(0.5345224838, abs=1e-10)
    assert mean.item() == pytest.approx(0.9916364350, abs=1e-10)
    assert log_prob(mean + 0.25 * std, mean, std).item() == pytest.approx(-0.3238070490, abs=1e-10)


def test_flow_sde_golden():
    said = predicted("flow", scalar(1.0), flow(0.6), scalar(0.3))
    mean, std = flow_transition(said, flow(0.6), flow(0.5), 0.7)
    assert std.item() / 0.1**0.5 == pytest.approx(0.85732, abs=1e-5)
    assert mean.item() == pytest.approx(0.9014, abs=1e-10)
    assert std.item() == pytest.approx(0.2711088, abs=1e-7)


@pytest.mark.parametrize(("steps", "deviation"), [(10, 0.4796), (50, 0.4985), (400, 0.5011)])
def test_flow_sde_keeps_the_marginal(steps, deviation):
    """On N(0, 0.5^2) every step is linear, so the variance follows x' = k x + std z exactly; 0.5 in the limit."""
    levels, exact, variance = grid(flow, steps), Gaussian(scalar(0.0)[0], 0.5), 1.0
    for now, then in zip(levels[:-1], levels[1:], strict=True):
        mean, std = flow_transition(exact(scalar(1.0), now, {}), now, then, 0.7)
        variance = mean.item() ** 2 * variance + std.item() ** 2
    assert variance**0.5 == pytest.approx(deviation, abs=2e-4)


def test_kernel_of_a_network_is_of_its_prediction_type():
    assert {kernel_of(name) for name in ("eps", "v", "x0")} == {"ddim"}
    assert kernel_of("flow") == "flow"


# ------------------------------------------------------------------------------------------------ log-probabilities


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_log_prob_is_the_mean_of_torchs_normal():
    x, mean, std = normals(3, 2, 4), normals(3, 2, 4, seed=1), torch.tensor(0.3, dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2))
    assert torch.allclose(log_prob(x, mean, std), expected, atol=1e-12)


def test_log_ratio_and_kl_are_torchs():
    x, mean, other = normals(3, 5), normals(3, 5, seed=1), normals(3, 5, seed=2)
    std = torch.tensor(0.7, dtype=torch.float64)
    assert torch.allclose(log_ratio(x, mean, other, std), log_prob(x, mean, std) - log_prob(x, other, std), atol=1e-12)
    of = [torch.distributions.Normal(m, std) for m in (mean, other)]
    assert torch.allclose(kl(mean, other, std), torch.distributions.kl_divergence(*of).mean(1), atol=1e-12)


def test_gradient_of_log_prob_is_that_of_finite_differences_in_the_mean():
    x, std = normals(1, 4), torch.tensor(0.4, dtype=torch.float64)
    mean = normals(1, 4, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(log_prob(x, mean, std).sum(), mean)
    for i, h in enumerate(1e-6 * torch.eye(4, dtype=torch.float64)):
        difference = (log_prob(x, mean + h, std) - log_prob(x, mean - h, std)).item() / 2e-6
        assert difference == pytest.approx(gradient[0, i].item(), rel=1e-7)


def test_no_gradient_flows_to_what_was_drawn():
    mean = normals(1, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(log_prob(mean + 0.1, mean, torch.tensor(0.5)).sum(), mean)
    assert torch.allclose(gradient, torch.full((1, 4), 0.1 / 0.25 / 4, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ trajectories


def drawn(policy: Policy, x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(x) for i in range(policy.steps)]


def test_trajectory_is_the_ancestral_samplers():
    levels, exact = grid(cosine, 6, 0.98), Gaussian(torch.tensor(1.0), 0.5)
    policy, x = Policy(transition, 1.0, levels), normals(4, 3)
    made = policy.sample(bind(exact, {}), x, drawn(policy, x))
    *_, last = sample(ancestral, bind(exact, {}), made.paths[0], levels, Same(drawn(policy, x)))
    assert torch.equal(made.end, last.x)


class Same(list):
    """Noise that was drawn before, where `sample` wants generators."""


@pytest.fixture(autouse=True)
def noise_drawn_before(monkeypatch):
    from solvers.samplers import catalogue

    real = catalogue.gaussian
    monkeypatch.setattr(catalogue, "gaussian", lambda x, g=None: g.pop(0) if isinstance(g, Same) else real(x, g))


@pytest.mark.parametrize("guidance", [CFG(3.0), APG(3.0, momentum=-0.5), CFGpp(0.6)])
@pytest.mark.parametrize("make", [pipelines.sd, lambda: pipelines.sd("v_prediction"), pipelines.sdxl, dits.sd3])
def test_stored_transitions_have_the_probability_that_they_were_drawn_with(make, guidance):
    """Under the same weights and guidance the ratio of probabilities is 1: bit for bit on a CPU."""
    model = LatentModel(make())
    kernel = kernel_of(model.denoiser.prediction_type)
    policy = Policy(KERNELS[kernel], 0.8, model.levels(4))
    predict = guided(model.denoiser, guidance, model.encode(["red circle", "blue square"]))
    x = model.noise(2, [torch.Generator().manual_seed(i) for i in range(2)])
    made = policy.sample(predict, x, drawn(policy, x))
    assert not made.end.requires_grad
    assert len(made.drawn) in (3, 4)
    for i in made.drawn:
        mean, std = policy.mean(predict, made.paths[i], i)
        assert mean.requires_grad and mean.dtype == torch.float32
        assert torch.equal(log_prob(made.paths[i + 1].x, mean, std), made.log_prob(i))


def test_the_last_step_is_left_out_where_it_is_not_random():
    """A scheduler whose final alpha is 1 ends at sigma = 0; Stable Diffusion's own ends above."""
    for to_one, count in ((True, 4), (False, 5)):
        model = LatentModel(pipelines.sd(scheduler=pipelines.ddim(set_alpha_to_one=to_one)))
        policy = Policy(transition, 1.0, model.levels(5))
        x = model.noise(1, torch.Generator().manual_seed(0))
        made = policy.sample(guided(model.denoiser, CFG(3.0), model.encode(["red"])), x, drawn(policy, x))
        assert made.drawn == list(range(count))
        assert all(made.log_prob(i).isfinite().all() for i in made.drawn)


def test_log_probabilities_are_in_float32_under_a_half_precision_network():
    pipe = pipelines.sd()
    pipe.to(dtype=torch.bfloat16)
    model = LatentModel(pipe)
    policy = Policy(transition, 1.0, model.levels(3))
    predict = guided(model.denoiser, CFG(3.0), model.encode(["red"]))
    x = model.noise(1, torch.Generator().manual_seed(0))
    made = policy.sample(predict, x, drawn(policy, x))
    for i in made.drawn:
        mean, std = policy.mean(predict, made.paths[i], i)
        assert mean.dtype == made.log_prob(i).dtype == made.paths[i].x.dtype == torch.float32
        assert torch.equal(log_prob(made.paths[i + 1].x, mean, std), made.log_prob(i))


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="eta is 0.*above 0"):
        Policy(transition, 0.0, [noise(0.0, 1.0), noise(1.0, 0.0)])
    policy = Policy(transition, 1.0, [noise(0.0, 1.0), noise(1.0, 0.0)])
    with pytest.raises(ValueError, match="0 tensors of noise for 1 steps"):
        policy.sample(lambda path, at: Prediction(path.x, path.x), normals(1, 1), [])
