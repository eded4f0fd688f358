"""D3PO: its loss by hand and its goldens, its optimum in closed form, labels that are sampled again, and resumption."""

import json
from dataclasses import replace
from itertools import islice
from math import log

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from difftune.configs.recipes import D3POConfig
from difftune.errors import RunError, UserError
from difftune.files import checkpoint, output
from difftune.files.checkpoint import State
from difftune.lookup import guidance_named
from difftune.pipelines import lora
from difftune.pipelines.generate import Sampling, generate_batches, pixels
from difftune.recipes import train, train_in_folder
from difftune.recipes.d3po import d3po_loss, open_preferences, rank
from difftune.rollouts.policy import Trajectory, log_ratio
from difftune.rollouts.trajectories import Rolled, policy_of
from rewards.simple import Brightness
from tests.support import dits, pipelines
from tests.support.toys import session_of

TOY = D3POConfig(
    max_train_steps=3, train_batch_size=4, num_inference_steps=3, learning_rate=1e-2, guidance_scale=3.0, rank=2
)
BRIGHT = Brightness()
LN2 = log(2)


@pytest.fixture
def toy(tmp_path) -> D3POConfig:
    (tmp_path / "prompts.txt").write_text("red circle\nblue square\nred square\n")
    return replace(TOY, prompts=str(tmp_path / "prompts.txt"))


def final(config: D3POConfig, state: State | None = None, steps: int | None = None) -> State:
    *_, (_, last) = islice(train(config, state, pipelines.sd(), BRIGHT), steps)
    return last


def same_weights(a: State, b: State) -> bool:
    assert a.tensors.keys() == b.tensors.keys()
    return all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors if not k.startswith("rng"))


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ the loss


def test_golden_in_which_the_winner_is_clipped():
    std, mean = doubles(0.5)[0], doubles(0.1).view(1, 1).requires_grad_()
    winner, loser = (log_ratio(doubles(x).view(1, 1), mean, doubles(0).view(1, 1), std) for x in (0.3, -0.2))
    assert (winner.item(), loser.item()) == (pytest.approx(0.1), pytest.approx(-0.1))
    found = d3po_loss(winner, loser, doubles(1), 0.1, 0.1)
    assert found.item() == pytest.approx(0.6834293534, abs=1e-10)
    assert d3po_loss(winner, loser, doubles(1), 0.1, None).item() == pytest.approx(0.6831971797, abs=1e-10)
    (whole,) = torch.autograd.grad(found, winner, retain_graph=True, allow_unused=True)
    assert whole is None or not whole.any()
    assert torch.autograd.grad(found, loser)[0].item() > 0


def test_loss_by_hand():
    rng = np.random.default_rng(0)
    first, second, label = rng.normal(size=40) / 5, rng.normal(size=40) / 5, rng.integers(-1, 2, size=40)
    kept = [np.log(np.clip(np.exp(r), 0.8, 1.2)) for r in (first, second)]
    expected = np.mean(np.log1p(np.exp(-3.0 * label * (kept[0] - kept[1]))))
    found = d3po_loss(*(torch.tensor(x) for x in (first, second, label)), 3.0, 0.2)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_loss_is_within_its_range():
    ends = [d3po_loss(doubles(a), doubles(b), doubles(1)).item() for a, b in ((9, -9), (-9, 9))]
    assert ends == [pytest.approx(0.6831640, abs=1e-7), pytest.approx(0.7032311, abs=1e-7)]


def test_a_tie_has_no_gradient_and_ln_2():
    first, second = doubles(0.05).requires_grad_(), doubles(-0.02).requires_grad_()
    loss = d3po_loss(first, second, doubles(0))
    loss.backward()
    assert loss.item() == pytest.approx(LN2, abs=1e-15)
    assert first.grad.item() == second.grad.item() == 0


def test_swapping_pair_and_label_changes_nothing():
    a, b = doubles(0.05, -0.01), doubles(-0.02, 0.03)
    assert torch.equal(d3po_loss(a, b, doubles(1, -1)), d3po_loss(b, a, doubles(-1, 1)))
    assert d3po_loss(a, b, doubles(1, 1)) != d3po_loss(b, a, doubles(1, 1))


def test_every_two_of_a_group_are_a_pair():
    rolled = Rolled(["x"] * 6, None, Trajectory([], [], []), torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 4.0]))
    pairs = rank(rolled, 3)
    found = list(zip(pairs.first.tolist(), pairs.second.tolist(), pairs.label.tolist(), strict=True))
    assert found == [(0, 1, -1), (0, 2, -1), (1, 2, 1), (3, 4, 0), (3, 5, 1), (4, 5, 1)]


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_optimum_under_bradley_terry_labels_is_within_3_standard_errors(beta):
    """Policy N(theta, 1) from N(0, 1), reward x: the KL-regularised optimum is theta = 1 / beta."""
    n, rng = 20_000, np.random.default_rng(1)
    x = torch.tensor(rng.normal(size=(2, n)))
    label = torch.tensor(np.where(rng.random(n) < 1 / (1 + np.exp(-(x[0] - x[1]).numpy())), 1.0, -1.0))
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    std = torch.ones((), dtype=torch.float64)

    def loss(theta):
        first, second = (log_ratio(row[:, None], theta.expand(n, 1), torch.zeros(n, 1), std) for row in x)
        return d3po_loss(first, second, label, beta, None)

    for _ in range(20):  # Newton
        (slope,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), theta)
        theta = (theta - slope / curve).detach().requires_grad_()
    error = (1 / (n * curve.item())) ** 0.5  # the likelihood is Bernoulli's: its information is its curvature
    assert slope.abs().item() < 1e-12
    assert error < 0.02 / beta
    assert abs(theta.item() - 1 / beta) < 3 * error


# ------------------------------------------------------------------------------------------------ the algorithm


@pytest.mark.parametrize("make", [pipelines.sd, pipelines.sdxl, dits.sd3])
def test_first_step_is_at_ln_2_and_the_next_is_not(toy, make):
    found = [metrics for metrics, _ in train(replace(toy, max_train_steps=2), None, make(), BRIGHT)]
    assert found[0]["loss"] == pytest.approx(LN2, abs=1e-7)
    assert (found[0]["log_ratio"], found[0]["accuracy"]) == (0, 0.5)
    assert found[1]["log_ratio"] > 1e-9
    assert found[0]["grad_norm"] > 0


def test_gradient_at_the_reference_is_ddpos_with_advantages_of_half_beta(toy):
    """Which is computed from log-probabilities alone, without a reference."""
    config = replace(toy, max_train_steps=1, max_grad_norm=1e9)
    pipe = pipelines.sd()
    session = session_of(config, pipe, BRIGHT)
    policy = policy_of(session.images, None)
    pairs = open_preferences(session, policy)(range(4))
    starts = pairs.rolled.trajectory.paths[0].x
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    signs, total, paths = torch.zeros(4), 0.0, pairs.rolled.trajectory.paths
    for first, second, label in zip(pairs.first, pairs.second, pairs.label, strict=True):
        signs[first], signs[second] = label, -label
    for i in pairs.rolled.trajectory.drawn:
        mean, std = policy.mean(pairs.rolled.predict, paths[i], i)
        log_prob = torch.distributions.Normal(mean, std.float()).log_prob(paths[i + 1].x).flatten(1).mean(1)
        total = total - (config.beta / 2 * signs * log_prob).sum() / 2  # over two pairs
    weights = lora.weights(pipe.unet)
    expected = torch.autograd.grad(total / len(pairs.rolled.trajectory.drawn), list(weights.values()))
    scale = max(g.abs().max() for g in expected)
    state = final(config)
    assert scale > 0
    for name, gradient in zip(weights, expected, strict=True):
        assert torch.allclose(state.tensors[f"optimizer.exp_avg.{name}"], 0.1 * gradient, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_bit_for_bit(toy, tmp_path):
    config = replace(toy, gradient_accumulation_steps=2, train_batch_size=2)
    whole = final(config)
    path = checkpoint.save(tmp_path, final(config, steps=1))
    torch.manual_seed(99)
    assert same_weights(whole, final(config, checkpoint.load(path)))


# ------------------------------------------------------------------------------------------------ labels


@pytest.fixture
def labels(tmp_path):
    """Four pictures of two prompts as `difftune sample --eta 1` writes them, and a choice of each two."""
    prompts, seeds = ["red circle"] * 2 + ["blue square"] * 2, [5, 6, 7, 8]
    guidance = guidance_named("cfg", 3.0)
    (batch,) = generate_batches(pipelines.sd(), prompts, seeds, guidance, Sampling(TOY.num_inference_steps, eta=1.0))
    for i, picture in enumerate(pixels(batch.images)):
        output.write(tmp_path / f"{i}.png", output.png(picture))
    settings = {"model": "tiny", "lora": None, "guidance": "cfg", "guidance_options": {"scale": 3.0}}
    settings |= {"num_inference_steps": 3, "eta": 1.0}
    output.write_json(tmp_path / "sample.json", {"settings": settings})
    lines = [
        {"prompt": p, "a": f"{i}.png", "b": f"{i + 1}.png", "choice": c, "seed_a": seeds[i], "seed_b": seeds[i + 1]}
        for i, p, c in ((0, "red circle", "b"), (2, "blue square", "a"))
    ]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "labels.jsonl"


def test_labelled_pictures_are_sampled_again(toy, labels):
    config = replace(toy, labels=str(labels), max_train_steps=2)
    first, second = (metrics for metrics, _ in train(config, None, pipelines.sd()))
    assert first["loss"] == pytest.approx(LN2, abs=1e-7)
    assert "reward_mean" not in first
    assert second["accuracy"] > 0.5  # the same two pairs


def test_a_picture_that_its_seed_does_not_make_is_refused(toy, labels):
    (labels.parent / "1.png").write_bytes(output.png(np.ones((16, 16, 3))))
    with pytest.raises(RunError, match=r"labels, line 0: .*1\.png is not what its seed makes"):
        next(train(replace(toy, labels=str(labels)), None, pipelines.sd()))


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"guidance_scale": 4.0}, "made with guidance_options="),
        ({"num_inference_steps": 4}, "made with num_inference_steps=3, not 4"),
        ({"eta": 0.5}, r"made with eta=1\.0, not 0\.5"),
        ({"num_images_per_prompt": 4}, "num_images_per_prompt is 4, and a label is of 2 images: leave --num"),
    ],
)
def test_other_settings_than_the_pictures_are_refused(toy, labels, more, what):
    with pytest.raises(ValueError, match=what):
        next(train(replace(toy, labels=str(labels), **more), None, pipelines.sd()))


def test_labels_of_pictures_without_noise_have_other_remedies(toy, labels):
    file = labels.parent / "sample.json"
    made = json.loads(file.read_text())
    file.write_text(json.dumps({**made, "settings": {**made["settings"], "eta": 0.0}}))
    with pytest.raises(UserError, match="made with eta 0.*: train dpo, kto or dro on these labels, or label"):
        next(train(replace(toy, labels=str(labels)), None, pipelines.sd()))


def test_pictures_without_seeds_are_refused(toy, labels):
    labels.write_text(labels.read_text().replace('"seed_a": 7', '"seed_a": null'))
    with pytest.raises(UserError, match=r"line 1: 2\.png has no seed.* or train dpo, kto or dro"):
        next(train(replace(toy, labels=str(labels)), None, pipelines.sd()))


@pytest.mark.parametrize("make", [dits.sd3, lambda: pipelines.sd(scheduler=EulerDiscreteScheduler())])
def test_pictures_with_noise_are_refused_where_the_noise_would_be_left_out(make):
    with pytest.raises(UserError, match="takes no eta: leave it out"):
        next(generate_batches(make(), ["red"], [0], guidance_named("cfg", 3.0), Sampling(2, eta=1.0)))


# ------------------------------------------------------------------------------------------------ the run


def test_run_writes_a_lora_that_loads(toy, tmp_path):
    out = tmp_path / "out"
    train_in_folder(replace(toy, max_train_steps=1, output_dir=str(out)), lambda line: None, pipelines.sd(), BRIGHT)
    pipelines.sd().load_lora_weights(out)
    assert "D3PO" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"eta": -1.0}, "eta is -1.0: it must be above 0"),
        ({"num_images_per_prompt": 1}, "num_images_per_prompt is 1: it must be from 2 "),
        ({"beta": -1.0}, "beta is -1"),
        ({"labels": "/nowhere.jsonl"}, "cannot read the labels"),
        ({"reward": ["tiny-clap"]}, "did you mean 'tiny-clip'"),
    ],
)
def test_bad_settings_are_one_sentence_and_nothing_is_written(toy, tmp_path, more, what):
    with pytest.raises(ValueError, match=what) as error:
        config = replace(toy, **{"output_dir": str(tmp_path / "out"), **more})
        train_in_folder(config, pipe=pipelines.sd())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
