"""CFG++: guided clean data, unguided noise (https://arxiv.org/abs/2406.08070)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from guidance.contract import Branch, Guide, Guided
from guidance.methods.cfg import CFG
from guidance.methods.scales import Neutral, Scale, Scaled, Usual, converting, step_of, strength, time
from solvers.denoiser import Path
from solvers.noise import Noise

README_RATIO = 12.5  # the authors' README: lambda in [0, 1] is about CFG in [1, 12.5], at 50 DDIM steps


@dataclass(frozen=True)
class CFGpp(Scaled):
    """CFG++: the clean estimate is guided, the noise that is put back is not (https://arxiv.org/abs/2406.08070):

    x' = alpha' (x0_u + scale (x0_c - x0_u)) + sigma' eps_u, whatever the solver.

    The step is the solver's own on the unconditional prediction; alpha' (x0_guided - x0_u) is added to its result. For
    flows this is the authors' later form. scale in [0, 1]: 0 is unconditional; 1 is what distilled models want.

    For a first-order step it is CFG of the scale `omega(scale, levels)`: at the same scale, more steps guide more.
    """

    scale: Scale = 0.6
    space = "any"
    usual = Usual(0, 1, "it is not CFG's scale; for CFG's 7.5 take CFGpp.from_cfg_scale(7.5), which is 0.6")
    neutral = Neutral({"scale": 0.0}, "uncond")

    @classmethod
    def from_cfg_scale(cls, scale: float, levels: Sequence[Noise] | None = None) -> "CFGpp":
        """The CFG++ scale that is, in the median over the steps of a run, CFG of `scale`.

        levels: those of the run. Without them the ratio is 12.5, the authors' own for 50 DDIM steps.
        """
        with converting():
            return cls(scale / (README_RATIO if levels is None else median(omega(1.0, levels))))

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        c, u = preds["cond"], preds["uncond"]
        return Guided(u, data=u + strength(self.scale, at, path.x) * (c - u))


def omega(scale: float, levels: Sequence[Noise], appendix: bool = False) -> list[float]:
    """The CFG scale of each step that makes it CFG++ of `scale`, for first-order steps down the levels:

    omega = scale / (1 - k'/k), k = sigma / alpha. appendix: the form for flows in the paper's appendix instead,
    x' = x0_guided + t' u_u, which is omega = scale t / (t - t').
    """
    if appendix:
        return [scale * time(now) / (time(now) - time(then)) for now, then in pairwise(levels)]
    return [scale / (1 - _falling(now, then)) for now, then in pairwise(levels)]


def _falling(now: Noise, then: Noise) -> float:
    """k' / k, 0 from the pure noise of a flow."""
    return float(then.sigma * now.alpha / (then.alpha * now.sigma))


@dataclass(frozen=True)
class Listed:
    """A schedule that gives each of the noise levels of one run its own scale."""

    times: tuple[float, ...]
    scales: tuple[float, ...]

    def __call__(self, at: Noise) -> float:
        return self.scales[step_of(self.times, at, "this schedule of scales")]


def as_cfg(scale: float, levels: Sequence[Noise], appendix: bool = False) -> CFG:
    """CFG whose scale changes from step to step as `omega` says: CFG++ itself under a first-order solver.

    `appendix` is for reproduction only: at scale 0.6 and 28 steps its first step guides by 16.8.
    """
    return CFG(Listed(tuple(map(time, levels[:-1])), tuple(omega(scale, levels, appendix))))
