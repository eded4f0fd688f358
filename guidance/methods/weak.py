"""Away from a weaker model: another network, or the same one with parts of its attention taken out."""

from dataclasses import dataclass
from typing import Annotated, Literal

from guidance.contract import Branch, Guide, Guided, within
from guidance.methods.scales import Neutral, Scale, Scaled, Usual, chosen, nonzero, strength
from solvers.denoiser import Path
from solvers.families.after import rescaled
from solvers.noise import Noise
from solvers.ranges import Range, Share


@dataclass(frozen=True)
class AutoGuidance(Scaled):
    """Autoguidance, out = weak + scale (main - weak), both with the sample's own condition
    (https://arxiv.org/abs/2406.02507).

    network: the weaker model's name, as `guided(..., weak=...)` or `attach(..., networks={name: ...})` know it. The
    default scale is the paper's for EDM2-S at 512 pixels.
    """

    scale: Scale = 2.1
    network: str = "weak"
    space = "any"
    neutral = Neutral({"scale": 1.0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond"), "weak": Branch("cond", network=self.network)}
        weak = preds["weak"]
        return Guided(weak + strength(self.scale, at, path.x) * (preds["cond"] - weak))


@dataclass(frozen=True)
class _Perturbed(Scaled):
    """out = c + scale (c - weak) [+ (cfg_scale - 1) (c - u)]; samples of scale 0 skip the weak evaluation."""

    def _guided(self, scale: Scale, cfg_scale: Scale | None, patch: str, path: Path, at: Noise) -> Guide:
        s = strength(scale, at, path.x)
        rows = nonzero(s, path.x)
        uncond = {} if cfg_scale is None else {"uncond": Branch("uncond")}
        preds = yield {"cond": Branch("cond"), **uncond, "weak": Branch("cond", rows, patch=patch)}
        c = preds["cond"]
        out = c + s * (c - chosen(rows, preds["weak"], c))
        if cfg_scale is not None:
            out = out + (strength(cfg_scale, at, path.x) - 1) * (c - preds["uncond"])
        return Guided(out)


@dataclass(frozen=True)
class PAG(_Perturbed):
    """Perturbed-attention guidance (https://arxiv.org/abs/2403.17377): the weak model has the identity for its
    self-attention maps in `layers`,

    out = c + scale (c - weak) [+ (cfg_scale - 1) (c - u)].

    layers: parts of the network by the start of their names, joined by commas; "" is the family's default, the middle
    block of a UNet.
    """

    scale: Scale = 3.0
    cfg_scale: Scale | None = None
    layers: str = ""
    space = "any"
    usual = Usual(0, 15, "it multiplies c - weak, the papers have about 3; CFG's scale is cfg_scale")
    neutral = Neutral({"scale": 0.0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        return self._guided(self.scale, self.cfg_scale, f"pag:{self.layers}", path, at)


@dataclass(frozen=True)
class SLG(_Perturbed):
    """Skip-layer guidance: the weak model leaves out the transformer blocks in `layers`,

    out = c + scale (c - weak) [+ (cfg_scale - 1) (c - u)].

    The default scale is that of SD3.5, which uses it in the first fifth of the steps only: pass a `Between`. `layers`
    is as in `PAG`.
    """

    scale: Scale = 2.8
    cfg_scale: Scale | None = None
    layers: str = ""
    space = "any"
    usual = Usual(0, 15, "it multiplies c - weak, the papers have about 3; CFG's scale is cfg_scale")
    neutral = Neutral({"scale": 0.0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        return self._guided(self.scale, self.cfg_scale, f"slg:{self.layers}", path, at)


@dataclass(frozen=True)
class SEG(_Perturbed):
    """Smoothed-energy guidance (https://arxiv.org/abs/2408.00760): the weak model's self-attention queries in `layers`
    are blurred over the token grid by a Gaussian of `sigma` tokens (infinite: the mean query),

    out = c + scale (c - weak) [+ (cfg_scale - 1) (c - u)].

    `layers` is as in `PAG`.
    """

    scale: Scale = 3.0
    sigma: Annotated[float, Range(0, above=True, infinite=True)] = float("inf")
    cfg_scale: Scale | None = None
    layers: str = ""
    space = "any"
    usual = Usual(0, 15, "it multiplies c - weak, the papers have about 3; CFG's scale is cfg_scale")
    neutral = Neutral({"scale": 0.0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        return self._guided(self.scale, self.cfg_scale, f"seg:{self.layers}:{self.sigma}", path, at)


@dataclass(frozen=True)
class STG(Scaled):
    """Spatiotemporal skip guidance, for films (https://arxiv.org/abs/2411.18664): the weak model has the identity for
    the self-attention maps in `layers` (STG-A, which is PAG), or leaves the blocks out (STG-R, which is SLG),

    out = c + scale (c - weak) [+ (cfg_scale - 1) (c - u)],    times rescale std(c) / std(out) + 1 - rescale.

    The deviations are those of each sample, of what the network emits. `layers` is as in `PAG`.
    """

    scale: Scale = 1.0
    cfg_scale: Scale | None = None
    layers: str = ""
    skip: Literal["attention", "blocks"] = "attention"
    rescale: Share = 0.0
    usual = Usual(0, 5, "it multiplies c - weak, 1 is the authors', and up to 2; CFG's scale is cfg_scale")
    neutral = Neutral({"scale": 0.0, "rescale": 0.0}, "none")

    @property
    def space(self) -> str:
        return "output" if self.rescale else "any"

    def guide(self, path: Path, at: Noise) -> Guide:
        kind = PAG if self.skip == "attention" else SLG
        made, preds = yield from within(kind(self.scale, cfg_scale=self.cfg_scale, layers=self.layers), path, at)
        return made._replace(out=rescaled(made.out, preds["cond"], self.rescale)) if self.rescale else made
