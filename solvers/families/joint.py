"""What guidance does inside the attention of transformers where text and picture attend together: PAG, SEG and NAG.

An attention of such a network is read as `Streams`: queries, keys and values of the text's tokens and of the picture's,
normalised by the network and not yet rotated by their positions. A rule makes the outputs of both streams from them.
Where a picture attends to itself alone (Wan), the text stream is None.

The softmax over the tokens of several streams splits exactly by the logarithm of each stream's sum, log-sum-exp:

    attention(q; A and B) = w attention(q; A) + (1 - w) attention(q; B),    w = sigmoid(lse_A(q) - lse_B(q)).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from solvers.errors import UserError
from solvers.families.patches import Combine, blurred


@dataclass
class Call:
    """What a rule has to know of one call of the network, which only the call's arguments tell."""

    text: int = 0  # tokens of the prompt
    negative: int = 0  # and of the negative prompt, which follow it
    apart: Tensor | None = None  # the negative prompt (B, L, D), if its tokens do not simply follow
    scale: Tensor | None = None  # (B,)
    shape: tuple[int, ...] = ()  # of the latents, (B, C, ..., h, w)


class Stream(NamedTuple):
    """The tokens of one stream, each (B, n, heads, D)."""

    q: Tensor
    k: Tensor
    v: Tensor

    def part(self, tokens: slice) -> "Stream":
        return Stream(*(x[:, tokens] for x in self))


Rotate = Callable[[Tensor], Tensor]  # of a picture's queries or keys (B, n, heads, D)
RotateText = Callable[[Tensor, int], Tensor]  # of a text's, which begins at that token of the stream
Mask = Callable[[slice, slice], Tensor | None]  # of the rows and the columns of one stream and another


@dataclass(frozen=True)
class Streams:
    """Text and picture of one attention. `mask(rows, columns)` is what is added to the scores (or which of them count),
    for slices of the whole sequence, in which the text is at `places[0]` and the picture at `places[1]`."""

    picture: Stream
    text: Stream | None = None
    rotate_picture: Rotate = lambda x: x
    rotate_text: RotateText = lambda x, start: x
    mask: Mask = lambda rows, columns: None
    places: tuple[int, int] = (0, 0)  # where the text's and the picture's tokens begin

    def rotated(self) -> "Streams":
        """With positions; the text as a whole."""
        return Streams(
            turned(self.picture, self.rotate_picture),
            None if self.text is None else turned(self.text, lambda x: self.rotate_text(x, 0)),
            mask=self.mask,
            places=self.places,
        )


Outputs = tuple[Tensor | None, Tensor]  # of the text's and of the picture's tokens, (B, n, heads, D)
Rule = Callable[[Streams, Call], Outputs]


def turned(stream: Stream, rotate: Rotate) -> Stream:
    return Stream(rotate(stream.q), rotate(stream.k), stream.v)


class Keys(NamedTuple):
    """Tokens that are attended to, and where they lie in the sequence."""

    stream: Stream
    place: slice


def within(start: int, stream: Stream) -> slice:
    """The place of a stream that begins there."""
    return slice(start, start + stream.q.shape[1])


def attended(q: Tensor, rows: slice, to: Sequence[Keys], mask: Mask) -> Tensor:
    """Attention of queries (B, n, heads, D) to the tokens of several streams together."""
    k, v = torch.cat([part.stream.k for part in to], dim=1), torch.cat([part.stream.v for part in to], dim=1)
    masks = [m for m in (mask(rows, part.place) for part in to) if m is not None]
    joined = torch.cat(masks, dim=-1) if masks else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=joined).transpose(1, 2)


def stock(streams: Streams, call: Call) -> Outputs:
    """The attention as the network itself has it."""
    s = streams.rotated()
    everything = keys_of(s)
    out = [attended(part.stream.q, part.place, everything, s.mask) for part in everything]
    return (None, out[0]) if s.text is None else (out[0], out[1])


def keys_of(streams: Streams) -> list[Keys]:
    """Text and picture."""
    text = [] if streams.text is None else [Keys(streams.text, within(streams.places[0], streams.text))]
    return [*text, Keys(streams.picture, within(streams.places[1], streams.picture))]


# ------------------------------------------------------------------------------------------------ PAG
def identity_rule(streams: Streams, call: Call) -> Outputs:
    """Each token of the picture sees of the picture itself alone, and all of the text; the text sees everything.

    out = w A_text + (1 - w) v,    w = sigmoid(lse_text - q k / sqrt D),    without a score between two picture tokens.
    """
    if streams.text is None:
        return None, streams.picture.v
    s = streams.rotated()
    assert s.text is not None
    text, picture = keys_of(s)
    seen, lse = explicit(s.picture.q, s.text, s.mask(picture.place, text.place))
    own = (s.picture.q.float() * s.picture.k.float()).sum(-1) / s.picture.q.shape[-1] ** 0.5
    own = own + diagonal(s.mask(picture.place, picture.place), own)
    out = merged(seen, lse, s.picture.v, own)
    return attended(s.text.q, text.place, [text, picture], s.mask), out


def diagonal(mask: Tensor | None, like: Tensor) -> Tensor | float:
    """What a mask (B, 1, 1 or n, n) adds to each token's own score (B, n, 1); a picture's tokens are all valid."""
    if mask is None or mask.dtype == torch.bool:
        return 0.0
    own = mask[..., 0, :] if mask.shape[-2] == 1 else mask.diagonal(dim1=-2, dim2=-1)
    return own.transpose(1, 2).to(like.dtype)


def explicit(q: Tensor, to: Stream, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(attention (B, n, heads, D), log-sum-exp (B, n, heads)) by the scores themselves, in float32 or better."""
    precise = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.to(precise), to.k.to(precise)) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), to.v.to(precise))
    return out.to(q.dtype), lse.transpose(1, 2)


def merged(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> Tensor:
    """Attention to the tokens of a and of b together."""
    w = torch.sigmoid(lse_a - lse_b)[..., None]
    return (w * a + (1 - w) * b).to(a.dtype)


# ------------------------------------------------------------------------------------------------ SEG
def blurred_rule(streams: Streams, call: Call, sigma: float, padded: int = 1) -> Outputs:
    """The picture's queries are blurred over its grid, after the network's norm and before the rotation by positions,
    which a blur would average away. Frames of a film are blurred one by one. padded: the multiple to which a network
    fills the picture's tokens up, whose last ones are left as they are.
    """
    q, (frames, rows, columns) = streams.picture.q, grid_of(streams.picture.q.shape[1], call.shape, padded)
    (batch, _, heads, size), count = q.shape, frames * rows * columns
    films = q[:, :count].flatten(2).reshape(-1, rows * columns, heads * size)
    smooth = blurred(films, rows, columns, sigma).reshape(batch, count, heads, size)
    smooth = torch.cat([smooth, q[:, count:]], dim=1)
    soft = Streams(
        *(streams.picture._replace(q=smooth), streams.text, streams.rotate_picture, streams.rotate_text),
        *(streams.mask, streams.places),
    )
    return stock(soft, call)


PADDED = 32  # of Z-Image


def grid_of(tokens: int, shape: Sequence[int], padded: int = 1) -> tuple[int, int, int]:
    """Frames, rows and columns of the tokens of latents (B, C, h, w) or (B, C, frames, h, w): 1 x 1 or 2 x 2 places."""
    height, width = shape[-2:]
    frames = shape[2] if len(shape) == 5 else 1
    grids = [(frames, height // patch, width // patch) for patch in (1, 2)]
    found = [grid for grid in grids if 0 <= tokens - prod(grid) < padded]
    if not found:
        raise UserError(
            f"SEG blurs over the grid of the picture's tokens, and {tokens} tokens are no grid of latents of"
            f" {height} x {width}: use pag"
        )
    return found[0]


# ------------------------------------------------------------------------------------------------ NAG
def negative_rule(streams: Streams, call: Call, combine: Combine) -> Outputs:
    """The text stream holds the prompt's tokens and then the negative prompt's, each of which sees its own and the
    picture's. The picture's tokens see (prompt, picture), Z+, and (negative, picture), Z-; `combine` makes one of both.

    The picture's attention to itself is part of both, and is computed once where `can_split`.
    """
    assert streams.text is not None and call.scale is not None
    begin, picture = streams.places[0], turned(streams.picture, streams.rotate_picture)
    itself = Keys(picture, within(streams.places[1], picture))
    texts = [slice(0, call.text), slice(call.text, call.text + call.negative)]
    two = [_turned_part(streams, part) for part in texts]
    keys = [Keys(s, slice(begin + part.start, begin + part.stop)) for s, part in zip(two, texts, strict=True)]
    told = [attended(part.stream.q, part.place, [part, itself], streams.mask) for part in keys]
    plus, minus = both(itself, keys, streams.mask)
    scale = call.scale.to(plus.dtype).view(-1, 1, 1)
    heads = plus.shape[2:]
    return torch.cat(told, dim=1), combine(plus.flatten(2), minus.flatten(2), scale).unflatten(2, heads)


def cross_negative_rule(streams: Streams, call: Call, combine: Combine) -> Outputs:
    """`negative_rule` of a picture that attends to the text alone."""
    assert streams.text is not None and call.scale is not None
    everywhere = slice(None)
    texts = (streams.text.part(slice(call.text)), streams.text.part(slice(call.text, None)))
    plus, minus = (attended(streams.picture.q, everywhere, [Keys(text, everywhere)], streams.mask) for text in texts)
    scale = call.scale.to(plus.dtype).view(-1, 1, 1)
    return None, combine(plus.flatten(2), minus.flatten(2), scale).unflatten(2, plus.shape[2:])


def _turned_part(streams: Streams, tokens: slice) -> Stream:
    assert streams.text is not None
    return turned(streams.text.part(tokens), lambda x: streams.rotate_text(x, tokens.start))


def both(itself: Keys, texts: Sequence[Keys], mask: Mask) -> list[Tensor]:
    """The picture's attention to each text and itself."""
    q, place = itself.stream.q, itself.place
    if mask(place, place) is not None or not can_split(itself.stream):
        return [attended(q, place, [text, itself], mask) for text in texts]
    own, own_lse = with_lse(q, itself.stream)
    return [merged(*with_lse(q, text.stream), own, own_lse) for text in texts]


def can_split(stream: Stream) -> bool:
    """Whether there is a kernel that tells the log-sum-exp: on a CPU and on CUDA, and it has no gradient."""
    return not torch.is_grad_enabled() and stream.q.device.type in ("cpu", "cuda")


def with_lse(q: Tensor, to: Stream) -> tuple[Tensor, Tensor]:
    """(attention (B, n, heads, D), log-sum-exp (B, n, heads)), of the kernels that torch's own attention runs."""
    parts = [x.transpose(1, 2) for x in (q, to.k, to.v)]
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(*parts, None, True)[:2]
    return out.transpose(1, 2), lse[..., : q.shape[1]].transpose(1, 2)


@dataclass
class Attending:
    """A rule and what its call told, which all attentions of a patched network share."""

    rule: Rule
    call: Call = field(default_factory=Call)

    def __call__(self, streams: Streams) -> Outputs:
        return self.rule(streams, self.call)
