"""Opens files, folders and hub data sets, and chooses their splits; tables read a row when it is needed."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.data.jsonl import COMPRESSED, UNREADABLE, JsonRows, open_bytes
from dpo.system.console import on_terminal
from dpo.system.errors import UserError, summarize_error

if TYPE_CHECKING:
    from datasets import Dataset

HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
SHARD = re.compile(r"-\d{5}-of-\d{5}.*$")
TEST_NAMES = ("test", "validation", "valid", "val", "dev", "eval", "evaluation")
USUAL = {f"{name}{kind}" for name in ("train", *TEST_NAMES) for kind in ("", "_sft", "_prefs")}  # names of splits
MAX_NAMES = 8  # in a note
BATCH = 100  # rows of a table per read when iterating


class ArrowTable:
    """A table of the datasets library; rows stay on disk until they are read by index, from 0.

    JSON columns, which the library uses for values of mixed types, are decoded; images and the like are not.
    """

    def __init__(self, name: str, rows: "Dataset"):
        import datasets
        import pyarrow

        self.name, self.rows = name, rows.with_format("arrow")  # faster than one row at a time
        self.json = datasets.Features({key: kind for key, kind in rows.features.items() if "Json(" in repr(kind)})
        pyarrow.default_memory_pool().release_unused()  # hundreds of megabytes, where a large file was converted

    def columns(self) -> list[str]:
        return list(self.rows.column_names)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        batches = (batch.to_pylist() for batch in self.rows.iter(batch_size=BATCH))
        return enumerate(map(self.decode, chain.from_iterable(batches)), start=1)

    def __getitem__(self, index: int) -> Any:
        return self.decode(self.rows[index].to_pylist()[0])

    def decode(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its JSON columns decoded."""
        return row | self.json.decode_example({name: row[name] for name in self.json}) if self.json else row


Table = JsonRows | ArrowTable


# Formats of files


def open_csv(path: Path, delimiter: str) -> Table:
    """Open a CSV file; all columns are text: a response may be "12", "NA" or "None"."""
    delimiter, features = csv_form(path, delimiter)
    return open_arrow(path, "csv", sep=delimiter, features=features, na_filter=False)


def open_arrow(path: Path, kind: str, **options: Any) -> Table:
    """Open a file with a loader of the datasets library; UserError that names it if it cannot be read."""
    with reading(str(path)):
        import datasets  # slow to import, and not needed for files of JSON

        return ArrowTable(str(path), datasets.load_dataset(kind, data_files=str(path), split="train", **options))


# One line per format: the suffix, and the function that opens a file.
FORMATS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": JsonRows,
    ".json": JsonRows,
    ".csv": partial(open_csv, delimiter=","),
    ".tsv": partial(open_csv, delimiter="\t"),
    ".parquet": partial(open_arrow, kind="parquet"),
}
SUFFIXES = f"{', '.join(list(FORMATS)[:-1])} or {list(FORMATS)[-1]}"


def suffix_of(path: Path) -> str:
    """The suffix of a file, without that of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def open_file(path: Path) -> Table:
    return FORMATS[suffix_of(path)](path)


def csv_form(path: Path, usual: str) -> tuple[str, Any]:
    """The delimiter and columns of a CSV file, from its first line; Excel may use other delimiters.

    A column without a name gets pandas's name for it. UserError if the file cannot be read.
    """
    import datasets

    headers: dict[str, list[str]] = {}
    for delimiter in (usual, ";", "\t"):
        try:
            with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
                headers[delimiter] = next(csv.reader(file, delimiter=delimiter), [])
        except (UnicodeDecodeError, *UNREADABLE, csv.Error) as error:
            mitigation = (
                "; save it as UTF-8, which Excel calls CSV UTF-8" if isinstance(error, UnicodeDecodeError) else ""
            )
            raise UserError(f"{path}, row 0: cannot be read ({summarize_error(error)}){mitigation}") from None
    delimiter, header = max(headers.items(), key=lambda item: len(item[1]))  # of equals the first
    names = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}, row 0: the first line must name each column once, not {join_names(names)}")
    return delimiter, datasets.Features(dict.fromkeys(names, datasets.Value("string")))


# Data sets and their splits


@dataclass
class Source:
    """The tables of a data set's training and test splits (test=None: a share is held out), and notes."""

    train: list[Table]
    test: list[Table] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SplitNames:
    """The requested splits; None: the usual names."""

    train: str | None
    test: str | None
    sft: bool

    def choose(self, names: Collection[str], where: str) -> list[str]:
        """Choose the training split and the test split, if there is one; UserError if there is none to train on."""
        kinds = ("", "_sft", "_prefs") if self.sft else ("", "_prefs", "_sft")
        usual = {
            "train": [f"train{kind}" for kind in kinds],
            "test": [f"{name}{kind}" for kind in kinds for name in TEST_NAMES],
        }
        chosen: list[str] = []
        for split, given in (("train", self.train), ("test", self.test)):
            if given is not None and given not in names:
                raise UserError(f"split_{split}={given}: {where} has no such split; it has {join_names(sorted(names))}")
            candidates = [name for name in usual[split] if name in names] if given is None else [given]
            if split == "train" and not candidates:
                mitigation = f"set split_train to one of {join_names(sorted(names))}, " if names else "add one"
                mitigation += "or give files as a glob, datasets=['FOLDER/*.jsonl']" if names else ""
                raise UserError(f"datasets=[{where}]: there is no train{SUFFIXES}; {mitigation}")
            chosen += candidates[:1]
        if len(chosen) > len(set(chosen)):
            problem = f"{where} would be both trained and evaluated on {chosen[0]}; set them to different splits"
            raise UserError(f"split_train, split_test: {problem}")
        return chosen

    def check_none(self, where: str) -> None:
        """Raise UserError if a split is given for data that has none."""
        if self.train or self.test:
            raise UserError(f"split_train, split_test: {where} has no splits; leave them out")


def is_hub_name(name: str) -> bool:
    """Whether a name is a hub data set, me/set or me/set:config, and not a path on this machine."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists() and suffix_of(Path(name)) not in FORMATS


def open_source(name: str, splits: SplitNames, known: Collection[str] = ()) -> Source:
    """Open a folder, a file, a glob of files or a hub data set; UserError in one line if it cannot be read.

    known are the names of built-in data sets, for the message about an unknown name.
    """
    path = Path(os.path.expanduser(name))  # leaves ~ in place if there is no such home
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # written by save_to_disk
            return open_datasets(str(path), splits, lambda datasets: datasets.load_from_disk(str(path)))
        return open_folder(path, splits)
    files = [path] if path.is_file() else sorted(map(Path, glob(str(path), recursive=True)))
    if files and all(suffix_of(file) in FORMATS and file.is_file() for file in files):
        splits.check_none(name)
        return Source([open_file(file) for file in files])
    if is_hub_name(name):
        repository, _, config = name.partition(":")
        advice = "; give the path of a local folder, or try datasets=[demo], which needs no download"
        return open_datasets(name, splits, lambda datasets: datasets.load_dataset(repository, config or None), advice)
    if suffix_of(path) in FORMATS:
        raise UserError(f"datasets=[{name}]: there is no such file")
    forms = f"a folder or file of {SUFFIXES}, a folder of save_to_disk, or a hub data set, me/set"
    raise UserError(f"datasets=[{name}]: neither a known data set ({', '.join(known)}) nor {forms}")


def open_datasets(name: str, splits: SplitNames, load: Callable[[Any], Any], advice: str = "") -> Source:
    """Open a table, or tables by split, loaded by the datasets library."""
    with reading(f"data set {name}", advice):
        import datasets

        loaded = load(datasets)
    if not isinstance(loaded, dict):
        splits.check_none(name)
        return Source([ArrowTable(name, loaded)])
    chosen = splits.choose(loaded, name)
    tables: list[list[Table]] = [[ArrowTable(f"{name} {split}", loaded[split])] for split in chosen]
    return Source(tables[0], tables[1] if tables[1:] else None, split_notes(name, chosen))


def open_folder(folder: Path, splits: SplitNames) -> Source:
    """Open a folder of files named by split: train.jsonl, data/train-00000-of-00002.parquet, test/a.csv."""
    places = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != ".")]
    files: dict[str, list[Path]] = {}  # of each split
    subsets: dict[Path, None] = {}  # folders with splits of their own
    for place in places:
        for path in sorted(place.iterdir()):
            if not (path.is_file() and suffix_of(path) in FORMATS and path.name[0] != "."):
                continue
            split = SHARD.sub("", path.name.partition(".")[0])
            is_named_by_file = place == folder or place.name == "data"
            if not is_named_by_file and split in USUAL and place.name not in USUAL:
                subsets[place] = None
            else:
                files.setdefault(split if is_named_by_file else place.name, []).append(path)
    if subsets and not USUAL & files.keys() and splits.train is None:
        mitigation = f"give datasets=[{','.join(map(str, subsets))}]"
        raise UserError(f"datasets=[{folder}]: its folders have splits of their own; {mitigation}")
    chosen = splits.choose(files, str(folder))
    for split in chosen:
        whole = [path.name for path in files[split] if path.name.partition(".")[0] == split]
        if len(whole) > 1:
            raise UserError(f"datasets=[{folder}]: holds both {whole[0]} and {whole[1]}; remove one")
    read = [path for split in chosen for path in files[split]]
    tables = [[open_file(path) for path in files[split]] for split in chosen]
    notes = split_notes(str(folder), chosen) + note_ignored_files(folder, read)
    return Source(tables[0], tables[1] if tables[1:] else None, notes)


@contextmanager
def reading(what: str, advice: str = "") -> Iterator[None]:
    """Turn errors of the datasets library into one line that names what could not be read, and silence its logs."""
    import datasets

    level = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    if not on_terminal():
        datasets.utils.logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # of many kinds: no network, no such data set, disk full, wrong format
        cause = error.__cause__ or error.__context__ or error
        raise UserError(f"{what}: cannot be read ({summarize_error(cause)}){advice}") from None
    finally:
        datasets.utils.logging.set_verbosity(level)


# Notes on splits, files and columns


def split_notes(name: str, chosen: Sequence[str]) -> list[str]:
    """A line that names the splits, or nothing for the names train and test."""
    test = chosen[1] if len(chosen) > 1 else "a held-out share of it"
    usual = chosen in (["train"], ["train", "test"])
    return [] if usual else [f"{name}: training on the split {chosen[0]}, evaluating on {test}"]


def note_ignored_files(folder: Path, read: Collection[Path]) -> list[str]:
    """A line that lists the unread data files of a folder, or nothing."""
    suffixes = {*FORMATS, ".arrow", ".txt"}
    paths = [path for path in folder.iterdir() if suffixes & set(path.suffixes) and path.is_file()]
    ignored = [escape(path.name) for path in sorted(paths) if path not in read and path.name[0] != "."]
    names = [escape(path.relative_to(folder).as_posix()) for path in sorted(read)]
    return [f"{folder}: files ignored: {join_names(ignored)}; read: {join_names(names)}"] if ignored else []


def note_columns(name: str, columns: Mapping[str, str], n_rows: Counter[str], roles: Sequence[str]) -> list[str]:
    """A line on columns named differently from their role, and one on unread columns.

    n_rows is the number of rows with each column; roles are those of the columns that are read.
    """
    notes = []
    renamed = [f"{role} is the column {escape(columns[role])}" for role in roles if columns.get(role, role) != role]
    if renamed:
        notes.append(f"{name}: {join_names(renamed)}")
    read = [columns[role] for role in roles if role in columns]
    ignored = [f"{escape(column)} (in {n:,} rows)" for column, n in sorted(n_rows.items()) if column not in read]
    if ignored:
        notes.append(f"{name}: columns ignored: {join_names(ignored)}; {', '.join(map(escape, read))} are read")
    return notes


def escape(name: str) -> str:
    """The name with line breaks and unprintable characters escaped."""
    return repr(name)[1:-1]


def join_names(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    n_others = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {n_others:,} more" if n_others > 0 else "")
