"""Loads a data set: reads its table, or writes it first from the rows, on all cores where there are many."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dpo.data.columns import COLUMNS, NO_COLUMN, find_columns
from dpo.data.formats import Table
from dpo.data.records import Encoded, Encoder
from dpo.data.rows import Row, RowOptions, parse_row
from dpo.data.selection import Chooser
from dpo.data.sources import note_columns
from dpo.data.statistics import RowStatistics
from dpo.data.table import (
    ROWS,
    RecordTable,
    Selection,
    Split,
    cached,
    read_folder,
    schema,
    to_batch,
    write_facts,
)
from dpo.system.console import log_message, progress
from dpo.system.processes import map_on_all_cores, without_garbage_collection

if TYPE_CHECKING:
    import pyarrow

CHUNK = 1000  # rows that are encoded together
N_ALONE = 20  # chunks after which other processes help, since these need seconds to start

Chunk = tuple[Sequence[tuple[int, Any]], Callable[[Any], Row]]


class Rows(Protocol):
    """The raw rows of a table, or of a data set in DATASETS, and how they are parsed."""

    name: str

    def digest(self) -> bytes:
        """A hash of all rows and of how they are parsed."""

    def chunks(self) -> Iterator[Chunk]:
        """Yield rows with their numbers, and the function that parses them."""

    def notes(self, encoded: Encoded) -> list[str]:
        """Lines about the columns that were read."""


@dataclass(frozen=True)
class TableRows(Rows):
    """The rows of a file or hub data set; columns that only later rows have are found as well."""

    table: Table
    given: Mapping[str, str | None]  # columns set by the user, by role
    options: RowOptions

    @property
    def name(self) -> str:  # type: ignore[override]  # an attribute in the protocol
        return self.table.name

    def digest(self) -> bytes:
        return self.table.digest() + repr((self.given, self.options)).encode()

    def columns(self, names: Collection[str]) -> dict[str, str]:
        return find_columns(names, self.given, self.name)

    def chunks(self) -> Iterator[Chunk]:
        names: set[str] = set()
        columns: dict[str, str] | None = None
        rows = iter(progress(self.table, self.name))
        while chunk := list(islice(rows, CHUNK)):
            names_of_chunk = names_in(chunk)
            if columns is None and not set(self.given.values()) - {None, NO_COLUMN} <= names_of_chunk:
                names_of_chunk = names_in(self.table)  # a column that the user set may begin later
            if columns is None or not names_of_chunk <= names:
                names |= names_of_chunk
                columns = self.columns(names)
            yield chunk, partial(parse_row, columns=columns, options=self.options)

    def notes(self, encoded: Encoded) -> list[str]:
        if not encoded.roles:
            return []
        roles = [role for role in COLUMNS if role in encoded.roles]
        return note_columns(self.name, self.columns(encoded.columns), encoded.columns, roles)


def names_in(rows: Iterable[tuple[int, Any]]) -> set[str]:
    """The names of the columns of rows with their numbers."""
    return {str(name) for _, row in rows if isinstance(row, dict) for name in row}


def parsed_already(row: Row) -> Row:
    return row


@dataclass(frozen=True)
class NamedRows(Rows):
    """The rows of a data set that a function in DATASETS has parsed, with the number of each."""

    name: str
    rows: Sequence[tuple[int, Row]]

    def digest(self) -> bytes:
        digest = hashlib.sha256()
        for number, row in self.rows:
            digest.update(repr((number, row.prompt, row.responses, row.pairs, row.target)).encode())
        return digest.digest()

    def chunks(self) -> Iterator[Chunk]:
        rows = iter(progress(self.rows, self.name))
        while chunk := list(islice(rows, CHUNK)):
            yield chunk, parsed_already

    def notes(self, encoded: Encoded) -> list[str]:
        return []


# From rows to a table


def encode_chunk(encoder: Encoder, name: str, source: int, chunk: Chunk) -> "tuple[Encoded, pyarrow.RecordBatch]":
    encoded = encoder(name, *chunk)
    batch = to_batch(encoded.records, source)
    return replace(encoded, records=[]), batch


@dataclass(frozen=True)
class Loaded:
    """A split of a data set, and what was counted while its rows were read.

    details has an example of each reason for which rows were dropped. is_chat: whether there are conversations.
    plain_text names the first row with a text prompt that might be a turn of a conversation.
    """

    name: str
    split: Split
    details: dict[str, str]
    is_chat: bool
    plain_text: str | None

    @property
    def counts(self) -> RowStatistics:
        return self.split.selection.counts

    @property
    def n_labelled(self) -> int:
        """The number of rows with a single labelled response."""
        return self.counts["desirable"] + self.counts["undesirable"]


@dataclass(frozen=True)
class RawData:
    """Rows that share a table: those of one split, or of train and a test split that is held out from it.

    counts has the row statistics of a function in DATASETS.
    """

    name: str
    rows: Sequence[Rows]
    splits: Sequence[str]
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        """The name of each part in messages."""
        return [self.name] if len(self.rows) == 1 else [part.name for part in self.rows]

    def digest(self) -> bytes:
        digest = hashlib.sha256(repr((list(self.splits), sorted(self.counts.items()), self.sources)).encode())
        for part in self.rows:
            digest.update(part.digest())
        return digest.digest()


@dataclass(frozen=True)
class Loader:
    """Loads data sets from tables in the cache folder; a table that is not there is written first."""

    encoder: Encoder
    cache: Path | None  # None: tables are temporary

    def __call__(self, raw: RawData) -> list[Loaded]:
        """Load the splits of raw data, and log the statistics of their rows."""
        table, about, selections = cached(self.cache, self.key(raw), partial(self.write, raw), read_folder)
        encoder, loaded = self.encoder, []
        for split, selection in selections.items():
            data = Split(table, selection, about["sources"], encoder.tokenize, encoder.truncation)
            loaded.append(Loaded(raw.name, data, about["details"], about["is_chat"], about["plain_text"]))
            log_message(f"Data {raw.name} {split}: {selection.counts.summary(len(selection.sizes))}")
            if split == raw.splits[0]:
                for note in about["notes"]:
                    log_message(note)
        return loaded

    def encode(self, rows: Rows, source: int) -> "Iterator[tuple[Encoded, pyarrow.RecordBatch]]":
        """Encode chunks of rows in order, on all cores where there are many."""
        encode = partial(encode_chunk, self.encoder, rows.name, source)
        return map_on_all_cores(encode, rows.chunks(), N_ALONE, rows.name)

    def key(self, raw: RawData) -> str:
        """A hash of all that a table depends on: the rows, the settings that change it, and the code."""
        digest = hashlib.sha256(code_digest())
        encoder = self.encoder
        settings = (encoder.sft, encoder.truncation, encoder.keeps_unusable, encoder.drop_inconsistent)
        digest.update(repr((settings, encoder.tokenize.identity(), encoder.formatter.settings)).encode())
        digest.update(raw.digest())
        return digest.hexdigest()

    def write(self, raw: RawData, folder: Path) -> None:
        """Encode all rows and choose those of each split."""
        import pyarrow as pa

        total, notes = Encoded(), []
        with pa.OSFile(str(folder / ROWS), "wb") as file, pa.ipc.new_file(file, schema()) as writer:
            for source, part in enumerate(raw.rows):
                part_total = Encoded()
                with without_garbage_collection():
                    for encoded, batch in self.encode(part, source):
                        part_total.add(encoded)
                        if len(batch):
                            writer.write_batch(batch)
                notes += part.notes(part_total)
                total.add(part_total)
        about = {
            "sources": raw.sources,
            "notes": notes,
            "details": total.details,
            "is_chat": total.is_chat,
            "plain_text": total.plain_text,
        }
        write_facts(folder, about, self.select(raw, RecordTable(folder), total))

    def select(self, raw: RawData, table: RecordTable, encoded: Encoded) -> dict[str, Selection]:
        """Choose the records of each split."""
        counts = RowStatistics({what: n for what, n in raw.counts.items() if what not in ("kept", "read")})
        for reason, n in encoded.dropped.items():
            counts.drop(reason, n)
        rendering = self.encoder.formatter.identity(encoded.is_chat)
        eos = str(self.encoder.tokenize.tokenizer.eos_token)
        sft, keeps_unusable = self.encoder.sft, self.encoder.keeps_unusable
        selections = {}
        for split in raw.splits:
            chooser = Chooser(table, RowStatistics(counts), sft, eos, keeps_unusable, rendering)
            selections[split] = chooser.choose(split if len(raw.splits) > 1 else None)
        return selections


def code_digest() -> bytes:
    """A hash of the code that makes tables and of the libraries that it uses."""
    digest = hashlib.sha256(f"{version('transformers')} {version('tokenizers')}".encode())
    folder = Path(__file__).parent
    schema_file = folder.parent / "settings" / "schema.py"  # it has the usual column names
    for path in (*sorted(folder.glob("*.py")), schema_file):
        digest.update(path.read_bytes())
    return digest.digest()
