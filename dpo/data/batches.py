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
    n_updates = len(batches)
    n_examples = n_updates * settings.batch_size
    if settings.warmup_steps >= n_updates:
        last_lr = settings.lr * n_updates / (settings.warmup_steps + 1)
        notes.append(
            f"warmup_steps={settings.warmup_steps}: the run has {n_updates:,} updates, "
            f"so the learning rate ends at {last_lr:.2g}."
        )
    if settings.eval_every >= n_examples:
        notes.append(
            f"eval_every={settings.eval_every:,}: the run has {n_examples:,} examples, "
            "so it is evaluated only at its start (do_first_eval) and at its end"
        )
    if skipped := batches.n_items - batches.batches_per_epoch * settings.batch_size:
        notes.append(f"Each epoch skips the last {skipped:,} of {batches.n_items:,} examples, too few for a batch.")
    return notes
