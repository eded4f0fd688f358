"""attach(): bit for bit the stock pipeline under CFG, CFG++ against loops by hand, and nothing left behind."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from torch import Tensor

from guidance.attach.handle import attach, is_attached
from guidance.attach.schedulers import SCHEDULERS, locator
from guidance.contract import Branch, Guided
from guidance.guided import guided
from guidance.methods.catalogue import CFG, Plain, strength
from solvers.denoiser import Path
from solvers.families import table as families
from solvers.latent import LatentModel
from solvers.samplers.catalogue import euler, sample
from tests.support.pipelines import ddim, sd, sdxl, unet

PROMPTS = ["a red circle", "two blue squares"]
STEPS, SCALE = 4, 3.0
TABLE = {key: ddim().config[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
DPM = {"algorithm_type": "sde-dpmsolver++"}
CASES = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "PNDM prk": ("PNDMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ SDE": ("DPMSolverMultistepScheduler", DPM),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
}
DETERMINISTIC_ENDS = ("DDIM", "Euler", "DPM++ 2M")


def scheduler(case: str, **config):
    kind, own = CASES[case]
    table = {key: value for key, value in TABLE.items() if key != "steps_offset" or kind != "LCMScheduler"}
    return getattr(diffusers, kind)(**{**table, **own, **config})


@pytest.fixture(scope="module")
def pipe():
    return sd()


@cache
def embeddings(kind=sd):
    """Keyword arguments for two prompts, encoded once."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.no_grad():
        made = kind().encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    return dict(zip(names, made, strict=False))


def run(pipe, steps=STEPS, scale=SCALE, kind=sd, output_type="latent", **more):
    given = {key: value.to(pipe.dtype) for key, value in embeddings(kind).items()}
    options = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": output_type, **given, **more}
    return pipe(generator=torch.Generator().manual_seed(1), **options).images


def same(pipe, guidance=None, **more) -> bool:
    """Whether attach(guidance) gives the stock pipeline's output bit for bit."""
    stock = run(pipe, **more)
    with attach(pipe, guidance or CFG(SCALE)):
        ours = run(pipe, **more)
    return torch.equal(stock, ours) and bool(ours.isfinite().all())


@dataclass(frozen=True)
class Spy:
    """CFG that writes down what it is shown."""

    seen: list
    space = "any"

    def guide(self, path, at):
        self.seen.append((path, at))
        p = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        count = path.memory.get("spy.count", torch.zeros(len(path.x)))
        kept = {"spy.count": count + 1, "spy.sigma": at.sigma.expand(len(path.x))}
        return Guided(p["uncond"] + SCALE * (p["cond"] - p["uncond"]), memory=kept)


@dataclass(frozen=True)
class CFGpp:
    """eps of uncond, x0 of u + scale * (c - u)."""

    scale: float = 0.6
    space = "any"

    def guide(self, path, at):
        p = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        return Guided(p["uncond"], data=p["uncond"] + self.scale * (p["cond"] - p["uncond"]))


@dataclass(frozen=True)
class Settling:
    """CFG whose samples leave `uncond` one after the other: sample i is free from step `steps[i]` on."""

    steps: tuple[int, ...]
    space = "any"

    def guide(self, path, at):
        done = path.memory.get("settling.step", torch.zeros(len(path.x)))
        busy = done < torch.tensor(self.steps)
        p = yield {"cond": Branch("cond"), "uncond": Branch("uncond", rows=busy)}
        out = p["uncond"] + strength(SCALE, at, path.x) * (p["cond"] - p["uncond"])
        assert out[~busy].isnan().all()
        return Guided(torch.where(busy.view(-1, 1, 1, 1), out, p["cond"]), memory={"settling.step": done + 1})


@dataclass(frozen=True)
class Rival:
    """Two rounds: cond, then in the rows where x0 says so, an embedding of its own."""

    embedding: Tensor
    rows: Tensor
    space = "any"

    def guide(self, path, at):
        p = yield {"cond": Branch("cond")}
        assert p.to("cond", "x0").dtype == torch.float32
        p = yield {"rival": Branch({"encoder_hidden_states": self.embedding}, rows=self.rows)}
        away = p["cond"] + 2 * (p["cond"] - p["rival"])
        return Guided(torch.where(self.rows.view(-1, 1, 1, 1), away, p["cond"]))


@dataclass(frozen=True)
class InData:
    """CFG written in a space of its own."""

    space: str = "x0"

    def guide(self, path, at):
        p = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        return Guided(p["uncond"] + SCALE * (p["cond"] - p["uncond"]))


@dataclass(frozen=True)
class Weak:
    space = "any"

    def guide(self, path, at):
        p = yield {"cond": Branch("cond"), "weak": Branch("cond", network="weak")}
        return Guided(p["weak"] + SCALE * (p["cond"] - p["weak"]))


# ------------------------------------------------------------------------------------------------ bit-exactness
@pytest.mark.parametrize("case", CASES)
def test_cfg_is_the_stock_pipeline(pipe, case):
    pipe.scheduler = scheduler(case)
    assert same(pipe)


def test_cases_cover_the_table():
    kinds = {kind for kind, _ in CASES.values()} | {"FlowMatchEulerDiscreteScheduler", "SCMScheduler"}
    assert kinds == set(SCHEDULERS)


def test_cfg_with_noise_in_ddim(pipe):
    pipe.scheduler = scheduler("DDIM")
    assert same(pipe, eta=0.7)


@pytest.mark.parametrize("case", ("DDIM", "Heun"))
def test_v_prediction(pipe, case):
    pipe.scheduler = scheduler(case, prediction_type="v_prediction")
    assert same(pipe)


@pytest.mark.parametrize("case", DETERMINISTIC_ENDS)
def test_sdxl(case):
    pipe = sdxl(scheduler=scheduler(case))
    assert same(pipe, kind=sdxl)


def test_images_and_rescale(pipe):
    pipe.scheduler = scheduler("Euler")
    assert same(pipe, output_type="pt", guidance_rescale=0.7)
    assert not torch.equal(run(pipe), run(pipe, guidance_rescale=0.7))


def test_bfloat16():
    assert same(sd(scheduler=scheduler("DPM++ 2M")).to(torch.bfloat16))


@pytest.mark.parametrize("case", ("DDIM", "Heun", "PNDM", "DPM++ 2M"))
def test_img2img(pipe, case):
    pipe.scheduler = scheduler(case)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    assert same(StableDiffusionImg2ImgPipeline(**pipe.components), image=image, strength=0.6)


def test_controlnet(pipe):
    net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16))
    net.controlnet_down_blocks[0].weight.data.fill_(0.1)
    control = diffusers.StableDiffusionControlNetPipeline(**pipe.components, controlnet=net)
    control.scheduler = scheduler("Euler")
    control.set_progress_bar_config(disable=True)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    assert same(control, image=image)
    assert same(control, image=image, guess_mode=True)
    seen: list[tuple[Path, object]] = []
    with attach(control, Spy(seen)):
        run(control, image=image, guess_mode=True)
    assert all(path.x.shape == (2, 4, 8, 8) for path, _ in seen)
    stock = run(control, image=image)
    with attach(control, Settling((9, 9))):
        assert torch.equal(run(control, image=image), stock)
    with attach(control, Settling((9, 1))) as handle:
        close(run(control, image=image)[:1], stock[:1])
        assert handle.nfe == 2 * 4 + 4 + 1


def test_the_very_call_of_the_pipeline_is_run(pipe):
    pipe.scheduler = scheduler("DDIM")
    seen: list[Tensor] = []
    hook = pipe.unet.mid_block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    assert same(pipe)
    hook.remove()
    assert all(torch.equal(a, seen[0]) for a in seen) and len(seen) == 2 * STEPS


# ------------------------------------------------------------------------------------------------ "none"
def test_none_is_guidance_scale_one(pipe):
    pipe.scheduler = scheduler("DDIM")
    assert same(pipe, Plain(), scale=1.0)
    stock = run(pipe, scale=1.0)
    with attach(pipe, Plain()) as handle:
        close(run(pipe, scale=SCALE), stock)
        assert handle.nfe == 2 * STEPS


# ------------------------------------------------------------------------------------------------ nothing stays
def dicts(pipe) -> list[set[str]]:
    return [set(vars(part)) for part in (pipe, pipe.scheduler, pipe.unet)]


@pytest.mark.parametrize("case", ("Euler", "Heun"))
def test_detach_restores(case):
    pipe = sd(scheduler=scheduler(case))
    stock = run(pipe)
    before = dicts(pipe)
    handle = attach(pipe, CFG(9.0))
    guided_away = run(pipe)
    assert dicts(pipe)[1:] == before[1:]
    handle.detach()
    handle.detach()
    assert dicts(pipe) == before and not is_attached(pipe)
    assert not torch.equal(guided_away, stock) and torch.equal(run(pipe), stock)


def test_exception_cleans_up(pipe):
    pipe.scheduler = scheduler("Heun")
    stock = run(pipe)
    before = dicts(pipe)

    def fail(pipe, i, t, kwargs):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), attach(pipe, CFG(9.0)):
        run(pipe, callback_on_step_end=fail)
    assert dicts(pipe) == before
    assert torch.equal(run(pipe), stock)


def test_keeps_what_others_installed(pipe):
    pipe.scheduler = scheduler("DDIM")
    calls = []
    bar = pipe.progress_bar
    pipe.progress_bar = lambda *args, **kwargs: calls.append("bar") or bar(*args, **kwargs)
    mine = pipe.progress_bar
    pipe.scheduler.step = partial(lambda step, *a, **k: calls.append("step") or step(*a, **k), pipe.scheduler.step)
    step = pipe.scheduler.step
    with attach(pipe, CFG(SCALE)):
        run(pipe)
    assert calls == ["bar"] + ["step"] * STEPS
    assert vars(pipe).pop("progress_bar") is mine and vars(pipe.scheduler)["step"] is step


def test_second_attach_is_refused(pipe):
    with attach(pipe, CFG()), pytest.raises(ValueError, match="attached to already"):
        attach(pipe, CFG())
    with attach(pipe, CFG()):
        pass


def test_follows_a_replaced_scheduler_and_spares_siblings(pipe):
    pipe.scheduler = scheduler("DDIM")
    stock = run(pipe)
    with attach(pipe, CFG(9.0)):
        sibling = type(pipe)(**pipe.components)
        sibling.set_progress_bar_config(disable=True)
        assert torch.equal(run(sibling), stock)
        pipe.scheduler = scheduler("Euler")
        ours = run(pipe, scale=2.0)
        copied = deepcopy(pipe.unet)
    assert torch.equal(run(pipe, scale=9.0), ours)
    assert set(vars(copied)) == set(vars(pipe.unet))


# ------------------------------------------------------------------------------------------------ levels, memory, rows
@pytest.mark.parametrize(
    "case", ("DDIM", "PNDM", "PNDM prk", "Euler Karras", "Heun", "LMS", "KDPM2", "DPM++ 2M", "DEIS")
)
def test_x_and_levels_agree_with_the_scheduler(case):
    """A network that always says eps = 0.3 keeps x0 where it starts: every x is alpha * x0 + sigma * 0.3."""
    seen: list[tuple[Path, object]] = []
    pipe = sd(scheduler=scheduler(case))
    for name, parameter in pipe.unet.conv_out.named_parameters():
        parameter.data.fill_(0.3 if name == "bias" else 0.0)
    with attach(pipe, Spy(seen)):
        run(pipe, latents=torch.full((2, 4, 8, 8), 1.0))
    first, start = seen[0]
    x0 = (first.x - start.sigma * 0.3).mean() / start.alpha
    for path, at in seen:
        assert abs(at.alpha**2 + at.sigma**2 - 1) < 1e-6
        close(path.x, (at.alpha * x0 + at.sigma * 0.3).expand_as(path.x))


def test_memory_belongs_to_the_step(pipe):
    """Two calls of one step read the same memory, and a run starts with none."""
    expected = {"DDIM": [0, 1, 2, 3], "Heun": [0, 0, 1, 1, 2, 2, 3], "PNDM": [0, 0, 1, 2, 3]}
    expected["PNDM prk"] = [0] * 4 + [1] * 4 + [2] * 4 + [3]
    for case, counts in expected.items():
        pipe.scheduler = scheduler(case)
        seen: list[tuple[Path, object]] = []
        with attach(pipe, Spy(seen)):
            run(pipe)
            run(pipe)
        read = [int(path.memory.get("spy.count", torch.zeros(2))[0]) for path, _ in seen]
        assert read == counts * 2, case
        for path, _ in seen:  # what the first call of the step before wrote
            if count := int(path.memory.get("spy.count", torch.zeros(2))[0]):
                assert path.memory["spy.sigma"][0] == seen[counts.index(count - 1)][1].sigma
        assert seen[0][0].x0 is None and seen[-1][0].x0.shape == (2, 4, 8, 8)


def test_rows_are_skipped_and_counted(pipe):
    pipe.scheduler = scheduler("DDIM")
    stock = run(pipe)
    with attach(pipe, Settling((9, 9))) as handle:
        assert torch.equal(run(pipe), stock)
        assert (handle.nfe, handle.counter.calls) == (4 * STEPS, STEPS)
    with attach(pipe, Settling((9, 2))) as handle:
        run(pipe)
        ours = run(pipe)
        assert handle.nfe == 4 + 4 + 3 + 3
    close(ours[:1], stock[:1])
    assert not torch.allclose(ours[1:], stock[1:], atol=1e-3)
    with attach(pipe, Settling((0, 0))) as handle:
        close(run(pipe), run_plain(pipe))
        assert (handle.nfe, handle.counter.calls) == (2 * STEPS, STEPS)


def run_plain(pipe):
    return run(type(pipe)(**pipe.components), scale=1.0)


@pytest.mark.parametrize("scale", (1.0, SCALE))
def test_two_rounds_with_an_embedding_of_its_own(pipe, scale):
    pipe.scheduler = scheduler("DDIM")
    rival, rows = embeddings()["prompt_embeds"].flip(0) / 2, torch.tensor([False, True])
    plain = run(pipe, scale=1.0)
    swapped = {"prompt_embeds": embeddings()["prompt_embeds"], "negative_prompt_embeds": rival}
    away = run(pipe, scale=3.0, **swapped)  # c + 2 (c - r) = r + 3 (c - r)
    with attach(pipe, Rival(rival, rows)) as handle:
        ours = run(pipe, scale=scale)
        assert handle.nfe == 3 * STEPS
    close(ours[:1], plain[:1])
    close(ours[1:], away[1:])


def test_weak_network(pipe):
    pipe.scheduler = scheduler("Euler")
    weak = unet()
    stock = run(pipe)
    with attach(pipe, Weak(), {"weak": pipe.unet.__class__.from_config(pipe.unet.config).eval()}) as handle:
        handle.networks["weak"].load_state_dict(pipe.unet.state_dict())
        close(run(pipe), run_plain(pipe))  # w + s (c - w) = c
        assert handle.nfe == 4 * STEPS
    with attach(pipe, Weak(), {"weak": weak}):
        assert not torch.allclose(run(pipe), stock, atol=1e-3)


@pytest.mark.parametrize("space", ("x0", "eps", "v", "flow", "output"))
@pytest.mark.parametrize("case", ("DDIM", "Euler"))
@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction"))
def test_an_affine_method_is_the_same_in_every_space(pipe, space, case, prediction):
    pipe.scheduler = scheduler(case, prediction_type=prediction)
    stock = run(pipe)
    with attach(pipe, InData(space)):
        close(run(pipe), stock, 2e-5)


# ------------------------------------------------------------------------------------------------ our own loop
@pytest.mark.parametrize("case", ("DDIM", "Euler"))
@pytest.mark.parametrize("guidance", (CFG(SCALE), CFGpp(), Settling((9, 2)), InData()), ids=lambda g: type(g).__name__)
def test_our_loop_is_the_same(pipe, case, guidance):
    pipe.scheduler = scheduler(case, **({"timestep_spacing": "leading"} if case == "Euler" else {}))
    with attach(pipe, guidance) as handle:
        theirs = run(pipe, steps=5)
    model = LatentModel(pipe)
    given = embeddings()
    conds = {
        "cond": {"encoder_hidden_states": given["prompt_embeds"]},
        "uncond": {"encoder_hidden_states": given["negative_prompt_embeds"]},
    }
    levels = model.levels(5)
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * pipe.scheduler.init_noise_sigma
    start = start / (1 / levels[0].alpha if case == "Euler" else 1)
    predict = guided(model.denoiser, guidance, conds)
    with torch.no_grad():
        *_, last = sample(euler, predict, Path(start.float()), levels)
    close(theirs, last.x / (levels[-1].alpha if case == "Euler" else 1))
    assert predict.nfe == handle.nfe


# ------------------------------------------------------------------------------------------------ CFG++
def by_hand(pipe, scale, steps) -> Tensor:
    """CFG++ through DDIM or Euler, x' = alpha' x0_l + sigma' eps_u, from the scheduler's table alone."""
    s = pipe.scheduler
    s.set_timesteps(steps)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * s.init_noise_sigma
    c, u = (embeddings()[name] for name in ("prompt_embeds", "negative_prompt_embeds"))
    for i, t in enumerate(s.timesteps):
        if isinstance(s, diffusers.DDIMScheduler):
            power, last = s.alphas_cumprod[int(t)], int(t) - 1000 // steps
            then = s.alphas_cumprod[last] if last >= 0 else s.final_alpha_cumprod
            a, k, a_then, k_then = power**0.5, (1 - power) ** 0.5, then**0.5, (1 - then) ** 0.5
            inputs = x
        else:
            a, k, a_then, k_then = 1.0, s.sigmas[i], 1.0, s.sigmas[i + 1]
            inputs = x / (k**2 + 1) ** 0.5
        eps_c, eps_u = (pipe.unet(inputs, t, cond).sample for cond in (c, u))
        x0 = (x - k * (eps_u + scale * (eps_c - eps_u))) / a
        x = a_then * x0 + k_then * eps_u
    return x


@pytest.mark.parametrize("case", ("DDIM", "Euler"))
def test_cfgpp_by_hand(pipe, case):
    pipe.scheduler = scheduler(case)
    with attach(pipe, CFGpp()):
        ours = run(pipe)
    with torch.no_grad():
        close(ours, by_hand(pipe, 0.6, STEPS), 2e-6)


@dataclass(frozen=True)
class Equivalent:
    """CFG by omega = lambda / (1 - k'/k), the same in every call of a step; omegas are per call."""

    omegas: Iterator[float]
    space = "any"

    def guide(self, path, at):
        p = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        return Guided(p["uncond"] + next(self.omegas) * (p["cond"] - p["uncond"]))


@pytest.mark.parametrize(
    "case", ("DDIM", "Euler", "Heun", "KDPM2", "PNDM", "Euler ancestral", "KDPM2 ancestral", "LCM")
)
def test_cfgpp_is_cfg_of_a_changing_scale(pipe, case):
    """The exact identity for every step without history; PNDM's first step only (two calls)."""
    pipe.scheduler = scheduler(case, **({"clip_sample": False} if case == "LCM" else {}))
    steps = 1 if case == "PNDM" else 4
    if case == "PNDM":
        pipe.scheduler.set_timesteps(4)
    pairs = ratios(pipe.scheduler, case)
    omegas = iter([0.6 / (1 - end / start) for start, end in pairs])
    stop = {"callback_on_step_end": first_two} if case == "PNDM" else {}
    with attach(pipe, CFGpp(0.6)):
        ours = run(pipe, **stop)
    with attach(pipe, Equivalent(omegas)):
        close(ours, run(pipe, **stop), 3e-6 * steps)


def first_two(pipe, i, t, kwargs):
    pipe._interrupt = i >= 1
    return kwargs


def ratios(s, case) -> list[tuple[float, float]]:
    """(k, k') of the step that each call of a 4-step run belongs to."""
    s.set_timesteps(4)
    if case == "LCM":  # it forgets eps: x' = alpha' x0 + sigma' noise, so CFG++ is CFG by lambda
        return [(1.0, 0.0)] * 4
    if case in ("DDIM", "PNDM"):
        powers = [*(s.alphas_cumprod[int(t)] for t in dict.fromkeys(s.timesteps.tolist())), s.final_alpha_cumprod]
        pairs = list(pairwise(float(((1 - power) / power) ** 0.5) for power in powers))
        return [pairs[0], *pairs] if case == "PNDM" else pairs
    if case == "Euler":
        return list(pairwise(s.sigmas.tolist()))
    if case == "Euler ancestral":
        return [(a, (b**2 - up(a, b) ** 2) ** 0.5) for a, b in pairwise(s.sigmas.tolist())]
    ends = s.sigmas_down if case == "KDPM2 ancestral" else s.sigmas[1:]
    starts = [float(s.sigmas[i]) for i in (0, 0, 2, 2, 4, 4, 6)]
    return list(zip(starts, [float(ends[i]) for i in (0, 0, 2, 2, 4, 4, 6)], strict=True))


def up(a: float, b: float) -> float:
    return (b**2 * (a**2 - b**2) / a**2) ** 0.5


@pytest.mark.parametrize("case", ("DDPM", "PNDM", "LCM", "Heun", "LMS", "DPM++ 2M Karras", "DPM++ SDE", "DEIS"))
def test_cfgpp_of_nothing_is_unconditional(pipe, case):
    pipe.scheduler = scheduler(case, **({"clip_sample": False} if case == "LCM" else {}))
    with attach(pipe, CFG(0.0)):
        unconditional = run(pipe)
    with attach(pipe, CFGpp(0.0)):
        assert torch.equal(run(pipe), unconditional)


# ------------------------------------------------------------------------------------------------ flow schedulers
class FlowPipeline(DiffusionPipeline):
    """The loop of Stable Diffusion 3 around a UNet: nothing scales the input."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def do_classifier_free_guidance(self):
        return self.scale > 1

    @torch.no_grad()
    def __call__(self, latents, cond, uncond, scale, steps=4):
        self.scale = scale
        self.scheduler.set_timesteps(steps)
        with self.progress_bar(total=steps) as bar:
            for t in self.scheduler.timesteps:
                x = torch.cat([latents] * 2)
                out = self.unet(x, t.expand(len(x)), encoder_hidden_states=torch.cat([uncond, cond]), return_dict=False)
                u, c = out[0].chunk(2)
                latents = self.scheduler.step(u + scale * (c - u), t, latents, return_dict=False)[0]
                bar.update()
        return latents


def test_flow_scheduler(monkeypatch):
    family = families.FAMILIES["sd"]
    known = {"flow": family.__class__(**{**vars(family), "name": "flow", "pipelines": ("FlowPipeline",)})}
    monkeypatch.setattr(families, "FAMILIES", {**families.FAMILIES, **known})
    pipe = FlowPipeline(unet(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    x, c, u = (torch.randn(2, *shape, generator=g) for shape in ((4, 8, 8), (8, 16), (8, 16)))
    stock = pipe(x, c, u, SCALE)
    seen: list = []
    with attach(pipe, Spy(seen)):
        assert torch.equal(pipe(x, c, u, SCALE), stock)
    close(torch.stack([at.sigma for _, at in seen]).float(), pipe.scheduler.sigmas[:-1])
    with attach(pipe, InData("x0")):
        close(pipe(x, c, u, SCALE), stock)
    omegas = iter([0.6 * t * (1 - s) / (t - s) for t, s in pairwise(pipe.scheduler.sigmas.tolist())])  # k = t / (1 - t)
    with attach(pipe, Equivalent(omegas)):
        equal = pipe(x, c, u, SCALE)
    with attach(pipe, CFGpp()):
        close(pipe(x, c, u, SCALE), equal)


# ------------------------------------------------------------------------------------------------ errors
def test_errors(pipe):
    pipe.scheduler = scheduler("DDIM")
    with pytest.raises(ValueError, match="no family for DDIMPipeline"):
        attach(diffusers.DDIMPipeline(pipe.unet, pipe.scheduler), CFG())
    with pytest.raises(ValueError, match=r"DPMSolverSinglestepScheduler is not supported; .*DDIMScheduler"):
        locator(diffusers.DPMSolverSinglestepScheduler())
    with (
        attach(pipe, CFG()) as handle,
        pytest.raises(ValueError, match="'uncond': call the pipeline with guidance_scale"),
    ):
        run(pipe, scale=1.0)
    assert handle.nfe == 0
    with attach(pipe, Weak()), pytest.raises(ValueError, match="network 'weak': pass networks="):
        run(pipe)


@dataclass(frozen=True)
class Asks:
    branch: Branch
    space: str = "any"

    def guide(self, path, at):
        p = yield {"it": self.branch}
        return Guided(p["it"])


def test_errors_of_branches(pipe):
    pipe.scheduler = scheduler("DDIM")
    wrong = {
        "no condition 'cat'": Asks(Branch("cat")),
        "no patch 'pag-nowhere'": Asks(Branch("cond", patch="pag-nowhere")),
        "takes no nonsense": Asks(Branch({"nonsense": torch.zeros(2)})),
        "leave rows=None in one": Asks(Branch("cond", rows=torch.tensor([True, False])), space="x0"),
        "has space 'nowhere'": Asks(Branch("cond"), space="nowhere"),
    }
    for message, guidance in wrong.items():
        with attach(pipe, guidance), pytest.raises(ValueError, match=message):
            run(pipe)


def test_shifts_that_cannot_be_taken(pipe):
    refused = {"UniPC": "UniPCMultistepScheduler has no rule", "PNDM prk": "PNDMScheduler has no rule"}
    for case, message in refused.items():
        pipe.scheduler = scheduler(case)
        with attach(pipe, CFGpp()), pytest.raises(ValueError, match=message):
            run(pipe)
    pipe.scheduler = scheduler("DDIM", clip_sample=True)
    with attach(pipe, CFGpp()), pytest.raises(ValueError, match="DDIMScheduler clips"):
        run(pipe)
    pipe.scheduler = scheduler("DDIM")
    with attach(pipe, CFGpp()), pytest.raises(ValueError, match="guidance_rescale=0"):
        run(pipe, guidance_rescale=0.5)
    with attach(pipe, Weak(), {"weak": unet()}):
        run(pipe, guidance_rescale=0.5)


def close(a, b, tolerance: float = 1e-5) -> None:
    a, b = (torch.as_tensor(np.asarray(v)) for v in (a, b))
    error = float((a - b).abs().max() / b.abs().max())
    assert error < tolerance, error
