"""Truncation: only some steps of a run carry gradient. `STYLES` is the list."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from solvers.denoiser import Path, widen
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.rollout.recompute import Recomputed
from solvers.rollout.run import Run, descend, step_of
from solvers.rollout.surrogate import SURROGATES, held, without_graph
from solvers.samplers.catalogue import euler


def truncated(run: Run, option: str) -> Path:
    """Only some steps carry gradient: "K" or "K:STYLE", the style being one of `STYLES`, and draft if unsaid; or those
    that "0011:mask" marks with a 1; or a surrogate of `solvers.rollout.surrogate`, as in "0011:held"."""
    if option.endswith(":mask"):
        return masked(run, parse_mask(option, len(run.legs)))
    if (style := option.rpartition(":")[2]) in SURROGATES:
        return SURROGATES[style](run, option)
    kept, style = parse_truncation(option, len(run.legs))
    return STYLES[style](run, kept)


def draft(run: Run, kept: int) -> Path:
    """DRaFT-K (https://arxiv.org/abs/2309.17400): the last K steps are checkpointed, those before run without a graph.

    So x gets no gradient unless K = N, which is "checkpoint".
    """
    cut = len(run.legs) - kept
    return descend(run, Recomputed(run.predict), without_graph(run, cut), cut)


def alignprop(run: Run, kept: int) -> Path:
    """AlignProp (https://arxiv.org/abs/2310.03739): before the last K steps, only what the network says is cut off.

    The gradients of parameters and conditions are those of `draft`; x gets that of the linear path around the network,
    prod_i (alpha_{i+1} / alpha_i) for Euler's steps, times the last K steps' own; 1 on the levels of a flow, whose
    velocity is what is cut off. Of a network that predicts v it is v.
    """
    cut = len(run.legs) - kept
    path = descend(run, held(run, 0.0), Path(widen(run.x)), 0, cut)
    return descend(run, Recomputed(run.predict), path, cut)


def draft_lv(run: Run, copies: int) -> Path:
    """DRaFT-LV (https://arxiv.org/abs/2309.17400): only the last step carries gradient, K times over.

    The end of the run is noised again to the level of the last step, with fresh noise from the global generator, and
    denoised: a path of K * B samples, copy after copy, whose mean loss has the mean gradient, of lower variance.
    """
    last, (now, then, noise) = len(run.legs) - 1, run.legs[-1]
    before = without_graph(run, last)
    with torch.no_grad():
        path = step_of(run)(run.predict, before, now, then, noise)
        clean = path.x / then.alpha if path.x0 is None or then.sigma == 0 else path.x0
    again = [now.alpha * clean + now.sigma * torch.randn_like(clean) for _ in range(copies)]
    return _together([descend(run, Recomputed(run.predict), replace(before, x=x), last) for x in again])


def refl(run: Run, kept: int) -> Path:
    """ReFL (https://arxiv.org/abs/2304.05977): K steps before the end, one call with gradient, and its x0 is the end,

    also where the sampler's last level is not clean data. Where the paper draws the place of that call, K is given:
    draw K for each optimiser step.
    """
    cut = len(run.legs) - kept
    now = run.legs[cut][0]
    clean = Noise(torch.ones_like(now.alpha), torch.zeros_like(now.sigma))
    jump = run._replace(step=euler, legs=[*run.legs[:cut], (now, clean, None)])
    return descend(jump, Recomputed(run.predict), without_graph(run, cut), cut)


def drtune(run: Run, kept: int) -> Path:
    """DRTune (https://arxiv.org/abs/2405.00760): the network input is detached at every step, its output at all but K.

    Those K are evenly spaced and end with the last step; their parameters get gradient along the linear path around the
    network, as x does, without the product of its Jacobians.
    """
    count = len(run.legs)
    trained = {count - 1 - j * count // kept for j in range(kept)}
    path = Path(widen(run.x))
    for i in range(count):
        path = descend(run, held(run, float(i in trained)), path, i, i + 1)
    return path


def masked(run: Run, kept: Sequence[bool]) -> Path:
    """Any steps may carry gradient; of the others, what the network says is constant, and x goes on around it.

    A kept step also has the Jacobian of the network in x, so that kept steps are not the sum of each alone. AlignProp's
    released code keeps each step by itself, with a probability.
    """
    path = Path(widen(run.x))
    for i, keep in enumerate(kept):
        path = descend(run, Recomputed(run.predict) if keep else held(run, 0.0), path, i, i + 1)
    return path


STYLES: dict[str, Callable[[Run, int], Path]] = {f.__name__: f for f in (draft, alignprop, draft_lv, refl, drtune)}
AT_LEAST_ONE = ("draft_lv", "refl")


def parse_truncation(option: str, steps: int) -> tuple[int, str]:
    """K and the style: "10" -> (10, "draft"), "10:refl" -> (10, "refl"). ValueError for invalid settings."""
    number, _, style = option.partition(":")
    style = style or "draft"
    if style not in STYLES:
        raise UserError(f"no truncation style {style!r} in 'truncated:{option}'; known: {', '.join(STYLES)}")
    if style == "draft_lv" and number.isdecimal() and int(number) > 0:
        return int(number), style
    least = 1 if style in AT_LEAST_ONE else 0
    if not number.isdecimal() or not least <= int(number) <= steps:
        raise UserError(
            f"'truncated:{option}' wants the number of last steps that carry gradient, {least} to {steps}, and may name"
            f" a style: {', '.join(STYLES)}"
        )
    return int(number), style


def steps_carrying(option: str) -> int:
    """How many steps carry gradient, as "10", "0011:mask" or "0,2,0.3:leap" have it; more copies of one are one."""
    number, _, style = option.partition(":")
    if style in ("refl", "draft_lv", "direct"):
        return 1
    if style in ("mask", "held", "bridge"):
        return number.partition(",")[0].count("1")
    return 2 if style == "leap" else int(number)


def parse_mask(option: str, steps: int) -> list[bool]:
    """The steps that carry gradient: "0011:mask" -> [False, False, True, True]; ValueError unless each has a digit."""
    digits = option.removesuffix(":mask")
    if set(digits) - {"0", "1"} or len(digits) != steps:
        raise UserError(
            f"'truncated:{option}' wants {steps} digits, 1 for a step that carries gradient and 0 for others"
        )
    return [digit == "1" for digit in digits]


def _together(paths: Sequence[Path]) -> Path:
    """Paths of equal steps as one batch."""
    memory = {key: torch.cat([p.memory[key] for p in paths]) for key in paths[0].memory}
    x0 = [p.x0 for p in paths if p.x0 is not None]
    return Path(torch.cat([p.x for p in paths]), torch.cat(x0) if x0 else None, memory)
