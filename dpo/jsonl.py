"""Files of JSON lines: which of a folder are read, their rows by number, and what is ignored."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz")
DATA_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt"}
SHOWN = 8  # names in a note, at most


def find_jsonl(folder: Path, split: str) -> Path | None:
    """Find SPLIT.jsonl or SPLIT.jsonl.gz; UserError if both are there."""
    found = [path for path in (folder / f"{split}{suffix}" for suffix in SUFFIXES) if path.is_file()]
    if len(found) > 1:
        raise UserError(f"datasets=[{folder}]: holds both {found[0].name} and {found[1].name}; remove one")
    return found[0] if found else None


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) for each line that is not blank; UserError that names the line as a row.

    Byte order marks and Windows line ends are ignored.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8").removeprefix("\ufeff")  # on any line, since files are also concatenated
                if text and not text.isspace():
                    yield number, json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, row {number}: is not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, or a number of over 4,300 digits
        raise UserError(f"{path}, row {number}: is not JSON ({error})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}, after row {number}: cannot be read ({error})") from None


def note_ignored_files(folder: Path, read: Collection[str]) -> list[str]:
    """Return a line that lists the data files of a folder other than those that are read, or nothing."""
    names = [path.name for path in folder.iterdir() if DATA_SUFFIXES & set(path.suffixes) and path.is_file()]
    ignored = [escaped(name) for name in sorted(names) if name not in read and not name.startswith(".")]
    words = "train.jsonl and test.jsonl (or .jsonl.gz) are read"
    return [f"{folder}: files ignored: {listed(ignored)}; {words}"] if ignored else []


def note_ignored_columns(path: Path, n_rows: Counter[str], read: Collection[str]) -> list[str]:
    """Return a line that lists the columns of a file other than those that are read, or nothing.

    n_rows holds for each column in how many rows it occurs.
    """
    ignored = [f"{escaped(name)} (in {n:,} rows)" for name, n in sorted(n_rows.items()) if name not in read]
    return [f"{path}: columns ignored: {listed(ignored)}; {', '.join(read)} are read"] if ignored else []


def escaped(name: str) -> str:
    """Return a name without line breaks and other characters that could not be printed."""
    return repr(name)[1:-1]


def listed(names: Sequence[str]) -> str:
    """Join the first names of a list, with the number of those that are left."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")
