"""All data sets of a split, one after the other, each with its share."""

import hashlib
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from dpo.data.examples import Tokenization, TokenizedExample
from dpo.data.table import Split

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Mixture(Sequence[TokenizedExample]):
    """The examples of several data sets, group after group."""

    splits: Sequence[Split]

    @cached_property
    def ends(self) -> list[int]:
        return list(accumulate(map(len, self.splits)))

    @cached_property
    def sizes(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """The number of examples of each group, (groups,)."""
        import numpy as np

        return np.concatenate([split.sizes for split in self.splits])

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> Any:
        part = bisect_right(self.ends, index)
        return self.splits[part][index - self.ends[part] + len(self.splits[part])]

    def numbered_from(self, first: int) -> "Mixture":
        """The same examples, with numbers from first."""
        starts = [first, *(first + end for end in self.ends[:-1])]
        return Mixture([replace(split, first=start) for split, start in zip(self.splits, starts, strict=True)])

    def with_rules(self, tokenize: Tokenization) -> "Mixture":
        """The same examples, truncated by other rules."""
        return Mixture([replace(split, tokenize=tokenize) for split in self.splits])

    def scores(self) -> Iterator[tuple[float, ...]]:
        """Yield the scores of each example, chosen first, or ()."""
        return (scores for split in self.splits for scores in split.scores())

    def label_counts(self) -> tuple[int, int]:
        """The number of desirable and of undesirable responses; a pair has one of each."""
        desirable, undesirable = zip(*(split.label_counts() for split in self.splits), strict=True)
        return sum(desirable), sum(undesirable)

    def row_hashes(self, column: str) -> "np.ndarray[Any, np.dtype[np.uint64]]":
        """The hash of each example's row, (examples,): its target_hash or its whole_hash."""
        import numpy as np

        return np.concatenate([split.table.column(column)[split.selection.records] for split in self.splits])

    def digest(self) -> bytes:
        """A SHA-256 of the examples in their order."""
        digests = [bytes.fromhex(split.selection.digest) for split in self.splits]
        return digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()

    def text_digest(self, digest: "hashlib._Hash") -> str:
        """Continue a hash with the texts of all examples by group, as earlier versions did."""
        first = 0
        for size in self.sizes.tolist():
            texts = [self[i].text for i in range(first, first + size)]
            contents = [(text.prompt, text.responses, text.truncation) for text in texts]
            labels = [() if text.label is None else (text.label,) for text in texts]
            digest.update(repr([(*content, *label) for content, label in zip(contents, labels, strict=True)]).encode())
            first += size
        return digest.hexdigest()


def members(sizes: "np.ndarray[Any, Any]", groups: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """The indices of the examples of some groups, in the order of groups; sizes has the size of every group."""
    import numpy as np

    starts = np.cumsum(sizes) - sizes
    selected_sizes = sizes[groups]
    selected_starts = np.cumsum(selected_sizes) - selected_sizes
    shifts = starts[groups] - selected_starts
    return np.arange(selected_sizes.sum()) + np.repeat(shifts, selected_sizes)


def take_share(split: Split, share: float, seed: int) -> Split:
    """A share of a split's groups: 2 takes each group twice, 0.5 takes half of them, drawn with the seed."""
    import numpy as np

    selection = split.selection
    n_groups = len(selection.sizes)
    copies, rest = divmod(round(share * n_groups), max(1, n_groups))
    drawn = sorted(random.Random(seed).sample(range(n_groups), rest))
    groups = np.concatenate([np.tile(np.arange(n_groups), copies), np.array(drawn, dtype=np.int64)])
    examples = members(selection.sizes, groups)
    taken = replace(
        selection,
        records=selection.records[examples],
        choices=selection.choices[examples],
        sizes=selection.sizes[groups],
        digest=hashlib.sha256(f"{selection.digest} {share} {seed}".encode()).hexdigest(),
    )
    return replace(split, selection=taken)
