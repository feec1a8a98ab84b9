"""The number of CPU threads: kept when a run is resumed, with advice where fewer would be faster.

The threads share each operation and wait for the slowest of them. If other processes use the same cores, one thread
often waits for its turn, and all others with it: two threads were then 4 to 20 times slower than one (docs/runs.md).
"""

import os
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dpo.system.console import log_message
from dpo.system.devices import device_name
from dpo.system.installation import COMMAND

ROUNDS = 5  # the first updates, after each of which all numbers of threads are timed in turn
ROWS = 256  # tokens of a timing
PRODUCTS = 16  # matrices of a timing, as wide as the model; far less work than an update
RATIO = 1.5  # times as fast as the run, to be advised; measured: 0.6 to 0.8 on an idle machine, 2 to 20 on a busy one
VARIABLES = ("MKL_NUM_THREADS", "OMP_NUM_THREADS")  # the first that is set is the number of threads that torch uses


class ThreadCheck:
    """Times the run's number of threads against smaller ones after each of the first updates, then advises once.

    It runs between updates and on separate tensors, so it changes nothing that the run computes. Several processes
    measure at the same time; the main one prints.
    """

    def __init__(self, counts: Sequence[int], time_with: Callable[[int], float], arguments: str):
        """counts: numbers of threads, that of the run first; time_with: measures the seconds with one of them."""
        self.time_with, self.arguments = time_with, arguments
        self.seconds: dict[int, list[float]] = {n: [] for n in counts}
        self.rounds_left = ROUNDS if len(counts) > 1 else 0

    @classmethod
    def of(cls, width: int, dtype: torch.dtype, device: torch.device, resumable: Path | None) -> "ThreadCheck":
        """Make a check for a model of this width; resumable is the run directory, or None if the run saves nothing."""
        can_switch = device.type == "cpu" and torch.backends.openmp.is_available()
        counts = halvings(torch.get_num_threads()) if can_switch else []
        arguments = "..." if resumable is None else f"resume={shlex.quote(str(resumable))}"
        return cls(counts, lambda n: time_products(n, width, dtype), arguments)

    def after_update(self) -> None:
        """Time each number of threads once, if rounds are left, and advise after the last one."""
        if not self.rounds_left:
            return
        self.rounds_left -= 1
        for n, seconds in self.seconds.items():
            seconds.append(self.time_with(n))
        if not self.rounds_left and (faster := fewer_threads(self.seconds)):
            log_message(advice(max(self.seconds), *faster, self.arguments))


def halvings(n: int) -> list[int]:
    """Halve n again and again, down to 1."""
    return [n >> i for i in range(n.bit_length())]


def fewer_threads(seconds: Mapping[int, Sequence[float]]) -> tuple[int, float] | None:
    """The fastest number of threads and its speedup over the largest number; None if none is clearly faster.

    Medians are compared, so that a short disturbance has no effect.
    """
    medians = {n: statistics.median(times) for n, times in seconds.items()}
    best = min(medians, key=lambda n: medians[n])
    ratio = medians[max(medians)] / medians[best]
    return (best, ratio) if ratio >= RATIO else None


def advice(n: int, best: int, ratio: float, arguments: str) -> str:
    """Word the advice to use `best` threads in place of n; arguments are those of train.py."""
    variable = variable_set() or VARIABLES[-1]
    threads = "1 thread is" if best == 1 else f"{best} threads are"
    return (
        f"Advice: {threads} {ratio:.1f} times as fast as the {n} of this run; other processes seem to use the same "
        f"cores. To switch, stop the run and start it again: {variable}={best} {COMMAND} {arguments} (numbers may "
        "round differently). To keep the numbers, set OMP_WAIT_POLICY=PASSIVE instead, which is slightly slower."
    )


def variable_set() -> str | None:
    """The environment variable that sets the number of threads, if one does."""
    return next((name for name in VARIABLES if os.environ.get(name)), None)


def time_products(n: int, width: int, dtype: torch.dtype) -> float:
    """Time products and activations with n threads, in seconds; afterwards torch has as many threads as before."""
    before = torch.get_num_threads()
    hidden, weight = torch.ones(ROWS, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    torch.set_num_threads(n)
    try:
        torch.nn.functional.silu(hidden @ weight)  # warms up
        start = time.perf_counter()
        for _ in range(PRODUCTS):
            torch.nn.functional.silu(hidden @ weight)
        return time.perf_counter() - start
    finally:
        torch.set_num_threads(before)


def set_threads(device: torch.device, recorded: Mapping[str, Any]) -> None:
    """Set the number of a CPU's threads for a run; recorded is the environment of the run that is resumed, if any.

    An environment variable overrides the recorded number, which is limited to torch's default here.
    The number is always set: otherwise MKL may use fewer threads for some products, and round them differently
    (mkl_set_dynamic).
    """
    if device.type != "cpu":
        return
    default = torch.get_num_threads()
    before = None if variable_set() else recorded_threads(recorded, device)
    n = min(before or default, default)
    if n != default:
        log_message(f"Number of threads: {n}, as before the stop; {VARIABLES[-1]}={default} uses all cores.")
    torch.set_num_threads(n)


def recorded_threads(recorded: Mapping[str, Any], device: torch.device) -> int | None:
    """Read the number of threads of a run that computed on such a device."""
    n = recorded.get("threads")
    is_same_device = recorded.get("device") == device_name(device)
    return n if type(n) is int and n > 0 and is_same_device else None
