"""Whose call it is that a hook sees: the attached pipeline's, its callback's, or another pipeline's."""

import functools
import inspect
import sys
import threading
from types import FrameType, FunctionType
from typing import Any

from diffusers import DiffusionPipeline


def is_called_by(pipe: Any, thread: int) -> bool:
    """Whether the present call comes from this pipeline's loop, not from another one that shares its parts, nor from
    its callback: by the innermost pipeline among the callers, or else, in a loop that is nobody's, by the thread."""
    frame: FrameType | None = sys._getframe(1)
    below = frame
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        if isinstance(owner, DiffusionPipeline):
            return owner is pipe and not _is_callback(frame, below)
        frame, below = frame.f_back, frame
    return threading.get_ident() == thread


def _is_callback(pipeline: FrameType, below: FrameType | None) -> bool:
    """Whether a pipeline's frame called its callback, in the frame `below`."""
    callback = _callback_in(pipeline)
    while isinstance(callback, functools.partial):
        callback = callback.func
    if callback is None or below is None:
        return False
    called = callback if inspect.isroutine(callback) else type(callback).__call__
    function = called.__func__ if inspect.ismethod(called) else called
    return isinstance(function, FunctionType) and below.f_code is function.__code__


def _callback_in(pipeline: FrameType) -> Any:
    """The callback that a pipeline was called with."""
    return pipeline.f_locals.get("callback_on_step_end") or pipeline.f_locals.get("callback")


def callback_of(pipe: Any) -> str:
    """The name of the callback that this pipeline was called with, which may change it between its steps."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        callback = _callback_in(frame)
        if callback is not None and frame.f_locals.get("self") is pipe:
            return f"its callback {callback.__qualname__ if inspect.isroutine(callback) else type(callback).__name__}"
        frame = frame.f_back
    return "other code"
