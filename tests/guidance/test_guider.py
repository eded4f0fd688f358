"""Guiders: the same numbers as diffusers' own where it has the method, in a modular pipeline, saved and reloaded."""

import pytest
import torch
from diffusers import ClassifierFreeGuidance, StableDiffusionXLAutoBlocks
from diffusers.guiders import ClassifierFreeZeroStarGuidance, TangentialClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance

from guidance.guider import Guider, as_guider
from guidance.methods.catalogue import APG, CFG, FDG, GUIDANCE, TCFG, AdaptiveGuidance, CFGZeroStar, Rescale
from tests.support.pipelines import sdxl

G = torch.Generator().manual_seed(0)
COND, UNCOND = torch.randn(2, 4, 8, 8, generator=G), torch.randn(2, 4, 8, 8, generator=G)
METHODS = [CFG(3.0), Rescale(CFG(3.0), phi=0.7), CFGZeroStar(3.0, zero_steps=0), TCFG(3.0), FDG(2.0, high=4.0)]


def ids(method) -> str:
    return type(method).__name__


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (CFG(3.0), ClassifierFreeGuidance(3.0)),
        (Rescale(CFG(3.0), phi=0.7), ClassifierFreeGuidance(3.0, guidance_rescale=0.7)),
        (CFGZeroStar(3.0, zero_steps=0), ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=0)),
        (TCFG(3.0), TangentialClassifierFreeGuidance(3.0)),
    ],
    ids=lambda g: type(g).__name__,
)
def test_against_diffusers(ours, theirs):
    theirs.set_state(step=1, num_inference_steps=4, timestep=None)
    expected = theirs.forward(COND, UNCOND).pred
    torch.testing.assert_close(as_guider(ours)(_data(COND, UNCOND)).pred, expected, rtol=1e-5, atol=1e-5)


def _data(cond, uncond):
    """What a pipeline hands back to a guider, after it ran the network on what prepare_inputs gave."""
    guider = as_guider(CFG())
    data = guider.prepare_inputs({"prompt_embeds": (torch.zeros(1), torch.ones(1))})
    for state, pred in zip(data, (cond, uncond), strict=True):
        state.noise_pred = pred
    return data


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_saved_and_reloaded(method, tmp_path):
    guider = as_guider(method)
    assert isinstance(guider, BaseGuidance)
    guider.save_pretrained(tmp_path)
    again = Guider.from_pretrained(tmp_path)
    assert again.method == method and guider.new(stop=0.5).method == method
    assert torch.equal(again.forward(COND, UNCOND).pred, guider.forward(COND, UNCOND).pred)


def test_window():
    guider = Guider("cfg", {"scale": 3.0}, start=0.25, stop=0.75)
    counts = []
    for step in range(4):
        guider.set_state(step=step, num_inference_steps=4, timestep=None)
        counts.append(guider.num_conditions)
    assert counts == [1, 2, 2, 1]
    guider.disable()
    assert guider.num_conditions == 1 and guider.forward(COND).pred is COND


def test_in_a_modular_pipeline(tmp_path):
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    parts = sdxl().components
    names = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    pipe.update_components(**{name: parts[name] for name in names}, force_zeros_for_empty_prompt=True)
    pipe.set_progress_bar_config(disable=True)

    def run(guider) -> torch.Tensor:
        pipe.update_components(guider=guider)
        options = {"num_inference_steps": 3, "output_type": "latent", "output": "images", "height": 16, "width": 16}
        return pipe(prompt=["a red circle"], generator=torch.Generator().manual_seed(1), **options)

    stock, plain = run(ClassifierFreeGuidance(3.0)), run(as_guider(CFG(1.0)))
    assert torch.equal(run(as_guider(CFG(3.0))), stock) and not torch.allclose(plain, stock, atol=1e-3)
    for method in METHODS[1:]:
        ours = run(as_guider(method))
        assert not torch.allclose(ours, stock, atol=1e-5) and pipe.guider.method == method
        pipe.guider.save_pretrained(tmp_path / ids(method))
        assert torch.equal(run(Guider.from_pretrained(tmp_path / ids(method))), ours) and pipe.guider.method == method


@pytest.mark.parametrize("name", GUIDANCE)
def test_others_are_refused_by_name(name):
    method = GUIDANCE[name]()
    if name in ("cfg", "tcfg", "fdg", "rescale"):
        assert as_guider(method).method == method
        return
    with pytest.raises(ValueError, match=f"{type(method).__name__} (cannot be a guider|as a guider)"):
        as_guider(method)


def test_what_cannot_be_saved_is_refused():
    with pytest.raises(ValueError, match="CFG.scale is a Tensor, which a guider cannot save; pass a number"):
        as_guider(CFG(torch.ones(2)))
    for inner in (APG(), AdaptiveGuidance()):
        with pytest.raises(ValueError, match=f"{type(inner).__name__} cannot be a guider"):
            as_guider(Rescale(inner))
