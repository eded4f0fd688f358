"""Settings that cannot be meant are refused in one sentence, in every command that has them, before any work."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from difftune.pipelines import lora
from rewards.registry import REWARDS, Entry
from tests.difftune.cli.test_cli import Broken, call, refuse
from tests.support import pipelines

PROMPT, REWARD = ["--prompt", "red"], ["--reward", "brightness"]
COMMANDS = {
    "sample": ["sample", *PROMPT],
    "compare": ["compare", *PROMPT],
    "eval": ["eval"],
    "optimize": ["optimize", *PROMPT, *REWARD],
    "search": ["search", "fk", *PROMPT, *REWARD],
    "alignprop": ["train", "alignprop", *REWARD],
    "dragon": ["train", "dragon", *REWARD],
    "dpo": ["train", "dpo", *REWARD],
}
GUIDED = ("sample", "eval", "optimize", "search", "alignprop", "dpo")
EMPTY = ["--guidance", "interval", "--guidance.low", "5", "--guidance.high", "1"]

MANY = {"sample": "--num_images", "compare": "--num_images", "eval": "--images_per_prompt"}
MANY |= {"optimize": "--seeds_per_prompt", "alignprop": "--train_batch_size", "dpo": "--rank"}

WRONG = [
    *((name, EMPTY, "the interval from low=5.0 to high=1.0 is empty") for name in GUIDED),
    *((name, ["--guidance", "seg", "--guidance.sigma", "-1"], "must be above 0") for name in GUIDED),
    *((name, ["--guidance", "rescale", "--guidance.phi", "nan"], "from 0 to 1") for name in GUIDED),
    *((name, ["--output_dir", folder], "has no name") for name in COMMANDS for folder in ("", " ")),
    ("alignprop", ["--lora_dropout", "nan"], "at least 0 and below 1, and finite"),
    ("alignprop", ["--lora_alpha", "0"], "at least 1"),
    ("alignprop", ["--max_grad_norm", "0"], "above 0"),
    ("alignprop", ["--learning_rate", "inf"], "above 0, and finite"),
    ("alignprop", ["--loss_coeff", "nan"], "at least 0, and finite"),
    ("alignprop", ["--truncation_min", "5", "--truncation_max", "2"], "truncation_max is 2"),
    ("alignprop", ["--validation_prompts", "absent.txt"], "absent.txt"),
    ("dragon", ["--encoder", "tiny-clup"], "did you mean 'tiny-clip'"),
    ("dragon", ["--objective", "vendi", "--encoder", "tiny-clup"], "did you mean 'tiny-clip'"),
    ("optimize", ["--target", "nan"], "must be a finite number\n"),
    ("optimize", ["--grad_clip", "0"], "above 0"),
    ("optimize", ["--held_out", "brightness"], "what is held out must be another"),
    ("search", ["--setting", "start=1", "--setting", "stop=0"], "start must be at most stop"),
    *((name, [flag, "9" * 18], "from 1 to 1000000") for name, flag in MANY.items()),
    ("compare", ["--guidance", "cfg", "apg", "cfg"], "--guidance has cfg twice"),
    ("compare", ["--scales", "5", "5.0"], "--scales has 5.0 twice"),
    ("optimize", ["--optimizer", "adam[beta1=0.1, beta1=0.2]"], "'beta1' is given twice"),
    ("search", ["--reward", "jpeg[quality=40, quality=50]"], "'quality' is given twice"),
    ("compare", ["--scales", "nan"], "must be a finite number\n"),
]


@pytest.mark.parametrize(("name", "words", "sentence"), WRONG, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_nonsense_is_refused(name, words, sentence, model, tmp_path, monkeypatch):
    monkeypatch.setattr(UNet2DConditionModel, "forward", None)
    monkeypatch.chdir(tmp_path)
    out = [] if "--output_dir" in words else ["--output_dir", "out"]
    done = call(*COMMANDS[name], "--model", model, "--num_inference_steps", 12, *out, *words)
    assert (done.exit_code, done.stdout) == (2, "") and sentence in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_nonsense_of_commands_without_a_model(picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("", " "):
        refuse(2, "demo", "--output_dir", folder, saying=["has no name"])
    refuse(2, "score", "--reward", "tiny-clip", "--prompt", " ", "--", picture, saying=["one is empty"])
    refuse(2, "score", "--reward", "brightness=inf", "--", picture, saying=["finite number"])
    refuse(2, "label", "--images", tmp_path, "--grid", 10, saying=["from 2 to 9"])
    refuse(2, "rewards", "serve", "brightness", "--max_images", 0, saying=["from 1 to 1000000"])
    refuse(2, "rewards", "serve", "brightness", "--device", "cpuu", saying=["there is no device 'cpuu'"])
    refuse(2, "export", "--lora", tmp_path, "--format", "kohia", "x.safetensors", saying=["kohia"])
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_a_run_without_a_step_is_an_error_and_saves_no_weights(model, tmp_path, monkeypatch):
    entry = Entry(Broken, "NaN", needs_prompt=False, differentiable=True, range=(0, 1))
    monkeypatch.setitem(REWARDS, "broken", entry)
    words = ["train", "alignprop", "--model", model, "--reward", "broken", "--output_dir", tmp_path / "out"]
    done = call(*words, "--steps", 1, "--train_batch_size", 1, "--max_train_steps", 2)
    assert done.exit_code == 1 and done.stdout == ""
    assert "no optimiser step was taken: all 2 were skipped" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / lora.WEIGHTS).exists() and not (tmp_path / "out" / "README.md").exists()


def test_a_model_of_weights_that_are_not_finite_draws_and_trains_nothing(tmp_path):
    pipe = pipelines.sd()
    with torch.no_grad():
        pipe.unet.conv_out.weight.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "m")
    for name in ("sample", "eval", "compare", "optimize", "search", "alignprop"):
        rest = ["--max_train_steps", 1, "--train_batch_size", 1] if name == "alignprop" else []
        rest += ["--prompts_per_category", 1, "--images_per_prompt", 1] if name == "eval" else []
        words = [*COMMANDS[name], "--model", tmp_path / "m", "--num_inference_steps", 1 if name != "search" else 3]
        done = call(*words, *rest, "--output_dir", tmp_path / name)
        assert done.exit_code == 1 and done.stdout == "" and isinstance(done.exception, SystemExit), (name, done.stderr)
        assert done.stderr.splitlines()[-1].startswith("difftune: "), (name, done.stderr)
        assert name in ("alignprop", "search") or not (tmp_path / name).exists()  # these can be gone on from


def test_a_memory_that_is_full_is_one_sentence(picture, monkeypatch):
    import difftune.evaluation.score

    def full(path):
        return torch.empty(1 << 50)

    monkeypatch.setattr(difftune.evaluation.score, "read_picture", full)
    refuse(1, "score", "--reward", "brightness", picture, saying=["there is not enough memory"])

    def broken(path):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(difftune.evaluation.score, "read_picture", broken)
    assert isinstance(call("score", "--reward", "brightness", picture).exception, RuntimeError)


def test_an_adapter_is_given_once_however_it_is_spelled(model, tmp_path, monkeypatch):
    pipe = pipelines.sd()
    lora.add(pipe, rank=2)
    lora.save(pipe, tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    words = ["sample", *PROMPT, "--model", model, "--output_dir", "out", "--lora"]
    for again in ("a", "./a", "a/", tmp_path / "a"):
        refuse(2, *words, "a=0.5", f"{again}=0.5", saying=["is given twice"])
