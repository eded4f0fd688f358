"""The command line: every contract that needs no trained weights, on a small random pipeline."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from difftune.cli.command import Command
from difftune.cli.fields import options_of
from difftune.cli.program import cli
from difftune.configs.noise import RenoConfig
from difftune.recipes import RECIPES
from rewards.registry import REWARDS, Entry
from tests.support.pipelines import sd

STEPS = ["--steps", "2"]


def call(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def refuse(code, *arguments, saying):
    """Exit code, and one sentence on stderr that says each of `saying`; nothing on stdout."""
    result = call(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    for words in saying:
        assert words in result.stderr


# ------------------------------------------------------------------------------------------------ sample


def test_sample_writes_images_a_grid_and_its_settings(model, tmp_path):
    out = tmp_path / "out"
    result = succeed(
        "sample",
        "--model",
        model,
        "--guidance",
        "cfg",
        "--guidance_scale",
        5,
        "--prompt",
        "a red circle",
        "--num_images",
        4,
        "--seed",
        7,
        "--output_dir",
        out,
        "--json",
        *STEPS,
    )
    found = json.loads((out / "sample.json").read_text())
    assert json.loads(result.stdout) == found
    names = [f"{i:05d}-seed{7 + i}.png" for i in range(4)]
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, "grid.png", "sample.json"])
    assert [(i["file"], i["seed"], i["nfe"]) for i in found["images"]] == [(n, 7 + i, 4) for i, n in enumerate(names)]
    assert found["nfe_by_branch"] == {"cond": 2, "uncond": 2}
    assert found["settings"]["guidance_options"] == {"scale": 5.0}
    width, height = Image.open(out / "grid.png").size
    assert height == 2 * 128 + 2 + 16 < width  # two rows of enlarged pictures, the prompt beside them


def test_an_image_depends_on_its_seed_alone(model):
    from difftune.pipelines.generate import Sampling, generate_batches
    from difftune.pipelines.opened import open_pipeline
    from guidance.methods.catalogue import CFG

    pipe = open_pipeline(model)
    prompts, seeds = ["a red circle", "a blue square"] * 2, [0, 1, 2, 3]
    together = torch.cat([b.images for b in generate_batches(pipe, prompts, seeds, CFG(5.0), Sampling(2))])
    alone = torch.cat([b.images for b in generate_batches(pipe, prompts, seeds, CFG(5.0), Sampling(2, 1))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert len({image.numpy().tobytes() for image in together}) == 4


def test_guidance_keys_agree_with_the_short_flag_and_the_pipeline(model, tmp_path):
    """--guidance.scale, --guidance_scale and the file give one picture: the stock pipeline's at that scale."""
    (tmp_path / "file.yaml").write_text(f"model: {model}\nguidance.scale: 3\nprompt: a red circle\nsteps: 2\n")
    base = ["sample", "--model", model, "--prompt", "a red circle", *STEPS]
    calls = {
        "dotted": [*base, "--guidance.scale", 3],
        "equals": [*base, "--guidance.scale=3"],
        "short": [*base, "--guidance_scale", 3],
        "file": ["sample", "--config", tmp_path / "file.yaml"],
        "flags win": ["sample", "--config", tmp_path / "file.yaml", "--guidance.scale", 4],
    }
    for name, arguments in calls.items():
        succeed(*arguments, "--output_dir", tmp_path / name)
    pictures = {n: np.asarray(Image.open(tmp_path / n / "00000-seed0.png")) for n in calls}
    pipe = sd()
    stock = pipe("a red circle", num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(0))
    for name in ("dotted", "equals", "short", "file"):
        assert (pictures[name] == np.asarray(stock.images[0])).all(), name
    scales = [json.loads((tmp_path / n / "sample.json").read_text())["settings"]["guidance_options"] for n in calls]
    assert scales == [{"scale": 3.0}] * 4 + [{"scale": 4.0}]


# ------------------------------------------------------------------------------------------------ eval


def test_eval_prints_scores_with_intervals_and_pairs_with_a_baseline(model, tmp_path):
    base = ["eval", "--model", model, "--images_per_prompt", 2, "--prompts_per_category", 1, *STEPS]
    first = json.loads(succeed(*base, "--json", "--output_dir", tmp_path / "eval").stdout)
    assert json.loads((tmp_path / "eval" / "eval.json").read_text()) == first
    names = ["overall", "one_object", "two_objects", "counting", "colors", "position", "attribute_binding"]
    assert list(first)[:7] == names
    assert all({"score", "low", "high"} == first[name].keys() for name in names)
    assert first["nfe"] == 4 and first["nfe_by_branch"] == {"cond": 2, "uncond": 2} and len(first["images"]) == 12
    (tmp_path / "base.json").write_text(json.dumps(first))
    unguided = [*base, "--guidance", "none", "--baseline", tmp_path / "base.json"]
    second = json.loads(succeed(*unguided, "--json", "--output_dir", tmp_path / "second").stdout)
    assert "not adjusted for the number of categories" in (tmp_path / "second" / "report.html").read_text()
    assert second["nfe"] == 2 and list(second["difference"]) == names
    (tmp_path / "hard.txt").write_text("four red circles\n")
    third = json.loads(succeed(*base, "--prompts", tmp_path / "hard.txt", "--json").stdout)
    assert list(third)[:2] == ["overall", "larger_counts"] and len(third["images"]) == 2
    (tmp_path / "hard.txt").write_text("a red blue circle\n")
    refuse(2, *base, "--prompts", tmp_path / "hard.txt", saying=["one object has one colour, not red and blue"])
    refuse(2, *base, "--baseline", model, saying=["Is a directory"])
    refuse(2, *base, "--lora", tmp_path, saying=["--lora", "pytorch_lora_weights.safetensors"])


# ------------------------------------------------------------------------------------------------ score, lists


def test_score_weighs_rewards(picture):
    for flags in (["--reward", "brightness", "jpeg=-0.5"], ["--reward", "brightness", "--reward=jpeg=-0.5"]):
        (found,) = json.loads(succeed("score", *flags, picture, "--json").stdout)
        assert found["total"] == pytest.approx(found["rewards"]["brightness"] - 0.5 * found["rewards"]["jpeg"])
    assert "jpeg" in succeed("score", "--reward", "jpeg", picture).stdout


def test_the_first_page_says_where_to_begin():
    said = " ".join(succeed("--help").stdout.split())
    assert "`difftune demo` shows all of it" in said and "`difftune COMMAND --help` has the flags" in said


def test_lists_and_doctor_print_json_alone():
    found = json.loads(succeed("methods", "--json").stdout)
    assert {"guidance", "samplers", "searches", "noise", "rewards", "recipes"} == found.keys()
    about = {entry["name"]: entry for entry in found["recipes"]}
    assert about.keys() == RECIPES.keys() and all(entry["forwards"] for entry in about.values())
    assert about["alignprop"]["needs_gradient"] and not about["grpo"]["needs_gradient"]
    assert about["nft"]["policy"].startswith("off-policy") and about["grpo"]["forwards"] == "T + 3W"
    assert ("ag", "AdaptiveGuidance") in [(entry["name"], entry["python"]) for entry in found["guidance"]]
    assert [entry["python"] for entry in found["noise"]] == ["ReNO"]
    assert all(entry["name"] and entry["summary"] for entries in found.values() for entry in entries)
    assert "cfg" in succeed("methods").stdout
    said = [entry["summary"] for kind, entries in found.items() if kind != "rewards" for entry in entries]
    assert all(
        words[-1] == "." and words[-2] not in ":,." for words in said
    )  # whole sentences, without what a formula follows
    found = json.loads(succeed("doctor", "--json").stdout)
    assert found["libraries"]["torch"] == torch.__version__.partition("+")[0]
    assert "cpu" in [device["name"] for device in found["devices"]]
    assert "torch" in succeed("doctor").stdout


# ------------------------------------------------------------------------------------------------ bad input


def test_unknown_names_are_refused_with_the_nearest(model, picture, tmp_path):
    out = ["--output_dir", tmp_path / "out"]
    base = ["sample", "--model", model, "--prompt", "a red circle", *out]
    refuse(2, "sample", "--model", "tinny", "--prompt", "x", *out, saying=["'tinny'", "'tiny'"])
    refuse(2, *base, "--guidance", "cgf", saying=["'cgf'", "'cfg'"])
    refuse(2, *base, "--guidance.scal", 3, saying=["'scal'", "'scale'"])
    refuse(2, *base, "--guidance.scale", "high", saying=["guidance.scale", "'high'"])
    refuse(2, *base, "--guidance.scale", saying=["--guidance.scale needs a value"])
    refuse(2, *base, "--sede", 3, saying=["--sede", "--seed"])
    refuse(2, *base, "--steps", 0, saying=["0", "it must be from 1 to 1000"])
    refuse(2, "score", "--reward", "jpge", picture, saying=["'jpge'", "'jpeg'"])
    refuse(2, "score", "--reward", "jpeg=much", picture, saying=["jpeg=much"])
    refuse(2, "score", "--reward", "jpeg", "jpeg=2", picture, saying=["'jpeg' is given twice"])
    refuse(2, "train", "alignprop", "--model", model, "--reward", "tiny-clup", *out, saying=["'tiny-clip'"])
    refuse(2, "optimize", "--model", model, "--prompt", "x", "--reward", "tiny-clup", *out, saying=["'tiny-clip'"])
    refuse(2, "smaple", saying=["smaple"])
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_of_a_file_is_refused(tmp_path):
    path = tmp_path / "file.yaml"
    wrong = {
        "max_train_stesp: 3": [str(path), "'max_train_steps'"],
        "guidance.scal: 3": ["'scale'"],
        "rank: 7.5": ["--rank", "'7.5'"],
        "rank: [3]": [str(path), "one value"],
        "- 1": [str(path), "key: value"],
        "a: [": [str(path), "cannot read"],
    }
    for text, words in wrong.items():
        path.write_text(text)
        refuse(2, "train", "alignprop", "--config", path, saying=words)
    refuse(2, "train", "alignprop", "--config", tmp_path / "absent.yaml", saying=["absent.yaml"])


def test_empty_prompts_are_refused(model, tmp_path):
    (tmp_path / "file.yaml").write_text("prompt: []")
    out = ["--model", model, "--output_dir", tmp_path / "out"]
    for command in ("sample", "optimize"):
        refuse(2, command, *out, saying=["--prompt"])
        refuse(2, command, "--config", tmp_path / "file.yaml", *out, saying=["--prompt"])
        refuse(2, command, "--prompt", "a red circle", " ", *out, saying=["prompt 2 of 2 is empty"])
    (tmp_path / "none.txt").write_text("\n\n")
    train = ["train", "alignprop", *out, "--reward", "brightness"]
    refuse(2, *train, "--prompts", tmp_path / "none.txt", saying=["none.txt"])
    assert not (tmp_path / "out").exists()


def test_an_image_that_cannot_be_read_is_named(picture, tmp_path):
    broken = tmp_path / "broken.png"
    with open(picture, "rb") as file:
        broken.write_bytes(file.read()[:40])
    (tmp_path / "text.png").write_text("no image")
    for name in ("broken.png", "text.png", "absent.png"):
        refuse(1, "score", "--reward", "brightness", picture, tmp_path / name, saying=[name])


@pytest.mark.parametrize("command", ["sample", "eval", "optimize", "train"])
def test_a_used_output_folder_is_refused_and_stays(command, model, tmp_path):
    (tmp_path / "grid.png").write_text("precious")
    flags = {
        "sample": ["--prompt", "x"],
        "eval": [],
        "optimize": ["--prompt", "x", "--reward", "brightness"],
        "train": ["--reward", "brightness"],
    }[command]
    name = ["train", "alignprop"] if command == "train" else [command]
    refuse(2, *name, "--model", model, *flags, "--output_dir", tmp_path, saying=[str(tmp_path), "--output_dir"])
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("grid.png", "precious")]


class Broken:
    differentiable = True

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3)) * float("nan")


def test_a_reward_that_is_not_finite_is_named(model, picture, tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS, "broken", Entry(Broken, "NaN", needs_prompt=False, differentiable=True, range=(0, 1)))
    refuse(1, "score", "--reward", "broken", picture, saying=["'broken'", "not finite"])
    out = tmp_path / "out"
    flags = ["--model", model, "--prompt", "a red circle", "--reward", "broken", "--output_dir", out]
    last = call("optimize", *flags, "--iterations", 2)
    assert last.exit_code == 1 and "'broken' is not finite" in last.stderr.splitlines()[-1]
    assert not out.exists()


def test_an_unexpected_error_keeps_its_traceback(monkeypatch, picture):
    import difftune.evaluation.score

    monkeypatch.setattr(difftune.evaluation.score, "read_picture", lambda path: {}[path])
    assert isinstance(call("score", "--reward", "brightness", picture).exception, KeyError)


def test_ctrl_c_exits_with_130(monkeypatch, picture):
    import difftune.evaluation.score

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(difftune.evaluation.score, "read_picture", interrupted)
    refuse(130, "score", "--reward", "brightness", picture, saying=["interrupted"])


# ------------------------------------------------------------------------------------------------ flags and help


@pytest.mark.parametrize("config", [*(recipe.config for recipe in RECIPES.values()), RenoConfig])
def test_every_field_is_a_flag_with_help_and_its_default(config):
    params = {p.name: p for p in options_of(config)}
    made = config()
    parsed = Command("x", params=list(params.values())).make_context("x", ["--prompt=x"] * (config is RenoConfig))
    for name in config.__dataclass_fields__:
        assert params[name].help, name
        if name not in ("guidance_options", "prompt"):
            value = parsed.params[name]
            assert (list(value) if isinstance(value, tuple) else value) == getattr(made, name), name


def test_a_config_file_of_every_key_is_read_back(tmp_path, monkeypatch):
    import difftune.recipes
    from difftune.configs.written import settings_yaml

    seen = []
    monkeypatch.setattr(difftune.recipes, "train_in_folder", lambda config: seen.append(config) or {})
    keys = {"rank": 2, "learning_rate": 0.5, "reward": {"brightness": 0.5}, "guidance.scale": 2, "steps": 3}
    keys["gradient"] = None
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(keys))
    succeed("train", "alignprop", "--config", tmp_path / "file.yaml", "--rank", 3)
    (config,) = seen
    assert (config.rank, config.learning_rate, config.reward) == (3, 0.5, ["brightness=0.5"])
    assert (config.guidance_scale, config.guidance_options, config.num_inference_steps) == (2.0, {}, 3)
    (tmp_path / "again.yaml").write_text(settings_yaml(config))
    succeed("train", "alignprop", "--config", tmp_path / "again.yaml")
    assert seen[1] == config
    nested = "smooth[reward=brightness[target=0.25],shifts=4,pixels=3]=0.5"
    succeed("train", "alignprop", "--config", tmp_path / "again.yaml", "--reward", nested)
    (tmp_path / "nested.yaml").write_text(settings_yaml(seen[2]))
    succeed("train", "alignprop", "--config", tmp_path / "nested.yaml")
    assert seen[3] == seen[2] and seen[2].reward == [nested]


def test_help_imports_no_torch():
    script = (
        "import sys; from click.testing import CliRunner; from difftune.cli.program import cli\n"
        "for c in ('train alignprop', 'optimize', 'sample', 'eval', 'score', 'methods', 'doctor', 'demo'):\n"
        "    assert CliRunner().invoke(cli, [*c.split(), '--help']).exit_code == 0, c\n"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'yaml', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
