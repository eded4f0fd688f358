"""AlignProp: its gradient against a hand-written loop, resumption bit for bit, and what it refuses."""

import signal
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml

from difftune.configs.recipes import AlignPropConfig
from difftune.errors import RunError, UserError
from difftune.files import checkpoint, records
from difftune.files.checkpoint import State
from difftune.files.output import beside
from difftune.pipelines import lora
from difftune.recipes import train, train_in_folder
from difftune.recipes.alignprop import alignprop_loss, draw_steps
from difftune.rollouts.image_sampler import ImageSampler
from difftune.training import run_folder
from difftune.training.network import TrainedNetwork
from difftune.training.numbering import sample_numbers, seed_of
from rewards.simple import Brightness
from solvers.latent import LatentModel
from tests.support import pipelines

TOY = AlignPropConfig(
    max_train_steps=4,
    train_batch_size=2,
    num_inference_steps=3,
    truncation_max=3,
    guidance_scale=5.0,
    learning_rate=1e-2,
    max_skipped_steps=0,
)
BRIGHT = Brightness()


@pytest.fixture
def prompts(tmp_path) -> str:
    (tmp_path / "prompts.txt").write_text("red circle\nblue square\nred square\n")
    return str(tmp_path / "prompts.txt")


@pytest.fixture
def toy(prompts) -> AlignPropConfig:
    return replace(TOY, prompts=prompts)


def final(config: AlignPropConfig, state: State | None = None, steps: int | None = None) -> State:
    *_, (_, last) = islice(train(config, state, pipelines.sd(), BRIGHT), steps)
    return last


def same_weights(a: State, b: State) -> bool:
    assert a.tensors.keys() == b.tensors.keys()
    return all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors if not k.startswith("rng"))


# ------------------------------------------------------------------------------------------------ the algorithm


def test_loss_is_minus_the_scaled_mean():
    scores = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    loss = alignprop_loss(scores, 0.5)
    loss.backward()
    assert loss.item() == -1.5
    assert torch.equal(scores.grad, torch.full((3,), -1 / 6))


def gradients(pipe, gradient: str, x: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Gradients of -mean brightness in the LoRA, by our chain or, given x, a loop by hand: DDIM in x0 and eps, CFG."""
    weights = lora.weights(pipe.unet)
    model = LatentModel(pipe)
    if x is None:
        chain = ImageSampler.of(TOY, pipe, TrainedNetwork(pipe.unet, torch.float32))
        images, _ = chain(lambda i: ["red circle", "blue square"][i], [0, 1], gradient)
    else:
        conds = model.encode(["red circle", "blue square"])
        levels = model.levels(TOY.num_inference_steps)
        for now, then in zip(levels[:-1], levels[1:], strict=True):
            timestep = model.denoiser.clock(now)
            c, u = (
                pipe.unet(x, timestep, conds[k]["encoder_hidden_states"]).sample.double() for k in ("cond", "uncond")
            )
            eps = u + 5.0 * (c - u)
            x0 = (x - now.sigma * eps) / now.alpha
            x = (then.alpha * x0 + then.sigma * eps).float()
        images = (pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    loss = alignprop_loss(BRIGHT(images, ["", ""]))
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


@pytest.fixture(scope="module")
def adapted():
    """A pipeline whose adapter is not at its zero start."""
    pipe = pipelines.sd()
    with torch.no_grad():
        for i, weight in enumerate(lora.add(pipe, rank=2).values()):
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    return pipe


def test_gradient_of_all_steps_is_autograds_through_a_loop_by_hand(adapted):
    seeds = [torch.Generator().manual_seed(seed_of(TOY.seed, i)) for i in (0, 1)]
    by_hand = gradients(adapted, "", x=LatentModel(adapted).noise(2, seeds))
    ours = gradients(adapted, "truncated:3")
    scale = max(g.abs().max() for g in by_hand.values())
    assert scale > 0
    for name, expected in by_hand.items():
        assert torch.allclose(ours[name], expected, rtol=1e-3, atol=1e-4 * scale), name
    for name, value in gradients(adapted, "full").items():
        assert torch.equal(value, ours[name])


def test_truncation_changes_the_gradient(adapted):
    whole, last = gradients(adapted, "truncated:3"), gradients(adapted, "truncated:1")
    assert all((whole[k] - last[k]).norm() > 1e-3 * whole[k].norm() for k in whole)


def test_truncation_is_uniform_and_one_draw_per_step():
    config = replace(TOY, truncation_min=2, truncation_max=5, num_inference_steps=10)
    draws = [draw_steps(config, step) for step in range(4000)]
    assert draws == [draw_steps(config, step) for step in range(4000)]
    shares = [draws.count(k) / len(draws) for k in range(2, 6)]
    assert sum(shares) == 1
    assert all(abs(share - 0.25) < 0.03 for share in shares)  # four standard errors
    assert {draw_steps(replace(config, num_inference_steps=1), step) for step in range(9)} == {1}


def test_samples_are_numbered_without_gaps_over_batches_and_processes():
    config = replace(TOY, train_batch_size=3, gradient_accumulation_steps=2)
    steps = [[sample_numbers(config, step, rank, 2) for rank in range(2)] for step in range(2)]
    assert [i for ranks in steps for both in zip(*ranks, strict=True) for part in both for i in part] == list(range(24))


def test_only_the_adapter_is_trained(toy):
    pipe = pipelines.sd()
    before = {
        k: v.clone() for part in ("unet", "vae", "text_encoder") for k, v in pipe.components[part].state_dict().items()
    }
    list(train(replace(toy, max_train_steps=1), None, pipe, BRIGHT))
    for part in ("unet", "vae", "text_encoder"):
        for name, parameter in pipe.components[part].named_parameters():
            assert (parameter.grad is None) or "lora" in name
            plain = name.replace(".base_layer", "")
            assert "lora" in name or torch.equal(parameter, before[plain])


def test_reward_of_brightness_rises(toy):
    config = replace(toy, max_train_steps=5, train_batch_size=4, truncation_min=3, learning_rate=5e-2)
    pipe = pipelines.sd()
    chain = None
    means = []
    for metrics, _ in train(config, None, pipe, BRIGHT):
        chain = chain or ImageSampler.of(config, pipe, TrainedNetwork(pipe.unet, torch.float32))
        with torch.no_grad():  # the same samples after every step
            means.append(BRIGHT(chain(lambda i: "red circle", range(4), "full")[0], [""] * 4).mean().item())
        assert metrics["reward_min"] <= metrics["reward_mean"] <= metrics["reward_max"]
    assert means == sorted(means)
    assert means[-1] > means[0] + 5e-4


def test_accumulated_gradients_equal_those_of_the_joined_batch(toy):
    joined = final(replace(toy, train_batch_size=4, max_train_steps=1, learning_rate=1e-3))
    split = final(
        replace(toy, train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=1, learning_rate=1e-3)
    )
    moments = [k for k in joined.tensors if k.startswith("optimizer.exp_avg.")]
    scale = max(joined.tensors[k].abs().max() for k in moments)
    for name in moments:  # a tenth of the first gradient; Adam's own first step is only its sign
        assert (joined.tensors[name] - split.tensors[name]).abs().max() <= 1e-5 * scale
    assert joined.info["cursor"] == split.info["cursor"] == 4


# ------------------------------------------------------------------------------------------------ resumption


@pytest.mark.parametrize(
    "more", [{}, {"gradient_accumulation_steps": 2, "train_batch_size": 1, "lora_dropout": 0.3, "lr_warmup_steps": 3}]
)
def test_resumed_equals_uninterrupted_bit_for_bit(toy, tmp_path, more):
    config = replace(toy, **more)
    torch.manual_seed(5)
    whole = final(config)
    torch.manual_seed(5)
    path = checkpoint.save(tmp_path, final(config, steps=2))
    torch.manual_seed(99)
    resumed = final(config, checkpoint.load(path))
    assert resumed.step == 4
    assert same_weights(whole, resumed)


@pytest.mark.slow
def test_states_do_not_change_when_training_goes_on(toy):
    states = [state for _, state in train(toy, None, pipelines.sd(), BRIGHT)]
    assert not same_weights(states[0], states[1])
    assert same_weights(states[1], final(toy, steps=2))


def test_resumption_with_other_settings_is_refused(toy):
    state = final(toy, steps=1)
    with pytest.raises(UserError, match=r"made with learning_rate=0\.01, not 0\.5"):
        next(train(replace(toy, learning_rate=0.5), state, pipelines.sd(), BRIGHT))


# ------------------------------------------------------------------------------------------------ the run


def test_run_writes_what_it_should_and_goes_on_where_it_stopped(toy, tmp_path):
    def go(name: str, **more) -> dict:
        config = replace(toy, output_dir=str(tmp_path / name), checkpointing_steps=2, lora_alpha=8, **more)
        return train_in_folder(config, said.append, pipelines.sd(), BRIGHT)

    said: list[str] = []
    out = tmp_path / "cut"
    whole = go("whole")
    assert whole["optimizer_steps"] == 4
    go("cut", max_train_steps=3)
    with pytest.raises(UserError, match="holds a run"):
        go("cut")
    with (out / "checkpoint-3" / "state.safetensors").open("ab") as file:
        file.write(b"torn")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "torn')
    assert go("cut", resume_from_checkpoint="latest")["reward_first"] == whole["reward_first"]  # not the first anew
    assert "resuming from step 2" in said
    assert any("checkpoint-3 was set aside" in text for text in said)
    weights = [(tmp_path / name / lora.WEIGHTS).read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    curves = [
        [
            (r["step"], r["reward_mean"], r.get("grad_cosine"), r.get("noise_scale"))
            for r in records.records(tmp_path / n / "metrics.jsonl")
        ]
        for n in ("whole", "cut")
    ]
    assert curves[0] == curves[1]
    assert [step for step, *_ in curves[0]] == [1, 2, 3, 4] and curves[0][-1][2] is not None
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["lora_alpha"] == 8 and "resume_from_checkpoint" not in settings
    assert AlignPropConfig(**settings) == replace(toy, output_dir=str(out), checkpointing_steps=2, lora_alpha=8)
    pipelines.sd().load_lora_weights(out)
    pipelines.sd().load_lora_weights(out / "checkpoint-4")
    assert "base_model: tiny" in (out / "README.md").read_text()


def test_a_signal_saves_a_checkpoint_and_ends(toy, tmp_path):
    class Raises(Brightness):
        def __call__(self, images, prompts):
            signal.raise_signal(signal.SIGTERM)
            return super().__call__(images, prompts)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train_in_folder(replace(toy, output_dir=str(tmp_path / "out")), pipe=pipelines.sd(), reward=Raises())
    assert stopped.value.code == 143
    assert checkpoint.latest(tmp_path / "out").name == "checkpoint-1"
    assert signal.getsignal(signal.SIGTERM) is handler


def test_what_a_killed_save_left_is_removed_when_the_run_goes_on_and_nothing_else_is(toy, tmp_path):
    out = tmp_path / "out"
    config = replace(toy, output_dir=str(out), max_train_steps=1)
    train_in_folder(config, pipe=pipelines.sd(), reward=BRIGHT)
    (out / "best").mkdir()
    left = [beside(where / lora.WEIGHTS) for where in (out, out / "best")]
    for folder in left:
        folder.mkdir()
        (folder / lora.WEIGHTS).write_bytes(b"half")
    (out / "notes").mkdir()
    again = replace(config, max_train_steps=2, resume_from_checkpoint="latest")
    train_in_folder(again, pipe=pipelines.sd(), reward=BRIGHT)
    assert not any(folder.exists() for folder in left)
    assert (out / "notes").is_dir()


class Broken(Brightness):
    """Turns bad at its third call."""

    def __init__(self, how: float):
        object.__setattr__(self, "how", how)
        object.__setattr__(self, "calls", [])

    def __call__(self, images, prompts):
        self.calls.append(1)
        scores = images.mean(dim=(1, 2, 3))
        if len(self.calls) < 3:
            return scores
        return scores * self.how if self.how != 0 else ((scores - scores.detach()) ** 2).sqrt()  # 0: a NaN gradient


@pytest.mark.parametrize(
    ("how", "gradient", "what"),
    [
        (float("nan"), None, "the reward for 'red"),
        (0, "checkpoint", "the gradient of the loss is not finite at the run's end, before any of its 3 steps"),
        (0, "truncated:1", "the gradient of the loss is not finite at the run's end"),
    ],
)
def test_what_is_not_finite_ends_the_run_and_the_last_checkpoint_stays(toy, tmp_path, how, gradient, what):
    out = tmp_path / "out"
    config = replace(toy, output_dir=str(out), checkpointing_steps=1, gradient=gradient, decode_batch=8)
    Path(toy.prompts).write_text("red circle\n")
    with pytest.raises(RunError, match=rf"step 3: .*{what}.*checkpoints are as they were"):
        train_in_folder(config, pipe=pipelines.sd(), reward=Broken(how))
    assert checkpoint.latest(out).name == "checkpoint-2"
    assert not (out / lora.WEIGHTS).exists()


@pytest.mark.parametrize("gradient", ["checkpoint", "revolve:2", "adjoint:exact_endpoint"])
def test_a_gradient_that_is_not_finite_names_its_step(toy, gradient):
    """The optimiser's, and the sampler's."""
    pipe = pipelines.sd()
    what = "step 1: the gradient is not finite at step 1 of 3 .*checkpoints are as they were"
    with pipelines.kinked(pipe, 3, 1), pytest.raises(RunError, match=what):
        list(train(replace(toy, gradient=gradient), None, pipe, BRIGHT))


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"reward": ["tiny-clap"]}, "did you mean 'tiny-clip'"),
        ({"reward": ["jpeg"]}, "'jpeg' is not differentiable.*brightness"),
        ({"reward": ["brightness=nan"]}, "finite number"),
        ({"guidance": "cgf"}, "did you mean 'cfg'"),
        ({"guidance_options": {"scal": 1.0}}, "did you mean 'scale'"),
        ({"model": "tinny"}, "did you mean 'tiny'"),
        ({"sampler": "oiler"}, "euler"),
        ({"prompts": "/nowhere.txt"}, "cannot read the prompts"),
        ({"gradient": "truncated:9"}, "1 to 3"),
        ({"gradient": "fool"}, "no gradient mode 'fool'"),
        ({"train_batch_size": 0}, "train_batch_size is 0"),
        ({"truncation_max": 0}, "truncation_max is 0"),
        ({"lr_scheduler": "linaer"}, "did you mean 'linear'"),
        ({"resume_from_checkpoint": "/nowhere"}, "no checkpoint '/nowhere'"),
        ({"report_to": "tensorbored"}, "no tracker 'tensorbored'"),
    ],
)
def test_bad_settings_are_one_sentence_and_nothing_is_written(toy, tmp_path, more, what):
    pipe = None if "model" in more else pipelines.sd()
    with pytest.raises(ValueError, match=what) as error:
        config = replace(toy, **{"output_dir": str(tmp_path / "out"), "reward": ["brightness"], **more})
        train_in_folder(config, pipe=pipe)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(toy, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    for resume in (None, "latest"):
        config = replace(toy, output_dir=str(tmp_path), reward=["brightness"], resume_from_checkpoint=resume)
        with pytest.raises(UserError, match="holds something else"):
            train_in_folder(config, pipe=pipelines.sd())
    assert not (tmp_path / run_folder.CONFIG).exists()
