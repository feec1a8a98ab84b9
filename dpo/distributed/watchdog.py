"""Ends this process when another rank has failed, died or stopped, even while the main thread waits for that rank."""

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

HEARTBEAT_INTERVAL = 0.5  # seconds
HEARTBEAT_TIMEOUT = 15.0  # seconds without a heartbeat after which a rank counts as stopped
GRACE_PERIOD = 8.0  # seconds after a failure in which the main thread may exit normally
COLLECTIVE = re.compile(r"gloo|NCCL|onnection (closed|reset|refused)|Broken pipe|[Pp]rocess ?[Gg]roup")


class Failure(NamedTuple):
    """The first failure of any rank, and the exit code of all of them."""

    rank: int
    cause: str
    code: int


class Watchdog:
    """A thread that sends heartbeats, and polls those of the next rank and the first failure of any rank.

    Ranks watch each other in a ring, so that the work of each does not grow with their number. The store that all ranks
    share keeps the first failure. If the store is gone, so is the machine or the torchrun that hosted it.
    """

    def __init__(self, store: Store, rank: int, world_size: int, hosts_store: bool):
        """Start the thread; hosts_store: whether the store ends with this process."""
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.hosts_store = hosts_store
        self.watched = (rank + 1) % world_size
        self.closing = threading.Event()
        self.failed = threading.Event()
        self.failure: Failure | None = None
        self.last_heartbeat = b""  # of the watched rank
        self.heartbeat_time = time.monotonic()
        self.poll_time = time.monotonic()  # when the store last answered
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        threading.Thread(target=self.watch_store, daemon=True).start()

    @property
    def exit_code(self) -> int:
        """The code with which all ranks exit once one has failed."""
        return EXIT_CODES["rank"] if self.failure is None else self.failure.code

    def close(self) -> None:
        """Stop watching, before a rank may exit."""
        self.closing.set()
        self.thread.join()

    def fail(self, error: BaseException, delay: float) -> bool:
        """Publish that this rank failed; return whether it was the first to fail, which prints the reason.

        Waits for delay seconds first: with a delay on all ranks but the main one, an error that all ranks raise is
        printed by the main rank. A failed collective waits longer: the thread may find that another rank's end caused
        it.
        """
        is_collective = isinstance(error, RuntimeError) and COLLECTIVE.search(str(error))
        self.failed.wait(HEARTBEAT_TIMEOUT + 5 if is_collective else delay)
        failure = Failure(self.rank, summarize_error(error), exit_code_of(error))
        is_first = self.failure is None and self.publish(failure)
        if self.hosts_store:
            self.await_others()
        return is_first

    def await_others(self) -> None:
        """Wait a few heartbeats until the other ranks know of the failure."""
        end = time.monotonic() + 4 * HEARTBEAT_INTERVAL
        with suppress(RuntimeError):
            while self.store.add("seen", 0) < self.world_size - 1 and time.monotonic() < end:
                time.sleep(HEARTBEAT_INTERVAL / 10)

    def publish(self, failure: Failure) -> bool:
        """Publish a failure unless one is published already; return whether this one is the first."""
        try:
            first = json.loads(self.store.compare_set("failure", "", json.dumps(failure)))
        except RuntimeError:  # the store is gone
            first = list(failure)
        self.failure = Failure(*first)
        self.failed.set()
        return self.failure == failure

    def run(self) -> None:
        """Watch until this rank is done; if another one fails first, end this process."""
        n_heartbeats = 0
        while not self.closing.wait(HEARTBEAT_INTERVAL):
            n_heartbeats += 1
            try:
                self.store.set(f"alive-{self.rank}", f"{n_heartbeats} {os.getpid()} {socket.gethostname()}")
                self.poll()
                self.poll_time = time.monotonic()
            except RuntimeError as error:
                if not self.closing.is_set():
                    cause = f"the store of all ranks is gone ({summarize_error(error)})"
                    self.report(Failure(self.rank, cause, EXIT_CODES["rank"]))
            if self.failure is not None and not self.closing.is_set():
                time.sleep(GRACE_PERIOD)  # the main thread exits, unless it waits for a rank that is gone
                sys.stderr.flush()
                os._exit(self.failure.code)

    def watch_store(self) -> None:
        """End this process if the store stops responding, as it does when its machine loses power."""
        while not self.closing.wait(HEARTBEAT_INTERVAL):
            if self.failure is None and time.monotonic() - self.poll_time > HEARTBEAT_TIMEOUT:
                seconds = f"{HEARTBEAT_TIMEOUT:.0f} s"
                print_errors([f"rank {self.rank}: the store of all ranks gave no response for {seconds}"])
                sys.stderr.flush()
                os._exit(EXIT_CODES["rank"])

    def poll(self) -> None:
        """Check for a published failure, and for a failure of the rank that this one watches."""
        if self.store.check(["failure"]):
            self.failure = Failure(*json.loads(self.store.get("failure")))
            self.store.add("seen", 1)
            self.failed.set()
            return
        name = f"alive-{self.watched}"
        heartbeat = self.store.get(name) if self.store.check([name]) else b""
        now = time.monotonic()
        if heartbeat != self.last_heartbeat:
            self.last_heartbeat = heartbeat
            self.heartbeat_time = now
        if not heartbeat:
            return
        _, pid, host = heartbeat.decode().split(" ", 2)
        is_local = host == socket.gethostname()
        state = process_state(int(pid)) if is_local else None
        where = f"process {pid} on {host}"
        if is_local and state in ("", "Z", "X"):
            cause = f"{where} is gone; it was killed, perhaps by the kernel for lack of memory"
            self.report(Failure(self.watched, cause, EXIT_CODES["rank"]))
        elif now - self.heartbeat_time > HEARTBEAT_TIMEOUT:
            cause = f"{where} sent no heartbeat for {HEARTBEAT_TIMEOUT:.0f} s"
            self.report(Failure(self.watched, cause, EXIT_CODES["rank"]))
            if is_local:
                os.kill(int(pid), signal.SIGKILL)  # a process that was stopped obeys nothing else

    def report(self, failure: Failure) -> None:
        """Publish a failure that this rank found, and print it if it is the first."""
        if self.publish(failure):
            print_errors([f"rank {failure.rank}: {failure.cause}; all ranks end"])


def process_state(pid: int) -> str | None:
    """Read the letter of a process's state (Z: dead, T: stopped): "" if there is no such process, None if unknown."""
    if not Path("/proc/self/stat").exists():
        return None
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
