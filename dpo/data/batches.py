"""Batches of examples in the original's order, starting at any position; checks for missing data."""

import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dpo.data.examples import TextExample, Tokenization, TokenizedExample, hash_texts
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

    groups: Sequence[Sequence[TextExample]]
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

    def fingerprint(self, by_text: bool = False) -> str:
        """A SHA-256 of the examples in order and of the tokenization.

        Tables have hashes of their rows; by_text reads all rows again instead, as earlier versions did.
        """
        digest = hashlib.sha256(repr((self.tokenizer_rules(), self.n_items)).encode())
        digest_of_rows = getattr(self.groups, "digest", None)
        if digest_of_rows is not None and not by_text:
            return hashlib.sha256(digest.digest() + digest_of_rows()).hexdigest()
        hash_texts(digest, self.groups)
        return digest.hexdigest()

    def tokenizer_rules(self) -> tuple[object, object]:
        """The vocabulary and the length limits, which determine an example's tokens."""
        rules = self.tokenize
        backend = getattr(rules.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else sorted(rules.tokenizer.get_vocab().items())
        return vocabulary, (rules.max_length, rules.max_prompt_length, rules.add_bos)

    def settings(self) -> tuple[object, ...]:
        """What determines the tokens of each batch, in addition to the examples."""
        return (*self.tokenizer_rules(), self.batch_size, self.seed, self.n_epochs, self.n_examples)

    @cached_property  # groups never change, and counting a million takes a while
    def sizes(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """The number of examples of each group, (groups,)."""
        import numpy as np  # slow to import, and not needed for the names of data sets

        return np.fromiter(map(len, self.groups), dtype=np.int64)

    @cached_property
    def n_items(self) -> int:
        """The number of examples of an epoch."""
        return int(self.sizes.sum())

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
        order, shuffled = array("q", range(len(self.groups))), 0
        while done < len(self):
            epoch, start = divmod(done, per_epoch)
            while shuffled <= epoch:  # each shuffle starts from the previous order
                random.Random(self.epoch_seed(shuffled)).shuffle(order)
                shuffled += 1
            groups, places = self.flatten(order)
            for index in range(start, min(per_epoch, len(self) - epoch * per_epoch)):
                first = index * self.batch_size
                n = self.batch_size
                if self.keep_last and self.n_examples is not None:
                    n = min(n, self.n_examples - done * self.batch_size)
                members = zip(groups[first : first + n].tolist(), places[first : first + n].tolist(), strict=True)
                done += 1
                self.position = {"epoch": done // per_epoch, "batch": done % per_epoch}
                yield Batch(self.tokenize([self.groups[group][place] for group, place in members]), self.position)

    def flatten(self, order: "array[int]") -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
        """The group of each example of an epoch and its index in the group, for an order of the groups."""
        import numpy as np

        groups = np.frombuffer(order, dtype=np.int64)
        sizes = self.sizes[groups]
        starts = np.cumsum(sizes) - sizes
        return np.repeat(groups, sizes), np.arange(sizes.sum()) - np.repeat(starts, sizes)

    def epoch_seed(self, epoch: int) -> int:
        import numpy as np

        return int(np.random.RandomState(self.seed).randint(0, 2**32, size=epoch + 1, dtype=np.int64)[epoch])


def data_problems(settings: Settings, train_batches: BatchIterator, eval_batches: BatchIterator) -> list[str]:
    """One line for each kind of missing data."""
    problems = []
    n = train_batches.n_items
    if n < settings.batch_size:
        mitigation = f"lower it to {n} or less" if n else "add some"
        problems.append(f"batch_size={settings.batch_size}: the training data holds {n} examples; {mitigation}")
    elif len(train_batches) == 0:
        problems.append("n_epochs, n_examples: no update would be made; raise them")
    if eval_batches.n_items == 0:
        problems.append("datasets: there is no example to evaluate on; add a test.jsonl with at least one")
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
