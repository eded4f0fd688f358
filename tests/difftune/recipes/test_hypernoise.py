"""HyperNoise: its optimum in closed form, that it begins as the base, and what `--noise_lora` draws."""

from dataclasses import replace

import pytest
import torch

from difftune.configs.images import SampleConfig
from difftune.pipelines import lora, noise_lora
from difftune.pipelines.generate import generate
from difftune.pipelines.noise_lora import moved_noises, network_output
from difftune.recipes import check_recipe, hypernoise, train_in_folder
from difftune.recipes.hypernoise import hypernoise_loss, move_noise
from rewards.simple import Brightness
from solvers.latent import LatentModel
from tests.support import dits, pipelines
from tests.support.toys import session_of, toy


def test_the_optimum_of_a_linear_generator_is_the_exact_tilt():
    """g(z) = G z and r = b . x: f = G^T b, with the theory's weight, which is half the number of elements; and the
    stationary point is where f = grad r(g(z + f))."""
    g = torch.tensor([[1.0, 0.5], [0.0, 2.0]], dtype=torch.float64)
    b = torch.tensor([0.3, -0.2], dtype=torch.float64)
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(60):
        moved = (z + shift) @ g.T
        (gradient,) = torch.autograd.grad(hypernoise_loss(moved @ b, shift.expand(5, 2), weight=1.0), shift)
        shift = (shift - 0.5 * gradient).detach().requires_grad_()
    assert shift.tolist() == pytest.approx([0.3, -0.25], abs=1e-9)


def test_loss_by_hand():
    found = hypernoise_loss(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, -1.0], [0.0, 2.0]]), 0.5)
    assert found.item() == pytest.approx(-1.5 + 0.5 * 6 / 4)


@pytest.mark.parametrize("make", [pytest.param(pipelines.sd_turbo, marks=pytest.mark.slow), dits.sd3])
@pytest.mark.sampled(2)
def test_the_first_step_is_the_bases_and_one_update_raises_the_reward(make, tmp_path):
    config = toy("hypernoise", tmp_path, guidance="none", num_inference_steps=1, train_batch_size=4)
    session = session_of(replace(config, regularization_weight=0.0), make(), Brightness())
    with hypernoise.attempt_step(session.run, 0) as metrics:
        metrics.update(move_noise(session, 0))
    images = session.images
    start = images.begin(session.prompts, range(4))
    base = images.with_network(session.run.reference)
    plain = base.model.decode(base.latents(base.begin(session.prompts, range(4))))
    assert metrics["kl"] == 0
    assert metrics["reward_mean"] == pytest.approx(Brightness()(plain, start.prompts).mean().item())
    again = move_noise(session, 0)
    assert again["reward_mean"] > metrics["reward_mean"] and again["kl"] > 0


def test_what_sample_draws_from_is_what_training_moved(tmp_path):
    """By the pipeline's own numbers of each seed; the pipeline's adapter is as it was afterwards."""
    pipe = pipelines.sd_turbo()
    lora.add(pipe, 2, seed=1)
    with torch.no_grad():
        for weight in lora.weights(pipe.unet).values():
            weight += 0.1
    model, prompts, seeds = LatentModel(pipe), ["red circle", "blue square", "red"], [3, 4, 5]
    found = moved_noises(pipe, prompts, seeds, 1, batch_size=2)
    levels = model.levels(1)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        z = model.noise(1, torch.Generator().manual_seed(seed))
        cond, x = model.encode(prompt)["cond"], model.start_scale(levels) * z
        with torch.no_grad():
            tuned = network_output(model.denoiser, x, levels[0], cond)
            with lora.off(pipe.unet):
                base = network_output(model.denoiser, x, levels[0], cond)
        assert not torch.equal(tuned, base)
        assert torch.allclose(found[row], (z + tuned - base)[0], atol=1e-5)
    assert torch.equal(network_output(model.denoiser, x, levels[0], cond), tuned)


@pytest.mark.slow
def test_a_run_is_sampled_with_its_noise_lora(tmp_path):
    pipe = pipelines.sd_turbo()
    pipe.save_pretrained(tmp_path / "base")
    config = toy("hypernoise", tmp_path, guidance="none", num_inference_steps=1, max_train_steps=1)
    train_in_folder(replace(config, output_dir=str(tmp_path / "run")), [].append, pipe, Brightness())
    assert "noise_lora=" in (tmp_path / "run" / "README.md").read_text()
    common = {"model": str(tmp_path / "base"), "prompt": ["red"], "guidance": "none", "num_inference_steps": 1}
    generate(SampleConfig(**common, output_dir=str(tmp_path / "plain")))
    found = generate(SampleConfig(**common, output_dir=str(tmp_path / "moved"), noise_lora=str(tmp_path / "run")))
    assert found["settings"]["noise_lora"] == str(tmp_path / "run")
    files = [next((tmp_path / name).glob("0*.png")).read_bytes() for name in ("plain", "moved")]
    assert files[0] != files[1]
    with pytest.raises(ValueError, match="holds no pytorch_lora_weights"):
        generate(SampleConfig(**common, output_dir=str(tmp_path / "none"), noise_lora=str(tmp_path / "base")))


def test_an_untrained_lora_moves_nothing():
    pipe = pipelines.sd_turbo()
    lora.add(pipe, 2)
    model = LatentModel(pipe)
    noises = moved_noises(pipe, ["red"], [7], 1)
    assert torch.equal(noises, model.noise(1, torch.Generator().manual_seed(7)))


def test_bad_settings_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="a validation draws with the LoRA in the model"):
        check_recipe(toy("hypernoise", tmp_path, validation_steps=1))
    with pytest.raises(ValueError, match="by a LoRA beside the model: leave full_finetuning out"):
        check_recipe(toy("hypernoise", tmp_path, full_finetuning=True))
    with pytest.raises(ValueError, match="reference is 'start', but the noise is moved by .*: leave reference out"):
        hypernoise.check_hypernoise(toy("hypernoise", tmp_path, lora="run", reference="start"))
    with pytest.raises(ValueError, match="--noise gives the noises and --noise_lora moves drawn ones"):
        generate(SampleConfig(model="tiny", prompt=["red"], output_dir="x", noise="n", noise_lora="l"))


def test_a_network_distilled_over_scales_is_told_the_one_of_its_training(tmp_path, monkeypatch):
    """As the run's config.yaml has it, by the run's folder or by a checkpoint's; without one the network refuses."""
    pipe = dits.flux(guidance_embeds=True)
    lora.add(pipe, 2)
    with torch.no_grad():
        for weight in lora.weights(pipe.transformer).values():
            weight += 0.1
    run = tmp_path / "run"
    for folder in (run, run / "checkpoint-1"):
        folder.mkdir()
        (folder / lora.WEIGHTS).touch()
    monkeypatch.setattr(noise_lora, "open_pipeline", lambda model, folder: pipe)
    with pytest.raises(ValueError, match="pass embedded_guidance"):
        noise_lora.moved_by(str(run), "flux", ["red"], [3], 1)
    (run / "config.yaml").write_text("embedded_guidance: 3.5\n")
    found = [noise_lora.moved_by(str(folder), "flux", ["red"], [3], 1) for folder in (run, run / "checkpoint-1")]
    expected, other = (moved_noises(pipe, ["red"], [3], 1, embedded_guidance=scale) for scale in (3.5, 1.0))
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected) and not torch.equal(expected, other)
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="cannot read the settings of --noise_lora"):
        noise_lora.moved_by(str(run), "flux", ["red"], [3], 1)
