"""Patches of a UNet's forward: what they compute, where they act, and that nothing stays."""

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)

from guidance.attach.handle import attach
from guidance.guided import guided
from guidance.methods.catalogue import NAG, NASA, PAG, SEG, SLG
from solvers.denoiser import Path
from solvers.families.patches import Away, Values, blocks_of, blurred, nag, nasa, places
from solvers.families.table import FAMILIES
from solvers.latent import LatentModel
from solvers.samplers.catalogue import euler, sample
from tests.support.dits import sana
from tests.support.pipelines import sd, sdxl, unet

PATCHES = ("pag:", "slg:", "seg:", "seg::2.0", "nasa", "nag:2.5:0.25")
SD = FAMILIES["sd"]


@pytest.fixture(scope="module")
def net():
    return unet()


@pytest.fixture(scope="module")
def pipes():
    return {"sd": sd(), "sdxl": sdxl()}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, TEXT, NEGATIVE = randn(2, 4, 8, 8), randn(2, 5, 16, seed=1), randn(2, 7, 16, seed=2)


@torch.no_grad()
def run(net, **kwargs) -> torch.Tensor:
    return net(X, 500, encoder_hidden_states=TEXT, **kwargs).sample


def negative(scale: float = 0.3) -> dict:
    tensors = {"negative_hidden_states": NEGATIVE, "negative_scale": torch.full((2,), scale)}
    return {"cross_attention_kwargs": tensors}


@pytest.mark.parametrize("name", PATCHES)
def test_changes_the_output_and_leaves_nothing(net, name):
    more = negative() if name.startswith("na") else {}
    before, kept = run(net), [set(vars(m)) | set(m._forward_hooks) | set(m._forward_pre_hooks) for m in net.modules()]
    with SD.patched(net, name):
        assert not torch.allclose(run(net, **more), before, atol=1e-4)
    with pytest.raises(RuntimeError, match="stop"), SD.patched(net, name):
        raise RuntimeError("stop")
    after = [set(vars(m)) | set(m._forward_hooks) | set(m._forward_pre_hooks) for m in net.modules()]
    assert torch.equal(run(net), before) and after == kept


def attention(**more) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=16, heads=2, dim_head=8, processor=AttnProcessor2_0(), **more).eval()


@torch.no_grad()
def test_identity_attention_is_diffusers():
    attn, x = attention(), randn(3, 9, 16)
    theirs = PAGIdentitySelfAttnProcessor2_0()(attn, torch.cat([x, x])).chunk(2)[1]
    torch.testing.assert_close(Values()(attn, x), theirs)


@torch.no_grad()
def test_nasa_and_nag_in_one_layer():
    attn, x = attention(cross_attention_dim=16), randn(2, 9, 16)
    stock = attn(x, TEXT)

    def steered(combine, scale: float, text=NEGATIVE) -> torch.Tensor:
        return Away(combine, attn.processor)(attn, x, TEXT, None, text, torch.full((2,), scale))

    assert torch.equal(steered(nasa, 0.0), stock)
    bias = attn.to_out[0].bias
    torch.testing.assert_close(steered(nasa, 0.4, TEXT), 0.6 * (stock - bias) + bias)
    torch.testing.assert_close(steered(nasa, 0.4), stock - 0.4 * (attn(x, NEGATIVE) - bias))
    plus, minus = randn(2, 3, 4), randn(2, 3, 4, seed=5)
    scale = torch.full((2, 1, 1), 5.0)
    away = (nag(plus, minus, scale, 2.5, 1.0)).abs().sum(-1)
    assert (away <= 2.5 * plus.abs().sum(-1) * 1.0001).all()
    torch.testing.assert_close(nag(plus, minus, scale, 1e9, 0.25), plus + 0.25 * 5 * (plus - minus))
    torch.testing.assert_close(nag(plus, plus, scale, 2.5, 0.25), plus)
    none = torch.zeros(2, 3, 4, requires_grad=True)  # a token without features has no length to divide by
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(nag(none, minus - minus, scale, 2.5, 0.25).sum(), none)
    assert bool(gradient.isfinite().all())


def test_blurred_queries():
    q = randn(2, 12, 5)
    torch.testing.assert_close(blurred(q, 3, 4, float("inf")), q.mean(1, keepdim=True).expand_as(q))
    torch.testing.assert_close(blurred(q, 3, 4, 1e4), q.mean(1, keepdim=True).expand_as(q), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(blurred(q, 3, 4, 1e-3), q)
    spike = torch.zeros(1, 15, 1)
    spike[0, 7] = 1  # row 1, column 2 of 3 x 5
    seen = blurred(spike, 3, 5, 1.0).view(3, 5)
    assert seen.argmax() == 7 and torch.allclose(seen, seen.flip(0)) and torch.allclose(seen, seen.flip(1))


def authors_nag(positive, negative, scale, tau, alpha):
    """The lines of the authors' attention processors (attention_nag.py)."""
    guidance = positive * scale - negative * (scale - 1)
    norm_positive = torch.norm(positive, p=1, dim=-1, keepdim=True)
    norm_guidance = torch.norm(guidance, p=1, dim=-1, keepdim=True)
    ratio = norm_guidance / norm_positive
    guidance = guidance * torch.minimum(ratio, ratio.new_ones(1) * tau) / ratio
    return guidance * alpha + positive * (1 - alpha)


@pytest.mark.parametrize("scale", (1.0, 1.5, 5.0, 11.0))
def test_nag_of_the_authors_scale(scale):
    """Theirs is one more than ours."""
    method = NAG.from_authors_scale(scale, tau=1.7, mix=0.4)
    plus, minus = randn(2, 9, 6), randn(2, 9, 6, seed=1)
    ours = nag(plus, minus, torch.tensor(method.scale), method.tau, method.mix)
    torch.testing.assert_close(ours, authors_nag(plus, minus, scale, 1.7, 0.4))
    assert (scale == 1.0) == torch.allclose(ours, plus)


def test_places(net):
    assert [m for m in places(net, "", Attention, "attn1")] == [net.mid_block.attentions[0].transformer_blocks[0].attn1]
    assert len(places(net, "mid_block,up_blocks.0", Attention, "attn1")) == 3
    with pytest.raises(ValueError, match="no Attention under 'down_blocks.0' in UNet2DConditionModel; there are"):
        places(net, "down_blocks.0", Attention, "attn1")


@torch.no_grad()
def test_one_skipped_block_is_its_input(net):
    block = net.mid_block.attentions[0].transformer_blocks[0]
    with SD.patched(net, "slg:mid_block"):
        assert torch.equal(block(X, encoder_hidden_states=TEXT), X)


METHODS = [PAG(2.0), SLG(2.0), SEG(2.0), SEG(2.0, sigma=1.0), NASA(0.3, NEGATIVE[:1]), NAG(4.0, NEGATIVE[:1])]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("name", ("sd", "sdxl"))
@torch.no_grad()
def test_in_a_pipeline_and_in_our_loop(pipes, name, method):
    """Both call the network alike; a pipeline at guidance_scale 1 is enough, and a scale of 0 changes no bit."""
    if name == "sdxl" and hasattr(method, "negative"):
        method = type(method)(method.scale, randn(1, 7, 32))
    pipe = pipes[name]
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}

    def images() -> torch.Tensor:
        return pipe(["a red circle", "blue"], generator=torch.Generator().manual_seed(1), **options).images

    stock = images()
    with attach(pipe, method) as handle:
        ours = images()
    assert not torch.allclose(ours, stock, atol=1e-3) and torch.equal(images(), stock)
    assert handle.nfe == (4 if hasattr(method, "negative") else 8)
    with attach(pipe, type(method)(0.0)):
        assert torch.equal(images(), stock)
    latent = LatentModel(pipe)
    conds, levels = latent.encode(["a red circle", "blue"]), latent.levels(2)
    start = Path(latent.noise(2, torch.Generator().manual_seed(1)))
    *_, end = sample(euler, guided(latent.denoiser, method, conds), start, levels)
    error = float((end.x - ours).abs().max() / ours.abs().max())
    assert error < 1e-5, error


@torch.no_grad()
def test_scales_of_nasa_per_sample():
    pipe = sd()
    latent = LatentModel(pipe)
    x, at, conds = latent.noise(2, torch.Generator().manual_seed(1)), latent.levels(4)[0], latent.encode(["a", "b"])

    def first(scale) -> torch.Tensor:
        return guided(latent.denoiser, NASA(scale, NEGATIVE[:1]), conds)(Path(x), at).x0

    mixed = first(torch.tensor([0.2, 0.7]))
    torch.testing.assert_close(mixed[0], first(0.2)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], first(0.7)[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="NASA needs negative, hidden states"):
        guided(latent.denoiser, NASA(0.2), conds)(Path(x), at)


def test_a_network_without_what_a_patch_needs_is_refused(net):
    with pytest.raises(ValueError, match="wants negative_hidden_states"), SD.patched(net, "nasa"):
        run(net)
    with pytest.raises(ValueError, match="has no cross-attention"), SD.patched(torch.nn.Linear(2, 2), "nasa"):
        pass


# ------------------------------------------------------------------------------------------------ other networks
def test_a_compiled_network_is_patched_within(net):
    inner = net.mid_block.attentions[0].transformer_blocks[0]
    with SD.patched(torch.compile(net, backend="eager"), "pag:"):
        assert isinstance(inner.attn1.processor, Values)
    assert not isinstance(inner.attn1.processor, Values)


class Deep(torch.nn.Module):
    def __init__(self, depth: int, single: int = 0):
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(depth))
        self.single_transformer_blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(single))


@pytest.mark.parametrize(
    ("family", "network", "expected"),
    [
        ("sd3", Deep(24), ["transformer_blocks.7", "transformer_blocks.8", "transformer_blocks.9"]),
        ("sd3", Deep(4), ["transformer_blocks.2"]),
        ("flux", Deep(19, 38), ["single_transformer_blocks.9"]),
        ("qwen", Deep(60), ["transformer_blocks.30"]),
    ],
)
def test_default_places_of_transformers(family, network, expected):
    x, text = randn(1, 2), randn(1, 2, seed=1)
    with FAMILIES[family].patched(network, "slg:"):
        skipped = {name: block for name, block in blocks_of(network).items() if "forward" in vars(block)}
        assert list(skipped) == expected
        for block in skipped.values():
            given = block(hidden_states=x, encoder_hidden_states=text, temb=None)
            assert given[0] is text and given[1] is x
    assert not any("forward" in vars(block) for block in network.modules())
    with pytest.raises(ValueError, match="no block under 'transformer_blocks.99' in Deep; there are under: transform"):
        FAMILIES[family].patched(network, "slg:transformer_blocks.99").__enter__()


@torch.no_grad()
def test_identity_attention_of_sana_is_diffusers():
    attn = sana().transformer.transformer_blocks[0].attn1
    x = randn(2, 6, 16)
    theirs = PAGIdentitySanaLinearAttnProcessor2_0()(attn, torch.cat([x, x])).chunk(2)[1]
    torch.testing.assert_close(Values()(attn, x), theirs)
