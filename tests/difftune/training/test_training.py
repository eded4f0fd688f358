"""The parts that recipes share: averages, statistics, optimisers, and what is trained."""

import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from difftune import models, processes
from difftune.configs.recipes import AlignPropConfig
from difftune.errors import UserError
from difftune.files import checkpoint
from difftune.lookup import guidance_named
from difftune.pipelines import full_weights, lora
from difftune.pipelines.generate import Sampling, generate_batches
from difftune.recipes import running, train, train_in_folder
from difftune.rollouts.image_sampler import ImageSampler
from difftune.rollouts.rounds import repeated
from difftune.training import run_folder
from difftune.training.checks import check_training
from difftune.training.network import TrainedNetwork
from difftune.training.numbering import seed_of
from difftune.training.optimizers import OPTIMIZERS
from difftune.training.reward_statistics import PerPrompt
from difftune.training.state import Average, begin_training
from difftune.training.steps import take_step
from rewards.simple import Brightness
from tests.support import dits, pipelines
from tests.support.toys import toy


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.9999])
def test_average_is_diffusers_ema(decay):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    theirs, ours = EMAModel([weight], decay=decay), Average(decay, {"w": weight.detach().clone()})
    for i in range(6):
        weight.data += torch.tensor([0.5, 0.1 * i])
        theirs.step([weight])
        ours.update({"w": weight})
        assert torch.allclose(ours.tensors["w"], theirs.shadow_params[0], rtol=1e-6)
        if decay == 0 or i == 0:
            assert torch.equal(ours.tensors["w"], weight.detach())


def test_advantages_golden_and_the_prompts_own_statistics():
    """r = (1, 2, 3, 4) gives (-1.3416, -.4472, .4472, 1.3416)."""
    few = PerPrompt(size=4, least=3)
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    few.update(["a", "a", "b", "b"], scores.tolist())
    assert few.advantages(["a", "a", "b", "b"], scores).tolist() == pytest.approx(
        [-1.34164, -0.44721, 0.44721, 1.34164], abs=1e-4
    )
    few.update(["a", "a", "a"], [5.0, 7.0, 9.0])  # the latest four: 2, 5, 7, 9
    assert few.moments()["a"] == (4, 5.75, pytest.approx((26.75 / 4) ** 0.5))
    found = few.advantages(["a", "b"], torch.tensor([5.75, 3.0]))
    assert found[0] == 0 and found[1] < 0
    assert few.advantages(["c"] * 3, torch.ones(3)).tolist() == [0.0] * 3
    again = PerPrompt(size=4, least=3)
    again.load(few.state())
    assert again.moments() == few.moments()
    few.update([str(i) for i in range(5000)], [0.0] * 5000)
    assert len(few.history) == few.prompts and "a" not in few.history


TRAINED = {
    **{name: (getattr(dits, name), "cfg") for name in ("sd3", "pixart", "sana")},
    "sdxl": (pipelines.sdxl, "cfg"),
    "flux": (dits.flux, "none"),
    **{name: (pipelines.sd, name) for name in ("pag", "slg", "seg")},
    **{f"{name} slg": (getattr(dits, name), "slg") for name in ("sd3", "flux")},
    **{f"{name} pag": (getattr(dits, name), "pag") for name in ("pixart", "sana")},
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("flux") else name for name in TRAINED]
)
@pytest.mark.sampled(3)
def test_what_is_trained_is_the_network_itself_in_every_family_and_under_methods_that_patch_it(case, tmp_path):
    """The images of the network as it is called in training are those of the network, and a gradient reaches it."""
    make, guidance = TRAINED[case]
    config, pipe = toy("alignprop", tmp_path, guidance=guidance, max_train_steps=1), make()
    network = lora.network_of(pipe)
    ends = [
        ImageSampler.of(config, pipe, which).draw(lambda i: "red circle", [0, 1], "full").path.x
        for which in (TrainedNetwork(network, network.dtype), network)
    ]
    assert torch.equal(*ends)
    ((metrics, _),) = train(config, None, pipe, Brightness())
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("linear-ag", {}, "'linear-ag' is fitted to the model that training changes"),
        ("interval:gfcg", {}, "'gfcg' needs the class of each prompt"),
        ("classifier", {}, "'classifier' needs the class of each prompt"),
        ("dynamic", {}, "'dynamic' needs scorers"),
        ("null-text", {}, "'null-text' needs the embeddings of one picture"),
        ("perpneg", {}, "give --guidance.negatives"),
        ("nasa", {}, "give --guidance.negative"),
        ("nag", {}, "give --guidance.negative"),
        ("autoguidance", {"network": "tiny-weka"}, "did you mean 'tiny-weak'"),
        ("cfg-zero", {}, "this model predicts v: give --guidance.zero_steps 0"),
    ],
)
@pytest.mark.parametrize("recipe", ["alignprop", "dpo"])
def test_methods_that_no_flag_can_set_up_are_refused_before_anything_is_loaded(
    recipe, name, options, what, tmp_path, monkeypatch
):
    monkeypatch.setattr(running, "load_model", None)
    config = toy(recipe, tmp_path, guidance=name, guidance_options=options, output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=what) as error:
        train_in_folder(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


EQUIPPED = {
    "autoguidance": {"network": "tiny-weak"},
    "perpneg": {"negatives": ("a blue square", "a red square")},
    "multi": {"conds": ("cond", "a blue square")},
    "nasa": {"negative": "a blue square"},
    "nag": {"negative": "a blue square"},
    "cfg-zero": {"zero_steps": 0},
}


@pytest.mark.parametrize("name", EQUIPPED)
@pytest.mark.sampled(2)
def test_what_a_method_only_names_is_found_in_training_as_for_images(name, tmp_path):
    """The images that are trained on are those of `difftune sample`, and a gradient reaches the network."""
    config = toy("alignprop", tmp_path, guidance=name, guidance_options=EQUIPPED[name], max_train_steps=1)
    pipe = models.load("tiny")
    chain = ImageSampler.of(config, pipe, lora.network_of(pipe))
    seeds = [seed_of(config.seed, i) for i in range(2)]
    with torch.no_grad():
        images, texts = chain(lambda i: "red circle", [0, 1], "full")
    method = guidance_named(name, None, EQUIPPED[name])
    (batch,) = generate_batches(pipe, texts, seeds, method, Sampling(config.num_inference_steps, 2))
    assert torch.allclose(images, batch.images.to(images), atol=1e-3)
    for recipe in ("alignprop", "ddpo"):
        its = toy(recipe, tmp_path, guidance=name, guidance_options=EQUIPPED[name], max_train_steps=1)
        ((metrics, _),) = train(its, None, models.load("tiny"), Brightness())
        assert metrics["grad_norm"] > 0


def test_seeds_differ_by_index_seed_and_use():
    seeds = {seed_of(seed, i, use) for seed in range(20) for i in range(50) for use in ("noise", "kl")}
    assert len(seeds) == 2000


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_resumes_bit_for_bit(name, tmp_path):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="needs the extra difftune[8bit]")
        if not torch.cuda.is_available():
            pytest.skip("adamw8bit is tried on a GPU alone: torch.cuda.is_available() is False")
    config = toy("alignprop", tmp_path, optimizer=name, max_train_steps=2, learning_rate=1e-3)

    def final(state=None, steps=None):
        *_, (_, last) = islice(train(config, state, pipelines.sd(), Brightness()), steps)
        return last

    half, whole = final(steps=1), final()
    resumed = final(checkpoint.load(checkpoint.save(tmp_path / "out", half)))
    optimised = [k for k in whole.tensors if k.startswith(("weights.", "optimizer."))]
    assert len(optimised) > 10 and all(torch.equal(whole.tensors[k], resumed.tensors[k]) for k in optimised)
    assert any(not torch.equal(whole.tensors[k], half.tensors[k]) for k in optimised)


def test_lion_steps_by_the_sign():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = OPTIMIZERS["lion"](AlignPropConfig(learning_rate=0.1, adam_weight_decay=0.0), [weight])
    (weight * torch.tensor([1e-3, -5.0, 2.0])).sum().backward()
    optimizer.step()
    assert torch.allclose(weight.detach(), torch.tensor([0.9, 2.1, 2.9]))


def test_8_bit_adam_without_its_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'difftune\[8bit\]'") as error:
        check_training(AlignPropConfig(optimizer="adamw8bit"), pipe=object())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"optimizer": "adam"}, "did you mean 'adamw'"),
        ({"lora_layers": "attentoin"}, "did you mean 'attention'"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"max_skipped_steps": -1}, "max_skipped_steps is -1"),
        ({"early_stop": True}, "early_stop needs validations"),
        ({"validation_reward": "contrast"}, "validation_reward needs validations"),
        ({"validation_steps": 0}, "validation_steps is 0"),
        ({"validation_steps": 5, "early_stop": True}, "give --validation_reward"),
        ({"validation_steps": 5, "validation_reward": "tiny-clip"}, "'tiny-clip' is trained on"),
        ({"validation_steps": 5, "validation_reward": "contrats"}, "did you mean 'contrast'"),
        ({"validation_steps": 5, "validation_prompts": "/nowhere"}, "cannot read the prompts"),
    ],
)
def test_bad_settings_are_one_sentence(more, what):
    with pytest.raises(ValueError, match=what) as error:
        check_training(AlignPropConfig(**more), pipe=object())
    assert "\n" not in str(error.value)


def test_full_fine_tuning_trains_saves_and_loads_the_network(tmp_path):
    config = toy("alignprop", tmp_path, full_finetuning=True, ema_decay=0.5, learning_rate=1e-3, max_train_steps=3)
    pipe = pipelines.sd()
    base = deepcopy(pipe.unet.state_dict())
    config = AlignPropConfig(**{**vars(config), "output_dir": str(tmp_path / "out")})
    train_in_folder(config, [].append, pipe, Brightness())
    state = checkpoint.load(tmp_path / "out" / "checkpoint-3")
    saved = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == base.keys()
    assert any(not torch.equal(saved[k], base[k]) for k in base)
    for key, value in saved.items():  # the average, not the weights
        assert torch.equal(value, state.tensors[f"ema.{key}"])
    assert any(not torch.equal(v, state.tensors[f"weights.{k}"]) for k, v in saved.items())
    fresh = pipelines.sd()
    full_weights.load(fresh, tmp_path / "out")
    assert all(torch.equal(v, saved[k]) for k, v in fresh.unet.state_dict().items())
    assert (tmp_path / "out" / "checkpoint-3" / "unet" / "config.json").exists()
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".unet")]


def test_a_state_of_another_kind_is_refused(tmp_path):
    config = toy("alignprop", tmp_path)
    ((_, state),) = islice(train(config, None, pipelines.sd(), Brightness()), 1)
    other = toy("alignprop", tmp_path, full_finetuning=True)
    with pytest.raises(UserError, match="full_finetuning=False, not True"):
        next(train(other, state, pipelines.sd(), Brightness()))
    assert processes.process().num_processes == 1


@pytest.mark.parametrize("name", ["cfg", "interval", "interval:cfg", "cfgpp"])
def test_a_checkpoint_of_0_1_goes_on_under_the_scale_that_it_was_made_with(name, tmp_path):
    """CFG's was 5 if none was given; today's 7.5 would be another run."""
    config = toy("alignprop", tmp_path, guidance=name)
    ((_, state),) = islice(train(config, None, pipelines.sd(), Brightness()), 1)
    run_folder.same_run(config, state)
    info = {key: value for key, value in state.info.items() if key != "model_digest"}  # which 0.1 did not write
    if name == "cfgpp":
        return run_folder.same_run(config, state._replace(info=info))
    with pytest.raises(UserError, match="made with guidance_scale=5.0, not None: resume with that"):
        run_folder.same_run(config, state._replace(info=info))
    run_folder.same_run(replace(config, guidance_scale=5.0), state._replace(info=info))


DIVIDED = """
import torch
from torch.distributed import destroy_process_group, init_device_mesh
from torch.distributed.fsdp import fully_shard
from difftune.rollouts.rounds import lend_weights
from difftune.training.state import copy_tensors, gather_whole, place_like
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
net = torch.nn.Linear(3, 4)
before = copy_tensors(dict(net.named_parameters()))
fully_shard(net, mesh=mesh)
optimizer = torch.optim.AdamW(net.parameters(), 0.1)
net(torch.ones(2, 3)).square().sum().backward()
optimizer.step()
weights = dict(net.named_parameters())
assert all(w.to_local().numel() < before[n].numel() for n, w in weights.items())
assert all((gather_whole(w) - before[n]).abs().max() > 0.09 for n, w in weights.items())
for name, weight in weights.items():
    for key, value in dict(optimizer.state[weight]).items():
        kept = gather_whole(value).clone()
        back = place_like(weight, key, kept)
        assert kept.shape == (before[name].shape if key != "step" else ())
        assert type(back) is type(value) and torch.equal(gather_whole(back), kept), key
        if key != "step":
            assert torch.equal(back.to_local(), value.to_local())
after = {name: gather_whole(weight).clone() for name, weight in weights.items()}
divided = {name: place_like(weights[name], "weights", tensor) for name, tensor in before.items()}
for values in (before, divided):  # a round's weights, as a checkpoint has them and as the run has
    with lend_weights(weights, values):
        assert all(torch.equal(gather_whole(w), before[n]) for n, w in weights.items())
    assert all(torch.equal(gather_whole(w), after[n]) for n, w in weights.items())
destroy_process_group()
"""


@pytest.mark.slow
def test_what_fsdp2_divides_is_gathered_and_divided_again(tmp_path):
    """Two gloo processes, on a CPU, where accelerate itself does not divide."""
    (tmp_path / "divided.py").write_text(DIVIDED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29743"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    end = subprocess.run([*launch, str(tmp_path / "divided.py")], env=environment, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr


def test_full_fine_tuning_has_a_reference_only_where_it_was_asked_for(tmp_path):
    config = toy("alignprop", tmp_path, full_finetuning=True)
    run = begin_training(config, None, pipelines.sd())
    with pytest.raises(UserError, match="no copy of the network for --full_finetuning"):
        _ = run.reference
    run = begin_training(config, None, pipelines.sd(), reference=True)
    before = [p.clone() for p in run.base.parameters()]
    with torch.no_grad():
        for weight in run.weights.values():
            weight += 1
    assert run.reference.prepared is run.base
    assert all(torch.equal(a, b) for a, b in zip(before, run.base.parameters(), strict=True))


def linear_step(folder, sizes=None, normalized=False, **more):
    """A step of the loss 'mean of b, times the sum of all weights', on two batches: what is reported, and the run."""
    run = begin_training(toy("alignprop", folder, **more), None, pipelines.sd())

    def loss_of(b):
        return b.mean() * sum(weight.sum() for weight in run.weights.values()), {"b": b.mean(), "loss": -b.mean()}

    return take_step(run, [torch.tensor([1.0, 2.0]), torch.tensor([6.0])], loss_of, sizes, normalized), run


@pytest.mark.parametrize(("sizes", "mean"), [([2, 1], 3.0), (None, 3.75)])
def test_a_step_is_the_mean_of_its_batches_by_their_sizes(sizes, mean, tmp_path):
    """The gradient in each weight is the mean of all b."""
    found, run = linear_step(tmp_path, sizes, max_grad_norm=1e9)
    assert (found["b"], found["loss"]) == (pytest.approx(mean), pytest.approx(-mean))
    count = sum(weight.numel() for weight in run.weights.values())
    assert found["grad_norm"] == pytest.approx(mean * count**0.5, rel=1e-5)
    for weight in run.weights.values():
        torch.testing.assert_close(run.optimizer.state[weight]["exp_avg"], torch.full_like(weight, 0.1 * mean))
        assert weight.grad is None


def test_a_gradient_is_clipped_to_its_norm_and_the_norm_before_is_reported(tmp_path):
    found, run = linear_step(tmp_path, max_grad_norm=0.5)
    moments = torch.cat([run.optimizer.state[weight]["exp_avg"].flatten() for weight in run.weights.values()])
    assert found["grad_norm"] > 1 and moments.norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)


@pytest.mark.parametrize(("clip", "norm"), [(1e9, 1e9), (0.5, 0.5)])
def test_a_normalised_gradient_has_the_norm_of_the_clip_whichever_is_greater(clip, norm, tmp_path):
    found, run = linear_step(tmp_path, normalized=True, max_grad_norm=clip)
    moments = torch.cat([run.optimizer.state[weight]["exp_avg"].flatten() for weight in run.weights.values()])
    assert 1 < found["grad_norm"] < 1e6 and moments.norm().item() == pytest.approx(0.1 * norm, rel=1e-4)


def test_the_learning_rate_of_a_step_is_the_schedules(tmp_path):
    config = toy("draft", tmp_path, max_train_steps=3, lr_warmup_steps=2, learning_rate=1e-3)
    found = [metrics["lr"] for metrics, _ in train(config, None, pipelines.sd(), Brightness())]
    assert found == [0.0, pytest.approx(5e-4), pytest.approx(1e-3)]


def test_repeated_prompts_come_in_a_row():
    prompts = repeated(["a", "b"].__getitem__, 3)
    assert [prompts(i) for i in range(6)] == ["a"] * 3 + ["b"] * 3
