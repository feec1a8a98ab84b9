"""JSON files: rows are read by number when needed, and errors name file and row.

The JSON reader of the datasets library is as fast, but it converts texts that look like dates, does not distinguish a
missing field from null, and its errors do not name the line.
"""

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

N_HEAD = 100  # rows that are searched for column names
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what a damaged file raises
BOM = "\ufeff"


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed if its suffix names a compression."""
    if path.suffix == ".zst":
        import pyarrow  # installed with datasets; slow to import

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # raises for a truncated file
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(path.suffix, open)(path, "rb")


def is_list(path: Path) -> bool:
    """Whether a .json file holds one list of rows; UserError if a file cannot be read."""
    try:
        with open_bytes(path) as file:
            start = file.read(1000).removeprefix(BOM.encode()).lstrip()
        return ".json" in path.suffixes and start.startswith(b"[")
    except UNREADABLE as error:
        raise UserError(f"{path}, after row 0: cannot be read ({error})") from None


def lines_of(path: Path, as_list: bool) -> Iterator[bytes]:
    """Yield the lines of a compressed file, or the items of a list as lines of JSON."""
    number = 0
    try:
        with open_bytes(path) as file:
            if as_list:
                items = json.loads(file.read().decode("utf-8").removeprefix(BOM))
                yield from (json.dumps(item).encode() + b"\n" for item in items)
            else:
                for line in file:
                    number += 1
                    yield line
    except UNREADABLE as error:
        raise UserError(f"{path}, after row {number}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, row 1 and on: is not a valid JSON list ({error})") from None


class JsonRows:
    """The rows of a JSON lines file, or of a list in a .json file; only their positions are kept in memory.

    Iterate over all rows once before reading rows by index. Blank lines, byte order marks and Windows line ends are
    ignored. Files that cannot be read by position are copied into a temporary file.
    """

    def __init__(self, path: Path):
        self.path, self.name = path, str(path)
        self.starts, self.lengths = array("q"), array("q")
        as_list = is_list(path)
        is_copied = as_list or path.suffix in COMPRESSED
        self.file = tempfile.TemporaryFile() if is_copied else open(path, "rb")
        weakref.finalize(self, self.file.close)
        if is_copied:
            self.file.writelines(lines_of(path, as_list))
            self.file.flush()
        self.stamp = self.current_stamp()

    def current_stamp(self) -> tuple[int, int]:
        """Modification time and size."""
        status = os.fstat(self.file.fileno())
        return status.st_mtime_ns, status.st_size

    def columns(self) -> list[str]:
        """The names of the fields of the first rows."""
        rows = [row for _, row in islice(self, N_HEAD) if isinstance(row, dict)]
        return list(dict.fromkeys(str(name) for row in rows for name in row))

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Yield (line number from 1, row); UserError that names file and line if one is not JSON."""
        self.starts, self.lengths = array("q"), array("q")
        number = start = 0
        self.file.seek(0)
        try:
            for number, line in enumerate(self.file, start=1):
                text = line.decode("utf-8").removeprefix(BOM)  # on any line, since files may be concatenated
                if text and not text.isspace():
                    row = json.loads(text)
                    self.starts.append(start)
                    self.lengths.append(len(line))
                    yield number, row
                start += len(line)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}, row {number}: is not UTF-8 ({error.reason} at byte {error.start})") from None
        except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, or a number of over 4,300 digits
            form = "each row is one line; a file that is one list needs the suffix .json"
            if ".json" in self.path.suffixes:
                form = "a .json file is one list of rows, or has a row per line"
            hint = f"; {form}" if line.strip() in (b"[", b"{") else ""
            raise UserError(f"{self.path}, row {number}: is not JSON ({error}){hint}") from None
        except OSError as error:
            raise UserError(f"{self.path}, after row {number}: cannot be read ({error})") from None

    def __getitem__(self, index: int) -> Any:
        """Read a row; UserError if the file has changed since it was opened."""
        if self.stamp != self.current_stamp():
            raise UserError(f"{self.path}: has changed since the run began; do not change data during a run")
        line = os.pread(self.file.fileno(), self.lengths[index], self.starts[index])
        return json.loads(line.decode("utf-8").removeprefix(BOM))
