"""attach() on the pipelines that start from an image, fill a mask, or follow a ControlNet."""

import inspect
from functools import cache, partial
from typing import NamedTuple

import diffusers
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    FluxControlNetModel,
    MultiControlNetModel,
    QwenImageControlNetModel,
    SD3ControlNetModel,
    ZImageControlNetModel,
)
from PIL import Image

from guidance.attach.handle import attach
from guidance.contract import Branch, Guided
from guidance.methods.ahead import RectifiedCFGpp
from guidance.methods.catalogue import CFG, Plain
from solvers.latent import LatentModel
from tests.guidance.methods.test_conformance import KINDS, SCALE, SCHEDULERS, Settling, Spy, close, rows_of, run
from tests.support.dits import chroma, flow, flux, flux2, qwen, sd3, shaken, zimage
from tests.support.pipelines import sd, sdxl

SIZE = KINDS["sd"].size
HINTS = {"conditioning_embedding_out_channels": (8, 16)}


def pixels(channels=3, seed=5):
    return torch.rand(2, channels, *SIZE, generator=torch.Generator().manual_seed(seed))


IMAGE = {"image": pixels(), "strength": 0.7}
MASKED = {**IMAGE, "mask_image": pixels(1).round()}
HINT, BESIDE = {"image": pixels(seed=6)}, {"control_image": pixels(seed=6)}
PICTURE = Image.new("RGB", (24, 16), (200, 40, 90))
MASK = {"mask_image": Image.new("L", (24, 16), 255), "strength": 0.7}
REFERENCE = {"image": PICTURE, "max_area": SIZE[0] * SIZE[1], "_auto_resize": False}
MODE = {"control_image": [pixels(seed=6)], "control_mode": [1]}


def controlnet(pipe, seed=0):
    torch.manual_seed(seed)
    return shaken(ControlNetModel.from_unet(pipe.unet, **HINTS), 0.05)


def union(pipe):
    torch.manual_seed(0)
    config = ControlNetUnionModel.from_unet(pipe.unet, **HINTS).config
    width = pipe.unet.config.block_out_channels[0]
    small = {"num_trans_channel": width, "num_proj_channel": width, "num_trans_head": 2}
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    return shaken(ControlNetUnionModel(**{**own, **small}), 0.05)


def flux_controlnet(pipe):
    torch.manual_seed(0)
    size = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    return shaken(FluxControlNetModel.from_transformer(pipe.transformer, **size), 0.05)


def sd3_controlnet(pipe, extra=0):
    torch.manual_seed(0)
    return shaken(SD3ControlNetModel.from_transformer(pipe.transformer, 1, extra), 0.05)


def qwen_controlnet(pipe, extra=0):
    torch.manual_seed(0)
    size = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "extra_condition_channels": extra}
    return shaken(QwenImageControlNetModel.from_transformer(pipe.transformer, **size), 0.05)


def zimage_controlnet(pipe, channels=4):
    torch.manual_seed(0)
    size = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "control_in_dim": channels}
    return shaken(ZImageControlNetModel(control_layers_places=[0], control_refiner_layers_places=[0], **size), 0.05)


class Variant(NamedTuple):
    kind: str
    base: object  # makes the plain pipeline
    name: str
    call: dict
    net: object = None
    schedulers: tuple = ("Euler",)


NINE = {"in_channels": 9}
BOTH, FLOW = ("DDIM", "Euler"), ("flow Euler", "flow Euler by size")
VARIANTS = {
    "sd-inpaint": Variant("sd", sd, "StableDiffusionInpaint", MASKED, None, BOTH),
    "sd-inpaint-9": Variant("sd", partial(sd, unet_config=NINE), "StableDiffusionInpaint", MASKED),
    "sd-controlnet": Variant("sd", sd, "StableDiffusionControlNet", HINT, controlnet, BOTH),
    "sd-controlnet-img2img": Variant("sd", sd, "StableDiffusionControlNetImg2Img", {**IMAGE, **BESIDE}, controlnet),
    "sd-controlnet-inpaint": Variant("sd", sd, "StableDiffusionControlNetInpaint", {**MASKED, **BESIDE}, controlnet),
    "sdxl-img2img": Variant("sdxl", sdxl, "StableDiffusionXLImg2Img", IMAGE, None, BOTH),
    "sdxl-inpaint": Variant("sdxl", sdxl, "StableDiffusionXLInpaint", MASKED, None, BOTH),
    "sdxl-inpaint-9": Variant("sdxl", partial(sdxl, unet_config=NINE), "StableDiffusionXLInpaint", MASKED),
    "sdxl-controlnet": Variant("sdxl", sdxl, "StableDiffusionXLControlNet", HINT, controlnet, BOTH),
    "sdxl-controlnet-img2img": Variant(
        "sdxl", sdxl, "StableDiffusionXLControlNetImg2Img", {**IMAGE, **BESIDE}, controlnet
    ),
    "sdxl-controlnet-inpaint": Variant(
        "sdxl", sdxl, "StableDiffusionXLControlNetInpaint", {**MASKED, **BESIDE}, controlnet
    ),
    "sdxl-union": Variant("sdxl", sdxl, "StableDiffusionXLControlNetUnion", MODE, union),
    "sdxl-union-img2img": Variant("sdxl", sdxl, "StableDiffusionXLControlNetUnionImg2Img", {**IMAGE, **MODE}, union),
    "sdxl-union-inpaint": Variant("sdxl", sdxl, "StableDiffusionXLControlNetUnionInpaint", {**MASKED, **MODE}, union),
    "sd3-img2img": Variant("sd3", sd3, "StableDiffusion3Img2Img", IMAGE, None, FLOW),
    "sd3-inpaint": Variant("sd3", partial(sd3, channels=16), "StableDiffusion3Inpaint", MASKED, None, FLOW[:1]),
    "flux-img2img": Variant("flux", flux, "FluxImg2Img", IMAGE, None, FLOW[:1]),
    "flux-inpaint": Variant("flux", flux, "FluxInpaint", MASKED, None, FLOW[:1]),
    "flux-kontext": Variant("flux", flux, "FluxKontext", REFERENCE, None, FLOW[:1]),
    "flux-kontext-inpaint": Variant("flux", flux, "FluxKontextInpaint", {**REFERENCE, **MASK}, None, FLOW[:1]),
    "flux-controlnet": Variant("flux", flux, "FluxControlNet", BESIDE, flux_controlnet, FLOW[:1]),
    "sd3-controlnet": Variant("sd3", sd3, "StableDiffusion3ControlNet", BESIDE, sd3_controlnet, FLOW[:1]),
    "sd3-controlnet-inpaint": Variant(
        *("sd3", partial(sd3, channels=16), "StableDiffusion3ControlNetInpainting"),
        *({**BESIDE, "control_mask": pixels(1).round()}, partial(sd3_controlnet, extra=1), FLOW[:1]),
    ),
    "flux2-reference": Variant("flux2", flux2, "Flux2Klein", {"image": PICTURE.resize((96, 64))}, None, FLOW[:1]),
    "flux2-inpaint": Variant("flux2", flux2, "Flux2KleinInpaint", {"image": PICTURE, **MASK}, None, FLOW[:1]),
    "qwen-img2img": Variant("qwen", qwen, "QwenImageImg2Img", IMAGE, None, FLOW[:1]),
    "qwen-inpaint": Variant("qwen", qwen, "QwenImageInpaint", MASKED, None, FLOW[:1]),
    "qwen-controlnet": Variant("qwen", qwen, "QwenImageControlNet", BESIDE, qwen_controlnet, FLOW[:1]),
    "qwen-controlnet-inpaint": Variant(
        *("qwen", qwen, "QwenImageControlNetInpaint", {**BESIDE, "control_mask": pixels(1).round()}),
        *(partial(qwen_controlnet, extra=4), FLOW[:1]),
    ),
    "chroma-img2img": Variant("chroma", chroma, "ChromaImg2Img", IMAGE, None, FLOW[:1]),
    "zimage-img2img": Variant("zimage", zimage, "ZImageImg2Img", IMAGE, None, FLOW[:1]),
    "zimage-inpaint": Variant("zimage", zimage, "ZImageInpaint", MASKED, None, FLOW[:1]),
    "zimage-controlnet": Variant("zimage", zimage, "ZImageControlNet", BESIDE, zimage_controlnet, FLOW[:1]),
    "zimage-controlnet-inpaint": Variant(
        *("zimage", zimage, "ZImageControlNetInpaint", {"image": pixels(), "mask_image": pixels(1), **BESIDE}),
        *(partial(zimage_controlnet, channels=9), FLOW[:1]),
    ),
}


@cache
def made(name):
    variant = VARIANTS[name]
    plain = variant.base()
    parts = {key: part for key, part in plain.components.items() if part is not None}
    more = {"requires_safety_checker": False} if variant.kind == "sd" else {}
    if variant.kind == "sd":
        parts |= {"safety_checker": None, "feature_extractor": None}
    if variant.kind == "qwen":  # whose small pipeline has no text encoder
        parts |= {"text_encoder": None, "tokenizer": None}
    if variant.net:
        more["controlnet"] = variant.net(plain)
    pipe = getattr(diffusers, f"{variant.name}Pipeline")(**parts, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipe_of(name, case=None):
    pipe = made(name)
    pipe.scheduler = SCHEDULERS[case or VARIANTS[name].schedulers[0]]()
    return pipe


def sampled(name, pipe, **more):
    torch.manual_seed(0)  # SD3's ControlNet draws the latents of its picture from the global generator
    return run(VARIANTS[name].kind, pipe, **{**VARIANTS[name].call, "steps": 4, **more})


SLOWER = {"flux-controlnet", "flux2-reference", "qwen-img2img", "qwen-inpaint", "chroma-img2img", "zimage-img2img"}
SLOWER |= {"zimage-inpaint", "flux-kontext-inpaint", "sd3-controlnet-inpaint", "flux2-inpaint"}
SLOWER |= {"qwen-controlnet-inpaint", "zimage-controlnet", "zimage-controlnet-inpaint"}
CASES = [(name, case) for name, variant in VARIANTS.items() for case in variant.schedulers]


@pytest.mark.parametrize(
    "name, case", [pytest.param(*each, marks=[pytest.mark.slow] * (each[0] in SLOWER)) for each in CASES]
)
def test_cfg_is_the_stock_pipeline(name, case):
    pipe = pipe_of(name, case)
    stock = sampled(name, pipe)
    with attach(pipe, CFG(SCALE)) as handle:
        ours = sampled(name, pipe)
    assert torch.equal(ours, stock) and bool(ours.isfinite().all()) and handle.nfe >= 4 * 2
    assert torch.equal(sampled(name, pipe), stock)


FIRST = {name: value[:1] for name, value in KINDS["qwen"].texts.items()}
EDITS = {  # their calls: the second is of one picture at a time, of as many references as are given
    "QwenImageEdit": {"image": PICTURE},
    "QwenImageEditPlus": {"image": [PICTURE, PICTURE.resize((16, 24))], **FIRST},
    "QwenImageEditInpaint": {"image": PICTURE, **MASK},
}


@pytest.mark.parametrize("name", ("QwenImageEdit", *(pytest.param(n, marks=pytest.mark.slow) for n in list(EDITS)[1:])))
def test_a_pictures_tokens_beside_those_of_the_sample(monkeypatch, name):
    """At a size of the references that a test can bear; these pipelines are for `attach` alone."""
    kind, call = getattr(diffusers, f"{name}Pipeline"), EDITS[name]
    size = (24, 16) if name == "QwenImageEditPlus" else (24, 16, None)
    monkeypatch.setattr(inspect.getmodule(kind), "calculate_dimensions", lambda area, ratio: size)
    pipe = kind(**{**qwen().components, "processor": None})
    pipe.set_progress_bar_config(disable=True)
    stock = run("qwen", pipe, **call)
    with attach(pipe, CFG(SCALE)) as handle:
        assert torch.equal(run("qwen", pipe, **call), stock) and handle.nfe == handle.branches["cond"] * 2 >= 6
    with pytest.raises(ValueError, match=f"{name}Pipeline reads its prompt with a picture, .*: use attach"):
        LatentModel(pipe).family.encode(pipe, ["red"], None, (16, 16), None)


@pytest.mark.parametrize("name, more", (("FluxControlNetImg2Img", IMAGE), ("FluxControlNetInpaint", MASKED)))
@pytest.mark.slow
def test_a_controlnet_of_a_pipeline_without_a_second_branch(name, more):
    plain = flux(flow())
    pipe = getattr(diffusers, f"{name}Pipeline")(
        **{k: part for k, part in plain.components.items() if part is not None}, controlnet=flux_controlnet(plain)
    )
    pipe.set_progress_bar_config(disable=True)
    texts = {key: value for key, value in KINDS["flux"].texts.items() if "negative" not in key}
    call = {**texts, **more, **BESIDE, "num_inference_steps": 4, "output_type": "latent"}
    call |= dict(zip(("height", "width"), SIZE, strict=True))
    stock = pipe(**call, generator=torch.Generator().manual_seed(1)).images
    with attach(pipe, Plain()):
        assert torch.equal(pipe(**call, generator=torch.Generator().manual_seed(1)).images, stock)
    with attach(pipe, CFG(SCALE)), pytest.raises(ValueError, match="needs the branch 'uncond'"):
        pipe(**call)


@pytest.mark.parametrize("name", ("qwen-controlnet", "zimage-controlnet"))
def test_rows_that_are_skipped_leave_their_residuals(name):
    """Also where the rows that are left are shorter, so that Z-Image pads them less."""
    pipe, more = pipe_of(name), {}
    if name == "zimage-controlnet":
        texts = KINDS["zimage"].texts
        more["negative_prompt_embeds"] = [texts["prompt_embeds"][0].repeat(7, 1), texts["negative_prompt_embeds"][1]]
    stock = sampled(name, pipe, **more)
    with attach(pipe, Settling((1, 9))) as handle:
        ours = sampled(name, pipe, **more)
    assert handle.nfe == 4 + 3 * 3 and not torch.allclose(ours[:1], stock[:1], atol=1e-3)
    close(ours[1:], stock[1:])


def test_residuals_of_a_transformers_controlnet_stay_where_it_was_asked():
    pipe = pipe_of("sd3-controlnet")
    plain = sampled("sd3-controlnet", pipe, controlnet_conditioning_scale=0.0)
    with attach(pipe, Settling((9, 1))):
        ours = sampled("sd3-controlnet", pipe)
    stock = sampled("sd3-controlnet", pipe)
    close(ours[:1], stock[:1])
    assert not torch.allclose(stock, plain, atol=1e-3)
    with (
        attach(pipe, RectifiedCFGpp(2.0)),
        pytest.raises(ValueError, match="ControlNet was asked at another point"),
    ):
        sampled("sd3-controlnet", pipe)


# ------------------------------------------------------------------------------------------------ the ControlNet's rows
@pytest.mark.parametrize("name", ("sd-controlnet", "sdxl-controlnet", "sdxl-union"))
def test_rows_of_the_controlnet_are_skipped_too(name):
    pipe = pipe_of(name)
    stock, plain = sampled(name, pipe), sampled(name, pipe, scale=1.0)
    with rows_of(pipe.unet) as rows, rows_of(pipe.controlnet) as hinted:
        with attach(pipe, Plain()):
            close(sampled(name, pipe), plain)
        assert sum(rows) == sum(hinted) == 2 * 4
        rows.clear(), hinted.clear()
        with attach(pipe, Settling((9, 1))) as handle:
            ours = sampled(name, pipe)
        assert sum(rows) == sum(hinted) == handle.nfe == 4 + 3 * 3
    close(ours[:1], stock[:1])
    assert not torch.allclose(ours[1:], stock[1:], atol=1e-3)


def test_guess_mode_hints_the_conditional_branch_alone():
    pipe, mode = pipe_of("sd-controlnet"), {"guess_mode": True}
    stock = sampled("sd-controlnet", pipe, **mode)
    assert not torch.equal(stock, sampled("sd-controlnet", pipe))
    with rows_of(pipe.unet) as rows, rows_of(pipe.controlnet) as hinted, attach(pipe, CFG(SCALE)):
        assert torch.equal(sampled("sd-controlnet", pipe, **mode), stock)
        assert (sum(rows), sum(hinted)) == (4 * 4, 2 * 4)
    seen: list = []
    with rows_of(pipe.controlnet) as hinted, attach(pipe, Settling((9, 0))) as handle:
        close(sampled("sd-controlnet", pipe, **mode)[:1], stock[:1])
        assert (handle.nfe, sum(hinted)) == (3 * 4, 2 * 4)
    with attach(pipe, Spy(seen)):
        sampled("sd-controlnet", pipe, **mode)
    assert all(path.x.shape == (2, 4, SIZE[0] // 2, SIZE[1] // 2) for path, _ in seen)


def test_several_controlnets():
    one = made("sd-controlnet")
    nets = MultiControlNetModel([one.controlnet, controlnet(one, seed=1)])
    parts = {**one.components, "controlnet": nets}
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.scheduler = SCHEDULERS["Euler"]()
    pipe.set_progress_bar_config(disable=True)
    call = {"image": [pixels(seed=6), pixels(seed=7)], "controlnet_conditioning_scale": [0.5, 1.0]}
    stock = run("sd", pipe, **call)
    assert not torch.equal(stock, run("sd", pipe, **{**call, "controlnet_conditioning_scale": [0.5, 0.0]}))
    with attach(pipe, CFG(SCALE)):
        assert torch.equal(run("sd", pipe, **call), stock)
    with rows_of(pipe.controlnet) as rows, attach(pipe, Settling((9, 1))) as handle:
        close(run("sd", pipe, **call)[:1], stock[:1])
        assert sum(rows) == handle.nfe == 4 + 3 * 2


def test_an_embedding_of_its_own_reaches_the_controlnet():
    """As it would have, had the pipeline been called with it."""
    pipe, other = pipe_of("sd-controlnet"), KINDS["sd"].texts["prompt_embeds"].flip(0)

    class Own:
        space = "any"

        def guide(self, path, at):
            p = yield {"own": Branch({"encoder_hidden_states": other})}
            return Guided(p["own"])

    with attach(pipe, Own()):
        ours = sampled("sd-controlnet", pipe)
    close(ours, sampled("sd-controlnet", pipe, scale=1.0, prompt_embeds=other))


def test_an_exception_in_a_controlnet_leaves_the_pipeline_clean():
    pipe = pipe_of("sd-controlnet")
    stock, before = sampled("sd-controlnet", pipe), set(vars(pipe.controlnet))
    with attach(pipe, Spy([], raises_at=2)), pytest.raises(RuntimeError, match="stop"):
        sampled("sd-controlnet", pipe)
    assert set(vars(pipe.controlnet)) == before and torch.equal(sampled("sd-controlnet", pipe), stock)
