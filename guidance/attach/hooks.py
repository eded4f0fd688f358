"""What a run puts on a network and on a scheduler, so that their calls come to it; calls of others pass through."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from solvers.errors import UserError

HOOK = "difftune"
LOCK = Lock()  # two pipelines of the same network may begin and end in two threads
BUSY: set[int] = set()  # ids of the schedulers of runs

Mine = Callable[[], bool]  # whether the present call is the run's own


class Shared(ModelHook):
    """The one hook of a network, for all runs that it takes part in at a time."""

    def __init__(self, before: set[str]):
        super().__init__()
        self.before = before  # what the network had in its __dict__
        self.runs: list[tuple[Mine, Callable[..., Any]]] = []

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = self.fn_ref.original_forward
        for mine, forward in tuple(self.runs):
            if mine():
                return forward(module, original, args, kwargs)
        return original(*args, **kwargs)


@contextmanager
def hooked(network: nn.Module, mine: Mine, forward: Callable[..., Any]) -> Iterator[None]:
    """network(...) is forward(network, its original, args, kwargs) if the call is `mine`."""
    run = (mine, forward)
    with LOCK:
        before = {"forward", "_diffusers_hook"} & vars(network).keys()
        registry = HookRegistry.check_if_exists_or_initialize(network)
        hook = registry.get_hook(HOOK)
        if hook is None:
            hook = Shared(before)
            registry.register_hook(hook, HOOK)
        hook.runs.append(run)
    try:
        yield
    finally:
        with LOCK:
            hook.runs.remove(run)
            if not hook.runs:
                _remove(registry, network, hook)


def _remove(registry: HookRegistry, network: nn.Module, hook: Shared) -> None:
    registry.remove_hook(HOOK, recurse=False)
    for left in {"forward", "_diffusers_hook"} - hook.before:  # remove_hook leaves both behind
        vars(network).pop(left, None)


@contextmanager
def wrapped_step(scheduler: Any, mine: Mine, step: Callable[..., Any]) -> Iterator[None]:
    """scheduler.step(...) is step(its original, ...) if the call is `mine`, under the original's signature, which
    pipelines read. Raises UserError for a scheduler that is in another run."""
    with LOCK:
        if id(scheduler) in BUSY:
            raise UserError(
                f"another run steps with the same {type(scheduler).__name__}: give each pipeline one of its own, as in"
                " scheduler.from_config(scheduler.config)"
            )
        BUSY.add(id(scheduler))
    before, original = vars(scheduler).get("step"), scheduler.step

    @functools.wraps(original)
    def stepped(*args: Any, **kwargs: Any) -> Any:
        return step(original, *args, **kwargs) if mine() else original(*args, **kwargs)

    scheduler.step = stepped
    try:
        yield
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before
        BUSY.discard(id(scheduler))
