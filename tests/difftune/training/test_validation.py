"""Validation: the same images each time, the best by the held-out reward, and an end where it falls."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from difftune.configs.recipes import AlignPropConfig
from difftune.errors import UserError
from difftune.files import checkpoint
from difftune.files import records as lines
from difftune.pipelines import lora
from difftune.recipes import RECIPES, train_in_folder
from difftune.training import trackers, validation
from guidance.methods.catalogue import CFG
from rewards.simple import Brightness, Saturation
from tests.support import pipelines
from tests.support.toys import Bright, toy


@pytest.fixture
def config(tmp_path) -> AlignPropConfig:
    made = toy("alignprop", tmp_path, validation_steps=2, num_validation_images=3, validation_reward="saturation")
    return replace(made, validation_prompts=made.prompts, output_dir=str(tmp_path / "out"))


def records(folder) -> list[dict]:
    return list(lines.records(Path(folder) / validation.RECORDS))


def test_prompts_that_are_no_file_name_what_the_validation_knows(config):
    with pytest.raises(UserError, match="cannot read the prompts of 'shapes': give a UTF-8 text file, or 'shapeeval'"):
        validation.validation_prompts(replace(config, validation_prompts="shapes"))


def test_shapeeval_prompts_come_category_after_category():
    from rewards.world.grammar import CATEGORIES, category, parse

    prompts = validation.validation_prompts(AlignPropConfig())
    kinds = [category(parse(prompt)) for prompt in prompts[:12]]
    assert sorted(kinds[:6]) == sorted(kinds[6:]) == sorted(CATEGORIES)


@pytest.mark.parametrize(("prompts", "told"), [("shapes", False), ("shapes:counting", False), ("animals", True)])
def test_captions_of_shapes_for_other_prompts_are_told(prompts, told, capsys):
    """A model of photographs is not to be validated on shapes in silence."""
    config = AlignPropConfig(prompts=prompts, validation_steps=2, reward=["saturation"])
    validation.open_validator(config, Saturation())
    assert ("--validation_prompts FILE" in capsys.readouterr().err) == told
    validation.open_validator(replace(config, validation_prompts=str(Path(__file__))), Saturation())
    assert not capsys.readouterr().err


def test_validations_are_written_change_nothing_and_are_made_again_by_a_resumed_run(config, tmp_path):
    torch.manual_seed(5)
    train_in_folder(config, [].append, pipelines.sd(), Bright())
    assert [r["step"] for r in records(config.output_dir)] == [0, 2, 4]
    assert all(r.keys() == {"step", "reward_mean", "held_out_mean"} for r in records(config.output_dir))
    with Image.open(Path(config.output_dir) / "validation" / "step-000002.png") as grid:
        assert grid.size == (34, 34)  # 2 x 2 of 16 pixels
    torch.manual_seed(5)
    plain = replace(config, output_dir=str(tmp_path / "plain"), validation_steps=None, validation_reward=None)
    train_in_folder(plain, [].append, pipelines.sd(), Bright())
    states = [checkpoint.load(Path(c.output_dir) / "checkpoint-4") for c in (config, plain)]
    assert all(torch.equal(v, states[1].tensors[k]) for k, v in states[0].tensors.items())
    torch.manual_seed(5)
    cut = replace(config, output_dir=str(tmp_path / "cut"), checkpointing_steps=3)
    train_in_folder(replace(cut, max_train_steps=3), [].append, pipelines.sd(), Bright())
    train_in_folder(replace(cut, resume_from_checkpoint="latest"), [].append, pipelines.sd(), Bright())
    assert [r for r in records(cut.output_dir) if r["step"] % 2 == 0] == records(config.output_dir)


class HeldOut(Saturation):
    """Held-out scores as they are given, one for each validation; the weights at each are kept."""

    def __init__(self, values, pipe, seen):
        for name, value in (("values", list(values)), ("pipe", pipe), ("seen", seen)):
            object.__setattr__(self, name, value)

    def __call__(self, images, prompts):
        self.seen.append({k: v.clone() for k, v in lora.weights(self.pipe.unet).items()})
        return torch.full((len(images),), self.values.pop(0))


def followed(config, values, monkeypatch, **more):
    pipe, seen = pipelines.sd(), []
    scorers = {"reward": Brightness(), "held_out": HeldOut([0.9, *values], pipe, seen)}  # 0.9 of step 0, never the best
    monkeypatch.setattr(validation, "load_scorers", lambda config, reward: scorers)
    config = replace(config, validation_steps=1, num_validation_images=2, **more)  # one batch, which is judged at once
    found = train_in_folder(config, [].append, pipe, Brightness())
    return found, seen[1:]


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_the_best_is_the_one_that_the_held_out_reward_likes_most(config, monkeypatch, ema_decay):
    values = [0.1, 0.7, 0.3, 0.6]
    _, seen = followed(config, values, monkeypatch, ema_decay=ema_decay)
    best = Path(config.output_dir) / "best"
    assert (best / "validation.json").read_text().startswith('{\n  "step": 2,')
    saved = load_file(best / lora.WEIGHTS)
    for name, value in seen[1].items():  # as it was when it was judged: the average, where there is one
        assert torch.equal(saved["unet." + name.replace(".default", "")], value)
    kind = "weights" if ema_decay is None else "ema"
    state = checkpoint.load(Path(config.output_dir) / "checkpoint-4")
    assert all(torch.equal(state.tensors[f"{kind}.{k}"], v) for k, v in seen[3].items())


UNREWARDED = {
    "d3po": {"labels": "x"},
    "dpo": {"labels": "x"},
    "kto": {"labels": "x"},
    "dro": {"labels": "x"},
    "pso": {"images": "x"},
    "dragon": {"objective": "vendi"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_reward_that_is_not_trained_on_is_held_out(name, tmp_path):
    """The default reward, tiny-clip, is refused where it is trained on, and is alone where labels and the like are."""
    found = {"validation_steps": 2, "validation_reward": "tiny-clip"}
    with pytest.raises(UserError, match="'tiny-clip' is trained on"):
        validation.check_validation(toy(name, tmp_path, **found))
    if name in UNREWARDED:
        config = toy(name, tmp_path, **found, **UNREWARDED[name])
        validation.check_validation(config)
        assert validation.load_scorers(config, Brightness()).keys() == {"held_out"}
        assert validation.load_scorers(replace(config, validation_reward=None), Brightness()).keys() == {"reward"}
        with pytest.raises(UserError, match="early_stop compares with the reward that is trained on, and here none is"):
            validation.check_validation(replace(config, early_stop=True))


def test_a_validation_without_a_trained_reward_is_the_held_out_one_alone(config, monkeypatch):
    monkeypatch.setattr(validation, "rewarded", lambda config: False)
    train_in_folder(config, [].append, pipelines.sd(), Bright())
    assert all(record.keys() == {"step", "held_out_mean"} for record in records(config.output_dir))
    assert (Path(config.output_dir) / "best" / "validation.json").exists()


def test_a_validation_that_is_not_finite_is_skipped_and_the_run_goes_on(config, monkeypatch, capsys):
    values = [0.1, float("nan"), 0.3, 0.2]
    found, _ = followed(config, values, monkeypatch)
    assert [record["step"] for record in records(config.output_dir)] == [0, 1, 3, 4]
    assert (found["held_out_first"], found["held_out_last"]) == pytest.approx((0.9, 0.2))
    assert "the validation at step 2 is skipped: a reward of the validation is not finite" in capsys.readouterr().err
    assert found["optimizer_steps"] == 4
    assert '"step": 3' in (Path(config.output_dir) / "best" / "validation.json").read_text()


@pytest.mark.slow
def test_a_run_stops_where_the_held_out_reward_falls(config, monkeypatch, capsys):
    """Eight validations to 0.8 and then a fall; brightness, which is trained on, rises all along."""
    values = [0.1 * i for i in range(8)] + [0.8 - 0.1 * i for i in range(12)]
    found, _ = followed(
        config, values, monkeypatch, early_stop=True, max_train_steps=20, validation_prompts=config.prompts
    )
    steps = found["optimizer_steps"]
    assert 9 < steps < 20
    assert "over-optimised since evaluation" in capsys.readouterr().err
    assert checkpoint.latest(config.output_dir).name == f"checkpoint-{steps}"
    assert (Path(config.output_dir) / lora.WEIGHTS).exists()


@pytest.mark.parametrize(
    ("name", "shape"), [("tensorboard", (2, 3, 4, 5)), ("wandb", (2, 4, 5, 3)), ("comet_ml", None)]
)
def test_trackers_are_shown_numbers_and_pictures(name, shape):
    class Tracker:
        def __init__(self):
            self.name, self.numbers, self.images = name, [], []

        def log(self, values, step):
            self.numbers.append((values, step))

        def log_images(self, values, step):
            self.images.append((values["validation"], step))

    tracker = Tracker()
    trackers.show([tracker], "validation", {"step": 3, "reward_mean": 0.5}, torch.full((2, 3, 4, 5), 0.2))
    assert tracker.numbers == [({"validation/reward_mean": 0.5}, 3)]
    assert [(i.shape, i.dtype, i.max(), step) for i, step in tracker.images] == (
        [(shape, "uint8", 51, 3)] if shape else []
    )


@pytest.mark.parametrize(
    ("more", "at_once", "judged"),
    [({}, 1, 2), ({"decode_batch": 2}, 2, 2), ({"memory_budget": "4GiB"}, 1, 1)],
    ids=["default", "decode_batch", "memory_budget"],
)
def test_a_validation_decodes_and_judges_as_a_step_does(config, more, at_once, judged):
    config, pipe, decoded, scored = replace(config, **more), pipelines.sd(), [], []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: decoded.append(len(args[0])))
    scorer = lambda images, prompts: scored.append(len(images)) or images.mean((1, 2, 3))  # noqa: E731
    validator = validation.Validator(config, ["red", "blue", "red"], CFG(2.0), {"reward": scorer})
    found = validation.validate(validator, pipe, checkpoint.State(0, {}, {}))
    assert max(decoded) == at_once and max(scored) == judged and sum(decoded) == sum(scored) == 3
    assert found.record["reward_mean"] == pytest.approx(found.images.mean().item(), abs=1e-6)
    assert not pipe.vae.use_slicing


def test_a_validation_decodes_in_the_tiles_that_are_asked_for(config):
    pipe, decoded = pipelines.sd(), []
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: decoded.append(max(args[0].shape[-2:])))
    validator = validation.Validator(replace(config, enable_vae_tiling=True), ["red"], CFG(2.0), {"r": Brightness()})
    found = validation.validate(validator, pipe, checkpoint.State(0, {}, {}))
    assert found.images.shape == (1, 3, 16, 16) and len(decoded) > 1 and max(decoded) == 4
    assert not pipe.vae.use_tiling
