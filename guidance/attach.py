"""Guidance on a diffusers pipeline, which keeps its own `__call__`, scheduler, ControlNet, LoRA, callbacks and offload.

    with attach(pipe, CFG(7.5)) as handle:
        images = pipe("a red circle", guidance_scale=7.5).images  # bit-equal to the stock pipeline's
    handle.nfe

All that `attach` installs is a wrapper of `pipe.progress_bar`. The with-block that a pipeline opens around its
denoising loop is one run: entering it hooks the denoiser and wraps two methods of the scheduler, leaving it (also by an
exception) undoes that. So nothing leaks from one run to the next, a scheduler that was replaced is followed, and
a pipeline that shares these objects stays stock.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from guidance.calls import Call
from guidance.contract import Combined, Guidance, convert, drive
from guidance.evaluate import Counter
from guidance.where import Where, locator
from solvers.denoiser import Memory, Path, widen
from solvers.families import Family, family_of
from solvers.levels import prediction_type
from solvers.noise import Noise

HOOK = "difftune"


def attach(pipe: Any, guidance: Guidance, networks: Mapping[str, nn.Module] | None = None) -> "Handle":
    """Make `pipe` follow `guidance` until the handle is detached; the handle is also a context manager.

    networks: those that a method names beside the pipeline's own, {"weak": unet}. The pipeline's `guidance_scale` only
    decides whether it prepares the unconditional branch (> 1); the method's own scale guides. Its `guidance_rescale`
    stays in force.

    Raises ValueError for a pipeline of no known family, a scheduler that is not in `guidance.where.SCHEDULERS`, and a
    pipeline that is attached to already. During a run: for a branch that the pipeline did not prepare, an unknown
    network or patch, and a CFG++ shift that the scheduler or `guidance_rescale` cannot take.
    """
    family = family_of(pipe)
    if not family.batched:
        raise ValueError(f"{type(pipe).__name__} evaluates its branches one by one, which attach cannot do yet")
    locator(pipe.scheduler)
    if is_attached(pipe):
        raise ValueError(f"this {type(pipe).__name__} is attached to already; detach that handle first")
    return Handle(pipe, family, guidance, networks or {})


def is_attached(pipe: Any) -> bool:
    """Whether a handle's progress bar is on the pipeline."""
    bar = pipe.progress_bar
    return inspect.ismethod(bar) and isinstance(bar.__self__, Handle)


class Handle:
    """A guidance method on a pipeline. `nfe`: the rows evaluated in the last run."""

    def __init__(self, pipe: Any, family: Family, guidance: Guidance, networks: Mapping[str, nn.Module]):
        self.pipe, self.family, self.guidance, self.networks = pipe, family, guidance, networks
        self.counter = Counter()
        self._bar, self._replaced = pipe.progress_bar, vars(pipe).get("progress_bar")
        pipe.progress_bar = self._progress_bar

    @property
    def nfe(self) -> int:
        return self.counter.rows

    def detach(self) -> None:
        """Take the guidance off; the pipeline is what it was. Doing it twice is harmless."""
        if vars(self.pipe).get("progress_bar") != self._progress_bar:
            return
        del self.pipe.progress_bar
        if self._replaced is not None:
            self.pipe.progress_bar = self._replaced

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _progress_bar(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        return self._run(self._bar(*args, **kwargs))

    @contextmanager
    def _run(self, bar: AbstractContextManager[Any]) -> Iterator[Any]:
        self.counter = Counter()
        run, scheduler = Run(self), self.pipe.scheduler
        with ExitStack() as stack:
            for name in self.family.denoisers:
                stack.enter_context(_hooked(self.pipe.components[name], run.forward))
            if hasattr(scheduler, "scale_model_input"):  # as the pipelines ask: flow schedulers have none
                stack.enter_context(_wrapped(scheduler, "scale_model_input", run.scale_model_input))
            stack.enter_context(_wrapped(scheduler, "step", run.step))
            yield stack.enter_context(bar)


class Stage(NamedTuple):
    """A call of the network: the path that it reads and its level, in the network's own coordinates as in our own loop,
    and where the scheduler is, in the scheduler's."""

    path: Path
    at: Noise
    where: Where


class Run:
    """One denoising loop of a pipeline. Between two calls of the scheduler: `stage` from scale_model_input on, `made`
    from the denoiser's forward on; while a step lasts, `first` is what its first call made."""

    def __init__(self, handle: Handle):
        self.handle, self.pipe, self.scheduler = handle, handle.pipe, handle.pipe.scheduler
        self.locate, self.space = locator(self.scheduler), prediction_type(self.scheduler)
        self.x0: Tensor | None = None
        self.memory: Memory = {}
        self.stage: Stage | None = None
        self.made: Combined | None = None
        self.first: Combined | None = None

    @property
    def branches(self) -> tuple[str, ...]:
        """What the pipeline stacks along the batch."""
        return self.handle.family.order if self.pipe.do_classifier_free_guidance else ("cond",)

    def scale_model_input(self, original: Callable[..., Tensor], sample: Tensor, timestep: Tensor) -> Tensor:
        scaled = original(sample, timestep)  # first: it sets the step index of the schedulers that scale
        if self.stage is None:  # a ControlNet in guess mode scales once more, without the unconditional half
            self.stage = self._look(sample, timestep)
        return scaled

    def _look(self, sample: Tensor, timestep: Tensor) -> Stage:
        here, x = self.locate(self.scheduler, timestep), sample.chunk(len(self.branches))[0]
        alpha, sigma = here.at
        norm = alpha + sigma if self.space == "flow" else torch.hypot(alpha, sigma)
        return Stage(Path(widen(x) / norm, self.x0, self.memory), Noise(alpha / norm, sigma / norm), here)

    def forward(self, network: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Tensor]:
        """In place of the denoiser's own: what the method makes of its branches, as the answer for every branch."""
        if self.made is not None:
            raise ValueError(f"{type(self.pipe).__name__} called its denoiser twice in a step; attach cannot follow it")
        handle = self.handle
        call = Call(handle.family, self.branches, network, original, args, kwargs, handle.networks, handle.counter)
        if self.stage is None:  # flow schedulers do not scale, so the network reads x itself
            self.stage = self._look(call.sample, call.timestep.flatten()[0])
        path, at, here = self.stage
        made = drive(handle.guidance, lambda wanted: call.answer(wanted, path.x), path, at, self.space, self.space)
        if made.shift is not None:
            self._allow_shift(here)
        self.made = made._replace(out=self._rescaled(made, call.cond))
        return (torch.cat([self.made.out] * len(self.branches)),)

    def _allow_shift(self, here: Where) -> None:
        method, name = type(self.handle.guidance).__name__, type(self.scheduler).__name__
        if here.weights is None:
            raise ValueError(f"{method} shifts x0, and {name} has no rule for that; use DDIMScheduler")
        if self.scheduler.config.get("clip_sample") or self.scheduler.config.get("thresholding"):
            raise ValueError(f"{method} shifts x0, which {name} clips; set clip_sample=False and thresholding=False")

    def _rescaled(self, made: Combined, cond: Tensor | None) -> Tensor:
        """The guided prediction with the pipeline's `guidance_rescale`, which some pipelines do not have."""
        phi = getattr(self.pipe, "guidance_rescale", 0.0) if len(self.branches) > 1 else 0.0
        if not phi > 0:
            return made.out
        if made.shift is not None or cond is None:
            method = type(self.handle.guidance).__name__
            raise ValueError(f"{method} has no guided prediction to rescale: call the pipeline with guidance_rescale=0")
        return rescaled(made.out, cond, phi)

    def step(
        self, original: Callable[..., Any], model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **more: Any
    ) -> Any:
        """One ordinary step with the method's prediction, plus the shift."""
        stage, made = self.stage, self.made
        if stage is None or made is None:
            raise ValueError(f"{type(self.pipe).__name__} called scheduler.step before its denoiser")
        first = self.first or made
        result = original(made.out, timestep, sample, *args, **more)
        if stage.where.last:
            self.memory = {**self.memory, **first.memory}
            self.x0 = _clean(stage, made, self.space)
        self.stage, self.made, self.first = None, None, None if stage.where.last else first
        return _moved(result, stage.where, first.shift, made.shift)


def _clean(stage: Stage, made: Combined, space: str) -> Tensor:
    """The clean estimate (B, ...)."""
    x0 = widen(convert(made.out, space, "x0", stage.path.x, stage.at))
    return x0 if made.shift is None else x0 + made.shift


def _moved(result: Any, here: Where, first: Tensor | None, shift: Tensor | None) -> Any:
    """A scheduler's result, moved by CFG++'s shift: its sample, and its x0 where it tells one."""
    if first is None or shift is None or here.weights is None:
        return result
    move = here.then.alpha * (here.weights[0] * first + here.weights[1] * shift)
    sample, *rest = result if isinstance(result, tuple) else result.values()
    values = [(sample + move).to(sample.dtype), *((x0 + shift).to(x0.dtype) for x0 in rest)]
    return tuple(values) if isinstance(result, tuple) else type(result)(*values)


def rescaled(out: Tensor, cond: Tensor, phi: float) -> Tensor:
    """phi * out * std(cond) / std(out) + (1 - phi) * out (https://arxiv.org/abs/2305.08891), as diffusers rounds it."""
    axes = list(range(1, out.ndim))
    matched = out * (cond.std(dim=axes, keepdim=True) / out.std(dim=axes, keepdim=True))
    return phi * matched + (1 - phi) * out


@contextmanager
def _wrapped(scheduler: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """scheduler.name(...) is method(its original, ...), under the original's signature, which pipelines read."""
    before, original = vars(scheduler).get(name), getattr(scheduler, name)
    setattr(scheduler, name, functools.wraps(original)(functools.partial(method, original)))
    try:
        yield
    finally:
        delattr(scheduler, name)
        if before is not None:
            setattr(scheduler, name, before)


class _Hook(ModelHook):
    def __init__(self, forward: Callable[..., Any]):
        super().__init__()
        self.run_forward = forward

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.run_forward(module, self.fn_ref.original_forward, args, kwargs)


@contextmanager
def _hooked(network: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """network(...) is forward(network, its original, args, kwargs)."""
    before = {"forward", "_diffusers_hook"} & vars(network).keys()
    registry = HookRegistry.check_if_exists_or_initialize(network)
    registry.register_hook(_Hook(forward), HOOK)
    try:
        yield
    finally:
        registry.remove_hook(HOOK, recurse=False)
        for left in {"forward", "_diffusers_hook"} - before:  # remove_hook leaves both behind
            vars(network).pop(left, None)
