"""Diffusion-DPO, Diffusion-KTO and DRO: losses by hand, goldens and closed forms; labels, judged images, resumption."""

import json
import sys
from dataclasses import replace
from itertools import islice
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch

from difftune.configs.recipes import DPOConfig, DROConfig, KTOConfig
from difftune.errors import RunError
from difftune.files import checkpoint, output
from difftune.files.checkpoint import State
from difftune.files.pictures import read_fitted
from difftune.files.prompts import listed
from difftune.labelling.choices import decided
from difftune.pipelines import lora
from difftune.recipes import RECIPES, recipe_of, train, train_in_folder
from difftune.recipes.dpo import dpo_loss, dpo_margin, prefer_winners
from difftune.recipes.dro import denoise_winners, dro_loss
from difftune.recipes.kto import above_mean, kto_baseline, kto_loss, mean_over, open_marked, part_good_from_bad
from difftune.rollouts.denoising import denoising_errors, draw
from difftune.rollouts.pairs import Pairs, accuracy_of, best_and_worst, label_pairs, open_pairs, pair_errors, step_draws
from difftune.rollouts.rounds import ScoredImages
from difftune.training.steps import attempt_step
from rewards.simple import Brightness
from tests.support import dits, pipelines
from tests.support.toys import session_of

SHARED = {"max_train_steps": 3, "num_inference_steps": 2, "learning_rate": 1e-2, "guidance_scale": 3.0, "rank": 2}
TOYS = {
    "dpo": DPOConfig(train_batch_size=2, **SHARED),
    "kto": KTOConfig(train_batch_size=4, **SHARED),
    "dro": DROConfig(train_batch_size=2, **SHARED),
}
BRIGHT = Brightness()
LN2 = log(2)


@pytest.fixture(params=TOYS)
def toy(request, tmp_path):
    """The recipe's settings."""
    (tmp_path / "prompts.txt").write_text("red circle\nblue square\nred square\n")
    return replace(TOYS[request.param], prompts=str(tmp_path / "prompts.txt"))


@pytest.fixture
def labels(tmp_path):
    """Three choices between bright and dark pictures of another size than the model's; the bright ones are chosen."""
    rng, lines = np.random.default_rng(0), []
    for i, prompt in enumerate(["red circle", "blue square", "red square"]):
        for name, scale in (("bright", 1.0), ("dark", 0.4)):
            picture = rng.uniform(0.4, 1.0, size=(4, 5, 3)).repeat(8, 0).repeat(8, 1) * scale
            output.write(tmp_path / f"{i}-{name}.png", output.png(picture))
        a, b = (f"{i}-bright.png", f"{i}-dark.png")[:: 1 if i else -1]
        lines.append(json.dumps({"prompt": prompt, "a": a, "b": b, "choice": "a" if i else "b"}))
    (tmp_path / "labels.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "labels.jsonl")


def final(toy, state: State | None = None, steps: int | None = None, make=pipelines.sd) -> State:
    *_, (_, last) = islice(train(toy, state, make(), BRIGHT), steps)
    return last


def same_weights(a: State, b: State) -> bool:
    assert a.tensors.keys() == b.tensors.keys()
    return all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors if not k.startswith("rng"))


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def numbers(seed: int, n: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 1.0, size=n)


# ------------------------------------------------------------------------------------------------ Diffusion-DPO's loss


def test_dpo_golden():
    margin = dpo_margin(doubles(0.9), doubles(1.0), doubles(1.0), doubles(1.0), 2.0)
    assert dpo_loss(margin).item() == pytest.approx(0.6443966601, abs=1e-10)


def test_dpo_by_hand():
    w, l, rw, rl = (numbers(i) for i in range(4))  # noqa: E741
    u = -0.5 * 7.0 * ((w - rw) - (l - rl))
    expected = np.mean(np.log1p(np.exp(-u)))
    margin = dpo_margin(*(torch.tensor(x) for x in (w, l, rw, rl)), 7.0)
    assert margin.numpy() == pytest.approx(u, abs=1e-12)
    assert dpo_loss(margin).item() == pytest.approx(expected, abs=1e-12)
    swapped = dpo_margin(*(torch.tensor(x) for x in (l, w, rl, rw)), 7.0)
    assert torch.allclose(swapped, -margin, atol=1e-12)


def test_dpo_gradient_in_the_winners_error():
    """dloss / dL_w = beta / 2 sigmoid(-u) > 0, and the opposite in the loser's; none at a tie."""
    w, l = doubles(0.7, 0.7).requires_grad_(), doubles(0.6, 0.6).requires_grad_()  # noqa: E741
    margin = dpo_margin(w, l, doubles(0.8, 0.8), doubles(0.65, 0.65), 3.0)
    dpo_loss(margin, doubles(1, 0)).backward()
    expected = 1.5 / (1 + np.exp(margin[0].item())) / 2
    assert w.grad.tolist() == [pytest.approx(expected), 0]
    assert l.grad.tolist() == [pytest.approx(-expected), 0]
    assert dpo_loss(margin, doubles(0, 0)).item() == pytest.approx(LN2, abs=1e-15)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_dpo_optimum_under_bradley_terry_labels_is_within_3_standard_errors(beta):
    """L = (x - theta)^2 is minus twice the log-density of N(theta, 1): reward x has its optimum at theta = 1 / beta."""
    n, rng = 20_000, np.random.default_rng(2)
    x = torch.tensor(rng.normal(size=(n, 2)))
    first = torch.tensor(rng.random(n)) < (x[:, 0] - x[:, 1]).sigmoid()
    w, l = x[:, 0].where(first, x[:, 1]), x[:, 1].where(first, x[:, 0])  # noqa: E741
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(20):  # Newton
        margin = dpo_margin((w - theta) ** 2, (l - theta) ** 2, w**2, l**2, beta)
        (slope,) = torch.autograd.grad(dpo_loss(margin), theta, create_graph=True)
        (curve,) = torch.autograd.grad(slope, theta)
        theta = (theta - slope / curve).detach().requires_grad_()
    error = (1 / (n * curve.item())) ** 0.5
    assert slope.abs().item() < 1e-12
    assert error < 0.02 / beta
    assert abs(theta.item() - 1 / beta) < 3 * error
    tuned, base = theta.item() + rng.normal(size=n), rng.normal(size=n)
    expected = {0.5: 0.92135, 1.0: 0.76025, 2.0: 0.63816}[beta]  # Phi(1 / (sqrt(2) beta))
    slack = (
        error * 0.2821 + (expected * (1 - expected) / n) ** 0.5
    )  # of theta, by Phi's greatest slope, and of the count
    assert abs((tuned > base).mean() - expected) < 3 * slack


# ------------------------------------------------------------------------------------------------ KTO's and DRO's


def test_accuracy_counts_a_tie_as_one_half():
    assert accuracy_of(doubles(3, 0, -1, 0.1)).item() == 0.625


def test_kto_goldens():
    pair = [kto_loss(doubles(0.5), doubles(sign), doubles(0)[0], 1.0).item() for sign in (1, -1)]
    assert pair == [pytest.approx(0.3775406688, abs=1e-10), pytest.approx(0.6224593312, abs=1e-10)]


def test_kto_by_hand():
    gains, signs = numbers(0) - 0.5, np.where(numbers(1) > 0.4, 1.0, -1.0)
    baseline = max(gains.mean(), 0)
    losses = 1 - 1 / (1 + np.exp(-signs * 3.0 * (gains - baseline)))
    expected = np.mean(np.where(signs > 0, 2.0, 0.5) * losses)
    g = torch.tensor(gains, requires_grad=True)
    assert kto_baseline(g).item() == pytest.approx(baseline, abs=1e-12)
    assert not kto_baseline(g - 9).item() and not kto_baseline(g).requires_grad
    found = kto_loss(g, torch.tensor(signs), kto_baseline(g), 3.0, 2.0, 0.5)
    assert found.item() == pytest.approx(expected, abs=1e-12)
    found.backward()
    assert (torch.tensor(signs) * g.grad < 0).all()


def test_kto_at_the_reference_is_one_half_and_a_mean_image_has_no_gradient():
    g = doubles(0, 0, 0).requires_grad_()
    loss = kto_loss(g, doubles(1, -1, 0), kto_baseline(g), 1000.0)
    loss.backward()
    assert loss.item() == 0.5
    assert g.grad[2] == 0 and g.grad[0] == -g.grad[1] != 0


def test_kto_weighs_an_image_that_is_neither_as_a_bad_one_without_a_gradient():
    gain = doubles(0.3).requires_grad_()
    loss = kto_loss(gain, doubles(0), doubles(0)[0], 7.0, 2.0, 0.5)
    loss.backward()
    assert loss.item() == 0.25 and gain.grad.item() == 0


def test_a_mean_over_some_values_is_0_without_any():
    values = doubles(1, 2, 4)
    assert mean_over(values, torch.tensor([True, False, True])).item() == 2.5
    assert mean_over(values, torch.zeros(3, dtype=torch.bool)).item() == 0


def test_images_above_the_mean_of_their_prompt_are_good():
    made = ScoredImages(torch.zeros(6, 1), {}, torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0]))
    assert above_mean(made, 3).signs.tolist() == [-1, -1, 1, 0, 0, 0]


def test_dro_by_hand_paired_and_not():
    w, l = numbers(0), numbers(1)  # noqa: E741
    errors, signs = torch.tensor(np.concatenate([w, l])), torch.tensor([1.0] * 40 + [-1.0] * 40)
    assert dro_loss(errors, signs).item() == pytest.approx((w - l).mean(), abs=1e-12)
    assert dro_loss(errors[[0, 1, 2]], doubles(1, -1, 0)).item() == pytest.approx(2 * (w[0] - w[1]) / 3, abs=1e-12)


def test_a_bad_image_is_pushed_no_further_than_the_guard():
    errors = doubles(0.9, 0.4, 0.9).requires_grad_()
    dro_loss(errors, doubles(1, -1, -1), 0.5).backward()
    assert errors.grad.tolist() == [pytest.approx(2 / 3), pytest.approx(-2 / 3), 0]


def test_dpos_gradient_at_the_reference_is_a_quarter_of_beta_times_dros():
    w, l = (torch.tensor(numbers(i), requires_grad=True) for i in (0, 1))  # noqa: E741
    dpo = torch.autograd.grad(dpo_loss(dpo_margin(w, l, w.detach(), l.detach(), 50.0)), [w, l])
    signs = torch.tensor([1.0] * 40 + [-1.0] * 40)
    dro = torch.autograd.grad(dro_loss(torch.cat([w, l]), signs), [w, l])
    assert all(torch.allclose(a, 50.0 / 4 * b, atol=1e-12) for a, b in zip(dpo, dro, strict=True))


# ------------------------------------------------------------------------------------------------ pairs


@pytest.fixture(scope="module")
def adapted():
    """A session whose adapter is not at its zero start."""
    config = TOYS["dpo"]
    session = session_of(config, pipelines.sd())
    with torch.no_grad():
        for i, weight in enumerate(session.run.weights.values()):
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    return session


def test_identical_images_have_no_margin_away_from_the_reference(adapted):
    """The two of a pair share their noise and its level."""
    images = adapted.images
    x = torch.randn(2, *images.model.shape(), generator=torch.Generator().manual_seed(0))
    pairs = Pairs(x, x.clone(), images.model.encode(["red", "blue"])["cond"], torch.ones(2))
    draws = step_draws(adapted, 0, range(2))
    with torch.no_grad():
        late, early = (pair_errors(of, pairs, draws) for of in (images, images.with_network(adapted.run.reference)))
    assert (late[0] - early[0]).abs().min() > 1e-7
    assert torch.allclose(dpo_margin(*late, *early, 1.0), torch.zeros(2), atol=1e-6)


def test_the_best_and_the_worst_of_each_prompt_are_a_pair():
    scores = torch.tensor([2.0, 1.0, 3.0, 5.0, 5.0, 5.0])
    made = ScoredImages(torch.arange(6.0)[:, None], {"text": torch.tensor([[0.0]] * 3 + [[1.0]] * 3)}, scores)
    pairs = best_and_worst(made, 3)
    assert (pairs.winner[0].item(), pairs.loser[0].item()) == (2, 1)
    assert pairs.label.tolist() == [1, 0]
    assert pairs.cond["text"].flatten().tolist() == [0, 1]


def test_a_picture_is_cropped_in_its_middle_and_resized(tmp_path):
    picture = np.zeros((32, 40, 3))
    picture[:, :4] = picture[:, -4:] = 1  # what a square in the middle leaves out
    picture[:16, 4:-4, 0] = 0.6
    output.write(tmp_path / "a.png", output.png(picture))
    found = read_fitted(tmp_path / "a.png", 16, 16)
    assert found.shape == (3, 16, 16)
    assert found[0, :6].numpy() == pytest.approx(0.6, abs=0.1)  # the filter sees a little of what is cut off
    assert max(found[0, 10:].max(), found[1:].max()) < 0.1
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(RunError, match=r"cannot read image .*b\.png"):
        read_fitted(tmp_path / "b.png", 16, 16)


@torch.no_grad()
def test_labelled_pictures_are_encoded_with_their_prompts(labels):
    choices, session = decided(labels), session_of(TOYS["dpo"], pipelines.sd())
    model, pairs = session.images.model, label_pairs(session, choices)
    for side, latents in (("bright", pairs.winner), ("dark", pairs.loser)):
        files = [choice.a.parent / f"{i}-{side}.png" for i, choice in enumerate(choices)]
        images = torch.stack([read_fitted(file, 16, 16) for file in files])
        expected = model.pipe.vae.encode(2 * images - 1).latent_dist.mode() * model.pipe.vae.config.scaling_factor
        assert torch.allclose(latents, expected, atol=1e-6)
    assert torch.equal(
        pairs.cond["encoder_hidden_states"][1], model.encode(["blue square"])["cond"]["encoder_hidden_states"][0]
    )


# ------------------------------------------------------------------------------------------------ the recipes


def test_first_loss_is_that_of_the_reference_and_training_on_one_draw_lowers_it(toy, labels, monkeypatch):
    """One labelled pair, at the same noise in every step."""
    module = sys.modules[RECIPES[recipe_of(toy).name].check.__module__]
    first, *_ = Path(labels).read_text().splitlines()
    Path(labels).write_text(first + "\n")
    monkeypatch.setattr(module, "step_draws", lambda session, step, of: step_draws(session, 0, range(len(of))))
    config = replace(toy, labels=labels, max_train_steps=4, learning_rate=1e-3)
    found = [metrics for metrics, _ in train(config, None, pipelines.sd())]
    assert "reward_mean" not in found[0]
    assert found[0]["grad_norm"] > 0
    assert found[-1]["loss"] < found[0]["loss"]
    if module.__name__.endswith("dpo"):  # beta makes 2e-5 of float32's rounding
        assert found[0]["loss"] == pytest.approx(LN2, abs=2e-4)
        assert found[-1]["winner_gap"] < found[-1]["loser_gap"]
    if module.__name__.endswith("kto"):
        assert found[0]["loss"] == pytest.approx(0.5, abs=2e-4)
        assert found[-1]["good_gain"] > found[-1]["bad_gain"]
    if module.__name__.endswith("dro"):
        assert found[0]["loss"] == pytest.approx(found[0]["winner_error"] - found[0]["loser_error"], abs=1e-5)


def test_first_gradient_by_hand(toy, labels):
    """At the model before training: of the better images' denoising error up, of the worse ones' down, by a loop of the
    network alone. beta / 4 of each pair for dpo, of each image for kto; dro's is the difference itself."""
    config = replace(toy, labels=labels, max_train_steps=1, max_grad_norm=1e9)
    name = recipe_of(config).name
    state = final(config)
    session = session_of(replace(config, labels=None), pipelines.sd())
    pipe, weights = session.run.pipe, session.run.weights
    chosen = listed(decided(labels), config.seed)
    pairs = label_pairs(session, [chosen(i) for i in range(2)])
    x0 = torch.stack([pairs.winner, pairs.loser], 1).flatten(0, 1)  # w l w l
    numbers = [0, 1, 2, 3] if name == "kto" else [0, 0, 1, 1]  # the two of a pair share their noise
    draws = draw(session.images.model, [f"{config.seed} draw 0 {i}" for i in numbers])
    a, s = draws.alpha.view(-1, 1, 1, 1), draws.sigma.view(-1, 1, 1, 1)
    cond = pairs.cond["encoder_hidden_states"].repeat_interleave(2, 0)
    out = pipe.unet(a * x0 + s * draws.eps, draws.timestep, cond).sample
    error = (out - draws.eps).square().flatten(1).mean(1) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    scale = {"dpo": 5000 / 4 / 2, "kto": 1000 / 4 / 4, "dro": 1 / 2}[name]
    for key, g in zip(weights, torch.autograd.grad(scale * error.sum(), list(weights.values())), strict=True):
        moment = 10 * state.tensors[f"optimizer.exp_avg.{key}"]
        torch.testing.assert_close(moment, g, atol=float(1e-4 * g.abs().max() + 1e-6), rtol=1e-3)


@pytest.mark.parametrize("make", [pipelines.sdxl, dits.sd3])
def test_other_families_train_from_judged_images(toy, make):
    ((metrics, _),) = train(replace(toy, max_train_steps=1), None, make(), BRIGHT)
    assert metrics["grad_norm"] > 0
    assert metrics["reward_min"] < metrics["reward_max"]


def test_a_judge_without_preference_gives_no_gradient(toy):
    class Constant(Brightness):
        def __call__(self, images, prompts):
            return torch.full((len(images),), 0.7)

    ((metrics, _),) = train(replace(toy, max_train_steps=1), None, pipelines.sd(), Constant())
    assert metrics["grad_norm"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_equals_uninterrupted_bit_for_bit_within_a_round_too(toy, tmp_path, stop):
    config = replace(toy, updates_per_round=2, gradient_accumulation_steps=2 if stop == 1 else 1)
    whole = final(config)
    path = checkpoint.save(tmp_path, final(config, steps=stop))
    torch.manual_seed(99)
    assert same_weights(whole, final(config, checkpoint.load(path)))


def test_run_from_labels_writes_a_lora_that_loads(toy, labels, tmp_path):
    config = replace(toy, labels=labels, max_train_steps=2, checkpointing_steps=1, output_dir=str(tmp_path / "out"))
    train_in_folder(config, lambda line: None, pipelines.sd())
    pipelines.sd().load_lora_weights(tmp_path / "out")
    assert "a person's labels" in (tmp_path / "out" / "README.md").read_text()
    assert lora.WEIGHTS in {path.name for path in (tmp_path / "out").iterdir()}


def test_one_update_draws_the_model_to_the_better_pictures(toy, labels):
    """The denoising error of what a person chose falls beside that of the rest, at the draws of the update."""
    session = session_of(replace(toy, labels=labels, learning_rate=1e-4), pipelines.sd())
    (turn,) = (open_marked if isinstance(toy, KTOConfig) else open_pairs)(session).at(0)
    update = {KTOConfig: part_good_from_bad, DPOConfig: prefer_winners, DROConfig: denoise_winners}[type(toy)]

    def advantage():
        draws = step_draws(session, 0, turn.numbers)
        with torch.no_grad():
            if isinstance(toy, KTOConfig):
                errors = denoising_errors(session.images.denoiser, turn.images.latents, draws, turn.images.cond)
                return (turn.images.signs * errors).mean()
            errors = pair_errors(session.images, turn.images, draws)
            return (errors.winner - errors.loser).mean()

    before = advantage()
    with attempt_step(session.run, 0) as metrics:
        metrics.update(update(session, [turn], 0))
    assert metrics["grad_norm"] > 0 and advantage() < before


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"num_images_per_prompt": 1}, "num_images_per_prompt is 1: it must be from 2 "),
        ({"updates_per_round": 0}, "updates_per_round is 0"),
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
