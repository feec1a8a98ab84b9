"""Rows in append-only JSON lines, which a process may be killed while writing."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from dpo.system.files import atomic_write, naming_file
from tools.rounds.records import Record


def read_rows(path: Path) -> list[Record]:
    """The rows of a JSON lines file, without a last line that was not written whole."""
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def remove_part(path: Path) -> None:
    """Remove a last line that was not written whole from a JSON lines file."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def write_rows(path: Path, rows: Iterable[Record]) -> None:
    """Write a JSON lines file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(map(to_line, rows)).encode())


def to_line(row: Record) -> str:
    return json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n"


class Shards:
    """The rows computed so far, by their key: NAME-0.jsonl, NAME-1.jsonl, ..., one per process that writes."""

    def __init__(self, path: Path, key: str = "id"):
        self.path, self.key = path, key
        self.rows: dict[str, Record] = {}
        self.repaired: set[Path] = set()  # shards to which this process has written
        for file in (path, *self.files()):  # the file itself is there if a process was killed after it had merged them
            for row in read_rows(file):
                self.rows.setdefault(row[key], row)

    def files(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}-*.jsonl"))

    def shard(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.stem}-{rank}.jsonl")

    def append(self, rows: Sequence[Record], rank: int = 0) -> None:
        """Add rows that are not there yet, and wait until they are on disk."""
        new = [row for row in rows if row[self.key] not in self.rows]
        if not new:
            return
        path = self.shard(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path not in self.repaired:
            remove_part(path)
            self.repaired.add(path)
        with naming_file(path), open(path, "ab") as file:
            file.write("".join(map(to_line, new)).encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {row[self.key]: row for row in new}

    def remove(self, keys: Iterable[str], rank: int = 0) -> None:
        """Remove the rows with these keys that this process has written."""
        removed = set(keys)
        write_rows(self.shard(rank), [row for row in read_rows(self.shard(rank)) if row[self.key] not in removed])
        self.rows = {key: row for key, row in self.rows.items() if key not in removed}

    def merge(self, keys: Iterable[str]) -> None:
        """Write the rows with these keys, in this order, to the file itself, and remove the shards."""
        write_rows(self.path, (self.rows[key] for key in keys))
        for shard in self.files():
            shard.unlink()
