"""Old and new weights under one name are told apart: by runs, adapters and baselines."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from difftune import models
from difftune.configs.images import EvalConfig
from difftune.configs.noise import RenoConfig
from difftune.configs.search import SearchConfig
from difftune.errors import UserError
from difftune.evaluation import shapeeval
from difftune.evaluation.run_folder import run_eval
from difftune.files.claim import claimed
from difftune.pipelines import fingerprint
from difftune.pipelines.fingerprint import digest_of
from difftune.pipelines.opened import open_pipeline
from difftune.recipes import train_in_folder
from difftune.reno import run_folder as reno
from difftune.search_runs import run_folder as search
from rewards.simple import Brightness
from tests.support import pipelines
from tests.support.toys import Bright, toy


@pytest.fixture
def model(tmp_path) -> Path:
    """A model under a name whose weights `retrain` changes."""
    pipelines.sd().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def retrain(model: Path, part: str = "unet") -> None:
    (file,) = (model / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name] + 1}, file, {"format": "pt"})


def test_digest_is_of_the_weights_whatever_the_folder_or_precision(model, tmp_path):
    first = digest_of(models.load(model))
    assert len(first) == 16
    assert digest_of(models.load(model, dtype=torch.float16)) == first
    shutil.copytree(model, tmp_path / "copy")
    assert digest_of(models.load(tmp_path / "copy")) == first
    (tmp_path / "copy/unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant beside it")
    assert digest_of(models.load(tmp_path / "copy")) == first
    assert digest_of(pipelines.sd()) is None  # it was loaded from no files
    for part in ("unet", "vae", "text_encoder"):
        retrain(model, part)
        assert digest_of(models.load(model)) != first
        first = digest_of(models.load(model))


def test_a_large_file_is_sampled_to_both_ends(tmp_path):
    file = tmp_path / "weights"
    with file.open("wb") as opened_file:
        opened_file.truncate(50 * fingerprint.CHUNKS * fingerprint.CHUNK)
    size = file.stat().st_size
    pieces = list(fingerprint._pieces(file, size))
    assert fingerprint.CHUNKS <= len(pieces) <= fingerprint.CHUNKS + 1
    for place in (0, size - 1):
        with file.open("r+b") as opened_file:
            opened_file.seek(place)
            opened_file.write(b"x")
        assert list(fingerprint._pieces(file, size)) != pieces
        pieces = list(fingerprint._pieces(file, size))
    small = tmp_path / "small"
    small.write_bytes(os.urandom(3 * fingerprint.CHUNK + 5))
    assert b"".join(fingerprint._pieces(small, small.stat().st_size)) == small.read_bytes()


OTHER = r"was made with a model of digest \w{16}, and this one's is \w{16}: resume with the weights of the first run"


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.sampled(2)
def test_training_is_not_resumed_on_other_weights_and_its_adapter_says_whose_it_is(model, tmp_path, capsys, full):
    config = replace(toy("alignprop", tmp_path), model=str(model), output_dir=str(tmp_path / "out"), max_train_steps=1)
    config = replace(config, full_finetuning=full)
    train_in_folder(config, [].append, None, Bright())
    open_pipeline(str(model), str(tmp_path / "out"))
    assert "was trained on" not in capsys.readouterr().err
    retrain(model, "vae")
    open_pipeline(str(model), str(tmp_path / "out"))
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "was trained on" in line]
    assert f"--lora {tmp_path / 'out'} was trained on a model of digest" in said
    with pytest.raises(UserError, match=OTHER):
        going_on = replace(config, max_train_steps=2, resume_from_checkpoint="latest")
        train_in_folder(going_on, [].append, None, Bright())


def test_noise_optimisation_is_not_resumed_on_other_weights(model, tmp_path):
    config = RenoConfig(
        prompt=["red circle"],
        reward=["brightness=-1"],
        model=str(model),
        iterations=2,
        checkpointing_steps=1,
        output_dir=str(tmp_path / "out"),
    )
    noise = reno.make_reno(config, models.load(model), None)
    batch = reno.Batch(0, ["red circle"], 0)
    again = replace(config, resume_from_checkpoint="latest")
    with claimed(config.output_dir) as claim:
        reno.optimize_batch(config, noise, batch, None, claim, [].append)
        reno.optimize_batch(again, noise, batch, None, claim, [].append)
        retrain(model)
        other = reno.make_reno(config, models.load(model), None)
        with pytest.raises(UserError, match=OTHER):
            reno.optimize_batch(again, other, batch, None, claim, [].append)


def test_a_search_is_not_resumed_on_other_weights(model, tmp_path):
    config = SearchConfig(
        "best-of-n", ["red circle"], str(model), output_dir=str(tmp_path / "out"), nfe_budget=6, num_inference_steps=3
    )
    search.search_in_folder(config, [].append, models.load(model), Brightness())
    retrain(model)
    with pytest.raises(UserError, match=OTHER):
        search.search_in_folder(
            replace(config, nfe_budget=12, resume_from_checkpoint="latest"), [].append, models.load(model), Brightness()
        )


def test_a_baseline_of_other_weights_is_named(model, tmp_path, capsys):
    small = {"num_inference_steps": 2, "images_per_prompt": 1, "prompts_per_category": 1}
    run_eval(EvalConfig(model=str(model), output_dir=str(tmp_path / "old"), **small))
    baseline = str(tmp_path / "old/eval.json")
    run_eval(EvalConfig(model=str(model), baseline=baseline, **small))
    assert "--baseline" not in capsys.readouterr().err
    retrain(model)
    found = run_eval(EvalConfig(model=str(model), baseline=baseline, **small))
    assert found["settings"]["model_digest"] == digest_of(models.load(model))
    said = [line for line in capsys.readouterr().err.splitlines() if "--baseline" in line]
    assert said == [
        f"--baseline {baseline} was made with model digest {shapeeval.digest_in(baseline)}, "
        f"but {str(model)!r} has {found['settings']['model_digest']}: the two are different models"
    ]
