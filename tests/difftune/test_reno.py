"""ReNO: closed forms, a loop by hand, and independence of the prompts in a batch."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from difftune import reno
from difftune.configs import RenoConfig
from difftune.errors import RunError, UserError
from difftune.reno import Objective, ReNO, chi_log_density, clip_each, learning_rate, regularizer
from guidance.methods import CFG
from solvers.latent import LatentModel
from tests import pipelines

PROMPTS = ["red circle", "blue square"]


@pytest.fixture(scope="module")
def pipe():
    return pipelines.sd()


@dataclass(frozen=True)
class Linear:
    """<c, image>: the picture's left half minus its right."""

    differentiable = True

    def __call__(self, images, prompts):
        half = images.shape[-1] // 2
        return images[..., :half].sum(dim=(1, 2, 3)) - images[..., half:].sum(dim=(1, 2, 3))


def quiet(pipe, rewards=None, **options) -> ReNO:
    return ReNO(pipe, rewards or Linear(), progress=False, **options)


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("dimension", [3, 256, 16_384])
def test_density_is_chis(dimension):
    r = torch.linspace(0.5, 1.5, 7, dtype=torch.float64) * dimension**0.5
    expected = torch.from_numpy(stats.chi.logpdf(r.numpy(), dimension))
    assert torch.allclose(chi_log_density(r, dimension), expected, rtol=1e-9, atol=1e-7)


def test_regularizers_gradient_is_along_the_noise_and_vanishes_on_the_shell():
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    (gradient,) = torch.autograd.grad(regularizer(x).sum(), x)
    norm = x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(gradient, (norm - 255 / norm) * x / norm)
    shell = (x * 255**0.5 / norm).detach().requires_grad_()
    assert torch.autograd.grad(regularizer(shell).sum(), shell)[0].abs().max() < 1e-12


def test_regularizer_survives_half_precision_at_65536_elements():
    """|eps|^2 is about 65,536, and float16 ends at 65,504."""
    x = torch.randn(2, 65_536, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    value = regularizer(1.01 * x)
    assert value.isfinite().all() and torch.autograd.grad(value.sum(), x)[0].isfinite().all()


def test_optimum_of_a_linear_reward(monkeypatch):
    """Reward <c, eps>, |c| = 1: eps* = rho c with rho = (s + sqrt(s^2 + 4 (D - 1))) / 2, s = 1 / gamma: 187.4155."""
    size = 16_384
    c = torch.zeros(1, 4, 64, 64, dtype=torch.float64)
    c[0, 0, 0, :4] = 0.5
    x = torch.randn(c.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.SGD([x], learning_rate(size), momentum=0.9, nesterov=True)
    for _ in range(300):
        start = x.detach().clone()
        (x.grad,) = torch.autograd.grad(0.01 * regularizer(x).sum() - (c * x).sum(), x)
        clip_each(x, 0.1)
        optimizer.step()
        assert (x - start).norm() <= 5 * 0.1 / (1 - 0.9) + 1e-9
    assert abs(x.norm().item() - 187.4155) < 1e-3
    assert (c * x).sum() / x.norm() > 0.9999


@pytest.mark.parametrize(("dimension", "rate"), [(16_384, 5.0), (65_536, 10.0), (256, 0.625)])
def test_learning_rate_follows_the_noises_norm(dimension, rate):
    assert learning_rate(dimension) == rate


# ------------------------------------------------------------------------------------------------ the optimisation


def test_reward_rises_and_equals_a_loop_by_hand(pipe):
    result = quiet(pipe, learning_rate=2.0).optimize(PROMPTS[:1], 5, seed=7)
    model = LatentModel(pipe)
    conds, (now, then) = model.encode(PROMPTS[:1]), model.levels(1)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    velocity, rewards, noises = torch.zeros_like(x), [], []
    for _ in range(5):
        x.requires_grad_()
        eps = pipe.unet(x, model.denoiser.clock(now), conds["cond"]["encoder_hidden_states"]).sample.double()
        z = then.alpha * (x - now.sigma * eps) / now.alpha + then.sigma * eps
        images = (pipe.vae.decode(z.float() / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        reward = Linear()(images, PROMPTS[:1])
        r = x.norm()
        loss = 0.01 * (r**2 / 2 - 255 * r.log()) - reward.sum()
        (g,) = torch.autograd.grad(loss, x)
        rewards.append(reward.item())
        noises.append(x.detach())
        g = g * min(1.0, 0.1 / (g.norm().item() + 1e-6))
        velocity = 0.9 * velocity + g
        x = (x - 2.0 * (g + 0.9 * velocity)).detach()
    assert torch.allclose(torch.cat([h.total for h in result.history]), torch.tensor(rewards), atol=1e-3)
    best = max(range(5), key=lambda i: rewards[i])
    assert best > 0
    assert torch.allclose(result.noises, noises[best], atol=1e-3)
    assert result.rewards.item() > result.rewards_before.item() + 0.05


def test_prompts_of_a_batch_do_not_touch(pipe):
    """Unequal rewards too: one prompt's best is early, the other's late."""
    settings = quiet(pipe, learning_rate=3.0)
    both = settings.optimize(PROMPTS, 4, seed=0)
    for i, prompt in enumerate(PROMPTS):
        alone = settings.optimize([prompt], 4, seed=i)
        for name in ("noises", "images", "rewards", "noises_before", "images_before", "rewards_before"):
            assert torch.allclose(both._asdict()[name][i], alone._asdict()[name][0], atol=1e-4), name
        assert torch.allclose(both.history[1].grad_norm[i], alone.history[1].grad_norm[0], rtol=1e-3)


def test_best_is_kept_by_reward_alone_and_is_no_alias(pipe):
    """A step far too long: the reward soon falls, and each best noise still makes its image."""
    settings = quiet(pipe, learning_rate=200.0, regularization=1.0)
    live = list(settings.iterate(PROMPTS, 4))
    result = settings.optimize(PROMPTS, 4)
    totals = torch.stack([state.record.total for state in live])
    assert torch.equal(result.rewards, totals.max(dim=0).values)
    assert torch.equal(result.rewards_before, totals[0]) and (result.rewards >= totals[0]).all()
    for row, best in enumerate(totals.argmax(dim=0).tolist()):
        assert torch.equal(result.noises[row], live[best].noises[row])
        assert torch.equal(result.images[row], live[best].images[row])


def test_reward_and_regularizer_are_reported_apart(pipe):
    first = [next(quiet(pipe, {"brightness": 2.0}, regularization=w).iterate(PROMPTS, 2)).record for w in (0.0, 5.0)]
    assert torch.equal(first[0].parts["brightness"], first[1].parts["brightness"])
    assert torch.equal(first[0].total, 2 * first[0].parts["brightness"])
    assert (first[1].grad_norm > first[0].grad_norm).all()


@pytest.mark.parametrize("sampler", ["euler", "ancestral"])
def test_several_steps_with_guidance_have_the_engines_gradient(pipe, sampler):
    options = {"num_inference_steps": 3, "guidance": CFG(3.0), "sampler": sampler}
    modes = {
        mode: list(quiet(pipe, gradient=mode, **options).iterate(PROMPTS, 2))
        for mode in ("full", "checkpoint", "truncated:3")
    }
    assert torch.equal(modes["full"][1].noises, modes["checkpoint"][1].noises)
    assert torch.equal(modes["full"][1].noises, modes["truncated:3"][1].noises)
    assert modes["full"][0].record.grad_norm.min() > 0


def test_the_pipeline_is_left_as_it_was(pipe):
    parameters = dict(pipe.unet.named_parameters())
    wanted = {name: p.requires_grad for name, p in parameters.items()}
    parameters["conv_in.bias"].requires_grad_(False)
    wanted["conv_in.bias"] = False
    quiet(pipe).optimize(PROMPTS[:1], 2)
    assert {name: p.requires_grad for name, p in pipe.unet.named_parameters()} == wanted
    assert all(p.grad is None for p in pipe.unet.parameters())
    parameters["conv_in.bias"].requires_grad_(True)


def test_generators_replace_the_seed(pipe):
    start = next(quiet(pipe).iterate(PROMPTS, 1, generator=torch.Generator().manual_seed(4))).noises
    assert torch.equal(start, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4)))


# ------------------------------------------------------------------------------------------------ what is refused


class Never(Linear):
    def __call__(self, images, prompts):
        return super().__call__(images, prompts) * float("inf")


def test_what_is_not_finite_is_named(pipe, monkeypatch):
    with pytest.raises(RunError, match=r"iteration 1: reward 'Never' is not finite.*red circle"):
        quiet(pipe, Never()).optimize(PROMPTS, 2)
    nan = lambda self, x: (0 * x[:, :3]).sqrt() * x[:, :3]  # noqa: E731  finite, and its gradient is not
    monkeypatch.setattr(Objective, "images", nan)
    with pytest.raises(RunError, match="gradient of the noise for 'red circle' is not finite"):
        quiet(pipe).optimize(PROMPTS, 2)


class Kinked(Linear):
    """A finite score whose gradient is not."""

    def __call__(self, images, prompts):
        return super().__call__(images, prompts) + (0 * images).sqrt().mean(dim=(1, 2, 3))


def test_a_sweep_that_is_not_finite_names_its_step(pipe):
    with pytest.raises(RunError, match="iteration 1: the gradient is not finite at step 0 of 1"):
        replace(quiet(pipe, Kinked()), gradient="revolve:1").optimize(PROMPTS, 2)


def test_what_cannot_be_is_refused_by_name(pipe):
    for rewards, what in (
        ({"jpeg": 1.0}, "'jpeg' is not differentiable.*brightness"),
        ({"tiny-clap": 1.0}, "did you mean 'tiny-clip'"),
    ):
        with pytest.raises(UserError, match=what):
            ReNO(pipe, rewards)
    with pytest.raises(UserError, match="1 to 1"):
        ReNO(pipe, {"brightness": 1.0}, gradient="truncated:2")
    for prompts, iterations, what in (([], 1, "list of prompts is empty"), (PROMPTS, 0, "iterations is 0")):
        with pytest.raises(UserError, match=what):
            quiet(pipe).optimize(prompts, iterations)


# ------------------------------------------------------------------------------------------------ the command


def test_run_writes_pictures_curves_and_the_noise(pipe, tmp_path):
    config = RenoConfig(prompt=[*PROMPTS, "red square"], reward=["brightness=-1"], iterations=3, batch_size=2,
                        output_dir=str(tmp_path / "out"))  # fmt: skip
    said: list[str] = []
    summary = reno.run(config, said.append, pipe)
    out = tmp_path / "out"
    pictures = [f"{i:03d}-{when}.png" for i in range(3) for when in ("after", "before")]
    assert sorted(p.name for p in out.iterdir()) == [*pictures, "grid.png", "noise.safetensors", "optimize.json"]
    assert json.loads((out / "optimize.json").read_text()) == summary
    assert summary["reward_after"] >= summary["reward_before"] and len(summary["prompts"][2]["history"]) == 3
    assert [p["seed"] for p in summary["prompts"]] == [0, 1, 2]
    noise = load_file(out / "noise.safetensors")["noise"]
    alone = reno.run(replace(config, prompt=["red square"], seed=2, output_dir=str(tmp_path / "b")), said.append, pipe)
    assert abs(alone["reward_after"] - summary["prompts"][2]["reward_after"]) < 1e-5
    assert torch.allclose(noise[2:], load_file(tmp_path / "b" / "noise.safetensors")["noise"], atol=1e-5)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(UserError, match="holds another run"):
        reno.run(config, said.append, pipe)
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"prompt": []}, "no prompt"),
        ({"reward": ["oracle"]}, "'oracle' is not differentiable"),
        ({"guidance": "cgf"}, "did you mean 'cfg'"),
        ({"model": "tiny-torbo"}, "did you mean 'tiny-turbo'"),
        ({"gradient": "truncated:2"}, "1 to 1"),
        ({"iterations": 0}, "iterations is 0"),
    ],
)
def test_bad_settings_are_one_sentence_and_nothing_is_written(pipe, tmp_path, more, what):
    config = RenoConfig(**{"prompt": PROMPTS, "reward": ["brightness"], "output_dir": str(tmp_path / "out"), **more})
    with pytest.raises(UserError, match=what) as error:
        reno.run(config, pipe=None if "model" in more else pipe)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
