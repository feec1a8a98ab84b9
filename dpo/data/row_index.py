"""The rows of tables that are trained on: checked and counted once, read again when needed.

Each such row takes about 100 bytes of memory: numbers and hashes, no text.
"""

import hashlib
import random
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo.data.chat import RowFormatter
from dpo.data.examples import TextExample, Tokenization, hash_texts
from dpo.data.messages import InconsistentRow, UnusableRow, to_json
from dpo.data.preferences import NO_TOKEN, ONE_TARGET, REPEATED, RowStatistics, naming_row, validation_errors
from dpo.data.rows import COLUMNS, DIFFERENT_PROMPTS, Row, find_columns, parse_row
from dpo.data.sources import Table, note_columns
from dpo.system.console import progress
from dpo.system.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    Ints = np.ndarray[Any, np.dtype[np.int64]]


HELD_OUT = 0.1  # the share of prompts held out if there is no test split
CHUNK = 1000  # rows that are tokenized together
SAME_TARGET = "an earlier row has the same prompt and chosen response"
# Flags of a row
EVERY_TARGET = 1  # SFT trains on each distinct target of its prompt
PROMPTS_DIFFER = 2
HOLDS_EOS = 4  # the prompt or the first response
REJECTED_HOLDS_EOS = 8
LACKS_TOKEN = 16  # the prompt
DESIRABLE = 32
UNDESIRABLE = 64


@dataclass(frozen=True)
class Reading:
    """How the rows of a data set become examples.

    drop_inconsistent: drop inconsistent conversations instead of raising. labels: rows may be single labelled
    responses.
    """

    name: str
    columns: Mapping[str, str | None]  # columns set by the user, by role
    sft: bool
    formatter: RowFormatter
    tokenize: Tokenization
    drop_inconsistent: bool
    labels: bool = False


class CheckedRow(NamedTuple):
    """A row that can be trained on, with its position in the tables and its example."""

    place: int
    row: Row
    example: TextExample


@dataclass
class RowIndex:
    """The rows of tables that can be trained on, as numbers, and statistics of all rows.

    For each row: its position in the tables, its number in its file, and hashes of the prompt, of prompt and first
    response, and of the whole row.
    """

    reading: Reading
    tables: Sequence[Table]
    columns: list[dict[str, str]]  # of each table
    starts: list[int] = field(default_factory=list)  # position of each table's first row
    counts: RowStatistics = field(default_factory=RowStatistics)
    notes: list[str] = field(default_factory=list)
    places: "array[int]" = field(default_factory=lambda: array("q"))
    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    prompts: "array[int]" = field(default_factory=lambda: array("Q"))
    targets: "array[int]" = field(default_factory=lambda: array("Q"))
    pairs: "array[int]" = field(default_factory=lambda: array("Q"))
    flags: "array[int]" = field(default_factory=lambda: array("B"))
    scores: "array[float]" = field(default_factory=lambda: array("d"))  # two per row, if score columns are set

    def example(self, kept: int) -> TextExample:
        """Read the example of the kept row with this index."""
        place = self.places[kept]
        table = bisect_right(self.starts, place) - 1
        row = self.parse(self.tables[table][place - self.starts[table]], table)
        return self.as_example(row, self.numbers[kept], table)

    def parse(self, raw: object, table: int) -> Row:
        """Find the prompt and the responses of a table's row, as parse_row."""
        chat = self.reading.formatter.prompt_format == "chat"
        return parse_row(raw, self.columns[table], self.reading.sft, chat, self.reading.labels)

    def as_example(self, row: Row, number: int, table: int) -> TextExample:
        """Make an example from a row's trained responses; UnusableRow if the texts are unusable."""
        if errors := validation_errors(*row.texts):
            raise UnusableRow(errors[0])
        source = self.reading.name if len(self.tables) == 1 else self.tables[table].name
        if self.reading.sft:
            row = replace(row, responses=row.responses[:1])
        example = self.reading.formatter(row, number, source)
        return replace(example, **row.extras) if row.extras else example

    def drop(self, error: UnusableRow) -> None:
        """Count a row that cannot be trained on; UserError if it must be refused."""
        if isinstance(error, InconsistentRow) and not self.reading.drop_inconsistent:
            raise UserError(f"{error}; on_inconsistent=drop skips such rows")
        self.counts.drop(error.reason)

    def add(self, chunk: Sequence[CheckedRow], table: Table) -> None:
        """Keep the rows of a chunk whose tokens can be trained on."""
        tokenize = self.reading.tokenize
        eos = str(tokenize.tokenizer.eos_token)
        empty = tokenize.empty_prompts(row.example.prompt for row in chunk if not row.example.is_conversation)
        conversations = [row.example for row in chunk if row.example.is_conversation]
        results = dict(zip((text.row for text in conversations), tokenize.try_tokenize(conversations), strict=True))
        for place, row, example in chunk:
            result = results.get(example.row)
            if isinstance(result, UnusableRow):
                with naming_row(table.name, example.row):
                    self.drop(result)
                continue
            prompt, responses = row.texts
            self.flags.append(flags_of(row, example, eos, example.prompt in empty))
            self.scores.extend(row.extras.get("scores", ()))
            self.places.append(place)
            self.numbers.append(example.row)
            label = [str(row.extras["label"])] if "label" in row.extras else []
            hashes = hashes_of(prompt, *responses, *label)
            self.prompts.append(hashes[0])
            self.targets.append(hashes[1])
            self.pairs.append(hashes[-1])


def flags_of(row: Row, example: TextExample, eos: str, lacks_token: bool) -> int:
    label = row.extras.get("label")
    flags = EVERY_TARGET * row.every_target | PROMPTS_DIFFER * row.prompts_differ
    flags |= DESIRABLE * (label is True) | UNDESIRABLE * (label is False)
    if example.is_conversation:  # its turns contain no special tokens
        return flags
    prompt, (first, *others) = row.texts
    flags |= HOLDS_EOS * (eos in prompt or eos in first) | LACKS_TOKEN * lacks_token
    return flags | REJECTED_HOLDS_EOS * any(eos in response for response in others)


def index_rows(tables: Sequence[Table], reading: Reading, silent: bool = False) -> RowIndex:
    """Read, check and count all rows once; UserError that names the row if one has no known form."""
    columns = [find_columns(table.columns(), reading.columns, table.name) for table in tables]
    index, place = RowIndex(reading, tables, columns), 0
    for i, table in enumerate(tables):
        index.starts.append(place)
        n_rows_with: Counter[str] = Counter()
        roles_read: set[str] = set()
        chunk: list[CheckedRow] = []
        for number, raw in progress(table, table.name, silent=silent):
            with naming_row(table.name, number):
                try:
                    row = index.parse(raw, i)
                    chunk.append(CheckedRow(place, row, index.as_example(row, number, i)))
                    roles_read |= row.columns_read
                except UnusableRow as error:
                    index.drop(error)
            n_rows_with.update(raw.keys())
            place += 1
            if len(chunk) == CHUNK:
                index.add(chunk, table)
                chunk.clear()
        index.add(chunk, table)
        if roles_read:
            roles = [role for role in COLUMNS if role in roles_read]
            index.notes += note_columns(table.name, columns[i], n_rows_with, roles)
    return index


def hashes_of(*texts: str) -> list[int]:
    """64-bit hashes of the prefixes of a list of texts, as JSON: of the first text, the first two, and so on.

    The chance of a collision is 1 in 10 million per million rows.
    """
    hashes, digest, before = [], hashlib.blake2b(digest_size=8), "["
    for text in texts:
        digest.update(f"{before}{to_json(text)}".encode())
        whole = digest.copy()
        whole.update(b"]")
        hashes.append(int.from_bytes(whole.digest(), "big"))
        before = ", "
    return hashes


# From all rows to those of a split


@dataclass(frozen=True)
class RowGroup(Sequence[TextExample]):
    """The examples of one prompt, read on access."""

    rows: RowIndex
    kept: "Ints"

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, item: Any) -> Any:
        return self.rows.example(int(self.kept[item]))


@dataclass(frozen=True)
class TableData(Sequence[Sequence[TextExample]]):
    """A split of a data set with one group of examples per prompt, and statistics of its rows.

    kept has the indices of its rows, group after group; ends (groups,) has the end of each group.
    """

    rows: RowIndex
    kept: "Ints"
    ends: "Ints"
    counts: RowStatistics

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, item: Any) -> Any:
        start = self.ends[item - 1] if item else 0
        return RowGroup(self.rows, self.kept[start : self.ends[item]])

    def __iter__(self) -> Iterator[RowGroup]:
        return (self[item] for item in range(len(self)))

    @property
    def n_labelled(self) -> int:
        """The number of rows with a single labelled response."""
        return self.counts["desirable"] + self.counts["undesirable"]

    def scores(self) -> Iterator[tuple[float, ...]]:
        """Yield the scores of each example, chosen first, without reading its row."""
        scores = self.rows.scores
        return (tuple(scores[2 * row : 2 * row + 2]) for row in self.kept)

    def digest(self) -> bytes:
        """A SHA-256 of the examples in order and of their rendering, from the hashes of their rows."""
        import numpy as np

        formatter = self.rows.reading.formatter
        template = formatter.template and formatter.template.tokenizer.chat_template
        digest = hashlib.sha256(repr((formatter.prompt_format, template)).encode())
        hashes = np.array(self.rows.targets if self.rows.reading.sft else self.rows.pairs)
        digest.update(hashes[self.kept].tobytes() + self.ends.tobytes())
        return digest.digest()


def choose_rows(index: RowIndex, held_out: str | None = None) -> TableData:
    """Choose the rows to train on; with held_out, only those of the split train or test."""
    import numpy as np  # slow to import, and the names of data sets are needed without it

    sft = index.reading.sft
    flags = np.array(index.flags)
    _, first, inverse = np.unique(np.array(index.prompts), return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(first))[inverse]  # each row's prompt, numbered in order
    keep = np.ones(len(flags), dtype=bool)
    counts = RowStatistics(index.counts)
    counts["kept"] = len(flags)

    def n_kept(rows: Any) -> int:
        return int((keep & rows).sum())

    def drop(rows: Any, reason: str) -> None:
        counts.drop_kept(reason, n_kept(rows))
        keep[rows] = False

    def has(flag: int) -> Any:
        return flags & flag > 0

    if held_out is not None:
        test = random.Random(0).sample(range(len(first)), int(len(first) * HELD_OUT))
        reason = f"there is no test file: {len(test):,} of {len(first):,} prompts are held out as the test split"
        drop(np.isin(group, test) != (held_out == "test"), reason)
    counts.warn(DIFFERENT_PROMPTS, n_kept(has(PROMPTS_DIFFER)))
    if not sft:  # SFT keeps one of equal rows and drops the others
        counts.warn(REPEATED, n_kept(~first_of_each(np.array(index.pairs))))
    drop(has(LACKS_TOKEN), NO_TOKEN)
    if sft:
        every_target = np.isin(group, group[has(EVERY_TARGET)])
        drop(every_target & ~first_of_each(np.array(index.targets)), SAME_TARGET)
        drop(~every_target & ~first_of_each(group[::-1])[::-1], ONE_TARGET)
    holds_eos = HOLDS_EOS if sft else HOLDS_EOS | REJECTED_HOLDS_EOS
    drop(has(holds_eos), f"the text contains {index.reading.tokenize.tokenizer.eos_token}")
    counts["desirable"] = n_kept(has(DESIRABLE))
    counts["undesirable"] = n_kept(has(UNDESIRABLE))
    kept = np.flatnonzero(keep)
    kept = kept[np.argsort(group[kept], kind="stable")]
    sizes = np.unique(group[kept], return_counts=True)[1]
    return TableData(index, kept, np.cumsum(sizes), counts)


def first_of_each(values: "Ints") -> Any:
    """Whether each value is the first occurrence, (n,)."""
    import numpy as np

    is_first = np.zeros(len(values), dtype=bool)
    is_first[np.unique(values, return_index=True)[1]] = True
    return is_first


@dataclass(frozen=True)
class Concatenation(Sequence[Sequence[TextExample]]):
    """The groups of several data sets, concatenated."""

    data_sets: Sequence[Sequence[Sequence[TextExample]]]

    @cached_property
    def ends(self) -> list[int]:
        return list(accumulate(map(len, self.data_sets)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, item: Any) -> Any:
        index = bisect_right(self.ends, item)
        return self.data_sets[index][item - self.ends[index] + len(self.data_sets[index])]

    def __iter__(self) -> Iterator[Sequence[TextExample]]:
        return (group for data_set in self.data_sets for group in data_set)

    def scores(self) -> Iterator[tuple[float, ...]]:
        """Yield the scores of each example; empty if the data set has none."""
        return (scores for data_set in self.data_sets for scores in scores_of(data_set))

    def digest(self) -> bytes:
        """A SHA-256 of the examples in their order."""
        digest = hashlib.sha256()
        for data_set in self.data_sets:
            if isinstance(data_set, TableData):
                digest.update(data_set.digest())
            else:
                hash_texts(digest, data_set)
        return digest.digest()


def scores_of(groups: Sequence[Sequence[TextExample]]) -> Iterator[tuple[float, ...]]:
    """Yield the scores of each example, chosen first; rows of tables are not read again."""
    if isinstance(groups, (TableData, Concatenation)):
        return groups.scores()
    return (text.scores for group in groups for text in group)


def concatenate(data_sets: Sequence[Sequence[Sequence[TextExample]]]) -> Sequence[Sequence[TextExample]]:
    return data_sets[0] if len(data_sets) == 1 else Concatenation(data_sets)


def score_problems(groups: Sequence[Sequence[TextExample]]) -> list[str]:
    """A line on the first example without scores; only files and hub data sets can have scores."""
    if all(scores_of(groups)):
        return []
    text = next(text for group in groups for text in group if not text.scores)
    return [f"datasets: {text.where} has no scores, which this loss needs"]
