"""What a process asks of the other processes of its run.

`Ranks` is a single process. process_group.py has the same interface for one process of several.
"""

from collections.abc import Callable
from typing import Self, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """A single process."""

    rank = 0
    world_size = 1
    data_rank, data_size = 0, 1  # shares of a batch, each of one rank or of several that compute layers together
    is_main = True  # whether this process is the one that writes files
    group: dist.ProcessGroup | None = None  # that gathers; None: the one of all that is done in the main thread

    def gather(self, value: T) -> list[T]:
        """Exchange a value of each rank; all get all of them, in the order of ranks."""
        return [value]

    def gather_shares(self, value: T) -> list[T]:
        """Exchange a value of each share of a batch, in the order of shares."""
        ranks_per_share = self.world_size // self.data_size
        return self.gather(value)[::ranks_per_share]

    def any(self, flag: object) -> bool:
        """Tell every rank whether the flag of at least one is true."""
        return any(self.gather(bool(flag)))

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Call work on the main rank and return its result on every rank; if it raises there, every rank ends."""
        return work()

    def broadcast_from_main(self, work: Callable[[], T], to_send: Callable[[T], T]) -> T:
        """Call work on the main rank, which keeps the result; the other ranks get what to_send makes of it."""
        return work()

    def with_own_group(self) -> Self:
        """Make the same ranks for another thread, whose gathering does not mix with that of this one."""
        return self

    def keep_first(self, name: str, value: str) -> tuple[str, bool]:
        """Keep the main rank's value under a name, also when torchrun starts all processes again.

        Every rank gets the value of the first start, and whether this is a later one.
        """
        return value, False


ALONE = Ranks()
