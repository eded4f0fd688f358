"""A whole run of a sampler as one differentiable function: the `gradient` modes.

Storing the latents of a run is free; what costs memory is the graph of one network call. So the default recomputes
each network call from its stored input: exact, with the peak of a single call. `MODES` is the list.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.denoiser import Path, Predict, Prediction, widen
from solvers.noise import Noise
from solvers.recompute import NoGenerator, Recomputed, check_noise, check_step
from solvers.samplers import Step, euler, is_stochastic

Leg = tuple[Noise, Noise, Tensor | None]  # now, then, noise


class Run(NamedTuple):
    """What is to be differentiated."""

    step: Step
    predict: Predict
    x: Tensor  # (B, ...)
    legs: Sequence[Leg]


def rollout(
    step: Step,
    predict: Predict,
    x: Tensor,
    levels: Sequence[Noise],
    gradient: str = "checkpoint",
    noise: Sequence[Tensor] | Tensor | None = None,
) -> Path:
    """The end of a run from x, connected to x, to the conditions and to the parameters in `predict.tensors`.

    gradient: "full" keeps every graph; "checkpoint" recomputes each network call, and its gradients are the same bits;
    "truncated:K" or "truncated:K:STYLE" lets only some steps carry gradient, in a style of `STYLES`.
    noise: one tensor a step, for stochastic steps; drawn outside, since a recomputed region cannot draw it again.

    Raises ValueError where nothing that the run depends on requires grad (outside of `torch.no_grad`), for a leaf that
    requires grad and is not in `predict.tensors`, for a scheduler as a step, and for a generator in it; backward does
    where the network changed in the meantime.
    """
    check_step(step)
    check_noise(noise)
    mode, option = parse_gradient(gradient)
    return mode(Run(step, predict, x, _legs(step, levels, noise)), option)


def parse_gradient(gradient: str) -> tuple["Mode", str]:
    """A mode and what follows its colon: "truncated:10" -> (truncated, "10")."""
    name, _, option = gradient.partition(":")
    if name not in MODES:
        raise ValueError(
            f"no gradient mode {gradient!r}; known: {', '.join(MODES)}, as in 'checkpoint' or 'truncated:10'"
        )
    return MODES[name], option


def full(run: Run, option: str) -> Path:
    """Every graph is kept: N network calls of memory."""
    _no_option("full", option)
    return _descend(run, run.predict, Path(widen(run.x)), run.legs)


def checkpoint(run: Run, option: str) -> Path:
    """Each network call is recomputed from its input on the way back (https://arxiv.org/abs/1604.06174)."""
    _no_option("checkpoint", option)
    return _descend(run, Recomputed(run.predict), Path(widen(run.x)), run.legs)


def truncated(run: Run, option: str) -> Path:
    """Only some steps carry gradient: "K" or "K:STYLE", the style being one of `STYLES`, and draft if unsaid."""
    kept, style = parse_truncation(option, len(run.legs))
    return STYLES[style](run, kept)


Mode = Callable[[Run, str], Path]
MODES: dict[str, Mode] = {f.__name__: f for f in (full, checkpoint, truncated)}


def draft(run: Run, kept: int) -> Path:
    """DRaFT-K (https://arxiv.org/abs/2309.17400): the last K steps are checkpointed, those before run without a graph.

    So x gets no gradient unless K = N, which is "checkpoint".
    """
    cut = len(run.legs) - kept
    return _descend(run, Recomputed(run.predict), _without_graph(run, cut), run.legs[cut:])


def alignprop(run: Run, kept: int) -> Path:
    """AlignProp (https://arxiv.org/abs/2310.03739): before the last K steps, only what the network says is cut off.

    The gradients of parameters and conditions are those of `draft`; x gets that of the linear path around the network,
    prod_i (alpha_{i+1} / alpha_i) for Euler's steps, times the last K steps' own.
    """
    cut = len(run.legs) - kept
    path = _descend(run, Linear(run.predict, trained=False), Path(widen(run.x)), run.legs[:cut])
    return _descend(run, Recomputed(run.predict), path, run.legs[cut:])


def draft_lv(run: Run, copies: int) -> Path:
    """DRaFT-LV (https://arxiv.org/abs/2309.17400): only the last step carries gradient, K times over.

    The end of the run is noised again to the level of the last step, with fresh noise from the global generator, and
    denoised: a path of K * B samples, copy after copy, whose mean loss has the mean gradient, of lower variance.
    """
    now, then, noise = run.legs[-1]
    before = _without_graph(run, len(run.legs) - 1)
    with torch.no_grad():
        path = run.step(run.predict, before, now, then, noise)
        clean = path.x / then.alpha if path.x0 is None or then.sigma == 0 else path.x0
    again = [now.alpha * clean + now.sigma * torch.randn_like(clean) for _ in range(copies)]
    predict = Recomputed(run.predict)
    return _together([_descend(run, predict, replace(before, x=x), [(now, then, noise)]) for x in again])


def refl(run: Run, kept: int) -> Path:
    """ReFL (https://arxiv.org/abs/2304.05977): K steps before the end, one call with gradient, and its x0 is the end.

    Where the paper draws the place of that call, K is given: draw K for each optimiser step.
    """
    cut = len(run.legs) - kept
    jump = (run.legs[cut][0], run.legs[-1][1], None)
    return _descend(run._replace(step=euler), Recomputed(run.predict), _without_graph(run, cut), [jump])


def drtune(run: Run, kept: int) -> Path:
    """DRTune (https://arxiv.org/abs/2405.00760): the network's input is cut off at every step, its output at all but K.

    Those K are evenly spaced and end with the last step; their parameters get gradient along the linear path around the
    network, as x does, without the product of its Jacobians.
    """
    count = len(run.legs)
    trained = {count - 1 - j * count // kept for j in range(kept)}
    path = Path(widen(run.x))
    for i, leg in enumerate(run.legs):
        path = _descend(run, Linear(run.predict, trained=i in trained), path, [leg])
    return path


STYLES: dict[str, Callable[[Run, int], Path]] = {f.__name__: f for f in (draft, alignprop, draft_lv, refl, drtune)}
AT_LEAST_ONE = ("draft_lv", "refl")


def parse_truncation(option: str, steps: int) -> tuple[int, str]:
    """K and the style: "10" -> (10, "draft"), "10:refl" -> (10, "refl"). ValueError for what cannot be."""
    number, _, style = option.partition(":")
    style = style or "draft"
    if style not in STYLES:
        raise ValueError(f"no truncation style {style!r} in 'truncated:{option}'; known: {', '.join(STYLES)}")
    if style == "draft_lv" and number.isdecimal() and int(number) > 0:
        return int(number), style
    least = 1 if style in AT_LEAST_ONE else 0
    if not number.isdecimal() or not least <= int(number) <= steps:
        raise ValueError(
            f"'truncated:{option}' wants the number of last steps that carry gradient, {least} to {steps}, and may name"
            f" a style: {', '.join(STYLES)}"
        )
    return int(number), style


@dataclass(frozen=True)
class Linear:
    """`predict` with its input cut off from x, so that gradients pass around the network.

    eps is taken as the network's own, and x0 = (x - sigma eps) / alpha follows x; at alpha = 0, eps = x / sigma does.
    Untrained, the network's answer is a constant too, and it is called without a graph.
    """

    predict: Predict
    trained: bool

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.predict.tensors

    def __call__(self, path: Path, at: Noise) -> Prediction:
        start = path.detach()
        if self.trained:
            p = Recomputed(self.predict)(start, at)
        else:
            with torch.no_grad():
                p = self.predict(start, at)
        moved = path.x - start.x  # zero, with the gradient of x
        if at.alpha == 0:
            return p._replace(eps=p.eps + moved / at.sigma)
        return p._replace(x0=p.x0 + moved / at.alpha)


def unlisted(outputs: Iterable[Tensor], listed: Iterable[Tensor]) -> Iterator[Tensor]:
    """Leaves that require grad under `outputs`, other than the `listed` tensors and what those were made from."""
    listed = list(listed)
    known = {id(t) for t in listed}
    seen: set[Any] = {None, *(t.grad_fn for t in listed)}
    front: list[Any] = [t.grad_fn for t in outputs]
    while front:
        node = front.pop()
        if node in seen:
            continue
        seen.add(node)
        front += [parent for parent, _ in node.next_functions]
        if node.name() == "torch::autograd::AccumulateGrad" and id(node.variable) not in known:
            yield node.variable


def _descend(run: Run, predict: Predict, path: Path, legs: Sequence[Leg]) -> Path:
    for i, (now, then, noise) in enumerate(legs):
        if i:
            path = run.step(predict, path, now, then, noise)
        else:
            path = _first(run, predict, path, legs)
    return path


def _first(run: Run, predict: Predict, before: Path, legs: Sequence[Leg]) -> Path:
    """The first step, with the checks that need one."""
    with NoGenerator():
        path = run.step(predict, before, *legs[0])
    _check_listed(run, before, path)
    if torch.is_grad_enabled():
        _check_any(run, before, legs)
    return path


def _without_graph(run: Run, count: int) -> Path:
    """The path after the first steps, cut off from x; x itself where there are none."""
    path = Path(widen(run.x))
    if not count:
        return path
    with torch.no_grad():
        return _descend(run, run.predict, replace(path, x=path.x.detach()), run.legs[:count])


def _together(paths: Sequence[Path]) -> Path:
    """Paths of equal steps as one batch."""
    memory = {key: torch.cat([p.memory[key] for p in paths]) for key in paths[0].memory}
    x0 = [p.x0 for p in paths if p.x0 is not None]
    return Path(torch.cat([p.x for p in paths]), torch.cat(x0) if x0 else None, memory)


def _check_listed(run: Run, before: Path, after: Path) -> None:
    """One step's graph tells whether `predict.tensors` is complete."""
    noises = [noise for *_, noise in run.legs if noise is not None]
    inputs = [before.x, *before.memory.values(), run.x, *noises, *run.predict.tensors]
    for leaf in unlisted([after.x, *after.memory.values()], inputs):
        raise ValueError(
            f"a tensor of shape {tuple(leaf.shape)} requires grad and the step depends on it, but it is not in"
            " predict.tensors: list it there, or call requires_grad_(False) on it"
        )


def _check_any(run: Run, before: Path, legs: Sequence[Leg]) -> None:
    noises = [noise for *_, noise in legs if noise is not None]
    if any(t.requires_grad for t in (before.x, *before.memory.values(), *noises, *run.predict.tensors)):
        return
    if run.x.requires_grad:
        raise ValueError(
            "only x requires grad, and this truncation cuts it off: use 'checkpoint', or 'truncated:K:alignprop', which"
            " keeps the linear path"
        )
    raise ValueError(
        "nothing that the run depends on requires grad: call requires_grad_() on x, on a condition or on the weights,"
        " or run under torch.no_grad()"
    )


def _legs(step: Step, levels: Sequence[Noise], noise: Sequence[Tensor] | Tensor | None) -> list[Leg]:
    pairs = list(pairwise(levels))
    if noise is None and is_stochastic(step):
        raise ValueError(f"a stochastic step needs noise that is drawn outside: pass {len(pairs)} tensors of x's shape")
    if noise is not None and len(noise) != len(pairs):
        raise ValueError(f"{len(noise)} noise tensors for {len(pairs)} steps: pass one a step")
    noises: Iterable[Tensor | None] = [None] * len(pairs) if noise is None else noise
    return [(now, then, n) for (now, then), n in zip(pairs, noises, strict=True)]


def _no_option(name: str, option: str) -> None:
    if option:
        raise ValueError(f"gradient mode {name!r} takes no option, got {option!r}")
