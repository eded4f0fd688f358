"""Several conditions, and conditions of each step's own."""

from dataclasses import dataclass

from torch import Tensor

from guidance.contract import Branch, Guide, Guided
from guidance.methods.negative import weights_of
from guidance.methods.scales import Neutral, Scale, Scaled, rows_for, step_of, strength
from solvers.denoiser import Cond, Path
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.ranges import Share


@dataclass(frozen=True)
class MultiCondition(Scaled):
    """Multi-conditional guidance (SpaText, https://arxiv.org/abs/2211.14305), over N conditions:

    slow: out = u + sum_i scale_i (model(x | condition_i) - u), N + 1 evaluations, a scale for each;
    fast: out = u + scale (c - u), where `cond` has all conditions at once: 2 evaluations.

    conds: named conditions of `guided`, or tensors of their own (on a pipeline). scales: one each; `scale` for all
    if none is given. fast equals slow only if the conditions contribute independently.
    """

    scale: Scale = 7.5
    conds: tuple[str | Cond, ...] = ("cond",)
    scales: tuple[Scale, ...] = ()
    fast: bool = False
    space = "any"
    neutral = Neutral({"scale": 1.0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        conds: tuple[str | Cond, ...] = ("cond",) if self.fast else self.conds
        scales = weights_of(() if self.fast else self.scales, len(conds), self.scale, "MultiCondition")
        branches = {f"cond{i}": Branch(rows_for(cond, path.x)) for i, cond in enumerate(conds)}
        preds = yield {"uncond": Branch("uncond"), **branches}
        u = preds["uncond"]
        out = u
        for i, scale in enumerate(scales):
            out = out + strength(scale, at, path.x) * (preds[f"cond{i}"] - u)
        return Guided(out)


@dataclass(frozen=True)
class NullTextInversion(Scaled):
    """CFG with an unconditional embedding of each step's own, optimised so that the run from an inverted image gives
    that image (https://arxiv.org/abs/2211.09794).

    times, nulls: the steps' sigma / (alpha + sigma) and their embeddings (T, 1 or B, ...), both made by
    `guidance.invert.null_text_inversion`; valid for its image, prompt, scale, scheduler and number of steps.
    """

    scale: Scale = 7.5
    times: tuple[Share, ...] = ()
    nulls: Tensor | None = None
    key: str = "encoder_hidden_states"
    space = "any"
    neutral = Neutral({"scale": 1.0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        if self.nulls is None:
            raise UserError("NullTextInversion has no embeddings: make it by guidance.invert.null_text_inversion")
        null = {self.key: self.nulls[step_of(self.times, at, "NullTextInversion")]}
        preds = yield {"cond": Branch("cond"), "null": Branch(rows_for(null, path.x))}
        u = preds["null"]
        return Guided(u + strength(self.scale, at, path.x) * (preds["cond"] - u))
