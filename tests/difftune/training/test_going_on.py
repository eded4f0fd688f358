"""Training goes on from the LoRA of another run: its first images, its reference, its result, and what does not fit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from difftune.files import checkpoint
from difftune.pipelines import lora
from difftune.recipes import check_recipe, train, train_in_folder
from rewards.simple import Brightness
from tests.support import dits, pipelines
from tests.support.toys import session_of, toy


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run of AlignProp."""
    folder = tmp_path_factory.mktemp("alignprop")
    config = toy("alignprop", folder, max_train_steps=1, learning_rate=0.1, output_dir=str(folder / "first"))
    train_in_folder(config, [].append, pipelines.sd(), Brightness())
    return folder / "first"


@pytest.fixture
def first(made, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "first"))


def test_the_first_images_are_those_of_the_loaded_lora(first, tmp_path):
    session = session_of(toy("dpo", tmp_path, lora=str(first)), pipelines.sd(), Brightness())
    plain = pipelines.sd()
    plain.load_lora_weights(first)
    other = session_of(toy("dpo", tmp_path), pipelines.sd(), Brightness())
    ours, others = (s.images.latents(s.images.begin(s.prompts, range(2))) for s in (session, other))
    own = replace(session.images, denoiser=replace(session.images.denoiser, network=plain.unet))
    theirs = own.latents(own.begin(session.prompts, range(2)))
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(ours, others, atol=1e-3)


@pytest.mark.parametrize("name", ["ddpo", "adjoint-matching"])
def test_what_is_measured_against_is_the_base_or_the_start(name, first, tmp_path):
    """At the first step nothing has moved from the start; from the base the LoRA has."""
    term = {"ddpo": ("kl_weight", "loss"), "adjoint-matching": ("steps_per_image", "control")}[name]
    found = {}
    for reference in ("base", "start"):
        more = {"lora": str(first), "reference": reference, "max_train_steps": 1, "guidance": "none", term[0]: 2}

        class Constant(Brightness):
            def __call__(self, images, prompts):
                return 0 * super().__call__(images, prompts) + 0.7

        said: list[str] = []
        ((metrics, _),) = train(toy(name, tmp_path, **more), None, pipelines.sd(), Constant(), said.append)
        found[reference] = metrics[term[1]]
        assert any(line.startswith(f"lora: goes on from {first}; the reference is the model") for line in said)
    assert found["base"] > 0 and found["start"] == pytest.approx(0, abs=1e-7 * found["base"])


def test_the_result_of_two_recipes_loads_in_a_plain_pipeline(first, tmp_path):
    config = toy("nft", tmp_path, lora=str(first), max_train_steps=1, output_dir=str(tmp_path / "second"))
    pipe = pipelines.sd()
    train_in_folder(config, [].append, pipe, Brightness())
    assert f"It went on from the LoRA {first}." in (tmp_path / "second" / "README.md").read_text()
    before, after = (load_file(folder / lora.WEIGHTS) for folder in (first, tmp_path / "second"))
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    plain = pipelines.sd()
    plain.load_lora_weights(tmp_path / "second")
    kw = {"prompt": "red", "num_inference_steps": 2, "output_type": "latent"}
    images = [p(**kw, generator=torch.Generator().manual_seed(0)).images for p in (pipe, plain)]
    assert torch.allclose(*images, atol=1e-5)


def test_a_run_against_its_start_is_resumed_bit_for_bit_unless_that_has_changed(first, tmp_path):
    config = toy("dpo", tmp_path, lora=str(first), reference="start", max_train_steps=2)
    states = [state for _, state in train(config, None, pipelines.sd(), Brightness())]
    path = checkpoint.save(tmp_path / "out", states[0])
    ((_, resumed),) = train(config, checkpoint.load(path), pipelines.sd(), Brightness())
    assert all(torch.equal(resumed.tensors[name], value) for name, value in states[1].tensors.items())
    (first / lora.WEIGHTS).write_bytes((first / lora.WEIGHTS).read_bytes()[:-4] + bytes(4))
    with pytest.raises(ValueError, match="has changed since the run began"):
        next(train(config, checkpoint.load(path), pipelines.sd(), Brightness()))


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"rank": 3}, "has rank 2, not 3: give --rank 2"),
        ({"lora_alpha": 5}, "has lora_alpha 2, not 5: give --lora_alpha 2"),
        ({"lora_layers": "attention+ff+conv"}, r"has lora_layers attention, not attention\+ff\+conv"),
        ({"full_finetuning": True}, "leave --full_finetuning out"),
    ],
)
def test_settings_that_are_not_the_loras_are_one_sentence(more, what, first, tmp_path):
    with pytest.raises(ValueError, match=what) as error:
        check_recipe(toy("alignprop", tmp_path, lora=str(first), **more))
    assert "\n" not in str(error.value)


def test_what_is_not_there_or_does_not_fit_is_one_sentence(first, tmp_path):
    with pytest.raises(ValueError, match="holds no pytorch_lora_weights"):
        check_recipe(toy("alignprop", tmp_path, lora=str(tmp_path)))
    with pytest.raises(ValueError, match="reference 'start' is the model with the LoRA of --lora"):
        check_recipe(toy("alignprop", tmp_path, reference="start"))
    with pytest.raises(ValueError, match="does not fit this SD3Transformer2DModel"):
        next(train(toy("alignprop", tmp_path, lora=str(first)), None, dits.sd3(), Brightness()))
