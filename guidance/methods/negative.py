"""Negative prompts: perpendicular to the positive one (Perp-Neg), and inside cross-attention (NASA, NAG)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guidance.contract import Branch, Guide, Guided, Request
from guidance.methods.classifier import given
from guidance.methods.scales import Neutral, Scale, Scaled, Usual, along_direction, rows_for, strength
from solvers.denoiser import Cond, Path
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.ranges import Positive, Share


@dataclass(frozen=True)
class PerpNeg(Scaled):
    """CFG with negatives that lose what they share with the prompt (https://arxiv.org/abs/2304.04968):

    out = u + scale (d - sum_j weight_j perp(n_j - u, d)),    d = c - u,    perp(a, d) = a - <a, d> / ||d||^2 d.

    `uncond` must be the empty prompt. negatives: named conditions of `guided`, or tensors of their own (on a pipeline),
    with one row or one per sample. weights: one each, 1 by default; a negative weight makes a further positive.
    """

    scale: Scale = 7.5
    negatives: tuple[str | Cond, ...] = ("negative",)
    weights: tuple[Scale, ...] = ()
    space = "any"
    neutral = Neutral({"negatives": ()}, "cfg")

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond"), **self._branches(path.x)}
        u, d = preds["uncond"], preds["cond"] - preds["uncond"]
        direction = d
        for i, weight in enumerate(weights_of(self.weights, len(self.negatives), 1.0, "PerpNeg")):
            n = preds[f"negative{i}"] - u
            direction = direction - strength(weight, at, path.x) * (n - along_direction(n, d))
        return Guided(u + strength(self.scale, at, path.x) * direction)

    def _branches(self, x: Tensor) -> Request:
        return {f"negative{i}": Branch(rows_for(cond, x)) for i, cond in enumerate(self.negatives)}


def weights_of(weights: tuple[Scale, ...], count: int, default: Scale, owner: str) -> tuple[Scale, ...]:
    """`count` weights: as given, or the default for each if none is."""
    if weights and len(weights) != count:
        raise UserError(f"{owner} has {len(weights)} weights for {count} conditions: give one each")
    return weights or (default,) * count


@dataclass(frozen=True)
class _InAttention(Scaled):
    """The common part of NASA and NAG: one conditional evaluation, whose cross-attention also sees the negative prompt.

    negative: hidden states of the negative prompt, (1, L, D) or (B, L, D).
    """

    def _asked(self, scale: Scale, negative: Tensor | str | None, patch: str, path: Path, at: Noise) -> Request:
        s = strength(scale, at, path.x)
        if isinstance(s, int | float) and s == 0:
            return {"cond": Branch("cond")}
        x = path.x
        tokens = given(type(self).__name__, "negative", negative, "hidden states (B, L, D) of a negative prompt")
        scales = torch.as_tensor(s, device=x.device).to(x.dtype).view(-1).expand(len(x))
        tensors = {"negative_hidden_states": tokens.to(x.device), "negative_scale": scales}
        return {"cond": Branch(rows_for(tensors, x), patch=patch)}


@dataclass(frozen=True)
class NASA(_InAttention):
    """Negative-away steer attention, for models of few steps (https://arxiv.org/abs/2412.02687): a negative prompt in
    cross-attention,

    Z = softmax(Q K_c^T / sqrt d) V_c - scale softmax(Q K_n^T / sqrt d) V_n,    before the output projection.

    One evaluation a step. The paper's scales: 0.1 for models made from SD 1.5, 0.2 from SD 2.1, 0.5 from PixArt-alpha.
    """

    scale: Scale = 0.1
    negative: Tensor | str | None = None
    space = "any"
    usual = Usual(0, 1, "0.1 to 0.5 in the paper; it is not CFG's scale")
    neutral = Neutral({"scale": 0.0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield self._asked(self.scale, self.negative, "nasa", path, at)
        return Guided(preds["cond"])


@dataclass(frozen=True)
class NAG(_InAttention):
    """Normalised attention guidance (https://arxiv.org/abs/2505.21179): NASA's features, kept in bounds,

    Z = Z_c + scale (Z_c - Z_n),  shrunk per token to ||Z||_1 <= tau ||Z_c||_1,  out = mix Z + (1 - mix) Z_c.

    One evaluation a step. The authors' code writes s Z_c - (s - 1) Z_n, so its scale s is our s - 1, see
    `from_authors_scale`; tau and mix of None are its own for the family: 3.5 and 0.5 for Wan, else 2.5 and 0.25.

    In transformers where text and picture attend together, Z_c is the picture's attention to (prompt, picture) and Z_n
    that to (negative, picture). The negative prompt is a second text, which attends to itself and the picture.
    """

    scale: Scale = 5.0
    negative: Tensor | str | None = None
    tau: Positive | None = None
    mix: Share | None = None
    space = "any"
    usual = Usual(0, 15, "the authors' nag_scale less 1: NAG.from_authors_scale(5)")
    neutral = Neutral({"scale": 0.0}, "none")

    @classmethod
    def from_authors_scale(cls, scale: float, **fields: Any) -> "NAG":
        """The method with the scale of the authors' code, `nag_scale`: 1 is off, 5 their default."""
        return cls(scale - 1, **fields)

    def guide(self, path: Path, at: Noise) -> Guide:
        settings = ":".join("" if value is None else f"{value:g}" for value in (self.tau, self.mix))
        preds = yield self._asked(self.scale, self.negative, f"nag:{settings}", path, at)
        return Guided(preds["cond"])
