"""Adjoint matching: its optimum in closed form, its gradient against the engine's lean mode, and what is dropped."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from difftune.configs.recipes import AdjointMatchingConfig
from difftune.recipes import adjoint_matching, check_recipe, train
from difftune.recipes.adjoint_matching import Limit, adjoint_loss, draw_steps, match, memoryless, sweep_back
from difftune.rollouts.policy import Policy
from rewards.simple import Brightness
from solvers.exact import Gaussian, Mixture, bind
from solvers.noise import flow, grid
from solvers.rollout.lean import WithBase, lean_sweep
from solvers.rollout.modes import rollout
from solvers.samplers.step import transition
from tests.support import dits, pipelines
from tests.support.toys import session_of, toy


def scalar(value: float) -> torch.Tensor:
    return torch.full((1, 1), value, dtype=torch.float64)


def test_loss_by_hand():
    """Two elements: ((.3 - .1) / .5 + .5 * .6)^2 + ((0 - .2) / .5 - .5)^2; its minimum is mu_base - sigma^2 a."""
    mean, base = torch.tensor([[0.3, 0.0]], dtype=torch.float64), torch.tensor([[0.1, 0.2]], dtype=torch.float64)
    std, adjoint = torch.tensor(0.5, dtype=torch.float64), torch.tensor([[0.6, -1.0]], dtype=torch.float64)
    assert adjoint_loss(mean, base, std, adjoint).item() == pytest.approx(0.7**2 + 0.9**2)
    assert adjoint_loss(base - std**2 * adjoint, base, std, adjoint).item() == 0


# ------------------------------------------------------------------------------------------------ the optimum


def fixed_point(steps: int, slope, n: int, rounds: int, seed: int = 0) -> tuple[float, float]:
    """Mean and variance of the end of a chain of N(.5, 1) whose controls u + w x minimise the loss on its own states;
    slope(x) is dr/dx, and reward_multiplier 1. The loss is a parabola in u and w: a Newton step is its minimum."""
    levels, base = grid(flow, steps), bind(Gaussian(scalar(0.5)[0], 1.0), {})
    generator = torch.Generator().manual_seed(seed)
    controls = torch.zeros(steps, 2, dtype=torch.float64)
    for _ in range(rounds):
        states, means, stds = [torch.randn(n, 1, generator=generator, dtype=torch.float64)], [], []
        for k in range(steps):
            mean, std = transition(base(Point(states[-1]), levels[k]), levels[k], levels[k + 1], 1.0)
            added = controls[k, 0] + controls[k, 1] * states[-1]
            means.append(mean)
            stds.append(std)
            noise = torch.randn(n, 1, generator=generator, dtype=torch.float64)
            states.append(mean + std * added + std * noise)
        adjoints = lean_sweep(base, states, levels, -slope(states[-1]))
        for k in range(steps - 1):  # the last step adds no noise
            own = controls[k].clone().requires_grad_()
            mean = means[k] + stds[k] * (own[0] + own[1] * states[k])
            loss = adjoint_loss(mean, means[k], stds[k], adjoints[k + 1]).mean()
            (gradient,) = torch.autograd.grad(loss, own)
            features = torch.cat([torch.ones_like(states[k]), states[k]], 1)
            hessian = 2 * features.T @ features / n
            controls[k] -= torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0]
    return end_of(levels, base, controls)


class Point:
    """What a bound denoiser reads of a path."""

    def __init__(self, x):
        self.x = x


def end_of(levels, base, controls) -> tuple[float, float]:
    """Mean and variance of the end, exactly: every step is linear."""
    mean, variance = 0.0, 1.0
    for k in range(len(levels) - 1):
        step = lambda x, k=k: transition(base(Point(scalar(x)), levels[k]), levels[k], levels[k + 1], 1.0)  # noqa: E731
        (low, std), (high, _) = step(0.0), step(1.0)
        slope = (high - low + std * controls[k, 1]).item()
        mean = low.item() + slope * mean + (std * controls[k, 0]).item()
        variance = slope**2 * variance + std.item() ** 2
    return mean, variance


@pytest.mark.parametrize(("steps", "mean", "variance"), [(10, 1.1483, 0.6483), (50, 1.4072, 0.9072)])
def test_a_linear_rewards_optimum_is_exact_for_the_samplers_own_steps(steps, mean, variance):
    """The tilt exp(x) moves the base's mean .5 by its end's variance, and leaves that as it is."""
    found = fixed_point(steps, torch.ones_like, n=64, rounds=1)
    assert found == (pytest.approx(mean, abs=1e-4), pytest.approx(variance, abs=1e-4))
    assert found[0] == pytest.approx(0.5 + found[1], abs=1e-9)


def test_a_quadratic_rewards_optimum_is_that_of_the_discrete_chain():
    """r = -(x - 2)^2 / 2: mean 1.0900 and variance .4255 at ten steps, 1.25 and .5 in the limit."""
    ends = np.array([fixed_point(10, lambda x: 2 - x, n=700, rounds=10, seed=seed) for seed in range(6)])
    errors = ends.std(0, ddof=1) / 6**0.5
    assert (errors < 0.01).all() and (abs(ends.mean(0) - [1.0900, 0.4255]) < 3 * errors).all()


def features(x: torch.Tensor) -> torch.Tensor:
    """1 and bumps along the line, (N, 20): a control that can bend."""
    return torch.cat([torch.ones_like(x), (-((x - torch.linspace(-3, 3, 19).to(x)) ** 2) / 0.4).exp()], 1)


MIXTURE = Mixture(torch.tensor([[-1.0], [1.0]]).double(), 0.5)


def end_of_the_optimum(steps: int) -> tuple[float, float]:
    """Mean, and share above 0, of the end of the chain of MIXTURE under reward x whose controls are the loss's minimum
    on its own states: c_k(x) = -std E[a_{k+1} | x], by integration on a line."""
    levels, base, xs = grid(flow, steps), bind(MIXTURE, {}), np.linspace(-6, 6, 601)
    z, weights = np.polynomial.hermite_e.hermegauss(24)
    weights, later, moves = weights / weights.sum(), -np.ones_like(xs), []
    for k in reversed(range(steps)):
        x = torch.tensor(xs)[:, None].requires_grad_()
        mean, std = transition(base(Point(x), levels[k]), levels[k], levels[k + 1], 1.0)
        slope = torch.autograd.grad(mean.sum(), x)[0][:, 0].numpy()
        mean, std, control = mean.detach()[:, 0].numpy(), std.item(), np.zeros_like(xs)
        for _ in range(20):
            places = (mean + std * control)[:, None] + std * z
            seen = np.interp(places, xs, later) @ weights
            control = -std * seen
        moves.append((mean + std * control)[:, None] + std * z)
        later = slope * seen
    mass = np.exp(-(xs**2) / 2) / np.exp(-(xs**2) / 2).sum()
    for places in moves[:0:-1]:  # each place's mass goes to its two neighbours on the line
        place = (places.clip(-6, 5.999) + 6) / (xs[1] - xs[0])
        left, shares, found = place.astype(int), mass[:, None] * weights, np.zeros_like(xs)
        np.add.at(found, left, shares * (1 - place + left))
        np.add.at(found, left + 1, shares * (place - left))
        mass = found
    ends = moves[0][:, 0]
    return float(mass @ ends), float(mass[ends > 0].sum())


def test_of_a_mixture_the_weights_are_tilted_too():
    """Two Gaussians at -1 and 1 of deviation .5, reward x: weights .1192 and .8808 at -.75 and 1.25, mean 1.0115, in
    the limit of many steps. The controls bend with x, and each round fits them on its own states."""
    steps, n = 50, 3000
    levels, base = grid(flow, steps), bind(MIXTURE, {})
    generator = torch.Generator().manual_seed(0)
    controls = torch.zeros(steps, 20, 1, dtype=torch.float64)
    for _ in range(6):
        states, looked, stds = [torch.randn(n, 1, generator=generator, dtype=torch.float64)], [], []
        for k in range(steps):
            mean, std = transition(base(Point(states[-1]), levels[k]), levels[k], levels[k + 1], 1.0)
            looked.append(features(states[-1]))
            stds.append(std)
            noise = torch.randn(n, 1, generator=generator, dtype=torch.float64)
            states.append(mean + std * (looked[-1] @ controls[k]) + std * noise)
        adjoints = lean_sweep(base, states, levels, -torch.ones_like(states[-1]))
        for k in range(steps - 1):
            own, zero = controls[k].clone().requires_grad_(), torch.zeros(n, 1, dtype=torch.float64)
            loss = adjoint_loss(stds[k] * (looked[k] @ own), zero, stds[k], adjoints[k + 1]).mean()
            (gradient,) = torch.autograd.grad(loss, own)
            hessian = 2 * looked[k].T @ looked[k] / n + 1e-6 * torch.eye(20, dtype=torch.float64)
            controls[k] -= torch.linalg.solve(hessian, gradient)
    end = states[-1][:, 0]
    wanted, above = end_of_the_optimum(steps)
    assert wanted == pytest.approx(1.0115, abs=0.07)  # by 50 steps
    share = (end > 0).double().mean()
    print(end.mean().item(), wanted, end.std().item() / n**0.5, share.item(), above)
    assert abs(end.mean() - wanted) < 3 * end.std() / n**0.5
    assert abs(share - above) < 3 * (above * (1 - above) / n) ** 0.5


# ------------------------------------------------------------------------------------------------ against the engine


def test_at_the_base_the_gradient_is_twice_the_engines_lean_mode(tmp_path):
    """The control is 0 there, so that the loss's gradient is the sum of 2 a^T dmu / dtheta over the steps."""
    config = toy("adjoint-matching", tmp_path, reward_multiplier=3.0, guidance="none")
    session = session_of(config, pipelines.sd(), Brightness())
    policy = memoryless(session.images)
    batch = sweep_back(session, policy, range(2))
    weights = list(session.run.weights.values())
    total = 0.0
    for k in range(3):
        path = batch.trajectory.paths[k]
        mean, std = policy.mean(batch.trained, path, k)
        losses = adjoint_loss(mean, mean.detach(), std, batch.adjoints[k + 1])
        assert torch.allclose(losses, std**2 * batch.adjoints[k + 1].square().flatten(1).sum(1))
        total = total + losses.sum()
    ours = torch.autograd.grad(total, weights)
    start = session.images.begin(session.prompts, range(2))
    models = WithBase(batch.trained, batch.base)
    end = rollout(None, models, start.x, session.images.levels, "lean", start.noise).x
    assert torch.allclose(end, batch.trajectory.end, atol=1e-6)
    images = session.images.model.decode(end, checkpointed=True)
    theirs = torch.autograd.grad(-3.0 * Brightness()(images, ["red"] * 2).sum(), weights)
    scale = max(one.abs().max() for one in theirs)
    assert scale > 0
    for one, two in zip(ours, theirs, strict=True):
        assert torch.allclose(one, 2 * two, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("make", [pipelines.sd, dits.sd3])
def test_one_update_raises_the_reward(make, tmp_path):
    """The reward of the same images, by the same noise."""
    config = toy("adjoint-matching", tmp_path, steps_per_image=3, learning_rate=1e-3, train_batch_size=4)
    session = session_of(config, make(), Brightness())
    policy = memoryless(session.images)
    before = sweep_back(session, policy, range(4))
    with adjoint_matching.attempt_step(session.run, 0) as metrics:
        metrics.update(match(session, policy, [before], Limit(), 0))
    assert metrics["control"] == 0 == metrics["dropped"] and metrics["grad_norm"] > 0
    chosen, stds = draw_steps(config, policy, 0), before.trajectory.stds
    of_the_end = [(stds[k] ** 2 * before.adjoints[k + 1].square().flatten(1).sum(1)).mean() for k in chosen]
    assert metrics["loss"] == pytest.approx(float(sum(of_the_end)) / len(chosen), rel=1e-4)
    assert sweep_back(session, policy, range(4)).scores.mean() > before.scores.mean()


def test_the_base_is_the_model_before_training_and_the_control_what_was_learnt(tmp_path):
    config = toy("adjoint-matching", tmp_path, train_batch_size=2)
    session = session_of(config, pipelines.sd(), Brightness())
    policy = memoryless(session.images)
    first = sweep_back(session, policy, range(2))
    with torch.no_grad():
        for weight in session.run.weights.values():
            weight += 0.1
    states = [path.x for path in first.trajectory.paths]
    moved = sweep_back(session, policy, range(2))
    assert not torch.equal(moved.trajectory.end, first.trajectory.end)
    again = lean_sweep(moved.base, states, policy.levels, first.adjoints[-1])
    assert all(torch.equal(one, two) for one, two in zip(again, first.adjoints, strict=True))
    with adjoint_matching.attempt_step(session.run, 0) as metrics:
        metrics.update(match(session, policy, [moved], Limit(), 0))
    assert metrics["control"] > 0


# ------------------------------------------------------------------------------------------------ what is dropped


def test_the_limit_is_a_running_mean_of_quantiles():
    limit = Limit()
    assert limit.keeps(torch.tensor([1e9])).all()
    limit.follow(torch.arange(11.0), 0.9)
    assert limit.value == pytest.approx(9.0) and limit.keeps(torch.tensor([9.0, 9.1])).tolist() == [True, False]
    limit.follow(torch.arange(11.0) + 10, 0.9)
    assert limit.value == pytest.approx(0.9 * 9 + 0.1 * 19)
    free = Limit()
    free.follow(torch.arange(11.0), 1.0)
    assert free.value is None


def test_a_step_above_the_limit_has_no_gradient_but_counts_in_the_mean(tmp_path):
    config = toy("adjoint-matching", tmp_path)
    session = session_of(config, pipelines.sd(), Brightness())
    policy = memoryless(session.images)
    batch = sweep_back(session, policy, range(2))
    found = []
    for limit in (Limit(), Limit(0.0)):
        with adjoint_matching.attempt_step(session.run, 0) as metrics:
            metrics.update(match(session, policy, [batch], limit, 0))
        found.append((metrics["dropped"], metrics["grad_norm"] > 0, limit.value > 0))
    assert found == [(0, True, True), (1, False, True)]


def test_half_of_the_steps_are_of_the_first_60_percent():
    policy = Policy(transition, 1.0, grid(flow, 50))
    config = AdjointMatchingConfig(num_inference_steps=50, steps_per_image=4)
    drawn = [draw_steps(config, policy, step) for step in range(300)]
    assert all(len(set(ks)) == 4 and sum(k < 29 for k in ks) == 2 for ks in drawn)  # 49 steps add noise
    assert {k for ks in drawn for k in ks} == set(range(49))
    assert draw_steps(replace(config, steps_per_image=99), policy, 0) == list(range(49))
    assert draw_steps(replace(config, steps_per_image=1), policy, 3) == draw_steps(
        replace(config, steps_per_image=1), policy, 3
    )


def test_a_run_that_drops_is_resumed_with_its_limit(tmp_path):
    config = toy("adjoint-matching", tmp_path, max_train_steps=2)
    states = [state for _, state in train(config, None, pipelines.sd(), Brightness())]
    assert states[0].info["own"]["limit"] > 0
    ((_, resumed),) = train(config, states[0], pipelines.sd(), Brightness())
    assert resumed.info["own"] == states[1].info["own"]


def test_bad_settings_are_one_sentence(tmp_path):
    for more, what in [
        ({"num_inference_steps": 1}, "num_inference_steps is 1: it must be at least 2"),
        ({"sampler": "euler"}, "no sampler 'euler'; known: ancestral"),
        ({"reward": ["jpeg"]}, "jpeg"),
        ({"reward_multiplier": 0.0}, "reward_multiplier is 0"),
    ]:
        with pytest.raises(ValueError, match=what):
            check_recipe(toy("adjoint-matching", tmp_path, **more))
