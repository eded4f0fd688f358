"""Frequency-decoupled guidance (https://arxiv.org/abs/2506.19713)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from guidance.contract import Branch, Guide, Guided
from guidance.methods.scales import Neutral, Scale, Scaled, strength
from solvers.denoiser import Path
from solvers.errors import UserError
from solvers.noise import Noise

BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)  # Burt and Adelson's filter


@dataclass(frozen=True)
class FDG(Scaled):
    """CFG with one scale for low frequencies and one for high ones:

    out = u + scale low(d) + high (d - low(d)),    d = c - u,

    low(d) being the coarse level of a Laplacian pyramid of two: blurred and halved, then enlarged and blurred again, as
    diffusers' guider has it (kornia's `pyrdown` and `pyrup`). Equal scales are CFG. The defaults are the paper's for
    SDXL. For latents with rows and columns (..., h, w); a flat token sequence is refused.
    """

    scale: Scale = 5.0
    high: Scale = 10.0
    space = "any"
    neutral = Neutral({"scale": 1.0, "high": 1.0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        u, d = preds["uncond"], preds["cond"] - preds["uncond"]
        slow, fast = (strength(scale, at, path.x) for scale in (self.scale, self.high))
        return Guided(u + fast * d + (slow - fast) * low(d))


def low(x: Tensor) -> Tensor:
    """The low frequencies of x (B, ..., h, w), a linear map: the identity on constants and, away from the border, on
    ramps, and the same for a mirrored x, mirrored. Sides may be odd."""
    if x.ndim < 4:
        raise UserError(f"FDG wants latents (B, ..., h, w), not {tuple(x.shape)}: its frequencies are spatial")
    planes = x.reshape(-1, 1, *x.shape[-2:])
    halved = _resized(_blur(planes), [max(side // 2, 1) for side in x.shape[-2:]])
    return _blur(_resized(halved, x.shape[-2:])).view(x.shape)


def _resized(planes: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, with the outer edges of the pixels kept in place: half of a size is the mean of each pair."""
    return F.interpolate(planes, tuple(size), mode="bilinear", align_corners=False)


def _blur(planes: Tensor) -> Tensor:
    """(N, 1, h, w), blurred along rows and columns, the border mirrored."""
    row = torch.tensor(BINOMIAL, dtype=planes.dtype, device=planes.device) / 16
    rows, columns = (mirrored(side).to(planes.device) for side in planes.shape[-2:])
    padded = planes[..., rows, :][..., columns]
    return F.conv2d(F.conv2d(padded, row.view(1, 1, 1, 5)), row.view(1, 1, 5, 1))


def mirrored(side: int) -> Tensor:
    """The places -2, ..., side + 1 of a line of `side` that is mirrored at its first and last place: 2 1 0 1 2 ..."""
    period = max(2 * (side - 1), 1)
    place = torch.arange(-2, side + 2) % period
    return torch.minimum(place, period - place) if side > 1 else torch.zeros_like(place)
