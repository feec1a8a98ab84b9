"""How a batch is split over ranks, and the share of each rank into microbatches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dpo.data.examples import TokenizedExample
from dpo.distributed.ranks import ALONE, Ranks
from dpo.model.packing import PackedBatch, Packer, balance


class Microbatch(NamedTuple):
    """The examples of one forward pass of a rank.

    scale: the factor of their loss, 0 where they only fill up because another rank has one microbatch more; is_last:
    whether the gradients of all ranks are summed after it.
    """

    batch: PackedBatch
    scale: float
    is_last: bool


@dataclass(frozen=True)
class BatchSplitter:
    """Splits batches into shares of nearly equal numbers of tokens, and packs the share of this rank."""

    packer: Packer
    ranks: Ranks = ALONE

    def __call__(self, examples: Sequence[TokenizedExample], n_equal: int = 1) -> Iterator[Microbatch]:
        """Yield the microbatches of this rank's share, as many on every rank.

        The share is divided into n_equal equal parts before max_tokens_per_pass divides it further. A rank with fewer
        microbatches than another one repeats the shortest example with scale 0.
        FSDP averages gradients over the shares, so the loss is scaled by their number (gloo takes no other divisor).
        """
        n_shares = self.ranks.data_size
        share = balance(list(map(len, examples)), n_shares)[self.ranks.data_rank]
        batches = list(self.packer([examples[i] for i in share], n_equal)) if share else []
        n = max(self.ranks.gather(len(batches)))
        for i in range(n):
            if i < len(batches):
                yield Microbatch(batches[i], float(n_shares), i == n - 1)
            else:
                yield Microbatch(next(self.packer([min(examples, key=len)])), 0.0, i == n - 1)
