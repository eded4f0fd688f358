"""The training of the embedded models: its loop resumes, its parts fit each other, and every stage runs."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from difftune import models
from rewards.learned.clip import CLIPScore
from rewards.world import draw, grammar
from scripts.tiny import classifier, clip, export, fit, flow, judged, scenes, turbo, unet, warm, words
from scripts.tiny.fit import Fit, Setup, save


class Stopped(Exception):
    pass


def trained(setup: Setup, stop: int | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    def loss(step):
        if step == stop:
            raise Stopped
        return (model(torch.randn(8, 3)) - torch.randn(8, 2)).square().mean()

    Fit(setup, "line", {"model": model}, loss, 7, 1e-2).run()
    return model.weight.detach().clone()


def test_pictures_are_moved_within_their_radius_to_where_the_loss_is_higher():
    """Of a linear loss the furthest point of each ball is known: the radius along the loss's own direction."""
    x, slope = torch.randn(32, 3, 4, 4), torch.randn(32, 3, 4, 4)
    moved = judged.moved_against(x, lambda y: (slope * y).sum()) - x
    lengths = judged.length(moved)
    assert lengths.max() <= judged.RADIUS and 0.2 * judged.RADIUS < lengths.mean() < 0.8 * judged.RADIUS
    torch.testing.assert_close(moved, lengths * slope / judged.length(slope), rtol=1e-4, atol=1e-5)


def test_a_stage_that_was_stopped_ends_in_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "SAVE_EVERY", -1.0)
    whole = trained(Setup(tmp_path / "whole"))
    for stop in (3, 5):
        with pytest.raises(Stopped):
            trained(Setup(tmp_path / "parts"), stop)
    assert torch.equal(trained(Setup(tmp_path / "parts")), whole)
    assert torch.equal(trained(Setup(tmp_path / "whole")), whole)  # a finished stage is not trained on
    assert not torch.equal(trained(Setup(tmp_path / "other", seed=1)), whole)


def test_a_stage_begins_with_the_weights_in_start_and_with_no_others(tmp_path):
    setup = Setup(tmp_path, steps={"line": 0})
    begin = {"model.weight": torch.ones(2, 3), "model.bias": torch.zeros(2)}
    save(begin, setup.file("start/line.safetensors"))
    assert torch.equal(trained(setup), torch.ones(2, 3))
    save({"model.weight": torch.ones(2, 3)}, setup.file("start/line.safetensors"))
    with pytest.raises(KeyError, match=r"no 'model.bias'"):
        trained(setup)


def test_every_word_is_one_token_and_the_old_ones_keep_their_numbers():
    tokenizer, shipped = words.tokenizer(), models.load("tiny").tokenizer
    for word in words.grammar_words():
        assert len(tokenizer(word).input_ids) == 3, word
    for entry in draw.shapeeval():
        assert tokenizer(entry["prompt"]).input_ids == shipped(entry["prompt"]).input_ids
    longest = "a small red circle, a large blue square and a small green triangle on a gray background"
    assert len(tokenizer(longest).input_ids) == words.LENGTH


def test_a_new_word_becomes_one_token():
    vocab, merges = words.extended({"s": 0, "i": 1, "x</w>": 2, "si": 3}, [("s", "i")], ["six"])
    assert merges == [("s", "i"), ("si", "x</w>")]
    assert vocab == {"s": 0, "i": 1, "x</w>": 2, "si": 3, "six</w>": 4}


def test_the_text_encoder_is_the_text_tower_of_clip(tmp_path):
    setup = Setup(tmp_path, steps={"clip": 0})
    model, encoder, ids = clip.trained(setup), clip.text_encoder(setup), words.tokens(["a red circle", ""])
    expected = model.encode_text(ids)
    found = encoder(ids).pooler_output @ model.text_projection
    torch.testing.assert_close(found, expected)
    back = clip.from_transformers(encoder.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.items())


def test_scenes_are_the_same_again_and_enter_at_the_pace_of_the_batches(tmp_path):
    first, again = (scenes.drawn.__wrapped__(0, 3, 5) for _ in range(2))
    assert first.captions == again.captions and torch.equal(first.images, again.images)
    assert all(grammar.holds(c, s) for c, s in zip(first.captions, first.scenes, strict=True))
    setup, large = Setup(tmp_path), Setup(tmp_path, batch=640)
    assert scenes.window(setup, 0) == range(0, 4)
    assert scenes.window(setup, 400) == scenes.window(large, 40) == range(0, 14)
    assert len(scenes.window(setup, 100_000)) == scenes.WINDOW
    assert set(scenes.SHARES) == set(grammar.ALL_CATEGORIES) and sum(scenes.SHARES.values()) == pytest.approx(1)


def test_what_contradicts_a_picture_is_false_and_enough():
    rng = np.random.default_rng(0)
    for kind in grammar.ALL_CATEGORIES:
        caption, scene = draw.draw(rng, [kind])
        wrong = clip.false(rng, caption, scene)
        assert len(wrong) == clip.EDITS and not any(grammar.holds(text, scene) for text in wrong)


@pytest.mark.parametrize("late, wanted", [(0.0, unet.LOG_RATIO), (1.0, unet.LATE)])
def test_noise_levels_lie_on_the_schedule(tmp_path, late, wanted):
    torch.manual_seed(0)
    alpha, sigma, t = unet.noise_levels(Setup(tmp_path), 4000, late)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha))
    low, middle, high = torch.log(sigma / alpha).quantile(torch.tensor([0.1587, 0.5, 0.8413])).tolist()
    assert middle == pytest.approx(wanted[0], abs=0.1)
    assert (high - low) / 2 == pytest.approx(wanted[1], abs=0.1)
    assert t.min() >= 0 and t.max() <= 999


def test_export_writes_what_transformers_4_reads(tmp_path):
    """From the names that transformers 5 writes, and from its tokenizer, to the files that are shipped, twice alike."""
    shipped = models.path("tiny")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(shipped / part, tmp_path / part)
    weights = load_file(tmp_path / "text_encoder/model.safetensors")
    bare = {name.removeprefix(export.PREFIX): value for name, value in weights.items()}
    assert len(bare) == len(weights) and not bare.keys() & weights.keys()
    save_file(bare, tmp_path / "text_encoder/model.safetensors")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "tokenizer" / name).unlink()
    for _ in range(2):
        export.for_transformers_4(tmp_path)
        for name in ("text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"):
            assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes(), name


@pytest.mark.slow
def test_every_stage_trains_and_is_exported(tmp_path, monkeypatch):
    """One step of each, from the shipped weights; what is written loads, draws and judges."""
    monkeypatch.setattr(scenes, "SHARD", 12)
    monkeypatch.setattr(scenes, "drawn", lambda seed, number: scenes_drawn(seed, number, 12))
    monkeypatch.setattr(turbo, "TRAJECTORIES", 4)
    monkeypatch.setattr(turbo, "PART", 4)
    monkeypatch.setattr(judged, "PARTS", 1)
    monkeypatch.setattr(judged, "PART", 4)
    monkeypatch.setattr(classifier, "SHARDS", 2)
    stages = ("vae", "decoder", "clip", "tiny", "judged", "flow", "turbo", "weak", "classifier")
    setup = Setup(tmp_path / "state", batch=4, steps=dict.fromkeys(stages, 1))
    warm.write(setup)
    export.write(setup, tmp_path)
    assert {stage for stage in stages if (tmp_path / f"state/{stage}.safetensors").exists()} == set(stages)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "difftune/weights/tiny")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.unet.dtype == torch.float32
    assert pipe("five red circles", num_inference_steps=2, output_type="pt").images.isfinite().all()
    names = load_file(tmp_path / "difftune/weights/tiny/text_encoder/model.safetensors")
    assert names and all(name.startswith(export.PREFIX) for name in names)
    for name in ("turbo", "flow", "weak"):
        found = UNet2DConditionModel.from_pretrained(tmp_path / f"difftune/weights/tiny-{name}", subfolder="unet")
        assert found.config.cross_attention_dim == clip.WIDTH
    reward = CLIPScore(tmp_path / "rewards/weights/tiny-clip")
    assert reward(torch.rand(1, 3, 64, 64), ["a red circle"]).isfinite().all()


scenes_drawn = scenes.drawn.__wrapped__


def test_losses_fall_to_nothing_for_a_network_that_knows_the_answer(tmp_path, monkeypatch):
    """A network that is given the scene predicts v and the flow's velocity exactly: the targets are right."""
    z = torch.randn(6, 4, 8, 8)
    setup = Setup(tmp_path)
    monkeypatch.setattr(scenes, "latents", lambda setup, step: Fixed(z))
    monkeypatch.setattr(clip, "text_encoder", lambda setup: lambda ids: Output(last_hidden_state=None))
    power = unet.DDIMScheduler(**unet.TABLE).alphas_cumprod

    def v(x, t, states):
        a = power[t].view(-1, 1, 1, 1)
        eps = (x - a.sqrt() * z) / (1 - a).sqrt()
        return Output(sample=a.sqrt() * eps - (1 - a).sqrt() * z)

    def velocity(x, t, states):
        share = (t / 1000).view(-1, 1, 1, 1)
        return Output(sample=(x - z) / share)

    assert unet.v_loss(v, setup, 0).item() < 1e-6
    assert flow.flow_loss(velocity, setup, 0).item() < 1e-6
    assert unet.v_loss(velocity, setup, 0).item() > 0.1


class Output:
    def __init__(self, **values):
        self.__dict__.update(values)


class Fixed:
    def __init__(self, z):
        self.z = z

    def draw(self, count, setup):
        return self.z, None


def test_wobbles_move_a_picture_a_little(tmp_path):
    torch.manual_seed(0)
    x = scenes.pixels(scenes_drawn(0, 0, 4).images, Setup(tmp_path))
    bent = clip.wobbled(x)
    assert bent.shape == x.shape and (bent - x).abs().mean() < 0.15
    torch.testing.assert_close(clip.wobbled(x, pixels=0.0), x, atol=1e-4, rtol=0)
