"""The table of a data set's records: an Arrow file, written once under a key of its content, then memory-mapped.

A table has all records that can be trained on; selections.npz beside it chooses the examples of each split, and
about.json has what was counted. A later start with the same data and settings reads these files alone.
"""

import atexit
import fcntl
import json
import os
import shutil
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dpo.data.examples import Ids, TextExample, Tokenization, TokenizedExample, Truncation
from dpo.data.messages import to_json
from dpo.data.records import DESIRABLE, UNDESIRABLE, Record, text_of
from dpo.data.statistics import RowStatistics
from dpo.system.console import log_message
from dpo.system.errors import RunError, summarize_error
from dpo.system.files import MANIFEST, manifest_of, write_manifest

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

ROWS, ABOUT, SELECTIONS = "rows.arrow", "about.json", "selections.npz"
UNUSED_DAYS = 30  # after which a table is removed

T = TypeVar("T")


def schema() -> "pyarrow.Schema":
    """The columns of a table, one row per record."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema(
        {
            "source": pa.int32(),  # index in the sources of about.json
            "row": pa.int64(),
            "prompt": pa.large_string(),  # as the model sees it, with all its turns
            "responses": pa.list_(pa.large_string()),
            "messages": pa.large_string(),  # the prompt of a conversation, as JSON
            "prompt_ids": ids,
            "response_ids": pa.list_(ids),
            "masks": pa.list_(pa.list_(pa.bool_())),
            "choices": pa.list_(pa.list_(pa.int16())),
            "scores": pa.list_(pa.float64()),
            "label": pa.bool_(),
            "numbers": pa.map_(pa.string(), pa.float64()),
            "n_turns_left_out": pa.int32(),
            "warnings": pa.list_(pa.large_string()),
            "flags": pa.uint8(),
            "prompt_hash": pa.uint64(),
            "target_hash": pa.uint64(),
            "whole_hash": pa.uint64(),
        }
    )


def to_batch(records: Iterable[tuple[int, Record]], source: int) -> "pyarrow.RecordBatch":
    """Convert records with their row numbers to a batch of a table; source is the index of their source."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {name: [] for name in schema().names}
    for number, record in records:
        row, rendered, ids = record.row, record.rendered, record.ids
        is_conversation = not isinstance(row.prompt, str)
        values = {
            "source": source,
            "row": number,
            "prompt": rendered.prompt,
            "responses": list(map(text_of, rendered.responses)),
            "messages": to_json(row.prompt) if is_conversation else None,
            "prompt_ids": ids.prompt,
            "response_ids": ids.responses,
            "masks": ids.masks,
            "choices": record.choices,
            "scores": row.scores,
            "label": row.label,
            "numbers": row.numbers,
            "n_turns_left_out": record.n_turns_left_out,
            "warnings": record.warnings,
            "flags": record.flags,
            "prompt_hash": record.hashes[0],
            "target_hash": record.hashes[1],
            "whole_hash": record.hashes[2],
        }
        for name, value in values.items():
            columns[name].append(value)
    return pa.RecordBatch.from_pydict(columns, schema=schema())


class RecordTable:
    """The records of a table, memory-mapped: a record is read when it is needed."""

    def __init__(self, folder: Path):
        import pyarrow as pa

        self.reader = pa.ipc.open_file(pa.memory_map(str(folder / ROWS)))
        self.batches = [self.reader.get_batch(i) for i in range(self.reader.num_record_batches)]
        self.ends = list(accumulate(len(batch) for batch in self.batches))

    @cached_property
    def whole(self) -> "pyarrow.Table":
        import pyarrow as pa

        return pa.Table.from_batches(self.batches, schema=self.reader.schema)

    def column(self, name: str) -> "np.ndarray[Any, Any]":
        """The values of a column of numbers, (records,)."""
        values: np.ndarray[Any, Any] = self.whole.column(name).to_numpy()
        return values

    def n_choices(self) -> "np.ndarray[Any, Any]":
        """The number of examples of each record, (records,)."""
        import pyarrow.compute as pc

        lengths: np.ndarray[Any, Any] = pc.list_value_length(self.whole.column("choices")).to_numpy()
        return lengths

    def warnings(self) -> dict[str, "np.ndarray[Any, Any]"]:
        """By warning, a mask (records,) of the records that have it."""
        import numpy as np
        import pyarrow.compute as pc

        column = self.whole.column("warnings").combine_chunks()
        warnings = pc.list_flatten(column).to_numpy(zero_copy_only=False)
        records = pc.list_parent_indices(column).to_numpy()
        masks = {}
        for warning in dict.fromkeys(warnings.tolist()):
            masks[warning] = np.isin(np.arange(len(column)), records[warnings == warning])
        return masks

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The values of a record, by column."""
        part = bisect_right(self.ends, index)
        batch = self.batches[part]
        values: dict[str, Any] = batch.slice(index - self.ends[part] + len(batch), 1).to_pylist()[0]
        return values


@dataclass(frozen=True)
class Selection:
    """The examples of a split, group after group. A group has the examples of one prompt, which are shuffled as one.

    records (examples,) has the index of each example's record, choices (examples,) the index of the example among that
    record's choices, and sizes (groups,) the number of examples of each group.
    """

    records: "np.ndarray[Any, np.dtype[np.int64]]"
    choices: "np.ndarray[Any, np.dtype[np.int64]]"
    sizes: "np.ndarray[Any, np.dtype[np.int64]]"
    counts: RowStatistics
    digest: str  # SHA-256 of the examples in order


@dataclass(frozen=True)
class Split(Sequence[TokenizedExample]):
    """The selected examples of a table, tokenized and truncated.

    first is the index of the first example in the data of the run.
    """

    table: RecordTable
    selection: Selection
    sources: Sequence[str]
    tokenize: Tokenization
    truncation: Truncation
    first: int = 0

    def __len__(self) -> int:
        return len(self.selection.records)

    @property
    def sizes(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """The number of examples of each group, (groups,)."""
        return self.selection.sizes

    def __getitem__(self, index: Any) -> Any:
        record = self.table[int(self.selection.records[index])]
        choice = record["choices"][int(self.selection.choices[index])]
        text = TextExample(
            prompt=record["prompt"],
            responses=tuple(record["responses"][i] for i in choice),
            truncation=self.truncation,
            row=record["row"],
            source=self.sources[record["source"]],
            scores=tuple(record["scores"][i] for i in choice) if record["scores"] else (),
            label=record["label"],
            numbers=dict(record["numbers"]),
            warnings=tuple(record["warnings"]),
            messages=None if record["messages"] is None else json.loads(record["messages"]),
        )
        ids = Ids(record["prompt_ids"], record["response_ids"], record["masks"]).choose(choice)
        return self.tokenize.truncate(ids, text, self.first + index, record["n_turns_left_out"])

    def label_counts(self) -> tuple[int, int]:
        """The number of desirable and of undesirable responses; a pair has one of each."""
        flags = self.table.column("flags")[self.selection.records]
        desirable, undesirable = flags & DESIRABLE > 0, flags & UNDESIRABLE > 0
        return int((~undesirable).sum()), int((~desirable).sum())

    def scores(self) -> Iterator[tuple[float, ...]]:
        """Yield the scores of each example, chosen first, or ()."""
        scores, choices = (self.table.whole.column(name) for name in ("scores", "choices"))
        for record, choice in zip(self.selection.records.tolist(), self.selection.choices.tolist(), strict=True):
            all_scores = scores[record].as_py()
            yield tuple(all_scores[i] for i in choices[record].as_py()[choice]) if all_scores else ()


def write_facts(folder: Path, about: Mapping[str, Any], selections: Mapping[str, Selection]) -> None:
    """Write what is known of a table: facts, and the selections by split."""
    import numpy as np

    arrays: dict[str, Any] = {}
    for split, selection in selections.items():
        arrays |= {f"{split} {name}": getattr(selection, name) for name in ("records", "choices", "sizes")}
    np.savez(folder / SELECTIONS, **arrays)
    facts = {split: [selection.counts, selection.digest] for split, selection in selections.items()}
    text = json.dumps({**about, "selections": facts}, ensure_ascii=False)
    (folder / ABOUT).write_text(text, encoding="utf-8")


def read_folder(folder: Path) -> tuple[RecordTable, dict[str, Any], dict[str, Selection]]:
    """Open a table, and read about.json and the selections by split; mark the folder as used.

    ValueError, or another error, if a file is damaged.
    """
    import numpy as np

    if (folder / MANIFEST).read_text(encoding="utf-8") != manifest_of(folder, {}):
        raise ValueError(f"{folder}: is damaged")
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    with open(folder / SELECTIONS, "rb") as file, np.load(file) as arrays:
        selections = {
            split: Selection(
                records=arrays[f"{split} records"],
                choices=arrays[f"{split} choices"],
                sizes=arrays[f"{split} sizes"],
                counts=RowStatistics(counts),
                digest=digest,
            )
            for split, (counts, digest) in about["selections"].items()
        }
    with suppress(OSError):
        os.utime(folder)
    return RecordTable(folder), about, selections


# The cache of tables


def cached(cache: Path | None, key: str, write: Callable[[Path], None], read: Callable[[Path], T]) -> T:
    """Read the folder of a key. If it is missing or damaged, one process fills it with `write` while others wait.

    Without a cache, or if it cannot be written, the folder is temporary. RunError if the disk is full.
    """
    if cache is None:
        folder = Path(tempfile.mkdtemp(prefix="data-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        fill(folder, write)
        return read(folder)
    folder = cache / key
    with suppress(Exception):  # damaged files raise errors of many kinds
        return read(folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = open(cache / f"{key}.lock", "a")
    except OSError as error:
        log_message(f"{cache}: cannot be written ({error.strerror}), so the table of the data is temporary.")
        return cached(None, key, write, read)
    with lock:
        with suppress(OSError):  # without locks, as on some file systems, several processes write
            fcntl.flock(lock, fcntl.LOCK_EX)
            for staging in cache.glob(f".staging-{key}-*"):  # left by processes that were killed
                shutil.rmtree(staging, ignore_errors=True)
        with suppress(Exception):  # another process may have written it meanwhile
            return read(folder)
        write_folder(folder, write)
        with suppress(OSError):
            os.unlink(lock.name)
    return read(folder)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder as a whole or not at all, and remove folders that were not used for UNUSED_DAYS."""
    staging = Path(tempfile.mkdtemp(prefix=f".staging-{folder.name}-", dir=folder.parent))
    try:
        fill(staging, write)
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # without locks, another process may have written it
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for path in folder.parent.iterdir():
        if path.is_dir() and time.time() - path.stat().st_mtime > UNUSED_DAYS * 24 * 3600:
            shutil.rmtree(path, ignore_errors=True)


def fill(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder with `write`, and wait until it is on disk; RunError in one line if it cannot be written."""
    try:
        write(folder)
        write_manifest(folder, {})
    except OSError as error:
        reason = error.strerror or summarize_error(error)
        raise RunError(f"{folder.parent}: the table of the data cannot be written ({reason})", "disk") from None
