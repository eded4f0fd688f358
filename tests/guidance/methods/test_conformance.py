"""attach() on every family: bit for bit the stock pipeline under CFG, nothing left behind, skipped rows are skipped."""

import inspect
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.hooks import FirstBlockCacheConfig
from peft import LoraConfig

from guidance.attach.handle import attach, is_attached
from guidance.branches import each
from guidance.contract import Branch, Guided
from guidance.guided import guided
from guidance.methods.catalogue import (
    APG,
    CFG,
    CFGMP,
    PAG,
    SLG,
    Between,
    CFGZeroStar,
    Interval,
    Plain,
    RectifiedCFGpp,
    Rescale,
)
from solvers.denoiser import Path
from solvers.families import table, tokens
from solvers.latent import LatentModel
from solvers.samplers.catalogue import euler, sample
from tests.support.dits import (
    DPM,
    TEXT,
    flow,
    flux,
    flux2_dev,
    sprint,
)
from tests.support.families import MADE
from tests.support.pipelines import WIDTH, ddim, sd

pytestmark = pytest.mark.filterwarnings("error:.*guides with its own scale")
STEPS, SCALE = 3, 3.0


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def embeds(width=TEXT, pooled=0, mask="", flag=True):
    """Keyword arguments of two prompts and two negatives; the second prompt's last token is padding."""
    made = {"prompt_embeds": normal(2, 6, width), "negative_prompt_embeds": 0.5 * normal(2, 6, width, seed=1)}
    if pooled:
        made["pooled_prompt_embeds"] = normal(2, pooled, seed=2)
        made["negative_pooled_prompt_embeds"] = normal(2, pooled, seed=3)
    if mask:
        made[f"prompt{mask}"] = torch.tensor([[1] * 6, [1] * 5 + [0]])
        made[f"negative_prompt{mask}"] = torch.tensor([[1] * 2 + [0] * 4] * 2) if flag else made[f"prompt{mask}"]
    return made


def unpadded(texts):
    """Texts of different lengths, in lists."""
    return {name: [text[: 6 - i] for i, text in enumerate(texts)] for name, texts in texts.items()}


class Kind(NamedTuple):
    make: Callable  # make(scheduler) -> pipeline
    texts: dict
    size: tuple[int, int] = (16, 24)
    scale: str = "guidance_scale"
    more: dict = {}
    output: str = "images"
    unguided: float = 1.0  # the pipeline's scale without guidance


UNBINNED = {"use_resolution_binning": False, "negative_prompt": None}
KINDS = {
    "sd": Kind(MADE["sd"], embeds(WIDTH)),
    "sd-v": Kind(MADE["sd-v"], embeds(WIDTH)),
    "sdxl": Kind(MADE["sdxl"], embeds(2 * WIDTH, WIDTH)),
    "sd3": Kind(MADE["sd3"], embeds(pooled=2 * WIDTH)),
    "flux": Kind(MADE["flux"], embeds(pooled=WIDTH), scale="true_cfg_scale"),
    "flux-dev": Kind(MADE["flux-dev"], embeds(pooled=WIDTH), scale="true_cfg_scale"),
    "flux2": Kind(MADE["flux2"], embeds(24)),
    "chroma": Kind(MADE["chroma"], {name: value.float() for name, value in embeds(mask="_attention_mask").items()}),
    "pixart-alpha": Kind(MADE["pixart-alpha"], embeds(mask="_attention_mask"), more=UNBINNED),
    "pixart-sigma": Kind(MADE["pixart-sigma"], embeds(mask="_attention_mask"), more=UNBINNED),
    "sana": Kind(MADE["sana"], embeds(mask="_attention_mask"), (32, 64), more=UNBINNED),
    "sana-sigma": Kind(MADE["sana-sigma"], embeds(mask="_attention_mask"), (32, 64), more=UNBINNED),
    "wan": Kind(MADE["wan"], embeds(), (16, 32), more={"num_frames": 5}, output="frames"),
    "wan-experts": Kind(MADE["wan-experts"], embeds(), (16, 32), more={"num_frames": 5}, output="frames"),
    "qwen": Kind(MADE["qwen"], embeds(mask="_embeds_mask", flag=False), scale="true_cfg_scale"),
    "zimage": Kind(MADE["zimage"], unpadded(embeds(8)), unguided=0.0),
    "lumina2": Kind(MADE["lumina2"], embeds(mask="_attention_mask"), (32, 48)),
    "lumina2-raw": Kind(MADE["lumina2"], embeds(mask="_attention_mask"), (32, 48), more={"cfg_normalization": False}),
}
VP = {key: ddim().config[key] for key in ("beta_start", "beta_end", "beta_schedule")}
SCHEDULERS = {
    "DDIM": lambda **c: ddim(**c),
    "Euler": lambda **c: diffusers.EulerDiscreteScheduler(**VP, **c),
    "Euler ancestral": lambda **c: diffusers.EulerAncestralDiscreteScheduler(**VP, **c),
    "Heun": lambda **c: diffusers.HeunDiscreteScheduler(**VP, **c),
    "DPM++ 2M": lambda **c: DPMSolverMultistepScheduler(**VP, **c),
    "flow Euler": lambda **c: flow(**c),
    "flow Euler by size": lambda **c: flow(use_dynamic_shifting=True, **c),
    "flow DPM++ 2M": lambda **c: DPMSolverMultistepScheduler(**DPM, **c),
    "flow UniPC": lambda **c: UniPCMultistepScheduler(**DPM, **c),
}
FLOWS = ("flow Euler", "flow DPM++ 2M", "flow UniPC")
OF_KIND = {
    "sd": ("DDIM", "Euler", "DPM++ 2M"),  # and 17 in test_attach
    "sd-v": ("DDIM", "Euler", "Heun"),
    "sdxl": ("DDIM", "Euler ancestral", "Heun", "DPM++ 2M"),
    "sd3": (*FLOWS, "flow Euler by size"),
    "flux": ("flow Euler", "flow Euler by size", "flow UniPC"),
    "flux-dev": ("flow Euler by size",),
    "flux2": ("flow Euler by size", "flow Euler"),
    "chroma": ("flow Euler", "flow Euler by size"),
    "pixart-alpha": ("DDIM", "DPM++ 2M"),
    "pixart-sigma": ("DDIM", "Euler", "DPM++ 2M"),
    "sana": (*FLOWS, "DPM++ 2M"),
    "sana-sigma": ("flow Euler",),
    "wan": FLOWS,
    "wan-experts": ("flow UniPC",),
    "qwen": ("flow Euler", "flow Euler by size", "flow UniPC"),
    "zimage": ("flow Euler", "flow Euler by size"),
    "lumina2": ("flow Euler", "flow Euler by size"),
    "lumina2-raw": ("flow Euler",),
}
SLOW = partial(pytest.param, marks=pytest.mark.slow)
NEWER = ("flux2", "chroma", "lumina2")
EACH = [(kind, case) for kind, cases in OF_KIND.items() for case in cases]
ONE = [(kind, cases[0]) for kind, cases in OF_KIND.items()]
AGAIN = {"sd-v", "flux-dev", "pixart-alpha", "sana-sigma", "wan-experts", "lumina2-raw"}  # its family has another kind
FAMILY = [(kind, case) for kind, case in ONE if kind not in AGAIN]


@cache
def made(kind: str):
    return KINDS[kind].make(SCHEDULERS[OF_KIND[kind][0]]())


def pipe_of(kind: str, case: str):
    """One pipeline a kind, shared by its tests, which leave it as it was except its scheduler."""
    pipe = made(kind)
    pipe.scheduler = SCHEDULERS[case](**({"prediction_type": "v_prediction"} if kind == "sd-v" else {}))
    return pipe


def run(kind: str, pipe, scale=SCALE, steps=STEPS, **more):
    spec = KINDS[kind]
    dtype = pipe.components[table.family_of(pipe).denoisers[0]].dtype
    texts = {name: each(lambda v: v.to(dtype) if v.is_floating_point() else v, v) for name, v in spec.texts.items()}
    told = {spec.scale: scale - 1 + spec.unguided, "num_inference_steps": steps, "output_type": "latent"}
    options = {**told, **spec.more, **texts}
    size = dict(zip(("height", "width"), spec.size, strict=True))
    if "height" not in inspect.signature(type(pipe).__call__).parameters:  # that of an image
        size = {}
    result = pipe(generator=torch.Generator().manual_seed(1), **{**size, **options, **more})
    return result[spec.output]


def dicts(pipe):
    parts = (pipe, pipe.scheduler, *(part for part in pipe.components.values() if isinstance(part, torch.nn.Module)))
    return [set(vars(part)) for part in parts]


def close(a, b, tolerance=2e-5):
    error = float((a - b).abs().max() / b.abs().max())
    assert error < tolerance, error


@contextmanager
def rows_of(network):
    """The rows of each forward that a network really runs, counted at its first layer with weights."""
    kinds = torch.nn.Conv2d | torch.nn.Conv3d | torch.nn.Linear
    first = network.t_embedder if "t_embedder" in dict(network.named_children()) else network  # it has a row a sample
    layer, rows = next(module for module in first.modules() if isinstance(module, kinds)), []
    hook = layer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    yield rows
    hook.remove()


@dataclass(frozen=True)
class Settling:
    """CFG whose samples leave `uncond` one after the other: sample i is free from step `steps[i]` on."""

    steps: tuple[int, ...]
    space = "any"

    def guide(self, path, at):
        done = path.memory.get("settling.step", torch.zeros(len(path.x)))
        busy = done < torch.tensor(self.steps)
        p = yield {"cond": Branch("cond"), "uncond": Branch("uncond", rows=busy)}
        out = p["uncond"] + SCALE * (p["cond"] - p["uncond"])
        keep = busy.view(-1, *[1] * (path.x.ndim - 1))
        return Guided(torch.where(keep, out, p["cond"]), memory={"settling.step": done + 1})


@dataclass(frozen=True)
class Shifting:
    """CFG++: eps of uncond, x0 of u + scale * (c - u)."""

    weight: float = 0.6  # not "scale": nothing is said
    space = "any"

    def guide(self, path, at):
        p = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        return Guided(p["uncond"], data=p["uncond"] + self.weight * (p["cond"] - p["uncond"]))


@dataclass(frozen=True)
class Spy:
    """CFG that writes down the paths that it is shown, and raises at one of them."""

    seen: list
    raises_at: int = 99
    space = "any"

    def guide(self, path, at):
        self.seen.append((path, at))
        if len(self.seen) == self.raises_at:
            raise RuntimeError("stop")
        p = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        return Guided(p["uncond"] + SCALE * (p["cond"] - p["uncond"]))


# ------------------------------------------------------------------------------------------------ conformance
@pytest.mark.parametrize("kind, case", EACH)
def test_cfg_is_the_stock_pipeline_and_detach_restores_it(kind, case):
    pipe = pipe_of(kind, case)
    stock, before = run(kind, pipe), dicts(pipe)
    with attach(pipe, CFG(SCALE)) as handle:
        ours = run(kind, pipe)
    assert torch.equal(ours, stock) and bool(ours.isfinite().all()) and ours.std() > 0.1
    assert torch.equal(run(kind, pipe), stock) and dicts(pipe) == before and not is_attached(pipe)
    rows = 2 * (2 * STEPS - 1 if case == "Heun" else STEPS)
    assert handle.nfe == 2 * rows and handle.branches == {"cond": rows, "uncond": rows}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind, case", FAMILY)
def test_half_precision(kind, case, dtype):
    pipe = KINDS[kind].make(SCHEDULERS[case]())
    pipe.to(dtype)
    stock = run(kind, pipe, steps=2)
    with attach(pipe, CFG(SCALE)):
        assert torch.equal(run(kind, pipe, steps=2), stock)
    assert bool(stock.isfinite().all())


@pytest.mark.parametrize("kind, case", ONE)
def test_skipped_forwards_are_skipped(kind, case):
    pipe = pipe_of(kind, case)
    network, expert = (pipe.components.get(name) for name in ("unet", "transformer"))
    stock, plain = run(kind, pipe), run(kind, pipe, scale=1.0)
    second = pipe.components.get("transformer_2")
    with rows_of(network or expert) as rows, rows_of(second or torch.nn.Linear(1, 1)) as more:
        with attach(pipe, Plain()) as handle:
            close(run(kind, pipe), plain)
        assert sum(rows + more) == handle.nfe == 2 * STEPS
        rows.clear(), more.clear()
        with attach(pipe, Settling((9, 1))) as handle:
            ours = run(kind, pipe)
        assert sum(rows + more) == handle.nfe == 4 + 3 * (STEPS - 1)
        assert (len(rows + more) > STEPS) == (not table.family_of(pipe).batched)  # the branches are not stacked
    close(ours[:1], stock[:1])
    assert not torch.allclose(ours[1:], stock[1:], atol=1e-3)


@pytest.mark.parametrize("kind, case", FAMILY)
def test_an_exception_leaves_the_pipeline_clean(kind, case):
    pipe = pipe_of(kind, case)
    stock, before = run(kind, pipe), dicts(pipe)
    with attach(pipe, Spy([], raises_at=2)):
        with pytest.raises(RuntimeError, match="stop"):
            run(kind, pipe)
        assert dicts(pipe)[1:] == before[1:]
    assert dicts(pipe) == before and torch.equal(run(kind, pipe), stock)


@pytest.mark.parametrize("kind", ("sd3", "flux-dev", "pixart-sigma", "sana", "wan", "qwen", "zimage", *NEWER))
def test_methods_see_latents_as_images(kind):
    pipe, seen = pipe_of(kind, OF_KIND[kind][0]), []
    with attach(pipe, Spy(seen)):
        run(kind, pipe)
    factor, (height, width) = pipe.vae_scale_factor if kind != "wan" else 8, KINDS[kind].size
    channels = (16, 2) if kind == "wan" else (4,)
    for path, _ in seen:
        assert path.x.shape == (2, *channels, height // factor, width // factor) and path.x.dtype == torch.float32
    assert seen[0][0].x0 is None and seen[1][0].x0.shape == seen[0][0].x.shape


OWN_LOOP = {"sd3": "flow Euler", "flux": "flow Euler by size", "pixart-sigma": "DDIM", "sana-sigma": "flow Euler"}
OWN_LOOP |= {"flux2": "flow Euler by size", "lumina2-raw": "flow Euler"}
OWN_CASES = [
    pytest.param(kind, guidance, marks=[pytest.mark.slow] * (kind in ("flux2", "lumina2-raw")))
    for kind in OWN_LOOP
    for guidance in (Shifting(), Settling((9, 1)), SLG(SCALE))
]
OWN_LOOP["qwen"] = "flow Euler by size"  # its norm follows where "uncond" is evaluated, if anything is
OWN_CASES += [("qwen", RectifiedCFGpp(SCALE)), ("qwen", CFGZeroStar(SCALE))]


@pytest.mark.parametrize("kind, guidance", OWN_CASES, ids=lambda c: c if isinstance(c, str) else type(c).__name__)
def test_our_own_loop_is_the_same(kind, guidance):
    pipe, spec = pipe_of(kind, OWN_LOOP[kind]), KINDS[kind]
    with attach(pipe, guidance) as handle:
        theirs = run(kind, pipe)
    model, size = LatentModel(pipe), {"height": spec.size[0], "width": spec.size[1]}
    keys = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}
    keys |= {"prompt_attention_mask": "encoder_attention_mask", "prompt_embeds_mask": "encoder_hidden_states_mask"}
    conds = {
        branch: {key: spec.texts[before + name] for name, key in keys.items() if name in spec.texts}
        for branch, before in (("cond", ""), ("uncond", "negative_"))
    }
    predict = guided(model.denoiser, guidance, conds)
    start = Path(model.noise(2, torch.Generator().manual_seed(1), **size))
    with torch.no_grad():
        *_, last = sample(euler, predict, start, model.levels(STEPS, **size))
    ours = tokens.packed(last.x) if kind in ("flux", "qwen") else last.x
    ours = model.family.latents.to_vae(model.pipe.vae, last.x) if kind == "flux2" else ours
    close(theirs, ours)
    assert predict.nfe == handle.nfe


# ------------------------------------------------------------------------------------------------ what others do to it
@pytest.mark.parametrize("kind", ("sd", "sd3", "flux", *map(SLOW, ("wan", "qwen", "zimage", *NEWER))))
def test_offload_hooks(kind):
    pipe = KINDS[kind].make(SCHEDULERS[OF_KIND[kind][0]]())
    network = pipe.components[table.family_of(pipe).denoisers[0]]
    stock = run(kind, pipe)
    cpu_offload(network, execution_device=torch.device("cpu"))
    assert next(network.parameters()).device.type == "meta"
    with attach(pipe, CFG(SCALE)):
        assert torch.equal(run(kind, pipe), stock)
    with attach(pipe, Settling((9, 9))):
        close(run(kind, pipe), stock, 2e-6 if kind == "zimage" else 1e-30)  # Z-Image has c + s (c - u)
    assert torch.equal(run(kind, pipe), stock) and next(network.parameters()).device.type == "meta"


SCALINGS = {"sd": "cross_attention_kwargs", "flux": "joint_attention_kwargs", "sd3": "joint_attention_kwargs"}
SCALINGS |= {kind: "attention_kwargs" for kind in ("flux2", "qwen", "wan", "lumina2")}
SCALINGS |= {"chroma": "joint_attention_kwargs"}


@pytest.mark.parametrize("kind, scaling", [e if e[0] in ("sd", "flux") else SLOW(*e) for e in SCALINGS.items()])
def test_lora(kind, scaling):
    pipe = KINDS[kind].make(SCHEDULERS[OF_KIND[kind][0]]())
    network, without = pipe.components[table.family_of(pipe).denoisers[0]], run(kind, pipe)
    network.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    stock = run(kind, pipe, **{scaling: {"scale": 0.5}})
    assert not torch.equal(stock, without) and not torch.equal(stock, run(kind, pipe))
    for method in (CFG(SCALE), Settling((9, 9))):
        with attach(pipe, method):
            assert torch.equal(run(kind, pipe, **{scaling: {"scale": 0.5}}), stock)


@pytest.mark.parametrize("kind, in_place", (("flux", False), SLOW("flux", True), SLOW("sd", False), SLOW("sd", True)))
@pytest.mark.sampled(2)
def test_compiled(kind, in_place):
    pipe = KINDS[kind].make(SCHEDULERS[OF_KIND[kind][0]]())
    name = table.family_of(pipe).denoisers[0]
    stock, network = run(kind, pipe, steps=2), pipe.components[name]
    torch._dynamo.reset()
    if in_place:
        network.compile(backend="eager")
    else:
        setattr(pipe, name, torch.compile(network, backend="eager"))
    with attach(pipe, CFG(SCALE)) as handle:
        close(run(kind, pipe, steps=2), stock, 1e-6)
    assert handle.nfe == 8
    close(run(kind, pipe, steps=2), stock, 1e-6)


@pytest.mark.parametrize("kind", ("sd3", "flux", *map(SLOW, ("wan", "qwen", *NEWER))))  # Z-Image's has no UniPC
def test_siblings_stay_stock_and_a_replaced_scheduler_is_followed(kind):
    pipe = pipe_of(kind, "flow Euler")
    stock = run(kind, pipe)
    with attach(pipe, CFG(SCALE + 2)):
        sibling = type(pipe).from_pipe(pipe)
        sibling.set_progress_bar_config(disable=True)
        assert torch.equal(run(kind, sibling), stock)
        pipe.scheduler = SCHEDULERS["flow UniPC"]()
        ours = run(kind, pipe, scale=SCALE + 2)
    assert torch.equal(run(kind, pipe, scale=SCALE + 2), ours)


# ------------------------------------------------------------------------------------------------ the scale, and after
@pytest.mark.filterwarnings("default:.*guides with its own scale")
@pytest.mark.parametrize("kind", ("sd", "sd3", "flux", "pixart-sigma", "wan", "qwen", "zimage", *map(SLOW, NEWER)))
def test_the_methods_scale_wins_and_says_so_once(kind):
    pipe = pipe_of(kind, OF_KIND[kind][0])
    stock = run(kind, pipe)
    with attach(pipe, CFG(SCALE)):
        run(kind, pipe)
        default = inspect.signature(type(pipe).__call__).parameters[KINDS[kind].scale].default
        default, told = default + 1 - KINDS[kind].unguided, 4.25 - 1 + KINDS[kind].unguided
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*guides with its own scale")
            run(kind, pipe, scale=default if default > 1 else SCALE)  # nobody chose it
        with pytest.warns(UserWarning, match=f"CFG guides with its own scale 3; the pipeline's {told} is ignored"):
            assert torch.equal(run(kind, pipe, scale=4.25), stock)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*guides with its own scale")
            run(kind, pipe, scale=4.25)


@pytest.mark.filterwarnings("default:.*guides with its own scale")
@pytest.mark.parametrize(
    "method, said",
    [
        (Rescale(CFG(SCALE)), "CFG guides with its own scale 3"),
        (Interval(Rescale(APG(2.0))), "APG guides with its own scale 2"),
        (CFG(Between(SCALE, 0.1)), "CFG guides with its own scale"),
        (CFG(torch.tensor([2.0, 3.0])), "CFG guides with its own scale"),
    ],
)
def test_a_scale_within_a_method_and_a_schedule_win_and_say_so(method, said):
    pipe = pipe_of("sd", "DDIM")
    with attach(pipe, method):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*guides with its own scale")
            run("sd", pipe, scale=7.5)  # the pipeline's default
        with pytest.warns(UserWarning, match=f"^{said}; the pipeline's 4.25 is ignored$") as told:
            run("sd", pipe, scale=4.25)
        assert len(told) == 1
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*guides with its own scale")
            run("sd", pipe, scale=4.25)


@pytest.mark.parametrize("steps", (1, 2, 3))
def test_sana_sprint_without_a_second_branch(steps):
    """Its scale is told to the network: CFG of that scale is the pipeline, and so is no guidance."""
    pipe, texts = sprint(), {"prompt_embeds": normal(2, 6, TEXT), "prompt_attention_mask": torch.ones(2, 6).long()}
    call = {"height": 32, "width": 64, "use_resolution_binning": False, "output_type": "latent", "guidance_scale": 4.5}
    call |= {"num_inference_steps": steps, "intermediate_timesteps": 1.3 if steps == 2 else None}
    stock = pipe(None, **call, **texts, generator=torch.Generator().manual_seed(1)).images
    before = dicts(pipe)
    for method in (Plain(), CFG(4.5)):
        with attach(pipe, method) as handle:
            ours = pipe(None, **call, **texts, generator=torch.Generator().manual_seed(1)).images
        assert torch.equal(ours, stock) and handle.nfe == 2 * steps and dicts(pipe) == before
    weak = PAG(2.0)
    with attach(pipe, weak) as handle:
        ours = pipe(None, **call, **texts, generator=torch.Generator().manual_seed(1)).images
    assert handle.nfe == 4 * steps and not torch.allclose(ours, stock, atol=1e-3)
    seen = []
    with attach(pipe, Spy(seen)), pytest.raises(ValueError, match="guidance-distilled"):
        pipe(None, **call, **texts)
    assert seen[0][0].x.shape == (2, 4, 16, 32) and float(seen[0][1].sigma) == pytest.approx(1)


def test_flux2_dev_without_a_second_branch():
    pipe, more = flux2_dev(), {"prompt_embeds": normal(2, 6, 24), "guidance_scale": 4.0, "height": 16, "width": 24}
    more |= {"num_inference_steps": STEPS, "output_type": "latent"}
    draw = lambda: pipe(**more, generator=torch.Generator().manual_seed(1)).images  # noqa: E731
    stock, before = draw(), dicts(pipe)
    with attach(pipe, Plain()) as handle:
        assert torch.equal(draw(), stock) and handle.nfe == 2 * STEPS
    with attach(pipe, SLG(2.0)) as handle:
        assert not torch.allclose(draw(), stock, atol=1e-3) and handle.nfe == 4 * STEPS
    with attach(pipe, CFG(SCALE)), pytest.raises(ValueError, match="'uncond', of this guidance-distilled model"):
        draw()
    assert dicts(pipe) == before


def test_skip_layer_guidance_of_sd3_is_kept():
    pipe, skip = pipe_of("sd3", "flow Euler"), {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9}
    stock = run("sd3", pipe, **skip)
    assert not torch.equal(stock, run("sd3", pipe))
    with attach(pipe, CFG(SCALE)) as handle:
        assert torch.equal(run("sd3", pipe, **skip), stock)
    assert handle.nfe == 4 * STEPS + 2 * (STEPS - 1)
    skipped = table.FAMILIES["sd3"].after.name
    assert handle.branches == {"cond": 2 * STEPS, "uncond": 2 * STEPS, skipped: 2 * (STEPS - 1)}
    refusal = "for StableDiffusion3Pipeline's skip_guidance_layers: call .* without"
    with attach(pipe, Shifting()), pytest.raises(ValueError, match=refusal):
        run("sd3", pipe, **skip)


def test_slg_is_skip_layer_guidance_of_sd3():
    pipe = pipe_of("sd3", "flow Euler")
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 2.0}
    stock = run("sd3", pipe, **skip)
    with attach(pipe, SLG(2.8, cfg_scale=SCALE, layers="transformer_blocks.1")), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(run("sd3", pipe), stock)


@dataclass(frozen=True)
class Uncond:
    space = "any"

    def guide(self, path, at):
        p = yield {"it": Branch("uncond")}
        return Guided(p["it"])


def test_the_norm_of_qwen_is_kept_or_refused():
    """Equality under CFG is tested above; here that the rule acts on other methods, and who cannot have it."""
    pipe, seen = pipe_of("qwen", "flow Euler"), []
    with attach(pipe, Spy(seen)):
        run("qwen", pipe)
    with attach(pipe, CFG(0.0)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matched = run("qwen", pipe, steps=1)
    x = tokens.packed(seen[0][0].x)
    texts = {key: value for key, value in KINDS["qwen"].texts.items() if "negative" not in key}
    swapped = {key: KINDS["qwen"].texts[f"negative_{key}"] for key in texts}
    c, u = (x - run("qwen", pipe, scale=1.0, steps=1, **given) for given in (texts, swapped))  # of the whole step
    close(x - matched, u * (c.norm(dim=-1, keepdim=True) / u.norm(dim=-1, keepdim=True)))
    refusal = "has no guided prediction for QwenImagePipeline's .*norm.*another method"
    for method in (Shifting(), Uncond(), CFGMP()):
        with attach(pipe, method), pytest.raises(ValueError, match=refusal):
            run("qwen", pipe, steps=1)


RULES = (("zimage", "cfg_normalization", 0.9), ("zimage", "cfg_truncation", 0.2), ("lumina2", "cfg_trunc_ratio", 0.7))


@pytest.mark.parametrize("kind, name, value", RULES)
def test_a_pipelines_own_rules_are_kept(kind, name, value):
    """A prediction that is cut to the length of the conditional one; guidance that ends in the middle."""
    pipe, more = pipe_of(kind, "flow Euler"), {name: value}
    stock = run(kind, pipe, **more)
    assert not torch.equal(stock, run(kind, pipe))
    with attach(pipe, CFG(SCALE)) as handle:
        assert torch.equal(run(kind, pipe, **more), stock)
    assert handle.branches["uncond"] == (6 if name == "cfg_normalization" else 4)


# ------------------------------------------------------------------------------------------------ errors
UNPREPARED = {
    "sd": "'uncond': call the pipeline with guidance_scale > 1",
    "pixart-sigma": "'uncond': call the pipeline with guidance_scale > 1",
    "wan": "'uncond': call the pipeline with guidance_scale > 1",
    "flux": "'uncond': call the pipeline with true_cfg_scale > 1 and a negative prompt",
    "qwen": "'uncond': call the pipeline with true_cfg_scale > 1 and a negative prompt",
    "zimage": "'uncond': call the pipeline with guidance_scale > 0",
    **dict.fromkeys(NEWER, "'uncond': call the pipeline with guidance_scale > 1"),
    "flux-dev": r"'uncond', of this guidance-distilled model .guidance_embeds=True. too: call .* true_cfg_scale > 1",
}


@pytest.mark.parametrize("kind", UNPREPARED)
def test_a_branch_that_was_not_prepared(kind):
    pipe = pipe_of(kind, OF_KIND[kind][0])
    with attach(pipe, CFG(SCALE)) as handle, pytest.raises(ValueError, match=UNPREPARED[kind]):
        run(kind, pipe, scale=1.0)
    assert handle.nfe == 0


def test_a_distilled_unet_has_no_unconditional_branch():
    pipe = sd(unet_config={"time_cond_proj_dim": 8})
    stock = run("sd", pipe, scale=7.5)
    message = "UNet2DConditionModel is guidance-distilled .time_cond_proj_dim=8., so .* needs 'cond' alone"
    with attach(pipe, APG(SCALE)), pytest.raises(ValueError, match=message):
        run("sd", pipe, scale=7.5)
    for method in (Plain(), CFG(7.5)):
        with attach(pipe, method):
            assert torch.equal(run("sd", pipe, scale=7.5), stock)


def test_attach_refuses_what_it_cannot_follow(monkeypatch):
    pipe = pipe_of("flux", "flow Euler")
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler is not supported; replace it by one of DDIM"):
        attach(flux(diffusers.FlowMatchHeunDiscreteScheduler()), CFG())
    with attach(pipe, CFG()), pytest.raises(ValueError, match="FluxPipeline is attached to already; detach"):
        attach(pipe, CFG())
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with attach(pipe, CFG()), pytest.raises(ValueError, match="FluxTransformer2DModel caches .* disable_cache"):
        run("flux", pipe)
    pipe.transformer.disable_cache()
    wrong = {"flux": replace(table.FAMILIES["flux"], batched=True)}
    monkeypatch.setattr(table, "FAMILIES", {**table.FAMILIES, **wrong})
    with attach(pipe, CFG()), pytest.raises(ValueError, match="called its denoiser 2 times .*knows it with 1"):
        run("flux", pipe)
    wrong = {"sd3": replace(table.FAMILIES["sd3"], order=("uncond", "cond", "text"))}
    monkeypatch.setattr(table, "FAMILIES", {**table.FAMILIES, **wrong})
    with attach(made("sd3"), CFG()), pytest.raises(ValueError, match="stacks 2 branches, and attach knows 1 or 3"):
        run("sd3", pipe_of("sd3", "flow Euler"))
