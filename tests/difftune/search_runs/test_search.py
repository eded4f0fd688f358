"""Search on diffusers pipelines: counted calls, prompts that do not touch each other, and searches that are killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from math import prod
from pathlib import Path as File

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save
from tqdm import tqdm

from difftune import SEARCHES, search
from difftune.cli.program import cli
from difftune.configs.search import SearchConfig
from difftune.errors import RunError, UserError
from difftune.lookup import reward_named
from difftune.pipelines import method_parts
from difftune.pipelines.engine import frozen
from difftune.search_runs import run_folder as command
from difftune.search_runs import search as searching
from difftune.search_runs.experts import Expert
from difftune.search_runs.flags import method_settings_of
from difftune.search_runs.held import kept, measure_row, rows_within
from difftune.search_runs.problem import Adapter
from difftune.search_runs.search import GRADIENTS, Search
from guidance.guided import guided
from guidance.methods.catalogue import (
    CFG,
    NAG,
    AdaptiveGuidance,
    Between,
    CFGpp,
    ClassifierGuidance,
    DynamicCFG,
    PerpNeg,
    Plain,
)
from guidance.search.fk import FK
from guidance.search.problem import Problem, estimate
from solvers.denoiser import Path, Prediction
from solvers.latent import LatentModel
from solvers.memory.live import LiveBytes
from solvers.noise import flow, grid
from solvers.samplers.catalogue import ancestral, euler, sample
from tests.support import dits, pipelines

PROMPTS = ["red circle", "blue square"]
PARTICLES = {
    "fk": {"inverse_temperature": 0.1},
    "tds": {"inverse_temperature": 0.01},
    "svdd": {"candidates": 2},
    "dts": {"branches": 3, "inverse_temperature": 0.1, "widening": 1.0, "growth": 0.5},
    "dts-star-paper": {"branches": 3},
    "dts-star": {"branches": 3, "widening": 1.0, "growth": 0.5},  # the third rollout starts below the root
}


@dataclass(frozen=True)
class Left:
    """The brightness of the left half minus that of the right: prompts do not matter."""

    differentiable = True

    def __call__(self, images, prompts):
        half = images.shape[-1] // 2
        return images[..., :half].sum(dim=(1, 2, 3)) - images[..., half:].sum(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def pipe():
    return pipelines.sd()


def searched(pipe, prompts=PROMPTS, method="fk", nfe_budget=48, **options) -> Search:
    """A search of three steps: 6 NFEs a particle under CFG."""
    settings = {"num_inference_steps": 3, "progress": False, **PARTICLES.get(method, {}), **options}
    return search(pipe, prompts, method, settings.pop("reward", Left()), nfe_budget, **settings)


# ------------------------------------------------------------------------------------------------ results and counts


def test_the_network_is_called_as_often_as_is_said(pipe):
    rows = []
    hook = pipe.unet.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    found = searched(pipe).run()
    hook.remove()
    assert found.nfe.tolist() == [48, 48]
    assert sum(rows) == 96
    assert repr(found).startswith("Found(rewards=[") and len(repr(found)) < 200
    assert found.reward_calls.tolist() == [8 * 2, 8 * 2]  # after a step of three and at the end, of eight particles


def test_the_image_has_the_reward_that_is_said(pipe):
    best = searched(pipe).run()
    assert best.images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(Left()(best.images, PROMPTS).double(), best.rewards, rtol=1e-4, atol=1e-4)
    assert best.history[-1].reward == best.rewards.tolist()
    assert best.history[-1].nfe == best.nfe.tolist()


def test_a_search_is_followed_live_and_left(pipe):
    seen = []
    for live in searched(pipe, method="best-of-n", particles=1, nfe_budget=600):
        seen.append(live.rewards)
        if live.rewards.min() > -torch.inf and live.nfe.max() >= 18:
            break
    assert live.nfe.tolist() == [18, 18]
    assert all((b >= a).all() for a, b in zip(seen, seen[1:], strict=False))
    assert live.images.isfinite().all()


def test_the_progress_bar_says_the_best_so_far_and_counts(pipe, monkeypatch):
    """On a terminal, unless it is turned off: of all prompts, the mean best reward, the NFEs and the reward calls."""
    made, text = [], StringIO()

    def bar(**options) -> tqdm:
        made.append(options["disable"])
        return tqdm(**{**options, "disable": False, "file": text, "mininterval": 0, "ncols": 200})

    monkeypatch.setattr(searching, "tqdm", bar)
    seen = list(searched(pipe, method="best-of-n", particles=1, nfe_budget=18, progress=True))
    said = re.compile(r"(\d+)/36 [^\r]*?(?:best reward=(-?[\d.]+), )?reward calls=(\d+)\]")
    shown = [(int(nfe), reward, int(calls)) for nfe, reward, calls in said.findall(text.getvalue())]
    best = ["" if live.rewards.min() == -torch.inf else f"{live.rewards.mean():.4f}" for live in seen]
    want = [(int(live.nfe.sum()), mean, int(live.reward_calls.sum())) for live, mean in zip(seen, best, strict=True)]
    assert shown[: len(want)] == want
    assert best[:2] == ["", ""] and len({*best}) > 2 and want[-1] == (36, best[-1], 6)
    searched(pipe, method="best-of-n", nfe_budget=6).run()
    assert made == [None, True]


@pytest.mark.parametrize("method", [name for name in SEARCHES if name in {*PARTICLES, "beam", "best-of-n"}])
def test_a_prompt_is_searched_the_same_alone_and_beside_another(pipe, method):
    both = searched(pipe, method=method, seed=4).run()
    alone = searched(pipe, PROMPTS[1:], method=method, seed=5, micro_batch=3).run()
    torch.testing.assert_close(both.rewards[1:], alone.rewards, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(both.latents[1:], alone.latents, rtol=1e-3, atol=1e-4)


def test_best_of_one_is_the_pipelines_sampler(pipe):
    model = LatentModel(pipe)
    with torch.no_grad():
        predict = guided(model.denoiser, CFG(7.5), model.encode(PROMPTS[:1]))
        for eta, step in {0.0: euler, 1.0: partial(ancestral, eta=1.0)}.items():
            found = searched(pipe, PROMPTS[:1], "best-of-n", 6, eta=eta, num_inference_steps=3)
            problem = found.problem
            path = Path(problem.start(0, 0).x)
            if eta:
                for i in range(3):
                    now, then = problem.levels[i : i + 2]
                    path = step(predict, path, now, then, problem.noise(0, 0, 1, i))
            else:
                *_, path = sample(step, predict, path, problem.levels)
            torch.testing.assert_close(found.run().latents, path.x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [pipelines.sdxl, dits.sd3])
def test_particles_run_over_sdxl_and_over_flows(make):
    """A flow model's sampler is made stochastic: one particle's descendants differ."""
    pipe = make()
    early = {"start": 0.0, "stop": 0.0, "threshold": None, "inverse_temperature": 5.0}
    found = searched(pipe, nfe_budget=24, particles=4, **early).run()
    weighted = found.state.weighted()
    assert found.rewards.isfinite().all()
    assert found.nfe.tolist() == [24, 24]
    assert len(weighted.x0[weighted.groups == 0].flatten(1).unique(dim=0)) == 4


@pytest.mark.parametrize("make", [pipelines.sdxl, dits.sd3])
@pytest.mark.sampled(2)
def test_every_method_runs_over_sdxl_and_over_flows(make):
    pipe = make()
    for method in SEARCHES:
        found = searched(pipe, method=method, nfe_budget=24).run()
        torch.testing.assert_close(Left()(found.images, PROMPTS).double(), found.rewards, rtol=1e-3, atol=1e-3)
        assert all(12 < nfe <= 24 for nfe in found.nfe.tolist())


def test_fkc_over_a_pipeline_weighs_what_its_guidance_stands_for(pipe):
    """CFG(3) is the exponents 3 and -2; in an empty interval nobody is weighed."""
    everywhere = {"method": "fkc", "guidance": CFG(3.0), "start": 0.0, "stop": 1.0, "nfe_budget": 24}
    read, named = (searched(pipe, **everywhere, **o).run() for o in ({}, {"exponents": {"cond": 3, "uncond": -2}}))
    assert read.latents.equal(named.latents) and read.nfe.tolist() == [24, 24] and read.reward_calls.tolist() == [4, 4]
    assert len(read.state.weighted().log_weight.unique()) > 2
    assert not searched(pipe, **{**everywhere, "stop": 0.0}).run().state.weighted().log_weight.any()


def test_fkc_multiplies_two_prompts(pipe):
    """The second one stands where the negative prompt does; their order does not matter."""
    product = {"method": "fkc", "exponents": {"cond": 1.0, "uncond": 1.0}, "nfe_budget": 24, "start": 0.0, "stop": 1.0}
    one = searched(pipe, PROMPTS[:1], **product, negative_prompts=PROMPTS[1]).run()
    other = searched(pipe, PROMPTS[1:], **product, negative_prompts=PROMPTS[0]).run()
    torch.testing.assert_close(one.latents, other.latents, rtol=1e-4, atol=1e-4)
    alone = searched(pipe, PROMPTS[:1], **product, negative_prompts=PROMPTS[0]).run()
    assert (alone.latents - one.latents).abs().max() > 1e-3


EVERYWHERE = {"method": "fkc", "particles": 4, "start": 0.0, "stop": 1.0}


def multiplied(pipe, experts, exponents, prompts=PROMPTS, **options):
    """Four particles of each prompt, weighed at every step: 12 NFEs an expert."""
    return searched(
        pipe, prompts, nfe_budget=12 * len(exponents), **EVERYWHERE, experts=experts, exponents=exponents, **options
    )


@contextmanager
def saying_v(pipe):
    """A network that says v = alpha eps - sigma x0 = (eps - sigma x) / alpha, where it said eps."""
    powers = pipe.scheduler.alphas_cumprod.double().log()

    def to_v(unet, args, kwargs, out):
        t = float(kwargs["timestep"].flatten()[0])
        return (
            out
            if t != round(t)
            else ((out[0] - (1 - powers[int(t)].exp()).sqrt() * args[0]) / (powers[int(t)] / 2).exp(),)
        )

    pipe.scheduler = pipelines.ddim("v_prediction")
    hook = pipe.unet.register_forward_hook(to_v, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def same_law(one, other) -> bool:
    """The same particles with the same weights, to the rounding of sums."""
    a, b = one.run().state.weighted(), other.run().state.weighted()
    return all(
        torch.allclose(getattr(a, name).double(), getattr(b, name).double(), 1e-3, 1e-3)
        for name in ("x0", "log_weight")
    )


def test_a_second_prompt_is_an_expert(pipe):
    """Two equal prompts are one with the sum of their exponents; another prompt stands where the negative one may."""
    whole = multiplied(pipe, None, {"cond": 1.5})
    assert same_law(multiplied(pipe, {"again": PROMPTS}, {"cond": 0.9, "again": 0.6}), whole)
    assert same_law(multiplied(pipe, {"first": PROMPTS[0], "second": PROMPTS[1]}, {"first": 0.7, "second": 0.7}),
                    multiplied(pipe, None, {"cond": 0.7, "uncond": 0.7}, negative_prompts=PROMPTS[::-1]))  # fmt: skip
    other = multiplied(pipe, {"other": PROMPTS[::-1]}, {"cond": 0.9, "other": 0.6})
    assert not same_law(other, whole) and other.problem.spent.nfe.tolist() == [24, 24]


@pytest.mark.parametrize("prompt", [None, "a square"])
def test_a_second_pipeline_is_an_expert(pipe, prompt):
    """With the same weights it is the pipeline itself, whatever its network predicts; with others it is not."""
    exponents, own = {"cond": 0.8, "other": 0.6}, {"other": Expert(prompt)}
    here = multiplied(pipe, own, exponents)
    for same in (pipelines.sd(), pipelines.sd("v_prediction")):
        rows = []
        hook = same.unet.register_forward_hook(lambda module, args, out, rows=rows: rows.append(len(args[0])))
        with saying_v(same) if same.scheduler.config.prediction_type == "v_prediction" else nullcontext():
            assert same_law(multiplied(pipe, {"other": Expert(prompt, same)}, exponents), here)
        hook.remove()
        assert sum(rows) == 2 * 4 * 3  # two prompts, four particles, three steps
    assert not same_law(multiplied(pipe, {"other": Expert(prompt, pipelines.sd(seed=1))}, exponents), here)


def test_a_second_pipeline_counts_in_a_memory_budget_and_stays_as_it_was(pipe):
    other = pipelines.sd(seed=1)
    exponents, tilted = {"cond": 1.0, "other": 1.0}, {"inverse_temperature": 0.1, "tilt": "difference", "reads": "x"}
    free = multiplied(pipe, {"other": Expert(pipe=other)}, exponents, **tilted)
    one, two = (
        multiplied(pipe, {"other": Expert(pipe=p)}, exponents, memory_budget="3MiB", **tilted) for p in (pipe, other)
    )
    assert one.problem.micro_batch > two.problem.micro_batch >= 1
    assert same_law(two, free) and all(p.requires_grad and p.grad is None for p in other.unet.parameters())


def scaled(factor: float):
    return pipelines.sd(vae_config={"scaling_factor": factor})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "fk"}, "fk takes no experts: they are for fkc"),
        ({"experts": {"cond": "a"}}, "an expert may not be called 'cond'"),
        (
            {"exponents": {"cond": 2.0}},
            "the expert 'other' has no exponent: name it in exponents, as in cond:1,other:1",
        ),
        ({"exponents": None}, "the expert 'other' has no exponent"),
        ({"experts": {"other": ["a", "b", "c"]}}, "the expert 'other' has 3 prompts in a search of 2"),
        ({"exponents": {"other": 1, "third": 1}}, "no expert 'third'.*; known: cond, other, uncond"),
        (
            {
                "pipe": lambda: pipelines.sd(
                    unet_config={"in_channels": 3, "out_channels": 3}, vae_config={"latent_channels": 3}
                )
            },
            r"'other' does not fit: the shape of a latent is \(3, 8, 8\), and \(4, 8, 8\) in the search",
        ),
        (
            {"pipe": lambda: scaled(0.5)},
            r"'other' does not fit: the VAE's scale is \(0.5, .*\), and \(0.18215, .*in the s",
        ),
        (
            {"pipe": lambda: pipelines.sd(scheduler=pipelines.ddim(beta_end=0.002))},
            r"'other' does not fit: it knows sigma / alpha 1.731 to 0.02917, and the search asks 2.93 to",
        ),
        ({"pipe": lambda: nullcontext()}, "nullcontext"),
    ],
)
def test_experts_that_do_not_fit_are_refused_before_anything_runs(pipe, options, sentence):
    made = options.pop("pipe", None)
    given = {"method": "fkc", "experts": {"other": "a"}, "exponents": {"cond": 1.0, "other": 1.0}, **options}
    if made is not None:
        given["experts"] = {"other": Expert(pipe=made())}
    if given["method"] != "fkc":
        del given["exponents"]
    hook = pipe.unet.register_forward_hook(lambda *args: pytest.fail("the network ran"))
    try:
        with pytest.raises(ValueError, match=sentence):
            searched(pipe, **given)
    finally:
        hook.remove()


def test_a_flow_may_take_part_in_a_search_of_a_diffusion_but_not_the_other_way_round():
    """From pure noise, a diffusion's clock has no time to say."""
    flows, diffusion = dits.sd3(), pipelines.sd(vae_config={"shift_factor": 0.1, "scaling_factor": 1.5})
    exponents = {"cond": 1.0, "other": 0.5}
    mixed = multiplied(diffusion, {"other": Expert(pipe=flows)}, exponents)
    assert mixed.run().latents.isfinite().all() and not same_law(mixed, multiplied(diffusion, None, {"cond": 1.5}))
    with pytest.raises(UserError, match="it knows sigma / alpha .*, and the search asks inf to"):
        multiplied(flows, {"other": Expert(pipe=diffusion)}, exponents)


def test_a_second_prompt_on_the_command_line(pipe, tmp_path):
    settings = [f"{name}={value}" for name, value in EVERYWHERE.items() if name != "method"]
    given = {"nfe_budget": 24, "setting": [*settings, "exponents=cond:.9,other:.6"], "expert": ["other=a = b"]}
    found = run(pipe, config(tmp_path / "out", "fkc", **given))
    want = multiplied(pipe, {"other": "a = b"}, {"cond": 0.9, "other": 0.6})
    assert found["reward"] == pytest.approx(float(want.run().rewards.mean()), rel=1e-4) and found["nfe"] == 24


def test_exponents_are_given_on_the_command_line():
    for value, want in (("cond:1.5, uncond:-.5", {"cond": 1.5, "uncond": -0.5}), ("none", None)):
        given = SearchConfig("fkc", PROMPTS, "tiny", output_dir="out", setting=[f"exponents={value}"])
        assert method_settings_of(given) == {"exponents": want}


def test_the_gradient_raises_the_reward_and_leaves_the_pipeline_alone(pipe):
    before = [p.requires_grad for p in pipe.unet.parameters()]
    plain = searched(pipe, method="importance", nfe_budget=24)
    tilted = searched(pipe, method="tds", nfe_budget=24, inverse_temperature=0.3)
    assert tilted.run().state.weighted().reward.mean() > plain.run().state.weighted().reward.mean()
    assert [p.requires_grad for p in pipe.unet.parameters()] == before
    assert all(p.grad is None for p in pipe.unet.parameters())


@pytest.mark.parametrize(
    ("guidance", "want"),
    [
        (Plain(), [1, 1, 1]),
        (CFG(3.0), [2, 2, 2]),
        (CFGpp(0.6), [2, 2, 2]),
        (AdaptiveGuidance(3.0), [2, 2, 2]),
    ],
)
def test_the_most_that_guidance_may_cost_is_known_beforehand(pipe, guidance, want):
    found = searched(pipe, method="best-of-n", guidance=guidance, nfe_budget=sum(want))
    assert list(found.problem.costs) == want
    assert found.run().nfe.max() <= sum(want)


NEGATIVE = {"perpneg": PerpNeg(negatives=("green",)), "nag": NAG(negative="green"), "cfg": CFG(3.0)}


@pytest.mark.parametrize("name", NEGATIVE)
def test_a_search_encodes_its_prompts_and_its_negatives_once(pipe, name):
    """Before it begins, however many steps and micro-batches there are: prompts, negatives, and those of the method."""
    texts = []
    hook = pipe.text_encoder.register_forward_hook(lambda module, args, out: texts.append(len(args[0])))
    found = searched(
        pipe, method="best-of-n", guidance=NEGATIVE[name], nfe_budget=48, micro_batch=1, negative_prompts="x"
    )
    begun = list(texts)
    nfe = found.run().nfe
    hook.remove()
    assert texts == begun and len(begun) <= 4 and sum(begun) <= 6 and nfe.min() > 24


def test_a_method_s_scorer_is_loaded_once_and_told_the_prompts_of_its_rows(pipe, monkeypatch):
    loaded, asked = [], []

    def load(name):
        loaded.append(name)
        return lambda images, prompts: asked.append(list(prompts)) or Left()(images, prompts)

    monkeypatch.setattr(method_parts, "load", load)
    guidance = DynamicCFG(scorers=("any",), candidates=(1.0, 3.0))
    found = searched(pipe, method="best-of-n", guidance=guidance, nfe_budget=24, micro_batch=1).run()
    assert loaded == ["any"] and found.rewards.isfinite().all()
    assert {tuple(prompts) for prompts in asked} == {("red circle",), ("blue square",)}


def test_a_prompt_that_the_guidance_cannot_serve_is_refused_before_anything_runs(pipe, monkeypatch):
    monkeypatch.setattr(method_parts, "_loaded_classifier", lambda: torch.nn.Identity())
    with pytest.raises(UserError, match="prompt 'a cat' is not a class of tiny-classifier"):
        searched(pipe, ["a red circle", "a cat"], guidance=ClassifierGuidance(classify="tiny-classifier"))


def test_guidance_by_noise_level_reaches_the_search(pipe):
    inside = searched(pipe, method="best-of-n", nfe_budget=6, guidance=CFG(Between(3.0, 0.0, 1e-9, 1.0)))
    plain = searched(pipe, method="best-of-n", nfe_budget=3, guidance=Plain())
    torch.testing.assert_close(inside.run().latents, plain.run().latents, rtol=1e-4, atol=1e-4)


def test_a_memory_budget_sets_the_rows_at_a_time(pipe):
    free = searched(pipe).run()
    with pytest.raises(UserError, match="memory_budget 1kB is too small: one row at a time takes .*iB"):
        searched(pipe, memory_budget="1kB")
    adapter = Adapter(LatentModel(pipe), PROMPTS, reward_named(Left(), gradient=False))
    problem = adapter.problem(LatentModel(pipe).levels(3), CFG(5.0))
    problem.nfe_budget = 48
    small, large = (rows_within(budget, adapter, problem, FK(), False) for budget in ("3MiB", "300MiB"))
    assert 1 <= small < large
    problem.nfe_budget = 6 * 10_000
    assert rows_within("300MiB", adapter, problem, FK(), False) < large
    with pytest.raises(UserError, match=r"one row at a time takes .*, with the model and the 20000 samples"):
        rows_within("3MiB", adapter, problem, FK(), False)
    tight = searched(pipe, memory_budget="3MiB")
    assert tight.problem.micro_batch == small
    torch.testing.assert_close(tight.run().rewards, free.rewards, rtol=1e-3, atol=1e-3)


def echoing(groups):
    """A prediction that costs nothing but its own bytes."""
    return lambda path, at: Prediction(path.x / 2, path.x / 3, memory={"a": path.x[:, 0] * 1})


@pytest.mark.parametrize("method", SEARCHES)
def test_kept_samples_are_no_more_than_what_the_memory_budget_counts(method):
    """Measured over the whole search; what is counted is at most four times as much."""
    shape, rows = (4, 16, 16), 4
    reward = lambda x, groups: x.mean(dim=(1, 2, 3))  # noqa: E731
    experts = {name: echoing for name in ("cond", "uncond")} if method == "fkc" else {}
    problem = Problem(grid(flow, 4, 0.98, 0.0), echoing, reward, shape, (0, 1), experts=experts, micro_batch=rows)
    problem.nfe_budget = 4 * 40
    config = SEARCHES[method].config(**{"exponents": {"cond": 2.0, "uncond": -1.0}} if method == "fkc" else {})
    config = replace(config, branches=4) if method.startswith("dts") else config
    counted = kept(problem, config, echoing(None)(problem.start(0, 0), None), method in GRADIENTS)
    with LiveBytes() as live:
        for _state in SEARCHES[method].search(problem, config):
            pass  # a state that is held on to keeps its samples
    step = 16 * rows * 4 * prod(shape)  # of a micro-batch
    assert live.peak <= counted + step
    assert counted <= 4 * live.peak


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "fkk"}, "no search method 'fkk' .did you mean 'fk'"),
        ({"temperature": 2.0}, "no setting of fk 'temperature'"),
        ({"particles": 0}, "particles is 0"),
        ({"steps": 3}, "the steps of the sampler are num_inference_steps"),
        ({"eta": 0.0}, "fk needs a stochastic sampler: with eta = 0"),
        ({"eta": 2.0}, "eta is 2.0"),
        ({"nfe_budget": 5}, "fk with 1 particle costs .* raise nfe_budget from 5 to 6 or more"),
        ({"prompts": []}, "the list of prompts is empty"),
        ({"reward": {"nothing": 1.0}}, "no reward 'nothing'"),
        ({"method": "tds", "reward": {"jpeg-size": 1.0}}, "not differentiable|no reward"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(pipe, options, sentence):
    hook = pipe.unet.register_forward_hook(lambda *args: pytest.fail("the network ran"))
    try:
        with pytest.raises(ValueError, match=sentence):
            searched(pipe, **options)
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------------------ the command


def config(folder, method="fk", **options) -> SearchConfig:
    settings = [f"{key}={value}" for key, value in PARTICLES.get(method, {}).items()]
    given = {"nfe_budget": 24, "num_inference_steps": 3, "setting": settings, **options}
    return SearchConfig(method, PROMPTS, "tiny", output_dir=str(folder), **given)


def run(pipe, config):
    return command.search_in_folder(config, lambda line: None, pipe, Left())


class Killed(Exception):
    pass


@pytest.fixture
def one_thread():
    """Threads that share a sum may add it up in another order the next time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def asked(pipe):
    """What the network is asked and what it answers, call by call."""
    heard = []
    hook = pipe.unet.register_forward_hook(
        lambda _, args, out: heard.append((args[0].detach().clone(), out[0].detach()))
    )
    try:
        yield heard
    finally:
        hook.remove()


@pytest.mark.parametrize("method", ["fk", "tds", "svdd", "dts-star", "best-of-n"])
@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.sampled(3)
def test_killed_and_resumed_a_search_ends_as_if_it_had_not_been(pipe, method, after, tmp_path, monkeypatch, one_thread):
    """Bit for bit: the network is asked what it was asked before, in the same batches, and answers the same."""
    monkeypatch.setattr(command, "SAVE_SECONDS", 0.0)
    with asked(pipe) as before:
        want = run(pipe, config(tmp_path / "whole", method))
    write, times = command.write, []

    def killing(path, data):
        times.append(path)
        if len(times) > after:
            raise Killed
        write(path, data)

    monkeypatch.setattr(command, "write", killing)
    with pytest.raises(Killed):
        run(pipe, config(tmp_path / "killed", method))
    monkeypatch.setattr(command, "write", write)
    assert [file.name for file in (tmp_path / "killed").iterdir()] == ["state.safetensors"]
    with asked(pipe) as again:
        found = run(pipe, replace(config(tmp_path / "killed", method), resume_from_checkpoint="latest"))
    for i, pair in enumerate(zip(before[len(before) - len(again) :], again, strict=True)):
        for kind, (mine, other) in zip(
            ("asked something else", "answered otherwise"), zip(*pair, strict=True), strict=True
        ):
            assert mine.equal(other), f"call {i} after the resumption: {kind}"
    for kind in ("settings", "prompts", "history"):
        assert found[kind] == want[kind]
    a, b = (load_file(tmp_path / name / "samples.safetensors") for name in ("whole", "killed"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


def test_a_state_that_has_the_former_name_of_the_budget_is_resumed(pipe, tmp_path, monkeypatch):
    former = {"nfe_budget": "budget"}
    written = command.comparable

    def comparable(config):
        kept = {former.get(name, name): value for name, value in written(config).items() if name != "decode_batch"}
        return {**kept, "resume": False}

    with monkeypatch.context() as patched:
        patched.setattr(command, "comparable", comparable)
        run(pipe, config(tmp_path / "out", "best-of-n"))
    assert json.loads((tmp_path / "out/search.json").read_text())["settings"]["budget"] == 24
    with pytest.raises(UserError, match="holds a finished search"):
        run(pipe, config(tmp_path / "out", "best-of-n", resume_from_checkpoint="latest"))
    again = run(pipe, config(tmp_path / "out", "best-of-n", nfe_budget=48, resume_from_checkpoint="latest"))
    assert again["settings"]["nfe_budget"] == 48 and again["nfe"] > 40


@pytest.mark.parametrize("method", ["dts-star", "best-of-n"])
def test_with_a_larger_budget_a_finished_search_goes_on(pipe, method, tmp_path):
    want = run(pipe, config(tmp_path / "whole", method, nfe_budget=48))
    first = run(pipe, config(tmp_path / "grown", method))
    found = run(pipe, config(tmp_path / "grown", method, nfe_budget=48, resume_from_checkpoint="latest"))
    for mine, other in zip(found["prompts"], want["prompts"], strict=True):
        assert mine == {**other, "reward": pytest.approx(other["reward"], rel=1e-4)}  # of other batches
    assert all(p["nfe"] <= 24 for p in first["prompts"]) and found["settings"] == want["settings"]
    assert all(p["nfe"] > 40 for p in found["prompts"])
    assert found["history"][: len(first["history"]) - 1] == first["history"][:-1]
    with pytest.raises(UserError, match="holds a finished search: .* give a larger --nfe_budget"):
        run(pipe, config(tmp_path / "grown", method, nfe_budget=48, resume_from_checkpoint="latest"))
    with pytest.raises(UserError, match="made with nfe_budget=48, not 24: resume with that or more"):
        run(pipe, config(tmp_path / "grown", method, resume_from_checkpoint="latest"))


def test_a_population_that_its_budget_sized_is_not_gone_on_with_under_another(pipe, tmp_path):
    run(pipe, config(tmp_path / "out"))
    with pytest.raises(
        UserError, match="the saved fk has runs of 4 particles, and this one of 8: a population cannot grow"
    ):
        run(pipe, config(tmp_path / "out", nfe_budget=48, resume_from_checkpoint="latest"))


def test_killed_while_results_are_written_it_resumes_at_the_end(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "search_files", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(pipe, config(tmp_path / "a"))
    monkeypatch.undo()
    hook = pipe.unet.register_forward_hook(lambda *args: pytest.fail("the network ran"))
    found = run(pipe, replace(config(tmp_path / "a"), resume_from_checkpoint="latest"))
    hook.remove()
    whole = run(pipe, config(tmp_path / "b"))
    assert (found["prompts"], found["history"]) == (whole["prompts"], whole["history"])  # the last point is there once


def test_what_is_written(pipe, tmp_path):
    found = run(pipe, config(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "search.json").read_text()) == json.loads(json.dumps(found))
    names = {"00000-seed0.png", "00001-seed1.png", "grid.png", "00000-lineage.png", "00001-lineage.png"}
    assert Image.open(tmp_path / "out" / "grid.png").width > 128 + 100  # the prompts beside the pictures
    assert {f.name for f in (tmp_path / "out").iterdir()} == names | {
        "config.yaml",
        "samples.safetensors",
        "search.json",
        "state.safetensors",
    }
    samples = load_file(tmp_path / "out" / "samples.safetensors")
    assert len(samples["x0"]) == 2 * 4
    assert found["reward"] == pytest.approx(float(torch.stack([samples["reward"][samples["groups"] == g].max()
                                                               for g in range(2)]).mean()))  # fmt: skip
    with pytest.raises(UserError, match="holds a search: go on with it by --resume_from_checkpoint latest"):
        run(pipe, config(tmp_path / "out"))
    with pytest.raises(UserError, match="holds a finished search"):
        run(pipe, replace(config(tmp_path / "out"), resume_from_checkpoint="latest"))


def test_a_state_of_other_settings_or_a_damaged_one_is_refused(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "search_files", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(pipe, config(tmp_path / "out"))
    with pytest.raises(UserError, match="was made with seed=0, not 3: resume with that"):
        run(pipe, config(tmp_path / "out", resume_from_checkpoint="latest", seed=3))
    state = tmp_path / "out" / "state.safetensors"
    whole, about = load_file(state), {"settings": {}, "history": [], "info": {}}
    edits = [json.dumps(text) for text in ([], {}, about | {"settings": 3}, about | {"history": [[1]]})]
    damaged = [save(whole, {"difftune": text}) for text in (*edits, "[" * 9999, "{")]
    for data in (*damaged, save(whole), state.read_bytes()[:-40], b""):
        state.write_bytes(data)
        with pytest.raises(RunError, match="cannot be resumed from .*: remove it to start anew") as error:
            run(pipe, config(tmp_path / "out", resume_from_checkpoint="latest"))
        assert "\n" not in str(error.value)


def test_a_damaged_result_is_written_anew(pipe, tmp_path):
    found = run(pipe, config(tmp_path / "out"))
    result = tmp_path / "out" / "search.json"
    for text in ("", "{", "[]", "7", '{"settings": 7}', "[" * 9999):
        result.write_text(text)
        assert command.finished(result) is None
    again = run(pipe, config(tmp_path / "out", resume_from_checkpoint="latest"))
    assert again["prompts"] == found["prompts"] == json.loads(result.read_text())["prompts"]


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["fkk", "--prompt", "x"], 2, "no search method 'fkk'"),
        (["fk", "--prompt", "x", "--setting", "particles"], 2, "has no value: write it KEY=VALUE"),
        (["fk", "--prompt", "x", "--setting", "particles=few"], 2, "particles=few is not a whole number or none"),
        (["fk", "--prompt", "x", "--setting", "potential=product"], 2, "no potential 'product'"),
        (
            ["fkc", "--prompt", "x", "--setting", "exponents=cond"],
            2,
            "exponents=cond is not a list of exponents: write",
        ),
        (["fkc", "--prompt", "x", "--setting", "exponents=cond:1,cond:2"], 2, "an expert twice"),
        (["fkc", "--prompt", "x", "--setting", "exponents=good:1"], 2, "no expert 'good'; known: cond, uncond"),
        (["fkc", "--prompt", "x", "--expert", "blue"], 2, "--expert blue has no name: write it NAME=PROMPT"),
        (["fk", "--prompt", "x", "--setting", "particles=2", "particles=4"], 2, "--setting particles is given twice"),
        (["fkc", "--prompt", "x", "--expert", "o=a", "o=b"], 2, "--expert o is given twice"),
        (["fkc", "--prompt", "x", "--expert", "o=a"], 2, "the expert 'o' has no exponent"),
        (["fk", "--prompt", "x", "--expert", "o=a"], 2, "fk takes no experts"),
        (["fk", "--prompt", "x", "--reward", "nothing"], 2, "no reward 'nothing'"),
        (["fk", "--prompt", "x", "--model", "large"], 2, "no model 'large'"),
        (["fk"], 2, "no prompt to search for|Missing option"),
    ],
)
def test_bad_flags_end_in_one_sentence(flags, code, sentence, tmp_path):
    with_folder = ["search", *flags, "--output_dir", str(tmp_path / "out")]
    found = CliRunner().invoke(cli, with_folder)
    assert found.exit_code == code
    assert len(found.output.strip().splitlines()) == 1
    assert re.search(sentence, found.output)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_by_the_system_and_resumed(tmp_path):
    """SIGKILL at whatever moment, in a process of its own, on the embedded model."""
    flags = ["best-of-n", "--prompt", "a red circle", "--nfe_budget", "100", "--steps", "5", "--setting", "particles=1"]

    def start(folder, *more):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", "difftune", "search", *flags, "--output_dir", str(folder), *more]
        return subprocess.Popen(line, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    process = start(tmp_path / "killed")
    state = tmp_path / "killed" / "state.safetensors"
    while process.poll() is None and not state.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    load_file(state)
    assert start(tmp_path / "killed", "--resume_from_checkpoint", "latest").wait() in (0, 2)  # 2: it had finished
    a, b = (json.loads(File(tmp_path, name, "search.json").read_text()) for name in ("whole", "killed"))
    assert a["prompts"] == b["prompts"]


def test_what_was_found_gives_pictures_files_and_a_curve(tmp_path):
    pipe = pipelines.sd()
    settings = {"method": "best-of-n", "num_inference_steps": 2, "progress": False}
    going = search(pipe, PROMPTS, reward=Left(), nfe_budget=12, **settings)
    found = going.run()
    files = found.save(tmp_path / "out")
    assert [file.name for file in files] == ["000.png", "001.png"]
    pictures = [np.asarray(Image.open(file)) for file in files]
    pixels = (found.images * 255).round().permute(0, 2, 3, 1).numpy()
    assert all(np.array_equal(p, np.asarray(q)) for p, q in zip(pictures, found.pil(), strict=True))
    assert all(np.array_equal(p, q) for p, q in zip(pictures, pixels, strict=True))
    whole, first = found.curve(), found.curve(0)
    assert whole[-1] == pytest.approx((12, 3, float(found.rewards.mean())))
    assert first[-1] == pytest.approx((12, 3, float(found.rewards[0])))
    unfinished = next(iter(search(pipe, PROMPTS, "fk", Left(), 40, num_inference_steps=4, progress=False)))
    assert unfinished.curve() == []
    with pytest.raises(RunError, match="no sample is finished yet"):
        unfinished.pil()


def test_processes_that_share_a_search_run_the_same_rows_at_a_time(pipe, monkeypatch):
    """Each measures its own device, and the least serves all: results are put together by their parts."""
    monkeypatch.setattr(searching, "told_by_each", lambda make: [make(), 2])
    assert searched(pipe, memory_budget="300MiB", shared=True).problem.micro_batch == 2
    assert searched(pipe, memory_budget="300MiB").problem.micro_batch > 2


@pytest.mark.parametrize(
    ("gradient", "decode_batch"),
    [(False, 1), (True, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, 4), (True, 1)))],
)
def test_the_peak_of_rows_is_what_is_predicted_of_one(pipe, gradient, decode_batch):
    """In a batch, few images are decoded at a time and all the others kept."""
    model = LatentModel(pipe, decode_batch=decode_batch)
    adapter = Adapter(model, PROMPTS, reward_named(Left(), gradient=False))
    problem = adapter.problem(model.levels(3), CFG(5.0))
    _, row = measure_row(adapter, problem, gradient)
    for rows in (1, 6):
        group = torch.zeros(rows, dtype=torch.int64)
        x = torch.randn(rows, 4, 8, 8, requires_grad=gradient)
        with frozen(pipe), LiveBytes() as live, torch.set_grad_enabled(gradient):
            scores = adapter.scores(estimate(problem.predict(group)(Path(x), problem.levels[2])), group)
            if gradient:
                torch.autograd.grad(scores.sum(), x)
        assert live.peak <= row.peak(rows, decode_batch) <= 1.5 * live.peak, (rows, row)


def test_more_rows_fit_where_fewer_are_decoded_at_a_time(pipe):
    rows = []
    for decode_batch in (1, 16):
        adapter = Adapter(LatentModel(pipe, decode_batch=decode_batch), PROMPTS, reward_named(Left(), gradient=False))
        problem = adapter.problem(adapter.model.levels(3), CFG(5.0))
        problem.nfe_budget = 48
        rows.append(rows_within("4MiB", adapter, problem, FK(), True))
    assert rows[0] > rows[1]


def test_what_was_found_is_decoded_in_the_tiles_that_were_asked_for():
    pipe = pipelines.sd()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8
    decoded = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: decoded.append(tuple(args[0].shape[-2:])))
    found = searched(pipe, PROMPTS[:1], method="best-of-n", nfe_budget=6, enable_vae_tiling=True).run()
    before = len(decoded)
    assert found.images.shape == (1, 3, 16, 16)
    assert len(decoded) - before > 1 and set(decoded) <= {(side, width) for side in range(5) for width in range(5)}
