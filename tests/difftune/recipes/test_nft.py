"""NFT: its losses by hand, their minimum in closed form, the old weights, and what is drawn."""

from dataclasses import replace

import pytest
import torch

from difftune.configs.recipes import NFTConfig
from difftune.files import checkpoint
from difftune.recipes import check_recipe, nft, train
from difftune.recipes.nft import DGPOSettings, dgpo_loss, nft_loss, old_decay, quality_of
from difftune.rollouts.denoising import denoising_errors
from rewards.simple import Brightness
from solvers.noise import Noise
from tests.support import dits, pipelines
from tests.support.toys import session_of, toy


def number(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ losses


def test_nft_loss_goldens():
    """v_theta = .5, v_old = .2, v = 1, beta = .5, r = .8, at t = .5: x0 = -t v up to what is common."""
    v = number(0.5).requires_grad_()
    now, old, clean = -0.5 * v, number(-0.1), number(-0.5)
    quality = torch.tensor([0.8], dtype=torch.float64)
    plain = nft_loss(v, number(0.2), number(1.0), quality, 0.5, adaptive=False) * 0.5
    assert plain.item() == pytest.approx(0.5185, abs=1e-12)
    loss = 5 * nft_loss(now, old, clean, quality, 0.5)
    (gradient,) = torch.autograd.grad(loss, v)
    assert [loss.item(), gradient.item()] == pytest.approx([3.55, -3.0], abs=1e-12)


def test_qualities_goldens():
    found = quality_of(torch.tensor([-6, -1.3415, 0, 1.3415, 5]), 5.0)
    assert found.tolist() == pytest.approx([0, 0.36585, 0.5, 0.63415, 1])


def test_the_first_gradient_is_of_the_sign_of_the_quality_and_does_not_depend_on_beta():
    """2 (2 r - 1) (v_old - v) for each image, so a good one draws the model to itself and r = 1/2 does nothing."""
    clean = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2)
    old, quality = torch.full_like(clean, 0.3), torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    found = []
    for beta in (0.1, 1.0):
        now = old.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nft_loss(now, old, clean, quality, beta, adaptive=False), now)
        assert torch.allclose(gradient, 2 * (2 * quality - 1)[:, None] * (old - clean) / 6)
        now = old.clone().requires_grad_()
        found.append(torch.autograd.grad(nft_loss(now, old, clean, quality, beta), now)[0])
    assert torch.allclose(*found) and not found[0][1].any()


def test_the_mean_is_tilted_as_in_closed_form_within_3_standard_errors():
    """For data N(0, s^2) and r = 1/2 + k x0, the plain loss moves the velocity by -(2 k / beta) s^2 t / ((1 - t)^2 s^2
    + t^2), whose flow ends at the tilt exp((2 k / beta) x0): its mean is 2 k s^2 / beta = .1."""
    variance, k, n = 0.25, 0.2, 100_000
    generator = torch.Generator().manual_seed(0)
    levels, drift, errors = torch.linspace(1, 0, 21, dtype=torch.float64), [], []
    for t in levels[:-1].tolist():
        x0, eps = (torch.randn(n, 1, generator=generator, dtype=torch.float64) for _ in range(2))
        x0 = variance**0.5 * x0
        x = (1 - t) * x0 + t * eps
        power = (1 - t) ** 2 * variance + t**2
        old = (1 - t) * variance / power * x  # the exact clean prediction
        shift = torch.zeros((), dtype=torch.float64, requires_grad=True)  # of the velocity
        loss = nft_loss(old - t * shift, old, x0, 0.5 + k * x0[:, 0], 1.0, adaptive=False)
        (slope,) = torch.autograd.grad(loss, shift)
        drift.append((-slope / (2 * t**2)).item())  # the minimum of the parabola
        each = 2 * k * x0 * (old - x0) / t  # whose mean that is
        errors.append(each.std().item() / n**0.5)
        assert drift[-1] == pytest.approx(-2 * k * variance * t / power, abs=0.03)
    assert drift[8] == pytest.approx(-0.15, abs=0.003)  # at t = .6
    ends, error = {"learnt": 0.0, "exact": 0.0}, 0.0
    for name in ends:
        mean = 0.0
        for i, (t, after) in enumerate(zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True)):
            power = (1 - t) ** 2 * variance + t**2
            moved = drift[i] if name == "learnt" else -2 * k * variance * t / power
            mean += (after - t) * ((t - (1 - t) * variance) / power * mean + moved)
        ends[name] = mean
    assert ends["exact"] == pytest.approx(0.1, abs=0.01)  # 20 Euler steps
    for i, (t, after) in enumerate(zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True)):
        slope = (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)
        error = ((1 + (after - t) * slope) ** 2 * error**2 + ((after - t) * errors[i]) ** 2) ** 0.5
    assert error < 1e-3 and ends["learnt"] == pytest.approx(ends["exact"], abs=3 * error)


REWARDS = {"linear": lambda x: 0.5 + 0.2 * x, "quadratic": lambda x: 0.8 - 0.1 * (x - 1) ** 2}
BASES = {"Gaussian": ([0.3], 0.5), "mixture": ([-1.0, 1.0], 0.5)}  # means and deviation


@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("base", BASES)
def test_the_minimum_is_the_covariance_with_the_reward_within_3_standard_errors(base, reward, beta):
    """x0_old + (2 / beta) Cov(r, x0 | x_t), at two levels and two places, from samples of the base given x_t: by
    numerical integration, and by what the loss's gradient says of its minimum."""
    (means, s), judge, n = BASES[base], REWARDS[reward], 40_000
    grid, generator = torch.linspace(-6, 6, 24_001, dtype=torch.float64), torch.Generator().manual_seed(0)
    for t, x in ((0.6, 0.4), (0.3, -0.5)):
        prior = sum((-((grid - mean) ** 2) / (2 * s**2)).exp() for mean in means)
        density = prior * (-((x - (1 - t) * grid) ** 2) / (2 * t**2)).exp()
        density = density / density.sum()
        old = (density * grid).sum()
        wanted = 2 / beta * (density * (grid - old) * judge(grid)).sum().item()
        x0 = grid[torch.multinomial(density, n, replacement=True, generator=generator)][:, None]
        said, slopes = old.expand_as(x0), []
        for start in (0.0, 1.0):
            shift = torch.tensor(start, dtype=torch.float64, requires_grad=True)
            loss = nft_loss(said + shift, said, x0, judge(x0[:, 0]), beta, adaptive=False)
            slopes.append(torch.autograd.grad(loss, shift)[0].item())
        found = slopes[0] / (slopes[0] - slopes[1])  # where the parabola's slope is 0
        error = ((2 * judge(x0) - 1) * (x0 - old) / beta).std().item() / n**0.5
        assert abs(found - wanted) < 3 * error < 0.2 * abs(wanted)


def test_awm_at_the_old_model_has_nfts_gradient_with_twice_the_quality_less_1(tmp_path):
    """d/dm of -A exp(m_old - m) is A there: 2 A (out - target) in the output, as NFT's plain one."""
    errors = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    gains = torch.tensor([0.6, -0.8], dtype=torch.float64)
    config = NFTConfig(loss="awm")
    said = nft.Spoken(nft.Said(errors, errors, errors), nft.Said(errors, errors, errors.detach()), None)
    (gradient,) = torch.autograd.grad(nft.awm(config, said, errors, gains), errors)
    assert gradient.tolist() == pytest.approx([0.3, -0.4])
    moved = nft.Spoken(nft.Said(errors, errors, errors - 2), nft.Said(errors, errors, errors.detach()), None)
    (gradient,) = torch.autograd.grad(nft.awm(config, moved, errors, gains), errors)
    assert gradient[0] == 0 != gradient[1]  # the good one has left the trust region, to smaller errors


def test_dgpo_loss_by_hand():
    """Two groups of two. At the base s = 1/2; with A = +-1 the gradient is Diffusion-DPO's over beta, its s being
    sigmoid(-u) of u = -beta / 2 [(m_1 - m_1^base) - (m_2 - m_2^base)]."""
    gains = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64)
    base = torch.tensor([0.5, 0.4, 0.3, 0.7], dtype=torch.float64)
    errors = base.clone().requires_grad_()
    settings = DGPOSettings(group=2, beta=10.0, clip_range=1e9)
    loss = dgpo_loss(errors, base, base, gains, settings)
    (gradient,) = torch.autograd.grad(loss, errors)
    assert loss.item() == pytest.approx((0.5 - 0.4 + 2 * 0.3 - 2 * 0.7) / 8)
    assert gradient.tolist() == pytest.approx([0.125, -0.125, 0.25, -0.25])
    moved = (base + torch.tensor([0.02, -0.01, 0.0, 0.0])).requires_grad_()
    (gradient,) = torch.autograd.grad(dgpo_loss(moved, base, base, gains, settings), moved)
    u = -10 / 2 * (0.02 + 0.01)
    s = torch.tensor(-u, dtype=torch.float64).sigmoid().item()
    assert gradient[:2].tolist() == pytest.approx([s / 4, -s / 4])
    tight = settings._replace(clip_range=0.005)
    (gradient,) = torch.autograd.grad(dgpo_loss(moved, base, base, gains, tight), moved)
    assert gradient[0] != 0 and gradient[1] != 0  # both have moved against their advantage: they are not let go
    away = (base - torch.tensor([0.02, -0.01, 0.0, 0.0])).requires_grad_()
    (gradient,) = torch.autograd.grad(dgpo_loss(away, base, base, gains, tight), away)
    assert gradient[0] == gradient[1] == 0 != gradient[2]


# ------------------------------------------------------------------------------------------------ what is said


@pytest.mark.parametrize("make", [pipelines.sd, lambda: pipelines.sd("v_prediction"), dits.sd3])
def test_said_at_is_the_denoisers_prediction_and_error(make, tmp_path):
    session = session_of(toy("nft", tmp_path, train_batch_size=4), make(), Brightness())
    judged = nft.sample_round(session, range(1))
    (batch,) = judged.batches
    draws = nft.batch_draws(session, 0, batch.numbers, 1)
    with torch.no_grad():
        said = nft.say(session.images, batch, draws)
        for row in range(4):
            at = Noise(draws.alpha[row].double(), draws.sigma[row].double())
            x = at.alpha * batch.images.latents[row] + at.sigma * draws.eps[row]
            cond = {key: value[[row]] for key, value in batch.images.cond.items()}
            alone = session.images.denoiser(x[None].float(), at, cond)
            assert torch.allclose(said.x0[row], alone.x0[0], atol=2e-3)
        errors = denoising_errors(session.images.denoiser, batch.images.latents, draws, batch.images.cond)
    assert torch.equal(said.error, errors)


def test_levels_are_the_samplers_own_each_once_and_dgpos_groups_share_them(tmp_path):
    session = session_of(toy("nft", tmp_path, levels_per_image=3), pipelines.sd(), Brightness())
    sigmas = torch.stack([nft.batch_draws(session, 0, range(6), i).sigma for i in range(3)])
    expected = sorted(float(session.images.denoiser.own(at.sigma, at)[1].sigma) for at in session.images.levels[:-1])
    for row in sigmas.T:
        assert sorted(row.tolist()) == pytest.approx(expected)
    assert len({tuple(row.tolist()) for row in sigmas.T}) > 1
    shared = replace(session, config=replace(session.config, loss="dgpo"))
    draws = nft.batch_draws(shared, 0, range(6), 0)
    for one, two in ((0, 1), (2, 3), (4, 5)):
        assert draws.sigma[one] == draws.sigma[two] and torch.equal(draws.eps[one], draws.eps[two])
    assert not torch.equal(draws.eps[1], draws.eps[2])
    alone = nft.batch_draws(session, 0, range(3, 4), 0)
    assert torch.equal(alone.eps[0], nft.batch_draws(session, 0, range(6), 0).eps[3])


# ------------------------------------------------------------------------------------------------ the old weights


@pytest.mark.parametrize(
    ("step", "linear", "late"), [(0, 0, 0), (75, 0.075, 0), (300, 0.3, 0.999), (900, 0.5, 0.999), (76, 0.076, 0.0075)]
)
def test_old_decay_goldens(step, linear, late):
    assert [old_decay("linear", step), old_decay("late", step)] == pytest.approx([linear, late])


def test_old_weights_follow_once_a_round_and_are_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(nft, "old_decay", lambda schedule, step: 0.25 if step else 0.0)
    config = toy("nft", tmp_path, updates_per_round=2, max_train_steps=4)
    states = [state for _, state in train(config, None, pipelines.sd(), Brightness())]

    def old(state):
        return {name[4:]: value for name, value in state.tensors.items() if name.startswith("own.")}

    def weights(state):
        return {name[8:]: value for name, value in state.tensors.items() if name.startswith("weights.")}

    before = old(states[0])
    assert before and all(torch.equal(old(states[1])[name], value) for name, value in before.items())
    for name, value in old(states[2]).items():
        assert torch.allclose(value, 0.25 * before[name] + 0.75 * weights(states[1])[name], atol=1e-7)
    for done in (1, 2):  # at the end of a round, and within one
        path = checkpoint.save(tmp_path / "out", states[done])
        *_, (_, resumed) = train(config, checkpoint.load(path), pipelines.sd(), Brightness())
        assert all(torch.equal(resumed.tensors[name], value) for name, value in states[-1].tensors.items())


# ------------------------------------------------------------------------------------------------ the recipe


@pytest.mark.parametrize("loss", ["nft", "awm", "dgpo"])
def test_one_update_draws_the_model_to_the_better_image(loss, tmp_path):
    """The denoising error of images above their prompt's mean falls beside that of the others."""
    more = {"num_images_per_prompt": 4, "train_batch_size": 4, "max_train_steps": 1, "learning_rate": 1e-4}
    config = toy("nft", tmp_path, loss=loss, kl_weight=0.0, levels_per_image=3, **more)
    session = session_of(config, pipelines.sd(), Brightness())
    judged = nft.sample_round(session, range(1))
    (batch,) = judged.batches

    def errors():
        with torch.no_grad():
            draws = [nft.batch_draws(session, 0, batch.numbers, i) for i in range(3)]
            return sum(nft.say(session.images, batch, each).error for each in draws)

    before = errors()
    with nft.attempt_step(session.run, 0) as metrics:
        metrics.update(nft.contrast(session, judged, nft.copy_tensors(session.run.weights), 0))
    assert metrics["old_gap"] == 0 and metrics["grad_norm"] > 0
    assert (batch.advantages * (errors() - before)).mean() < 0


def test_the_penalty_counts_towards_the_loss(tmp_path):
    """With equal rewards, awm's own loss is 0, and what remains is kl_weight times the gap, which is not negative."""

    class Constant(Brightness):
        def __call__(self, images, prompts):
            return torch.full((len(images),), 0.7)

    config = toy("nft", tmp_path, loss="awm", kl_weight=2.0, max_train_steps=1)
    session = session_of(config, pipelines.sd(), Constant())
    judged = nft.sample_round(session, range(1))
    with torch.no_grad():
        for weight in session.run.weights.values():
            weight += 0.1
    with nft.attempt_step(session.run, 0) as metrics:
        metrics.update(nft.contrast(session, judged, nft.copy_tensors(session.run.weights), 0))
    assert metrics["loss"] == pytest.approx(2 * metrics["kl"]) and metrics["kl"] > 0 == metrics["old_gap"]


def test_the_weights_are_as_they_were_after_the_old_ones_were_lent(tmp_path):
    """The old model's prediction is of other weights than the trained one's, and no gradient is lost."""
    config = toy("nft", tmp_path, max_train_steps=1, kl_weight=0.0)
    session = session_of(config, pipelines.sd(), Brightness())
    judged, old = nft.sample_round(session, range(1)), nft.copy_tensors(session.run.weights)
    with torch.no_grad():
        for weight in session.run.weights.values():
            weight += 0.1
    with nft.attempt_step(session.run, 0) as metrics:
        metrics.update(nft.contrast(session, judged, old, 0))
    assert metrics["old_gap"] > 0 and metrics["grad_norm"] > 0


def test_the_old_model_speaks_without_dropout(tmp_path, monkeypatch):
    """Else the two mirror images would be of two networks, whose distance is noise."""
    session = session_of(toy("nft", tmp_path, lora_dropout=0.5, kl_weight=0.0), pipelines.sd(), Brightness())
    network, said, learning = session.run.network.prepared, nft.say, []
    monkeypatch.setattr(nft, "say", lambda *given: learning.append(network.training) or said(*given))
    judged = nft.sample_round(session, range(1))
    with nft.attempt_step(session.run, 0):
        nft.contrast(session, judged, nft.copy_tensors(session.run.weights), 0)
    assert learning == [False, True] * 2 and not network.training


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"num_images_per_prompt": 3}, "a round has 2 images .* give a multiple of num_images_per_prompt, 3"),
        ({"loss": "dgpo", "num_images_per_prompt": 4, "updates_per_round": 2}, "train_batch_size is 2"),
        ({"levels_per_image": 9}, "levels_per_image is 9: the sampler has 3 levels"),
        ({"adv_clip_max": 0.0}, "adv_clip_max is 0"),
        ({"loss": "dpo"}, "no loss 'dpo'"),
        ({"loss": "awm", "lora_dropout": 0.1}, "lora_dropout is 0.1: the ratio"),
        ({"loss": "dgpo", "lora_dropout": 0.1}, "lora_dropout is 0.1: the ratio"),
        ({"loss": "awm", "beta": 1.0}, "beta is 1.0, and loss 'awm' has none, but nft and dgpo"),
        ({"clip_range": 0.1}, "clip_range is 0.1, and loss 'nft' has none, but awm and dgpo"),
        ({"loss": "awm", "adaptive_weight": False}, "adaptive_weight is False, and loss 'awm' has none, but nft"),
        ({"loss": "dgpo", "adaptive_weight": False}, "adaptive_weight is False, and loss 'dgpo' has none, but nft"),
    ],
)
def test_bad_settings_are_one_sentence(more, what, tmp_path):
    with pytest.raises(ValueError, match=what) as error:
        check_recipe(toy("nft", tmp_path, **more))
    assert "\n" not in str(error.value)
