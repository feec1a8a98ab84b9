"""Stopping and saving by signals. Imports nothing slow, so that a program can handle signals first of all."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from dpo.system.errors import EXIT_CODES, Stopped


class Signals:
    """Handles no signal: for a trainer that does not run under the command line."""

    stop: str | None = None  # the name of the signal that asked the run to stop

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Delay signals until the trainer polls them."""
        yield

    def pop_save(self) -> bool:
        """Whether a checkpoint was requested since the last call."""
        return False

    def check(self) -> None:
        """Raise Stopped if a signal asked the run to stop."""
        if self.stop is not None:
            raise Stopped(self.stop)


class ProcessSignals(Signals):
    """Takes SIGTERM, SIGINT and SIGHUP as a request to stop, and SIGUSR1 as a request for a checkpoint.

    Install it first thing in a program: until then SIGUSR1 kills. Before training begins, a request to stop takes
    effect at once, and a request for a checkpoint waits for the first update. A second SIGINT always stops at once. A
    signal that is ignored, as under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.waiting = self.save = False
        self.interrupts = 0

    @contextmanager
    def installed(self) -> Iterator["ProcessSignals"]:
        """Handle the process's signals inside the context; Python allows it in the main thread only."""
        handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        numbers = [number for number in handled if signal.getsignal(number) != signal.SIG_IGN]
        before = [signal.signal(number, self.handle) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record a signal; before training begins and at a second Ctrl-C, stop at once."""
        name = signal.Signals(number).name
        self.interrupts += name == "SIGINT"
        if name == "SIGUSR1":
            self.save = True
        elif not self.waiting or self.interrupts > 1:
            raise KeyboardInterrupt if name == "SIGINT" else SystemExit(EXIT_CODES[name])
        else:
            self.stop = self.stop or name
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"{name}: stopping after this update.\n".encode())  # print is not safe in a handler

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False

    def pop_save(self) -> bool:
        requested, self.save = self.save, False
        return requested
