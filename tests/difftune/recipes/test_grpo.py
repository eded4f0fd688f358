"""GRPO: its kernels, advantages and ratios by hand, its optimum in closed form, windows and groups."""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from difftune import processes
from difftune.configs.recipes import GRPOConfig
from difftune.files import checkpoint
from difftune.recipes import check_recipe, grpo, train
from difftune.recipes.ddpo import ddpo_loss
from difftune.recipes.grpo import divergence_of, guard_log_ratio, log_ratio_of, velocity_gap, window_of
from difftune.rollouts.groups import Parted, group_advantages, group_statistics, judge_groups, scaled_advantages
from difftune.rollouts.policy import (
    KERNELS,
    Policy,
    Trajectory,
    cps_transition,
    dance_transition,
    flow_transition,
    kl,
    log_prob,
)
from difftune.rollouts.trajectories import policy_of
from rewards.compose import WeightedSum, weighted
from rewards.simple import Brightness
from solvers.denoiser import Path, predicted
from solvers.exact import Gaussian
from solvers.noise import cosine, flow, grid
from solvers.samplers.catalogue import euler
from solvers.samplers.step import transition
from tests.support import dits, pipelines
from tests.support.toys import session_of, toy


def scalar(value: float) -> torch.Tensor:
    return torch.full((1, 1), value, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize(
    ("kernel", "eta", "mean", "std"),
    [
        ("flow", 0.7, 0.9014, 0.2711088342),
        ("dance", 0.3, 0.9616, 0.0948683298),
        ("cps", 0.8, 0.5830495168, 0.4755282581),
        ("ddim", 1.0, 0.7833333333, 0.3726779962),
    ],
)
def test_kernel_goldens(kernel, eta, mean, std):
    """A step from t = .6 to .5 at x = 1 with v = .3."""
    said = predicted("flow", scalar(1.0), flow(0.6), scalar(0.3))
    found = KERNELS[kernel](said, flow(0.6), flow(0.5), eta)
    assert [value.item() for value in found] == pytest.approx([mean, std], abs=1e-10)


def test_the_first_step_of_the_flow_sde_has_deviation_a_and_the_last_none():
    """At t = 1 the deviation is a whatever the grid is, and the mean (1 - a^2 / 2) x + v dt."""
    said = predicted("flow", scalar(1.0), flow(1.0), scalar(0.3))
    mean, std = flow_transition(said, flow(1.0), flow(0.9), 0.7)
    assert [mean.item(), std.item()] == pytest.approx([0.725, 0.7], abs=1e-12)
    assert flow_transition(said, flow(1.0), flow(0.35), 0.7)[1].item() == pytest.approx(0.7, abs=1e-12)
    for kernel in (flow_transition, dance_transition, cps_transition):
        end = predicted("flow", scalar(1.0), flow(0.25), scalar(0.3))
        mean, std = kernel(end, flow(0.25), flow(0.0))
        assert std == 0 and torch.allclose(mean, end.x0)


@pytest.mark.parametrize(
    ("kernel", "steps", "deviation"),
    [
        ("dance", 10, 0.4400),
        ("ddim", 10, 0.386),
        ("dance", 50, 0.4876),
        ("ddim", 50, 0.469),
        ("ddim", 400, 0.4957),
        ("cps", 10, 0.352),
        ("cps", 400, 0.401),
    ],
)
def test_the_spread_of_each_kernels_samples_of_a_gaussian(kernel, steps, deviation):
    """For N(0, 0.5^2), the deviations of the SDE and of DDPM go to 0.5, that of CPS does not."""
    eta = {"dance": 0.3, "ddim": 1.0, "cps": 0.8}[kernel]
    levels, exact, variance = grid(flow, steps), Gaussian(scalar(0.0)[0], 0.5), 1.0
    for now, then in zip(levels[:-1], levels[1:], strict=True):
        mean, std = KERNELS[kernel](exact(scalar(1.0), now, {}), now, then, eta)
        variance = mean.item() ** 2 * variance + std.item() ** 2
    assert variance**0.5 == pytest.approx(deviation, abs=6e-4)


@pytest.mark.parametrize("schedule", [flow, cosine])
def test_cps_preserves_the_coefficients(schedule):
    """For x0 = 1, eps = 0 the mean is alpha', and the squares of deviation and of eps's coefficient make sigma'^2."""
    now, then = schedule(0.6), schedule(0.5)
    x0, eps = scalar(1.0), scalar(0.0)
    mean, std = cps_transition(predicted("x0", now.alpha * x0, now, x0), now, then, 0.8)
    assert mean.item() == pytest.approx(then.alpha.item(), abs=1e-12)
    noisy = predicted("x0", now.sigma + scalar(0.0), now, eps)  # x0 = 0, eps = 1
    kept, _ = cps_transition(noisy, now, then, 0.8)
    assert (kept**2 + std**2).item() == pytest.approx(then.sigma.item() ** 2, abs=1e-12)


def test_the_sde_of_a_flow_is_refused_for_a_network_that_predicts_none(tmp_path):
    images = session_of(toy("grpo", tmp_path), pipelines.sd(), Brightness()).images
    assert policy_of(images, None).kernel is transition and policy_of(images, None, "cps").eta == 0.8
    for name in ("flow", "dance"):
        with pytest.raises(ValueError, match=f"kernel '{name}' is the SDE of a flow, and this network predicts eps"):
            policy_of(images, None, name)


# ------------------------------------------------------------------------------------------------ ratios, divergence


def test_ratio_goldens():
    """std = .5, the drawn noise .4, the mean moved by .01."""
    std, old = torch.tensor(0.5, dtype=torch.float64), scalar(0.0)
    x, mean = old + 0.4 * std, old + 0.01
    gap = log_prob(x, mean, std) - log_prob(x, old, std)
    assert gap.item() == pytest.approx(0.0078, abs=1e-12) and gap.exp().item() == pytest.approx(1.0078305, abs=1e-7)
    published = -((x - mean) ** 2) + (x - old) ** 2  # CPS's log-probability, without 1 / (2 std^2)
    assert published.item() == pytest.approx(0.0039, abs=1e-12) == (2 * std**2 * gap).item()
    assert guard_log_ratio(x, mean, old, std).exp().item() == pytest.approx(1.0040080, abs=1e-7)
    assert kl(mean, old, std).item() == pytest.approx(2e-4, abs=1e-12)


def test_guards_log_ratio_is_the_policys_times_sigma_about_its_mean():
    generator = torch.Generator().manual_seed(0)
    old, z, gap = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    std = torch.tensor(0.3, dtype=torch.float64)
    x, mean = old + std * z, old + 0.1 * gap
    log_ratio = log_prob(x, mean, std) - log_prob(x, old, std)
    expected = (log_ratio + (0.1 * gap).square().mean(1) / (2 * std**2)) * std
    assert torch.allclose(guard_log_ratio(x, mean, old, std), expected, atol=1e-12)


@pytest.mark.parametrize("space", ["flow", "eps", "v"])
def test_velocity_gap_is_that_of_what_the_networks_emit(space):
    at = {"flow": flow, "eps": cosine, "v": cosine}[space](0.4)
    x = scalar(0.7)
    said, base = (predicted(space, x, at, scalar(value)) for value in (0.5, 0.2))
    assert velocity_gap(space, said, base, at).item() == pytest.approx(0.09, abs=1e-12)


# ------------------------------------------------------------------------------------------------ advantages

SCORES = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0, 10.0, 10.0, 14.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("deviation", "expected"),
    [
        ("group", [-1.34152, -0.44717, 0.44717, 1.34152, -0.57732, -0.57732, -0.57732, 1.73195]),
        ("raw", [-0.33384, -0.11128, 0.11128, 0.33384, -0.22256, -0.22256, -0.22256, 0.66768]),
        ("residual", [-1.02899, -0.34300, 0.34300, 1.02899, -0.68599, -0.68599, -0.68599, 2.05798]),
    ],
)
def test_advantages_goldens(deviation, expected):
    found = group_advantages(SCORES, 4, deviation)
    assert found.tolist() == pytest.approx(expected, abs=6e-6)
    moved = SCORES + torch.tensor([100.0] * 4 + [-3.0] * 4)
    if deviation != "raw":  # whose deviation is of the rewards themselves
        assert torch.allclose(group_advantages(moved, 4, deviation), found)
    assert group_advantages(SCORES, 4, deviation, limit=0.5).abs().max() == 0.5
    assert not group_advantages(torch.full((4,), 0.7), 2, deviation).any()


def test_a_group_is_its_numbers_whichever_process_made_them():
    """Two processes with two batches each: 0, 1 and 4, 5 are the first one's, 2, 3 and 6, 7 the second one's."""
    scores = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 10.0, 5: 10.0, 6: 10.0, 7: 14.0}
    numbers = [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]
    told = [[torch.tensor([scores[n] for n in part]) for part in parts] for parts in numbers]
    everyone = iter([torch.cat([*told[0], *told[1]]), torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])])
    run = SimpleNamespace(world=2, rank=1, accelerator=SimpleNamespace(gather=lambda own: next(everyone)))
    session = SimpleNamespace(config=GRPOConfig(num_images_per_prompt=4, advantage_std="group"), run=run)
    found, metrics = judge_groups(session, numbers[1], told[1], Parted(Brightness()))
    assert torch.stack(list(found)).tolist() == [
        pytest.approx([0.44717, 1.34152], abs=1e-5),
        pytest.approx([-0.57732, 1.73195], abs=1e-5),
    ]
    assert metrics["reward_mean"] == pytest.approx(6.75)


def test_rewards_are_scaled_in_their_group_before_they_are_summed():
    """For r1 = 0, 1, 0, 1 and r2 = 10, 20, 30, 40: by the plain sum the middle two are the other way around."""
    parts = torch.tensor([[0.0, 10.0], [1.0, 20.0], [0.0, 30.0], [1.0, 40.0]], dtype=torch.float64)
    found = scaled_advantages(parts, [1.0, 1.0], 4)
    assert found.tolist() == pytest.approx([-1.37638, 0.32492, -0.32492, 1.37638], abs=1e-5)
    plain = group_advantages(parts.sum(1), 4)
    assert plain[1] < plain[2]
    assert torch.allclose(scaled_advantages(parts * torch.tensor([100.0, 0.01]) + 7, [1.0, 1.0], 4), found)
    assert torch.allclose(scaled_advantages(parts, [1.0, 0.0], 4), torch.tensor([-1.0, 1, -1, 1], dtype=torch.float64))
    assert torch.allclose(scaled_advantages(parts, [-1.0, -1.0], 4), -found)
    constant = torch.cat([parts, torch.full((4, 1), 0.1, dtype=torch.float64)], 1)
    assert torch.allclose(scaled_advantages(constant, [1.0, 1.0, 50.0], 4), found)
    assert not scaled_advantages(torch.full((4, 2), 0.1), [1.0, 1.0], 2).any()


@pytest.mark.parametrize("name", ["grpo", pytest.param("nft", marks=pytest.mark.slow)])
def test_a_reward_of_a_hundred_times_the_scale_does_not_drown_the_other(name, tmp_path):
    """Under reward_scaling group, a run with saturation times 100 is the run without, up to rounding."""
    reward = weighted({"brightness": 1.0, "saturation": 1.0})

    class Hundred(Brightness):
        def __call__(self, images, prompts):
            return 100 * reward.rewards["saturation"](images, prompts)

    other = WeightedSum({"brightness": reward.rewards["brightness"], "big": Hundred()}, {"brightness": 1.0, "big": 1.0})
    ends = {}
    for scaling in ("group", "none"):
        config = toy(name, tmp_path, reward_scaling=scaling, max_train_steps=1, train_batch_size=4)
        runs = [next(train(config, None, pipelines.sd(), judge))[1] for judge in (reward, other)]
        keys = [key for key in runs[0].tensors if key.startswith("optimizer.exp_avg.")]
        ends[scaling] = [torch.cat([run.tensors[key].flatten() for key in keys]) for run in runs]
    assert torch.allclose(*ends["group"], rtol=1e-3, atol=1e-6)
    assert torch.cosine_similarity(*ends["none"], 0) < 0.999


def test_equal_scores_of_a_prompt_give_no_advantage_and_are_counted():
    scores = torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 6.0])
    found = group_advantages(scores, 3, "group")
    assert not found[:3].any() and found[3] < found[4] < 0 < found[5]
    assert group_statistics(scores, 3) == {
        "group_std": pytest.approx(np.std([1, 2, 6]) / 2),
        "dead_groups": 0.5,
    }


# ------------------------------------------------------------------------------------------------ the optimum


class Linear:
    """r = 3 x."""

    def __call__(self, x):
        return 3 * x

    def moments(self, mean, variance):
        """Its mean and its deviation for a Gaussian x."""
        return 3 * mean, 3 * variance.sqrt()


class Quadratic:
    """r = -(x - 2)^2 / 2."""

    def __call__(self, x):
        return -((x - 2) ** 2) / 2

    def moments(self, mean, variance):
        gap = (mean - 2) ** 2
        return -(gap + variance) / 2, (variance**2 / 2 + variance * gap).sqrt()


LEVELS, BASE, WEIGHT = grid(flow, 3), Gaussian(scalar(0.5)[0], 0.5), 2.0


def ddpm(x, i):
    """Mean and deviation of step i of the base's chain; the last one adds no noise."""
    return transition(BASE(x, LEVELS[i], {}), LEVELS[i], LEVELS[i + 1], 1.0)


@pytest.mark.parametrize(
    "reward", [pytest.param(Linear(), marks=pytest.mark.slow), Quadratic()], ids=["linear", "quadratic"]
)
def test_the_optimum_is_reached_within_3_standard_errors(reward):
    """Each step's mean is moved by std (u + w x), where u and w are learnt, and has KL weight 2: the end's mean and
    second moment are those of the fixed point, which is the tilt, a shift, of a linear reward."""
    config = GRPOConfig(kl_weight=WEIGHT, num_images_per_prompt=8)
    controls, found = torch.zeros(2, 2, dtype=torch.float64), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        controls.requires_grad_()
        with torch.no_grad():
            paths, means, stds = [Path(torch.randn(3200, 1, generator=generator, dtype=torch.float64))], [], []
            for i in range(3):
                mean, std = moved(paths[-1].x, controls, i)
                noise = torch.randn(3200, 1, generator=generator, dtype=torch.float64)
                paths, means, stds = [*paths, Path(mean + std * noise)], [*means, mean], [*stds, std]
        trajectory, end = Trajectory(paths, means, stds), paths[-1].x[:, 0]
        batch = SimpleNamespace(trajectory=trajectory, after=lambda i, paths=paths: paths[i + 1].x)
        gains, loss = group_advantages(reward(end), 8, config.advantage_std, 1e9), 0.0
        for i in trajectory.drawn:
            now, base = (grpo.Weighed(None, *moved(paths[i].x, c, i)) for c in (controls, 0 * controls.detach()))
            apart = divergence_of(config, now, base, "flow", LEVELS[i]).mean()
            loss = loss + ddpo_loss(gains, log_ratio_of(config, batch, i, now)) + config.kl_weight * apart
        (gradient,) = torch.autograd.grad(loss, controls)
        controls = (controls - 0.1 * gradient).detach()
        found.append([end.mean().item(), end.square().mean().item()])
    blocks = np.array(found[50:]).reshape(10, 10, 2).mean(1)
    errors, (mean, variance) = blocks.std(0, ddof=1) / len(blocks) ** 0.5, fixed_point(reward)
    assert (errors < 0.02).all() and (abs(blocks.mean(0) - [mean, mean**2 + variance]) < 3 * errors).all()
    start, spread = ends_of(torch.zeros(2, 2, dtype=torch.float64))[:2]
    if isinstance(reward, Linear):  # the tilt exp(x / (w s)) of deviation s; groups of 8 lessen gaps and unit
        assert mean == pytest.approx(float(start + (7 / 8) ** 0.5 * spread**0.5 / WEIGHT), abs=1e-6)
    else:
        assert mean > start + 0.1 and variance < 0.98 * spread


def moved(x, controls, i):
    """Mean and deviation of step i under the controls; the step to data has none."""
    mean, std = ddpm(x, i)
    return (mean + std * (controls[i, 0] + controls[i, 1] * x) if i < 2 else mean), std


def ends_of(controls):
    """Mean and variance of the chain's end, exactly, as each step is linear, and the divergence, whose gradient is that
    of each step by itself, as in the recipe: an earlier step does not answer for where it leads."""
    mean, variance, divergence = (torch.tensor(value, dtype=torch.float64) for value in (0.0, 1.0, 0.0))
    for i in range(3):
        (low, std), (high, _) = (moved(scalar(value), controls, i) for value in (0.0, 1.0))
        if i < 2:
            u, w = controls[i]
            divergence = divergence + ((u + w * mean.detach()) ** 2 + w**2 * variance.detach()) / 2
        slope = (high - low)[0, 0]
        mean, variance = low[0, 0] + slope * mean, slope**2 * variance + std**2
    return mean, variance, divergence


def fixed_point(reward) -> tuple[float, float]:
    """Where the gradient of E[r] / deviation, the unit of advantages, is that of the divergence: mean and variance."""
    controls = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(100):
        controls.requires_grad_()
        mean, variance, divergence = ends_of(controls)
        value, deviation = reward.moments(mean, variance)
        gain = (7 / 8) ** 0.5 * value / deviation.detach() - WEIGHT * divergence
        (gradient,) = torch.autograd.grad(gain, controls)
        controls = (controls + 0.3 * gradient).detach()
    return mean.item(), variance.item()


# ------------------------------------------------------------------------------------------------ windows and groups


def test_windows_are_the_papers():
    levels = [flow(1 - i / 25) for i in range(26)]
    policy = Policy(flow_transition, 0.7, levels)
    config = GRPOConfig(num_inference_steps=25, sde_window=4, window_schedule="progressive")
    found = [window_of(config, policy, step) for step in (0, 24, 25, 100, 10_000)]
    assert found == [range(0, 4), range(0, 4), range(1, 5), range(4, 8), range(20, 24)]  # the last step adds no noise
    config = replace(config, window_schedule="random")
    drawn = [window_of(config, policy, step) for step in range(400)]
    assert {window.start for window in drawn} == set(range(9)) and {len(window) for window in drawn} == {4}
    assert window_of(config, policy, 7) == window_of(config, policy, 7)
    assert window_of(replace(config, sde_window=0), policy, 3) == range(24)
    assert window_of(replace(config, sde_window=99), policy, 3) == range(24)


def test_a_window_over_all_steps_is_none_and_other_steps_are_the_odes(tmp_path):
    policy = policy_of(session_of(toy("grpo", tmp_path), dits.sd3(), Brightness()).images, None)
    session = session_of(toy("grpo", tmp_path), dits.sd3(), Brightness())
    rolled = [
        grpo.roll_out(session, replace(policy, window=window), session.prompts, range(2)).trajectory
        for window in (None, range(policy.steps), range(0), range(1, 2))
    ]
    whole, windowed, ode, one = rolled
    assert torch.equal(whole.end, windowed.end) and whole.drawn == windowed.drawn == [0, 1]
    assert one.drawn == [1] and ode.drawn == [] and one.stds[0] == one.stds[2] == 0
    start = session.images.begin(session.prompts, range(2))
    assert torch.allclose(ode.end, replace(session.images, step=euler).latents(start), atol=1e-6)


def metrics_of(config, make=pipelines.sd, reward=None, steps=None):
    return [metrics for metrics, _ in islice(train(config, None, make(), reward or Brightness()), steps)]


@pytest.mark.parametrize("make", [pipelines.sd, dits.sd3])
def test_the_ratio_of_a_rounds_first_update_is_exactly_1(make, tmp_path):
    """Under CFG, and in bfloat16; the second update of a round has moved."""
    more = {"updates_per_round": 2, "max_train_steps": 2, "guidance": "cfg", "mixed_precision": "bf16"}
    first, second = metrics_of(toy("grpo", tmp_path, **more), make)
    assert (first["ratio"], first["approx_kl"], first["clip_fraction"]) == (1, 0, 0)
    assert second["approx_kl"] > 0 and first["group_std"] == second["group_std"] > 0 == first["dead_groups"]


@pytest.mark.parametrize("trust", [pytest.param("clip", marks=pytest.mark.slow), "guard"])
def test_the_ratio_is_1_after_a_resume_too(trust, tmp_path):
    config = toy("grpo", tmp_path, trust=trust, updates_per_round=2, max_train_steps=3, kl_weight=0.1)
    states = [state for _, state in train(config, None, pipelines.sd(), Brightness())]
    path = checkpoint.save(tmp_path / "out", states[1])
    ((metrics, state),) = train(config, checkpoint.load(path), pipelines.sd(), Brightness())
    assert metrics["ratio"] == 1 and metrics["kl"] > 0
    assert all(torch.equal(state.tensors[name], value) for name, value in states[2].tensors.items())


def test_a_constant_reward_gives_no_gradient_and_is_counted(tmp_path):
    class Constant(Brightness):
        def __call__(self, images, prompts):
            return torch.full((len(images),), 0.7)

    (metrics,) = metrics_of(toy("grpo", tmp_path, max_train_steps=1), reward=Constant())
    assert metrics["grad_norm"] == 0 and metrics["dead_groups"] == 1


def test_one_update_makes_the_better_image_likelier(tmp_path):
    """The log-probability of the transitions of the images rises for those above their prompt's mean, and falls for
    the others."""
    config = toy("grpo", tmp_path, num_images_per_prompt=4, train_batch_size=4, learning_rate=1e-3, max_train_steps=1)
    session = session_of(config, pipelines.sd(), Brightness())
    policy = policy_of(session.images, None)
    judged = grpo.sample_round(session, policy, range(1))
    with grpo.attempt_step(session.run, 0) as metrics:
        metrics.update(grpo.reinforce_groups(session, judged, 0))
    (batch,), (gains,) = judged.batches, judged.advantages
    with torch.no_grad():
        change = sum(
            log_prob(batch.after(i), *batch.mean(judged.policy, i)) - batch.trajectory.log_prob(i)
            for i in batch.trajectory.drawn
        )
    assert (gains * change).mean() > 0


@pytest.mark.parametrize("form", ["gaussian", "velocity"])
def test_the_penalty_counts_towards_the_loss(form, tmp_path):
    """With equal rewards nothing else remains, and it is not negative."""

    class Constant(Brightness):
        def __call__(self, images, prompts):
            return torch.full((len(images),), 0.7)

    config = toy("grpo", tmp_path, kl_weight=2.0, kl_form=form)
    session = session_of(config, pipelines.sd(), Constant())
    judged = grpo.sample_round(session, policy_of(session.images, None), range(1))
    with torch.no_grad():
        for weight in session.run.weights.values():
            weight += 0.1
    with grpo.attempt_step(session.run, 0) as metrics:
        metrics.update(grpo.reinforce_groups(session, judged, 0))
    assert metrics["loss"] == pytest.approx(2 * metrics["kl"]) and metrics["kl"] > 0


def test_a_group_may_be_made_in_several_batches(tmp_path):
    config = toy("grpo", tmp_path, num_images_per_prompt=4, max_train_steps=1, guidance="none")
    split = train(
        replace(config, train_batch_size=2, gradient_accumulation_steps=2), None, pipelines.sd(), Brightness()
    )
    joined = train(replace(config, train_batch_size=4), None, pipelines.sd(), Brightness())
    (_, one), (_, two) = next(split), next(joined)
    moments = [name for name in one.tensors if name.startswith("optimizer.exp_avg.")]
    scale = max(two.tensors[name].abs().max() for name in moments)
    assert all((one.tensors[name] - two.tensors[name]).abs().max() <= 1e-4 * scale for name in moments)


def test_all_images_of_a_prompt_may_begin_from_one_noise(tmp_path):
    config = toy("grpo", tmp_path, shared_noise=True, train_batch_size=4)
    session = session_of(config, pipelines.sd(), Brightness())
    judged = grpo.sample_round(session, policy_of(session.images, None), range(1))
    start = judged.batches[0].trajectory.paths[0].x
    assert torch.equal(start[0], start[1]) and torch.equal(start[2], start[3]) and not torch.equal(start[0], start[2])


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout is 0.1: the ratio"),
        ({"num_images_per_prompt": 3}, "a round has 2 images .* give a multiple of num_images_per_prompt, 3"),
        ({"num_images_per_prompt": 1}, "num_images_per_prompt is 1"),
        ({"shared_noise": True, "num_images_per_prompt": 4, "updates_per_round": 2}, "train_batch_size is 2"),
        ({"kernel": "cps", "eta": 1.5}, "eta is 1.5: kernel 'cps'"),
        ({"kernel": "ddim", "eta": 1.01}, "eta is 1.01: kernel 'ddim'"),
        ({"kl_form": "velocity"}, "kl_form is 'velocity', but kl_weight is 0"),
        ({"window_interval": 5}, "window_interval is 5, but window_schedule is 'random'"),
        ({"window_schedule": "progressive", "sde_window": 0}, "window_schedule is 'progressive', but sde_window is 0"),
        ({"kernel": "sde"}, "no kernel 'sde'"),
        ({"num_inference_steps": 1}, "num_inference_steps is 1"),
    ],
)
def test_bad_settings_are_one_sentence(more, what, tmp_path):
    with pytest.raises(ValueError, match=what) as error:
        check_recipe(toy("grpo", tmp_path, **more))
    assert "\n" not in str(error.value)


def test_ddim_has_no_more_noise_than_at_1_also_where_it_is_the_networks_own_kernel(tmp_path):
    """Else sigma'^2 - std^2 is below 0 and a mean not a number. The SDE of a flow has no such limit."""
    for name in ("grpo", "ddpo", "d3po"):
        with pytest.raises(ValueError, match="eta is 1.01: kernel 'ddim' has no more noise than at 1"):
            next(train(toy(name, tmp_path, eta=1.01), None, pipelines.sd(), Brightness()))
    images = SimpleNamespace(denoiser=SimpleNamespace(prediction_type="flow"), levels=grid(flow, 4))
    assert policy_of(images, 1.5).eta == 1.5


def test_a_group_may_be_made_by_several_processes_together(tmp_path, monkeypatch):
    """What counts are the images of a round of all of them."""
    config = toy("grpo", tmp_path, num_images_per_prompt=4)
    for count in (2, 3):
        monkeypatch.setattr(processes, "process", lambda count=count: SimpleNamespace(num_processes=count))
        if count == 2:
            check_recipe(config)
    with pytest.raises(ValueError, match="a round has 6 images .*updates_per_round x 3 processes.: give a multiple of"):
        check_recipe(config)
