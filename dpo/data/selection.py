"""Chooses a split's records from a table: held-out prompts, one target per prompt for SFT, repeated rows."""

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

from dpo.data.examples import NO_TOKEN
from dpo.data.records import DESIRABLE, EVERY_TARGET, HOLDS_EOS, LACKS_TOKEN, UNDESIRABLE
from dpo.data.statistics import RowStatistics
from dpo.data.table import RecordTable, Selection

HELD_OUT = 0.1  # the share of prompts held out if there is no test split
REPEATED = "it repeats an earlier row"
ONE_TARGET = "SFT trains on one target per prompt, and a later row has the same prompt"
SAME_TARGET = "an earlier row has the same prompt and chosen response"


@dataclass
class Chooser:
    """Chooses the records of a table to train on, and counts why others are not.

    keeps_unusable: as in the original, keep texts that contain eos, and shuffle prompts without an example as well.
    """

    table: RecordTable
    counts: RowStatistics
    sft: bool
    eos: str
    keeps_unusable: bool
    rendering: object = None  # how rows are rendered, which is part of the digest
    keep: Any = field(init=False)  # mask (records,)

    def n_kept(self, rows: Any) -> int:
        """How many of the rows, a mask (records,), are kept."""
        return int((self.keep & rows).sum())

    def drop(self, rows: Any, reason: str) -> None:
        self.counts.drop_kept(reason, self.n_kept(rows))
        self.keep = self.keep & ~rows

    def choose(self, held_out: str | None = None) -> Selection:
        """Choose the records of a split; with held_out, only those of train or test."""
        import numpy as np

        table = self.table
        flags = table.column("flags")
        prompts, targets, contents = (table.column(f"{name}_hash") for name in ("prompt", "target", "whole"))
        _, first, inverse = np.unique(prompts, return_index=True, return_inverse=True)
        group = np.argsort(np.argsort(first))[inverse]  # each record's prompt, numbered in order
        self.keep = np.ones(len(flags), dtype=bool)
        self.counts["kept"] += len(flags)

        if held_out is not None:
            test = random.Random(0).sample(range(len(first)), int(len(first) * HELD_OUT))
            reason = f"there is no test file: {len(test):,} of {len(first):,} prompts are held out as the test split"
            is_test = np.isin(group, test)
            self.drop(~is_test if held_out == "test" else is_test, reason)
        for warning, rows in table.warnings().items():
            self.counts.warn(warning, self.n_kept(rows))
        if not self.sft:  # SFT drops repeated rows below
            self.counts.warn(REPEATED, self.n_kept(~first_of_each(contents)))
        self.drop(flags & LACKS_TOKEN > 0, NO_TOKEN)
        if self.sft:
            every_target = np.isin(group, group[flags & EVERY_TARGET > 0])
            self.drop(every_target & ~first_of_each(targets), SAME_TARGET)
            self.drop(~every_target & ~first_of_each(group[::-1])[::-1], ONE_TARGET)
        holds_eos = flags & HOLDS_EOS > 0
        if self.keeps_unusable:
            self.counts.warn(f"the text contains {self.eos}", self.n_kept(holds_eos))
        else:
            self.drop(holds_eos, f"the text contains {self.eos}")
        self.counts["desirable"] = self.n_kept(flags & DESIRABLE > 0)
        self.counts["undesirable"] = self.n_kept(flags & UNDESIRABLE > 0)
        kept = np.flatnonzero(self.keep)
        kept = kept[np.argsort(group[kept], kind="stable")]
        return self.selection(kept, group, targets if self.sft else contents)

    def selection(self, kept: Any, group: Any, hashes: Any) -> Selection:
        """The examples of the kept records, which are sorted by group."""
        import numpy as np

        n_choices = self.table.n_choices()[kept]
        sizes = np.bincount(group[kept], weights=n_choices, minlength=group.max(initial=-1) + 1).astype(np.int64)
        if not self.keeps_unusable:
            sizes = sizes[sizes > 0]
        digest = hashlib.sha256(repr(self.rendering).encode())
        digest.update(hashes[kept].tobytes() + np.cumsum(sizes).tobytes())
        starts = np.cumsum(n_choices) - n_choices
        choices = np.arange(n_choices.sum()) - np.repeat(starts, n_choices)
        return Selection(np.repeat(kept, n_choices), choices, sizes, self.counts, digest.hexdigest())


def first_of_each(values: Any) -> Any:
    """A mask (n,) of the first occurrence of each value."""
    import numpy as np

    is_first = np.zeros(len(values), dtype=bool)
    is_first[np.unique(values, return_index=True)[1]] = True
    return is_first
