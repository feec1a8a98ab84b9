"""Batches of examples in the original's order, from any position on; what the data lacks for a run."""

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
    """Iterates over groups of examples in the original's order, in batches; its position allows a resume anywhere.

    n_epochs and n_examples bound it, whichever ends first. What is left of an epoch after its last full batch is left
    out, unless keep_last, which also ends exactly at n_examples (for one epoch). The seeds of the epochs are drawn from
    NumPy's legacy generator, and each epoch shuffles the list of groups as the one before left it.
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
        """Return an iterator over the same batches that stands at the very start."""
        return replace(self, position=dict(START))

    @property
    def walks_beyond_first_epoch(self) -> bool:
        """Whether examples come again in other batches."""
        return len(self) > self.batches_per_epoch

    def fingerprint(self, by_text: bool = False) -> str:
        """Return a SHA-256 of the examples in their order and of the tokenizer's rules.

        Tables know hashes of their rows; by_text reads all rows again in their place, as earlier versions did.
        """
        digest = hashlib.sha256(repr((self.settings()[:2], self.n_items)).encode())
        own = getattr(self.groups, "digest", None)
        if own is not None and not by_text:
            return hashlib.sha256(digest.digest() + own()).hexdigest()
        hash_texts(digest, self.groups)
        return digest.hexdigest()

    def settings(self) -> tuple[object, ...]:
        """Return what, besides the examples, decides which tokens lie in which batch."""
        rules = self.tokenize
        backend = getattr(rules.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else sorted(rules.tokenizer.get_vocab().items())
        lengths = (rules.max_length, rules.max_prompt_length, rules.add_bos)
        return (vocabulary, lengths, self.batch_size, self.seed, self.n_epochs, self.n_examples)

    @cached_property  # groups never change, and a million of them take a while to count
    def sizes(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """The number of examples of each group, (groups,)."""
        import numpy as np  # slow to import, and the names of data sets are needed without it

        return np.fromiter(map(len, self.groups), dtype=np.int64)

    @cached_property
    def n_items(self) -> int:
        """Examples per epoch."""
        return int(self.sizes.sum())

    @property
    def batches_per_epoch(self) -> int:
        """Batches per epoch."""
        return -(-self.n_items // self.batch_size) if self.keep_last else self.n_items // self.batch_size

    def __len__(self) -> int:
        """Batches from the very start to the end."""
        limits = []
        if self.n_epochs is not None:
            limits.append(self.n_epochs * self.batches_per_epoch)
        if self.n_examples is not None:
            limits.append(-(-self.n_examples // self.batch_size) if self.batches_per_epoch else 0)
        return min(limits)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the position on."""
        per_epoch = self.batches_per_epoch
        done = self.position["epoch"] * per_epoch + self.position["batch"]
        order, shuffled = array("q", range(len(self.groups))), 0
        while done < len(self):
            epoch, start = divmod(done, per_epoch)
            while shuffled <= epoch:  # later shuffles act on the order that the earlier ones left
                random.Random(self.epoch_seed(shuffled)).shuffle(order)
                shuffled += 1
            groups, places = self.flatten(order)
            for index in range(start, min(per_epoch, len(self) - epoch * per_epoch)):
                done += 1
                self.position = dict(zip(("epoch", "batch"), divmod(done, per_epoch), strict=True))
                start_item, end_item = index * self.batch_size, (index + 1) * self.batch_size
                if self.keep_last and self.n_examples is not None:
                    end_item = min(end_item, start_item + self.n_examples - (done - 1) * self.batch_size)
                chosen = zip(groups[start_item:end_item].tolist(), places[start_item:end_item].tolist(), strict=True)
                yield Batch(self.tokenize([self.groups[group][place] for group, place in chosen]), self.position)

    def flatten(self, order: "array[int]") -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
        """Return the group of each example of an epoch, and its place in the group, for an order of the groups."""
        import numpy as np

        groups = np.frombuffer(order, dtype=np.int64)
        sizes = self.sizes[groups]
        starts = np.cumsum(sizes) - sizes
        return np.repeat(groups, sizes), np.arange(sizes.sum()) - np.repeat(starts, sizes)

    def epoch_seed(self, epoch: int) -> int:
        """Return the seed of an epoch's shuffle."""
        import numpy as np  # slow to import, and the names of data sets are needed without it

        return int(np.random.RandomState(self.seed).randint(0, 2**32, size=epoch + 1, dtype=np.int64)[epoch])


# What the data lacks for a run


def data_problems(settings: Settings, train_batches: BatchIterator, eval_batches: BatchIterator) -> list[str]:
    """Return one line for each way in which there is too little data."""
    problems, n = [], train_batches.n_items
    if n < settings.batch_size:
        remedy = f"lower it to {n} or less" if n else "give it some"
        problems.append(f"batch_size={settings.batch_size}: the training data holds {n} examples; {remedy}")
    elif len(train_batches) == 0:
        problems.append("n_epochs, n_examples: no update would be made; raise them")
    if eval_batches.n_items == 0:
        problems.append("datasets: there is no example to evaluate on; add a test.jsonl with at least one")
    return problems


def schedule_notes(settings: Settings, n_updates: int) -> list[str]:
    """Return a line for each part of the schedule that a run of n_updates does not reach."""
    notes, warmup, n_examples = [], settings.warmup_steps, n_updates * settings.batch_size
    if warmup >= n_updates:
        reached = settings.lr * n_updates / (warmup + 1)
        notes.append(
            f"warmup_steps={warmup}: the run has {n_updates:,} updates, so the learning rate ends at {reached:.2g}."
        )
    if settings.eval_every >= n_examples:
        run = f"the run has {n_examples:,} examples, so it evaluates at its start (do_first_eval) and end alone"
        notes.append(f"eval_every={settings.eval_every:,}: {run}")
    return notes
