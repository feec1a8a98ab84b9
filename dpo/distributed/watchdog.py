"""What ends a rank whose neighbour has failed, died or stopped, though its main thread waits for that neighbour."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch.distributed.distributed_c10d import Store

from dpo.system.errors import EXIT_CODES, exit_code_of, print_errors, summarize_error

INTERVAL = 0.5  # seconds between two signs of life
PATIENCE = 15.0  # seconds without a sign of life after which a rank counts as stopped
GRACE = 8.0  # seconds that the main thread has to end by itself after a failure
COLLECTIVE = re.compile(r"gloo|NCCL|onnection (closed|reset|refused)|Broken pipe|[Pp]rocess ?[Gg]roup")


class Failure(NamedTuple):
    """The first failure of any rank, and the exit code of all of them."""

    rank: int
    cause: str
    code: int


class Watchdog:
    """A thread that gives signs of life, and watches for those of the next rank and for a failure of any.

    Ranks watch each other in a ring, so that the work does not grow with their number. The first failure is kept in the
    store that all ranks share; if that is gone, so is the machine, or torchrun, that kept it.
    """

    def __init__(self, store: Store, rank: int, world_size: int, hosts: bool):
        """Start the thread; hosts: whether the store ends with this process."""
        self.store, self.rank, self.world_size, self.hosts = store, rank, world_size, hosts
        self.watched = (rank + 1) % world_size
        self.closing, self.failed = threading.Event(), threading.Event()
        self.failure: Failure | None = None
        self.seen, self.seen_at = b"", time.monotonic()
        self.looked_at = time.monotonic()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        threading.Thread(target=self.watch_store, daemon=True).start()

    @property
    def exit_code(self) -> int:
        """The exit code of all ranks once one has failed."""
        return EXIT_CODES["rank"] if self.failure is None else self.failure.code

    def close(self) -> None:
        """Stop watching, before a rank may exit."""
        self.closing.set()
        self.thread.join()

    def fail(self, error: BaseException, delay: float) -> bool:
        """Publish that this rank failed; return whether it was the first, and so is the one to print why.

        After delay seconds, so that of an error that all ranks meet the main rank's is printed. Where another rank's
        end made a collective fail, wait for what the thread finds about that.
        """
        is_collective = isinstance(error, RuntimeError) and COLLECTIVE.search(str(error))
        self.failed.wait(PATIENCE + 5 if is_collective else delay)
        own = Failure(self.rank, summarize_error(error), exit_code_of(error))
        is_first = self.failure is None and self.publish(own)
        if self.hosts:
            self.await_others()
        return is_first

    def await_others(self) -> None:
        """Wait, not long, until the other ranks know of the failure."""
        end = time.monotonic() + 4 * INTERVAL
        with suppress(RuntimeError):
            while self.store.add("seen", 0) < self.world_size - 1 and time.monotonic() < end:
                time.sleep(INTERVAL / 10)

    def publish(self, failure: Failure) -> bool:
        """Publish a failure unless there is one already; return whether there was none."""
        try:
            first = json.loads(self.store.compare_set("failure", "", json.dumps(failure)))
        except RuntimeError:  # the store is gone
            first = list(failure)
        self.failure = Failure(*first)
        self.failed.set()
        return self.failure == failure

    def run(self) -> None:
        """Watch until this rank is done; if another one fails first, end this process."""
        beat = 0
        while not self.closing.wait(INTERVAL):
            beat += 1
            try:
                self.store.set(f"alive-{self.rank}", f"{beat} {os.getpid()} {socket.gethostname()}")
                self.look()
                self.looked_at = time.monotonic()
            except RuntimeError as error:
                if not self.closing.is_set():
                    self.report(Failure(self.rank, f"the store of all ranks is gone ({summarize_error(error)})", 7))
            if self.failure is not None and not self.closing.is_set():
                time.sleep(GRACE)  # the main thread ends by itself, unless it waits for a rank that is gone
                sys.stderr.flush()
                os._exit(self.failure.code)

    def watch_store(self) -> None:
        """End this process where the store does not respond, as one on a machine without power does not."""
        while not self.closing.wait(INTERVAL):
            if self.failure is None and time.monotonic() - self.looked_at > PATIENCE:
                print_errors([f"rank {self.rank}: the store of all ranks gave no response for {PATIENCE:.0f} s"])
                sys.stderr.flush()
                os._exit(EXIT_CODES["rank"])

    def look(self) -> None:
        """Look for a failure: one that was published, or of the rank that this one watches."""
        if self.store.check(["failure"]):
            self.failure = Failure(*json.loads(self.store.get("failure")))
            self.store.add("seen", 1)
            self.failed.set()
            return
        name = f"alive-{self.watched}"
        found = self.store.get(name) if self.store.check([name]) else b""
        now = time.monotonic()
        if found != self.seen:
            self.seen, self.seen_at = found, now
        if not found:
            return
        _, pid, host = found.decode().split(" ", 2)
        is_local = host == socket.gethostname()
        state = process_state(int(pid)) if is_local else None
        where = f"process {pid} on {host}"
        if is_local and state in ("", "Z", "X"):
            cause = f"{where} is gone; it was killed, perhaps by the kernel for lack of memory"
            self.report(Failure(self.watched, cause, EXIT_CODES["rank"]))
        elif now - self.seen_at > PATIENCE:
            self.report(Failure(self.watched, f"{where} gave no sign of life for {PATIENCE:.0f} s", EXIT_CODES["rank"]))
            if is_local:
                os.kill(int(pid), signal.SIGKILL)  # a process that was stopped obeys nothing else

    def report(self, failure: Failure) -> None:
        """Publish a failure that this rank found, and print it if it is the first."""
        if self.publish(failure):
            print_errors([f"rank {failure.rank}: {failure.cause}; all ranks end"])


def process_state(pid: int) -> str | None:
    """Return the letter of a process's state (Z: dead, T: stopped), "" if there is none, None where that is unknown."""
    if not Path("/proc/self/stat").exists():
        return None
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
