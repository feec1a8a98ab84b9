"""What of a table is trained on: its rows checked once and counted, its examples read again when they are needed.

A row that can be trained on costs about 100 bytes of memory: numbers and hashes, no text.
"""

import hashlib
import random
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo.data.chat import Rendering
from dpo.data.examples import InconsistentRow, TextExample, Tokenization, UnusableRow, hash_texts
from dpo.data.preferences import ONE_TARGET, REPEATED, flaws, reading_row
from dpo.data.rows import COLUMN_NAMES, DIFFERS, Row, find_columns, parse_row, to_json
from dpo.data.sources import Table, note_columns
from dpo.system.console import progress
from dpo.system.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    Ints = np.ndarray[Any, np.dtype[np.int64]]


HELD_OUT = 0.1  # the share of the prompts that are the test split where there is none
CHUNK = 1000  # rows whose tokens are looked at together
SAME_TARGET = "left out: an earlier row has the same prompt and chosen response"
NO_TOKEN = "dropped: the tokenizer turns the prompt into no token"
EVERY_TARGET, REMARKED, HOLDS_EOS, REJECTED_HOLDS_EOS, LACKS_TOKEN = (1 << bit for bit in range(5))
DESIRABLE, UNDESIRABLE = 1 << 5, 1 << 6  # of rows with a label


@dataclass(frozen=True)
class Reading:
    """How the rows of a data set become examples; inconsistent conversations are dropped, or refused by number.

    labels: rows may also be single responses with a label.
    """

    name: str
    columns: Mapping[str, str | None]  # what a user gave, by what it is used for
    sft: bool
    render: Rendering
    tokenize: Tokenization
    drop_inconsistent: bool
    labels: bool = False


class Checked(NamedTuple):
    """A row whose texts can be trained on, its place in the tables, and the texts that identify it."""

    place: int
    row: Row
    texts: tuple[str, tuple[str, ...]]
    example: TextExample


@dataclass
class RowIndex:
    """The rows of some tables that can be trained on, as numbers, and the account of all of them.

    For each row: its place in the tables, its number in its file, and hashes of its prompt, of its prompt and first
    response, and of all of it.
    """

    reading: Reading
    tables: Sequence[Table]
    columns: list[dict[str, str]]  # of each table
    starts: list[int] = field(default_factory=list)  # the place of each table's first row
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    places: "array[int]" = field(default_factory=lambda: array("q"))
    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    prompts: "array[int]" = field(default_factory=lambda: array("Q"))
    targets: "array[int]" = field(default_factory=lambda: array("Q"))
    pairs: "array[int]" = field(default_factory=lambda: array("Q"))
    flags: "array[int]" = field(default_factory=lambda: array("B"))
    scores: "array[float]" = field(default_factory=lambda: array("d"))  # two per row, where columns of scores are given

    @property
    def eos(self) -> str:
        """The text of the eos token, which no text may hold."""
        return str(self.reading.tokenize.tokenizer.eos_token)

    def example(self, kept: int) -> TextExample:
        """Read the example of the kept row with this index."""
        place, number = self.places[kept], self.numbers[kept]
        table = bisect_right(self.starts, place) - 1
        row = self.parse(self.tables[table][place - self.starts[table]], table)
        return self.as_example(row, row.texts(), number, self.source(table))

    def parse(self, raw: object, table: int) -> Row:
        """Return the prompt and the responses of a table's row, as parse_row."""
        chat = self.reading.render.prompt_format == "chat"
        return parse_row(raw, self.columns[table], self.reading.sft, chat, self.reading.labels)

    def as_example(self, row: Row, texts: tuple[str, tuple[str, ...]], number: int, source: str) -> TextExample:
        """Return a row as an example with the responses that are trained on; UnusableRow if its texts have a flaw."""
        if found := flaws(*texts):
            raise UnusableRow(found[0])
        if self.reading.sft:
            return self.reading.render(row._replace(responses=row.responses[:1]), number, source)
        example = self.reading.render(row, number, source)
        return example._replace(scores=row.scores, label=row.label) if row.scores or row.label is not None else example

    def drop(self, error: UnusableRow, where: str = "") -> None:
        """Count a row that cannot be trained on; UserError if it is one that is to be refused."""
        if isinstance(error, InconsistentRow) and not self.reading.drop_inconsistent:
            raise UserError(f"{where}{error.text}; on_inconsistent=drop leaves such rows out")
        self.counts[f"dropped: {error.reason}"] += 1

    def add(self, chunk: Sequence["Checked"], table: Table) -> None:
        """Keep rows of a table that their texts allow, after a look at their tokens."""
        tokenize, eos = self.reading.tokenize, self.eos
        texts = [row.example for row in chunk if isinstance(row.example.truncation, str)]
        empty = tokenize.empty_prompts(text.prompt for text in texts)
        conversations = [row.example for row in chunk if not isinstance(row.example.truncation, str)]
        unusable = {
            text.row: found
            for text, found in zip(conversations, tokenize.attempt(conversations), strict=True)
            if isinstance(found, UnusableRow)
        }
        for place, row, (prompt, responses), example in chunk:
            if error := unusable.get(example.row):
                self.drop(error, f"{table.name}, row {example.row}: ")
                continue
            flags = EVERY_TARGET * row.every_target | REMARKED * (row.remark is not None)
            if isinstance(example.truncation, str):
                flags |= HOLDS_EOS * (eos in prompt or eos in responses[0]) | LACKS_TOKEN * (example.prompt in empty)
                flags |= REJECTED_HOLDS_EOS * any(eos in response for response in responses[1:])
            label = () if row.label is None else (str(row.label),)
            flags |= DESIRABLE * (row.label is True) | UNDESIRABLE * (row.label is False)
            self.flags.append(flags)
            self.scores.extend(row.scores)
            self.places.append(place)
            self.numbers.append(example.row)
            hashes = hashes_of(prompt, *responses, *label)
            self.prompts.append(hashes[0])
            self.targets.append(hashes[1])
            self.pairs.append(hashes[-1])

    def source(self, table: int) -> str:
        """Return the name by which messages about rows call a table: the data set's, if it is one table."""
        return self.reading.name if len(self.tables) == 1 else self.tables[table].name


def index_rows(tables: Sequence[Table], reading: Reading, silent: bool = False) -> RowIndex:
    """Read all rows once, check and count them; UserError that names the row if one has no known form."""
    columns = [find_columns(table.columns(), reading.columns, table.name) for table in tables]
    index, place = RowIndex(reading, tables, columns), 0
    for i, table in enumerate(tables):
        index.starts.append(place)
        source = index.source(i)
        names: Counter[str] = Counter()
        used: set[str] = set()
        chunk: list[Checked] = []
        for number, raw in progress(table, table.name, silent=silent):
            with reading_row(index.counts, table.name, number):
                try:
                    row = index.parse(raw, i)
                    texts = row.texts()
                    chunk.append(Checked(place, row, texts, index.as_example(row, texts, number, source)))
                    used |= row.used
                except UnusableRow as error:
                    index.drop(error)
            names.update(raw.keys())
            place += 1
            if len(chunk) == CHUNK:
                index.add(chunk, table)
                chunk.clear()
        index.add(chunk, table)
        if used:
            index.notes += note_columns(table.name, columns[i], names, [use for use in COLUMN_NAMES if use in used])
    return index


def hashes_of(*texts: str) -> list[int]:
    """Return 64 bits of each start of a list of texts, as JSON: of the first text, of the first two, and so on.

    Other texts do not share them, but for a chance of 1 in 10 million per million rows.
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
    """The examples of one prompt, each read when it is asked for."""

    rows: RowIndex
    kept: "Ints"

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, item: Any) -> Any:
        return self.rows.example(int(self.kept[item]))


@dataclass(frozen=True)
class TableData(Sequence[Sequence[TextExample]]):
    """One split of a data set, one group of examples per prompt, and the account of its rows.

    kept holds the indices of its rows, group after group; ends (groups,) where each group ends.
    """

    rows: RowIndex
    kept: "Ints"
    ends: "Ints"
    counts: Counter[str]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, item: Any) -> Any:
        start = self.ends[item - 1] if item else 0
        return RowGroup(self.rows, self.kept[start : self.ends[item]])

    def __iter__(self) -> Iterator[RowGroup]:
        return (self[item] for item in range(len(self)))

    @property
    def n_labelled(self) -> int:
        """The number of rows of one response with a label."""
        return self.counts["desirable"] + self.counts["undesirable"]

    def scores(self) -> Iterator[tuple[float, ...]]:
        """Yield the scores of each example, chosen first, without reading its row."""
        scores = self.rows.scores
        return (tuple(scores[2 * row : 2 * row + 2]) for row in self.kept)

    def digest(self) -> bytes:
        """Return a SHA-256 of the examples in their order and of how they are rendered, by the hashes of their rows."""
        import numpy as np

        rendering = self.rows.reading.render
        template = rendering.template and rendering.template.tokenizer.chat_template
        found = hashlib.sha256(repr((rendering.prompt_format, template)).encode())
        hashes = np.array(self.rows.targets if self.rows.reading.sft else self.rows.pairs)
        found.update(hashes[self.kept].tobytes() + self.ends.tobytes())
        return found.digest()


def choose_rows(index: RowIndex, held_out: str | None = None) -> TableData:
    """Return the rows that are trained on, or, with held_out, the share of them that is the split train or test."""
    import numpy as np  # slow to import, and the names of data sets are needed without it

    arrays = (index.prompts, index.targets, index.pairs, index.flags)
    prompts, targets, pairs, flags = (np.array(values) for values in arrays)
    _, first, inverse = np.unique(prompts, return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(first))[inverse]  # the number of each row's prompt, in their order
    counts, keep = Counter(index.counts), np.ones(len(prompts), dtype=bool)
    counts["kept"] = len(prompts)

    def leave_out(rows: Any, reason: str) -> None:
        n = int((keep & rows).sum())
        counts["kept"] -= n
        counts[reason] += n
        keep[rows] = False

    if held_out is not None:
        test = random.Random(0).sample(range(len(first)), int(len(first) * HELD_OUT))
        reason = f"left out: no test file, so {len(test):,} of {len(first):,} prompts are held out as the test split"
        leave_out(np.isin(group, test) != (held_out == "test"), reason)
    counts[DIFFERS] += int((keep & (flags & REMARKED > 0)).sum())
    if not index.reading.sft:  # of equal rows SFT keeps one, and counts the others as left out
        counts[REPEATED] += int((keep & ~first_of_each(pairs)).sum())
    leave_out(flags & LACKS_TOKEN > 0, NO_TOKEN)
    if index.reading.sft:
        takes_every = np.zeros(len(first), dtype=bool)
        takes_every[group[flags & EVERY_TARGET > 0]] = True
        leave_out(takes_every[group] & ~first_of_each(targets), SAME_TARGET)
        leave_out(~takes_every[group] & ~first_of_each(group[::-1])[::-1], ONE_TARGET)
    holds_eos = HOLDS_EOS if index.reading.sft else HOLDS_EOS | REJECTED_HOLDS_EOS
    leave_out(flags & holds_eos > 0, f"dropped: the text holds {index.eos}")
    counts["desirable"] = int((keep & (flags & DESIRABLE > 0)).sum())
    counts["undesirable"] = int((keep & (flags & UNDESIRABLE > 0)).sum())
    kept = np.flatnonzero(keep)
    kept = kept[np.argsort(group[kept], kind="stable")]
    sizes = np.unique(group[kept], return_counts=True)[1]
    return TableData(index, kept, np.cumsum(sizes), counts)


def first_of_each(values: "Ints") -> Any:
    """Return for each value whether it is the first of those that equal it, (n,)."""
    import numpy as np

    is_first = np.zeros(len(values), dtype=bool)
    is_first[np.unique(values, return_index=True)[1]] = True
    return is_first


@dataclass(frozen=True)
class Joined(Sequence[Sequence[TextExample]]):
    """The groups of several data sets, one after the other."""

    parts: Sequence[Sequence[Sequence[TextExample]]]
    ends: Sequence[int]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, item: Any) -> Any:
        part = bisect_right(self.ends, item)
        return self.parts[part][item - self.ends[part] + len(self.parts[part])]

    def __iter__(self) -> Iterator[Sequence[TextExample]]:
        return (group for part in self.parts for group in part)

    def scores(self) -> Iterator[tuple[float, ...]]:
        """Yield the scores of each example; none where the data set has none."""
        return (scores for part in self.parts for scores in scores_of(part))

    def digest(self) -> bytes:
        """Return a SHA-256 of the examples in their order."""
        found = hashlib.sha256()
        for part in self.parts:
            if isinstance(part, TableData):
                found.update(part.digest())
            else:
                hash_texts(found, part)
        return found.digest()


def scores_of(groups: Sequence[Sequence[TextExample]]) -> Iterator[tuple[float, ...]]:
    """Yield the scores of each example, chosen first; of tables without reading their rows again."""
    if isinstance(groups, (TableData, Joined)):
        return groups.scores()
    return (text.scores for group in groups for text in group)


def joined(parts: Sequence[Sequence[Sequence[TextExample]]]) -> Sequence[Sequence[TextExample]]:
    """Return the groups of several data sets as one sequence."""
    return parts[0] if len(parts) == 1 else Joined(parts, list(accumulate(map(len, parts))))


def score_problems(groups: Sequence[Sequence[TextExample]]) -> list[str]:
    """Return a line on the first example without scores, which only files and hub data sets of one's own have."""
    unscored = () if all(scores_of(groups)) else (text for group in groups for text in group if not text.scores)
    return [f"loss=odpo: {text.source}, row {text.row} has no scores" for text in islice(unscored, 1)]
