"""Where rows lie: files, folders and hub data sets, their splits, and tables that read a row when it is needed."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from dpo.data.jsonl import COMPRESSED, UNREADABLE, JsonRows, open_bytes
from dpo.system.console import on_terminal
from dpo.system.errors import UserError, summarize_error

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")
DATA_FILE = re.compile(rf"\.(jsonl|json|csv|tsv|parquet)({'|'.join(map(re.escape, COMPRESSED))})?$")
DATA_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt"}
HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
SHARD = re.compile(r"-\d{5}-of-\d{5}.*$")
FORMS = "a folder or file of .jsonl, .json, .csv, .tsv or .parquet, a folder of save_to_disk, or a hub data set, me/set"
TEST_NAMES = ("test", "validation", "valid", "val", "dev", "eval", "evaluation")
SHOWN = 8  # names in a note, at most
USUAL = {f"{name}{kind}" for name in ("train", *TEST_NAMES) for kind in ("", "_sft", "_prefs")}  # names of splits
BATCH = 100  # rows of a table that are read together, where all are read


class Table(Protocol):
    """Rows with numbers; iterating reads all of them, and must come before a row is read by its index from 0."""

    name: str  # as messages call it

    def columns(self) -> list[str]:
        """Return the names of the columns."""

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Yield (row number from 1, row)."""

    def __getitem__(self, index: int) -> Any:
        """Return a row."""


class ArrowTable:
    """A table of the datasets library, whose rows stay on disk until they are read.

    Columns of JSON, in which the library keeps values of several types, are decoded; images and the like are not.
    """

    def __init__(self, name: str, rows: "Dataset"):
        import datasets
        import pyarrow

        self.name, self.rows = name, rows.with_format("arrow")  # which is faster than one row at a time
        self.json = datasets.Features({key: kind for key, kind in rows.features.items() if "Json(" in repr(kind)})
        pyarrow.default_memory_pool().release_unused()  # hundreds of megabytes, where a large file was converted

    def columns(self) -> list[str]:
        """Return the names of the columns."""
        return list(self.rows.column_names)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Yield (row number from 1, row)."""
        batches = self.rows.iter(batch_size=BATCH)
        return enumerate((self.decoded(row) for batch in batches for row in batch.to_pylist()), start=1)

    def __getitem__(self, index: int) -> Any:
        """Return a row."""
        return self.decoded(self.rows[index].to_pylist()[0])

    def decoded(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row with its columns of JSON as values."""
        return row | self.json.decode_example({name: row[name] for name in self.json}) if self.json else row


@dataclass
class Source:
    """The tables of a data set's training split, those of its test split (None: a share is held out), and notes."""

    train: list[Table]
    test: list[Table] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SplitNames:
    """The names of the splits that are asked for, None where the usual ones are looked for."""

    train: str | None
    test: str | None
    sft: bool

    def choose(self, found: Collection[str], where: str) -> tuple[str, str | None]:
        """Return the names of the training and the test split; UserError if there is none to train on."""
        kinds = ("", "_sft", "_prefs") if self.sft else ("", "_prefs", "_sft")
        usual = {
            "train": [f"train{kind}" for kind in kinds],
            "test": [f"{name}{kind}" for kind in kinds for name in TEST_NAMES],
        }
        chosen: dict[str, str | None] = {}
        for split, given in (("train", self.train), ("test", self.test)):
            if given is not None and given not in found:
                raise UserError(f"split_{split}={given}: {where} has no such split; it has {listed(sorted(found))}")
            chosen[split] = given or next((name for name in usual[split] if name in found), None)
        train, test = chosen["train"], chosen["test"]
        if train is None:
            forms = "train.jsonl, .json, .csv, .tsv or .parquet"
            names = f"set split_train to one of {listed(sorted(found))}"
            have = f"{names}, or give files as a glob, datasets=['FOLDER/*.jsonl']" if found else "add one"
            raise UserError(f"datasets=[{where}]: there is no {forms}; {have}")
        if train == test:
            raise UserError(f"split_train, split_test: {where} would be trained and evaluated on {train}; set another")
        return train, test


def is_hub_name(name: str) -> bool:
    """Return whether a name is that of a hub data set, me/set or me/set:config, and no path on this machine."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists() and not DATA_FILE.search(name)


def open_source(name: str, splits: SplitNames, known: Collection[str] = ()) -> Source:
    """Open a folder, a file, a glob of files or a hub data set; UserError in one line if it cannot be read.

    known are the names of data sets that are no paths, for the message about a name that is nothing of all this.
    """
    path = Path(os.path.expanduser(name))  # which leaves ~ in place where there is no such home
    if path.is_dir():
        is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        return open_saved(path, splits) if is_saved else open_folder(path, splits)
    files = [path] if path.is_file() else sorted(Path(found) for found in glob(str(path), recursive=True))
    if files and all(DATA_FILE.search(file.name) and file.is_file() for file in files):
        if splits.train or splits.test:
            raise UserError(f"split_train, split_test: {name} has no splits; leave them out, or give a folder")
        return Source([open_file(file) for file in files])
    if is_hub_name(name):
        return open_hub(name, splits)
    if DATA_FILE.search(name):
        raise UserError(f"datasets=[{name}]: there is no such file")
    raise UserError(f"datasets=[{name}]: neither a known data set ({', '.join(known)}) nor {FORMS}")


def open_file(path: Path) -> Table:
    """Open one file by its suffix; UserError that names it if it cannot be read."""
    match = DATA_FILE.search(path.name)
    assert match is not None
    if match[1] in ("jsonl", "json"):
        return JsonRows(path)
    options: dict[str, Any] = {}
    if match[1] in ("csv", "tsv"):
        delimiter, columns = csv_form(path, "\t" if match[1] == "tsv" else ",")
        options = {"sep": delimiter, "features": columns, "na_filter": False}
    kind = "csv" if match[1] == "tsv" else match[1]
    with reading(str(path)):
        import datasets  # slow to import, and not needed for files of JSON

        rows = datasets.load_dataset(kind, data_files=str(path), split="train", **options)
        return ArrowTable(str(path), rows)


def csv_form(path: Path, usual: str) -> tuple[str, Any]:
    """Return the delimiter of a CSV file and its columns, by its first line, where Excel may have written others.

    All columns are text: a response may be "12", "NA" or "None". One without a name gets the one that pandas gives it.
    """
    import datasets

    lines = {delimiter: read_header(path, delimiter) for delimiter in (usual, ";", "\t")}
    delimiter = max(lines, key=lambda each: len(lines[each]))  # of equals the first
    names = [name or f"Unnamed: {i}" for i, name in enumerate(lines[delimiter])]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}, row 0: its first line must name the columns, each once, not {listed(names)}")
    return delimiter, datasets.Features(dict.fromkeys(names, datasets.Value("string")))


def read_header(path: Path, delimiter: str) -> list[str]:
    """Return the cells of the first line of a CSV file; UserError if it cannot be read."""
    try:
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file, delimiter=delimiter), [])
    except UnicodeDecodeError as error:
        remedy = "save it as UTF-8, which Excel calls CSV UTF-8"
        raise UserError(f"{path}, row 0: cannot be read ({summarize_error(error)}); {remedy}") from None
    except (*UNREADABLE, csv.Error) as error:
        raise UserError(f"{path}, row 0: cannot be read ({summarize_error(error)})") from None


def open_saved(folder: Path, splits: SplitNames) -> Source:
    """Open a folder that save_to_disk wrote."""
    with reading(str(folder)):
        import datasets

        found = datasets.load_from_disk(str(folder))
    return from_datasets(found, str(folder), splits)


def open_hub(name: str, splits: SplitNames) -> Source:
    """Load a hub data set, me/set or me/set:config, from the hub or its cache on this machine."""
    path, _, config = name.partition(":")
    advice = "; give the path of a local folder, or try datasets=[demo], which needs no download"
    with reading(f"data set {name}", advice):
        import datasets

        found = datasets.load_dataset(path, config or None)
    return from_datasets(found, name, splits)


def from_datasets(found: Any, name: str, splits: SplitNames) -> Source:
    """Return the splits of what the datasets library loaded: a table, or tables by the names of splits."""
    if not isinstance(found, dict):
        if splits.train or splits.test:
            raise UserError(f"split_train, split_test: {name} has no splits; leave them out")
        return Source([ArrowTable(name, found)])
    train, test = splits.choose(found, name)
    tables = {split: [ArrowTable(f"{name} {split}", found[split])] for split in (train, test) if split is not None}
    return Source(list(tables[train]), None if test is None else list(tables[test]), split_notes(name, train, test))


def open_folder(folder: Path, splits: SplitNames) -> Source:
    """Open a folder of files named by their splits, as train.jsonl, data/train-00000-of-00002.parquet, test/a.csv."""
    places = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != ".")]
    found: dict[str, list[Path]] = {}
    subsets: dict[Path, None] = {}  # folders with splits of their own
    for place in places:
        for path in sorted(place.iterdir()):
            if path.is_file() and DATA_FILE.search(path.name) and path.name[0] != ".":
                own = SHARD.sub("", path.name.partition(".")[0])
                is_named = place == folder or place.name == "data"
                if not is_named and own in USUAL and place.name not in USUAL:
                    subsets[place] = None
                else:
                    found.setdefault(own if is_named else place.name, []).append(path)
    if subsets and not USUAL & found.keys() and splits.train is None:
        raise UserError(f"datasets=[{folder}]: give its folders, as datasets=[{','.join(map(str, subsets))}]")
    train, test = splits.choose(found, str(folder))
    used = [path for split in (train, test) if split is not None for path in found[split]]
    for split in filter(None, (train, test)):
        whole = [path.name for path in found[split] if path.name.partition(".")[0] == split]
        if len(whole) > 1:
            raise UserError(f"datasets=[{folder}]: holds both {whole[0]} and {whole[1]}; remove one")
    notes = [*split_notes(str(folder), train, test), *note_ignored_files(folder, used)]
    tables = {split: [open_file(path) for path in found[split]] for split in (train, test) if split is not None}
    return Source(tables[train], None if test is None else tables[test], notes)


@contextmanager
def reading(what: str, advice: str = "") -> Iterator[None]:
    """Turn what the datasets library raises into one line that names what could not be read; it logs nothing itself."""
    import datasets

    level = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    if not on_terminal():
        datasets.utils.logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # the library raises many kinds: no network, no such data set, no disk, another format
        cause = error.__cause__ or error.__context__ or error
        raise UserError(f"{what}: cannot be read ({summarize_error(cause)}){advice}") from None
    finally:
        datasets.utils.logging.set_verbosity(level)


# What is said of splits, files and columns


def split_notes(name: str, train: str, test: str | None) -> list[str]:
    """Return a line that names the splits, or nothing if they have the names that this program gives them."""
    if train == "train" and test in (None, "test"):
        return []
    return [f"{name}: training on the split {train}, evaluating on {test or 'a held-out share of it'}"]


def note_ignored_files(folder: Path, read: Collection[Path]) -> list[str]:
    """Return a line that lists the data files of a folder other than those that are read, or nothing."""
    paths = [path for path in folder.iterdir() if DATA_SUFFIXES & set(path.suffixes) and path.is_file()]
    ignored = [escaped(path.name) for path in sorted(paths) if path not in read and path.name[0] != "."]
    names = [escaped(path.relative_to(folder).as_posix()) for path in sorted(read)]
    return [f"{folder}: files ignored: {listed(ignored)}; read: {listed(names)}"] if ignored else []


def note_columns(name: str, columns: Mapping[str, str], n_rows: Counter[str], used: Sequence[str]) -> list[str]:
    """Return a line on columns that were found by another name than their use, and one on those that are not read.

    n_rows holds for each column in how many rows it occurs, used the uses of columns that are read.
    """
    notes = []
    others = [f"{use} is the column {escaped(columns[use])}" for use in used if columns.get(use, use) != use]
    if others:
        notes.append(f"{name}: {listed(others)}")
    read = [columns[use] for use in used if use in columns]
    ignored = [f"{escaped(column)} (in {n:,} rows)" for column, n in sorted(n_rows.items()) if column not in read]
    if ignored:
        notes.append(f"{name}: columns ignored: {listed(ignored)}; {', '.join(map(escaped, read))} are read")
    return notes


def escaped(name: str) -> str:
    """Return a name without line breaks and other characters that could not be printed."""
    return repr(name)[1:-1]


def listed(names: Sequence[str]) -> str:
    """Join the first names of a list, with the number of those that are left."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")
