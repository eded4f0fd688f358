"""The engine's settings of a recipe: the gradient mode, the memory plan, the attention, and a line of text for each.

All that differentiate a sampler have the same: `gradient`, `memory_budget`, `offload`,
`enable_xformers_memory_efficient_attention` and `deterministic`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from difftune.errors import UserError
from rewards.compose import WeightedSum
from rewards.wrappers.batched import Batched
from solvers.denoiser import Path, Prediction, predicted
from solvers.families.attention import Verdict, attention, choose, deterministic, obstacle
from solvers.latent import LatentModel
from solvers.memory.budget import Plan, Probe, caution_on_cpu, parse_size, planned, resident
from solvers.memory.offload import check_offload, offload_line, offloaded
from solvers.noise import Noise, cosine, grid
from solvers.rollout.modes import parse_gradient, rollout
from solvers.rollout.surrogate import SURROGATES
from solvers.samplers.catalogue import Step, ancestral, euler, is_stochastic

OWN_SOLVER = ("adjoint", "reversible", "lean")  # modes that bring their own solver, and take no step

DEFAULT = Verdict("sdpa", "the default")


def check_engine(memory_budget: str | None, xformers: bool) -> None:
    """UserError, before anything is loaded, for a size that is none, and where xformers cannot run."""
    if memory_budget is not None:
        _worded(partial(parse_size, memory_budget))
    if xformers and (reason := obstacle()):
        raise UserError(reason)


def check_offloading(offload: bool, gradient: str | None) -> None:
    """UserError for a mode whose latents cannot be offloaded."""
    if offload and gradient is not None:
        _worded(partial(check_offload, gradient))


def bound_mode(gradient: str | None, offload: bool) -> str | None:
    """The mode that a plan is bound to: the one given, or the one that it would choose and can offload; None: none."""
    return "checkpoint" if gradient is None and offload else gradient


def moving(offload: bool, device: torch.device, gradient: str) -> AbstractContextManager[Any]:
    """Around a rollout: its latents are offloaded, if that is asked for."""
    return offloaded(device, gradient) if offload else nullcontext()


def brings_solver(gradient: str) -> bool:
    return gradient.partition(":")[0] in OWN_SOLVER


def step_of(gradient: str, step: Step) -> Step | None:
    """The step to run with: None for a mode that brings its own solver."""
    return None if brings_solver(gradient) else step


def wants_noise(gradient: str | None, step: Step) -> bool:
    """Whether a run needs one tensor of noise a step: a stochastic step does, and `lean`'s memoryless sampler."""
    return gradient == "lean" or is_stochastic(step)


@dataclass(frozen=True)
class Engine:
    """How a recipe runs: what was planned, which attention, and whether kernels are deterministic."""

    plan: Plan
    attention: Verdict = DEFAULT
    deterministic: bool = False
    offload: str | None = None  # what it does

    def lines(self, gradient: str) -> dict[str, str]:
        """A line of text for each setting that was resolved; `gradient` is the recipe's own name of the mode."""
        found = {"gradient": gradient, "attention": f"{self.attention.backend} ({self.attention.why})"}
        if self.plan.peak:
            found["memory_budget"] = str(self.plan)
        if self.offload is not None:
            found["offload"] = self.offload
        return found | ({"deterministic": "torch's deterministic algorithms"} if self.deterministic else {})


def offload_of(offload: bool, device: torch.device) -> str | None:
    """A line on how this device offloads; None if that is not asked for."""
    return offload_line(device) if offload else None


def verdict(xformers: bool, network: Any) -> Verdict:
    """xformers if it was asked for and serves on this GPU; SDPA otherwise, and why."""
    return choose(network.device, network.dtype) if xformers else DEFAULT


@contextmanager
def kernels(xformers: bool, exact: bool, network: Any) -> Iterator[Verdict]:
    """The attention that was asked for, on this network, and deterministic kernels; all as before afterwards."""
    with ExitStack() as stack:
        stack.enter_context(deterministic(exact))
        found = verdict(xformers, network)
        stack.enter_context(attention(network, found.backend))
        yield found


def plan_for(
    memory_budget: str | None,
    gradient: str | None,
    steps: int,
    batch: int,
    decode_batch: int,
    measure: Callable[[int | None], Probe],
) -> Plan:
    """The plan within the budget; without one, the whole batch at once, and "checkpoint" if no mode is given.

    measure(limit) probes within a limit, or without one: if nothing fits, the least that would is to be named.
    """
    if memory_budget is None:
        return Plan(gradient or "checkpoint", batch, batch, decode_batch=decode_batch)
    caution_on_cpu()
    try:
        return planned(measure(parse_size(memory_budget)), memory_budget, steps, batch, gradient, decode_batch)
    except ValueError:
        return _worded(lambda: planned(measure(None), memory_budget, steps, batch, gradient, decode_batch))


def probe_step(gradient: str | None, step: Step) -> Step:
    """A step that calls the network as the mode does, once for those that bring their own solver."""
    if gradient and brings_solver(gradient):
        return ancestral if gradient == "lean" else euler
    return step


SCALARS = 2**12  # bytes of the loss and of what is logged, which no probe sees


def held(model: LatentModel, trained: int, *others: LatentModel) -> int:
    """Weights, gradients (as they are summed up and as they are stored), AdamW's two moments, and a few scalars."""
    parts = [part for one in (model, *others) for part in one.pipe.components.values()]
    return resident(model.device, *parts) + 4 * trained + SCALARS


def scores_of(reward: Any, prompts: Sequence[str]) -> list[Callable[[Tensor], Tensor]]:
    """The reward as functions of the images alone, one for each member of a sum."""
    members = reward.rewards.values() if isinstance(reward, WeightedSum) else [reward]
    return [partial(lambda member, images: member(images, prompts), member) for member in members]


def one_at_a_time(reward: Any, plan: Plan) -> Any:
    """The reward on a few images at a time, as they are decoded: each part, and each member of a sum, is recomputed on
    the way back. The reward itself if that would save nothing."""
    if not (plan.rewards_apart or plan.in_parts):
        return reward
    part = partial(Batched, batch_size=plan.decode_batch, gradient_checkpointing=True)
    if not isinstance(reward, WeightedSum):
        return part(reward)
    return replace(reward, rewards={name: part(member) for name, member in reward.rewards.items()})


def as_decoded(reward: Any, images: int, decode_batch: int) -> Any:
    """The reward on so many images `one_at_a_time`, where no plan says how they are decoded."""
    return one_at_a_time(reward, Plan("checkpoint", images, images, decode_batch=decode_batch))


def _worded(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except ValueError as error:
        raise UserError(str(error)) from error


def gradient_named(mode: str, steps: int, sampler: str = "euler", of: str = "weights") -> str:
    """The engine's mode, if it is known, gives a gradient `of` the weights or the noise, and runs.

    It is tried on one number with as many steps, so that what the engine says of its options is said at once.
    """
    name, option, style = (mode.split(":") + ["", ""])[:3]
    written = style in ("mask", *SURROGATES)  # which steps carry gradient
    if name == "truncated" and not written and not (option.isdecimal() and 1 <= int(option) <= steps):
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
    """Run and differentiate that many steps on one number. ValueError if the mode raises it or gives no gradient."""
    weight, x = torch.full((1, 1), 0.1), torch.ones(1, 1)
    wanted = {"weights": weight, "noise": x}[of].requires_grad_()
    noise = torch.zeros(steps, 1, 1) if wants_noise(mode, euler) else None
    with torch.enable_grad():
        levels = grid(cosine, steps, 0.99, 0.0)
        path = rollout(step_of(mode, euler), OneNumber(weight), x, levels, mode, noise)
    if not path.x.requires_grad:
        raise UserError(f"gradient {mode!r} gives no gradient of the {of}: use 'checkpoint'")
    if torch.autograd.grad(path.x.sum(), wanted, allow_unused=True)[0] is None:
        raise UserError(f"gradient {mode!r} gives no gradient of the {of}: use 'checkpoint'")


@contextmanager
def frozen(*pipes: Any) -> Iterator[None]:
    """Only what is optimised needs gradients: the pipelines' parameters do not, until the block is left."""
    parts = [part for pipe in pipes for part in pipe.components.values() if isinstance(part, nn.Module)]
    trained = [p for part in parts for p in part.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
