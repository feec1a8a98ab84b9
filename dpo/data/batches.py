"""Batches of examples in the original's order, starting at any position; checks for missing data."""

import hashlib
import random
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dpo.data.examples import Tokenization, TokenizedExample
from dpo.data.mixture import Mixture, members
from dpo.settings.schema import Settings

if TYPE_CHECKING:
    import numpy as np


FEW = 50  # evaluation examples below which a run warns
SHARED = 0.01  # share of test rows that are training rows from which on a run warns


@dataclass(frozen=True)
class Batch:
    """Tokenized examples, and the iterator's position after them."""

    examples: list[TokenizedExample]
    position: dict[str, int]


START = {"epoch": 0, "batch": 0}


@dataclass
class BatchIterator:
    """Iterates over batches of examples in the original's order; its position allows a resume at any batch.

    It ends after n_epochs or n_examples, whichever comes first. An epoch drops the examples after its last full batch.
    With keep_last it keeps them, and ends exactly at n_examples (for one epoch). The seeds of the epochs come from
    NumPy's legacy generator, and each epoch shuffles the order of groups that the previous one left.
    """

    examples: Mixture
    tokenize: Tokenization
    batch_size: int
    seed: int = 0
    n_epochs: int | None = None
    n_examples: int | None = None
    keep_last: bool = False
    position: dict[str, int] = field(default_factory=START.copy)

    def from_start(self) -> "BatchIterator":
        """The same batches, from the start."""
        return replace(self, position=dict(START))

    @property
    def walks_beyond_first_epoch(self) -> bool:
        """Whether examples are repeated, in different batches."""
        return len(self) > self.batches_per_epoch

    def fingerprint(self) -> str:
        """A SHA-256 of the examples in order and of the tokenization."""
        digest = hashlib.sha256(repr((self.tokenize.settings(), self.n_items)).encode())
        return hashlib.sha256(digest.digest() + self.examples.digest()).hexdigest()

    def earlier_fingerprint(self) -> str:
        """The fingerprint of earlier versions, which reads all texts."""
        return self.examples.text_digest(hashlib.sha256(repr((self.tokenize.settings(), self.n_items)).encode()))

    def settings(self) -> tuple[object, ...]:
        """What determines the tokens of each batch besides the examples."""
        return (*self.tokenize.identity(), self.batch_size, self.seed, self.n_epochs, self.n_examples)

    @property
    def n_items(self) -> int:
        """The number of examples of an epoch."""
        return len(self.examples)

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.n_items // self.batch_size) if self.keep_last else self.n_items // self.batch_size

    def __len__(self) -> int:
        """The number of batches from start to end."""
        limits = []
        if self.n_epochs is not None:
            limits.append(self.n_epochs * self.batches_per_epoch)
        if self.n_examples is not None:
            limits.append(-(-self.n_examples // self.batch_size) if self.batches_per_epoch else 0)
        return min(limits)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches, starting at the position."""
        per_epoch = self.batches_per_epoch
        done = self.position["epoch"] * per_epoch + self.position["batch"]
        order, shuffled = array("q", range(len(self.examples.sizes))), 0
        while done < len(self):
            epoch, start = divmod(done, per_epoch)
            while shuffled <= epoch:  # each shuffle starts from the previous order
                random.Random(self.epoch_seed(shuffled)).shuffle(order)
                shuffled += 1
            indices = self.flatten(order)
            for index in range(start, min(per_epoch, len(self) - epoch * per_epoch)):
                first = index * self.batch_size
                n = self.batch_size
                if self.keep_last and self.n_examples is not None:
                    n = min(n, self.n_examples - done * self.batch_size)
                done += 1
                self.position = {"epoch": done // per_epoch, "batch": done % per_epoch}
                examples = [self.examples[i] for i in indices[first : first + n].tolist()]
                yield Batch(examples, self.position)

    def flatten(self, order: "array[int]") -> "np.ndarray[Any, Any]":
        """The indices of an epoch's examples, for an order of the groups."""
        import numpy as np

        return members(self.examples.sizes, np.frombuffer(order, dtype=np.int64))

    def epoch_seed(self, epoch: int) -> int:
        import numpy as np

        return int(np.random.RandomState(self.seed).randint(0, 2**32, size=epoch + 1, dtype=np.int64)[epoch])


def data_problems(settings: Settings, train_batches: BatchIterator, lost: Mapping[str, str]) -> list[str]:
    """One line for each kind of missing data; lost says of each split that has no example why."""
    problems = []
    n = train_batches.n_items
    if n < settings.batch_size:
        if "train" in lost:
            problems.append(f"datasets: there is no example to train on: {lost['train']}")
        else:
            problem = f"the training data holds {n} examples; lower it to {n} or less"
            problems.append(f"batch_size={settings.batch_size}: {problem}")
    elif len(train_batches) == 0:
        problems.append("n_epochs, n_examples: no update would be made; raise them")
    if "test" in lost:
        problems.append(f"datasets: there is no example to evaluate on: {lost['test']}")
    return problems


def schedule_notes(settings: Settings, batches: BatchIterator) -> list[str]:
    """A line for each part of the schedule or the data that a run does not reach."""
    notes = []
    n_examples = len(batches) * settings.batch_size
    if settings.eval_every >= n_examples:
        notes.append(
            f"eval_every={settings.eval_every:,}: the run has {n_examples:,} examples, "
            "so it is evaluated only at its start (do_first_eval) and at its end"
        )
    if skipped := batches.n_items - batches.batches_per_epoch * settings.batch_size:
        notes.append(f"Each epoch skips the last {skipped:,} of {batches.n_items:,} examples, too few for a batch.")
    return notes


def data_warnings(settings: Settings, train: BatchIterator, test: BatchIterator, sft: bool) -> list[str]:
    """A line for each reason why a run will teach or show little: warmup, evaluation set, rows in both splits."""
    warnings = []
    n_updates, warmup = len(train), settings.warmup_steps
    if warmup >= n_updates:
        share = n_updates / (warmup + 1)
        effect = "probably almost nothing will be learned" if share < 0.5 else "the full rate is never reached"
        warnings.append(
            f"warmup_steps={warmup}: the run has {n_updates:,} updates, so the learning rate ends at "
            f"{settings.lr * share:.2g} and {effect}; set warmup_steps={n_updates // 10}."
        )
    n_evaluated = min(test.n_items, settings.n_eval_examples)
    if n_evaluated < FEW and not sft:
        mitigation = "hold out more" if n_evaluated == test.n_items else f"set n_eval_examples={FEW} or more"
        few = f"{n_evaluated:,} evaluation example{'s are' if n_evaluated > 1 else ' is'}"
        warnings.append(f"{few} too few to tell what was learned from chance; {mitigation}.")
    n_shared = count_shared(train, test, sft)
    if n_shared >= SHARED * test.n_items and n_shared:
        warnings.append(
            f"{n_shared:,} of {test.n_items:,} evaluation rows are also trained on, so the evaluation shows what was "
            "memorized; remove them from one of the two."
        )
    return warnings


def count_shared(train: BatchIterator, test: BatchIterator, sft: bool) -> int:
    """How many test examples are training examples, by the hashes of their rows; for SFT, of prompt and target.

    A million training examples take 0.2 s of CPU time.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    hashes = [pa.array(each.examples.row_hashes("target_hash" if sft else "whole_hash")) for each in (test, train)]
    return int(pc.is_in(hashes[0], value_set=hashes[1]).to_numpy(zero_copy_only=False).sum())
