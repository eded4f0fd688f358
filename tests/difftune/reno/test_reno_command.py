"""`difftune optimize`: its files, its resumption, and the noise that `difftune sample` takes."""

import json
from dataclasses import fields, replace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from difftune.cli.program import cli
from difftune.configs.noise import RenoConfig
from difftune.errors import UserError
from difftune.files.output import png
from difftune.files.pictures import read_picture
from difftune.reno import optimizer, run_folder
from difftune.reno.paper import PAPER, Setting
from difftune.reno.settings import NoiseSettings
from guidance.methods.cfg import CFG, Plain
from tests.support import pipelines

PROMPTS = ["red circle", "blue square"]


@pytest.fixture(scope="module")
def pipe():
    return pipelines.sd()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipelines.sd().save_pretrained(folder)
    return folder


def settings(out, **more) -> RenoConfig:
    return RenoConfig(**{"prompt": PROMPTS, "reward": ["brightness=-1"], "output_dir": str(out), **more})


OTHER = {"num_inference_steps": 3, "sampler": "ancestral", "guidance": "cfg", "embedded_guidance": 2.0, "height": 32,
         "width": 16, "setting": "sd-turbo", "variables": "both", "optimizer": "adam", "learning_rate": 0.3,
         "grad_clip": 0.7, "regularizer": "spectral", "regularization_weight": 0.2, "patience": 4,
         "reward_scaling": "range", "target": 0.9,
         "max_distance": 0.4, "gradient": "checkpoint", "memory_budget": "3GiB",
         "offload": True, "decode_batch": 2, "enable_vae_tiling": True}  # fmt: skip


def test_each_setting_of_a_noise_has_its_flag_and_reaches_it_by_name(pipe):
    names = {field.name for field in fields(NoiseSettings)} - {"timesteps"}  # which a paper's setting gives
    assert names == OTHER.keys() and all(getattr(RenoConfig(), name) != OTHER[name] for name in names)
    reno = run_folder.make_reno(RenoConfig(reward=["brightness"], **OTHER), pipe, None)
    found = {name: getattr(reno, name) for name in names}
    assert found == {**OTHER, "guidance": CFG(7.5)}
    assert run_folder.noise_settings(RenoConfig()) == NoiseSettings(guidance=Plain())


def test_run_writes_pictures_paths_curves_and_the_noise(pipe, tmp_path):
    out, said = tmp_path / "out", []
    config = settings(out, prompt=[*PROMPTS, "red square"], iterations=3, batch_size=2, held_out="contrast")
    summary = run_folder.optimize_in_folder(config, said.append, pipe)
    each = [f"{i:03d}-{when}" for i in range(3) for when in ("after.png", "before.png", "path.gif")]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*each, "config.yaml", "curves.png", "grid.png", "noise.safetensors", "optimize.json"]
    )
    width, height = Image.open(out / "grid.png").size
    assert width > 2 * 128 + 100 and height > 3 * 128 + 3 * 18  # the prompts beside the pairs, rewards above them
    assert json.loads((out / "optimize.json").read_text()) == summary
    assert summary["reward_after"] >= summary["reward_before"] and len(summary["prompts"][2]["history"]) == 3
    assert [p["seed"] for p in summary["prompts"]] == [0, 1, 2]
    assert {"held_out_before", "held_out_after", "parting"} <= summary.keys()
    for sample in summary["prompts"]:
        best = sample["history"][sample["best_iteration"]]
        assert best["total"] == sample["reward_after"] and best["total"] == -best["rewards"]["brightness"]
        assert {"parting", "stopped", "reward_calls"} <= sample.keys()
    held = [s["history"][s["best_iteration"]]["held_out"] for s in summary["prompts"]]
    assert summary["held_out_after"] == pytest.approx(sum(held) / 3)
    with Image.open(out / "000-path.gif") as path:
        assert path.n_frames == 3 and path.size == (16, 16)
    with Image.open(out / "curves.png") as curves:
        assert curves.size == (720, 648)  # three panels: the reward, the held-out one, the regulariser
    noise = load_file(out / "noise.safetensors")["noise"]
    alone = run_folder.optimize_in_folder(
        replace(config, prompt=["red square"], seed=2, output_dir=str(tmp_path / "b")), said.append, pipe
    )
    assert abs(alone["reward_after"] - summary["prompts"][2]["reward_after"]) < 1e-5
    assert torch.allclose(noise[2:], load_file(tmp_path / "b" / "noise.safetensors")["noise"], atol=1e-5)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(UserError, match="holds another run"):
        run_folder.optimize_in_folder(config, said.append, pipe)
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}


def test_seeds_per_prompt_and_a_webp(pipe, tmp_path):
    config = settings(
        tmp_path / "out",
        iterations=2,
        seeds_per_prompt=2,
        batch_size=3,
        animation="webp",
        optimizer="adam",
        learning_rate=0.5,
    )
    summary = run_folder.optimize_in_folder(config, [].append, pipe)
    assert [(s["prompt"], s["seed"]) for s in summary["prompts"]] == [
        (PROMPTS[0], 0), (PROMPTS[0], 1), (PROMPTS[1], 2), (PROMPTS[1], 3)]  # fmt: skip
    with Image.open(tmp_path / "out" / "003-path.webp") as path:
        assert path.n_frames == 2
    assert load_file(tmp_path / "out" / "noise.safetensors")["noise"].shape == (4, 4, 8, 8)


class Watched:
    """Falls as the picture gets brighter."""

    differentiable = False

    def __call__(self, images, prompts):
        return -images.mean(dim=(1, 2, 3))


def test_a_held_out_reward_that_falls_is_said_with_its_iteration(pipe, tmp_path, monkeypatch):
    """In optimize.json, of each sample and of the mean, and in the last line; silent where it does not fall."""
    config, said = settings(tmp_path / "a", reward=["brightness"], iterations=12, held_out="contrast"), []
    monkeypatch.setattr(run_folder, "reward_named", lambda rewards, gradient: Watched())
    summary = run_folder.optimize_in_folder(config, said.append, pipe)
    parting = summary["parting"]
    assert parting["best"] == 2 and parting["rise"] > 0 and parting["drop"] == pytest.approx(parting["rise"], rel=1e-3)
    assert said[-1].startswith("contrast fell while the reward rose: over-optimised since evaluation 2")
    assert all(sample["parting"]["best"] == 2 for sample in summary["prompts"])
    curves = [[entry["held_out"] for entry in sample["history"]] for sample in summary["prompts"]]
    assert summary["held_out_before"] == pytest.approx((curves[0][0] + curves[1][0]) / 2)
    assert summary["held_out_after"] < summary["held_out_before"]
    said.clear()
    down = run_folder.optimize_in_folder(
        replace(config, reward=["brightness=-1"], output_dir=str(tmp_path / "b")), said.append, pipe
    )
    assert down["parting"] is None and not [line for line in said if "fell" in line]


def test_half_precision_is_of_the_networks_alone(model, tmp_path):
    found = {}
    for kind in ("no", "bf16"):
        config = settings(tmp_path / kind, model=str(model), mixed_precision=kind, iterations=3, num_inference_steps=4)
        found[kind] = run_folder.optimize_in_folder(config, [].append), load_file(tmp_path / kind / "noise.safetensors")
    (exact, noise), (half, same) = found["no"], found["bf16"]
    assert torch.equal(same["noise_before"].bfloat16(), noise["noise_before"].bfloat16())
    assert same["noise"].dtype == torch.float32 and not torch.equal(same["noise"], noise["noise"])
    assert half["reward_after"] == pytest.approx(exact["reward_after"], rel=0.02)
    assert half["reward_after"] != exact["reward_after"]


def test_many_frames_are_thinned_to_both_ends():
    frames = torch.arange(120, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    import io

    with Image.open(io.BytesIO(run_folder.animation(frames, "webp"))) as path:
        assert path.n_frames == run_folder.FRAMES
    assert run_folder.weighted_mean([([1.0, 2.0], 1), ([4.0], 3)]) == [3.25, 3.5]


def test_an_interrupted_run_goes_on_to_the_same_files(pipe, tmp_path, monkeypatch):
    """It breaks in the second of two batches; what is written after resuming is what an unbroken run writes."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    config = settings(broken, iterations=4, batch_size=1, checkpointing_steps=2, held_out="contrast")
    run_folder.optimize_in_folder(replace(config, output_dir=str(whole)), [].append, pipe)
    save, count = run_folder.checkpoint.save, []

    def breaking(*args, **kwargs):
        count.append(save(*args, **kwargs))
        if len(count) == 3:  # after two iterations of the second batch
            raise KeyboardInterrupt

    monkeypatch.setattr(run_folder.checkpoint, "save", breaking)
    with pytest.raises(KeyboardInterrupt):
        run_folder.optimize_in_folder(config, [].append, pipe)
    monkeypatch.setattr(run_folder.checkpoint, "save", save)
    assert [p.name for p in broken.iterdir()] == ["checkpoints"]
    with pytest.raises(UserError, match="unfinished run: go on with --resume_from_checkpoint latest"):
        run_folder.optimize_in_folder(config, [].append, pipe)
    going_on = replace(config, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="made with seed=0, not 1"):
        run_folder.optimize_in_folder(replace(going_on, seed=1), [].append, pipe)
    said = []
    run_folder.optimize_in_folder(going_on, said.append, pipe)
    assert "batch 0: resuming from iteration 4" in said and "batch 1: resuming from iteration 2" in said
    names = sorted(p.name for p in whole.iterdir())
    assert sorted(p.name for p in broken.iterdir()) == names
    for name in names:
        if name not in ("optimize.json", "config.yaml"):  # which have the seconds and the folder
            assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    found = [json.loads((folder / "optimize.json").read_text()) for folder in (broken, whole)]
    assert found[0]["prompts"] == found[1]["prompts"]


def test_sigterm_saves_the_iteration_that_is_under_way(pipe, tmp_path, monkeypatch):
    import os
    import signal

    config = settings(tmp_path / "out", iterations=6, checkpointing_steps=100)
    evaluate = optimizer.ReNO._live

    def live(self, *args):
        found = evaluate(self, *args)
        if found.iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(optimizer.ReNO, "_live", live)
    with pytest.raises(SystemExit) as stopped:
        run_folder.optimize_in_folder(config, [].append, pipe)
    assert stopped.value.code == 143
    assert [p.name for p in (tmp_path / "out" / "checkpoints" / "000").iterdir()] == ["checkpoint-2"]


def test_a_search_needs_no_gradient_on_the_command_line(model, tmp_path):
    """`optimize` on a reward without a gradient, then `sample` from its noise: the same pictures."""
    out, again = tmp_path / "out", tmp_path / "again"
    base = ["--model", str(model), "--prompt", *PROMPTS]
    flags = ["--reward", "jpeg=-1", "--iterations", "3", "--optimizer", "neighbours[candidates=3]"]
    done = CliRunner().invoke(cli, ["optimize", *base, *flags, "--output_dir", str(out), "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [s["reward_calls"] for s in found["prompts"]] == [7, 7]
    assert found["reward_after"] > found["reward_before"]
    flags = ["--guidance", "none", "--steps", "1", "--noise", str(out / "noise.safetensors")]
    done = CliRunner().invoke(cli, ["sample", *base, *flags, "--output_dir", str(again)])
    assert done.exit_code == 0, done.stderr
    for i in range(2):
        made = read_picture(again / f"0000{i}-seed0.png")
        assert (made - read_picture(out / f"{i:03d}-after.png")).abs().max() <= 2 / 255
        assert (made - read_picture(out / f"{i:03d}-before.png")).abs().max() > 2 / 255


def test_a_noise_that_does_not_fit_is_named(model, tmp_path):
    def sample(noise, *prompts):
        base = ["sample", "--model", str(model), "--output_dir", str(tmp_path / "out"), "--noise", str(noise)]
        done = CliRunner().invoke(cli, [*base, "--prompt", *(prompts or PROMPTS)])
        return done.exit_code, done.stderr.splitlines()[-1]

    def file(name, **tensors):
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    two = torch.zeros(2, 4, 8, 8)
    (tmp_path / "text.safetensors").write_text("no tensors")
    for noise, code, what in (
        (tmp_path / "text.safetensors", 1, "cannot read the noise"),
        (tmp_path / "absent.safetensors", 1, "cannot read the noise"),
        (file("a.safetensors", x=two), 2, "holds no noise"),
        (file("b.safetensors", noise=two, embedding=two + 1), 2, "holds a prompt's embedding too"),
        (file("c.safetensors", noise=two[:1]), 2, "holds 1 noises for 2 images"),
        (file("d.safetensors", noise=torch.zeros(2, 3, 8, 8)), 2, "latents are (4, 8, 8)"),
    ):
        found, said = sample(noise)
        assert (found, what in said) == (code, True), said
    assert not (tmp_path / "out").exists()


def test_a_picture_has_the_size_of_the_papers_setting(pipe, tmp_path, monkeypatch):
    monkeypatch.setitem(PAPER, "sd-turbo", Setting((), 24, 5.0))
    (tmp_path / "picture.png").write_bytes(png(torch.rand(24, 24, 3).numpy()))
    config = settings(tmp_path / "out", start=str(tmp_path / "picture.png"), setting="sd-turbo", inversion_steps=2,
                      iterations=1)  # fmt: skip
    run_folder.optimize_in_folder(config, [].append, pipe)
    assert load_file(tmp_path / "out" / "noise.safetensors")["noise_before"].shape == (2, 4, 12, 12)


def test_a_run_begins_with_a_picture_or_with_a_noise(pipe, tmp_path):
    (tmp_path / "picture.png").write_bytes(png(torch.rand(16, 16, 3).numpy()))
    (tmp_path / "small.png").write_bytes(png(torch.rand(8, 8, 3).numpy()))
    config = settings(tmp_path / "a", start=str(tmp_path / "picture.png"), inversion_steps=3, iterations=2,
                      max_distance=0.1, variables="both", num_inference_steps=2)  # fmt: skip
    run_folder.optimize_in_folder(config, [].append, pipe)
    first = load_file(tmp_path / "a" / "noise.safetensors")
    expected = run_folder.make_reno(config, pipe, None).inverted(
        read_picture(tmp_path / "picture.png")[None], PROMPTS[0], 3
    )
    assert torch.allclose(first["noise_before"][0], expected[0], atol=1e-5)
    assert first["embedding"].shape == (2, 16, 16)
    plain = settings(tmp_path / "b", iterations=2)
    run_folder.optimize_in_folder(plain, [].append, pipe)
    onwards = replace(plain, start=str(tmp_path / "b" / "noise.safetensors"), output_dir=str(tmp_path / "c"))
    run_folder.optimize_in_folder(onwards, [].append, pipe)
    made = [load_file(tmp_path / name / "noise.safetensors") for name in "bc"]
    assert torch.equal(made[1]["noise_before"], made[0]["noise"])
    with pytest.raises(UserError, match="is 8 x 8 pixels, and the model makes 16 x 16"):
        run_folder.optimize_in_folder(
            replace(plain, start=str(tmp_path / "small.png"), output_dir=str(tmp_path / "d")), [].append, pipe
        )


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"prompt": []}, "no prompt"),
        ({"reward": ["oracle"]}, "'oracle' is not differentiable"),
        ({"guidance": "cgf"}, "did you mean 'cfg'"),
        ({"model": "tiny-torbo"}, "did you mean 'tiny-turbo'"),
        ({"gradient": "truncated:2"}, "1 to 1"),
        ({"iterations": 0}, "iterations is 0"),
        ({"optimizer": "sgdd"}, "did you mean 'sgd'"),
        ({"optimizer": "cma", "learning_rate": 1.0}, "no option of optimizer 'cma'"),
        ({"regularizer": "chy"}, "did you mean 'chi'"),
        ({"held_out": "orakle"}, "did you mean 'oracle'"),
        ({"setting": "sd-trubo"}, "did you mean 'sd-turbo'"),
        ({"start": "absent.png"}, "absent.png is not a file"),
        ({"patience": 0}, "patience is 0"),
        ({"checkpointing_steps": 0}, "checkpointing_steps is 0"),
        ({"resume_from_checkpoint": "there"}, "resume_from_checkpoint.*latest"),
    ],
)
def test_bad_settings_are_one_sentence_and_nothing_is_written(pipe, tmp_path, more, what):
    with pytest.raises(ValueError, match=what) as error:
        config = settings(tmp_path / "out", **{"reward": ["brightness"], **more})
        run_folder.optimize_in_folder(config, pipe=None if "model" in more else pipe)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
