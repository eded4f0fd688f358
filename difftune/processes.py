"""The processes that were launched together: who speaks, and how a signal ends all of them after a whole step."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from difftune.errors import RunError
from difftune.signals import ENDING, handling, leave


def process() -> PartialState:
    """This process among those that were launched together; accelerate joins those on CPUs only if it is told.

    One that waits while another judges or writes does so for a day.
    """
    return PartialState(cpu=on_cpu(), timeout=timedelta(days=1))


def on_cpu() -> bool:
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def gathered(value: Any) -> list[Any]:
    """Each process's value, in every process. Raises RunError if one of them has ended."""
    try:
        return gather_object([value])
    except RuntimeError as error:
        raise RunError(
            "another of the processes that were launched together has ended, and with it its share of the work: begin "
            "again, or go on from what was saved"
        ) from error


class Stop:
    """The signal that asked for the end, or 0."""

    number: int = 0

    def leave(self, step: int) -> None:
        say_once(f"stopped by {signal.Signals(self.number).name} after step {step}, which is saved")
        leave(self.number)


def agree_to_stop(stop: Stop) -> int:
    """The signal that asked any of the processes for the end, or 0, told at the same step to all.

    One that left alone would leave the others waiting for it. A signal that comes meanwhile is for the next step.
    """
    if process().num_processes == 1:
        return stop.number
    found = max(gathered(stop.number))
    stop.number = found or stop.number
    return found


@contextmanager
def stopping() -> Iterator[Stop]:
    """SIGTERM, SIGHUP and the first Ctrl-C raise a flag, so that the step under way is finished; a second Ctrl-C ends
    it."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if number == signal.SIGINT and stop.number:
            raise KeyboardInterrupt
        stop.number = number

    with handling(ask, signal.SIGINT, *ENDING):
        yield stop


def say_once(text: str) -> None:
    """Print a line to stderr, by the main process alone: stdout is for results."""
    if process().is_main_process:
        print(text, file=sys.stderr)
