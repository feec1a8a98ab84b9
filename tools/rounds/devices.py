"""Work that is split over the devices of the run, each with a process of its own."""

import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from signal import Signals

import torch

from dpo.distributed.launch import count_processes
from dpo.settings.schema import Settings
from dpo.system.devices import compute_dtype, float32_products, limit_onednn_cache, pick_device, read_facts
from dpo.system.errors import EXIT_CODES, exit_on_error, print_errors
from dpo.system.processes import count_cores, watch_parent

Share = Callable[[int, int, str], None]  # of a rank, of the number of ranks, on a device


def devices_of(settings: Settings) -> list[str]:
    """The devices to sample and score on, as many as there are processes that train."""
    if settings.trainer == "BasicTrainer":
        return [settings.device]
    n = count_processes(settings.n_processes, settings.device)
    on_gpus = settings.device != "cpu" and torch.cuda.is_available()
    return [f"cuda:{rank}" for rank in range(n)] if on_gpus else ["cpu"] * n


def split_over(settings: Settings, n_most: int | None, work: Share) -> None:
    """Call work once per device: here if there is one, else in a process for each. work must be picklable.

    n_most is the number of devices at most; None: all. SystemExit with the code of the first process that failed; the
    others are ended.
    """
    devices = devices_of(settings)[:n_most]
    n = len(devices)
    if n == 1:
        set_numerics(settings, devices[0])
        return work(0, 1, devices[0])
    context = get_context("spawn")
    arguments = [(settings, work, rank, n, device) for rank, device in enumerate(devices)]
    processes = [context.Process(target=run_share, args=each) for each in arguments]
    for process in processes:
        process.start()
    waiting = list(processes)
    try:
        while waiting:
            ended = wait([process.sentinel for process in waiting])
            for process in [process for process in waiting if process.sentinel in ended]:
                check_exit(process)
                waiting.remove(process)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def check_exit(process: BaseProcess) -> None:
    """SystemExit with the code of a process that has failed; one that a signal killed is reported."""
    process.join()
    code = process.exitcode or 0
    if code < 0:
        print_errors([f"{process.name}: was killed by {Signals(-code).name}"])
    if code:
        sys.exit(code if code > 0 else EXIT_CODES["rank"])


def run_share(settings: Settings, work: Share, rank: int, n: int, device: str) -> None:
    watch_parent()
    if device == "cpu":
        torch.set_num_threads(max(1, count_cores() // n))
    set_numerics(settings, device)
    exit_on_error(lambda: work(rank, n, device))


def set_numerics(settings: Settings, device: str) -> None:
    """Set what the rounding of all stages depends on, so that it is the same whichever of them ran in this process."""
    limit_onednn_cache()
    place = pick_device(device)
    if compute_dtype(settings.compute_precision, getattr(torch, settings.model.policy_dtype), place) == torch.float32:
        torch.set_float32_matmul_precision(float32_products(read_facts(place)))
