"""Guidance on a diffusers pipeline, which keeps its own `__call__`, scheduler, ControlNet, LoRA, callbacks and offload.

    with attach(pipe, CFG(7.5)) as handle:
        images = pipe("a red circle", guidance_scale=7.5).images  # bit-equal to the stock pipeline's
    handle.nfe

All that `attach` installs is a wrapper of `pipe.progress_bar`. The with-block that a pipeline opens around its
denoising loop is one run: entering it hooks the denoiser and wraps the scheduler's `step`, leaving it (also by an
exception) undoes that. So nothing leaks from one run to the next, a scheduler that was replaced is followed, and
a pipeline that shares these objects stays stock, also during the run: a call that is another pipeline's passes through.

Within a run the denoiser only writes down what it is asked, and answers with a stand-in. The scheduler's `step` then
has all branches at hand, whether the pipeline stacked them or called for them in turn, and the latents themselves:
there the method is run, and what it does not ask for is never evaluated.
"""

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.models.cache_utils import CacheMixin
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from guidance.attach.callers import callback_of, is_called_by
from guidance.attach.calls import Asked, Call, recorded
from guidance.attach.hooks import hooked, wrapped_step
from guidance.attach.schedulers import Where, is_first_order, locator
from guidance.attach.stand_in import scale_in, stand_in
from guidance.branches import Counter
from guidance.contract import Combined, Guidance, check_method, convert, drive
from guidance.methods.cfg import CFG, FromCond, Plain
from guidance.methods.compose import inside, moves
from solvers.denoiser import Memory, Path, widen
from solvers.errors import Caution, UserError
from solvers.families.family import Family
from solvers.families.table import family_of
from solvers.families.tokens import packed, unpacked
from solvers.families.unet import CONTROLNET_INPUTS
from solvers.levels import Clock, prediction_type
from solvers.noise import Noise, noise, normalised


def attach(pipe: Any, guidance: Guidance, networks: Mapping[str, nn.Module] | None = None) -> "Handle":
    """Make `pipe` follow `guidance` until the handle is detached; the handle is also a context manager.

    networks: those that a method names beside the pipeline's own, {"weak": unet}. The scale that the pipeline is called
    with only decides whether it prepares the unconditional branch (> 1); the method's own scale guides, and a warning
    says so once if a caller chose another. What the pipeline does to its guided prediction stays in force:
    `guidance_rescale`, SD3's skip-layer call, Qwen-Image's norm.

    Raises ValueError for a pipeline of no known family, a scheduler that is not in
    `guidance.attach.schedulers.SCHEDULERS`, and a pipeline that is attached to already. During a run: for a branch that
    the pipeline did not prepare, an unknown network or patch, a number of denoiser calls that is not the family's, a
    network with diffusers' caching on, and a CFG++ shift that the scheduler, or what the pipeline does to its guided
    prediction, cannot take.
    """
    check_method(guidance)
    family = family_of(pipe)
    locator(pipe.scheduler)
    if is_attached(pipe):
        raise UserError(f"this {type(pipe).__name__} is attached to already; detach that handle first")
    return Handle(pipe, family, guidance, networks or {})


def is_attached(pipe: Any) -> bool:
    """Whether a handle's progress bar is on the pipeline."""
    bar = pipe.progress_bar
    return inspect.ismethod(bar) and isinstance(bar.__self__, Handle)


class Handle:
    """A guidance method on a pipeline. `nfe`: the rows evaluated in the last run; `branches`: those of each branch, by
    the names that the method gives them ("cond", "uncond", ...)."""

    def __init__(self, pipe: Any, family: Family, guidance: Guidance, networks: Mapping[str, nn.Module]):
        self.pipe, self.family, self.guidance, self.networks = pipe, family, guidance, networks
        self.counter = Counter()
        self.said = False  # that the method's scale wins
        self.running = False
        self._bar, self._replaced = pipe.progress_bar, vars(pipe).get("progress_bar")
        pipe.progress_bar = self._progress_bar

    @property
    def nfe(self) -> int:
        return self.counter.rows

    @property
    def branches(self) -> dict[str, int]:
        return dict(self.counter.branches)

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
        if self.running:
            name = type(self.pipe).__name__
            raise UserError(f"this {name} is in the middle of a run already: run another pipeline of the same parts")
        self.counter, self.running = Counter(), True
        run, parts = Run(self), self.pipe.components
        calls = functools.partial(is_called_by, self.pipe, threading.get_ident())
        with ExitStack() as stack:
            stack.callback(setattr, self, "running", False)
            for name in self.family.denoisers:
                if parts[name] is not None:  # Wan's second expert
                    _refuse_cache(parts[name])
                    stack.enter_context(hooked(parts[name], calls, run.forward))
            if "controlnet" in parts and not self.family.residuals:
                stack.enter_context(hooked(parts["controlnet"], calls, run.control_forward))
            stack.enter_context(wrapped_step(self.pipe.scheduler, calls, run.step))
            yield stack.enter_context(bar)


def _refuse_cache(network: nn.Module) -> None:
    if isinstance(network, CacheMixin) and network.is_cache_enabled:
        raise UserError(f"{type(network).__name__} caches between steps, which attach cannot follow: disable_cache()")


class Stage(NamedTuple):
    """A call of the network: the path that it reads and its level, in the network's own coordinates as in our own loop,
    and where the scheduler is, in the scheduler's."""

    path: Path
    at: Noise
    where: Where


class Run:
    """One denoising loop of a pipeline. `calls`, `extra` and `control` are what was asked of the networks since the
    last call of the scheduler; while a step of several stages lasts, `first` is what its first call made."""

    def __init__(self, handle: Handle):
        self.handle, self.pipe, self.scheduler = handle, handle.pipe, handle.pipe.scheduler
        self.family = handle.family
        self.locate, self.space = locator(self.scheduler), prediction_type(self.scheduler)
        self.is_first_order = is_first_order(self.scheduler)
        self.x0: Tensor | None = None
        self.memory: Memory = {}
        self.first: Combined | None = None
        self.scales: dict[nn.Module, float] = {}  # that the pipeline guided each network with at first
        self.compared: set[nn.Module] = set()  # networks whose scale was compared with the method's
        self.most = 0  # branches of a step so far
        self._forget()

    def _forget(self) -> None:
        self.calls: list[Call] = []
        self.extra: list[Call] = []
        self.control: Call | None = None

    def forward(self, network: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Tensor]:
        """Replaces the denoiser's forward: writes the call down."""
        if self.pipe.scheduler is not self.scheduler:
            raise UserError(_changed(self.pipe, "scheduler"))
        family = self.family
        call = recorded(network, original, args, kwargs, family.batch_first, family.gathered)
        if family.extra and family.extra in call.shared:
            self.extra.append(call)
            return (stand_in(call.sample, range(0)),)
        self.calls.append(call)
        return (family.answered(stand_in(call.sample, self._unconditional(len(call)))),)

    def _unconditional(self, rows: int) -> range:
        """The rows of the latest call that are of `uncond`, if it has several branches."""
        if not self.family.batched:
            return range(rows * (len(self.calls) == 2))
        position, each = self.family.order.index("uncond"), rows // 2
        return range(position * each, (position + 1) * each)

    def control_forward(self, network: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Replaces a ControlNet's forward, as `forward` does, with residuals that `Asked` replaces."""
        self.control = recorded(network, original, args, kwargs, CONTROLNET_INPUTS)
        return [], self.control.sample[:, :0]

    def step(
        self, original: Callable[..., Any], model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **more: Any
    ) -> Any:
        """One ordinary step with the method's prediction, plus the shift."""
        branches = self._branches(sample)
        grid = self.family.grid and self.family.grid(self.calls[0].shared)
        stage = self._look(unpacked(sample, grid) if grid else sample, timestep)
        handle, x = self.handle, stage.path.x
        asked = Asked(
            *(self.family, branches, self.calls, self.control, x, stage.at, lambda at: self._clock(at)),
            *(handle.networks, handle.counter, type(handle.guidance).__name__),
        )
        made = drive(self._method(branches), asked.answer, stage.path, stage.at, self.space, self.space)
        if made.shift is not None:
            self._allow_shift(stage.where)
        if moves(handle.guidance):
            self._allow_move(more.get("eta") or 0.0)
        made = self._finished(made, asked, model_output)
        if len(branches) > 1:
            self._compare_scale(model_output, asked.guided)
        first, self.first = self.first or made, None if stage.where.last else self.first or made
        if stage.where.last:
            self.memory = {**self.memory, **first.memory}
            self.x0 = _clean(stage, made, self.space)
        layout = packed if grid else lambda x: x
        out = self.family.model_output(layout(made.out), sample, self.calls[0].rows, self.scheduler)
        self._forget()
        return _moved(original(out, timestep, sample, *args, **more), stage.where, first, made, layout)

    def _branches(self, sample: Tensor) -> tuple[str, ...]:
        """The branches that the pipeline stacked along the batch, or called for in turn."""
        name, order, calls = type(self.pipe).__name__, self.family.order, self.calls
        known = (1,) if self.family.batched else (1, len(order))
        if not calls:
            raise UserError(_changed(self.pipe, "denoiser"))
        if len(calls) not in known or len(self.extra) > 1:
            raise UserError(
                f"{name} called its denoiser {len(calls) + len(self.extra)} times in a step, and attach"
                f" knows it with {' or '.join(map(str, known))}"
            )
        count = len(calls[0]) // len(sample) if self.family.batched else len(calls)
        if count not in (1, len(order)):
            raise UserError(f"{name} stacks {count} branches, and attach knows 1 or {len(order)} ({', '.join(order)})")
        self.most = max(self.most, count)
        return order if count > 1 else ("cond",)

    def _method(self, branches: tuple[str, ...]) -> Guidance:
        """The method; the conditional prediction alone if the pipeline has stopped guiding in the middle of a run,
        as diffusers' cutoff callbacks have it do, or if plain CFG is what the network was distilled from."""
        guidance = self.handle.guidance
        if len(branches) == 1 and self.most > 1:
            return Plain() if needs_uncond(guidance) else guidance
        if self.family.unguided == 0 and type(guidance) is CFG:
            return FromCond(guidance.scale)
        network = unwrap_module(self.calls[0].network)
        if not self.family.batched or not network.config.get(self.family.embeds) or type(guidance) is not CFG:
            return guidance
        if guidance.scale != self.pipe.guidance_scale and not self.handle.said:
            self.handle.said = True
            name, told = type(network).__name__, self.pipe.guidance_scale
            warnings.warn(f"{name} is told guidance_scale={told:g}; the scale of CFG itself is ignored", Caution, 2)
        return Plain()

    def _look(self, sample: Tensor, timestep: Tensor) -> Stage:
        here = self.locate(self.scheduler, torch.as_tensor(timestep))
        norm, at = normalised(self.space, here.at)
        then = normalised(self.space, here.then)[1] if self.is_first_order else None
        return Stage(Path(widen(sample) / norm, self.x0, self.memory, then), at, here)

    @functools.cached_property
    def _clock(self) -> Clock:
        return Clock(self.scheduler)

    def _allow_shift(self, here: Where) -> None:
        method, name = type(self.handle.guidance).__name__, type(self.scheduler).__name__
        if here.weights is None:
            raise UserError(f"{method} shifts x0, and {name} has no rule for that; use DDIMScheduler")
        self._allow_beyond(f"{method} shifts x0, which")

    def _allow_move(self, eta: float) -> None:
        """UserError for a step that does not end where a straight line leads, along which a moved sample is carried."""
        method = type(self.handle.guidance).__name__
        self._allow_beyond(f"{method} moves the latents, and the prediction that carries the move")
        if eta:
            raise UserError(f"{method} moves the latents, which a step with noise undoes: call the pipeline with eta=0")

    def _allow_beyond(self, what: str) -> None:
        name, config = type(self.scheduler).__name__, self.scheduler.config
        if config.get("clip_sample") or config.get("thresholding"):
            raise UserError(f"{what} {name} clips; set clip_sample=False and thresholding=False")

    def _finished(self, made: Combined, asked: Asked, marks: Tensor) -> Combined:
        """The guided prediction after what the pipeline itself does to it, where there is one; `marks`: what it made of
        the stand-ins."""
        after = self.family.after
        if after is None or asked.idle or len(asked.branches) == 1:
            return made
        if not after.active(self.pipe, len(self.extra), marks):
            return made
        if made.shift is not None or asked.cond is None or moves(self.handle.guidance):
            method = type(self.handle.guidance).__name__
            pipe = type(self.pipe).__name__
            raise UserError(f"{method} has no guided prediction for {pipe}'s {after.name}: {after.remedy}")
        extra = [call.repeated()[0] for call in self.extra]
        for answer in extra:
            self.handle.counter.add({after.name: len(answer)})
        return made._replace(out=after.apply(self.pipe, made.out, asked.cond, extra))

    def _compare_scale(self, model_output: Tensor, guided: bool) -> None:
        """Say once that the method's scale wins over the one that the pipeline was called with. Raises UserError if the
        pipeline's scale changes in the middle of a run, which the method would not follow."""
        network, (theirs, error) = self.calls[0].network, scale_in(model_output)
        if not abs(theirs - self.scales.setdefault(network, theirs)) <= 2 * error:
            name = type(self.handle.guidance).__name__
            raise UserError(
                f"the pipeline's guidance scale changed from {self.scales[network]:g} to {theirs:g} during the run"
                f" (by {callback_of(self.pipe)}), and {name} guides with its own: give that as a function of the noise"
                " level"
            )
        if guided and network not in self.compared:
            self.compared.add(network)
            self._say_scale(theirs, error)

    def _say_scale(self, theirs: float, error: float) -> None:
        method = [self.handle.guidance, *inside(self.handle.guidance)][-1]  # that of Interval and Rescale is within
        own = vars(method).get("scale")
        if self.handle.said or own is None:
            return
        told = f" {own:g}" if isinstance(own, int | float) else ""  # else one per sample, or by the noise level
        known = (*([own] if told else []), *_defaults(self.pipe, self.family))  # nobody chose the default
        if min((abs(theirs - scale) for scale in known), default=float("inf")) > error:
            self.handle.said = True
            name, its = type(method).__name__, theirs - 1 + self.family.unguided
            warnings.warn(f"{name} guides with its own scale{told}; the pipeline's {its:g} is ignored", Caution, 2)


def _changed(pipe: Any, what: str) -> str:
    return (
        f"the {what} of this {type(pipe).__name__} was replaced during the run (by {callback_of(pipe)}), which attach"
        " cannot follow: replace it before the call"
    )


NOWHERE = noise(1.0, 0.987654)  # a level that no run has


def needs_uncond(guidance: Any) -> bool:
    """Whether a method, or one inside it, asks for the unconditional branch, as far as its first request tells."""
    return any(map(_asks_uncond, (guidance, *inside(guidance))))


def _asks_uncond(guidance: Any) -> bool:
    try:
        request = next(guidance.guide(Path(torch.zeros(1, 1, 4, 4)), NOWHERE))
    except ValueError:  # it wants what only a run has, or knows the levels of one run alone
        return True
    return any(isinstance(branch.cond, str) and branch.cond == "uncond" for branch in request.values())


def _defaults(pipe: Any, family: Family) -> Iterator[float]:
    """The scales that a pipeline guides with if its caller says nothing, as ours: 1 is without guidance."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in ("guidance_scale", "true_cfg_scale"):
        if name in parameters and parameters[name].default:
            yield parameters[name].default + 1 - family.unguided


def _clean(stage: Stage, made: Combined, space: str) -> Tensor:
    """The clean estimate (B, ...)."""
    x0 = widen(convert(made.out, space, "x0", stage.path.x, stage.at))
    return x0 if made.shift is None else x0 + made.shift


def _moved(result: Any, here: Where, first: Combined, made: Combined, layout: Callable[[Tensor], Tensor]) -> Any:
    """A scheduler's result, moved by CFG++'s shift: its sample, and its x0 if it tells one."""
    if first.shift is None or made.shift is None or here.weights is None:
        return result
    move = layout(here.then.alpha * (here.weights[0] * first.shift + here.weights[1] * made.shift))
    sample, *rest = result if isinstance(result, tuple) else result.values()
    values = [(sample + move).to(sample.dtype), *((x0 + layout(made.shift)).to(x0.dtype) for x0 in rest)]
    return tuple(values) if isinstance(result, tuple) else type(result)(*values)
