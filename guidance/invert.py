"""Inversion of an image to its noise, in our own loop: DDIM inversion under any method, editing, null-text inversion.

noisy = invert(guided(denoise, CFGpp(0.6), source), latents, levels)       # levels: noisiest first
*_, end = sample(euler, guided(denoise, CFGpp(0.6), target), noisy, levels)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from guidance.contract import Guidance
from guidance.guided import GuidedPredict, guided
from guidance.methods.cfg import CFG, Plain
from guidance.methods.conditions import NullTextInversion
from guidance.methods.scales import rows_for, time
from solvers.denoiser import Cond, Denoiser, Path, Predict, Prediction, widen
from solvers.noise import Noise
from solvers.samplers.catalogue import euler, sample


def ddim_inversion(
    predict: Predict, path: Path, now: Noise, then: Noise, noise: Tensor | None = None, *, space: str = "eps"
) -> Path:
    """One step up, from `now` to the noisier `then`: under CFG++, x0 by the unguided eps, noise by the guided one,

    x0 = (x - sigma eps_u) / alpha,    x' = alpha' x0 + sigma' eps_l    (https://arxiv.org/abs/2406.08070).

    The network is asked at x with the level `then`. With its eps (space="flow": its u = eps - x0) held fixed, this is
    the inverse of the Euler step down. Without a shift it is plain DDIM inversion.
    """
    asked = predict(path, then)
    p = _reread(asked, path.x, now, space)
    x = then.alpha * p.x0 + then.sigma * p.eps
    if asked.shift is not None:  # what the step down adds, now.alpha * shift, as the way up stretches it
        stretch = (then.alpha + then.sigma) / (now.alpha + now.sigma) if space == "flow" else then.alpha / now.alpha
        x = x - stretch * now.alpha * asked.shift
    return Path(x, p.x0, {**path.memory, **asked.memory})


def _reread(p: Prediction, x: Tensor, now: Noise, space: str) -> Prediction:
    """The network's output at another level, as (x0, eps) of x at `now`."""
    x = widen(x)
    if space == "flow":
        x0 = (x - now.sigma * (p.eps - p.x0)) / (now.alpha + now.sigma)
        return Prediction(x0, x0 + p.eps - p.x0)
    return Prediction((x - now.sigma * p.eps) / now.alpha, p.eps)


@torch.no_grad()
def invert(predict: GuidedPredict, latents: Tensor, levels: Sequence[Noise]) -> Path:
    """The noise (B, ...) that `latents` came from, as far as DDIM's inversion can tell; its memory is a new run's.

    levels: those of the run downwards, noisiest first, as a sampler takes them.
    """
    *_, last = _upwards(predict, latents, levels)
    return Path(last.x)


def _upwards(predict: GuidedPredict, latents: Tensor, levels: Sequence[Noise]) -> list[Path]:
    """The inversion's paths, at every level above the last."""
    space = "flow" if predict.networks["main"].prediction_type == "flow" else "eps"
    path, paths = Path(widen(latents)), []
    for now, then in pairwise(reversed(levels)):
        path = ddim_inversion(predict, path, now, then, space=space)
        paths.append(path)
    return paths


@torch.no_grad()
def edit(
    denoise: Denoiser,
    guidance: Guidance,
    latents: Tensor,
    source: Mapping[str, Cond],
    target: Mapping[str, Cond],
    levels: Sequence[Noise],
) -> Tensor:
    """Edit latents (B, ...): invert them under the source's conditions, and sample under the target's, with the same
    method. With source == target this reconstructs them."""
    noisy = invert(guided(denoise, guidance, source), latents, levels)
    *_, end = sample(euler, guided(denoise, guidance, target), noisy, levels)
    return end.x


# ------------------------------------------------------------------------------------------------ null-text inversion
@dataclass(frozen=True)
class NullText:
    """The settings of null-text inversion; the defaults are the paper's for its 50 steps.

    Of T steps, the i-th learns at lr (1 - i / (2 T)), from `lr` to about half of it, and is done at a loss of
    tolerance (1 + 100 i / T). At T = 50 these are the paper's lr (1 - i / 100) and 1e-5 + 2e-5 i.
    """

    scale: float = 7.5
    iterations: int = 10  # at most, of a step
    lr: float = 1e-2  # of Adam at the noisiest step
    tolerance: float = 1e-5  # loss at which the noisiest step is done
    key: str = "encoder_hidden_states"


def null_text_inversion(
    denoise: Denoiser,
    latents: Tensor,
    conds: Mapping[str, Cond],
    levels: Sequence[Noise],
    options: NullText = NullText(),  # frozen
) -> tuple[NullTextInversion, Path]:
    """The method whose run from the returned noise gives `latents` back (https://arxiv.org/abs/2211.09794).

    The pivot is the DDIM inversion with the condition alone. Down from its end, each step's embedding, warm-started
    from the step before, is fitted by Adam to bring the CFG step to the pivot: a mean squared error, in float32.
    """
    pivots = _upwards(guided(denoise, Plain(), conds), latents, levels)[::-1]
    targets = [*(p.x for p in pivots[1:]), widen(latents)]
    null = widen(conds["uncond"][options.key]).detach().clone()
    path, nulls = Path(pivots[0].x), []
    for i, (now, then) in enumerate(pairwise(levels)):
        step = partial(_step, denoise, conds, options, path, now, then)
        null = _fitted(step, null, targets[i].detach(), options, i / len(targets))
        nulls.append(null)
        with torch.no_grad():
            path = step(null)
    times = tuple(time(level) for level in levels[:-1])
    return NullTextInversion(options.scale, times, torch.stack(nulls), options.key), Path(pivots[0].x)


def _step(
    denoise: Denoiser, conds: Mapping[str, Cond], options: NullText, path: Path, now: Noise, then: Noise, null: Tensor
) -> Path:
    """One step down under CFG with `null` for the unconditional embedding."""
    free = {**conds["uncond"], **dict(rows_for({options.key: null}, path.x))}  # type: ignore[arg-type]
    return euler(guided(denoise, CFG(options.scale), {"cond": conds["cond"], "uncond": free}), path, now, then)


def _fitted(step: partial[Path], null: Tensor, target: Tensor, options: NullText, part: float) -> Tensor:
    """The embedding that brings the step to its target; `part` of the run, in [0, 1), lies before the step."""
    null = null.detach().clone().requires_grad_()
    adam = torch.optim.Adam([null], lr=options.lr * (1 - part / 2))
    for _ in range(options.iterations):
        with torch.enable_grad():
            loss = F.mse_loss(step(null).x, target)
            (null.grad,) = torch.autograd.grad(loss, [null])
        adam.step()
        if loss < options.tolerance * (1 + 100 * part):
            break
    return null.detach()
