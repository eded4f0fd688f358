"""`--compile`: the same values and gradients, blocks that are as they were afterwards, and refusals of one sentence."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from diffusers import FluxTransformer2DModel
from torch import nn
from torch._dynamo.utils import counters

from difftune.cli.program import cli
from difftune.configs.images import SampleConfig
from difftune.configs.noise import RenoConfig
from difftune.configs.recipes import AlignPropConfig, DDPOConfig
from difftune.configs.search import SearchConfig
from difftune.configs.written import settings_yaml
from difftune.errors import UserError
from difftune.pipelines import compiled as compiling
from difftune.pipelines import lora, method_parts
from difftune.pipelines.compiled import blocks_of, check_compile, compiled
from difftune.recipes import RECIPES, check_recipe, train
from difftune.reno.optimizer import ReNO
from difftune.search_runs import run_folder
from difftune.search_runs.search import search
from guidance.attach import attach
from guidance.guided import guided
from guidance.methods.catalogue import CFG, PAG, AutoGuidance, Interval
from rewards.simple import Brightness
from solvers.latent import LatentModel
from solvers.memory.checkpointing import block_checkpointing
from solvers.rollout.modes import rollout
from solvers.rollout.recompute import NoGenerator
from solvers.samplers.catalogue import euler
from tests.support import dits, pipelines
from tests.support.toys import VARIANTS, toy

PROMPTS = ["red circle", "blue square"]
ONE_WIDTH = {  # few shapes, so that there is little to compile
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
MODES = ("full", "checkpoint", "truncated:2", "revolve:1", "adjoint:euler", "reversible:bdia", "lean")


def small():
    return pipelines.sd(unet_config=ONE_WIDTH)


@contextmanager
def by(backend, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", backend)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch):
    """torch traces the blocks and their gradients, and runs them by its own operators."""
    with by("aot_eager", monkeypatch):
        yield


@pytest.fixture
def forwards_traced(monkeypatch):
    """torch traces the blocks alone: the same operators in the same order, and the gradient is autograd's."""
    with by("eager", monkeypatch):
        yield


def graphs():
    """How many torch has compiled."""
    return counters["stats"]["unique_graphs"]


def close(found, expected, tolerance=1e-4):
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < tolerance


# ------------------------------------------------------------------------------------------------ without a compiler
def test_the_blocks_of_the_network_and_of_the_decoder_are_compiled_and_plain_again(monkeypatch):
    """Those alone: an encoder, a resampling and a whole network stay as they are."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: made.append((call.__self__, options)) or call)
    pipe = pipelines.sd()
    with compiled(pipe) as line:
        within = [m for part in (pipe.unet, pipe.vae) for m in part.modules() if m._compiled_call_impl is not None]
        assert [block for block, _ in made] == within
        pipe.unet(torch.zeros(1, 4, 8, 8), torch.tensor(1), torch.zeros(1, 4, pipelines.WIDTH))
    assert {options["dynamic"] for _, options in made} == {False}
    assert {type(block).__name__ for block in within} == {"ResnetBlock2D", "BasicTransformerBlock"}
    assert set(within) == {*blocks_of(pipe.unet), *blocks_of(pipe.vae.decoder)} and blocks_of(pipe.vae.decoder)
    assert (
        line
        == f"{len(blocks_of(pipe.unet))} blocks of the network and {len(blocks_of(pipe.vae.decoder))} of the \
decoder (inductor)"
    )
    assert not any(m._compiled_call_impl for m in pipe.unet.modules())
    with compiled(pipe, on=False) as line:
        assert line is None and len(made) == len(within)


def test_the_networks_of_a_method_and_of_experts_are_compiled_each_once(monkeypatch):
    pipe, expert, weak = pipelines.sd(), pipelines.sd(), pipelines.sd().unet
    monkeypatch.setattr(method_parts, "_network", lambda model: weak)
    inside = []
    with compiled(pipe, guidance=Interval(method=AutoGuidance()), others=[pipe, expert]) as line:
        for network in (pipe.unet, weak, expert.unet):
            inside += [block._compiled_call_impl is not None for block in blocks_of(network)]
    count, decoding = len(blocks_of(weak)), len(blocks_of(pipe.vae.decoder))
    assert inside == [True] * 3 * count and not any(block._compiled_call_impl for block in blocks_of(weak))
    assert line == f"{3 * count} blocks of 3 networks and {decoding} of the decoder (inductor)"


def test_the_blocks_of_a_kind_of_network_that_inherits_their_names():
    class Own(FluxTransformer2DModel):
        pass

    own = dits.flux().transformer
    found = blocks_of(own)
    own.__class__ = Own
    assert found and blocks_of(own) == found


@pytest.mark.parametrize("method", ["fk", "tds"])
def test_a_search_that_recomputes_its_decoder_is_compiled_for_each_shape(method, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run_folder, "check_compile", lambda config: None)
    monkeypatch.setattr(run_folder, "compiled", lambda pipe, *given: asked.append(given) or nullcontext())
    config = SearchConfig(
        output_dir=str(tmp_path), prompt=["red"], method=method, num_inference_steps=2, nfe_budget=8, compile=True
    )
    run_folder.search_in_folder(config, [].append, pipelines.sd(), Brightness())
    assert [dynamic for _, dynamic, *_ in asked] == [{"fk": None, "tds": False}[method]]


@pytest.mark.parametrize("make", [dits.sd3, dits.flux, dits.pixart, dits.sana], ids=lambda make: make.__name__)
def test_transformers_name_their_blocks(make):
    blocks = blocks_of(make().transformer)
    assert blocks and all("Block" in type(block).__name__ for block in blocks)


def test_a_network_without_blocks_that_are_known_is_refused():
    pipe = small()
    pipe.unet.down_blocks, pipe.unet.up_blocks, pipe.unet.mid_block = nn.ModuleList(), nn.ModuleList(), None
    with pytest.raises(UserError, match="UNet2DConditionModel has no blocks that are known to compile"), compiled(pipe):
        pass


ALIGNPROP = AlignPropConfig(compile=True, reward=["brightness"])


@pytest.mark.parametrize(
    ("check", "config", "name"),
    [
        (check_recipe, replace(ALIGNPROP, memory_budget="6GiB"), "memory_budget"),
        (check_compile, RenoConfig(prompt=PROMPTS, compile=True, memory_budget="6GiB"), "memory_budget"),
        (check_compile, SearchConfig(prompt=PROMPTS, compile=True, memory_budget="6GiB"), "memory_budget"),
        (
            check_compile,
            SampleConfig(model="tiny", prompt=PROMPTS, output_dir="x", compile=True, lora_anneal="linear"),
            "lora_anneal",
        ),
        (
            check_compile,
            replace(ALIGNPROP, enable_xformers_memory_efficient_attention=True),
            "enable_xformers_memory_efficient_attention",
        ),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(check, config, name):
    with pytest.raises(UserError, match=f"--compile does not go with --{name}: .*; leave one of them out"):
        check(config)
    check_compile(replace(config, compile=False))


def test_without_a_compiler_all_four_commands_say_so_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(compiling, "on_cpu", lambda: True)
    prompt = ["--prompt", "a red circle", "--output_dir", str(tmp_path / "out"), "--compile"]
    loaded = []
    monkeypatch.setattr("difftune.models.load", lambda *a, **k: loaded.append(a))
    for words in (["sample"], ["optimize"], ["search", "fk"], ["train", "alignprop"]):
        given = [*words, "--model", "tiny", *(prompt if words[0] != "train" else prompt[2:])]
        said = CliRunner().invoke(cli, given, standalone_mode=False).output
        assert "--compile needs a C++ compiler, and there is no no-such-compiler: install it" in said, words
    assert not loaded and not (tmp_path / "out").exists()


def test_without_headers_or_triton_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name)
    monkeypatch.setattr(compiling, "on_cpu", lambda: False)
    monkeypatch.setattr(compiling.util, "find_spec", lambda name: None)
    monkeypatch.setattr(compiling.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "there is no Python.h" in compiling.obstacle()
    (tmp_path / "Python.h").touch()
    assert "needs triton on a GPU" in compiling.obstacle()
    monkeypatch.setattr(compiling, "on_cpu", lambda: True)
    assert compiling.obstacle() is None


def test_it_is_written_down():
    assert "compile: true" in settings_yaml(ALIGNPROP) and "compile: false" in settings_yaml(DDPOConfig())


# ------------------------------------------------------------------------------------------------ traced by torch
def test_a_block_has_one_graph_within_a_samplers_step_and_outside(monkeypatch):
    pipe, made, runs = small(), [], []

    def backend(graph, inputs):
        made.append(graph)
        return lambda *args: runs.append(graph) or graph(*args)

    block, x, time = pipe.unet.down_blocks[0].resnets[0], torch.ones(1, 8, 4, 4), torch.ones(1, 32)
    with by(backend, monkeypatch), torch.no_grad(), compiled(pipe):
        plain = block(x, time)
        with NoGenerator():
            assert torch.equal(block(x, time), plain)
            with pytest.raises(ValueError, match="a torch.Generator is used inside the step"):
                torch.rand(1, generator=torch.Generator())
    assert len(made) == 1 and runs == 2 * made


@pytest.mark.sampled(16)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_to_the_same_weights_and_compiles_nothing_after_its_first_step(
    forwards_traced, name, tmp_path, monkeypatch
):
    monkeypatch.setattr(compiling, "BLOCKS", set())  # the transformer blocks alone, which hold the LoRA

    def trained(on):
        config = toy(name, tmp_path, max_train_steps=2, compile=on)
        for _, state in train(config, None, small(), Brightness()):
            yield [t for name, t in state.tensors.items() if name.startswith("weights.")], graphs()

    (_, first), (found, second) = trained(True)
    *_, (plain, _) = trained(False)
    assert first == second > 0 and all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_settings_with_a_way_of_their_own_train_compiled_too(forwards_traced, name, tmp_path, monkeypatch):
    test_every_recipe_trains_to_the_same_weights_and_compiles_nothing_after_its_first_step(
        forwards_traced, name, tmp_path, monkeypatch
    )


def gradients(pipe, weights, mode, blocks=False):
    """Images, and the gradient of a function of them in the LoRA's weights, through a run of three steps."""
    model = LatentModel(pipe)
    levels, generators = model.levels(3), [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad():
        conds, x = model.encode(PROMPTS), model.noise(2, generators)
    noise = torch.randn(3, *x.shape, generator=generators[0]) if mode == "lean" else None
    own = mode.partition(":")[0] in ("adjoint", "reversible", "lean")
    predict = guided(model.denoiser, CFG(3.0), conds)
    path = rollout(None if own else euler, predict, x, levels, mode, noise)
    images = model.decode(path.x, checkpointed=True)
    return [images.detach(), *torch.autograd.grad(images.square().mean(), weights)]


def adapted(pipe):
    weights = list(lora.add(pipe, rank=2).values())
    with torch.no_grad():
        for weight in weights:
            weight.normal_(std=0.3)
    return weights


@pytest.mark.slow
@pytest.mark.timeout(1800)  # tracing is most of it, and takes half a minute of CPU
def test_images_and_gradients_are_the_same_in_every_mode_under_a_lora_and_block_checkpointing(traced):
    pipe = small()
    weights = adapted(pipe)
    plain = {mode: gradients(pipe, weights, mode) for mode in MODES}
    with compiled(pipe):
        for mode in MODES:
            close(gradients(pipe, weights, mode), plain[mode])
        few = graphs()
        with block_checkpointing(pipe.unet, pipe.vae):
            close(gradients(pipe, weights, "checkpoint"), plain["checkpoint"])
        with lora.off(pipe.unet), torch.no_grad():
            bare = pipe.unet(torch.ones(1, 4, 8, 8), torch.tensor(1), torch.ones(1, 4, pipelines.WIDTH))[0]
    assert 4 <= few <= 40
    with lora.off(pipe.unet), torch.no_grad():
        close([bare], [pipe.unet(torch.ones(1, 4, 8, 8), torch.tensor(1), torch.ones(1, 4, pipelines.WIDTH))[0]])
    again = gradients(pipe, weights, "full")
    assert all(torch.equal(a, b) for a, b in zip(again, plain["full"], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("make", [small, dits.flux])
def test_an_attached_pipeline_draws_the_same_pictures(traced, make):
    """Also under a method that changes the network's attention, for another batch, and without guidance."""
    pipe = make()

    def drawn():
        found = []
        methods = [CFG(3.0), PAG(3.0)] if make is small else [CFG(3.0)]
        for method in methods:
            generators = [torch.Generator().manual_seed(i) for i in range(2)]
            options = {"guidance_scale": 3.0} if make is small else {"true_cfg_scale": 3.0, "negative_prompt": [""] * 2}
            with attach(pipe, method):
                found.append(
                    pipe(PROMPTS, num_inference_steps=2, generator=generators, output_type="pt", **options).images
                )
        return found

    plain = drawn()
    with compiled(pipe, dynamic=None):
        close(drawn(), plain)
    assert graphs()


TOY = {"prompts": "animals", "max_train_steps": 2, "train_batch_size": 2, "num_inference_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize("config", [AlignPropConfig, DDPOConfig])
def test_a_recipe_trains_to_the_same_weights(traced, config, tmp_path):
    settings = config(output_dir=str(tmp_path), reward=["brightness"], **TOY)

    def trained(on):
        told = []
        steps = train(replace(settings, compile=on), None, small(), Brightness(), told.append)
        *_, (_, state) = steps
        return [t for name, t in state.tensors.items() if name.startswith("weights.")], told

    (found, told), (plain, quiet) = trained(True), trained(False)
    close(found, plain, 1e-2)
    assert [line for line in told if line.startswith("compile: ")] and not [li for li in quiet if "compile" in li]


@pytest.mark.slow
def test_a_search_and_a_noise_find_the_same(traced):
    def found(on):
        pipe = small()
        with compiled(pipe, on):
            noise = ReNO(pipe, Brightness(), num_inference_steps=2, progress=False).optimize(PROMPTS, 2)
        with compiled(pipe, on, dynamic=None):
            run = search(pipe, PROMPTS, "fk", Brightness(), 24, num_inference_steps=3, progress=False)
            return [noise.images, run.run().images]

    close(found(True), found(False), 1e-3)


# ------------------------------------------------------------------------------------------------ by the real compiler
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(compiling.obstacle() is not None, reason=str(compiling.obstacle()))
def test_the_real_compiler_gives_the_same_up_to_rounding():
    pipe = small()
    weights = adapted(pipe)
    plain = gradients(pipe, weights, "checkpoint")
    with compiled(pipe):
        close(gradients(pipe, weights, "checkpoint"), plain, 1e-3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(compiling.obstacle() is not None, reason=str(compiling.obstacle()))
@pytest.mark.parametrize("trust", ["clip", "guard"])
def test_by_the_real_compiler_a_first_ratio_is_1_far_within_the_clip_range(trust, tmp_path, monkeypatch):
    """A step is sampled by a graph without a gradient and trained by one with: in float32 their rounding is nothing."""
    monkeypatch.setattr(compiling, "BLOCKS", set())  # the transformer blocks alone, which hold the LoRA
    config = toy("grpo", tmp_path, max_train_steps=1, compile=True, trust=trust)
    ((metrics, _),) = train(config, None, small(), Brightness())
    print({name: metrics[name] for name in ("ratio", "approx_kl", "clip_fraction")})
    assert metrics["clip_fraction"] == 0 and metrics["approx_kl"] < (1e-5 if trust == "clip" else 2e-7) ** 2


@pytest.mark.parametrize("name", ["grpo", "ddpo"])
def test_half_precision_could_leave_the_clip_range_before_any_update(name, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "obstacle", lambda: None)
    config = toy(name, tmp_path, compile=True, mixed_precision="bf16")
    with pytest.raises(UserError, match="--compile does not go with --mixed_precision bf16 here"):
        check_recipe(config)
    check_recipe(replace(config, compile=False))
