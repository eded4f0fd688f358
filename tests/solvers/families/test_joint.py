"""PAG, SEG and NAG where text and picture attend together: against the whole scores, and against two passes."""

from functools import partial

import pytest
import torch
from diffusers.models.attention_processor import PAGJointAttnProcessor2_0
from torch import Tensor

from guidance.attach.handle import attach
from guidance.contract import Branch, Guided
from guidance.methods.catalogue import NAG, PAG, SEG
from solvers.families import joint, table
from solvers.families.joint import Call, Keys, Stream, Streams, attended, both, explicit, grid_of, merged, with_lse
from solvers.families.patches import nag
from solvers.families.streams import STREAMS, FluxJoint, SD3Joint, attending, first_rows, with_negative
from tests.guidance.methods.test_conformance import KINDS, OF_KIND, normal, pipe_of, run
from tests.support.dits import chroma, flux, flux2, qwen, sd3

G = torch.Generator().manual_seed(0)
B, HEADS, SIZE = 2, 3, 16
JOINT_KINDS = ("flux", "flux2", "sd3", "qwen", "chroma")


def stream(tokens: int, dtype=torch.float32) -> Stream:
    return Stream(*(torch.randn(B, tokens, HEADS, SIZE, generator=G).to(dtype) for _ in "qkv"))


def no_mask(rows, columns):
    return None


# ------------------------------------------------------------------------------------------------ one attention
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 2e-2)])
def test_the_split_is_two_passes(dtype, error):
    """Z+ and Z- from one attention of the picture to itself, by log-sum-exp, against the two whole softmaxes."""
    texts, picture = [stream(7, dtype), stream(4, dtype)], Keys(stream(20, dtype), slice(11, 31))
    keys = [Keys(texts[0], slice(0, 7)), Keys(texts[1], slice(7, 11))]
    with torch.no_grad():
        ours = both(picture, keys, no_mask)
        out, lse = with_lse(picture.stream.q, picture.stream)
    for z, text in zip(ours, keys, strict=True):
        assert float((z - attended(picture.stream.q, picture.place, [text, picture], no_mask)).abs().max()) < error
    exact, sums = explicit(picture.stream.q, picture.stream, None)
    assert float((out - exact).abs().max()) < error and float((lse - sums).abs().max()) < max(error, 1e-6)


def test_with_a_gradient_both_passes_are_run():
    """torch's kernels give no gradient of the log-sum-exp: there the split would give a wrong one."""
    q = torch.randn(B, 5, HEADS, SIZE, generator=G, requires_grad=True)
    picture, text = Keys(Stream(q, q, q), slice(3, 8)), Keys(stream(3), slice(0, 3))
    (ours,) = torch.autograd.grad(both(picture, [text], no_mask)[0].square().sum(), q)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, torch.cat([text.stream.k, q], 1)) / SIZE**0.5
    whole = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), torch.cat([text.stream.v, q], 1))
    torch.testing.assert_close(ours, torch.autograd.grad(whole.square().sum(), q)[0])


@pytest.mark.parametrize("kind", ("none", "bool", "float"))
def test_identity_of_the_picture_is_a_mask_over_the_whole_scores(kind):
    text, picture = stream(4), stream(9)
    whole = Stream(*(torch.cat(parts, dim=1) for parts in zip(text, picture, strict=True)))
    seen = torch.ones(B, 13, dtype=torch.bool)
    seen[:, 2] = False
    added = torch.zeros(B, 1, 13, 13)
    if kind == "bool":
        added = added.masked_fill(~seen[:, None, None], -torch.inf)
    elif kind == "float":  # as Chroma's: a product of ones and zeros that is added
        added = (seen[:, None, None] & seen[:, None, :, None]).float()
    apart = torch.zeros(13, 13)
    apart[4:, 4:] = torch.full((9, 9), -torch.inf).fill_diagonal_(0.0)
    scores = torch.einsum("bnhd,bmhd->bhnm", whole.q, whole.k) / SIZE**0.5 + added + apart
    expected = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), whole.v)
    mask = {"none": None, "bool": seen[:, None, None], "float": added}[kind]
    part = (lambda r, c: (mask if mask.shape[-2] == 1 else mask[..., r, :])[..., c]) if mask is not None else no_mask
    told, out = joint.identity_rule(Streams(picture, text, mask=part, places=(0, 4)), Call())
    torch.testing.assert_close(torch.cat([told, out], 1), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_identity_is_diffusers_own_for_sd3():
    attn = sd3().transformer.transformer_blocks[0].attn
    x, text = normal(2, 16, 16), normal(2, 5, 16, seed=1)
    theirs = [part.chunk(2)[1] for part in PAGJointAttnProcessor2_0()(attn, torch.cat([x, x]), torch.cat([text, text]))]
    ours = SD3Joint(joint.Attending(joint.identity_rule))(attn, x, text)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_blur_is_after_the_norm_and_before_the_rotation():
    """The mean of normed queries, which attends with a smaller norm: the rotation acts on what was blurred."""
    text, picture = stream(3), stream(6)
    turn = lambda x: x * torch.linspace(1, 2, x.shape[1])[None, :, None, None]  # noqa: E731
    streams = Streams(picture, text, turn, lambda x, start: x, places=(0, 3))
    told, out = joint.blurred_rule(streams, Call(shape=(B, 4, 4, 6)), float("inf"))
    mean = turn(picture.q.mean(1, keepdim=True).expand_as(picture.q))
    keys = [Keys(text, slice(0, 3)), Keys(picture._replace(k=turn(picture.k)), slice(3, 9))]
    torch.testing.assert_close(out, attended(mean, slice(3, 9), keys, no_mask))
    torch.testing.assert_close(told, attended(text.q, slice(0, 3), keys, no_mask))
    assert grid_of(6, (1, 4, 4, 6)) == (1, 2, 3) and grid_of(12, (1, 4, 2, 4, 6)) == (2, 2, 3)
    assert grid_of(24, (1, 4, 4, 6)) == (1, 4, 6) and grid_of(32, (1, 4, 8, 12), 32) == (1, 4, 6)
    with pytest.raises(ValueError, match="7 tokens are no grid of latents of 4 x 6: use pag"):
        grid_of(7, (1, 4, 4, 6))


def test_the_norm_of_negative_guidance_is_bounded():
    """||out||_1 <= (mix tau + 1 - mix) ||Z+||_1 = 1.375 ||Z+||_1 for every token."""
    plus, minus = torch.randn(2, 9, 48, generator=G), torch.randn(2, 9, 48, generator=G)
    out = nag(plus, minus, torch.full((2, 1, 1), 50.0), 2.5, 0.25)
    assert (out.abs().sum(-1) <= 1.375 * plus.abs().sum(-1) * (1 + 1e-6)).all()


def test_text_positions():
    rows = torch.arange(4.0)[:, None]
    assert torch.equal(first_rows(rows, 2, False), rows[:2]) and len(first_rows(rows, 6, True)) == 6
    with pytest.raises(ValueError, match="the negative prompt has 6 tokens and the prompt 4, which have positions"):
        first_rows(rows, 6, False)


# ------------------------------------------------------------------------------------------------ whole networks
def negative_of(kind: str, same: bool = False) -> Tensor:
    texts = KINDS[kind].texts
    if kind == "zimage":
        return texts["prompt_embeds" if same else "negative_prompt_embeds"][0][None].clone()
    return texts["prompt_embeds"] if same else texts["negative_prompt_embeds"].flip(1)


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:.*guides with its own scale")
@pytest.mark.parametrize("kind", (*JOINT_KINDS, "wan", "zimage"))
def test_negative_guidance_in_a_pipeline(kind):
    """Off where scale, share or the negative say so; else the picture changes, for one evaluation."""
    pipe = pipe_of(kind, OF_KIND[kind][0])
    with attach(pipe, NAG(0.0)):
        plain = run(kind, pipe, scale=1.0)
    made = {}
    methods = {
        "same": NAG(4.0, negative_of(kind, same=True)),
        "no share": NAG(4.0, negative_of(kind), mix=0.0),
        "on": NAG(4.0, negative_of(kind)),
        "given": NAG(4.0, negative_of(kind), *((3.5, 0.5) if kind == "wan" else (2.5, 0.25))),
    }
    for name, method in methods.items():
        with attach(pipe, method) as handle:
            made[name] = run(kind, pipe, scale=1.0)
        assert handle.branches == {"cond": 6}
    assert torch.equal(made["on"], made["given"])  # the family's own defaults
    scale = float(plain.abs().max())
    assert float((made["no share"] - plain).abs().max()) < 1e-4 * scale
    assert (
        float((made["same"] - plain)[0].abs().max()) < 1e-4 * scale
    )  # the other prompt has padding, the negative none
    assert float((made["on"] - plain).abs().max()) > 1e-3 * scale


@pytest.mark.sampled(3)
@torch.no_grad()
@pytest.mark.parametrize("make", (flux, flux2, sd3, qwen, chroma), ids=lambda make: make.__name__)
def test_the_network_is_that_of_two_texts(make):
    """Each layer by hand: the picture's Z- is the whole network's own attention to (negative, picture)."""
    pipe = make()
    family, network = table.family_of(pipe), pipe.transformer
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(positive: Tensor, other: Tensor, scale: Tensor) -> Tensor:
        seen.append((positive, other))
        return positive

    width = network.config.joint_attention_dim
    text, negative = normal(1, 6, width), normal(1, 4, width, seed=1)
    x = normal(1, family.latents.channels(pipe.vae), 8, 8, seed=2)
    more = {"pooled_projections": normal(1, network.config.pooled_projection_dim)} if make in (flux, sd3) else {}
    mask = lambda n: {"attention_mask": torch.ones(1, n)} if make is chroma else {}  # noqa: E731
    call = lambda cond: family.call(network, x, torch.tensor(500.0), cond)  # noqa: E731

    def first_layer(words: Tensor) -> Tensor:
        """The output of the first attention to a text, before its projection."""
        heard: list[Tensor] = []
        attention = next(m for n, m in network.named_modules() if n.endswith("blocks.0.attn"))
        hook = attention.to_out[0].register_forward_pre_hook(lambda module, args: heard.append(args[0]))
        call({"encoder_hidden_states": words, **more, **mask(words.shape[1])})
        hook.remove()
        return heard[0]

    rule = partial(joint.negative_rule, combine=keep)
    cond = {"encoder_hidden_states": text, "negative_hidden_states": negative, "negative_scale": torch.ones(1)}
    with attending(network, "", "attn", rule, STREAMS) as told:
        ours = call(with_negative(told.args[0], {**cond, **more, **mask(6)}, tuple(x.shape)))
    torch.testing.assert_close(ours, call({"encoder_hidden_states": text, **more, **mask(6)}), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0][0], first_layer(text), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0][1], first_layer(negative), rtol=1e-4, atol=1e-5)
    assert len(seen) == len([n for n, _ in network.named_modules() if n.endswith(".attn")])


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:.*guides with its own scale")
@pytest.mark.parametrize("method", (PAG(2.0), SEG(2.0), SEG(2.0, sigma=1.0)), ids=lambda m: f"{type(m).__name__}")
@pytest.mark.parametrize("kind", (*JOINT_KINDS, "wan", "zimage"))
def test_weak_attention_in_a_pipeline(kind, method):
    pipe = pipe_of(kind, OF_KIND[kind][0])
    with attach(pipe, NAG(0.0)):
        plain = run(kind, pipe)
    with attach(pipe, method) as handle:
        ours = run(kind, pipe)
    assert handle.branches == {"cond": 6, "weak": 6} and not torch.allclose(ours, plain, atol=1e-3)


class Stock:
    """The conditional prediction, with every attention read as streams."""

    space = "any"

    def guide(self, path, at):
        preds = yield {"cond": Branch("cond", patch="stock")}
        return Guided(preds["cond"])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", (*JOINT_KINDS, "wan", "zimage"))
def test_the_stock_rule_is_the_network_itself(kind, monkeypatch):
    """Each reading of an attention, with the rule that changes nothing."""
    pipe = pipe_of(kind, OF_KIND[kind][0])
    plain, name = run(kind, pipe, scale=1.0, steps=1), {"wan": "attn1", "zimage": "attention"}.get(kind, "attn")
    patches = {"stock": lambda network: attending(network, "", name, joint.stock, STREAMS)}
    monkeypatch.setitem(vars(table.family_of(pipe)), "patches", patches)
    with attach(pipe, Stock()):
        torch.testing.assert_close(run(kind, pipe, scale=1.0, steps=1), plain, rtol=1e-4, atol=1e-5)


def test_another_processor_and_fused_projections_are_refused():
    pipe = flux()
    pipe.transformer.transformer_blocks[0].attn.fuse_projections()
    with (
        pytest.raises(ValueError, match="projections are fused"),
        attending(pipe.transformer, "", "attn", joint.stock, STREAMS),
    ):
        pass
    assert not any(isinstance(m.processor, FluxJoint) for m in pipe.transformer.modules() if hasattr(m, "processor"))
    assert merged(torch.ones(1), torch.zeros(1), torch.zeros(1), torch.zeros(1)).item() == 0.5
