"""Reads files: a function for each format, which yields the rows in order, each with its number from 1.

A table is read as its writer meant it, or refused with an error that names the file and the row.
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import chain, count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dpo.system.errors import UserError, summarize_error

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

BATCH = 100  # rows of an Arrow table that are converted together
MAX_CELL = 10**8  # characters; a quotation mark that is not closed makes a cell of the rest of a CSV file
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "pyarrow"}  # suffix: the module that decompresses
NOT_DATA = {  # how a file begins that is not the data itself, and what helps
    rb"version https://(git-lfs|hawser)\.github\.com/spec/": "a pointer of Git LFS; run git lfs pull in its folder",
    rb"(\.\./)*(\.git)?/annex/objects/": "a pointer of git-annex; run git annex get in its folder",
    rb"(\xef\xbb\xbf)?\s*<(?i:!doctype|html|\?xml)": "a web page; download the file itself (the raw file)",
}

Rows = Iterator[tuple[int, Any]]


@dataclass(frozen=True)
class FileTable:
    """The rows of a file, which is opened when they are read."""

    path: Path
    read: Callable[[Path], Rows]

    @property
    def name(self) -> str:
        return str(self.path)

    def __iter__(self) -> Rows:
        """Yield (row number from 1, row); UserError that names file and row if it cannot be read."""
        refuse_pointers(self.path)
        return naming_errors(self.name, self.read(self.path))

    def digest(self) -> bytes:
        """A SHA-256 of the file and its format."""
        refuse_pointers(self.path)
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(suffix_of(self.path).encode())
        return digest.digest()


@dataclass(frozen=True)
class DatasetTable:
    """The rows of a data set of the datasets library, which stay on disk until they are read."""

    name: str
    dataset: "Dataset"

    def batches(self) -> "Iterator[pyarrow.Table]":
        return self.dataset.with_format("arrow").iter(batch_size=BATCH)

    def __iter__(self) -> Rows:
        return naming_errors(self.name, enumerate(rows_of(self.batches()), start=1))

    def digest(self) -> bytes:
        """A SHA-256 of the rows and their types."""
        digest = hashlib.sha256(repr(self.dataset.features).encode())
        for table in self.batches():
            for batch in table.combine_chunks().to_batches():
                digest.update(batch.serialize())
        return digest.digest()


Table = FileTable | DatasetTable


def naming_errors(name: str, rows: Rows) -> Rows:
    """Yield the rows; an error in reading them becomes a UserError that names the table and the row before it."""
    number = 0
    try:
        for number, row in rows:
            yield number, row
    except UserError as error:
        raise UserError(f"{name}, {error}") from None
    except Exception as error:  # of many kinds: a damaged file, a wrong format
        raise UserError(f"{name}, after row {number}: cannot be read ({summarize_error(error)})") from None


def refuse_pointers(path: Path) -> None:
    """Raise UserError if a file is only a pointer to the data, or cannot be opened."""
    try:
        with open(path, "rb") as file:
            head = file.read(1000)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        if path.is_symlink() and not path.exists():
            problem = f"is a link to {path.readlink()}, which is not there"
            if "annex" in path.readlink().parts:
                problem += "; run git annex get in its folder"
        raise UserError(f"{path}: {problem}") from None
    for pattern, meaning in NOT_DATA.items():
        if re.match(pattern, head):
            raise UserError(f"{path}: is not the data but {meaning}")


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed if its suffix names a compression."""
    if path.suffix not in COMPRESSED:
        return open(path, "rb")
    try:
        module = import_module(COMPRESSED[path.suffix])
    except ImportError as error:  # Python can be built without bz2 and lzma
        raise UserError(f"row 0: cannot be decompressed here ({error}); decompress it") from None
    if path.suffix == ".zst":
        return io.BufferedReader(module.input_stream(str(path), compression="zstd"))  # raises for a truncated file
    return module.open(path, "rb")


def lines_of(path: Path, newline: str, unit: str = "line") -> Iterator[str]:
    """Yield the lines of a text file, without a byte order mark; UserError that names a line that is not UTF-8."""
    number = 0
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        try:
            for number, line in enumerate(file, start=1):
                line.encode()  # fails for the surrogates that stand for wrong bytes
                if number == 1 and "\0" in line:
                    raise UserError(f"{unit} 1: contains zeros, as UTF-16 does; save it as UTF-8")
                yield line
        except UnicodeEncodeError as error:
            wrong = f"byte {ord(error.object[error.start]) - 0xDC00:#x} at character {error.start + 1}"
            mitigation = "save it as UTF-8, which Excel calls CSV UTF-8"
            raise UserError(f"{unit} {number}: is not UTF-8 ({wrong}); {mitigation}") from None


# JSON


def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The keys and values of an object as a dict; ValueError if a key occurs twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {key!r} occurs twice in an object")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=as_object)
LIST_GAP = re.compile(r"\s*,?\s*")  # between the items of a list


def read_json(path: Path) -> Rows:
    """Yield the rows of JSON lines, numbered by line, or the items of a list, [...].

    Blank lines, byte order marks and Windows line ends are ignored.
    """
    lines, is_first = lines_of(path, newline="\n", unit="row"), True
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix("\ufeff")  # on any line, since files may be concatenated
        if not text or text.isspace():
            continue
        if is_first and text.lstrip().startswith("["):
            yield from read_list("".join(chain("\n" * (number - 1), [text], lines)))
            return
        is_first = False
        try:
            row = DECODER.decode(text)
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of over 4,300 digits
            hint = ""
            if text.rstrip().endswith(("{", "[", ",")):
                hint = "; each row is one line, unless the file is one list, [...]"
            elif not text.endswith("\n"):
                hint = "; the file ends in this row: is it complete?"
            raise UserError(f"row {number}: is not JSON ({error}){hint}") from None
        yield number, row


def read_list(text: str) -> Rows:
    """Yield the items of a JSON list, numbered from 1."""
    end = text.index("[") + 1
    for number in count(1):
        gap = LIST_GAP.match(text, end)
        assert gap is not None  # a gap may be empty
        if text.startswith("]", gap.end()):
            if text[gap.end() + 1 :].strip():
                problem = "the list ends before the file; a file is one list of rows, or has a row per line"
                raise UserError(f"row 1: {problem}")
            return
        try:
            row, end = DECODER.raw_decode(text, gap.end())
        except (ValueError, RecursionError) as error:
            raise UserError(f"row {number}: is not JSON ({error})") from None
        yield number, row


# CSV


def read_csv(path: Path, delimiter: str) -> Rows:
    """Yield the rows of a CSV file; all cells are texts, since a response may be "12", "NA" or "None".

    The delimiter may be another one, such as Excel's; the header shows it.
    """
    headers = {
        name: next(csv.reader(lines_of(path, newline=""), delimiter=name), []) for name in (delimiter, ";", "\t")
    }
    delimiter = max(headers, key=lambda name: len(headers[name]))  # the first of equals
    yield from csv_rows(path, delimiter, quoting_of(path) if delimiter == "\t" else csv.QUOTE_MINIMAL)


def quoting_of(path: Path) -> int:
    """Whether a file with tabs quotes cells (csv.QUOTE_MINIMAL), or has quotation marks in its texts (csv.QUOTE_NONE).

    UserError if both are possible and give different rows.
    """
    n_cells = Counter(line.count("\t") + 1 for line in lines_of(path, newline="") if line.strip(" \r\n"))
    if len(n_cells) > 1:
        return csv.QUOTE_MINIMAL
    try:
        n_rows = 1 + sum(1 for _ in csv_rows(path, "\t", csv.QUOTE_MINIMAL))
    except UserError:
        return csv.QUOTE_NONE
    if n_rows != n_cells.total():
        problem = "a quotation mark that begins a cell may end in a later row, or may be a part of the cell"
        raise UserError(f"row 0: {problem}; write the file as .csv or .jsonl")
    return csv.QUOTE_MINIMAL


def csv_rows(path: Path, delimiter: str, quoting: int) -> Rows:
    """Yield the rows of a CSV file; UserError for one whose number of cells differs from the header's."""
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(lines_of(path, newline=""), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    number = line = 0
    try:
        names = checked_names([name or f"Unnamed: {i}" for i, name in enumerate(next(reader, []))])  # as pandas
        line = reader.line_num
        for cells in reader:
            if len(cells) > 1 or (cells and cells[0].strip()):  # no blank line
                number += 1
                if len(cells) != len(names):
                    problem = f"its number of cells is {len(cells)}, but the header's is {len(names)}"
                    mitigation = f"a cell that holds {delimiter!r} or a line break must stand in quotation marks"
                    raise UserError(f"row {number}, line {line + 1}: {problem}; {mitigation}")
                yield number, dict(zip(names, cells, strict=True))
            line = reader.line_num
    except csv.Error as error:
        mitigation = "a cell that begins with a quotation mark must end with one, and one inside is written twice"
        raise UserError(f"row {number + 1}, line {line + 1}: cannot be read ({error}); {mitigation}") from None


def checked_names(names: Sequence[str]) -> Sequence[str]:
    """The names of columns; UserError unless there are some, all different."""
    if not names or len(set(names)) < len(names):
        listed = ", ".join(names[:20]) or "nothing"
        raise UserError(f"row 0: the header must name each column once, not {listed}")
    return names


# Arrow


def read_parquet(path: Path) -> Rows:
    import pyarrow.parquet  # slow to import, and not needed for JSON and CSV

    source: Any = str(path)
    if path.suffix in COMPRESSED:
        with open_bytes(path) as file:
            source = io.BytesIO(file.read())  # Parquet is read from its end
    with pyarrow.parquet.ParquetFile(source) as table:
        yield from enumerate(rows_of(table.iter_batches(BATCH)), start=1)


def read_arrow(path: Path) -> Rows:
    """Yield the rows of an Arrow stream, as the datasets library writes it, or of an Arrow file."""
    import pyarrow

    with open_bytes(path) as file:
        if file.peek(8).startswith(b"ARROW1"):  # type: ignore[attr-defined]  # a file, which holds a stream after a mark
            file.read(8)
        with pyarrow.ipc.open_stream(file) as batches:
            parts = (batch.slice(i, BATCH) for batch in batches for i in range(0, batch.num_rows, BATCH))
            yield from enumerate(rows_of(parts), start=1)


def rows_of(batches: "Iterable[pyarrow.RecordBatch | pyarrow.Table]") -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow table with JSON decoded, and without the nulls that Arrow adds to nested objects.

    All objects of a column have the same keys in Arrow: a key that an object lacks is null. Images and the like are not
    decoded.
    """
    for batch in batches:
        decoders = {field.name: decode for field in batch.schema if (decode := decoder(field.type))}
        checked_names(batch.schema.names)
        for row in batch.to_pylist():
            for name, decode in decoders.items():
                row[name] = None if row[name] is None else decode(row[name])
            yield row


def decoder(kind: "pyarrow.DataType") -> Callable[[Any], Any] | None:
    """A function that restores what was written from a value of a type, not null; None if it needs no change."""
    import pyarrow
    from pyarrow import types

    if isinstance(kind, pyarrow.JsonType):
        return DECODER.decode
    if types.is_struct(kind):
        fields = {field.name: decoder(field.type) or (lambda value: value) for field in kind}
        return lambda value: {name: fields[name](item) for name, item in value.items() if item is not None}
    if types.is_map(kind):
        return dict
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        decode = decoder(kind.value_type)
        return decode and (lambda value: [None if item is None else decode(item) for item in value])
    return None


# One line per format: the suffix, and the function that reads a file.
FORMATS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".ndjson": read_json,
    ".jsonlines": read_json,
    ".csv": partial(read_csv, delimiter=","),
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
SUFFIXES = f"{', '.join(list(FORMATS)[:-1])} or {list(FORMATS)[-1]}"


def suffix_of(path: Path) -> str:
    """The suffix of a file, in lower case; a suffix of compression is ignored."""
    return (Path(path.stem) if path.suffix in COMPRESSED else path).suffix.lower()


def open_file(path: Path) -> FileTable:
    """The table of a file; UserError if its suffix names no known format."""
    if suffix_of(path) not in FORMATS:
        raise UserError(f"{path}: must be a file of {SUFFIXES}")
    return FileTable(path, FORMATS[suffix_of(path)])
