"""PSO: its transitions against diffusers' schedulers, its losses by hand, a closed form, resumption bit for bit."""

from dataclasses import replace
from itertools import islice
from math import erf, log, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler
from PIL import Image

from difftune.configs.recipes import PSOConfig
from difftune.evaluation.win_rate import win_rate
from difftune.files import checkpoint
from difftune.files.checkpoint import State
from difftune.files.prompts import listed, prompts_named
from difftune.pipelines import lora
from difftune.recipes import pso, train, train_in_folder
from difftune.recipes.dpo import dpo_loss, dpo_margin
from difftune.recipes.pso import TRANSITIONS, consistency, order, pair_pictures, pso_loss
from difftune.rollouts.denoising import draw
from difftune.rollouts.image_sampler import ImageSampler
from difftune.rollouts.policy import Policy, Trajectory
from difftune.rollouts.rounds import repeated
from difftune.rollouts.trajectories import Rolled
from difftune.training import run_folder
from difftune.training.network import TrainedNetwork
from difftune.training.numbering import seed_of
from guidance.guided import GuidedPredict
from rewards.simple import Brightness
from solvers.denoiser import Path as Trail
from solvers.denoiser import predicted
from solvers.latent import LatentModel
from solvers.noise import noise
from solvers.samplers.step import transition
from tests.support import pipelines
from tests.support.toys import session_of

BRIGHT = Brightness()
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def turbo(scheduler: type = LCMScheduler, **config):
    return pipelines.sd(scheduler=scheduler(**TABLE, **config))


@pytest.fixture
def toy(tmp_path) -> PSOConfig:
    (tmp_path / "prompts.txt").write_text("red circle\nblue square\nred square\n")
    sizes = {"max_train_steps": 2, "train_batch_size": 4, "num_inference_steps": 3, "rank": 4}
    return PSOConfig(prompts=str(tmp_path / "prompts.txt"), learning_rate=1e-2, **sizes)


@pytest.fixture
def folder(tmp_path):
    """White pictures of one caption."""
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (255 - i, 255, 255)).save(tmp_path / "pictures" / f"{i}.png")
    return str(tmp_path / "pictures")


def final(config: PSOConfig, state: State | None = None, steps: int | None = None, pipe=None) -> State:
    *_, (_, last) = islice(train(config, state, pipe or turbo(), BRIGHT), steps)
    return last


def same(a: State, b: State) -> bool:
    assert a.tensors.keys() == b.tensors.keys()
    return all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


# ------------------------------------------------------------------------------------------------ transitions


def scalar(value: float) -> torch.Tensor:
    return torch.full((1, 1), value, dtype=torch.float64)


def test_euler_ancestral_golden():
    now, then = noise(1, 2), noise(1, 1)
    mean, std = transition(predicted("eps", scalar(1.0), now, scalar(0.5)), now, then, 1.0)
    assert std.item() == pytest.approx(0.8660254, abs=1e-7)
    assert mean.item() == pytest.approx(0.25, abs=1e-12)
    down = transition(predicted("x0", scalar(0.0), now, scalar(0.0)), now, then, 1.0)[1]
    assert down.item() ** 2 + 0.5**2 == pytest.approx(then.sigma.item() ** 2)  # sigma_up^2 + sigma_dn^2 = sigma_t^2
    assert transition(predicted("eps", scalar(1.0), now, scalar(0.5)), now, noise(1, 0), 1.0)[1] == 0


@pytest.mark.parametrize("name", TRANSITIONS)
def test_noise_keeps_the_marginal(name):
    """If x0 and eps are the data's and the noise's, x' has the level's: variance alpha'^2 + sigma'^2 for unit x0."""
    now, then = noise(0.3, 0.9), noise(0.8, 0.6)
    mean, std = (
        TRANSITIONS[name](predicted("x0", x, now, x0), now, then, 1.0)
        for x, x0 in ((scalar(0.3), scalar(1.0)), (scalar(0.9), scalar(0.0)))
    )
    along_x0, along_eps, fresh = mean[0].item(), std[0].item(), std[1].item()
    assert along_x0 == pytest.approx(0.8)
    assert along_eps**2 + fresh**2 == pytest.approx(0.6**2)


def test_consistency_is_ddim_without_fresh_noise():
    now, then = noise(0.3, 0.9), noise(0.8, 0.6)
    said = predicted("eps", scalar(1.0), now, scalar(0.4))
    mean, std = consistency(said, now, then, 0.0)
    assert std == 0 and mean.item() == pytest.approx((0.8 * said.x0 + 0.6 * said.eps).item())
    mean, std = consistency(said, now, then, 0.6)  # of which sqrt(1 - .6^2) = .8 of the noise is the old one
    assert std == 0.6 * then.sigma and mean.item() == pytest.approx((0.8 * said.x0 + 0.8 * 0.6 * said.eps).item())
    mean, std = consistency(said, now, then)
    assert std == then.sigma and mean.item() == pytest.approx(0.8 * said.x0.item())


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("lcm", LCMScheduler), ("ancestral", EulerAncestralDiscreteScheduler)],
)
def test_trajectories_are_the_pipelines(toy, name, scheduler):
    """The latents of the pipeline's own run, from the same generators; LCM's boundary scaling moves them by 1e-4."""
    pipe = turbo(scheduler, timestep_spacing="leading")
    assert pso.transition_of(toy, pipe) == name
    config = replace(toy, num_inference_steps=4)
    chain = ImageSampler.of(config, pipe, TrainedNetwork(pipe.unet, torch.float32))
    start = chain.begin(lambda i: "red circle", [0, 1])
    trajectory = Policy(TRANSITIONS[name], 1.0, chain.levels).sample(start.predict, start.x, start.noise)
    assert trajectory.drawn == [0, 1, 2] and trajectory.stds[-1] == 0
    generators = [torch.Generator().manual_seed(seed_of(config.seed, i)) for i in (0, 1)]
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    own = pipe(start.prompts, generator=generators, **options).images
    torch.testing.assert_close(trajectory.end, own, atol=2e-3, rtol=1e-3)


# ------------------------------------------------------------------------------------------------ the losses


def test_loss_by_hand():
    g = np.random.default_rng(0)
    won, lost, label = 0.05 * g.standard_normal(6), 0.05 * g.standard_normal(6), np.array([1, 1, 0, 1, 1, 0.0])
    won[0], lost[1] = 0.3, -0.4  # beyond the clip
    clipped = [np.log(np.clip(np.exp(x), 0.9, 1.1)) for x in (won, lost)]
    of = [torch.tensor(x) for x in (won, lost, label)]
    expected = np.log1p(np.exp(-50 * label * (clipped[0] - clipped[1]))).mean()
    assert pso_loss(*of).item() == pytest.approx(expected, rel=1e-12)
    plain = np.log1p(np.exp(-7 * label * (won - lost))).mean()
    assert pso_loss(*of, 7.0, None).item() == pytest.approx(plain, rel=1e-12)


def test_loss_is_ln_2_at_the_reference_and_a_tie_has_no_gradient():
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = pso_loss(zero, torch.zeros(3).double(), torch.ones(3).double())
    assert loss.item() == pytest.approx(log(2), abs=1e-12)
    loss.backward()
    torch.testing.assert_close(zero.grad, torch.full((3,), -25 / 3).double())  # -beta / 2 of each pair's mean
    ratios = torch.tensor([0.04], dtype=torch.float64, requires_grad=True)
    tie = pso_loss(ratios, -ratios, torch.zeros(1).double())
    tie.backward()
    assert tie.item() == pytest.approx(log(2)) and ratios.grad.item() == 0


def test_loss_range():
    """Within [4.39e-5, 10.0336] at beta 50 and clip_range 0.1."""
    one, far = torch.ones(1).double(), torch.tensor([9.0]).double()
    assert pso_loss(far, -far, one).item() == pytest.approx(4.39e-5, rel=1e-3)
    assert pso_loss(-far, far, one).item() == pytest.approx(10.0336, abs=1e-4)


def test_clipped_winner_leaves_the_gradient_to_the_loser():
    winner = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    loser = torch.tensor([0.01], dtype=torch.float64, requires_grad=True)
    pso_loss(winner, loser, torch.ones(1).double()).backward()
    assert winner.grad.item() == 0 and loser.grad.item() > 0


def test_loser_counts_where_the_published_personalisation_loss_cancels_it():
    """The released relu(1 + beta (L_w - 0.1 L_l)) + 0.5 L_l is 1 + 5 L_w at its beta of 5; ours depends on L_l."""
    winner, loser = (torch.rand(8, dtype=torch.float64).requires_grad_() for _ in range(2))
    released = torch.relu(1 + 5 * (winner - 0.1 * loser)) + 0.5 * loser
    torch.testing.assert_close(released, 1 + 5 * winner)
    (cancelled,) = torch.autograd.grad(released.sum(), loser)
    assert cancelled.abs().max() < 1e-12
    dpo_loss(dpo_margin(winner, loser, winner.detach(), loser.detach(), 5.0)).backward()
    torch.testing.assert_close(loser.grad, torch.full((8,), -5 / 4 / 8).double())
    torch.testing.assert_close(winner.grad, -loser.grad)


def test_offline_on_the_whole_grid_draws_as_diffusion_dpo():
    """With every timestep a distilled one, the levels and the noise are Diffusion-DPO's; with few, only those occur."""
    model = LatentModel(turbo())
    seeds = [str(i) for i in range(50)]
    powers = model.pipe.scheduler.alphas_cumprod.double()
    every = [noise(float(power) ** 0.5, float(1 - power) ** 0.5) for power in powers]
    for a, b in zip(draw(model, seeds, every), draw(model, seeds), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert set(draw(model, seeds, [every[999], every[499]]).timestep.tolist()) == {999, 499}


def test_gaussian_reaches_its_closed_form():
    """One step N(theta, s^2) from N(0, s^2), pairs labelled by Bradley and Terry for r = a x: the optimum is the mean
    a s^2 / beta, where the tuned model wins with probability Phi(a s / (sqrt(2) beta))."""
    s, a, beta, n = 0.8, 1.5, 1.2, 20000
    x = s * torch.randn(2, n, dtype=torch.float64)
    first = torch.rand(n).double() < torch.sigmoid(a * (x[0] - x[1]))
    winner, loser = torch.where(first, x, x.flip(0))
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=50, tolerance_grad=1e-12, tolerance_change=1e-14)

    def ratio(x: torch.Tensor) -> torch.Tensor:
        return (x**2 - (x - theta) ** 2) / (2 * s**2)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = pso_loss(ratio(winner), ratio(loser), torch.ones(n).double(), beta, None)
        found.backward()
        return found

    optimizer.step(loss)
    slope = beta * (winner - loser) / s**2  # the margin is slope * theta
    odds = torch.sigmoid(slope * theta.detach())
    error = float((slope**2 * odds * (1 - odds)).sum() ** -0.5)  # by the Fisher information
    assert abs(theta.item() - a * s**2 / beta) < 3 * error < 0.1
    tuned, base = theta.item() + s * torch.randn(n), s * torch.randn(n)
    q = a * s / beta
    assert q == pytest.approx(1.0)
    found = win_rate(int((tuned > base).sum()), 0, n)
    assert pytest.approx((1 + erf(q / 2)) / 2, abs=1e-5) == 0.76025
    assert abs(found.rate - 0.76025) < 3 * sqrt(0.76 * 0.24 / n) + 3 * error / s * 0.311


# ------------------------------------------------------------------------------------------------ a step of training


def test_best_and_worst_of_every_prompt():
    scores = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0])
    predict = GuidedPredict(None, {}, {"cond": {"text": torch.arange(6.0)}})
    paths = [Trail(torch.arange(6.0) + 10 * i) for i in range(2)]
    found = order(Rolled([*"aaabbb"], predict, Trajectory(paths, [scores], [torch.ones(())]), scores), 3)
    rows = [1, 3, 0, 3]
    assert found.label.tolist() == [1.0, 0.0] and torch.equal(found.scores, scores)
    assert found.rolled.predict.conds["cond"]["text"].tolist() == rows == found.rolled.trajectory.paths[0].x.tolist()
    assert found.rolled.after(0).tolist() == [row + 10 for row in rows]
    assert torch.equal(found.rolled.scores, scores[rows]) and found.rolled.texts == [*"abab"]


def test_first_online_gradient_by_hand(toy):
    """From the stored noise, a loop with nothing but the network: where theta is the reference the gradient of the mean
    loss is -beta / 2 times that of the log-ratio's margin."""
    config = replace(toy, max_train_steps=1, max_grad_norm=1e9)
    found = final(config)
    pipe = turbo()
    weights = lora.add(pipe, config.rank, None, 0.0, config.seed)
    model, prompts = LatentModel(pipe), repeated(prompts_named(config.prompts, 0), 2)
    generators = [torch.Generator().manual_seed(seed_of(0, i)) for i in range(4)]
    cond = model.encode([prompts(i) for i in range(4)])["cond"]["encoder_hidden_states"]
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators])
    fresh = [torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators]) for _ in range(3)]
    pipe.scheduler.set_timesteps(3)
    times = pipe.scheduler.timesteps.tolist()
    powers = [*(pipe.scheduler.alphas_cumprod[t].double() for t in times), torch.tensor(1.0).double()]

    def clean(x, i):
        eps = pipe.unet(x.float(), times[i], cond).sample.double()
        return (x - (1 - powers[i]).sqrt() * eps) / powers[i].sqrt()

    xs = [x.double()]
    with torch.no_grad():
        for i in range(3):
            xs.append(powers[i + 1].sqrt() * clean(xs[-1], i) + (1 - powers[i + 1]).sqrt() * fresh[i].double())
        scores = BRIGHT(model.decode(xs[-1]), [""] * 4)
    rows = [[2 * p + int(k(scores[2 * p : 2 * p + 2])) for p in range(2)] for k in (torch.argmax, torch.argmin)]
    gradient = {name: torch.zeros_like(w) for name, w in weights.items()}
    for i in range(2):
        mean = powers[i + 1].sqrt() * clean(xs[i], i)
        squares = ((mean.detach() - xs[i + 1]) ** 2 - (mean - xs[i + 1]) ** 2).flatten(1).mean(1)
        ratio = squares / (2 * (1 - powers[i + 1]))
        surrogate = -25.0 * (ratio[rows[0]] - ratio[rows[1]]).mean() / 2
        for name, g in zip(weights, torch.autograd.grad(surrogate, list(weights.values())), strict=True):
            gradient[name] += g
    scale = max(g.abs().max() for g in gradient.values())
    assert scale > 0
    for name, expected in gradient.items():  # Adam's first moment is a tenth of its first gradient
        moment = 10 * found.tensors[f"optimizer.exp_avg.{name}"]
        torch.testing.assert_close(moment, expected, atol=float(1e-4 * scale), rtol=1e-3)


def test_first_offline_gradient_by_hand(toy, folder):
    """-beta / 2 * 1/2 (grad L_w - grad L_l), of the noised pictures and of what the model made of their caption."""
    config = replace(toy, max_train_steps=1, max_grad_norm=1e9, images=folder, caption="red circle", num_negatives=1)
    found = final(config)
    pipe = turbo()
    session = session_of(config, pipe)
    weights, levels = session.run.weights, session.images.levels
    pairs = pair_pictures(session, Policy(consistency, 1.0, levels))
    assert pairs.winner.shape == pairs.loser.shape == (3, 4, 8, 8)
    pipe.scheduler.set_timesteps(3)
    times = pipe.scheduler.timesteps.tolist()
    order = [listed([0, 1, 2], config.seed)(i) for i in range(4)]
    draws = draw(session.images.model, [f"0 draw {i}" for i in range(4)], levels[:-1])
    assert set(draws.timestep.tolist()) <= set(times)
    cond = pairs.cond["encoder_hidden_states"][order]
    a, s = draws.alpha.view(-1, 1, 1, 1), draws.sigma.view(-1, 1, 1, 1)
    error = [
        ((pipe.unet(a * x0 + s * draws.eps, draws.timestep, cond).sample - draws.eps) ** 2).flatten(1).mean(1)
        for x0 in (pairs.winner[order], pairs.loser[order])
    ]
    surrogate = 5000 / 4 * (error[0] - error[1]).mean()
    for name, g in zip(weights, torch.autograd.grad(surrogate, list(weights.values())), strict=True):
        moment = 10 * found.tensors[f"optimizer.exp_avg.{name}"]
        torch.testing.assert_close(moment, g, atol=float(1e-4 * g.abs().max() + 1e-6), rtol=1e-3)


def test_each_picture_is_paired_with_each_image_of_its_own_caption(toy, folder):
    for i, caption in enumerate(("red circle", "blue square", "red square")):
        (Path(folder) / f"{i}.txt").write_text(caption)
    session = session_of(replace(toy, images=folder, num_negatives=2), turbo())
    pairs = pair_pictures(session, Policy(consistency, 1.0, session.images.levels))
    assert torch.equal(pairs.winner[::2], pairs.winner[1::2]) and not torch.equal(pairs.winner[0], pairs.winner[2])
    assert not torch.equal(pairs.loser[0], pairs.loser[1])
    texts = session.images.model.encode(["red circle", "blue square", "red square"])["cond"]["encoder_hidden_states"]
    torch.testing.assert_close(pairs.cond["encoder_hidden_states"], texts.repeat_interleave(2, 0))


@pytest.mark.slow
def test_brightness_rises_online(toy):
    config = replace(toy, max_train_steps=10, train_batch_size=8, num_images_per_prompt=4, learning_rate=5e-2)
    pipe = turbo()
    before = brightness(config, pipe)
    records = [metrics for metrics, _ in train(config, None, pipe, BRIGHT)]
    assert brightness(config, pipe) > before + 1e-3
    assert records[0]["loss"] == pytest.approx(log(2), abs=1e-5)


def test_pictures_are_approached_offline(toy, folder):
    """The loss falls on pairs of the folder, and images get brighter, as its pictures are white."""
    config = replace(toy, images=folder, caption="red circle", max_train_steps=15, beta=500.0)
    pipe = turbo()
    before = brightness(config, pipe)
    records = [metrics for metrics, _ in train(config, None, pipe)]
    assert records[0]["loss"] == pytest.approx(log(2), abs=1e-4)
    assert np.mean([r["loss"] for r in records[-5:]]) < 0.6 and records[-1]["accuracy"] > 0.8
    assert records[-1]["margin"] > 0
    assert brightness(config, pipe) > before


def brightness(config: PSOConfig, pipe) -> float:
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    images = pipe(["red circle"] * 8, generator=generators, num_inference_steps=3, guidance_scale=1.0, output_type="pt")
    return float(BRIGHT(images.images, [""] * 8).mean())


def test_accumulated_gradients_are_those_of_the_joined_batch(toy):
    joined = final(replace(toy, max_train_steps=1))
    split = final(replace(toy, max_train_steps=1, train_batch_size=2, gradient_accumulation_steps=2))
    for name, value in joined.tensors.items():
        if name.startswith("optimizer.exp_avg."):
            torch.testing.assert_close(split.tensors[name], value, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------ resumption, settings


@pytest.mark.parametrize("offline", [False, True])
def test_resumed_equals_uninterrupted_bit_for_bit(toy, folder, tmp_path, offline):
    config = replace(toy, images=folder, caption="red circle", lora_dropout=0.2) if offline else toy
    torch.manual_seed(5)
    whole = final(config)
    torch.manual_seed(5)
    path = checkpoint.save(tmp_path / "run", final(config, steps=1))
    torch.manual_seed(99)
    resumed = final(config, checkpoint.load(path))
    assert resumed.step == 2 and same(whole, resumed)


def test_run_writes_an_adapter_that_loads(toy, folder, tmp_path):
    config = replace(toy, images=folder, caption="red circle", output_dir=str(tmp_path / "out"), max_train_steps=2)
    said: list[str] = []
    assert train_in_folder(config, said.append, turbo())["optimizer_steps"] == 2
    assert "transition: lcm" in said
    turbo().load_lora_weights(tmp_path / "out")
    assert f"trained on the pictures of {folder}" in (tmp_path / "out" / run_folder.CARD).read_text()


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"transition": "lmc"}, "did you mean 'lcm'"),
        ({"sampler": "euler"}, "no sampler 'euler'; known: ancestral"),
        ({"num_inference_steps": 1}, "num_inference_steps is 1"),
        ({"num_images_per_prompt": 3}, "must be a multiple of num_images_per_prompt"),
        ({"lora_dropout": 0.1}, "lora_dropout is 0.1"),
        ({"reward": ["tiny-clap"]}, "did you mean 'tiny-clip'"),
        ({"beta": -1.0}, "beta is -1"),
        ({"images": "/nowhere"}, "there is no folder of pictures '/nowhere'"),
        ({"images": "FOLDER"}, "0.png has no caption"),
    ],
)
def test_bad_settings_are_one_sentence_and_nothing_is_written(toy, folder, tmp_path, more, what):
    more = {key: folder if value == "FOLDER" else value for key, value in more.items()}
    with pytest.raises(ValueError, match=what) as error:
        config = replace(toy, **{"output_dir": str(tmp_path / "out"), **more})
        train_in_folder(config, pipe=turbo())
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
