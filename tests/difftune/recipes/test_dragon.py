"""DRAGON: its sets against brute force and by hand, its losses, resumption bit for bit, the win rate."""

import json
from dataclasses import replace
from itertools import chain as joined
from itertools import islice
from math import log

import numpy as np
import pytest
import torch
from PIL import Image

from difftune.configs.recipes import DragonConfig
from difftune.evaluation.win_rate import win_rate
from difftune.files import checkpoint
from difftune.files.checkpoint import State
from difftune.files.prompts import listed, prompts_named
from difftune.pipelines import lora
from difftune.recipes import dragon, train, train_in_folder
from difftune.recipes.dragon import choose_pairs, compare_with_base, contrastive_loss, look_at, part_sets, sample_sets
from difftune.recipes.set_objectives import OBJECTIVES, SetObjective, principal_directions
from difftune.rollouts.denoising import draw
from difftune.rollouts.image_sampler import ImageSampler
from difftune.rollouts.pairs import PairErrors
from difftune.rollouts.rounds import repeated
from difftune.rollouts.session import Session
from difftune.training import run_folder
from difftune.training.network import TrainedNetwork
from difftune.training.numbering import sample_numbers
from rewards.sets.catalogue import Mean
from rewards.sets.frechet import frechet, moments
from rewards.sets.mmd import cubic, mmd
from rewards.sets.vendi import vendi
from rewards.simple import Brightness
from solvers.latent import LatentModel
from tests.support import dits, pipelines

BRIGHT = Brightness()


@pytest.fixture
def toy(tmp_path) -> DragonConfig:
    (tmp_path / "prompts.txt").write_text("red circle\nblue square\nred square\n")
    sizes = {"max_train_steps": 3, "train_batch_size": 2, "num_inference_steps": 2, "guidance": "none"}
    sets = {"pairs_per_round": 3, "updates_per_round": 2, "num_win_rate_images": 0}
    return DragonConfig(prompts=str(tmp_path / "prompts.txt"), learning_rate=1e-2, **sizes, **sets)


@pytest.fixture
def folder(tmp_path) -> str:
    """Pictures of four colours."""
    (tmp_path / "pictures").mkdir()
    for i, color in enumerate([(255, 255, 255), (255, 250, 200), (200, 255, 255), (240, 240, 255)]):
        Image.new("RGB", (16, 16), color).save(tmp_path / "pictures" / f"{i}.png")
    return str(tmp_path / "pictures")


def final(config: DragonConfig, state: State | None = None, steps: int | None = None) -> State:
    *_, (_, last) = islice(train(config, state, pipelines.sd(), BRIGHT), steps)
    return last


def chain_of(config: DragonConfig, pipe) -> ImageSampler:
    return ImageSampler.of(config, pipe, TrainedNetwork(pipe.unet, torch.float32))


class Alone:
    """As much of a run as one process's rounds need."""

    world, rank = 1, 0


def alone(config: DragonConfig, images: ImageSampler) -> Session:
    """A session of one process that trains nothing."""
    prompts = prompts_named(config.prompts, config.seed)
    return Session(config, Alone(), images, prompts, None, None, [].append)


# ------------------------------------------------------------------------------------------------ objectives


def settings(name: str, folder: str) -> dict:
    return {"objective": name, "exemplars": None if name in ("instance", "vendi") else folder, "feature_dims": 3}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_by_its_measure(toy, folder, name):
    """Features of images, and the value of the set, by the measures themselves."""
    config = replace(toy, **settings(name, folder))
    model = LatentModel(pipelines.sd())
    objective = OBJECTIVES[name](config, model, BRIGHT)
    latents = torch.randn(5, 4, 8, 8)
    images = torch.rand(5, 3, 16, 16)
    features = objective.look(latents, images, [""] * 5)
    assert len(features) == 5 and objective.single == (name in ("instance", "item-frechet", "item-mmd"))
    encoder = dragon_encoder()
    exemplars = torch.stack([picture(folder, i) for i in range(4)])
    e, x = encoder.image_features(exemplars), encoder.image_features(images)
    expected = {
        "instance": lambda: BRIGHT(images, [""] * 5).mean(),
        "item-frechet": lambda: -by_places(model, latents, exemplars).mean(),
        "item-mmd": lambda: torch.stack([-biased(item[None], e) for item in x]).mean(),
        "frechet": lambda: -frechet(x @ principal_directions(e, 3), e @ principal_directions(e, 3), 0.1),
        "mmd": lambda: -mmd(x, e),
        "vendi": lambda: vendi(x),
    }[name]()
    assert objective.value(features) == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


def dragon_encoder():
    from rewards.sets.exemplar import encoder_of

    return encoder_of("tiny-clip")


def picture(folder: str, i: int) -> torch.Tensor:
    from difftune.files.pictures import read_picture

    return read_picture(f"{folder}/{i}.png")


def by_places(model: LatentModel, latents: torch.Tensor, exemplars: torch.Tensor) -> torch.Tensor:
    every = model.encode_images(exemplars).permute(0, 2, 3, 1).reshape(-1, 4)
    return torch.stack([frechet(item.permute(1, 2, 0).reshape(-1, 4), every, 0.1) for item in latents])


def biased(x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """MMD^2 with the items' own pairs, less the exemplars' part, which no image changes."""
    x, e = x.double(), e.double()
    return cubic(x, x).mean() - 2 * cubic(x, e).mean()


def test_texts_are_exemplars_of_the_same_space(toy, tmp_path):
    (tmp_path / "texts.txt").write_text("a red circle\na blue square\na green triangle\n")
    config = replace(toy, objective="mmd", exemplars=str(tmp_path / "texts.txt"))
    objective = OBJECTIVES["mmd"](config, LatentModel(pipelines.sd()), None)
    texts = dragon_encoder().text_features(["a red circle", "a blue square", "a green triangle"])
    torch.testing.assert_close(objective.reward.exemplars, texts)


def test_principal_directions_are_those_of_the_singular_values():
    x = torch.randn(20, 5, dtype=torch.float64) * torch.tensor([5.0, 1, 4, 0.1, 0.2])
    basis = principal_directions(x, 2)
    _, _, v = torch.linalg.svd(x - x.mean(0))
    torch.testing.assert_close(basis @ basis.T, v[:2].T @ v[:2])
    assert principal_directions(x, 9).shape == (5, 5)
    spread = moments(x @ basis).covariance
    assert spread[0, 1].abs() < 1e-9


# ------------------------------------------------------------------------------------------------ sets


def test_sets_of_a_mean_reward_are_the_better_and_the_worse_of_every_prompt(toy):
    config = replace(toy, pairs_per_round=4)
    pipe = pipelines.sd()
    chain = chain_of(config, pipe)
    prompts = repeated(prompts_named(config.prompts, config.seed), 2)
    objective = OBJECTIVES["instance"](config, chain.model, BRIGHT)
    sets = sample_sets(alone(config, chain), objective, range(2, 4))
    latents, scores, _ = look_at(objective, chain, prompts, range(8, 16), config)
    for i, pair in enumerate(scores.view(4, 2)):
        assert torch.equal(sets.pairs.winner[i], latents[2 * i + int(pair.argmax())])
        assert torch.equal(sets.pairs.loser[i], latents[2 * i + int(pair.argmin())])
    texts = chain.model.encode([prompts(i) for i in range(8, 16, 2)])["cond"]["encoder_hidden_states"]
    torch.testing.assert_close(sets.pairs.cond["encoder_hidden_states"], texts)
    assert sets.rewards["reward_mean"] == pytest.approx(scores.mean().item())
    assert sets.rewards["reward_positive"] == pytest.approx(scores.view(4, 2).amax(1).mean().item())


@pytest.mark.parametrize("name", ["frechet", "mmd", "vendi"])
def test_sets_of_a_set_reward_hold_one_of_every_pair_and_are_no_worse_than_the_first(toy, folder, name):
    config = replace(toy, pairs_per_round=5, **settings(name, folder))
    chain = chain_of(config, pipelines.sd())
    prompts = repeated(prompts_named(config.prompts, config.seed), 2)
    objective = OBJECTIVES[name](config, chain.model, None)
    sets = sample_sets(alone(config, chain), objective, range(0, 2))
    latents, features, _ = look_at(objective, chain, prompts, range(10), config)
    for i in range(5):
        both = {tuple(latents[2 * i + k].flatten().tolist()) for k in (0, 1)}
        assert {tuple(s[i].flatten().tolist()) for s in (sets.pairs.winner, sets.pairs.loser)} == both
    start = objective.value(features[::2])
    assert sets.rewards["reward_positive"] >= start - 1e-9


def test_every_pair_is_taken_once_in_a_pass_by_each_process():
    config = DragonConfig(pairs_per_round=6, train_batch_size=2, gradient_accumulation_steps=1)
    for rank in (0, 1):
        run = Alone()
        run.world, run.rank = 2, rank
        batches = [choose_pairs(config, run, r) for r in numbers(config, rank)]
        assert sorted(joined.from_iterable(batches[:3])) == sorted(joined.from_iterable(batches[3:])) == list(range(6))
        assert batches[:3] != batches[3:]


def numbers(config: DragonConfig, rank: int) -> list[range]:
    return [sample_numbers(config, step, rank, 2)[0] for step in range(6)]


# ------------------------------------------------------------------------------------------------ the update


class Gather:
    class accelerator:
        gather = staticmethod(lambda x: x)


@pytest.mark.parametrize(("loss", "start"), [("dpo", log(2)), ("kto", 0.5)])
def test_update_at_the_reference(toy, loss, start):
    """ln 2 and 1/2; the gradient is -beta / 4 per pair of dpo, and an eighth of beta per image of kto."""
    config = replace(toy, loss=loss, beta=8.0)
    before = torch.rand(2, 5, dtype=torch.float64)
    after = before.clone().requires_grad_()
    found = contrastive_loss(config, Gather(), PairErrors(*after), PairErrors(*before))
    found.backward()
    assert found.item() == pytest.approx(start)
    share = 8 / 4 / 5 if loss == "dpo" else 8 / 4 / 10
    torch.testing.assert_close(after.grad, share * torch.tensor([[1.0], [-1.0]]).double().expand(2, 5))


def test_kto_update_by_hand(toy):
    before, after = torch.rand(2, 4, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)
    config = replace(toy, loss="kto", beta=3.0)
    found = contrastive_loss(config, Gather(), PairErrors(*after), PairErrors(*before))
    gains = (before - after).numpy()
    base = max(gains.mean(), 0)
    by_hand = [1 / (1 + np.exp(sign * 3 * (g - base))) for row, sign in zip(gains, (1, -1), strict=True) for g in row]
    assert found.item() == pytest.approx(sum(by_hand) / 8)


def test_first_gradient_by_hand(toy):
    """-beta / 2 * 1/2 (grad L+ - grad L-) of the denoising errors, by a loop of the network alone."""
    config = replace(toy, max_train_steps=1, max_grad_norm=1e9)
    found = final(config)
    pipe = pipelines.sd()
    weights = lora.add(pipe, config.rank, None, 0.0, config.seed)
    chain = chain_of(config, pipe)
    objective = OBJECTIVES["instance"](config, chain.model, BRIGHT)
    pairs = sample_sets(alone(config, chain), objective, range(2)).pairs
    rows = [listed([0, 1, 2], 0)(i) for i in range(2)]
    draws = draw(chain.model, [f"0 draw 0 {i}" for i in range(2)])
    a, s = draws.alpha.view(-1, 1, 1, 1), draws.sigma.view(-1, 1, 1, 1)
    cond = pairs.cond["encoder_hidden_states"][rows]
    error = [
        ((pipe.unet(a * x0 + s * draws.eps, draws.timestep, cond).sample - draws.eps) ** 2).flatten(1).mean(1)
        for x0 in (pairs.winner[rows], pairs.loser[rows])
    ]
    surrogate = 5000 / 4 * (error[0] - error[1]).mean()
    for name, g in zip(weights, torch.autograd.grad(surrogate, list(weights.values())), strict=True):
        moment = 10 * found.tensors[f"optimizer.exp_avg.{name}"]
        torch.testing.assert_close(moment, g, atol=float(1e-4 * g.abs().max() + 1e-6), rtol=1e-3)


def test_without_a_gain_nothing_is_swapped_and_equal_sets_are_ln_2_without_a_gradient(toy):
    chain = chain_of(toy, pipelines.sd())
    flat = SetObjective(lambda latents, images, prompts: torch.zeros(len(images), 1), Mean())
    sets = sample_sets(alone(toy, chain), flat, range(2))
    assert sets.rewards["swapped"] == 0.0
    error = torch.rand(3, dtype=torch.float64, requires_grad=True)  # of both sets, which are one
    loss = contrastive_loss(toy, Gather(), PairErrors(error, error), PairErrors(*torch.rand(3).double().expand(2, 3)))
    loss.backward()
    assert loss.item() == pytest.approx(log(2)) and error.grad.abs().max() < 1e-12


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_sets_part_in_training(toy, loss, monkeypatch):
    """On one round's pairs under one noise, the error of the positive set falls below that of the negative one."""
    monkeypatch.setattr(dragon, "step_draws", lambda session, *_: draw(session.images.model, ["0", "1", "2"]))
    sizes = {"max_train_steps": 8, "updates_per_round": 8, "train_batch_size": 3}
    config = replace(toy, loss=loss, beta=500.0, learning_rate=3e-3, **sizes)
    records = [metrics for metrics, _ in train(config, None, pipelines.sd(), BRIGHT)]
    assert records[0]["accuracy"] == 0.5 and records[0]["loss"] == pytest.approx(log(2) if loss == "dpo" else 0.5)
    assert records[-1]["positive_gap"] < records[-1]["negative_gap"] and records[-1]["accuracy"] > 0.5
    assert records[-1]["loss"] < records[0]["loss"]


# ------------------------------------------------------------------------------------------------ resumption, the run


def test_resumed_within_a_round_equals_uninterrupted_bit_for_bit(toy, tmp_path):
    torch.manual_seed(5)
    whole = final(toy)
    torch.manual_seed(5)
    path = checkpoint.save(tmp_path / "run", final(toy, steps=1))
    torch.manual_seed(99)
    resumed = final(toy, checkpoint.load(path))
    assert resumed.step == 3 and whole.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(whole.tensors[key], resumed.tensors[key]) for key in whole.tensors)


@pytest.mark.slow
def test_run_writes_the_win_rate(toy, tmp_path):
    config = replace(toy, output_dir=str(tmp_path / "out"), max_train_steps=2, num_win_rate_images=9)
    pipe = pipelines.sd()
    found = train_in_folder(config, lambda line: None, pipe, BRIGHT)
    written = json.loads((tmp_path / "out" / "win_rate.json").read_text())
    assert written["win_rate"] == found["win_rate"] and written["win_rate"]["n"] == 9
    again = compare_with_base(config, pipe, prompts_named(config.prompts, 0), BRIGHT)
    assert again["win_rate"] == found["win_rate"] and found["reward_after"] != found["reward_before"]
    with lora.off(pipe.unet):
        chain = chain_of(config, pipe)
        objective = OBJECTIVES["instance"](config, chain.model, BRIGHT)
        prompts = prompts_named(config.prompts, 0)
        base = look_at(objective, chain, prompts, range(dragon.NEW, dragon.NEW + 9), config).features
    tuned = look_at(objective, chain, prompts, range(dragon.NEW, dragon.NEW + 9), config).features
    assert found["win_rate"]["rate"] == win_rate(int((tuned > base).sum()), int((tuned == base).sum()), 9).rate
    pipelines.sd().load_lora_weights(tmp_path / "out")
    assert "DRAGON" in (tmp_path / "out" / run_folder.CARD).read_text()


def test_sets_of_a_win_rate_share_no_image():
    several = SetObjective(None, OBJECTIVES["vendi"](DragonConfig(), None, None).reward)
    x = torch.arange(20.0)[:, None]
    parts = part_sets(several, x, -x)
    assert [len(t) for t, _ in parts] == [8, 8] and torch.equal(torch.cat([t for t, _ in parts]), x[:16])
    assert len(part_sets(SetObjective(None, Mean()), x, -x)) == 20


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"objective": "fréchet"}, "did you mean 'frechet'"),
        ({"objective": "mmd"}, "objective 'mmd' wants --exemplars"),
        ({"objective": "item-frechet", "exemplars": "PROMPTS"}, "must be a folder of pictures"),
        ({"objective": "frechet", "exemplars": "ONE"}, "holds 1 exemplar"),
        ({"objective": "frechet", "exemplars": "/nowhere"}, "there is no folder of pictures '/nowhere'"),
        ({"loss": "dop"}, "did you mean 'dpo'"),
        ({"shrinkage": 2.0}, "shrinkage is 2"),
        ({"pairs_per_round": 1}, "pairs_per_round is 1"),
        ({"num_win_rate_images": 3}, "num_win_rate_images is 3"),
        ({"num_win_rate_images": 8, "full_finetuning": True}, "set num_win_rate_images to 0"),
        ({"reward": ["tiny-clap"]}, "did you mean 'tiny-clip'"),
    ],
)
def test_bad_settings_are_one_sentence_and_nothing_is_written(toy, tmp_path, more, what):
    (tmp_path / "one.txt").write_text("a red circle\n")
    files = {"PROMPTS": toy.prompts, "ONE": str(tmp_path / "one.txt")}
    more = {key: files.get(str(value), value) for key, value in more.items()}
    with pytest.raises(ValueError, match=what) as error:
        config = replace(toy, **{"output_dir": str(tmp_path / "out"), **more})
        train_in_folder(config, pipe=pipelines.sd())
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("lengths", [("red", "a blue square and a red circle"), ("a red circle and a square", "red")])
def test_prompts_of_several_lengths_serve_a_round_of_several_batches(toy, monkeypatch, lengths):
    """Qwen-Image's texts are as long as their prompts: all of a round are padded alike, and tell their tokens."""
    monkeypatch.setattr(LatentModel, "size", lambda self, height=None, width=None: (height or 32, width or 32))
    prompts = [lengths[0]] * 4 + list(lengths)
    pipe = dits.qwen(texts=True)
    images = ImageSampler.of(toy, pipe, TrainedNetwork(pipe.transformer, torch.float32))
    objective = OBJECTIVES["instance"](toy, images.model, BRIGHT)
    made = look_at(objective, images, prompts.__getitem__, range(6), replace(toy, train_batch_size=2))
    assert len(made.latents) == len(made.features) == 6
    for row, prompt in enumerate(prompts):
        alone = images.texts(images.model, [prompt])["cond"]["encoder_hidden_states"][0]
        told = made.cond["encoder_hidden_states_mask"][row].bool()
        assert torch.equal(made.cond["encoder_hidden_states"][row][told], alone)
