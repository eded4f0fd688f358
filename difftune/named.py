"""What settings name, as objects: one sentence for every name or option that is not known."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from difftune.engine import brings_solver, step_of, wants_noise
from difftune.errors import UserError
from difftune.models import source
from guidance.contract import Guidance
from guidance.methods import GUIDANCE
from rewards.compose import WeightedSum, parse_rewards, weighted
from rewards.registry import REWARDS, Entry, Reward, entry, unknown
from solvers.denoiser import Path, Prediction, predicted
from solvers.noise import Noise, cosine, grid
from solvers.rollout import parse_gradient, rollout
from solvers.samplers import SAMPLERS, Step, euler

Thing = TypeVar("Thing")

DEFAULTS: dict[str, dict[str, Any]] = {"cfg": {"scale": 5.0}}  # where a recipe's differs from the method's own


def guidance_named(name: str, scale: float | None = None, options: Mapping[str, Any] | None = None) -> Guidance:
    """The method with its options; `scale` is short for options["scale"] and wins."""
    method = member("guidance method", name, GUIDANCE)
    given = {**(options or {}), **({} if scale is None else {"scale": scale})}
    for option in given:
        known(f"option of guidance {name!r}", option, inspect.signature(method).parameters)
    return method(**{**DEFAULTS.get(name, {}), **given})


def sampler_named(name: str) -> Step:
    return member("sampler", name, SAMPLERS)


def reward_named(weights: Sequence[str] | Mapping[str, float]) -> WeightedSum:
    """A differentiable weighted sum of rewards, from ["NAME=WEIGHT", ...] or {name: weight}."""
    try:
        return weighted(differentiable(weights))
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


def differentiable(rewards: Sequence[str] | Mapping[str, float] | Reward) -> dict[str, float]:
    """The weights by name, if all are differentiable; nothing is loaded. A reward itself has no names: {}."""
    if not isinstance(rewards, Sequence | Mapping):
        _refuse(type(rewards).__name__, rewards.differentiable)
        return {}
    try:
        weights = dict(rewards) if isinstance(rewards, Mapping) else parse_rewards(rewards)
    except ValueError as error:
        raise UserError(str(error)) from error
    for name in weights:
        _refuse(name, _entry(name).differentiable)
    return weights


def _entry(name: str) -> Entry:
    try:
        return entry(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def _refuse(name: str, able: bool) -> None:
    if not able:
        names = ", ".join(sorted(name for name, entry in REWARDS.items() if entry.differentiable))
        raise UserError(f"reward {name!r} is not differentiable, and its gradient is needed: choose of {names}")


def model_named(name: str) -> str:
    """The name, if a pipeline of that name can be looked for; nothing is loaded."""
    try:
        source(name)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    return name


def gradient_named(mode: str, steps: int, sampler: str = "euler", of: str = "weights") -> str:
    """The engine's mode, if it is known, gives a gradient `of` the weights or the noise, and runs.

    It is tried on one number with as many steps, so that what the engine says of its options is said at once.
    """
    name, option = (mode.split(":") + [""])[:2]
    if name == "truncated" and not (option.isdecimal() and 1 <= int(option) <= steps):
        raise UserError(f"gradient {mode!r} wants the number of last steps that carry gradient, 1 to {steps}")
    if brings_solver(mode) and sampler != "euler":
        raise UserError(f"gradient {mode!r} brings its own solver, and would not run sampler {sampler!r}: leave it out")
    try:
        parse_gradient(mode)
        try_gradient(mode, steps, of)
    except ValueError as error:
        raise UserError(str(error)) from error
    return mode


@dataclass(frozen=True)
class OneNumber:
    """eps - x0 = w x: the smallest network there is."""

    weight: Tensor

    @property
    def tensors(self) -> Sequence[Tensor]:
        return (self.weight,)

    def __call__(self, path: Path, at: Noise) -> Prediction:
        return predicted("flow", path.x, at, self.weight * path.x)


def try_gradient(mode: str, steps: int, of: str) -> None:
    """Run and differentiate that many steps on one number. ValueError where the mode raises it or gives no gradient."""
    weight, x = torch.full((1, 1), 0.1), torch.ones(1, 1)
    wanted = {"weights": weight, "noise": x}[of].requires_grad_()
    noise = torch.zeros(steps, 1, 1) if wants_noise(mode, euler) else None
    with torch.enable_grad():
        levels = grid(cosine, steps, 0.99, 0.0)
        path = rollout(step_of(mode, euler), OneNumber(weight), x, levels, mode, noise)
    if not path.x.requires_grad:
        raise ValueError(f"gradient {mode!r} gives no gradient of the {of}: use 'checkpoint'")
    if torch.autograd.grad(path.x.sum(), wanted, allow_unused=True)[0] is None:
        raise ValueError(f"gradient {mode!r} gives no gradient of the {of}: use 'checkpoint'")


def member(kind: str, name: str, family: Mapping[str, Thing]) -> Thing:
    return family[known(kind, name, family)]


def known(kind: str, name: str, names: Collection[str]) -> str:
    """The name, if it is known; one sentence with the nearest otherwise."""
    if name not in names:
        raise UserError(unknown(kind, name, names))
    return name


def at_least(least: float, **values: float) -> None:
    """One sentence for the first setting that is less."""
    for name, value in values.items():
        if not value >= least:
            raise UserError(f"{name} is {value}: it must be at least {least}")
