"""What SIGTERM, SIGHUP and Ctrl-C do. Imports nothing heavy: a command may be stopped while it loads."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP


def leave(number: int) -> None:
    """End as a shell expects after a signal: 130 by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextmanager
def ending() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process at once, but in order: what it holds is put back on the way out.

    Around a command, for as long as no step is under way: while it loads, and while it writes.
    """

    def end(number: int, frame: Any) -> None:
        print(f"difftune: stopped by {signal.Signals(number).name}", file=sys.stderr)
        leave(number)

    with handling(end, *ENDING):
        yield


@contextmanager
def handling(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Inside, `handler` gets these signals: all but those that were ignored, as under `nohup`, and only in the main
    thread."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.getsignal(n) for n in numbers if n == signal.SIGINT or not ignored(n)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def ignored(number: int) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN
