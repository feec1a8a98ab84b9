"""Maps a function over items on all cores; the worker processes never outlive the process that started them."""

import gc
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from dpo.system.console import log_message

T = TypeVar("T")
R = TypeVar("R")

MAX_PROCESSES = 16
FASTER = 0.7  # workers help if they need at most this share of the time
function: Callable[[Any], Any]  # what a worker calls; sent to it once, since a tokenizer has megabytes


def map_on_all_cores(work: Callable[[T], R], items: Iterable[T], n_alone: int, name: str) -> Iterator[R]:
    """Yield work(item) for each item, in order; after the first n_alone items, workers help if that is faster.

    Workers take seconds to start. They are of no use where the threads of the work already use all cores. work and
    items must be picklable. name is the subject of a message about killed workers.
    """
    remaining = iter(items)
    wall, cpu = 0.0, 0.0
    for item in islice(remaining, n_alone):
        wall, cpu = wall - time.perf_counter(), cpu - time.process_time()
        result = work(item)
        wall, cpu = wall + time.perf_counter(), cpu + time.process_time()
        yield result
    first = list(islice(remaining, 1))
    n = min(MAX_PROCESSES, count_cores())
    if not first or cpu / n >= FASTER * wall:
        yield from map(work, chain(first, remaining))
        return
    pool = ProcessPoolExecutor(n, get_context("spawn"), initializer=start_process, initargs=(work,))
    waiting: deque[T] = deque()
    futures: deque[Future[R]] = deque()
    try:
        for item in chain(first, remaining):
            waiting.append(item)
            with signals_blocked():  # workers that start here never get signals
                futures.append(pool.submit(call, item))
            while len(waiting) > n + 2:
                yield futures.popleft().result()
                waiting.popleft()
        while waiting:
            yield futures.popleft().result()
            waiting.popleft()
    except BrokenProcessPool:  # memory was full, or a script without __name__ == "__main__" ran again in each worker
        log_message(f"{name}: the worker processes were killed, so one process does the rest.")
        yield from map(work, chain(list(waiting), remaining))
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the items in work


def count_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM here, and for good in the processes that start meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection, which takes a quarter of the time where millions of objects are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def start_process(work: Callable[[Any], Any]) -> None:
    """Set up a worker: it ends with its parent, and its tokenizer starts no threads, since all cores have workers."""
    global function
    function = work
    gc.disable()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    watch_parent()


def watch_parent() -> None:
    """End this process when the one that started it has ended, however that was."""
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def call(item: Any) -> Any:
    return function(item)
