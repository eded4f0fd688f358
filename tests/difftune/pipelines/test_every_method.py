"""`difftune sample --guidance NAME` on every family: the picture changes, or a sentence refuses the method by name."""

import inspect
import warnings
from functools import cache, partialmethod

import pytest
import torch

from difftune.errors import UserError
from difftune.lookup import guidance_named
from difftune.pipelines.generate import Sampling, draw_pictures, generate_batches, uncond_for
from difftune.pipelines.method_parts import pictures_of, prepared
from guidance.methods.catalogue import GUIDANCE
from solvers.errors import Caution
from solvers.families.tokens import unpacked
from solvers.latent import LatentModel
from tests.support.dits import flux
from tests.support.families import EVERY

PROMPT, SIDE, STEPS = "a red circle", 32, 4
GIVEN = {  # the negative that a user gives; and a random network needs more of a push than a trained one
    "ag": {"min_cfg_steps": 3},
    "linear-ag": {"scale": 100.0},
    "perpneg": {"negatives": ("a blue square",)},
    "nasa": {"negative": "a blue square"},
    "nag": {"negative": "a blue square"},
}
LONG = [pytest.param("flux2", "gfcg", marks=pytest.mark.slow)]  # it reads the prompts of 18 classes
PAIRS = [
    *(
        (family, name)
        for family in EVERY
        for name in GUIDANCE
        if name != "none" and (family, name) != ("flux2", "gfcg")
    ),
    *LONG,
]


@cache
def small(family):
    torch.manual_seed(0)
    pipe = EVERY[family].make()
    if "use_resolution_binning" in inspect.signature(type(pipe).__call__).parameters:  # to sizes that no small one has
        call = partialmethod(type(pipe).__call__, use_resolution_binning=False)
        pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {"__call__": call})
    return pipe, LatentModel(pipe).noise(1, torch.Generator().manual_seed(1), SIDE, SIDE)


def drawn(family, name, **options):
    pipe, noise = small(family)
    sampling = Sampling(STEPS, embedded_guidance=EVERY[family].embedded)
    return draw_pictures(
        generate_batches(pipe, [PROMPT], [0], guidance_named(name, options=options), sampling, noise), 1, name
    ).images


@pytest.fixture(autouse=True)
def small_size(monkeypatch):
    """LinearAG's runs too are of this size."""
    monkeypatch.setattr(LatentModel, "size", lambda self, height=None, width=None: (height or SIDE, width or SIDE))


@cache
def stock(family):
    return drawn(family, "none")


def names_of(name):
    """The words by which a sentence may name the method: its own name, its class, or the change of the network."""
    return name, GUIDANCE[name].__name__


@pytest.mark.parametrize("family, name", PAIRS)
@pytest.mark.sampled(40)
def test_it_changes_the_picture_or_is_refused_by_name(family, name):
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            made = drawn(family, name, **GIVEN.get(name, {}))
    except UserError as refused:
        assert any(word in str(refused) for word in names_of(name)), str(refused)
        return
    said = [str(warning.message) for warning in told if issubclass(warning.category, Caution)]
    ignored = (family, name) == ("sana-sprint", "cfg") and any("the scale of CFG itself is ignored" in s for s in said)
    assert ignored or ((made - stock(family)).abs().max() > 2e-6 and bool(made.isfinite().all()))


def test_what_judges_pictures_inside_a_pipelines_call_sees_those_of_flux2():
    """`attach` has FLUX.2's latents (B, C, h, w), and its VAE's statistics are those of 2 x 2 patches."""
    pipe, noise = small("flux2")
    latent = LatentModel(pipe)
    tokens = noise.flatten(2).transpose(1, 2)
    attached = unpacked(tokens, noise.shape[-2:])
    assert attached.shape[1] * 4 == noise.shape[1]
    assert torch.equal(pictures_of(latent, attached), latent.decode(noise))


def test_a_film_is_no_picture():
    pipe, _ = small("wan")
    with pytest.raises(UserError, match="judge pictures, and these are films of 5 frames"):
        pictures_of(LatentModel(pipe), LatentModel(pipe, num_frames=5).noise(1, None, SIDE, SIDE))


@pytest.mark.parametrize("name", ["cfg", "linear-ag", "interval", "rescale"])
def test_a_pipeline_that_guides_on_demand_is_told_to(name):
    """FLUX and Qwen-Image prepare the unconditional branch for a negative prompt alone."""
    pipe, _ = small("flux")
    method = guidance_named(name)
    if name == "linear-ag":
        method = prepared(pipe, method, [PROMPT], STEPS)
    told = uncond_for(pipe, method, 2)
    assert told == {"true_cfg_scale": 2.0, "negative_prompt": ["", ""]}
    assert uncond_for(pipe, guidance_named("pag"), 2) == uncond_for(pipe, guidance_named("none"), 2) == {}
    assert uncond_for(small("sd")[0], method, 2) == {}
    assert uncond_for(flux(guidance_embeds=True), method, 2) == {}
