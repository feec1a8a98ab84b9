"""One of several processes, started by torchrun or by anything else that sets torchrun's environment variables.

`ProcessGroup` implements `Ranks` (ranks.py); `joined` enters and leaves it.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dpo.distributed.launch import count_processes
from dpo.distributed.ranks import ALONE, Ranks
from dpo.distributed.rendezvous import agree_on_start
from dpo.distributed.watchdog import Watchdog
from dpo.settings.schema import Settings
from dpo.system.console import log_message
from dpo.system.devices import pick_device
from dpo.system.errors import RunError, Stopped, UserError, print_errors, summarize_error
from dpo.system.signals import Signals

T = TypeVar("T")


class ProcessGroup(Ranks):
    """One of several processes that train one model."""

    def __init__(self, device: torch.device, timeout: timedelta):
        """Join the processes that torchrun's environment variables name; call it once per process."""
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.is_main = self.rank == 0
        if device.type == "cuda":
            local_rank, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local_rank >= n_gpus:
                raise UserError(
                    f"device=cuda: this machine has {n_gpus} GPUs, but at least "
                    f"{local_rank + 1} processes; start {n_gpus} or fewer"
                )
            torch.cuda.set_device(local_rank)
        hosts_store = self.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = TCPStore(address, port, is_master=hosts_store, timeout=timeout, wait_for_workers=False)
        prefix = agree_on_start(self.store, self.rank, self.world_size, timeout.total_seconds())
        watched = TCPStore(address, port, is_master=False, timeout=timeout)  # for its thread
        self.watchdog = Watchdog(PrefixStore(prefix, watched), self.rank, self.world_size, hosts_store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = PrefixStore(f"{prefix}/group", self.store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout)
        self.device_type, self.timeout = device.type, timeout
        self.init_mesh(replicate=1)

    def init_mesh(self, replicate: int, tensor: int = 1) -> None:
        """Lay the ranks out in a mesh: `replicate` sharded copies of a model (HSDP), split over `tensor` ranks each.

        The product of both must divide the number of ranks.
        """
        shape = (replicate, self.world_size // (replicate * tensor), tensor)
        names = ("replicate", "shard", "tensor")
        self.mesh: DeviceMesh = init_device_mesh(self.device_type, shape, mesh_dim_names=names)
        self.data_rank, self.data_size = self.rank // tensor, self.world_size // tensor

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        self.gather(None)

    def run_on_main(self, work: Callable[[], T]) -> T:
        result: list[Any] = [None]
        if self.is_main:
            result = [work()]  # a failure ends the main thread there, whose watchdog then ends the ranks that wait here
        dist.broadcast_object_list(result, src=0, group=self.group)
        return result[0]

    def broadcast_from_main(self, work: Callable[[], T], to_send: Callable[[T], T]) -> T:
        results: list[T] = []

        def send() -> T:
            results.append(work())
            return to_send(results[0])

        received = self.run_on_main(send)
        return results[0] if self.is_main else received

    def with_own_group(self) -> Self:
        other = copy.copy(self)
        other.group = dist.new_group(backend="gloo", timeout=self.timeout)
        return other

    def keep_first(self, name: str, value: str) -> tuple[str, bool]:
        def read_or_set() -> tuple[str, bool]:
            if self.store.check([name]):
                return self.store.get(name).decode(), True
            self.store.set(name, value)
            return value, False

        return self.run_on_main(read_or_set)

    def close(self) -> None:
        """Leave the group once every rank is done; no rank exits before all have stopped watching it."""
        self.barrier()
        self.watchdog.close()
        self.barrier()
        dist.destroy_process_group()


class SynchronizedSignals(Signals):
    """Signals to any rank, on which all ranks act after the same update."""

    def __init__(self, signals: Signals, ranks: Ranks):
        self.signals, self.ranks = signals, ranks
        self.is_fresh = self.save = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        with self.signals.deferred():
            yield

    def exchange(self) -> None:
        """Learn from all ranks whether to stop, and whether to write a checkpoint."""
        requests = self.ranks.gather((self.signals.pop_save(), self.signals.stop))
        stops = {rank: name for rank, (_, name) in enumerate(requests) if name}
        if stops and self.stop is None:
            self.stop = next(iter(stops.values()))
            log_message(f"{self.stop} on rank {', '.join(map(str, stops))}: all ranks stop.")
        self.save = self.save or any(save for save, _ in requests)

    def pop_save(self) -> bool:
        self.exchange()
        self.is_fresh = True
        requested, self.save = self.save, False
        return requested

    def check(self) -> None:
        if not self.is_fresh:  # right after pop_save: a signal in between would end the run without the checkpoint
            self.exchange()
        self.is_fresh = False
        super().check()


def synchronize(signals: Signals, ranks: Ranks) -> Signals:
    """Let all ranks act on signals at the same point of the run."""
    return SynchronizedSignals(signals, ranks) if ranks.world_size > 1 else signals


def check_same(fingerprints: Mapping[str, str], ranks: Ranks) -> None:
    """Raise UserError if the fingerprints of what a rank has read are not the same on all ranks."""
    first, *others = ranks.gather(dict(fingerprints))
    for rank, other in enumerate(others, start=1):
        for name, fingerprint in other.items():
            if fingerprint != first[name]:
                raise UserError(f"{name}: not the same on rank {rank} as on rank 0; give every machine the same files")


def join(settings: Settings) -> Ranks:
    """Join the other processes, if the trainer needs several; a dry run needs only one."""
    if settings.trainer == "BasicTrainer" or settings.dry_run:
        return ALONE
    ranks = ProcessGroup(pick_device(settings.device), timedelta(seconds=settings.collective_timeout))
    init_mesh(ranks, settings)
    return ranks


def init_mesh(ranks: ProcessGroup, settings: Settings) -> None:
    """Arrange the ranks in a mesh as settings ask; UserError if their number does not allow it."""
    ranks.init_mesh(*mesh_sizes(settings, ranks.world_size))


def mesh_sizes(settings: Settings, world_size: int) -> tuple[int, int]:
    """Resolve the settings of the mesh to (replicate, tensor); UserError if the number of ranks does not allow them."""
    tensor = tensor_size(settings)
    replicate = world_size if settings.ddp else settings.replicate
    if world_size % (replicate * tensor):
        product = f"tensor_parallel={tensor} replicate={replicate}"
        raise UserError(f"{product}: their product must divide the number of processes, {world_size}")
    n = world_size // tensor
    if settings.batch_size < n:
        raise UserError(
            f"batch_size={settings.batch_size}: each of {n} groups of processes needs an example of every batch; "
            f"set it to {n} or more"
        )
    return replicate, tensor


def tensor_size(settings: Settings) -> int:
    """Resolve tensor_parallel to the number of ranks that compute each layer together; auto: those of a machine."""
    if settings.trainer != "TensorParallelTrainer":
        return 1
    if settings.tensor_parallel != "auto":
        return int(settings.tensor_parallel)
    if settings.dry_run:
        return count_processes(settings.n_processes, settings.device)
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def joined(make: Callable[[], Ranks]) -> Iterator[Ranks]:
    """Join the other ranks, and end together: when all are done, or when one has failed.

    The rank that fails first prints the reason. The others exit with its code.
    """
    ranks = make()
    if not isinstance(ranks, ProcessGroup):
        yield ranks
        return
    try:
        yield ranks
        ranks.close()
    except Stopped:  # on all ranks at once
        ranks.close()
        raise
    except BaseException as error:
        if ranks.watchdog.fail(error, delay=0.0 if ranks.is_main else 0.5):
            if not isinstance(error, (UserError, RunError, KeyboardInterrupt, SystemExit)):
                print_errors([f"rank {ranks.rank}: {type(error).__name__}: {summarize_error(error)}; all ranks end"])
            raise
        time.sleep(0.2)  # so that what the failed rank prints comes before what torchrun prints of this one
        raise SystemExit(ranks.watchdog.exit_code) from None
