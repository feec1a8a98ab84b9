"""One process of several that torchrun, or anything else that sets torchrun's environment variables, has started.

`ProcessGroup` does what `Ranks` (ranks.py) promises; `joined` enters the group of a run and leaves it.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dpo.data.examples import TokenizedExample
from dpo.distributed.launch import count_processes
from dpo.distributed.ranks import ALONE, Pass, Ranks
from dpo.distributed.rendezvous import agree_on_start
from dpo.distributed.sharding import copy_shards, without_weights
from dpo.distributed.stragglers import LayerClock, StragglerWatch
from dpo.distributed.watchdog import Watchdog
from dpo.model.packing import Packer, balance
from dpo.settings.schema import Settings
from dpo.system.console import log_message
from dpo.system.devices import pick_device
from dpo.system.errors import RunError, Stopped, UserError, print_errors, summarize_error
from dpo.system.signals import Signals

T = TypeVar("T")
M = TypeVar("M", bound=torch.nn.Module)


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
                    f"device=cuda: this machine has {n_gpus} GPUs, and one of its processes is number "
                    f"{local_rank + 1}; start {n_gpus} or fewer"
                )
            torch.cuda.set_device(local_rank)
        hosts = self.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = TCPStore(address, port, is_master=hosts, timeout=timeout, wait_for_workers=False)
        prefix = agree_on_start(self.store, self.rank, self.world_size, timeout.total_seconds())
        watched = TCPStore(address, port, is_master=False, timeout=timeout)  # for its thread
        self.watchdog = Watchdog(PrefixStore(prefix, watched), self.rank, self.world_size, hosts)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = PrefixStore(f"{prefix}/group", self.store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout)
        self.device_type, self.timeout = device.type, timeout
        self.clock, self.stragglers = LayerClock(device), StragglerWatch()
        self.arrange(replicate=1)

    def arrange(self, replicate: int, tensor: int = 1) -> None:
        """Let the ranks hold `replicate` sharded copies of a model (HSDP), and `tensor` of them compute it together.

        The product of both must divide the number of ranks.
        """
        shape = (replicate, self.world_size // (replicate * tensor), tensor)
        names = ("replicate", "shard", "tensor")
        self.mesh: DeviceMesh = init_device_mesh(self.device_type, shape, mesh_dim_names=names)
        self.tensor_size = tensor
        self.data_rank, self.data_size = self.rank // tensor, self.world_size // tensor

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def gather_parts(self, value: T) -> list[T]:
        return self.gather(value)[:: self.tensor_size]

    def barrier(self) -> None:
        self.gather(None)

    def on_main(self, work: Callable[[], T]) -> T:
        result: list[Any] = [None]
        if self.is_main:
            result = [work()]  # a failure ends the main thread there, whose watchdog then ends the ranks that wait here
        dist.broadcast_object_list(result, src=0, group=self.group)
        return result[0]

    def from_main(self, work: Callable[[], T], shared: Callable[[T], T]) -> T:
        results: list[T] = []

        def send() -> T:
            results.append(work())
            return shared(results[0])

        received = self.on_main(send)
        return results[0] if self.is_main else received

    def with_own_group(self) -> Self:
        other = copy.copy(self)
        other.group = dist.new_group(backend="gloo", timeout=self.timeout)
        return other

    def copy(self, module: M) -> M:
        return without_weights(module)

    def fill(self, module: torch.nn.Module, source: torch.nn.Module) -> None:
        copy_shards(source, module)

    def passes(self, packer: Packer, examples: Sequence[TokenizedExample], n_parts: int = 1) -> Iterator[Pass]:
        """Yield the passes of this rank's part; where another has more, the shortest example again, with scale 0.

        FSDP averages gradients over the ranks, so the loss is scaled by their number (gloo takes no other divisor).
        """
        own = [examples[i] for i in balance(list(map(len, examples)), self.data_size)[self.data_rank]]
        batches = list(packer(own, n_parts)) if own else []
        n = max(self.gather(len(batches)))
        for i in range(n):
            if i < len(batches):
                yield Pass(batches[i], float(self.data_size), i == n - 1)
            else:
                yield Pass(next(packer([min(examples, key=len)])), 0.0, i == n - 1)

    def check_same(self, describe: Callable[[], dict[str, str]]) -> None:
        found = self.gather(describe())
        for rank, name in ((rank, name) for rank, own in enumerate(found) for name in own):
            if found[rank][name] != found[0][name]:
                raise UserError(f"{name}: not the same on rank {rank} as on rank 0; give every machine the same files")

    def agree(self, signals: Signals) -> Signals:
        return AgreedSignals(signals, self)

    def usage(self, device: torch.device) -> dict[str, float]:
        """Return also the largest and the mean time that the ranks' layers took; name a rank that is slow."""
        taken = self.gather(self.clock.take())
        for message in self.stragglers.look(taken):
            log_message(message)
        seconds = [own for own, _ in taken]
        times = {"layer_seconds/max": max(seconds), "layer_seconds/mean": sum(seconds) / len(seconds)}
        return super().usage(device) | (times if any(seconds) else {})

    def same_run(self, path: Path) -> tuple[Path, bool]:
        def find() -> tuple[Path, bool]:
            if not self.store.check(["run"]):
                self.store.set("run", str(path))
                return path, False
            first = Path(self.store.get("run").decode())
            return first, (first / "config.yaml").is_file()

        return self.on_main(find)

    def close(self) -> None:
        """Leave when every rank is done; none exits before all have stopped watching it."""
        self.barrier()
        self.watchdog.close()
        self.barrier()
        dist.destroy_process_group()


class AgreedSignals(Signals):
    """Signals that every rank acts upon at the same point, whichever rank got them."""

    def __init__(self, signals: Signals, ranks: Ranks):
        self.signals, self.ranks = signals, ranks
        self.is_fresh = self.save = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        with self.signals.deferred():
            yield

    def exchange(self) -> None:
        """Agree on whether to stop, and on whether to write a checkpoint."""
        asked = self.ranks.gather((self.signals.take_save(), self.signals.stop))
        found = [(name, rank) for rank, (_, name) in enumerate(asked) if name]
        if found and self.stop is None:
            self.stop = found[0][0]
            log_message(f"{self.stop} on rank {', '.join(str(rank) for _, rank in found)}: all ranks stop.")
        self.save = self.save or any(save for save, _ in asked)

    def take_save(self) -> bool:
        self.exchange()
        self.is_fresh, asked, self.save = True, self.save, False
        return asked

    def check(self) -> None:
        if not self.is_fresh:  # right after take_save: a signal in between would end the run without the checkpoint
            self.exchange()
        self.is_fresh = False
        super().check()


def join(settings: Settings) -> Ranks:
    """Join the ranks that settings name, in the processes that torchrun has started; a dry run needs none of them."""
    if settings.trainer == "BasicTrainer" or settings.dry_run:
        return ALONE
    ranks = ProcessGroup(pick_device(settings.device), timedelta(seconds=settings.collective_timeout))
    arrange(ranks, settings)
    return ranks


def arrange(ranks: ProcessGroup, settings: Settings) -> None:
    """Arrange ranks as settings ask; UserError if their number does not allow it."""
    tensor = tensor_size(settings)
    if settings.ddp:
        ranks.arrange(ranks.world_size)
    elif ranks.world_size % (settings.replicate * tensor):
        product = f"tensor_parallel={tensor} replicate={settings.replicate}"
        raise UserError(f"{product}: their product must divide the number of processes, {ranks.world_size}")
    else:
        ranks.arrange(settings.replicate, tensor)
    if settings.batch_size < ranks.data_size:
        n, words = ranks.data_size, "groups of processes needs an example of every batch"
        raise UserError(f"batch_size={settings.batch_size}: each of {n} {words}; set it to {n} or more")


def tensor_size(settings: Settings) -> int:
    """Return how many ranks compute each layer together; auto means those of a machine."""
    if settings.trainer != "TensorParallelTrainer":
        return 1
    if settings.tensor_parallel != "auto":
        return int(settings.tensor_parallel)
    if settings.dry_run:
        return count_processes(settings.n_processes, settings.device)
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def joined(make: Callable[[], Ranks]) -> Iterator[Ranks]:
    """Join the other ranks, and end with them: when all are done, or when one of them has failed.

    The rank that fails first prints why; the others exit with its code. RunError if a rank is gone.
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
