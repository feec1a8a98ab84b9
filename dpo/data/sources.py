"""Chooses the tables of a data set: files, folders and hub data sets, and their splits."""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

import yaml

from dpo.data.columns import PAIR, PREFERENCES
from dpo.data.formats import FORMATS, SUFFIXES, DatasetTable, Table, open_file, suffix_of
from dpo.system.console import on_terminal
from dpo.system.errors import UserError, join_names, summarize_error

HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
SHARD = re.compile(r"-\d{5}-of-(\d{5}).*$")
IS_CACHE = re.compile(r"cache-.*\.arrow")  # of the datasets library
CARD = re.compile(r"---\s*\n(.*?^configs:.*?\n)---", re.DOTALL | re.MULTILINE)  # a README.md that begins with YAML
TEST_NAMES = ("test", "validation", "valid", "val", "dev", "eval", "evaluation")
USUAL_SPLITS = {f"{name}{kind}" for name in ("train", *TEST_NAMES) for kind in ("", "_sft", "_prefs")}


@dataclass
class Source:
    """The tables of a data set's training and test splits, and notes; test=None: some prompts are held out."""

    train: Sequence[Table]
    test: Sequence[Table] | None = None
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
                mitigation = "add one"
                if names:
                    mitigation = f"set split_train to one of {join_names(sorted(names))}"
                    mitigation += ", or give files as a glob, datasets=['FOLDER/*.jsonl']"
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
    exists = Path(name).exists() or Path(name.partition(":")[0]).exists()
    return HUB_NAME.fullmatch(name) is not None and not exists and suffix_of(Path(name)) not in FORMATS


def open_source(name: str, splits: SplitNames, known: Collection[str] = ()) -> Source:
    """Open a folder, a file, a glob of files or a hub data set; UserError in one line if it cannot be read.

    known are the names of built-in data sets, for the message about an unknown name.
    """
    path = Path(os.path.expanduser(name))  # leaves ~ in place if there is no such home
    if path.is_dir() and any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):  # save_to_disk
        return open_datasets(str(path), splits, lambda datasets: datasets.load_from_disk(str(path)))
    folder, _, config = (str(path), "", "") if path.exists() else str(path).rpartition(":")
    if folder and Path(folder).is_dir():
        return open_folder(Path(folder), config, splits)
    files = [path] if path.is_file() else sorted(map(Path, glob(str(path), recursive=True)))
    data = [file for file in files if suffix_of(file) in FORMATS and not file.is_dir()]
    if data:
        splits.check_none(name)
        unknown = [file for file in files if file not in data and not (file.is_dir() and "**" in name)]
        if unknown:
            raise UserError(f"datasets=[{name}]: {unknown[0]} is no file of {SUFFIXES}; give a glob of such files only")
        return Source([open_file(file) for file in data])
    if is_hub_name(name):
        repository, _, config = name.partition(":")
        advice = "; give the path of a local folder, or try datasets=[demo], which needs no download"
        return open_datasets(name, splits, lambda datasets: datasets.load_dataset(repository, config or None), advice)
    if suffix_of(path) in FORMATS:
        raise UserError(f"datasets=[{name}]: there is no such file")
    forms = f"a folder or file of {SUFFIXES}, a folder of save_to_disk, or a hub data set, me/set"
    raise UserError(f"datasets=[{name}]: neither a known data set ({', '.join(known)}) nor {forms}")


def open_datasets(name: str, splits: SplitNames, load: Callable[[Any], Any], advice: str = "") -> Source:
    """Open what load(datasets) gives, a table or tables by split; UserError in one line if it cannot be read."""
    import datasets  # slow to import, and not needed for files
    import pyarrow

    level = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    if not on_terminal():
        datasets.utils.logging.disable_progress_bar()
    try:
        loaded = load(datasets)
    except Exception as error:  # of many kinds: no network, no such data set, disk full, wrong format
        cause = error.__cause__ or error.__context__ or error
        raise UserError(f"data set {name}: cannot be read ({summarize_error(cause)}){advice}") from None
    finally:
        datasets.utils.logging.set_verbosity(level)
    pyarrow.default_memory_pool().release_unused()  # hundreds of megabytes after a large file was converted
    if not isinstance(loaded, dict):
        splits.check_none(name)
        return Source([DatasetTable(name, loaded)])
    chosen = splits.choose(loaded, name)
    tables = [[DatasetTable(f"{name} {split}", loaded[split])] for split in chosen]
    return Source(tables[0], tables[1] if tables[1:] else None, split_notes(name, chosen))


# The files of a folder: by configuration and split

Splits = dict[str, list[Path]]


def open_folder(folder: Path, config: str, splits: SplitNames) -> Source:
    """Open the splits of a folder, or of one of its configurations."""
    card_configs = configs_of_card(folder)
    configs = card_configs or configs_by_name(folder)
    config = choose_config(folder, configs, config, splits)
    files, where = configs[config], f"{folder}:{config}" if config else str(folder)
    chosen = splits.choose(files, where)
    if not card_configs:
        for split in chosen:
            check_complete(where, split, files[split])
    read = [path for split in chosen for path in files[split]]
    tables = [[open_file(path) for path in files[split]] for split in chosen]
    notes = split_notes(where, chosen) + note_ignored_files(folder, read)
    if ignored := [escape(name) for name in configs if name and configs[name] != files]:
        notes.append(f"{where}: configurations ignored: {join_names(ignored)}")
    return Source(tables[0], tables[1] if tables[1:] else None, notes)


def check_complete(where: str, split: str, files: Sequence[Path]) -> None:
    """Raise UserError if a split is in two formats, as train.csv and train.jsonl, or lacks some of its shards."""
    same_name = [path.name for path in files if path.name.partition(".")[0] == split]
    if len(same_name) > 1:
        raise UserError(f"datasets=[{where}]: holds both {same_name[0]} and {same_name[1]}; remove one")
    shards = Counter((split_of(path.name), shard[1]) for path in files if (shard := SHARD.search(path.name)))
    for (_, total), n in shards.items():
        if n != int(total):
            problem = f"{split} has {n:,} of {int(total):,} shards; download the others, or give the files as a glob"
            raise UserError(f"datasets=[{where}]: {problem}")


def choose_config(folder: Path, configs: Mapping[str, Splits], given: str, splits: SplitNames) -> str:
    """Choose the given configuration, the folder itself (""), "default" or the only one; UserError if none fits."""
    names = [name for name in configs if name]
    top_level = configs.get("", {})
    if given and given not in names:
        known = f"it has {join_names(names)}" if names else "it has none"
        raise UserError(f"datasets=[{folder}:{given}]: there is no such configuration; {known}")
    if given or not names or USUAL_SPLITS & top_level.keys() or splits.train in top_level:
        return given
    if "default" in names:
        return "default"
    if len(names) == 1:
        return names[0]
    mitigation = f"give datasets=[{','.join(f'{folder}:{name}' for name in names)}]"
    raise UserError(f"datasets=[{folder}]: has {len(names)} configurations; {mitigation}")


def configs_by_name(folder: Path) -> dict[str, Splits]:
    """Find a folder's files by configuration and split, by the names that the Hub uses.

    train.jsonl, data/train-00000-of-00002.parquet and train/a.csv belong to the folder itself, the configuration "".
    NAME/train.jsonl and NAME/train/0000.parquet belong to the configuration NAME.
    """
    configs: dict[str, Splits] = {"": {}}
    for path in (path for depth in ("*", "*/*", "*/*/*") for path in sorted(folder.glob(depth))):
        *parents, name = path.relative_to(folder).parts
        is_hidden = any(part[0] == "." for part in (*parents, name)) or IS_CACHE.match(name)
        if is_hidden or path.is_dir() or suffix_of(path) not in FORMATS:
            continue
        split = split_of(name)
        parents = [parent for parent in parents if parent != "data"]
        if len(parents) == 2 or (parents and (split not in USUAL_SPLITS or split_of(parents[0]) in USUAL_SPLITS)):
            split = split_of(parents.pop())
        configs.setdefault("".join(parents), {}).setdefault(split, []).append(path)
    return configs


def split_of(name: str) -> str:
    """The split that a file or folder is named by."""
    return SHARD.sub("", name.partition(".")[0])


def configs_of_card(folder: Path) -> dict[str, Splits]:
    """Find the files that the YAML of a README.md lists, as the Hub does; {} if it lists none.

    https://huggingface.co/docs/hub/datasets-manual-configuration
    """
    card = folder / "README.md"
    head = CARD.match(card.read_text("utf-8", errors="replace")) if card.is_file() else None
    configs: dict[str, Splits] = {}
    try:
        for entry in yaml.safe_load(head[1])["configs"] if head else ():
            files = files_of_config(folder / entry.get("data_dir", ""), entry.get("data_files"))
            configs[str(entry["config_name"])] = files
            if entry.get("default"):
                configs[""] = files
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{card}: its configs cannot be read ({summarize_error(error)}); correct them") from None
    return configs


def files_of_config(folder: Path, listed: Any) -> Splits:
    """The files of a configuration by split. listed: patterns (for train), or {split, path}; None: by name."""
    if listed is None:
        return configs_by_name(folder)[""]
    files: Splits = {}
    for entry in [listed] if isinstance(listed, str) else listed:
        split, patterns = ("train", entry) if isinstance(entry, str) else (entry["split"], entry["path"])
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            names = [
                name
                for name in sorted(glob(pattern, root_dir=folder, recursive=True))
                if suffix_of(Path(name)) in FORMATS
            ]
            files.setdefault(split, []).extend(folder / name for name in names or [pattern])  # which open_file refuses
    return files


# Notes on splits, files and columns


def split_notes(name: str, chosen: Sequence[str]) -> list[str]:
    """A line that names the splits, or nothing for the names train and test."""
    if chosen in (["train"], ["train", "test"]):
        return []
    test = chosen[1] if len(chosen) > 1 else "a held-out share of it"
    return [f"{name}: training on the split {chosen[0]}, evaluating on {test}"]


def note_ignored_files(folder: Path, read: Collection[Path]) -> list[str]:
    """A line that lists the unread data files of a folder, or nothing."""
    suffixes = {*FORMATS, ".txt"}
    paths = [path for path in folder.iterdir() if suffixes & set(path.suffixes) and path.is_file()]
    ignored = [escape(path.name) for path in sorted(paths) if path not in read and path.name[0] != "."]
    names = [escape(path.relative_to(folder).as_posix()) for path in sorted(read)]
    return [f"{folder}: files ignored: {join_names(ignored)}; read: {join_names(names)}"] if ignored else []


def note_columns(name: str, columns: Mapping[str, str], n_rows: Counter[str], roles: Sequence[str]) -> list[str]:
    """A line on columns with another name than their role, and a line on columns that are not read.

    n_rows is the number of rows with each column; roles are the roles of the columns that are read.
    """
    notes, renamed = [], []
    used = {role: columns[role] for role in roles if role in columns}
    order = next((escape(used[role]) for role in PREFERENCES if role in used), None)
    if order and used.keys() >= {*PAIR}:
        first, second = (escape(used.pop(role)) for role in PAIR)
        renamed.append(f"{order} says which of {first} and {second} is better")
    renamed += [f"{role} is the column {escape(column)}" for role, column in used.items() if column != role]
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
