"""DRaFT, ReFL, DRTune and AlignProp's truncations: which steps they train, and the divergence from the start."""

import itertools
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from difftune.configs.recipes import AlignPropConfig, DraftConfig, DrtuneConfig, ReflConfig
from difftune.pipelines import lora
from difftune.recipes import check_recipe, reward_gradient, train
from difftune.recipes.alignprop import alignprop_loss, ascend_once, draw_gaussian, draw_mask, truncation
from difftune.recipes.refl import refl_loss
from difftune.recipes.reward_gradient import count_carrying, divergence, judge_evenly, kl_rate, level_between
from difftune.rollouts.image_sampler import ImageSampler
from difftune.training import gradient_log
from difftune.training.network import ReferenceNetwork, TrainedNetwork
from difftune.training.numbering import seed_of
from rewards.simple import Brightness, Contrast
from solvers.denoiser import Path as Trail
from solvers.memory.budget import Plan
from solvers.noise import Noise
from solvers.samplers.catalogue import SAMPLERS
from tests.support import pipelines
from tests.support.toys import session_of, toy


def first(name, folder, **more):
    config = toy(name, folder, **more)
    ((metrics, state),) = islice(train(config, None, pipelines.sd(), Brightness()), 1)
    moments = {k: v for k, v in state.tensors.items() if k.startswith("optimizer.exp_avg.")}
    return metrics, torch.cat([moments[k].flatten() for k in sorted(moments)])


def test_refl_loss_golden():
    """The released code's: 1e-3 relu(2 - r)."""
    scores = torch.tensor([1.5, 2.0, 3.0], requires_grad=True)
    assert [refl_loss(s[None]).item() for s in scores] == pytest.approx([5e-4, 0, 0])
    refl_loss(scores).backward()
    assert scores.grad.tolist() == pytest.approx([-1e-3 / 3, 0, 0])


def test_each_recipe_is_its_mode_of_the_engine(tmp_path):
    for name, more, gradient in [
        ("draft", {"truncation_steps": 2}, "truncated:2"),
        ("draft", {"truncation_steps": 3}, "full"),
        ("drtune", {"truncation_steps": 3}, "truncated:3:drtune"),
        ("refl", {"truncation_min": 2, "truncation_max": 2, "loss_coeff": 1.0}, "truncated:2:refl"),
    ]:
        _, ours = first(name, tmp_path, **more)
        _, engine = first("alignprop", tmp_path, gradient=gradient)
        assert torch.allclose(ours, engine, rtol=1e-4, atol=1e-9), name
    _, other = first("alignprop", tmp_path, gradient="truncated:1")
    assert not torch.allclose(other, engine, rtol=1e-2, atol=1e-9)


def test_draft_lv_scores_every_copy(tmp_path):
    config = toy("draft", tmp_path, low_variance_copies=3, max_train_steps=1, decode_batch=24)
    seen = []

    class Counting(Brightness):
        def __call__(self, images, prompts):
            seen.append((len(images), list(prompts)))
            return super().__call__(images, prompts)

    ((metrics, _),) = train(config, None, pipelines.sd(), Counting())
    ((number, prompts),) = seen
    assert number == 6 and prompts == prompts[:2] * 3 and metrics["K"] == 1


def test_bernoulli_linear_keeps_step_i_with_its_probability():
    """(i + 1) / (T + 1), each by itself; 25 of 50 steps in the mean."""
    config = AlignPropConfig(num_inference_steps=50, truncation="bernoulli_linear")
    masks = torch.tensor([[int(d) for d in draw_mask(config, step)] for step in range(2000)], dtype=torch.float64)
    expected = torch.arange(1, 51) / 51
    error = (expected * (1 - expected) / len(masks)).sqrt()
    assert ((masks.mean(0) - expected).abs() < 4.5 * error).all()
    correlation = torch.corrcoef(masks.T).fill_diagonal_(0)
    assert correlation.abs().max() < 0.12  # five standard errors
    assert draw_mask(config, 7) == draw_mask(config, 7) != draw_mask(config, 8)
    assert "1" in draw_mask(replace(config, num_inference_steps=1), 0)


def test_bernoulli_linear_trains_and_says_how_many(tmp_path):
    config = toy("alignprop", tmp_path, truncation="bernoulli_linear")
    said = []
    found = [m["K"] for m, _ in train(config, None, pipelines.sd(), Brightness(), said.append)]
    assert found == [draw_mask(config, step).count("1") for step in range(4)]
    assert said[1] == "gradient: truncated:MASK, step i of 3 with probability (i + 1) / 4"


def test_gaussian_threshold_is_that_of_the_authors_repository():
    """t = floor(N(42, 5)) within 1..49 of 50: against the density itself."""
    config = AlignPropConfig(num_inference_steps=50, truncation="gaussian")
    found = torch.tensor([draw_gaussian(config, step) for step in range(4000)], dtype=torch.float64)
    t = torch.arange(1, 50)
    chance = Normal(42.0, 5.0).cdf(torch.stack([t + 1.0, t + 0.0])).double()
    chance = (chance[0] - chance[1]) / (chance[0] - chance[1]).sum()
    mean = float((chance * (50 - t)).sum())
    assert mean == pytest.approx(9.1, abs=0.05) and found.min() >= 1 and found.max() <= 49
    assert abs(found.mean() - mean) < 4 * found.std() / len(found) ** 0.5
    assert found.quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist() == [2, 9, 17]
    assert draw_gaussian(config, 7) == draw_gaussian(config, 7)
    assert draw_gaussian(replace(config, num_inference_steps=1), 0) == 1


def test_gaussian_trains_the_last_steps_and_says_so(tmp_path):
    config = toy("alignprop", tmp_path, truncation="gaussian")
    said = []
    found = [m["K"] for m, _ in train(config, None, pipelines.sd(), Brightness(), said.append)]
    assert found == [draw_gaussian(config, step) for step in range(4)]
    assert said[1] == "gradient: truncated:K, K = 3 - N(2.52, 0.3) anew for each optimiser step"


def test_run_whose_gradients_are_chance_says_what_to_change(tmp_path, capsys, monkeypatch):
    """Once, and never of a run whose gradients agree."""
    monkeypatch.setattr(gradient_log, "FIRST", 2)
    chance = toy("alignprop", tmp_path, max_train_steps=5, guidance="cfg")
    found = list(train(chance, None, pipelines.sd(), Fickle()))
    assert all("grad_cosine" in metrics for metrics, _ in found[1:]) and "grad_cosine" not in found[0][0]
    said = capsys.readouterr().err
    assert said.count("most of this run is chance: the noise scale of the gradients is ") == 1
    assert "all 5 updates of 2 images see 10; train without guidance (--guidance none), or with more images" in said
    found = list(train(replace(chance, gradient="truncated:1"), None, pipelines.sd(), Brightness()))
    assert found[-1][0]["grad_cosine"] > 0.5 and found[-1][0]["noise_scale"] < 10
    assert "chance" not in capsys.readouterr().err


class Fickle(Brightness):
    """Brightness to be raised and lowered by turns, so that each gradient undoes the one before."""

    sign = 1

    def __call__(self, images, prompts):
        self.__dict__["sign"] = -self.sign
        return self.sign * images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("gradient", "kept"),
    [("truncated:4", 4), ("truncated:4:refl", 1), ("truncated:2:draft_lv", 1), ("truncated:0101:mask", 2), ("full", 4)],
)
def test_steps_that_carry_gradient(gradient, kept):
    assert count_carrying(gradient, steps=4) == kept


@pytest.mark.parametrize(
    ("config", "settings", "what"),
    [
        (DraftConfig, {"num_inference_steps": 3, "truncation_steps": 4}, "1 to 3"),
        (DraftConfig, {"truncation_steps": 0}, "truncation_steps is 0"),
        (DraftConfig, {"low_variance_copies": -1}, "low_variance_copies is -1"),
        (ReflConfig, {"truncation_min": 3, "truncation_max": 2}, "truncation_max is 2"),
        (DrtuneConfig, {"truncation_steps": 0}, "truncation_steps is 0"),
        (AlignPropConfig, {"truncation": "sufix"}, "did you mean 'suffix'"),
        (AlignPropConfig, {"kl_coeff": -1.0}, "kl_coeff is -1"),
        (AlignPropConfig, {"reward": ["jpeg"]}, "not differentiable"),
    ],
)
def test_bad_settings_are_one_sentence(config, settings, what):
    with pytest.raises(ValueError, match=what) as error:
        check_recipe(config(**settings), pipe=object())
    assert "\n" not in str(error.value)


def test_modes_follow_the_settings():
    assert truncation(AlignPropConfig(gradient="full"))[:2] == (None, "full")
    exact = AlignPropConfig(truncation_min=25, truncation_max=25, memory_budget="1GiB")
    assert truncation(exact)[:2] == (None, None)
    assert truncation(AlignPropConfig()).greatest == "truncated:10"


# ------------------------------------------------------------------------------------------------ KL to the reference


@pytest.mark.parametrize("full", [False, True])
def test_divergence_is_zero_at_the_start_and_its_gradient_reaches_the_weights(tmp_path, full):
    config = toy("alignprop", tmp_path, full_finetuning=full, kl_coeff=1.0)
    for moved in (False, True):
        session = session_of(config, pipelines.sd())
        with torch.no_grad():
            for i, weight in enumerate(session.run.weights.values()):
                weight += moved * 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
        drawn = session.images.draw(session.prompts, range(2), "full")
        found, again = (divergence(session.images, session.run.reference, drawn, range(2)) for _ in range(2))
        assert (found.item() != 0) is moved
        assert found.item() == again.item()  # the same level and noise
        (drawn.path.x.sum() + found).backward()
        assert all(w.grad is not None for w in session.run.weights.values())


def test_parts_of_unlike_sizes_give_the_gradient_of_the_whole_batch(tmp_path):
    """As a plan for a memory budget cuts three images into two and one."""
    found = []
    for micro in (3, 2):
        config = toy("alignprop", tmp_path, train_batch_size=3, max_grad_norm=1e9)
        session = session_of(config, pipelines.sd(), Brightness())
        metrics = ascend_once(session, Plan("full", micro, 3), "full", alignprop_loss, 0)
        assert metrics["loss"] == pytest.approx(-metrics["reward_mean"])
        run = session.run
        found.append(torch.cat([run.optimizer.state[weight]["exp_avg"].flatten() for weight in run.weights.values()]))
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()


@pytest.mark.parametrize("copies", [1, 3])
def test_divergence_by_hand(tmp_path, copies):
    """The samples' own latents, noised to one level by noise of their own; draft_lv's copies count once."""
    session = session_of(toy("alignprop", tmp_path, kl_coeff=1.0), pipelines.sd())
    with torch.no_grad():
        for i, weight in enumerate(session.run.weights.values()):
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    images, reference, numbers = session.images, session.run.reference, range(4, 6)
    drawn = images.draw(session.prompts, numbers, "full" if copies == 1 else f"truncated:{copies}:draft_lv")
    assert len(drawn.path.x) == 2 * copies
    generators = [torch.Generator().manual_seed(seed_of(0, i, "kl")) for i in numbers]
    at, width = level_between(images.levels, torch.rand((), generator=generators[0]).item())
    noise = torch.stack([torch.randn(drawn.path.x.shape[1:], generator=generator) for generator in generators])
    with torch.no_grad():
        x = Trail(at.alpha * drawn.path.x[:2] + at.sigma * noise)
        eps, before = (of.predict(drawn.conds)(x, at).eps for of in (images, images.with_network(reference)))
    found = divergence(images, reference, drawn, numbers)
    assert found.item() == pytest.approx(width * (eps - before).square().mean().item(), rel=1e-5)


def test_the_loss_that_is_reported_is_the_rewards_alone(tmp_path):
    found = [
        metrics for metrics, _ in train(toy("alignprop", tmp_path, kl_coeff=1e3), None, pipelines.sd(), Brightness())
    ]
    assert [m["loss"] for m in found] == pytest.approx([-m["reward_mean"] for m in found])
    assert found[0]["kl"] == 0 < found[-1]["kl"]


def test_divergence_of_gaussians_is_the_closed_form():
    """Two models that are exact for N(m, s^2) and N(m', s^2): KL = (m - m')^2 / (2 s^2), from their samples."""
    s, means = 0.7, (1.3, 0.9)
    levels = [Noise(torch.tensor(a).double(), torch.tensor((1 - a * a) ** 0.5).double()) for a in (0.002, 0.5, 0.9999)]
    places = (torch.arange(4000) + 0.5) / 4000
    total = 0.0
    for place in places.tolist():
        at, width = level_between(levels, place)
        assert at.alpha**2 + at.sigma**2 == pytest.approx(1)
        # eps = sigma (x - alpha m) / (alpha^2 s^2 + sigma^2): the difference does not depend on x
        rate = (at.sigma * at.alpha * (means[0] - means[1]) / (at.alpha**2 * s**2 + at.sigma**2)) ** 2
        total += width * rate.item() / len(places)
    expected = kl_divergence(Normal(means[0], s), Normal(means[1], s)).item()
    assert total == pytest.approx(expected, rel=2e-3)


def test_between_keeps_the_coordinates_of_the_levels():
    for low, high in [((0.9, 0.1), (0.05, 0.95)), ((1.0, 0.1), (1.0, 80.0))]:
        levels = [Noise(torch.tensor(0.0), torch.tensor(1.0))] if low[0] < 1 else []
        levels += [Noise(torch.tensor(a), torch.tensor(b)) for a, b in (high, low)]
        at, width = level_between([*levels, Noise(torch.tensor(1.0), torch.tensor(0.0))], 0.5)
        ends = [torch.tensor(b / a).log() for a, b in (low, high)]
        assert width == pytest.approx((ends[1] - ends[0]).item(), rel=1e-5)
        assert (at.sigma / at.alpha).log().item() == pytest.approx((sum(ends) / 2).item(), rel=1e-5)
        scale = at.alpha + at.sigma if low[0] < 1 else at.alpha
        assert scale.item() == pytest.approx(1)


@pytest.mark.slow
def test_kl_holds_the_model_back(tmp_path):
    """The reward is Contrast, whose gradient a large coefficient outweighs."""
    moved = []
    for coefficient in (0.0, 1e4):
        config = toy("alignprop", tmp_path, kl_coeff=coefficient, learning_rate=3e-2, max_train_steps=6)
        pipe = pipelines.sd()
        found = [metrics for metrics, _ in train(config, None, pipe, Contrast())]
        assert all(("kl" in m) == (coefficient > 0) for m in found)
        run_chain = ImageSampler.of(config, pipe, TrainedNetwork(pipe.unet, torch.float32))
        fresh = ImageSampler.of(config, pipe, ReferenceNetwork(pipe.unet, torch.float32))
        with torch.no_grad():
            drawn = run_chain.draw(lambda i: "red circle", range(2), "full")
            at, _ = level_between(run_chain.levels, 0.5)
            moved.append(
                (run_chain.predict(drawn.conds)(drawn.path, at).eps - fresh.predict(drawn.conds)(drawn.path, at).eps)
                .square()
                .mean()
                .item()
            )
    assert moved[1] < 0.5 * moved[0]


# ------------------------------------------------------------------------------------------------ the reference pass


def test_reference_pass_leaves_the_adapter_as_it_was(tmp_path):
    """Between forward and backward, with and without recomputation, and where it raises."""
    pipe = pipelines.sd()
    plain = TrainedNetwork(pipelines.sd().unet, torch.float32)
    base = ImageSampler.of(toy("alignprop", tmp_path), pipelines.sd(), plain)
    weights = lora.add(pipe, rank=2)
    with torch.no_grad():
        for i, weight in enumerate(weights.values()):
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    config = toy("alignprop", tmp_path)
    chain = ImageSampler.of(config, pipe, TrainedNetwork(pipe.unet, torch.float32))
    reference = chain.with_network(ReferenceNetwork(pipe.unet, torch.float32))
    found = {}
    for gradient in ("full", "checkpoint", "revolve:1"):
        for between_passes in (False, True):
            images, _ = chain(lambda i: "red circle", [0, 1], gradient)
            if between_passes:
                with torch.no_grad():
                    before, _ = reference(lambda i: "red circle", [0, 1], "full")
                    assert torch.equal(before, base(lambda i: "red circle", [0, 1], "full")[0])
            grads = torch.autograd.grad(images.mean(), list(weights.values()))
            found[gradient, between_passes] = torch.cat([g.flatten() for g in grads])
        assert torch.equal(found[gradient, False], found[gradient, True])
    assert found["full", True].abs().max() > 0
    assert torch.allclose(found["full", True], found["checkpoint", True], rtol=1e-5, atol=1e-9)
    with pytest.raises(KeyError), lora.off(pipe.unet):
        raise KeyError
    assert all(w.requires_grad for w in weights.values())
    with torch.no_grad():
        after = chain(lambda i: "red circle", [0, 1], "full")[0]
    assert torch.equal(after, images.detach())


# ------------------------------------------------------------------------------------------------ pixels


def test_a_grey_latent_reaches_the_reward_as_grey_and_a_saturated_one_has_no_gradient(tmp_path):
    pipe = pipelines.sd()
    chain = ImageSampler.of(toy("alignprop", tmp_path), pipe, TrainedNetwork(pipe.unet, torch.float32))
    shift = torch.zeros((), requires_grad=True)
    seen = {}
    for level, name in ((0.0, "grey"), (3.0, "white"), (-3.0, "black"), (0.5, "light")):
        pipe.vae.decode = lambda z, return_dict, level=level: (torch.full((1, 3, 4, 4), level) + shift + 0 * z.sum(),)
        images = chain.model.decode(torch.zeros(1, 4, 8, 8))
        (gradient,) = torch.autograd.grad(images.sum(), shift)
        seen[name] = (images.unique().tolist(), gradient.item())
    assert seen == {"grey": ([0.5], 24.0), "white": ([1.0], 0.0), "black": ([0.0], 0.0), "light": ([0.75], 24.0)}


def test_updates_weigh_alike_whatever_their_k_where_the_gradient_is_normalised(tmp_path):
    norms = {}
    for k, normalized in itertools.product((1, 3), (False, True)):
        options = {"truncation_min": k, "truncation_max": k, "normalize_gradient": normalized}
        metrics, moments = first("alignprop", tmp_path, **options)
        norms[k, normalized] = moments.norm().item()
        assert metrics["grad_norm"] == pytest.approx(10 * norms[k, False], rel=1e-3)  # AdamW's first mean is a tenth
    assert norms[3, False] > 1.1 * norms[1, False]
    assert norms[1, True] == norms[3, True] == pytest.approx(0.1, rel=1e-4)


def test_gradients_of_all_images_have_the_length_that_the_loss_gives_their_rewards():
    """R_b = s_b |x_b - m|^2 has the direction of x_b - m, whatever its steepness s_b; a reward at its top has none."""
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    steepness, weights = torch.tensor([1.0, 100.0, -1e-3, 0.0]).double(), torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    rewards = judge_evenly(lambda y: steepness * (y - 0.3).square().flatten(1).sum(1), x)
    (weights * rewards).sum().backward()
    direction = (x - 0.3).detach() / (x - 0.3).detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(x.grad, (weights * steepness.sign()).view(-1, 1, 1, 1) * direction)
    assert torch.equal(rewards, steepness * (x - 0.3).square().flatten(1).sum(1))


class Steep(Brightness):
    """Brightness, a hundredfold in the first image of each batch."""

    def __call__(self, images, prompts):
        scores = super().__call__(images, prompts)
        return torch.cat([100 * scores[:1], scores[1:]])


@pytest.mark.parametrize("name", ["alignprop", "draft", "refl", "drtune"])
def test_no_image_outweighs_the_others_where_their_gradients_are_normalised(name, tmp_path):
    def moments(reward, **more):
        # refl's threshold is above all rewards; decoded at once, or each image is the first of its batch
        more |= {"reward_threshold": 1e3} if name == "refl" else {}
        ((_, state),) = islice(train(toy(name, tmp_path, decode_batch=8, **more), None, pipelines.sd(), reward), 1)
        found = {k: v for k, v in state.tensors.items() if k.startswith("optimizer.exp_avg.")}
        return torch.cat([found[k].flatten() for k in sorted(found)])

    flat, steep = (moments(reward, normalize_reward_gradients=True) for reward in (Brightness(), Steep()))
    assert torch.allclose(flat, steep, rtol=1e-3, atol=1e-4 * flat.abs().max().item())
    assert not torch.allclose(moments(Brightness()), moments(Steep()), rtol=0.1)


def test_samplers_with_noise_train_too(tmp_path):
    assert "ancestral" in SAMPLERS
    metrics, moments = first("alignprop", tmp_path, sampler="ancestral", truncation_min=3)
    assert moments.abs().max() > 0 and metrics["K"] == 3


def test_module_is_what_it_says():
    assert kl_rate(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])).item() == 2.5


def test_the_plan_is_that_of_the_main_process(tmp_path, monkeypatch):
    """What is measured may differ by a row among processes, and one with fewer backward passes would leave the others
    waiting."""
    session = session_of(toy("alignprop", tmp_path), pipelines.sd(), Brightness())
    mains = Plan("checkpoint", 1, 2)
    monkeypatch.setattr(reward_gradient, "told_by_each", lambda make: [mains, make()])
    with reward_gradient.plan_engine(session, reward_gradient.Modes(None, "checkpoint")) as plan:
        assert plan is mains
