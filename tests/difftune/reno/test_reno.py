"""ReNO on pipelines: a loop by hand, independent samples, resumption, precision, what is reported."""

from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from difftune import models
from difftune.errors import RunError, UserError
from difftune.files import checkpoint
from difftune.reno import run_folder
from difftune.reno.named import OPTIMIZERS
from difftune.reno.objective import Objective
from difftune.reno.optimizer import ReNO, fresh
from difftune.reno.paper import PAPER, setting_of
from guidance.guided import guided
from guidance.invert import edit
from guidance.methods.catalogue import CFG, CFGpp, Plain
from rewards.registry import load as load_reward
from solvers.denoiser import Path
from solvers.latent import LatentModel
from solvers.memory.budget import parse_size
from solvers.memory.live import LiveBytes
from solvers.samplers.catalogue import euler, sample
from tests.support import pipelines

PROMPTS = ["red circle", "blue square"]
SEARCHES = ("neighbours", "spsa", "cma")


@pytest.fixture(scope="module")
def pipe():
    return pipelines.sd()


@pytest.fixture(scope="module")
def exact():
    """The same in float64."""
    return pipelines.sd().to(torch.float64)


@dataclass(frozen=True)
class Linear:
    """<c, image>: the picture's left half minus its right."""

    differentiable = True

    def __call__(self, images, prompts):
        half = images.shape[-1] // 2
        return images[..., :half].sum(dim=(1, 2, 3)) - images[..., half:].sum(dim=(1, 2, 3))


class Steps:
    """A reward without a gradient, which counts the images that it sees."""

    differentiable = False

    def __init__(self):
        self.calls = []

    def __call__(self, images, prompts):
        self.calls.append(list(prompts))
        return Linear()(images, prompts).detach().round()


def quiet(pipe, reward=None, **options) -> ReNO:
    return ReNO(pipe, reward or Linear(), progress=False, **options)


def optional(name):
    if name == "cma":
        pytest.importorskip("cma")
    return name


# ------------------------------------------------------------------------------------------------ the optimisation


def test_reward_rises_and_equals_a_loop_by_hand(pipe):
    result = quiet(pipe, learning_rate=2.0).optimize(PROMPTS[:1], 5, seed=7)
    assert repr(result).startswith("Result(rewards_before=[") and len(repr(result)) < 200
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


@pytest.mark.slow
def test_a_batch_of_eight_is_eight_runs_of_one(exact):
    """Four prompts with two seeds each, all in float64, ten iterations: noises within 1e-8."""
    settings = quiet(exact, learning_rate=2.0)
    prompts = [*PROMPTS, "red square", "blue circle"]
    both = settings.optimize(prompts, 10, seed=5, seeds_per_prompt=2)
    assert both.noises.dtype == torch.float64
    assert both.prompts == [p for p in prompts for _ in range(2)] and both.seeds == list(range(5, 13))
    for i, prompt in enumerate(both.prompts):
        alone = settings.optimize(prompt, 10, seed=5 + i)
        assert (both.noises[i] - alone.noises[0]).abs().max() < 1e-8
        assert (both.images[i] - alone.images[0]).abs().max() < 1e-8
        totals = torch.tensor([both.curve("total", i), alone.curve("total", 0)])
        assert torch.allclose(totals[0], totals[1], atol=1e-8) and totals[0, -1] > totals[0, 0]
    picked = both.chosen()
    assert picked.prompts == prompts
    assert torch.equal(picked.rewards, both.rewards.view(4, 2).max(dim=1).values)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_samples_do_not_touch_under_any_optimizer(exact, name):
    settings = quiet(exact, optimizer=optional(name), variables="both")
    both = settings.optimize(PROMPTS, 4, seed=1)
    alone = settings.optimize(PROMPTS[1:], 4, seed=2)
    assert (both.noises[1] - alone.noises[0]).abs().max() < 1e-8
    assert (both.embeddings[1] - alone.embeddings[0]).abs().max() < 1e-8
    assert (both.rewards > both.rewards_before).all() or name == "spsa"
    assert both.reward_calls[1] == alone.reward_calls[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one(pipe, tmp_path, name):
    """From a checkpoint in the middle, and from the end of a run that was to be shorter."""
    settings = quiet(pipe, optimizer=optional(name), held_out=Linear(), patience=4)
    whole = settings.optimize(PROMPTS, 5)
    *_, third = (live for live, _ in zip(settings.iterate(PROMPTS, 5), range(3), strict=False))
    *_, short = settings.iterate(PROMPTS, 3)
    for i, live in enumerate((third, short)):
        state = checkpoint.load(checkpoint.save(tmp_path / str(i), live.state))
        again = settings.optimize(PROMPTS, 5, state=state)
        for key in ("noises", "images", "rewards", "noises_before", "images_before", "rewards_before", "reward_calls"):
            assert torch.equal(again._asdict()[key], whole._asdict()[key]), key
        for a, b in zip(again.history, whole.history, strict=True):
            assert torch.equal(a.total, b.total) and torch.equal(a.held_out, b.held_out)
            assert torch.equal(a.parts["Linear"], b.parts["Linear"])
        assert again.stopped == whole.stopped
        with pytest.raises(UserError, match="the state is of prompts.*resume with those"):
            settings.optimize(PROMPTS[::-1], 5, state=state)
        other = replace(settings, optimizer="adam" if name in SEARCHES else "spsa")
        with pytest.raises(UserError, match=f"state is not of optimizer {other.optimizer}"):
            other.optimize(PROMPTS, 5, state=state)
    assert torch.equal(settings.optimize(PROMPTS, 3, state=short.state).noises, short.best.noises)


@pytest.mark.parametrize("variables", ["noise", "prompt"])
def test_a_run_is_resumed_with_the_noise_that_it_began_with(pipe, variables):
    """A generator that has gone on would draw another one, and another noise of the sampler, unseen."""
    settings = quiet(pipe, num_inference_steps=2, sampler="ancestral", variables=variables, learning_rate=2.0)
    whole = settings.optimize(PROMPTS, 3, generator=fresh(4))
    state = next(settings.iterate(PROMPTS, 3, generator=fresh(4))).state
    assert torch.equal(settings.optimize(PROMPTS, 3, generator=fresh(4), state=state).images, whole.images)
    for other in ({"generator": fresh(5)}, {"start": torch.ones(1, 4, 8, 8)}, {}):
        with pytest.raises(UserError, match="the state began with another noise: resume with the same start"):
            settings.optimize(PROMPTS, 3, state=state, **other)


def test_best_is_kept_by_reward_alone_and_is_no_alias(pipe):
    """A step far too long: the reward soon falls, and each best noise still makes its image."""
    settings = quiet(pipe, learning_rate=100.0, regularization_weight=1e3)
    live, kept = [], []
    for state in settings.iterate(PROMPTS, 4):
        live.append((state.record, state.noises.clone(), state.images.clone()))
        kept.append(state)
        state.noises.zero_()  # what is handed out is the caller's
        state.images.zero_()
    result = settings.optimize(PROMPTS, 4)
    assert torch.equal(kept[-1].best.noises, result.noises) and torch.equal(kept[-1].best.images, result.images)
    totals = torch.stack([record.total for record, *_ in live])
    assert torch.equal(result.rewards, totals.max(dim=0).values)
    assert torch.equal(result.rewards_before, totals[0]) and (result.rewards >= totals[0]).all()
    losses = torch.stack([1e3 * record.regularizer - record.total for record, *_ in live])
    assert (losses.argmin(dim=0) != totals.argmax(dim=0)).any()  # the loss would have chosen another
    for row, best in enumerate(totals.argmax(dim=0).tolist()):
        assert torch.equal(result.noises[row], live[best][1][row])
        assert torch.equal(result.images[row], live[best][2][row])
    made = quiet(pipe).optimize(PROMPTS, 1, start=result.noises)
    assert torch.allclose(made.images, result.images, atol=1e-5)


def test_reward_and_regularizer_are_reported_apart(pipe):
    both = [quiet(pipe, {"brightness": 2.0}, regularization_weight=weight) for weight in (0.0, 5.0)]
    first = [next(reno.iterate(PROMPTS, 2)).record for reno in both]
    assert torch.equal(first[0].parts["brightness"], first[1].parts["brightness"])
    assert torch.equal(first[0].total, 2 * first[0].parts["brightness"])
    assert (first[1].grad_norm > first[0].grad_norm).all()


def test_the_gradient_is_that_of_finite_differences(exact):
    """For noise and embedding together, through sampler, decoder and reward, along random directions."""
    settings = quiet(exact, variables="both", num_inference_steps=2, guidance=CFG(3.0), regularizer="spectral")
    objective, _ = settings._objective(PROMPTS, 2, 0, None, 1, None)
    z, rows = objective.unknowns.start(), torch.arange(2)
    gradient = objective.evaluate(z, rows, True, "").gradient
    noise = torch.zeros_like(z)
    noise[:, :256] = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).double()
    words = torch.randn(z.shape, generator=torch.Generator().manual_seed(2)).double() - noise
    words[:, :256] = 0
    for direction in (noise, words):
        h = 1e-5
        up, down = (objective.evaluate(z + s * h * direction, rows, False, "").loss for s in (1, -1))
        expected = (gradient * direction).sum(dim=1)
        assert torch.allclose((up - down) / (2 * h), expected, rtol=1e-3) and (expected.abs() > 1e-6).all()


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


@pytest.mark.parametrize("variables", ["noise", "prompt", "both"])
def test_only_what_is_asked_for_moves(pipe, variables):
    """A step that is long enough to see: the image of the best noise and embedding is the best image."""
    settings = quiet(pipe, variables=variables, optimizer="adam[learning_rate=0.5]")
    result, words = settings.optimize(PROMPTS, 4), LatentModel(pipe).encode(PROMPTS)["cond"]["encoder_hidden_states"]
    assert (result.rewards > result.rewards_before).all()
    moved = not torch.equal(result.noises, result.noises_before)
    assert moved == (variables != "prompt")
    assert (result.embeddings is None) == (variables == "noise")
    if variables != "noise":
        assert not torch.allclose(result.embeddings, words, atol=1e-3)
        model = LatentModel(pipe)
        conds = {"cond": {"encoder_hidden_states": result.embeddings}}
        predict = guided(model.denoiser, Plain(), conds)
        *_, end = sample(euler, predict, Path(result.noises), model.levels(1))
        assert torch.allclose(model.decode(end.x), result.images, atol=1e-4)


# ------------------------------------------------------------------------------------------------ without a gradient


@pytest.mark.parametrize("name", SEARCHES)
def test_a_reward_without_a_gradient_is_searched_and_its_calls_are_counted(pipe, name):
    reward = Steps()
    result = quiet(pipe, reward, optimizer=f"{optional(name)}[candidates=6]").optimize(PROMPTS, 4)
    assert [len(prompts) for prompts in reward.calls] == [2, 12, 12, 12]
    assert reward.calls[1] == [PROMPTS[0]] * 6 + [PROMPTS[1]] * 6
    assert result.reward_calls.tolist() == [1 + 3 * 6] * 2
    assert (result.rewards >= result.rewards_before).all() and (result.rewards > result.rewards_before).any()
    assert torch.equal(Steps()(result.images, PROMPTS), result.rewards)
    with pytest.raises(UserError, match="'Steps' is not differentiable"):
        quiet(pipe, reward)


def test_a_first_order_run_calls_the_reward_once_an_iteration(pipe):
    assert quiet(pipe).optimize(PROMPTS, 4).reward_calls.tolist() == [4, 4]


# ------------------------------------------------------------------------------------------------ steps and memory


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


def test_the_noise_of_a_stochastic_sampler_is_each_samples_own_and_stays(exact):
    settings = quiet(exact, num_inference_steps=3, sampler="ancestral", learning_rate=0.0)
    both = settings.optimize(PROMPTS, 3, seed=1)
    assert all(len(set(both.curve("total", row))) == 1 for row in range(2))  # nothing moves: the objective is one
    assert torch.allclose(both.images[1:], settings.optimize(PROMPTS[1:], 1, seed=2).images, atol=1e-10)
    twins = settings.optimize(PROMPTS[1:], 1, seed=2, seeds_per_prompt=2, start=both.noises[1:])
    assert not torch.allclose(twins.images[0], twins.images[1], atol=1e-3)  # their samplers' noise differs


def test_samples_that_are_run_in_parts_are_the_batch(exact):
    """Three of four, two at a time, as a plan for a memory budget asks."""
    settings = quiet(exact, num_inference_steps=2, variables="both", sampler="ancestral")
    objective, _ = settings._objective(PROMPTS, 2, 0, None, 2, None)
    small = replace(objective, plan=replace(objective.plan, micro_batch=2))
    z, every, rows = objective.unknowns.start(), torch.arange(4), torch.tensor([0, 1, 3])
    whole, parts = objective.evaluate(z, every, True, ""), small.evaluate(z[rows], rows, True, "")
    for key in ("images", "loss", "gradient"):
        assert torch.allclose(whole._asdict()[key][rows], parts._asdict()[key], atol=1e-10), key
    assert torch.allclose(whole.record.total[rows], parts.record.total) and len(parts.record.grad_norm) == 3


@pytest.mark.parametrize("mode", ["revolve:1", "adjoint:rk4", "reversible:bdia", "lean"])
def test_every_engine_mode_raises_the_reward_of_noise_and_prompt(pipe, mode):
    settings = quiet(pipe, gradient=mode, num_inference_steps=2, variables="both", learning_rate=3.0)
    result = settings.optimize(PROMPTS[:1], 4)
    assert result.rewards.item() > result.rewards_before.item()


@pytest.mark.slow
def test_twenty_steps_of_tiny_fit_their_budget_with_the_full_gradient():
    """Weights, states and all within 40 MiB, where mode "full" is predicted to take 142 MiB."""
    pipe, reward, budget = models.load("tiny"), load_reward("contrast"), "40MiB"
    settings = ReNO(pipe, reward, num_inference_steps=20, guidance=CFG(3.0), progress=False, memory_budget=budget)
    weights = sum(p.nbytes for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())
    (full, _) = replace(settings, memory_budget=None, gradient="full")._objective("a red circle", 2, 0, None, 1, None)
    (fitted, _) = settings._objective("a red circle", 2, 0, None, 1, None)
    assert fitted.plan.gradient != "full" and "the fastest, full" in fitted.plan.why
    z, rows = full.unknowns.start(), torch.zeros(1, dtype=torch.long)
    expected = full.evaluate(z, rows, True, "").gradient
    with LiveBytes() as live:
        found = fitted.evaluate(z, rows, True, "").gradient
    assert live.peak + weights <= parse_size(budget)
    assert (found - expected).norm() <= 1e-5 * expected.norm() and expected.norm() > 0


# ------------------------------------------------------------------------------------------------ half precision


def one_step(prediction_type, dtype=torch.float32):
    """A pipeline whose one step goes from nearly pure noise to data, as a turbo model's does."""
    scheduler = pipelines.ddim(prediction_type, timestep_spacing="trailing")
    return pipelines.sd(prediction_type, scheduler=scheduler).to(dtype)


def test_bfloat16_has_the_gradient_and_the_reward_of_float32():
    """Cosine at least 0.99, and the final reward within 5 %; noise and regulariser stay in float32 or better."""
    prompts, found = [*PROMPTS, "red square"], {}
    start = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        settings = quiet(one_step("v_prediction", dtype), learning_rate=3.0)
        objective, _ = settings._objective(prompts, 2, 0, None, 1, start)
        gradient = objective.evaluate(objective.unknowns.start(), torch.arange(3), True, "").gradient
        found[dtype] = gradient, settings.optimize(prompts, 8, start=start)
    (g, a), (h, b) = found[torch.float32], found[torch.bfloat16]
    assert b.noises.dtype == torch.float32 and b.history[0].regularizer.dtype == torch.float64
    assert (torch.cosine_similarity(g, h) >= 0.99).all() and not torch.equal(g, h)
    assert torch.allclose(b.rewards, a.rewards, rtol=0.05) and (b.rewards > 2 * b.rewards_before).all()


@pytest.mark.slow
def test_bfloat16_reaches_the_reward_of_float32_on_tiny_turbo():
    """Eight noises, ten iterations. A single gradient may be far off: the one step multiplies the rounding of eps."""
    relation, other = "a blue square above a yellow triangle", "a red circle left of a blue square"
    prompts, found = ["a red circle", relation, other, "two green triangles"] * 2, {}
    for dtype in (torch.float32, torch.bfloat16):
        settings = quiet(models.load("tiny-turbo", torch_dtype=dtype), {"tiny-clip": 1.0})
        objective, _ = settings._objective(prompts, 2, 0, None, 1, None)
        gradient = objective.evaluate(objective.unknowns.start(), torch.arange(8), True, "").gradient
        found[dtype] = gradient, settings.optimize(prompts, 10)
    (g, a), (h, b) = found[torch.float32], found[torch.bfloat16]
    assert torch.cosine_similarity(g, h).median() >= 0.99 and not torch.equal(g, h)
    away = (b.rewards / a.rewards - 1).abs()
    assert b.rewards.mean().item() == pytest.approx(a.rewards.mean().item(), rel=0.05)
    assert (away <= 0.05).sum() >= 7, away
    assert (b.rewards - b.rewards_before).mean() > 0.7 * (a.rewards - a.rewards_before).mean() > 0


def test_a_step_that_multiplies_the_rounding_is_said():
    """x0 = (x - sigma eps) / alpha at alpha = 0.068: an eps network's rounding times 15, and no other's."""
    caution = run_folder.precision(quiet(one_step("epsilon", torch.bfloat16)))["precision"]
    assert "bfloat16 rounds eps by 0.008, which the first step multiplies by 15" in caution
    for prediction_type, dtype in (("epsilon", torch.float32), ("v_prediction", torch.bfloat16)):
        assert run_folder.precision(quiet(one_step(prediction_type, dtype))) == {}
    assert run_folder.precision(quiet(one_step("epsilon", torch.bfloat16), num_inference_steps=8)) == {}


# ------------------------------------------------------------------------------------------------ who leaves


class Counting(Linear):
    """Remembers what it was asked for, and puts the first prompt far above the second."""

    seen: list = []

    def __call__(self, images, prompts):
        self.seen.append(list(prompts))
        return super().__call__(images, prompts) + torch.tensor([1000.0 * (p == PROMPTS[0]) for p in prompts])


def test_a_sample_that_is_done_leaves_the_batch(pipe):
    reward = Counting()
    free = quiet(pipe, reward, learning_rate=2.0, decode_batch=2).optimize(PROMPTS, 6)
    target = sorted(free.curve("total", 0))[3]
    reward.seen.clear()
    assert target > max(free.curve("total", 1))  # the other one does not reach it
    result = quiet(pipe, reward, learning_rate=2.0, target=target, decode_batch=2).optimize(PROMPTS, 6)
    stays = len(result.curve("total", 0))
    assert reward.seen == [PROMPTS] * stays + [PROMPTS[1:]] * (6 - stays) and stays < 6
    assert result.stopped == ["target", ""] and result.rewards[0] >= target
    assert result.history[-1].total.isnan().tolist() == [True, False]
    assert result.reward_calls.tolist() == [stays, 6]
    assert torch.allclose(result.noises[1], free.noises[1], atol=1e-5)
    assert len(result.curve("total")) == 6 and all(v == v for v in result.curve("total"))
    worse = quiet(pipe, learning_rate=0.0, patience=2).optimize(PROMPTS, 9)  # nothing moves
    assert worse.stopped == ["patience"] * 2 and worse.reward_calls.tolist() == [3, 3]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_who_stays_moves_as_if_alone_under_any_optimizer(exact, name):
    """The first of two is done after its second iteration; its optimiser's memory leaves with it."""
    settings = quiet(exact, Counting(), optimizer=optional(name), regularizer="spectral")
    free = settings.optimize(PROMPTS, 5)
    target = max(free.curve("total", 0)[:2])
    result = replace(settings, target=target).optimize(PROMPTS, 5)
    stays = next(i for i, total in enumerate(free.curve("total", 0)) if total >= target) + 1
    assert result.stopped == ["target", ""] and stays <= 2 and len(result.curve("total", 0)) == stays
    assert (result.noises[1] - free.noises[1]).abs().max() < 1e-8
    assert result.curve("total", 1) == pytest.approx(free.curve("total", 1), abs=1e-8)


class Breaking(Linear):
    """Not finite for one prompt from the third image on."""

    def __init__(self):
        object.__setattr__(self, "count", [0])

    def __call__(self, images, prompts):
        self.count[0] += 1
        scores = super().__call__(images, prompts)
        nan, good = torch.tensor(float("nan")), torch.ones(())
        return scores * torch.stack([nan if self.count[0] > 2 and p == PROMPTS[0] else good for p in prompts])


@pytest.mark.parametrize("name", ["sgd", "neighbours"])
def test_a_sample_that_becomes_not_finite_leaves_with_what_it_has(pipe, name):
    result = quiet(pipe, Breaking(), optimizer=name, decode_batch=2).optimize(PROMPTS, 5)
    clean = quiet(pipe, optimizer=name).optimize(PROMPTS, 5)
    assert result.stopped == ["not finite", ""]
    assert result.rewards.isfinite().all() and result.images.isfinite().all()
    assert torch.allclose(result.noises[1], clean.noises[1], atol=1e-5)
    assert torch.equal(result.rewards[0], torch.tensor(result.curve("total", 0)[:2]).max().to(result.rewards))


class Bending(Breaking):
    """As Breaking, but the score stays, and its gradient is not finite."""

    def __call__(self, images, prompts):
        self.count[0] += 1
        broken = [self.count[0] > 2 and p == PROMPTS[0] for p in prompts]
        bent = [(0 * image).sqrt() if bad else 0 * image for image, bad in zip(images, broken, strict=True)]
        return Linear()(images + torch.stack(bent), prompts)


@pytest.mark.parametrize("gradient", ["checkpoint", "revolve:1", "adjoint:heun", "reversible:bdia"])
def test_a_sample_whose_gradient_becomes_not_finite_leaves_alone(pipe, gradient):
    """In every mode: a sweep that goes over the whole batch, too, gives the others theirs."""
    options = {"num_inference_steps": 2, "gradient": gradient, "decode_batch": 2}
    result = quiet(pipe, Bending(), **options).optimize(PROMPTS, 5)
    clean = quiet(pipe, **options).optimize(PROMPTS, 5)
    assert result.stopped == ["not finite", ""] and result.rewards.isfinite().all()
    assert torch.allclose(result.noises[1], clean.noises[1], atol=1e-5)


# ------------------------------------------------------------------------------------------------ what is held out


@dataclass(frozen=True)
class Peaked(Linear):
    """Highest where Linear is `at`: it rises with it, then falls."""

    at: float = 0.0
    differentiable = False

    def __call__(self, images, prompts):
        return -(super().__call__(images, prompts) - self.at).abs()


@pytest.mark.slow
def test_the_iteration_from_which_a_held_out_reward_falls_is_reported(pipe):
    free = quiet(pipe, learning_rate=2.0).optimize(PROMPTS[:1], 24)
    curve = free.curve("total", 0)
    watched = Peaked(curve[9])
    result = quiet(pipe, learning_rate=2.0, held_out=watched).optimize(PROMPTS[:1], 24)
    assert torch.equal(result.noises, free.noises)  # it is watched alone
    assert result.curve("held_out", 0) == pytest.approx([-abs(v - curve[9]) for v in curve])
    parting = result.parting(0)
    assert abs(parting.best - 10) <= 1 and parting.rise > 0 and parting.drop > 0
    assert result.parting() == parting
    assert quiet(pipe, held_out=Linear(), learning_rate=2.0).optimize(PROMPTS, 12).parting() is None
    with pytest.raises(UserError, match="no reward was held out"):
        free.parting()


# ------------------------------------------------------------------------------------------------ where it begins


def test_a_given_noise_is_where_it_begins_and_the_distance_to_it_is_kept(pipe):
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    for name in ("sgd", "adam", "spsa"):
        settings = quiet(pipe, optimizer=name, max_distance=0.02, variables="both")
        for live in settings.iterate(PROMPTS, 6, start=start):
            away = (live.noises - start).flatten(1).norm(dim=1) / start.norm()
            assert (away <= 0.02 + 1e-6).all()
            if live.iteration == 0:
                assert torch.equal(live.noises, start.expand(2, -1, -1, -1))
        result = live.best
        words = LatentModel(pipe).encode(PROMPTS)["cond"]["encoder_hidden_states"]
        moved = (result.embeddings - words).flatten(1).norm(dim=1) / words.flatten(1).norm(dim=1)
        assert (moved <= 0.02 + 1e-6).all()
    assert away.max() > 0.015  # it did press against it
    with pytest.raises(UserError, match=r"is \(1, 4, 4, 4\): it must be \(2, 4, 8, 8\)"):
        quiet(pipe).optimize(PROMPTS, 2, start=torch.zeros(1, 4, 4, 4))
    with pytest.raises(UserError, match="not finite"):
        quiet(pipe).optimize(PROMPTS, 2, start=start * float("nan"))


@pytest.mark.parametrize("guidance", [None, CFGpp(0.4)])
def test_an_inverted_picture_is_what_an_edit_begins_with(pipe, guidance):
    """The first image of the run is `guidance.invert.edit`'s: inverted under one prompt, sampled under another."""
    settings, model = quiet(pipe, num_inference_steps=4, guidance=guidance), LatentModel(pipe)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = settings.inverted(picture, PROMPTS[0], 4)
    source, target = model.encode(PROMPTS[0]), model.encode(PROMPTS[1])
    latents = model.encode_images(picture)
    expected = edit(model.denoiser, guidance or Plain(), latents, source, target, model.levels(4))
    assert torch.allclose(settings.optimize(PROMPTS[1], 1, start=noise).images, model.decode(expected), atol=1e-4)


# ------------------------------------------------------------------------------------------------ the paper's settings


def test_the_issues_lines_run_as_they_stand(pipe, monkeypatch):
    from difftune import ReNO, load_reward

    made = {}
    monkeypatch.setattr("rewards.compose.load", lambda name: made.setdefault(name, Linear()))
    reno = ReNO(pipe, reward={"hps-v2.1": 5.0, "imagereward": 1.0, "clip": 0.01, "pickscore": 0.05})
    best = reno.optimize(["a red circle left of a blue square"], iterations=3, seed=0)
    assert best.images.shape == (1, 3, 16, 16) and best.noises.shape == (1, 4, 8, 8)
    assert len(best.history) == 3 and best.rewards.item() >= best.history[0].total.item()
    assert best.history[0].parts.keys() == made.keys() == {"hps-v2.1", "imagereward", "clip", "pickscore"}
    assert best.history[0].total.item() == pytest.approx(6.06 * best.history[0].parts["clip"].item(), rel=1e-5)
    assert [state.iteration for state in reno.iterate(["red circle"], 2)] == [0, 1]
    assert callable(load_reward)


def test_the_papers_settings_are_the_defaults_of_its_models(pipe):
    turbo = pipelines.sd()
    turbo.register_to_config(_name_or_path="stabilityai/sd-turbo")
    assert setting_of(pipe, None) is None and setting_of(turbo, None) is PAPER["sd-turbo"]
    own = quiet(turbo)
    assert own.size == (512, 512) and quiet(turbo, height=16).size == (16, 512)
    small = {"height": 16, "width": 16}
    one = [x.noises for x in quiet(turbo, grad_clip=1e-3, **small).iterate(PROMPTS[:1], 2)]
    first = (one[1] - one[0]).norm().item()
    assert first == pytest.approx(5.0 * 1e-3 * 1.9, rel=1e-2)  # the rate is 5, not 5 sqrt(256 / 16384)
    objective, _ = quiet(pipe, setting="hyper-sdxl", **small)._objective(PROMPTS[:1], 1, 0, None, 1, None)
    (now, then) = objective.levels
    assert objective.model.denoiser.clock(now).item() == 800 and then.sigma.item() == 0
    with pytest.raises(UserError, match="did you mean 'sdxl-turbo'"):
        quiet(pipe, setting="sdxl-turob")


@pytest.mark.parametrize(
    ("model", "size", "rate", "first"),
    [
        ("stabilityai/sd-turbo", 512, 5.0, None),
        ("stabilityai/sdxl-turbo", 512, 5.0, None),
        ("PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512", 512, 5.0, 400),
        ("black-forest-labs/FLUX.1-schnell", 512, 5.0, None),
        ("hyper-sdxl", 1024, 10.0, 800),
    ],
)
def test_each_model_of_the_paper_has_the_settings_of_its_code(model, size, rate, first):
    """The sheet's 4.4, and for one step alone: more steps are the scheduler's own."""
    own = pipelines.sd()
    own.register_to_config(_name_or_path=model)
    name = model if model in PAPER else None
    settings, noises = quiet(own, setting=name, height=16, width=16, grad_clip=1e-3), []
    assert quiet(own, setting=name).size == (size, size)
    for live in settings.iterate(PROMPTS[:1], 2):
        noises.append(live.noises)
    assert (noises[1] - noises[0]).norm().item() == pytest.approx(rate * 1e-3 * 1.9, rel=1e-2)
    latent = LatentModel(own)
    usual = [latent.denoiser.clock(level).item() for level in latent.levels(1)[:1]]
    assert [latent.denoiser.clock(level).item() for level in settings.levels(latent)[:-1]] == [first or usual[0]]
    several = replace(settings, num_inference_steps=3)
    assert [level.sigma for level in several.levels(latent)] == [level.sigma for level in latent.levels(3)]
    assert replace(settings, timesteps=(600, 200)).levels(latent)[0].sigma < 1 and len(noises) == 2


@pytest.mark.parametrize("spacing", ["trailing", "leading", None])
def test_the_pipeline_makes_the_picture_from_the_noise(pipe, spacing):
    """Whatever the scheduler starts with: k noise, sqrt(1 + k^2) noise, or the noise itself (None: DDIM)."""
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = EulerDiscreteScheduler(**table, timestep_spacing=spacing) if spacing else pipe.scheduler
    own = pipelines.sd(scheduler=scheduler)
    result = quiet(own, num_inference_steps=2).optimize(PROMPTS, 2)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    assert torch.allclose(own(PROMPTS, latents=result.noises, **call).images, result.images, atol=1e-4)
    assert not torch.allclose(own(PROMPTS, latents=1.01 * result.noises, **call).images, result.images, atol=1e-4)


def test_another_size_is_made_and_sdxl_is_served():
    result = quiet(pipelines.sdxl(), height=16, width=24).optimize(PROMPTS[:1], 2)
    assert result.images.shape == (1, 3, 16, 24) and result.noises.shape == (1, 4, 8, 12)


def test_normalised_rewards_are_shares_of_their_ranges(pipe):
    scores = {"brightness": 2.0, "contrast": 1.0}
    plain, normal = (next(quiet(pipe, scores, reward_scaling=n).iterate(PROMPTS, 1)).record for n in ("none", "range"))
    assert torch.equal(plain.parts["contrast"], normal.parts["contrast"])
    from rewards.registry import REWARDS

    ends = {name: REWARDS[name].range for name in scores}
    expected = sum(w * (plain.parts[n] - ends[n][0]) / (ends[n][1] - ends[n][0]) for n, w in scores.items())
    assert torch.allclose(normal.total, expected) and not torch.allclose(normal.total, plain.total)
    with pytest.raises(ValueError, match="'Linear' has no nominal range"):
        quiet(pipe, reward_scaling="range").optimize(PROMPTS, 1)


# ------------------------------------------------------------------------------------------------ what is refused


class Never(Linear):
    def __call__(self, images, prompts):
        return super().__call__(images, prompts) * float("inf")


def test_what_is_not_finite_at_once_is_named(pipe, monkeypatch):
    with pytest.raises(RunError, match=r"iteration 1: reward 'Never' is not finite.*red circle"):
        quiet(pipe, Never()).optimize(PROMPTS, 2)
    nan = lambda self, z, rows: (0 * z[:, :48].view(-1, 3, 4, 4)).sqrt()  # noqa: E731  finite, and its gradient is not
    monkeypatch.setattr(Objective, "images", nan)
    with pytest.raises(RunError, match="gradient of the noise for 'red circle' is not finite"):
        quiet(pipe).optimize(PROMPTS, 2)


class Kinked(Linear):
    """A finite score whose gradient is not."""

    def __call__(self, images, prompts):
        return super().__call__(images, prompts) + (0 * images).sqrt().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("gradient", ["full", "checkpoint", "revolve:1", "reversible:bdia"])
def test_a_gradient_that_is_not_finite_names_its_prompt_and_its_step(pipe, gradient):
    settings = quiet(pipe, num_inference_steps=3, gradient=gradient)
    words = LatentModel(pipe).encode(PROMPTS)["cond"]["encoder_hidden_states"]
    for index in (1, 2):
        with pipelines.kinked(pipe, 3, index, words[1]), pytest.raises(RunError) as error:
            settings.optimize(PROMPTS, 2)
        what = f"iteration 1, 'blue square': the gradient is not finite at step {index} of 3 (counted from the noise"
        assert str(error.value).startswith(what) and "\n" not in str(error.value)
    with pytest.raises(
        RunError, match="iteration 1, 'red circle': the gradient of the loss is not finite at the run's"
    ):
        quiet(pipe, Kinked(), num_inference_steps=3, gradient=gradient).optimize(PROMPTS, 2)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"reward": {"jpeg": 1.0}}, "'jpeg' is not differentiable.*brightness"),
        ({"reward": {"tiny-clap": 1.0}}, "did you mean 'tiny-clip'"),
        ({"gradient": "truncated:2"}, "1 to 1"),
        ({"optimizer": "adm"}, "did you mean 'adam'"),
        ({"regularizer": "xi"}, "no regularizer 'xi'; known: chi, dno, spectral"),
        ({"variables": "nois"}, "did you mean 'noise'"),
        ({"memory_budget": "6 parsecs"}, "cannot read the size"),
    ],
)
def test_what_cannot_be_is_refused_by_name(pipe, options, what):
    with pytest.raises(ValueError, match=what) as error:
        ReNO(pipe, **{"reward": {"brightness": 1.0}, **options})
    assert "\n" not in str(error.value)


def test_a_call_that_cannot_be_is_refused_by_name(pipe):
    for prompts, call, what in (
        ([], {}, "list of prompts is empty"),
        (PROMPTS, {"iterations": 0}, "iterations is 0"),
        (PROMPTS, {"seeds_per_prompt": 0}, "seeds_per_prompt is 0"),
    ):
        with pytest.raises(ValueError, match=what):
            quiet(pipe).optimize(prompts, **{"iterations": 1, **call})
    with pytest.raises(UserError, match="max_distance is -1"):
        quiet(pipe, max_distance=-1.0).optimize(PROMPTS, 1)
