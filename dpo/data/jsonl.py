"""Files of JSON: their rows by number, each read when it is needed, and errors that name file and row."""

import bz2
import gzip
import io
import json
import lzma
import os
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from dpo.system.errors import UserError

FIRST = 100  # rows that are looked at for the names of columns
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what a damaged file raises
BLANK = object()


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, without its compression if its suffix names one."""
    if path.suffix == ".zst":
        import pyarrow  # which datasets installs; slow to import

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # which refuses a cut file
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(path.suffix, open)(path, "rb")


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) for each line that is not blank; UserError that names the line as a row.

    Byte order marks and Windows line ends are ignored.
    """
    for number, _, _, value in parse_lines(path):
        yield number, value


def parse_lines(path: Path) -> Iterator[tuple[int, int, bytes, Any]]:
    """Yield (line number, position of its first byte, line, value) for each line that is not blank, as read_jsonl."""
    number = start = 0
    try:
        with open_bytes(path) as lines:
            for number, line in enumerate(lines, start=1):
                value = parse_line(line)
                if value is not BLANK:
                    yield number, start, line, value
                start += len(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, row {number}: is not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, or a number of over 4,300 digits
        if isinstance(error, UserError):
            raise
        form = "a row is one line, and a file that is one list ends in .json"
        if ".json" in path.suffixes:
            form = "a .json file is one list of rows, or has a row per line"
        hint = f"; {form}" if line.strip() in (b"[", b"{") else ""
        raise UserError(f"{path}, row {number}: is not JSON ({error}){hint}") from None
    except UNREADABLE as error:
        raise UserError(f"{path}, after row {number}: cannot be read ({error})") from None


def parse_line(line: bytes) -> Any:
    """Return the value of a line, BLANK if there is none."""
    text = line.decode("utf-8").removeprefix("\ufeff")  # on any line, since files are also concatenated
    return json.loads(text) if text and not text.isspace() else BLANK


class JsonRows:
    """The rows of a file of JSON lines, or of one list in a .json file; only where each begins is kept in memory.

    Iterating reads all of them, in order, and must come before a row is read by its index.
    """

    def __init__(self, path: Path):
        self.path, self.name = path, str(path)
        self.starts, self.lengths = array("q"), array("q")
        self.file: IO[bytes] | None = None
        self.stamp: tuple[int, int] | None = None

    def columns(self) -> list[str]:
        """Return the names of the fields of the first rows."""
        rows = (row for _, _, _, row in islice(self.lines(), FIRST))
        return list(dict.fromkeys(str(name) for row in rows if isinstance(row, dict) for name in row))

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Yield (row number, row), and keep where each begins; UserError that names file and row if one is not JSON.

        The lines of a file that cannot be read by position are copied into a temporary file.
        """
        self.starts, self.lengths = array("q"), array("q")
        copied = self.path.suffix in COMPRESSED or self.is_list()
        self.file = file = tempfile.TemporaryFile() if copied else open(self.path, "rb")
        weakref.finalize(self, file.close)
        self.stamp = None if copied else self.stamp_of(file)
        for number, start, line, value in self.lines():
            self.starts.append(file.tell() if copied else start)
            self.lengths.append(len(line))
            if copied:
                file.write(line)
            yield number, value
        if copied:
            file.flush()

    def lines(self) -> Iterator[tuple[int, int, bytes, Any]]:
        """Yield (row number, position, line, row)."""
        return self.list_items() if self.is_list() else parse_lines(self.path)

    def is_list(self) -> bool:
        """Return whether a .json file holds one list of rows."""
        if ".json" not in self.path.suffixes:
            return False
        try:
            with open_bytes(self.path) as file:
                return file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        except UNREADABLE as error:
            raise UserError(f"{self.path}, after row 0: cannot be read ({error})") from None

    def list_items(self) -> Iterator[tuple[int, int, bytes, Any]]:
        """Yield the items of a .json file's list as lines of JSON."""
        try:
            with open_bytes(self.path) as file:
                items = json.loads(file.read().decode("utf-8").removeprefix("\ufeff"))
        except (ValueError, RecursionError, *UNREADABLE) as error:
            raise UserError(f"{self.path}, row 1 and on: is not a list in JSON ({error})") from None
        for number, item in enumerate(items, start=1):
            yield number, 0, json.dumps(item).encode(), item

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Any:
        """Return a row; UserError if the file has changed since its rows were counted."""
        assert self.file is not None
        if self.stamp is not None and self.stamp != self.stamp_of(self.file):
            raise UserError(f"{self.path}: has changed since the run began; leave data alone while a run reads it")
        return parse_line(os.pread(self.file.fileno(), self.lengths[index], self.starts[index]))

    @staticmethod
    def stamp_of(file: IO[bytes]) -> tuple[int, int]:
        """Return what changes when a file is written to."""
        status = os.fstat(file.fileno())
        return status.st_mtime_ns, status.st_size
