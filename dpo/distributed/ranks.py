"""What the processes of a run agree on, and which part of a batch is whose.

`Ranks` is a process that trains alone, for which all of this does nothing. process_group.py has the same for one
process of several.
"""

import copy
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import torch
import torch.distributed as dist

from dpo.data.examples import TokenizedExample
from dpo.model.packing import PackedBatch, Packer
from dpo.system.signals import Signals

M = TypeVar("M", bound=torch.nn.Module)
T = TypeVar("T")


class Pass(NamedTuple):
    """A forward pass of a rank's part of a batch.

    scale: the factor of its loss, 0 for a pass that is only made because another rank has one more; is_last: whether
    the gradients of all ranks are summed after it.
    """

    batch: PackedBatch
    scale: float
    is_last: bool


class Ranks:
    """A process that trains alone."""

    rank = 0
    world_size = 1
    data_rank, data_size = 0, 1  # parts of a batch, each of one rank or of several that compute layers together
    is_main = True  # whether this process is the one that writes files
    group: dist.ProcessGroup | None = None  # that gathers; None: the one of all that is done in the main thread

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order."""
        return [value]

    def sum(self, value: float) -> float:
        """Return the sum of the ranks' values."""
        return sum(self.gather(value))

    def gather_parts(self, value: T) -> list[T]:
        """Return the values of the ranks that hold different parts of a batch, in their order."""
        return self.gather(value)

    def mean(self, value: float) -> float:
        """Return the mean of the ranks' values."""
        return self.sum(value) / self.world_size

    def any(self, flag: object) -> bool:
        """Return whether any rank's flag is true."""
        return any(self.gather(bool(flag)))

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def on_main(self, work: Callable[[], T]) -> T:
        """Call work on the main rank and return its result on every rank; if it raises there, every rank ends."""
        return work()

    def from_main(self, work: Callable[[], T], shared: Callable[[T], T]) -> T:
        """Call work on the main rank and return its result there, and on the other ranks what shared makes of it."""
        return work()

    def with_own_group(self) -> Self:
        """Return the same ranks for another thread, whose gathering does not meet that of this one."""
        return self

    def copy(self, module: M) -> M:
        """Return a copy of a module; of several ranks one without weights, which `fill` gives it once it is sharded."""
        return copy.deepcopy(module)

    def fill(self, module: torch.nn.Module, source: torch.nn.Module) -> None:
        """Copy the weights of a sharded module into a sharded copy of it."""

    def passes(self, packer: Packer, examples: Sequence[TokenizedExample], n_parts: int = 1) -> Iterator[Pass]:
        """Yield the forward passes of this rank's part of a batch, as many on every rank."""
        for batch in packer(examples, n_parts):
            yield Pass(batch, 1.0, True)

    def agree(self, signals: Signals) -> Signals:
        """Return signals on which all ranks act at the same point."""
        return signals

    def check_same(self, describe: Callable[[], dict[str, str]]) -> None:
        """Raise UserError if what a rank has read, as fingerprints by name, is not the same on all ranks."""

    def usage(self, device: torch.device) -> dict[str, float]:
        """Return the largest and the mean peak of the ranks' memory, in GB: of the GPU, or of the process."""
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peaks = [value / 1e9 for value in self.gather(peak)]
        return {"memory_gb/max": max(peaks), "memory_gb/mean": sum(peaks) / len(peaks)}

    def same_run(self, path: Path) -> tuple[Path, bool]:
        """Return the main rank's run directory, and whether an earlier start of torchrun has begun it."""
        return path, False


ALONE = Ranks()
