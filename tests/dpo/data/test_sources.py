"""Files, folders, saved data sets and hub data sets: what is opened, which splits, and what is said of it."""

import csv
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from conftest import golden_rows, read_data, without_measurements

from dpo.data.rows import ASSISTANT
from dpo.data.sources import (
    SplitNames,
    is_hub_name,
    join_names,
    note_columns,
    note_ignored_files,
    open_source,
)
from dpo.system.errors import UserError

ANY = SplitNames(None, None, sft=False)


def pairs(n, start=0):
    return [{"prompt": f"Say {i}.", "chosen": f" {i}.", "rejected": " no."} for i in range(start, start + n)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".parquet" in path.name:
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif ".arrow" in path.name:
        with datasets.arrow_writer.ArrowWriter(path=str(path)) as writer:
            writer.write_batch({name: [row[name] for row in rows] for name in rows[0]})
            writer.finalize()
    elif ".csv" in path.name:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text(f"[{','.join(lines)}]" if path.suffix == ".json" else "".join(f"{line}\n" for line in lines))
    return path


def test_a_glob_reads_its_files_in_order_and_names_each_in_errors(tmp_path):
    write(tmp_path / "b.jsonl", pairs(5, 5))
    write(tmp_path / "a.csv", pairs(5))
    write(tmp_path / "c.txt.jsonl", [{"prompt": "x", "chosen": 5, "rejected": "y"}])
    tables = open_source(f"{tmp_path}/[ab].*", ANY).train
    assert [Path(table.name).name for table in tables] == ["a.csv", "b.jsonl"]
    assert [row for table in tables for row in table] == [(i % 5 + 1, row) for i, row in enumerate(pairs(10))]
    with pytest.raises(UserError, match=r"c\.txt\.jsonl, row 1: chosen must be a text, not int"):
        read_data(f"{tmp_path}/*")


def test_a_glob_that_matches_other_files_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", pairs(3))
    write(tmp_path / "b" / "part.jsonl", pairs(3))
    assert len(open_source(f"{tmp_path}/**", ANY).train) == 2  # which also matches folders
    for other in ("b", "README.md"):
        with pytest.raises(UserError, match=rf"{other} is no file of .jsonl, .*; give a glob of such files only"):
            open_source(f"{tmp_path}/*", ANY)
        (tmp_path / "b").rename(tmp_path / "README.md") if other == "b" else None


# Splits


def splits_of(source):
    names = [None if tables is None else [Path(t.name).name for t in tables] for tables in (source.train, source.test)]
    return tuple(names)


@pytest.mark.parametrize(
    "files, expected",
    [
        (["train.jsonl", "test.jsonl", "validation.jsonl"], (["train.jsonl"], ["test.jsonl"])),
        (["train.csv", "validation.csv"], (["train.csv"], ["validation.csv"])),
        (["train.jsonl", "eval.json"], (["train.jsonl"], ["eval.json"])),
        (["train.jsonl", "other.jsonl"], (["train.jsonl"], None)),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
         (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], ["test-00000-of-00001.parquet"])),
        (["train/b.jsonl", "train/a.jsonl", "test/a.jsonl"], (["a.jsonl", "b.jsonl"], ["a.jsonl"])),
        (["train_prefs.jsonl", "test_prefs.jsonl", "train_sft.jsonl", "test_sft.jsonl"],
         (["train_prefs.jsonl"], ["test_prefs.jsonl"])),
    ],
)  # fmt: skip
def test_splits_of_a_folder_are_found_by_their_usual_names(files, expected, tmp_path):
    for name in files:
        write(tmp_path / name, pairs(3))
    assert splits_of(open_source(str(tmp_path), ANY)) == expected


def test_sft_prefers_the_splits_that_are_made_for_it():
    found = ["train_prefs", "train_sft", "test_prefs", "test_sft"]
    assert SplitNames(None, None, sft=True).choose(found, "x") == ["train_sft", "test_sft"]
    assert SplitNames(None, None, sft=False).choose(found, "x") == ["train_prefs", "test_prefs"]
    assert SplitNames("train_sft", "test_prefs", sft=False).choose(found, "x") == ["train_sft", "test_prefs"]


@pytest.mark.parametrize(
    "given, words",
    [
        (SplitNames("tran", None, False), "split_train=tran: mine has no such split; it has a, test, train"),
        (SplitNames(None, "dev", False), "split_test=dev: mine has no such split; it has a, test, train"),
        (
            SplitNames("test", None, False),
            "mine would be both trained and evaluated on test; set them to different splits",
        ),
    ],
)
def test_a_split_that_is_not_there_or_taken_twice_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        given.choose(["train", "test", "a"], "mine")


def test_a_folder_without_a_training_split_and_a_file_with_split_keys_are_refused(tmp_path):
    write(tmp_path / "part1.jsonl", pairs(3))
    with pytest.raises(UserError, match="there is no train.jsonl.*; set split_train to one of part1"):
        open_source(str(tmp_path), ANY)
    assert splits_of(open_source(str(tmp_path), SplitNames("part1", None, False))) == (["part1.jsonl"], None)
    with pytest.raises(UserError, match="has no splits; leave them out"):
        open_source(str(tmp_path / "part1.jsonl"), SplitNames("part1", None, False))


def test_a_folder_with_one_split_in_two_files_is_refused(tmp_path):
    for name in ("train.csv", "train.jsonl"):
        write(tmp_path / name, pairs(3))
    with pytest.raises(UserError, match="holds both train.csv and train.jsonl; remove one"):
        open_source(str(tmp_path), ANY)


# The datasets library


@pytest.mark.parametrize("kind", ["one split", "splits"])
def test_a_folder_of_save_to_disk_is_read(kind, tmp_path, capsys):
    table = datasets.Dataset.from_list(pairs(20))
    saved = table if kind == "one split" else datasets.DatasetDict(train=table, validation=table.select(range(3)))
    saved.save_to_disk(tmp_path / "saved")
    data = read_data(tmp_path / "saved")
    sizes = {split: len(groups) for split, groups in data.items()}
    assert sizes == ({"train": 18, "test": 2} if kind == "one split" else {"train": 20, "test": 3})
    said = "training on the split train, evaluating on validation" in capsys.readouterr().out
    assert said == (kind == "splits")


def test_a_hub_data_set_is_loaded_by_the_datasets_library_with_its_configuration(monkeypatch):
    calls = []

    def load_dataset(*arguments):
        calls.append(arguments)
        return datasets.DatasetDict(train_prefs=datasets.Dataset.from_list(pairs(4)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("me/set", "me/set:small"):
        assert [table.name for table in open_source(name, ANY).train] == [f"{name} train_prefs"]
    assert calls == [("me/set", None), ("me/set", "small")]


def test_a_hub_data_set_that_cannot_be_fetched_is_refused_in_one_line():
    with pytest.raises(
        UserError, match=r"data set me/no-such-set: cannot be read \(.*\); give the path of a local"
    ) as e:
        open_source("me/no-such-set", ANY)
    assert "\n" not in str(e.value)


HUB_NAMES = {"me/set": True, "me/set:config": True, "me/set.jsonl": False, "/a/b": False, "hh": False, "a/b/c": False}


@pytest.mark.parametrize("name, expected", HUB_NAMES.items())
def test_names_of_the_hub_are_told_from_paths(name, expected):
    assert is_hub_name(name) == expected


def test_a_folder_is_a_folder_though_a_hub_name_could_be_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "me" / "set" / "train.jsonl", pairs(3))
    assert not is_hub_name("me/set")
    assert splits_of(open_source("me/set", ANY)) == (["train.jsonl"], None)


def test_a_folder_of_folders_with_splits_of_their_own_is_refused(tmp_path, monkeypatch):
    for place in ("harmless", "helpful"):
        for split in ("train", "test"):
            write(tmp_path / place / f"{split}.jsonl", pairs(3))
    folders = f"{tmp_path}:harmless,{tmp_path}:helpful"
    with pytest.raises(UserError, match=rf"has 2 configurations; give datasets=\[{folders}\]"):
        open_source(str(tmp_path), ANY)
    source = open_source(f"{tmp_path}:helpful", ANY)
    assert splits_of(source) == (["train.jsonl"], ["test.jsonl"]) and "/helpful/" in source.train[0].name
    assert source.notes == [f"{tmp_path}:helpful: configurations ignored: harmless"]
    with pytest.raises(UserError, match="there is no such configuration; it has harmless, helpful"):
        open_source(f"{tmp_path}:gone", ANY)
    write(tmp_path / "train.jsonl", pairs(3))
    assert splits_of(open_source(str(tmp_path), ANY)) == (["train.jsonl"], None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert splits_of(open_source("~/harmless/*.jsonl", ANY)) == (["test.jsonl", "train.jsonl"], None)
    for name in ("~/gone.jsonl", "~no-such-user/a.jsonl"):
        with pytest.raises(UserError, match=rf"datasets=\[{name}\]: there is no such file"):
            open_source(name, ANY)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def paths_of(folder, name="", splits=ANY):
    """The paths of a folder's training and test files, relative to it."""
    source = open_source(f"{folder}{name}", splits)
    return [
        [Path(t.name).relative_to(folder).as_posix() for t in tables or ()] for tables in (source.train, source.test)
    ]


@pytest.mark.parametrize(
    "train, test, ignored",
    [
        (["default/train/0000.parquet", "default/train/0001.parquet"], ["default/test/0000.parquet"], []),
        (["default/train/0000.parquet"], [], ["other/train/0000.parquet"]),
        (["NAME/train-00000-of-00002-ab12.parquet", "NAME/train-00001-of-00002-ab12.parquet"], [], []),
        (["NAME/data/train-00000-of-00001.parquet"], ["NAME/data/test-00000-of-00001.parquet"], []),
        (["data/train/a.jsonl"], ["data/validation/a.jsonl"], []),
        (["train.parquet/part-00000-ab.snappy.parquet", "train.parquet/part-00001-ab.snappy.parquet"], [], []),
        (["train/data-00000-of-00001.arrow"], [], ["train/cache-ab12.arrow", "train/.b.jsonl", "train/_SUCCESS"]),
        (["train.jsonl"], [], ["old/train/0000.parquet", "new/train.jsonl"]),
        (["train.jsonl.gz"], ["test.ndjson"], []),
    ],
)
def test_layouts_of_the_hub_are_found(train, test, ignored, tmp_path):
    touch(tmp_path, *train, *test, *ignored)
    assert paths_of(tmp_path) == [train, test]


def test_a_split_that_lacks_some_of_its_shards_is_refused(tmp_path):
    touch(tmp_path, "data/train-00000-of-00003.parquet", "data/train-00002-of-00003.parquet")
    with pytest.raises(UserError, match="train has 2 of 3 shards; download the others, or give the files as a glob"):
        open_source(str(tmp_path), ANY)
    assert len(open_source(f"{tmp_path}/data/*.parquet", ANY).train) == 2


CARD = """---
license: mit
configs:
- config_name: lists
  data_files:
  - split: train
    path:
    - a/*.jsonl
    - b.csv
  - split: test
    path: held-out.jsonl
- config_name: one
  data_files: "**/x.jsonl"
  default: true
- config_name: named
  data_dir: named
---
configs: none
"""


def test_the_files_that_a_card_lists_are_read(tmp_path):
    touch(tmp_path, "a/1.jsonl", "a/2.jsonl", "a/3.txt", "b.csv", "held-out.jsonl", "train.jsonl", "c/d/x.jsonl")
    touch(tmp_path, "named/train.jsonl", "named/dev.jsonl")
    assert paths_of(tmp_path) == [["train.jsonl"], []]
    (tmp_path / "README.md").write_text(CARD)
    assert paths_of(tmp_path) == [["c/d/x.jsonl"], []]
    assert open_source(str(tmp_path), ANY).notes[1:] == [f"{tmp_path}: configurations ignored: lists, named"]
    assert paths_of(tmp_path, ":lists") == [["a/1.jsonl", "a/2.jsonl", "b.csv"], ["held-out.jsonl"]]
    assert paths_of(tmp_path, ":named") == [["named/train.jsonl"], ["named/dev.jsonl"]]
    with pytest.raises(UserError, match="there is no such configuration; it has lists, one, named"):
        open_source(f"{tmp_path}:other", ANY)
    (tmp_path / "held-out.jsonl").unlink()
    with pytest.raises(UserError, match=r"held-out\.jsonl: cannot be read \(No such file"):
        list(open_source(f"{tmp_path}:lists", ANY).test[0])


def test_a_card_that_lists_what_is_not_there_or_lists_nothing(tmp_path):
    touch(tmp_path, "train.jsonl")
    card = tmp_path / "README.md"
    for text in ("# Data\n", "---\nlicense: mit\n---\n", "---\n- a\n---\n", "---\n\n---\nconfigs:\n"):
        card.write_text(text)
        assert paths_of(tmp_path) == [["train.jsonl"], []]
    refused = {
        "configs: 5": r"README\.md: its configs cannot be read \('int' object is not iterable\); correct them",
        "configs: [": r"README\.md: its configs cannot be read",
        "configs:\n- data_files: train.jsonl": r"its configs cannot be read \('config_name'\)",
        "configs:\n- config_name: a\n  data_files: gone/*": r"gone/\*: must be a file of \.jsonl",
    }
    for text, words in refused.items():
        card.write_text(f"---\n{text}\n---\n")
        with pytest.raises(UserError, match=words):
            open_source(str(tmp_path), ANY)


# The same pairs in every form


def test_the_same_200_pairs_train_alike_in_every_form(tmp_path, make_trainer):
    """Also as hh's dialogues, which have no prompt of their own; its metrics are compared to the last digit."""
    dialogues, rows = [*golden_rows("train"), *golden_rows("test")][:200], []
    for row in dialogues:
        start = row["chosen"].rfind(ASSISTANT) + len(ASSISTANT)
        rows.append(
            {"prompt": row["chosen"][:start], "chosen": row["chosen"][start:], "rejected": row["rejected"][start:]}
        )
    assert len(rows) == 200
    forms = {"dialogues": write(tmp_path / "dialogues" / "train.jsonl", dialogues).parent}
    forms |= {
        kind: write(tmp_path / kind / f"train.{kind}", rows).parent for kind in ("jsonl", "json", "csv", "parquet")
    }
    table = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "saved")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for i in range(2):
        table.shard(2, i).to_parquet(tmp_path / "hub" / "data" / f"train-0000{i}-of-00002.parquet")
    metrics = {}
    for name, folder in (forms | {"saved": tmp_path / "saved", "hub": tmp_path / "hub"}).items():
        trainer = make_trainer("loss=dpo", f"datasets=['{folder}']", "n_examples=16", "n_eval_examples=4", "debug=true")
        trainer.train()
        lines = (trainer.run.path / "metrics.jsonl").read_text().splitlines()
        records = [without_measurements(json.loads(line)) for line in lines]
        metrics[name] = (trainer.train_batches.n_items, records)
    assert len(metrics) == 7 and len(metrics["jsonl"][1]) == 4
    assert {name: found for name, found in metrics.items() if found != metrics["jsonl"]} == {}


# Notes


def test_data_files_that_are_not_read_are_listed_in_one_line(tmp_path):
    names = ("train.jsonl", "validation.jsonl", "train.csv", "dev.jsonl.gz", "README.md", ".hidden.jsonl")
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "old.json").mkdir()
    assert note_ignored_files(tmp_path, [tmp_path / "train.jsonl"]) == [
        f"{tmp_path}: files ignored: dev.jsonl.gz, train.csv, validation.jsonl; read: train.jsonl"
    ]
    assert note_ignored_files(tmp_path, [tmp_path / name for name in names[:4]]) == []


COLUMNS = {"prompt": "prompt", "chosen": "chosen", "rejected": "response_k"}


def test_columns_that_are_not_read_are_listed_in_one_line_with_their_rows():
    n_rows = Counter({"chosen": 2000, "system": 1500, "id": 2000})
    assert note_columns("data", COLUMNS, n_rows, ("prompt", "chosen")) == [
        "data: columns ignored: id (in 2,000 rows), system (in 1,500 rows); prompt, chosen are read"
    ]
    assert note_columns("data", COLUMNS, Counter(chosen=1), ("prompt", "chosen")) == []


def test_what_was_taken_for_what_is_said_where_names_differ():
    assert note_columns("data", COLUMNS, Counter(), ("chosen", "rejected")) == [
        "data: rejected is the column response_k"
    ]


def test_of_two_responses_in_no_order_none_is_called_the_chosen_one():
    columns = {"chosen": "response_1", "rejected": "response_2", "preference_strength": "strength"}
    assert note_columns("data", columns, Counter(), tuple(columns)) == [
        "data: strength says which of response_1 and response_2 is better, preference_strength is the column strength"
    ]


def test_a_note_is_one_short_line_whatever_the_names():
    names = [f"{i:02}\n\x1b[31merror: forged" for i in range(30)]
    (line,) = note_columns("data", COLUMNS, Counter(names), ())
    assert line.isprintable() and line.count("forged") == 8 and "and 22 more" in line
    assert join_names(["a", "b"]) == "a, b"
