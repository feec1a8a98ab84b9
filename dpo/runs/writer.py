"""Writes checkpoints while training waits, or in the background from a copy in host memory."""

import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dpo.distributed.ranks import Ranks
from dpo.runs.checkpoints import save_checkpoint
from dpo.runs.shards import save_shards
from dpo.settings.schema import Settings
from dpo.system.console import log_message
from dpo.system.errors import Stopped, actionable_errors, exit_code_of, summarize_error
from dpo.system.state import copy_to_host

SAVING = "while saving a checkpoint; background_saves=false makes no copy of it in memory"
FAILURE_TIMEOUT = 15.0  # seconds that a failed rank waits for a checkpoint before it exits


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time; in the background, a thread on every rank writes from a copy.

    As a context manager, it waits on exit for a checkpoint that is being written.
    """

    def __init__(self, path: Path, ranks: Ranks, settings: Settings):
        self.in_background = settings.background_saves
        self.path, self.ranks = path, ranks.with_own_group() if self.in_background else ranks
        self.keep = (settings.keep_checkpoints, settings.keep_policies)
        self.gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def write(
        self,
        step: int,
        states: dict[str, Any],
        metrics: dict[str, float],
        best: int | None = None,
        good: int | None = None,
        *,
        blocking: bool = False,
    ) -> None:
        """Write a checkpoint after the previous one; in the background, return once the states are copied.

        best and good are steps as in save_checkpoint. RunError if this or the previous one cannot be written.
        """
        self.wait()
        if blocking or not self.in_background:
            log_message(f"Wrote {self.save(step, states, metrics, best, good)}")
            return
        states = copy_to_host(states, {})
        self.thread = threading.Thread(target=self.run, args=(step, states, metrics, best, good), daemon=True)
        self.thread.start()

    def save(
        self, step: int, states: dict[str, Any], metrics: dict[str, float], best: int | None, good: int | None
    ) -> Path:
        """Write a checkpoint, with each rank's shards if there are any, and return its folder."""
        with actionable_errors(SAVING):
            if "shards" in states:
                folder = self.path / ".staging-shards"
                digests = save_shards(states["shards"], folder, self.ranks)
                states = states | {"shards": folder, "digests": digests}
            write = partial(save_checkpoint, self.path, step, states, metrics, *self.keep, best, good)
            return self.ranks.run_on_main(write)

    def run(
        self, step: int, states: dict[str, Any], metrics: dict[str, float], best: int | None, good: int | None
    ) -> None:
        start = time.monotonic()
        if self.gpu is not None:
            torch.cuda.set_device(self.gpu)  # a new thread starts with the first one
        try:
            folder = self.save(step, states, metrics, best, good)
            log_message(f"Wrote {folder} in {time.monotonic() - start:.1f} s in the background")
        except BaseException as error:
            self.error = error  # raised in the main thread

    def check(self) -> None:
        """Raise an error of the background thread, without waiting for it."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the background thread, at most timeout seconds, and raise its error."""
        if self.thread is not None:
            self.thread.join(timeout)
            self.thread = None
        self.check()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Stopped):
            self.wait()
        elif isinstance(error, Exception):
            try:
                self.wait(None if self.ranks.world_size == 1 else FAILURE_TIMEOUT)
            except Exception as other:  # training's own error is the one to raise
                log_message(summarize_error(other))
        elif self.thread is not None and self.thread.is_alive():  # a second Ctrl-C
            sys.stdout.flush()
            os._exit(exit_code_of(error))  # exiting normally may abort while torch's thread runs
