"""Named changes inside a network's forward pass, each a context: patch(network, *settings), settings as text.

What a context yields, if not None, prepares the conditions of each call: prepare(cond, shape of the latents) -> cond.

Modules are found by their names; the change is undone when the context ends, also by an exception. `UNET_PATCHES` are
those of the UNets of Stable Diffusion, by default in the middle block, as they are in a transformer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from solvers.errors import UserError

Patch = Callable[..., AbstractContextManager[Any]]  # (network, *settings)

MIDDLE = "mid_block"  # where the papers perturb a UNet


def places(network: nn.Module, layers: str, kind: type[nn.Module], ending: str = "") -> list[Any]:
    """The modules of a kind whose names start with one of `layers` (joined by commas) and end with `ending`.

    Raises ValueError for a start that finds none.
    """
    found = {name: m for name, m in network.named_modules() if isinstance(m, kind) and name.endswith(ending)}
    return _selected(network, layers or MIDDLE, found, kind.__name__)


def _selected(network: nn.Module, layers: str, found: Mapping[str, nn.Module], kind: str) -> list[Any]:
    starts = layers.split(",")
    for start in starts:
        if not any(_under(name, start) for name in found):
            known = ", ".join(dict.fromkeys(name.partition(".attentions")[0] for name in found)) or "none"
            raise UserError(f"no {kind} under {start!r} in {type(network).__name__}; there are under: {known}")
    return [module for name, module in found.items() if any(_under(name, start) for start in starts)]


def _under(name: str, start: str) -> bool:
    return name == start or name.startswith(f"{start}.")


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """owner.name is `value`, as an attribute of the instance."""
    before = vars(owner).get(name, owner)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if before is owner:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before


ORDINARY = (  # processors that compute plain attention, each in its way
    *("AttnProcessor", "AttnProcessor2_0", "AttnProcessorNPU", "XLAFlashAttnProcessor2_0", "XFormersAttnProcessor"),
    *("SlicedAttnProcessor", "FusedAttnProcessor2_0", "SanaLinearAttnProcessor2_0"),
)
IMAGE_PROMPTS = ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor")


def check_ordinary(attention: Any, known: Sequence[str] = ORDINARY) -> None:
    """Raises UserError if an attention has a processor whose work a patch in its place would leave out."""
    name = type(attention.processor).__name__
    if name not in known:
        raise UserError(
            f"the network attends by {name}, which this method would replace: call set_default_attn_processor() first,"
            " or use a method without a patch"
        )


# ------------------------------------------------------------------------------------------------ self-attention
@contextmanager
def identity_attention(network: nn.Module, layers: str = "") -> Iterator[None]:
    """PAG: each token attends to itself alone, so that the output is the projected value."""
    with ExitStack() as stack:
        for attention in places(network, layers, Attention, "attn1"):
            check_ordinary(attention)
            stack.enter_context(replaced(attention, "processor", Values()))
        yield


class Values:
    """An attention processor that gives each token its own value."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        return _projected(attn, attn.to_v(hidden_states))


@contextmanager
def skipped_blocks(network: nn.Module, layers: str = "") -> Iterator[None]:
    """SLG: transformer blocks that return their input."""
    with ExitStack() as stack:
        for block in places(network, layers, BasicTransformerBlock):
            stack.enter_context(replaced(block, "forward", _passed_on))
        yield


def _passed_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


@contextmanager
def blurred_queries(network: nn.Module, layers: str = "", sigma: str = "inf") -> Iterator[None]:
    """SEG: queries of self-attention, blurred over the grid of tokens; sigma = inf is their mean."""
    with ExitStack() as stack:
        for transformer in places(network, layers, Transformer2DModel):
            shape: list[tuple[int, int]] = [(0, 0)]
            look = transformer.register_forward_pre_hook(partial(_look, shape), with_kwargs=True)
            stack.callback(look.remove)
            for attention in places(transformer, "transformer_blocks", Attention, "attn1"):
                if type(attention.processor).__name__.startswith("Fused"):
                    raise UserError("SEG blurs queries, which fused projections do not tell: unfuse_qkv_projections()")
                hook = attention.to_q.register_forward_hook(partial(_blur, shape, float(sigma)))
                stack.callback(hook.remove)
        yield


def _look(shape: list[tuple[int, int]], module: Any, args: Any, kwargs: Any) -> None:
    """Writes down the rows and columns of the features (B, C, h, w) that the transformer is given."""
    shape[0] = (args[0] if args else kwargs["hidden_states"]).shape[-2:]


def _blur(shape: list[tuple[int, int]], sigma: float, module: Any, args: Any, queries: Tensor) -> Tensor:
    return blurred(queries, *shape[0], sigma)


def blurred(queries: Tensor, rows: int, columns: int, sigma: float) -> Tensor:
    """Queries (B, rows * columns, D) under a normalised Gaussian filter."""
    if sigma == float("inf"):
        return queries.mean(1, keepdim=True).expand_as(queries)
    grid = queries.transpose(1, 2).unflatten(2, (rows, columns))
    return _filtered(_filtered(grid, sigma, 2), sigma, 3).flatten(2).transpose(1, 2)


def _filtered(grid: Tensor, sigma: float, axis: int) -> Tensor:
    """Along one axis: each place is a weighted mean of all, weights exp(-distance^2 / (2 sigma^2))."""
    place = torch.arange(grid.shape[axis], dtype=torch.float32, device=grid.device)
    weights = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum(1, keepdim=True)).to(grid.dtype)
    return torch.tensordot(grid, weights, dims=([axis], [1])).movedim(-1, axis)


# ------------------------------------------------------------------------------------------------ cross-attention
Combine = Callable[[Tensor, Tensor, Tensor], Tensor]  # Z+ (B, N, D), Z- (B, N, D), scale (B, 1, 1)


def nasa(positive: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    """Z+ - scale Z-."""
    return positive - scale * negative


def nag(positive: Tensor, negative: Tensor, scale: Tensor, tau: float, mix: float) -> Tensor:
    """mix Z + (1 - mix) Z+, where Z = Z+ + scale (Z+ - Z-) is shrunk to ||Z||_1 <= tau ||Z+||_1 token by token."""
    away = positive + scale * (positive - negative)
    norm, bound = (z.abs().sum(-1, keepdim=True) for z in (away, positive))
    long = norm > tau * bound
    away = away * torch.where(long, tau * bound / torch.where(long, norm, 1.0), 1.0).to(away.dtype)
    return mix * away + (1 - mix) * positive


@contextmanager
def away_in_attention(network: nn.Module, combine: Combine) -> Iterator[None]:
    """Every cross-attention also attends to the tokens of the negative prompt, and `combine` makes one of both."""
    found = {name: m for name, m in network.named_modules() if isinstance(m, Attention)}
    if not any(name.endswith("attn2") for name in found):
        raise UserError(f"{type(network).__name__} has no cross-attention to steer away in")
    with ExitStack() as stack:
        for name, attention in found.items():
            if name.endswith("attn2"):
                check_ordinary(attention, ORDINARY + IMAGE_PROMPTS)
            kind = Away(combine, attention.processor) if name.endswith("attn2") else Deaf(attention.processor)
            stack.enter_context(replaced(attention, "processor", kind))
        yield


class Away:
    """An attention processor with a second text, `negative_hidden_states` (B, L, D).

    before: the layer's own processor. What an IP-Adapter's adds to the text's attention is added to what `combine`
    makes of both texts.
    """

    def __init__(self, combine: Combine, before: Callable[..., Tensor]):
        self.combine, self.before = combine, before

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor]],
        attention_mask: Tensor | None = None,
        negative_hidden_states: Tensor | None = None,
        negative_scale: Tensor | None = None,
        ip_adapter_masks: list[Tensor] | None = None,
    ) -> Tensor:
        if negative_hidden_states is None or negative_scale is None:
            raise UserError("this patch wants negative_hidden_states (B, L, D) and negative_scale (B,) as conditions")
        query = attn.to_q(hidden_states)
        images = isinstance(encoder_hidden_states, tuple)
        text = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
        positive = _attended(attn, query, text, attention_mask)
        negative = _attended(attn, query, negative_hidden_states.to(query.dtype), None)
        away = self.combine(positive, negative, negative_scale.to(query.dtype).view(-1, 1, 1))
        if images:
            asked = (hidden_states, encoder_hidden_states, attention_mask)
            away = away + _unprojected(attn, self.before, *asked, ip_adapter_masks=ip_adapter_masks) - positive
        return _projected(attn, away)


class Deaf:
    """The processor of self-attention, which has no use for the negative prompt."""

    def __init__(self, processor: Callable[..., Tensor]):
        self.processor = processor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        negative_hidden_states: Tensor | None = None,
        negative_scale: Tensor | None = None,
    ) -> Tensor:
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask)


def _attended(attn: Any, query: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(Q K^T / sqrt d) V, (B, N, D), as diffusers' own processor computes it."""
    if attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    q, k, v = (_heads(attn, part) for part in (query, attn.to_k(text), attn.to_v(text)))
    if mask is not None:
        batch, length = text.shape[:2]
        mask = attn.prepare_attention_mask(mask, length, batch).view(batch, attn.heads, -1, length)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def _unprojected(attn: Any, processor: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The attention's result, before the output projection."""
    projection = attn.to_out
    attn.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
    try:
        return processor(attn, *args, **kwargs) * attn.rescale_output_factor
    finally:
        attn.to_out = projection


def _projected(attn: Any, z: Tensor) -> Tensor:
    """Through the output projection."""
    for part in attn.to_out:
        z = part(z)
    return z / attn.rescale_output_factor


def _nag(network: nn.Module, tau: str = "", mix: str = "") -> AbstractContextManager[None]:
    return away_in_attention(network, partial(nag, tau=float(tau or USUAL[0]), mix=float(mix or USUAL[1])))


USUAL = (2.5, 0.25)  # tau and mix of NAG


UNET_PATCHES: dict[str, Patch] = {
    "pag": identity_attention,
    "slg": skipped_blocks,
    "seg": blurred_queries,
    "nasa": partial(away_in_attention, combine=nasa),
    "nag": _nag,
}


# ------------------------------------------------------------------------------------------------ transformers
STACKS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """A transformer's blocks by name, in the order in which they run."""
    stacks = {name: child for name, child in network.named_children() if name in STACKS}
    return {f"{name}.{i}": block for name, stack in stacks.items() for i, block in enumerate(stack.children())}


def selected_blocks(network: nn.Module, layers: str) -> list[Any]:
    """The blocks in `layers`, prefixes of their names joined by commas. Raises ValueError for one that finds none."""
    return _selected(network, layers, blocks_of(network), "block")


def middle_of(network: nn.Module) -> str:
    names = list(blocks_of(network))
    return names[len(names) // 2]


@contextmanager
def skipped_depth(
    network: nn.Module, layers: str = "", *, pass_on: Callable[..., Any], default: str = ""
) -> Iterator[None]:
    """SLG of a transformer: blocks that return their input. `default`: those to skip, if the network is deep enough."""
    found = blocks_of(network)
    usual = default if found.keys() >= set(default.split(",")) else middle_of(network)
    with ExitStack() as stack:
        for block in _selected(network, layers or usual, found, "block"):
            stack.enter_context(replaced(block, "forward", pass_on))
        yield


def _both_passed_on(
    hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    """A block of one stream (FLUX.2's) is given both together, and returns them so."""
    return hidden_states if encoder_hidden_states is None else (encoder_hidden_states, hidden_states)


def _identity_in_depth(network: nn.Module, layers: str = "") -> AbstractContextManager[None]:
    return identity_attention(network, layers or middle_of(network))


SKIPPED: dict[str, Patch] = {"slg": partial(skipped_depth, pass_on=_passed_on)}
SKIPPED_JOINT: dict[str, Patch] = {"slg": partial(skipped_depth, pass_on=_both_passed_on)}  # image and text run along
SKIPPED_SD3: dict[str, Patch] = {
    "slg": partial(
        skipped_depth,
        pass_on=_both_passed_on,
        default="transformer_blocks.7,transformer_blocks.8,transformer_blocks.9",  # of SD3.5
    )
}
SELF_ATTENTION_PATCHES: dict[str, Patch] = {"pag": _identity_in_depth, **SKIPPED}
