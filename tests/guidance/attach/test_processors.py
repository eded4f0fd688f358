"""Every patch beside what else sets attention processors: an IP-Adapter, fused projections, LoRA, others' own."""

import pytest
import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import AttnProcessor2_0, CustomDiffusionAttnProcessor2_0

from difftune.pipelines import lora
from guidance.attach.handle import attach
from guidance.methods.catalogue import (
    APG,
    CFG,
    NAG,
    NASA,
    PAG,
    SEG,
    SLG,
    AdaptiveGuidance,
    CFGpp,
    Plain,
)
from tests.support.pipelines import WIDTH, sd

TOKENS = torch.randn(1, 7, WIDTH, generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(3))  # of "uncond" and "cond"
CALL = {"prompt": "red", "num_inference_steps": 3, "output_type": "latent"}
PATCHED = {"pag": PAG(2.0), "slg": SLG(2.0), "seg": SEG(2.0), "nasa": NASA(0.3, TOKENS), "nag": NAG(4.0, TOKENS)}


def run(pipe, **more):
    return pipe(**{**CALL, **more}, generator=torch.Generator().manual_seed(5))[0]


def ip_adapter():
    """A pipeline with a random IP-Adapter of four image tokens."""
    pipe, g = sd(), torch.Generator().manual_seed(7)
    normal = lambda *shape: 0.5 * torch.randn(*shape, generator=g)  # noqa: E731
    project = {"proj.weight": normal(4 * WIDTH, 12), "proj.bias": normal(4 * WIDTH)}
    state = {"image_proj": {**project, "norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}}
    layers = [name for name in pipe.unet.attn_processors if "attn2" in name]
    state["ip_adapter"] = {}
    for i, name in enumerate(pipe.unet.attn_processors):
        if name in layers:
            width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            state["ip_adapter"] |= {f"{i}.to_{k}_ip.weight": normal(width, WIDTH) for k in "kv"}
    pipe.unet._load_ip_adapter_weights([state])
    return pipe


@pytest.fixture(scope="module")
def adapter():
    return ip_adapter()


def shown(pipe, scale=4.0, **more):
    return run(pipe, guidance_scale=scale, ip_adapter_image_embeds=[IMAGES if scale > 1 else IMAGES[1:]], **more)


UNPATCHED = [CFG(4.0), Plain(), CFGpp(0.6), APG(4.0), AdaptiveGuidance(4.0)]


@pytest.mark.parametrize("method", UNPATCHED, ids=lambda m: type(m).__name__)
def test_methods_without_a_patch_beside_an_ip_adapter(adapter, method):
    stock = shown(adapter)
    assert not torch.allclose(stock, run(sd(), guidance_scale=4.0), atol=1e-3)
    with attach(adapter, method):
        ours = shown(adapter)
    assert bool(ours.isfinite().all()) and torch.equal(shown(adapter), stock)
    if type(method) is CFG:
        assert torch.equal(ours, stock)


@pytest.mark.parametrize("name", PATCHED)
def test_patches_beside_an_ip_adapter(adapter, name):
    """The image prompt stays: without its share (scale 0) the result is that of a pipeline without the adapter."""
    plain = sd()
    with attach(plain, PATCHED[name]):
        without = run(plain)
    stock = shown(adapter, 1.0)
    with attach(adapter, PATCHED[name]):
        ours = shown(adapter, 1.0)
        adapter.set_ip_adapter_scale(0.0)
        off = shown(adapter, 1.0)
        adapter.set_ip_adapter_scale(1.0)
    close = {"rtol": 1e-4, "atol": 1e-4 * float(without.abs().max())}
    torch.testing.assert_close(off, without, **close)
    assert not torch.allclose(ours, stock, **close) and not torch.allclose(ours, without, **close)
    assert torch.equal(shown(adapter, 1.0), stock)


@pytest.mark.parametrize("kind", (NASA, NAG))
def test_a_scale_near_nothing_is_the_ip_adapter_alone(adapter, kind):
    stock = shown(adapter, 1.0)
    with attach(adapter, kind(1e-6, TOKENS)):
        torch.testing.assert_close(shown(adapter, 1.0), stock, rtol=1e-3, atol=1e-3)


def test_masks_of_an_ip_adapter_reach_it(adapter):
    left = torch.zeros(1, 1, 16, 16)
    left[..., :8] = 1
    masks = IPAdapterMaskProcessor().preprocess(list(left), height=16, width=16)
    more = {"cross_attention_kwargs": {"ip_adapter_masks": [masks.reshape(1, 1, 16, 16)]}}
    with attach(adapter, NAG(4.0, TOKENS)):
        assert not torch.allclose(shown(adapter, 1.0, **more), shown(adapter, 1.0), atol=1e-3)
    with attach(adapter, NAG(1e-6, TOKENS)):
        ours = shown(adapter, 1.0, **more)
    torch.testing.assert_close(ours, shown(adapter, 1.0, **more), rtol=1e-3, atol=1e-3)


def test_the_ip_adapters_own_callback(adapter):
    stop = {"callback_on_step_end": IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.4)}
    stock = shown(adapter, **stop)
    adapter.set_ip_adapter_scale(1.0)
    with attach(adapter, CFG(4.0)):
        assert torch.equal(shown(adapter, **stop), stock)
    adapter.set_ip_adapter_scale(1.0)


@pytest.mark.parametrize("name", PATCHED)
def test_patches_beside_fused_projections_and_a_lora(name):
    """The same numbers as without, or one sentence."""
    pipe = sd()
    with attach(pipe, PATCHED[name]):
        expected = run(pipe)
    pipe.unet.fuse_qkv_projections()
    with attach(pipe, PATCHED[name]):
        if name == "seg":
            with pytest.raises(ValueError, match=r"SEG blurs queries, .* unfuse_qkv_projections"):
                run(pipe)
        else:
            torch.testing.assert_close(run(pipe), expected, rtol=1e-3, atol=1e-3)
    pipe.unet.unfuse_qkv_projections()
    lora.add(pipe, rank=2)
    with attach(pipe, PATCHED[name]):
        torch.testing.assert_close(run(pipe), expected, rtol=1e-4, atol=1e-4)
        for weight in lora.weights(pipe.unet).values():
            weight.data += 0.3
        assert not torch.allclose(run(pipe), expected, atol=1e-2)


class Own(AttnProcessor2_0):
    """Somebody's own."""


@pytest.mark.parametrize("name", PATCHED)
@pytest.mark.parametrize("kind", (Own, CustomDiffusionAttnProcessor2_0), ids=lambda kind: kind.__name__)
def test_a_processor_that_a_patch_would_replace_is_named(name, kind):
    """It would be left out without a word; patches that replace none leave it at work."""
    pipe = sd()
    plain = kind is Own
    pipe.unet.set_attn_processor({key: kind() if plain else kind(False, False) for key in pipe.unet.attn_processors})
    with attach(pipe, PATCHED[name]):
        if name in ("slg", "seg"):
            assert bool(run(pipe).isfinite().all())
        else:
            with pytest.raises(ValueError, match=f"attends by {kind.__name__}, which this method would replace"):
                run(pipe)
