"""Dynamic CFG by online feedback (https://arxiv.org/abs/2509.16131)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from guidance.contract import Branch, Guide, Guided
from guidance.methods.classifier import given
from guidance.methods.scales import Neutral
from solvers.denoiser import Path, along
from solvers.noise import Noise
from solvers.ranges import Ranged

Score = Callable[[Tensor], Tensor]  # x0 (B, ...) -> (B,), higher is better


@dataclass(frozen=True)
class DynamicCFG(Ranged):
    """CFG whose scale is, at each step and for each sample, the candidate that the scorers like best:

    s = argmax_{s in candidates} sum_e a_e e(x0_s),    x0_s = x0_u + s (x0_c - x0_u),

    with no further evaluation of the network. Each scorer's values are brought to [0, 1] over the candidates, so that
    one that is the same for all candidates decides nothing; of equals the lowest scale wins. With several scorers, a_e
    is the relative change of e since the last step, max(0, (e - e_last) / |e_last|), e being the mean over the
    candidates; all alike at the first step and if none rises.

    The paper scores noisy latents with networks trained for that; here the scorers see the clean estimate x0 (B, ...),
    which any function that decodes it can score. They run under no_grad. One candidate is plain CFG.
    """

    candidates: tuple[float, ...] = (1.0, 3.0, 7.5, 11.0, 15.0)
    scorers: tuple[Score | str, ...] = ("tiny-clip",)
    space = "any"
    neutral = Neutral({"candidates": (1.0,)}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
        c, u = preds["cond"], preds["uncond"]
        scales = torch.tensor(sorted(self.candidates), dtype=torch.float64, device=c.device)
        if len(scales) == 1:
            return Guided(u + float(scales) * (c - u))
        scores = self._scores(preds.to("cond", "x0"), preds.to("uncond", "x0"), scales.tolist())
        best, kept = _best(scores, path.memory.get("dynamic.score"))
        return Guided(u + along(scales[best].to(c.dtype), c) * (c - u), memory={"dynamic.score": kept})

    @torch.no_grad()
    def _scores(self, c: Tensor, u: Tensor, scales: list[float]) -> Tensor:
        """(candidates, B, scorers)."""
        scorers = [given("DynamicCFG", "scorers", s, "functions from x0 (B, ...) to (B,)") for s in self.scorers]
        guesses = [u + scale * (c - u) for scale in scales]
        return torch.stack([torch.stack([score(x0) for score in scorers], 1) for x0 in guesses]).double()


def _best(scores: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
    """The best candidate (B,) of scores (S, B, E), and what the next step compares with, (B, E)."""
    now = scores.mean(0)
    low, high = scores.amin(0), scores.amax(0)
    level = torch.where(high > low, (scores - low) / (high - low), 0.0)
    return (level * _weights(now, last)).sum(-1).argmax(0), now


def _weights(now: Tensor, last: Tensor | None) -> Tensor:
    """a_e (B, E)."""
    if last is None:
        return torch.ones_like(now)
    rise = ((now - last) / last.abs()).clamp(min=0).nan_to_num(0.0, posinf=0.0)
    return torch.where(rise.sum(1, keepdim=True) > 0, rise, 1.0)
