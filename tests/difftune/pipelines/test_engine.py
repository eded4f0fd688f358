"""The engine's settings as recipes take them: budgets that are kept, results that do not depend on them, errors."""

import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from click.testing import CliRunner

from difftune import environment
from difftune.cli.program import cli
from difftune.configs.noise import RenoConfig
from difftune.configs.recipes import AlignPropConfig
from difftune.errors import RunError, UserError
from difftune.pipelines import engine
from difftune.pipelines.engine import gradient_named
from difftune.recipes import running, train, train_in_folder
from difftune.reno import run_folder as reno_folder
from difftune.reno.optimizer import ReNO
from difftune.training import checks, run_folder
from difftune.training import state as training
from rewards.compose import Recomputed, WeightedSum
from rewards.simple import Brightness
from solvers.families.attention import FLAG
from solvers.memory.budget import parameters_bytes, parse_size
from solvers.memory.live import LiveBytes
from solvers.rollout.truncated import STYLES
from tests.support import pipelines

TOY = AlignPropConfig(
    max_train_steps=1, train_batch_size=3, num_inference_steps=2, truncation_max=2, truncation_min=2, learning_rate=1e-2
)
PROMPTS = ["red circle", "blue square", "red square"]
STRINGS = [
    *("full", "checkpoint", "revolve:8", "revolve:1", "adjoint:euler", "adjoint:exact_endpoint", "lean"),
    *("truncated:10", *(f"truncated:10:{style}" for style in STYLES)),
    *("reversible:bdia", "reversible:mccallum-foster:midpoint"),
]


@dataclass(frozen=True)
class Contrast:
    """A second reward, whose graph is large."""

    differentiable = True

    def __call__(self, images, prompts):
        return (3 * images).sin().exp().square().mean((1, 2, 3))


SUM = WeightedSum({"brightness": Brightness(), "contrast": Contrast()}, {"brightness": 1.0, "contrast": 0.5})


@pytest.fixture
def toy(tmp_path) -> AlignPropConfig:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return replace(TOY, prompts=str(tmp_path / "prompts.txt"), output_dir=str(tmp_path / "out"))


def trained(config, reward=SUM) -> tuple[dict[str, torch.Tensor], list[str], int]:
    """The first moments after one step, what was said, and the peak, weights included."""
    said: list[str] = []
    pipe = pipelines.sd()
    weights = parameters_bytes(*pipe.components.values())
    with LiveBytes() as live:
        ((_, state),) = islice(train(config, None, pipe, reward, said.append), 1)
    moments = {name: tensor for name, tensor in state.tensors.items() if name.startswith("optimizer.exp_avg.")}
    return moments, said, live.peak + weights


@pytest.mark.slow
@pytest.mark.sampled(2)
def test_a_budget_changes_no_gradient_and_is_kept(toy):
    whole, said, peak = trained(toy)
    assert said == ["attention: sdpa (the default)", "gradient: truncated:K, K ~ U{2..2} anew for each optimiser step"]
    with pytest.raises(UserError, match="memory_budget 1KiB is too small") as error:
        trained(replace(toy, memory_budget="1KiB"))
    least = str(error.value).partition("the least that does is ")[2].partition(",")[0]
    assert parse_size(least) < peak
    scale = max(tensor.abs().max() for tensor in whole.values())
    for budget in (least, "1GiB"):
        parts, said, peak = trained(replace(toy, memory_budget=budget))
        assert peak <= parse_size(budget)
        assert all((parts[name] - whole[name]).abs().max() <= 1e-4 * scale for name in whole), said
    assert "full, 3 of 3 images at a time (predicted peak" in said[2] and "nothing is faster" in said[2]
    assert said[1] == "gradient: full"


@pytest.mark.slow
def test_the_budget_of_a_run_with_a_divergence_is_kept(toy):
    """Whose call of the network is recomputed while the graphs of all steps are there."""
    config = replace(toy, gradient="full", kl_coeff=0.1)
    with pytest.raises(UserError, match="memory_budget 1KiB is too small") as error:
        trained(replace(config, memory_budget="1KiB"), Brightness())
    least = str(error.value).partition("the least that does is ")[2].partition(",")[0]
    _, said, peak = trained(replace(config, memory_budget=least), Brightness())
    assert peak <= parse_size(least), said


@pytest.mark.slow
def test_a_mode_that_is_given_is_kept(toy):
    """A drawn truncation too: its longest is what has to fit."""
    _, said, _ = trained(replace(toy, truncation_min=1, memory_budget="1GiB"), Brightness())
    assert "memory_budget: truncated:2, 3 of 3 images" in said[2]


def test_what_was_resolved_is_written_and_read_back(toy, tmp_path):
    config = replace(toy, gradient="checkpoint", memory_budget="1GiB", deterministic=True)
    said: list[str] = []
    train_in_folder(config, said.append, pipelines.sd(), Brightness())
    text = (tmp_path / "out" / run_folder.CONFIG).read_text()
    assert [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")] == said
    assert [line.partition(":")[0] for line in said] == ["attention", "deterministic", "gradient", "memory_budget"]
    settings = yaml.safe_load(text)
    assert (settings["gradient"], settings["memory_budget"], settings["deterministic"]) == ("checkpoint", "1GiB", True)


@dataclass(frozen=True)
class Watching(Contrast):
    """Writes down whether kernels are deterministic."""

    seen: list

    def __call__(self, images, prompts):
        self.seen.append(torch.are_deterministic_algorithms_enabled())
        return super().__call__(images, prompts)


@pytest.mark.parametrize("on", [False, True])
def test_deterministic_holds_during_the_run_alone(toy, tmp_path, on):
    reward = Watching([])
    list(train(replace(toy, deterministic=on, decode_batch=8), None, pipelines.sd(), reward))
    config = RenoConfig(prompt=PROMPTS[:1], iterations=1, deterministic=on, output_dir=str(tmp_path / "reno"))
    reno_folder.optimize_in_folder(config, [].append, pipelines.sd(), reward)
    assert set(reward.seen) == {on} and len(reward.seen) == 2
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_reno_within_a_budget_is_reno(tmp_path):
    pipe, kept = pipelines.sd(), {}
    weights = parameters_bytes(*pipe.components.values())
    settings = ReNO(pipe, SUM, num_inference_steps=2, progress=False, learning_rate=2.0)
    whole = settings.optimize(PROMPTS, 3)
    assert (whole.plan.gradient, whole.plan.micro_batch, whole.plan.peak) == ("checkpoint", 3, 0)
    with pytest.raises(UserError, match="memory_budget 1KiB is too small") as error:
        replace(settings, memory_budget="1KiB").optimize(PROMPTS, 3)
    least = str(error.value).partition("the least that does is ")[2].partition(",")[0]
    for budget in (least, "1GiB"):
        with LiveBytes() as live:
            found = replace(settings, memory_budget=budget).optimize(PROMPTS, 3)
        kept[budget] = found.plan
        assert live.peak + weights <= parse_size(budget)
        assert torch.allclose(found.noises, whole.noises, atol=1e-4)
        assert torch.allclose(found.history[1].grad_norm, whole.history[1].grad_norm, rtol=1e-3)
        assert found.history[1].parts.keys() == whole.history[1].parts.keys()
    assert kept["1GiB"].gradient == "full" and kept[least].micro_batch == 1 and kept[least].blocks


@pytest.mark.slow
def test_optimize_writes_what_was_resolved(tmp_path):
    said: list[str] = []
    config = RenoConfig(prompt=PROMPTS[:2], iterations=2, output_dir=str(tmp_path / "out"), memory_budget="1GiB")
    summary = reno_folder.optimize_in_folder(config, said.append, pipelines.sd(), Brightness())
    assert summary["engine"]["gradient"] == "full" and "full, 2 of 2 images" in summary["engine"]["memory_budget"]
    assert said == [f"{name}: {line}" for name, line in summary["engine"].items()]


@pytest.mark.parametrize("gradient", STRINGS)
def test_the_engines_strings_are_accepted(gradient):
    assert gradient_named(gradient, 10) == gradient


@pytest.mark.parametrize(
    ("gradient", "what"),
    [
        ("fool", "no gradient mode 'fool'; known: full, checkpoint"),
        ("full:3", "'full' takes no option"),
        ("truncated:11", "1 to 10"),
        ("truncated:0", "1 to 10"),
        ("truncated", "1 to 10"),
    ],
)
def test_a_string_that_cannot_be_is_one_sentence(gradient, what):
    with pytest.raises(ValueError, match=what) as error:
        gradient_named(gradient, 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("gradient", STRINGS)
@pytest.mark.sampled(3)
def test_recipes_run_every_mode(toy, gradient):
    """Two steps of AlignProp's sampler; a gradient reaches the adapter."""
    config = replace(toy, gradient=gradient.replace("10", "1"), train_batch_size=1, max_train_steps=1)
    ((metrics, _),) = train(config, None, pipelines.sd(), Brightness())
    assert 0 < metrics["grad_norm"] < float("inf")


class Scaled(training.Accelerator):
    """With a loss scaler on a CPU, as there is on a GPU under float16, whose first scale overflows."""

    scale = 2.0**28

    def __init__(self, **options):
        super().__init__(**options)
        self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", self.scale)


@pytest.fixture
def scaled(monkeypatch):
    """The precision of a process is set once, unless accelerate forgets it."""
    monkeypatch.setattr(training, "Accelerator", Scaled)
    monkeypatch.setattr(checks, "check_precision", lambda config: None)
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.slow
def test_a_loss_scaler_finds_its_scale_in_every_mode(toy, scaled):
    """A sweep lets an overflow through, and what remains at the same scale is the gradient of `full`."""
    config = replace(toy, mixed_precision="fp16", train_batch_size=1, max_train_steps=9, guidance_scale=2.0)
    found = {}
    for gradient in ("full", "checkpoint", "revolve:2", "reversible:alf", "adjoint:heun", "lean"):
        steps = train(replace(config, gradient=gradient), None, pipelines.sd(), Brightness())
        metrics, state = next(made for made in steps if made[0]["grad_norm"] > 0)
        found[gradient] = metrics["grad_norm"]
        assert state.step > 1 and metrics["skipped"] == 0 and state.info["scaler"]["scale"] < 2.0**28
    assert found["checkpoint"] == pytest.approx(found["full"], rel=1e-3) == found["revolve:2"]


def test_a_gradient_that_no_scale_makes_finite_is_counted_and_ends_the_run(toy, scaled, monkeypatch):
    """The scale falls from 2 to 1, and the step may have lacked that; then to 1/2 and 1/4, which helps no gradient."""
    monkeypatch.setattr(Scaled, "scale", 2.0)
    pipe = pipelines.sd()
    config = replace(toy, mixed_precision="fp16", max_train_steps=9, max_skipped_steps=1)
    steps = train(config, None, pipe, Brightness())
    met = [next(steps)]
    weight = next(weight for weight in pipe.unet.parameters() if weight.requires_grad)
    hook = weight.register_hook(lambda gradient: gradient / 0)
    met += [next(steps), next(steps)]
    assert [(metrics.get("grad_norm", 0) < 0, metrics["skipped"]) for metrics, _ in met] == [(0, 0), (1, 0), (0, 1)]
    with pytest.raises(RunError, match=r"step 4: the gradient is not finite, .*scaled by 0.25"):
        next(steps)
    hook.remove()
    assert all(tensor.isfinite().all() for _, state in met for tensor in state.tensors.values())


OFFLOADED = "nothing to do, the latents are in the host's memory already"


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [None, "checkpoint", "reversible:bdia"])
def test_offloading_changes_no_bit_and_says_what_it_does(toy, gradient):
    plain, _, _ = trained(replace(toy, gradient=gradient))
    moved, said, _ = trained(replace(toy, gradient=gradient, offload=True))
    assert said[-1] == f"offload: {OFFLOADED}"
    assert all(torch.equal(plain[name], moved[name]) for name in plain)


@pytest.mark.slow
def test_offloading_goes_around_the_rollouts_of_recipes_and_of_reno(toy, monkeypatch):
    entered = []

    def noted(device, gradient):
        entered.append((str(device), gradient))
        return nullcontext()

    monkeypatch.setattr(engine, "offloaded", noted)
    budgets = {"offload": True, "memory_budget": "1GiB"}  # the plan is then bound to a mode that can be offloaded
    _, said, _ = trained(replace(toy, train_batch_size=1, **budgets))
    assert said[1] == "gradient: checkpoint" and entered == [("cpu", "checkpoint")]
    pipe = pipelines.sd()
    result = ReNO(pipe, SUM, num_inference_steps=2, progress=False, **budgets).optimize(PROMPTS[:1], 2)
    assert result.plan.gradient == "checkpoint" and len(entered) == 3
    plain = ReNO(pipe, SUM, num_inference_steps=2, progress=False).optimize(PROMPTS[:1], 2)
    assert torch.equal(result.noises, plain.noises) and len(entered) == 3


def test_optimize_says_that_it_offloads(tmp_path):
    config = RenoConfig(prompt=PROMPTS[:1], iterations=1, output_dir=str(tmp_path / "out"), offload=True)
    assert (
        reno_folder.optimize_in_folder(config, [].append, pipelines.sd(), Brightness())["engine"]["offload"]
        == OFFLOADED
    )


@pytest.mark.parametrize("gradient", ["full", "revolve:2", "lean", "adjoint:exact_endpoint"])
def test_what_cannot_be_offloaded_is_refused_at_once(toy, gradient):
    what = f"gradient mode '{gradient}' (keeps whole graphs|holds its states).*offload with 'checkpoint'"
    with pytest.raises(ValueError, match=what):
        next(train(replace(toy, gradient=gradient, offload=True)))
    with pytest.raises(ValueError, match=what):
        reno_folder.check_optimize(RenoConfig(prompt=PROMPTS[:1], gradient=gradient, offload=True))
    with pytest.raises(ValueError, match=what):
        ReNO(pipelines.sd(), SUM, gradient=gradient, offload=True, num_inference_steps=2)


@pytest.mark.parametrize("gradient", ["checkpoint", "truncated:10"])
def test_noise_gets_a_gradient_through_all_steps(gradient):
    assert gradient_named(gradient, 10, of="noise") == gradient


def test_a_truncation_that_cuts_the_noise_off_is_refused_at_once():
    pipe = pipelines.sd()
    with pytest.raises(UserError, match="'checkpoint'"):
        ReNO(pipe, {"brightness": 1.0}, num_inference_steps=3, gradient="truncated:2")


def test_a_mode_with_its_own_solver_takes_no_other_sampler():
    with pytest.raises(UserError, match="'lean' brings its own solver, and would not run sampler 'heun'"):
        gradient_named("lean", 10, "heun")


@pytest.mark.parametrize("command", [["train", "alignprop"], ["optimize", "--prompt", "x"]])
@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--memory_budget", "6 parsecs"], "cannot read the size '6 parsecs'"),
        (["--gradient", "fool"], "no gradient mode 'fool'"),
        (["--gradient", "full", "--offload"], "gradient mode 'full' keeps whole graphs"),
        ([FLAG], "xformers (is not installed|needs a CUDA GPU)"),
    ],
)
def test_flags_are_checked_before_anything_is_loaded(monkeypatch, tmp_path, command, flags, what):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for recipe in (running, reno_folder):
        monkeypatch.setattr(recipe, "load_model", lambda *_, **options: pytest.fail("loaded"))
    done = CliRunner().invoke(cli, [*command, *flags, "--output_dir", str(tmp_path / "out")])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    assert re.search(what, done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


def test_xformers_runs_where_the_probe_says_so(monkeypatch, toy, tmp_path):
    """With stand-ins for the GPU: the network is switched for the run and switched back."""
    used = []

    class Switch:
        def __init__(self, network, backend):
            used.append(backend)

        def __enter__(self):
            used.append("on")

        def __exit__(self, *_):
            used.append("off")

    monkeypatch.setattr(engine, "obstacle", lambda: None)
    monkeypatch.setattr(engine, "choose", lambda device, dtype: engine.Verdict("xformers", "faster"))
    monkeypatch.setattr(engine, "attention", Switch)
    config = replace(toy, enable_xformers_memory_efficient_attention=True)
    _, said, _ = trained(config)
    assert used == ["xformers", "on", "off"] and said[0] == "attention: xformers (faster)"
    monkeypatch.setattr(engine, "choose", lambda device, dtype: engine.Verdict("sdpa", "slower"))
    settings = RenoConfig(
        prompt=["x"], iterations=1, output_dir=str(tmp_path / "r"), enable_xformers_memory_efficient_attention=True
    )
    summary = reno_folder.optimize_in_folder(settings, [].append, pipelines.sd(), Brightness())
    assert summary["engine"]["attention"] == "sdpa (slower)"


def test_a_recomputed_reward_is_the_reward():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    plain, again = Contrast(), Recomputed(Contrast())
    assert again.differentiable
    grads = [torch.autograd.grad(reward(images, ["", ""]).sum(), images)[0] for reward in (plain, again)]
    assert torch.equal(*grads)


def test_the_doctor_says_what_is_in_the_way_of_xformers_or_what_the_probe_found(monkeypatch):
    monkeypatch.setattr(environment, "obstacle", lambda: "xformers is not installed")
    assert environment.attention()["xformers"] == "not installed"
    monkeypatch.setattr(environment, "obstacle", lambda: None)
    monkeypatch.setattr(
        environment, "choose", lambda device, dtype: engine.Verdict("sdpa", "forward and backward: 1 ms")
    )
    assert environment.attention()["xformers"] == "not used: forward and backward: 1 ms"


def test_a_checkpoint_older_than_a_setting_has_its_default(toy):
    *_, (_, state) = train(toy, None, pipelines.sd(), Brightness())
    for name in ("memory_budget", "offload", "deterministic", "enable_xformers_memory_efficient_attention"):
        del state.info["config"][name]
    run_folder.same_run(replace(toy, max_train_steps=2), state)
    with pytest.raises(UserError, match="deterministic=False, not True"):
        run_folder.same_run(replace(toy, deterministic=True), state)
