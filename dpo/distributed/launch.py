"""Starts the processes of a run on this machine, through torchrun's launcher."""

import inspect
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from dpo.system.console import log_message
from dpo.system.errors import EXIT_CODES, print_errors

SHUTDOWN_TIMEOUT = 600  # seconds between a signal and the kill: the ranks write a checkpoint in between


def count_processes(n_processes: int | str, device: str) -> int:
    """Resolve n_processes: auto means one per visible GPU, or one on a CPU."""
    if n_processes != "auto":
        return int(n_processes)
    return max(1, torch.cuda.device_count()) if device in ("auto", "cuda") else 1


def launch(script: Path, arguments: Sequence[str], n_processes: int) -> None:
    """Run a script in n_processes that form a group, and return when all are done.

    SystemExit with the code of the process that failed first; if a signal killed it, the signal is named.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks print what is wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_processes)))
    log_message(f"Starting {n_processes} processes on this machine.")
    config = make_config(n_processes)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, forward)
    try:
        launch_agent(config, sys.executable, [str(script), *arguments])
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0:
            print_errors([f"rank {rank}: was killed by {signal.Signals(-first.exitcode).name}"])
        sys.exit(first.exitcode if first.exitcode > 0 else EXIT_CODES["rank"])
    except SignalException as error:
        sys.exit(128 + error.sigval)


def make_config(n_processes: int) -> LaunchConfig:
    """Configure n_processes on this machine, with SHUTDOWN_TIMEOUT where this version of torch supports it."""
    options: dict[str, Any] = {}
    if "shutdown_timeout" in inspect.signature(LaunchConfig).parameters:
        options["shutdown_timeout"] = SHUTDOWN_TIMEOUT
    else:  # torch 2.11
        log_message(f"torch {torch.__version__} kills the processes 30 seconds after a signal, even while saving.")
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n_processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
        **options,
    )


def forward(number: int, frame: FrameType | None) -> None:
    """Forward a signal to one of the processes; the ranks tell each other."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    for pid in children.read_text().split()[:1] if children.exists() else ():
        os.kill(int(pid), number)
