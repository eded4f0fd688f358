"""DDPO: its loss and advantages by hand, its gradient by another loop, its optimum in closed form, and resumption."""

from collections import defaultdict, deque
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch

from difftune.configs.recipes import DDPOConfig
from difftune.files import checkpoint
from difftune.files.checkpoint import State
from difftune.pipelines import lora
from difftune.recipes import ddpo, train, train_in_folder
from difftune.recipes.ddpo import advantages, ddpo_loss, trust_region
from difftune.rollouts.policy import kl, log_prob
from difftune.rollouts.trajectories import policy_of, roll_out
from rewards.simple import Brightness
from solvers.latent import LatentModel
from tests.support import dits, pipelines
from tests.support.toys import session_of

TOY = DDPOConfig(
    max_train_steps=4, train_batch_size=4, num_inference_steps=3, learning_rate=1e-2, guidance_scale=3.0, rank=2
)
BRIGHT = Brightness()


@pytest.fixture
def toy(tmp_path) -> DDPOConfig:
    (tmp_path / "prompts.txt").write_text("red circle\nblue square\nred square\n")
    return replace(TOY, prompts=str(tmp_path / "prompts.txt"))


def final(config: DDPOConfig, state: State | None = None, steps: int | None = None, make=pipelines.sd) -> State:
    *_, (_, last) = islice(train(config, state, make(), BRIGHT), steps)
    return last


def same_weights(a: State, b: State) -> bool:
    assert a.tensors.keys() == b.tensors.keys()
    return all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors if not k.startswith("rng"))


# ------------------------------------------------------------------------------------------------ loss and advantages


def test_advantages_golden():
    found = advantages(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert found.tolist() == pytest.approx([-1.3416, -0.4472, 0.4472, 1.3416], abs=1e-4)


def test_advantages_by_hand():
    scores = np.random.default_rng(0).normal(size=12)
    found = advantages(torch.tensor(scores))
    assert found.numpy() == pytest.approx((scores - scores.mean()) / (scores.std() + 1e-8), abs=1e-12)
    gaps = np.concatenate([g - g.mean() for g in scores.reshape(4, 3)])
    assert advantages(torch.tensor(scores), 3).numpy() == pytest.approx(gaps / (gaps.std() + 1e-8), abs=1e-12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(advantages(torch.tensor(scores)[order]), found[order], atol=1e-12)
    assert advantages(torch.tensor([0.0] * 99 + [1.0])).max() == 5
    assert not advantages(torch.full((4,), 0.7)).any()


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "loss", "moves"),
    [(1.2, 2e-4, -1.20012, False), (-1.2, 2e-4, 1.20024, True), (1.2, -2e-4, -1.19976, True)],
)
def test_loss_goldens(advantage, log_ratio, loss, moves):
    ratio = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    found = ddpo_loss(torch.tensor([advantage], dtype=torch.float64), ratio)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-7)
    assert bool(ratio.grad) == moves


def test_loss_by_hand():
    rng = np.random.default_rng(1)
    a, r = rng.normal(size=50), rng.normal(scale=0.3, size=50)
    rho = np.exp(r)
    expected = np.mean([max(-x * p, -x * min(max(p, 0.8), 1.2)) for x, p in zip(a, rho, strict=True)])
    assert ddpo_loss(torch.tensor(a), torch.tensor(r), 0.2).item() == pytest.approx(expected, abs=1e-12)


def test_trust_region_by_hand():
    """The mean ratio, half the mean squared log-ratio, and the share of ratios outside; one on the edge is inside."""
    found = trust_region(torch.tensor([0.0, np.log(1.5), np.log(0.25)]), 0.5)
    assert found["ratio"].item() == pytest.approx((1 + 1.5 + 0.25) / 3)
    assert found["approx_kl"].item() == pytest.approx((np.log(1.5) ** 2 + np.log(0.25) ** 2) / 6)
    assert found["clip_fraction"].item() == pytest.approx(1 / 3)
    assert trust_region(torch.zeros(2), 0.0)["clip_fraction"] == 0


# ------------------------------------------------------------------------------------------------ closed forms


def gaussian(theta: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    noise = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (theta + noise).detach()


def loss_of(theta: torch.Tensor, x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """DDPO's first pass on a policy N(theta, 1)."""
    std = torch.ones((), dtype=torch.float64)
    now = log_prob(x, theta.expand_as(x), std)
    return ddpo_loss(advantages(scores, limit=1e9), now - now.detach())


def test_expected_gradient_on_a_linear_reward_is_that_of_the_mean_reward_over_its_deviation():
    """E r = 2 theta and std r = 2, so the gradient is -1; its own standard error is about 1.4 / sqrt(n)."""
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    n = 200_000
    x = gaussian(theta, n, 0)
    (gradient,) = torch.autograd.grad(loss_of(theta, x, 2 * x[:, 0] + 5), theta)
    assert gradient.item() == pytest.approx(-1, abs=3 * 2**0.5 / n**0.5)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_kl_regularised_optimum_is_reached_within_3_standard_errors(weight):
    """Advantages of r = a x have unit deviation: they are those of the reward x, with its optimum at 1 / weight."""
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    std, n, rate, found = torch.ones((), dtype=torch.float64), 4000, 0.2 / weight, []
    for step in range(400):
        x = gaussian(theta, n, step)
        loss = loss_of(theta, x, 3 * x[:, 0]) + weight * kl(theta.expand(n, 1), torch.zeros(n, 1), std).mean()
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - rate * gradient).detach().requires_grad_()
        found.append(theta.item())
    means = np.array(found[40:]).reshape(18, 20).mean(1)
    error = means.std(ddof=1) / len(means) ** 0.5
    assert error < 0.01 / weight
    assert abs(means.mean() - 1 / weight) < 3 * error


# ------------------------------------------------------------------------------------------------ the algorithm


def by_hand(pipe, config: DDPOConfig, rolled, adv: torch.Tensor) -> dict[str, torch.Tensor]:
    """-mean A grad log pi in the LoRA: the UNet and DDIM's own formulae, with the scheduler's alphas."""
    conds, scheduler = LatentModel(pipe).encode(rolled.texts), pipe.scheduler
    scheduler.set_timesteps(config.num_inference_steps)
    steps, total = [*scheduler.timesteps.tolist()], 0.0
    jump = 1000 // config.num_inference_steps
    for i, t in enumerate(steps):
        x, then = (rolled.trajectory.paths[j].x for j in (i, i + 1))
        c, u = (pipe.unet(x, t, conds[k]["encoder_hidden_states"]).sample for k in ("cond", "uncond"))
        eps = u + config.guidance_scale * (c - u)
        a = scheduler.alphas_cumprod[t]
        b = scheduler.alphas_cumprod[t - jump] if t >= jump else scheduler.final_alpha_cumprod
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        std = ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
        mean = b.sqrt() * x0 + (1 - b - std**2).sqrt() * eps
        total = total - (adv * torch.distributions.Normal(mean, std).log_prob(then).flatten(1).mean(1)).mean()
    weights = lora.weights(pipe.unet)
    return dict(zip(weights, torch.autograd.grad(total / len(steps), list(weights.values())), strict=True))


def test_gradient_is_that_of_a_loop_by_hand(toy):
    config = replace(toy, max_train_steps=1, max_grad_norm=1e9)
    pipe = pipelines.sd()
    session = session_of(config, pipe, BRIGHT)
    rolled = roll_out(session, policy_of(session.images, None), session.prompts, range(4))
    expected = by_hand(pipe, config, rolled, advantages(rolled.scores))
    state = final(config)
    scale = max(g.abs().max() for g in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        assert torch.allclose(state.tensors[f"optimizer.exp_avg.{name}"], 0.1 * gradient, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("make", [pipelines.sd, pipelines.sdxl, dits.sd3])
def test_ratio_of_the_first_pass_is_1_and_only_the_first_of_a_round_is(toy, make):
    config = replace(toy, updates_per_round=2, max_train_steps=3)
    found = [metrics for metrics, _ in train(config, None, make(), BRIGHT)]
    for first in (found[0], found[2]):
        assert (first["ratio"], first["approx_kl"], first["clip_fraction"]) == (1, 0, 0)
    assert found[1]["approx_kl"] > 1e-12
    assert found[0]["reward_mean"] == found[1]["reward_mean"] != found[2]["reward_mean"]


def test_a_constant_reward_gives_no_gradient(toy):
    class Constant(Brightness):
        def __call__(self, images, prompts):
            return torch.full((len(images),), 0.7)

    ((metrics, _),) = train(replace(toy, max_train_steps=1), None, pipelines.sd(), Constant())
    assert metrics["grad_norm"] == 0


class Noted(Brightness):
    """Notes the prompts and the scores of each call."""

    def __init__(self):
        object.__setattr__(self, "met", [])

    def __call__(self, images, prompts):
        scores = super().__call__(images, prompts)
        self.met.append((list(prompts), scores.tolist()))
        return scores


def released(met, size: int, least: int):
    """The advantages of rounds of prompts and scores as the paper's code tracks them: deques, then the round's."""
    latest = defaultdict(partial(deque, maxlen=size))
    for prompts, scores in met:
        for prompt, score in zip(prompts, scores, strict=True):
            latest[prompt].append(score)
        of = [latest[prompt] if len(latest[prompt]) >= least else scores for prompt in prompts]
        yield [(score - np.mean(its)) / (np.std(its) + 1e-6) for score, its in zip(scores, of, strict=True)]


def test_advantages_by_each_prompts_latest_rewards_are_those_of_the_released_tracker(toy, monkeypatch):
    """In the first round every prompt has one reward or two, of which 3 are wanted; later the oldest of 4 leave."""
    found, reward = [], Noted()
    monkeypatch.setattr(ddpo, "ddpo_loss", lambda a, r, c: found.append(a.tolist()) or ddpo_loss(a, r, c))
    few = {"per_prompt_stat_tracking_buffer_size": 4, "per_prompt_stat_tracking_min_count": 3}
    config = replace(toy, per_prompt_stat_tracking=True, **few)
    for _ in train(config, None, pipelines.sd(), reward):
        pass
    per_round = len(found) // 4  # backward passes, all on the same advantages
    for round, expected in zip(found[::per_round], released(reward.met, 4, 3), strict=True):
        assert round == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert found[-1] != pytest.approx(advantages(torch.tensor(reward.met[-1][1])).tolist(), abs=1e-2)


def test_each_step_of_a_round_is_taken_on_its_own_share_of_the_images(toy, monkeypatch):
    """And the advantages are of the whole round."""
    found, reward = [], Noted()
    monkeypatch.setattr(ddpo, "ddpo_loss", lambda a, r, c: found.append(a.tolist()) or ddpo_loss(a, r, c))
    config = replace(toy, updates_per_round=2, max_train_steps=2, num_images_per_prompt=2)
    assert len(list(train(config, None, pipelines.sd(), reward))) == 2
    expected = advantages(torch.tensor([score for _, scores in reward.met for score in scores]), 2).tolist()
    first, *_, last = found
    assert [*first, *last] == pytest.approx(expected, abs=1e-5)


def test_a_reward_of_the_prompt_alone_gives_no_gradient_once_the_prompts_are_known(toy):
    class Length(Brightness):
        def __call__(self, images, prompts):
            return torch.tensor([float(len(prompt)) for prompt in prompts])

    for tracked in (True, False):
        config = replace(toy, per_prompt_stat_tracking=tracked, per_prompt_stat_tracking_min_count=2)
        norms = [metrics["grad_norm"] for metrics, _ in train(config, None, pipelines.sd(), Length())]
        assert [norm > 0 for norm in norms] == [True, not tracked, not tracked, not tracked]


def test_accumulated_gradients_equal_those_of_the_joined_batch(toy):
    config = replace(toy, max_train_steps=1, num_images_per_prompt=2)
    joined = final(config)
    split = final(replace(config, train_batch_size=2, gradient_accumulation_steps=2))
    moments = [k for k in joined.tensors if k.startswith("optimizer.exp_avg.")]
    scale = max(joined.tensors[k].abs().max() for k in moments)
    for name in moments:
        assert (joined.tensors[name] - split.tensors[name]).abs().max() <= 1e-4 * scale


def test_the_penalty_holds_the_policy_near_its_reference(toy):
    free, held = (final(replace(toy, kl_weight=w, max_grad_norm=1e9, updates_per_round=1)) for w in (0.0, 1e6))
    names = [k for k in free.tensors if k.endswith("lora_B.default.weight") and k.startswith("weights.")]
    assert sum(held.tensors[k].norm() for k in names) < 0.7 * sum(free.tensors[k].norm() for k in names)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_equals_uninterrupted_bit_for_bit_within_a_round_too(toy, tmp_path, stop):
    config = replace(toy, updates_per_round=2, num_images_per_prompt=2, max_train_steps=3)
    whole = final(config)
    path = checkpoint.save(tmp_path, final(config, steps=stop))
    torch.manual_seed(99)
    assert same_weights(whole, final(config, checkpoint.load(path)))


# ------------------------------------------------------------------------------------------------ the run


def test_run_writes_a_lora_that_loads(toy, tmp_path):
    out = tmp_path / "out"
    config = replace(toy, max_train_steps=1, output_dir=str(out))
    found = train_in_folder(config, lambda line: None, pipelines.sd(), BRIGHT)
    assert found["optimizer_steps"] == 1
    pipelines.sd().load_lora_weights(out)
    assert "DDPO" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"eta": 0.0}, "eta is 0.0: it must be above 0"),
        ({"sampler": "euler"}, "no sampler 'euler'; known: ancestral"),
        ({"lora_dropout": 0.1}, "lora_dropout is 0.1: the ratio"),
        ({"num_images_per_prompt": 3}, "train_batch_size is 4: it must be a multiple of num_images_per_prompt, 3"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"updates_per_round": 0}, "updates_per_round is 0"),
        ({"clip_range": -1.0}, "clip_range is -1"),
        ({"per_prompt_stat_tracking_min_count": 0}, "per_prompt_stat_tracking_min_count is 0"),
        ({"per_prompt_stat_tracking_buffer_size": 9}, "buffer_size is 9: give at least .*min_count, 16"),
        ({"reward": ["tiny-clap"]}, "did you mean 'tiny-clip'"),
    ],
)
def test_bad_settings_are_one_sentence_and_nothing_is_written(toy, tmp_path, more, what):
    with pytest.raises(ValueError, match=what) as error:
        config = replace(toy, **{"output_dir": str(tmp_path / "out"), **more})
        train_in_folder(config, pipe=pipelines.sd())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_round_whose_reward_is_not_finite_is_skipped_and_made_again(toy):
    class Once(Brightness):
        calls = 0

        def __call__(self, images, prompts):
            Once.calls += 1
            return super().__call__(images, prompts) * (float("nan") if Once.calls == 2 else 1)

    config = replace(toy, updates_per_round=2, max_train_steps=2)
    first, second = (metrics for metrics, _ in train(config, None, pipelines.sd(), Once()))
    assert (first["skipped"], second["skipped"], Once.calls) == (1, 1, 4)
    assert "reward_mean" not in first and second["ratio"] == 1
