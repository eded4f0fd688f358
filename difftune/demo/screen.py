"""What a person sees of a long job: a line for each stage that is done, and one bar of the stage that runs."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

CLEAR = "\r\x1b[K"
THEIRS = "Loading"  # first word of other libraries' loading bars
UP = "\x1b[A"  # cursor-up, written by a nested progress bar


class Screen(io.TextIOBase):
    """Stands for stderr and stdout. On a terminal it shows the newest bar; all else that is written goes to `log`."""

    def __init__(self, terminal: TextIO, log: TextIO):
        self.terminal, self.log = terminal, log
        self.begun = False  # whether a log line is unfinished

    def write(self, text: str) -> int:
        bar = text.strip("\n")
        if bar.startswith("\r"):
            if self.isatty() and not bar.strip().startswith(THEIRS):
                self.terminal.write(bar)
                self.terminal.flush()
        else:
            self.note(text.replace(UP, ""))
        return len(text)

    def note(self, text: str) -> None:
        """Write to the log, without the empty lines that bars leave."""
        if text.strip("\n") or self.begun:
            self.log.write(text)
            self.begun = not text.endswith("\n")

    def line(self, text: str) -> None:
        """A line that stays, in place of the bar."""
        self.terminal.write(f"{CLEAR if self.isatty() else ''}{text}\n")
        self.terminal.flush()
        self.note(f"{text}\n")

    def isatty(self) -> bool:
        return self.terminal.isatty()

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        self.log.flush()

    def fileno(self) -> int:
        return self.terminal.fileno()


@contextmanager
def shown(log: TextIO) -> Iterator[Screen]:
    """Inside, only the screen reaches the terminal; other output goes to the log, and logging up to WARNING is switched
    off.
    """
    screen, before = Screen(sys.stderr, log), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(screen), redirect_stdout(screen):
            yield screen
    finally:
        logging.disable(before)
        if screen.isatty():
            screen.terminal.write(CLEAR)
