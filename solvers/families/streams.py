"""The attention of each family of transformers as `Streams`, and the patches that act there.

`STREAMS` has one class for each processor of diffusers: it projects, normalises and puts out as that processor does,
and leaves what is between to a rule of `joint`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor, nn

from solvers.errors import UserError
from solvers.families.joint import (
    PADDED,
    Attending,
    Call,
    Mask,
    Rule,
    Stream,
    Streams,
    blurred_rule,
    cross_negative_rule,
    identity_rule,
    negative_rule,
)
from solvers.families.patches import (
    USUAL,
    Patch,
    blocks_of,
    check_ordinary,
    middle_of,
    nag,
    replaced,
    selected_blocks,
)

LACKS_NEGATIVE = "this patch wants negative_hidden_states (B, L, D) and negative_scale (B,) as conditions"
NEGATIVE = ("negative_hidden_states", "negative_scale")  # of NAG, which its patch takes out of the conditions
MASKS = ("attention_mask", "encoder_hidden_states_mask", "encoder_attention_mask")


# ------------------------------------------------------------------------------------------------ reading an attention
class Joint:
    """A processor that leaves its attention to a rule."""

    def __init__(self, attending: Attending):
        self.attending = attending


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def stream_of(attn: Any, x: Tensor, added: bool = False) -> Stream:
    """Queries, keys and values of tokens (B, n, C); `added`: by the projections of the text's stream."""
    if added:
        parts, norms = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
    else:
        parts, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
    q, k, v = (split(part(x), attn.heads) for part in parts)
    q, k = (x if norm is None else norm(x) for norm, x in zip(norms, (q, k), strict=True))
    return Stream(q, k, v)


def masked(mask: Tensor | None) -> Mask:
    """Parts of a mask (B, 1, 1 or S, S) over the whole sequence."""
    if mask is None:
        return lambda rows, columns: None
    return lambda rows, columns: (mask if mask.shape[-2] == 1 else mask[..., rows, :])[..., columns]


def first_rows(rows: Tensor, count: int, still: bool) -> Tensor:
    """The positions of a text's first tokens; where all are the same (`still`), of any number."""
    if count <= len(rows):
        return rows[:count]
    if not still:
        raise UserError(
            f"the negative prompt has {count} tokens and the prompt {len(rows)}, which have positions: shorten it, or"
            " encode both to the same length"
        )
    return rows[:1].expand(count, *rows.shape[1:])


def turn(pair: tuple[Tensor, Tensor], rows: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return apply_rotary_emb(x, (rows(pair[0]), rows(pair[1])), sequence_dim=1)


def out_of(attn: Any, x: Tensor) -> Tensor:
    for part in attn.to_out:
        x = part(x)
    return x


def flat(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.flatten(2)


class FluxJoint(Joint):
    """FLUX.1, FLUX.2 and Chroma: text first; in their single-stream blocks both come as one sequence."""

    still = True  # the text has no positions

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        if encoder_hidden_states is None:
            both = self.outputs(stream_of(attn, hidden_states), None, attention_mask, image_rotary_emb)
            return torch.cat(both, dim=1)
        streams = stream_of(attn, hidden_states), stream_of(attn, encoder_hidden_states, added=True)
        text, picture = self.outputs(*streams, attention_mask, image_rotary_emb)
        return out_of(attn, picture), attn.to_add_out(text)

    def outputs(
        self, stream: Stream, text: Stream | None, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Of the text's and of the picture's tokens, (B, n, C). `text` None: `stream` begins with it."""
        call = self.attending.call
        if text is None:
            length = call.text + call.negative
            text, stream = stream.part(slice(length)), stream.part(slice(length, None))
        length, count = text.q.shape[1], stream.q.shape[1]
        rotate_picture, rotate_text = (lambda x: x), (lambda x, start: x)
        if rotary is not None:
            rotate_picture = partial(turn, rotary, lambda rows: rows[-count:])
            rotate_text = partial(self.turn_text, rotary, count)
        streams = Streams(stream, text, rotate_picture, rotate_text, masked(mask), (0, length))
        told, seen = self.attending(streams)
        return flat(told), flat(seen)

    def turn_text(self, rotary: tuple[Tensor, Tensor], pictures: int, x: Tensor, start: int) -> Tensor:
        return turn(rotary, lambda rows: first_rows(rows[:-pictures], x.shape[1], self.still), x)


class Flux2Joint(FluxJoint):
    """FLUX.2's text has positions."""

    still = False


class Flux2Parallel(Flux2Joint):
    """Its single-stream blocks, where one projection serves attention and MLP."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        inner, wide = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
        qkv, mlp = attn.to_qkv_mlp_proj(hidden_states).split([inner, wide], dim=-1)
        q, k, v = (split(part, attn.heads) for part in qkv.chunk(3, dim=-1))
        stream = Stream(attn.norm_q(q), attn.norm_k(k), v)
        both = self.outputs(stream, None, attention_mask, image_rotary_emb)
        return attn.to_out(torch.cat([torch.cat(both, dim=1), attn.mlp_act_fn(mlp)], dim=-1))


class SD3Joint(Joint):
    """Stable Diffusion 3: the picture first, no rotation; the last block puts no text out."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        picture, text = stream_of(attn, hidden_states), stream_of(attn, encoder_hidden_states, added=True)
        told, seen = self.attending(Streams(picture, text, places=(hidden_states.shape[1], 0)))
        words = flat(told)
        return out_of(attn, flat(seen)), words if attn.context_pre_only else attn.to_add_out(words)


class QwenJoint(Joint):
    """Qwen-Image: text first, with a mask over the text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        picture, text = stream_of(attn, hidden_states), stream_of(attn, encoder_hidden_states, added=True)
        mask = None
        if encoder_hidden_states_mask is not None:
            whole = encoder_hidden_states_mask.new_ones(len(hidden_states), hidden_states.shape[1])
            mask = torch.cat([encoder_hidden_states_mask, whole], dim=1)[:, None, None, :].bool()
        rotate_picture, rotate_text = (lambda x: x), (lambda x, start: x)
        if image_rotary_emb is not None:
            seen_rows, told_rows = image_rotary_emb
            rotate_picture = lambda x: apply_rotary_emb_qwen(x, seen_rows, use_real=False)  # noqa: E731
            rotate_text = lambda x, start: apply_rotary_emb_qwen(x, told_rows[: x.shape[1]], use_real=False)  # noqa: E731
        places = (0, text.q.shape[1])
        told, seen = self.attending(Streams(picture, text, rotate_picture, rotate_text, masked(mask), places))
        return out_of(attn, flat(seen)), attn.to_add_out(flat(told))


class WanSelf(Joint):
    """Wan's attention of a film to itself."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert rotary_emb is not None
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        stream = Stream(*(split(part, attn.heads) for part in (q, k, v)))
        _, seen = self.attending(Streams(stream, rotate_picture=partial(turn_wan, rotary_emb)))
        return out_of(attn, flat(seen))


def turn_wan(pair: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """Pairs of neighbours, with the angles of each pair at its first place in cos and at its second in sin."""
    one, two = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = pair[0][..., 0::2], pair[1][..., 1::2]
    return torch.stack([one * cos - two * sin, one * sin + two * cos], dim=-1).flatten(-2).type_as(x)


class WanText(Joint):
    """Wan's attention of a film to the text, whose tokens are the prompt's and then the negative's."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        if attn.add_k_proj is not None:
            raise UserError("NAG has no rule for Wan's image prompts: use another method")
        q = split(attn.norm_q(attn.to_q(hidden_states)), attn.heads)
        k, v = attn.norm_k(attn.to_k(encoder_hidden_states)), attn.to_v(encoder_hidden_states)
        keys = Stream(*(split(part, attn.heads) for part in (k, k, v)))
        return out_of(attn, flat(self.attending(Streams(Stream(q, q, q), keys))[1]))


class ZImageJoint(Joint):
    """Z-Image: one sequence, the picture first, then the prompt, then a negative one; each has rotations of its own."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        assert freqs_cis is not None
        both, seen = stream_of(attn, hidden_states), padded_count(self.attending.call.shape)
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        streams = Streams(
            *(both.part(slice(seen)), both.part(slice(seen, None))),
            lambda x: turn_complex(x, freqs_cis[:, :seen]),
            lambda x, start: turn_complex(x, freqs_cis[:, seen + start : seen + start + x.shape[1]]),
            *(masked(mask), (seen, 0)),
        )
        text, picture = self.attending(streams)
        return out_of(attn, torch.cat([flat(picture), flat(text)], dim=1))


def padded_count(shape: tuple[int, ...]) -> int:
    """Tokens of a picture of latents (B, C, h, w), patches of 2 x 2, with the learned ones that fill it up."""
    count = (shape[-2] // 2) * (shape[-1] // 2)
    return count + -count % PADDED


def turn_complex(x: Tensor, angles: Tensor) -> Tensor:
    """x (B, n, heads, D) by complex numbers (B, n, D / 2)."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * angles.unsqueeze(2)).flatten(3).type_as(x)


STREAMS: dict[str, type[Joint]] = {
    "FluxAttnProcessor": FluxJoint,
    "Flux2AttnProcessor": Flux2Joint,
    "Flux2ParallelSelfAttnProcessor": Flux2Parallel,
    "JointAttnProcessor2_0": SD3Joint,
    "QwenDoubleStreamAttnProcessor2_0": QwenJoint,
    "WanAttnProcessor": WanSelf,
    "ZSingleStreamAttnProcessor": ZImageJoint,
}


# ------------------------------------------------------------------------------------------------ patches
@contextmanager
def attending(
    network: nn.Module, layers: str, name: str, rule: Rule, kinds: Mapping[str, type[Joint]]
) -> Iterator[Any]:
    """Inside, the attentions `name` of the blocks in `layers` follow a rule. Yields what prepares the conditions."""
    shared = Attending(rule)
    with ExitStack() as stack:
        for block in selected_blocks(network, layers or ",".join(blocks_of(network))):
            attention = dict(block.named_children())[name]
            check_ordinary(attention, tuple(kinds))
            check_unfused(attention)
            stack.enter_context(replaced(attention, "processor", kinds[type(attention.processor).__name__](shared)))
        yield partial(_told, shared.call)


def check_unfused(attention: Any) -> None:
    if attention.fused_projections:
        raise UserError("the attention's projections are fused, which this method cannot read: unfuse them")


def _told(call: Call, cond: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """The conditions as they are, of which the call is told."""
    call.shape, call.text, call.negative = shape, cond["encoder_hidden_states"].shape[1], 0
    return dict(cond)


def with_negative(call: Call, cond: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """The conditions with the tokens of the negative prompt after those of the prompt, and in the mask."""
    if not cond.keys() >= set(NEGATIVE):
        raise UserError(LACKS_NEGATIVE)
    rest = {name: value for name, value in cond.items() if name not in NEGATIVE}
    text = cond["encoder_hidden_states"]
    negative = cond["negative_hidden_states"].to(text)
    call.shape, call.text, call.negative = shape, text.shape[1], negative.shape[1]
    call.scale = cond["negative_scale"]
    masks = {name: _longer(cond[name], call.text, call.negative) for name in MASKS if cond.get(name) is not None}
    return {**rest, "encoder_hidden_states": torch.cat([text, negative], dim=1), **masks}


def _longer(mask: Tensor, text: int, negative: int) -> Tensor:
    """A mask (B, text and whatever follows) with the tokens of a negative prompt in it."""
    return torch.cat([mask[:, :text], mask.new_ones(len(mask), negative), mask[:, text:]], dim=1)


def identity_picture(network: nn.Module, layers: str = "", *, name: str = "attn") -> Any:
    """PAG: each token of the picture sees, of the picture, itself alone."""
    return attending(network, layers or middle_of(network), name, identity_rule, STREAMS)


def blurred_picture(
    network: nn.Module, layers: str = "", sigma: str = "inf", *, name: str = "attn", padded: int = 1
) -> Any:
    """SEG: the picture's queries are blurred over its grid."""
    rule = partial(blurred_rule, sigma=float(sigma), padded=padded)
    return attending(network, layers or middle_of(network), name, rule, STREAMS)


@contextmanager
def away(
    network: nn.Module,
    tau: str = "",
    mix: str = "",
    *,
    name: str = "attn",
    kinds: Mapping[str, type[Joint]] = STREAMS,
    rule: Callable[..., Any] = negative_rule,
    usual: tuple[float, float] = USUAL,
) -> Iterator[Any]:
    """NAG in every block. usual: (tau, mix) if the method leaves them out."""
    combine = partial(nag, tau=float(tau or usual[0]), mix=float(mix or usual[1]))
    with attending(network, "", name, partial(rule, combine=combine), kinds) as told:
        yield partial(with_negative, *told.args)


@contextmanager
def away_zimage(network: Any, tau: str = "", mix: str = "") -> Iterator[Any]:
    """NAG in Z-Image, whose text is refined by itself: the negative prompt is so, too, and follows in the sequence."""
    combine = partial(nag, tau=float(tau or USUAL[0]), mix=float(mix or USUAL[1]))
    original = network._build_unified_sequence
    with attending(network, "", "attention", partial(negative_rule, combine=combine), STREAMS) as told:
        call = told.args[0]
        with replaced(network, "_build_unified_sequence", partial(_with_refined, network, call, original)):
            yield partial(_with_apart, call)


def _with_apart(call: Call, cond: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    if not cond.keys() >= set(NEGATIVE):
        raise UserError(LACKS_NEGATIVE)
    call.shape, call.scale, call.apart = shape, cond["negative_scale"], cond["negative_hidden_states"]
    return {name: value for name, value in cond.items() if name not in NEGATIVE}


def _with_refined(network: Any, call: Call, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The network's sequence (B, S, C), with the negative prompt's tokens at its end, and their rotations and mask."""
    sequence, angles, mask, noisy = original(*args, **kwargs)
    assert call.apart is not None
    tokens, turns = refined(network, call.apart.to(sequence))
    call.text, call.negative = sequence.shape[1] - padded_count(call.shape), tokens.shape[1]
    longer = None if mask is None else torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1)
    return torch.cat([sequence, tokens], dim=1), torch.cat([angles, turns], dim=1), longer, noisy


def refined(network: Any, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Texts (B, L, D) as the network embeds and refines them, (B, n, C), and their rotations (B, n, D / 2)."""
    length, device = texts.shape[1], texts.device
    size = (length + -length % PADDED, 1, 1)
    rows = [network._pad_with_ids(text, size, (1, 0, 0), device)[:3] for text in texts]
    words, places, padding = (list(part) for part in zip(*rows, strict=True))
    embedded = list(network.cap_embedder(torch.stack(words)))
    made, turns, mask, *_ = network._prepare_sequence(embedded, places, padding, network.cap_pad_token, None, device)
    for layer in network.context_refiner:
        made = layer(made, mask, turns)
    return made, turns


OF_ZIMAGE: dict[str, Patch] = {
    "pag": partial(identity_picture, name="attention"),
    "seg": partial(blurred_picture, name="attention", padded=PADDED),
    "nag": away_zimage,
}
JOINT: dict[str, Patch] = {"pag": identity_picture, "seg": blurred_picture, "nag": away}
OF_WAN: dict[str, Patch] = {
    "pag": partial(identity_picture, name="attn1"),
    "seg": partial(blurred_picture, name="attn1"),
    "nag": partial(away, name="attn2", kinds={"WanAttnProcessor": WanText}, rule=cross_negative_rule, usual=(3.5, 0.5)),
}
