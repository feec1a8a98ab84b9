"""Files, folders, saved data sets and hub data sets: what is opened, which splits, and what is said of it."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pytest
from conftest import golden_rows, read_data, without_measurements

from dpo.data.rows import ASSISTANT
from dpo.data.sources import (
    SplitNames,
    csv_form,
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


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
OPENERS[".zst"] = lambda path, mode: pyarrow.output_stream(str(path), compression="zstd")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.split(".")[1]
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        with io.TextIOWrapper(OPENERS.get(path.suffix, open)(path, "wb"), newline="") as file:
            if kind in ("csv", "tsv"):
                writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
                writer.writeheader()
                writer.writerows(rows)
            elif kind == "json":
                json.dump(rows, file)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def texts(data):
    return [(text.prompt, text.responses, text.row) for group in data for text in group]


FILES = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"]
FILES += [f"a.{kind}.{suffix}" for kind in ("jsonl", "json", "csv") for suffix in ("gz", "bz2", "xz", "zst")]
FILES.remove("a.csv.zst")  # for which the datasets library needs zstandard


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_examples_with_the_same_row_numbers(name, tmp_path):
    rows = [
        {"prompt": "12", "chosen": "NA", "rejected": "None"},  # as text, whatever a table could make of it
        {"prompt": 'a "quoted",\n\tcell', "chosen": " é😀", "rejected": " \u2028x"},
        *pairs(20),
    ]
    path = write(tmp_path / name, rows)
    data = read_data(path)
    found = sorted(texts(data["train"]) + texts(data["test"]), key=lambda text: text[2])
    assert found == [(row["prompt"], (row["chosen"], row["rejected"]), i) for i, row in enumerate(rows, start=1)]
    assert len(data["test"]) == 2


@pytest.mark.parametrize("name", ["list.json", "lines.json"])
def test_a_json_file_holds_a_list_or_lines(name, tmp_path):
    lines = [json.dumps(row) for row in pairs(10)]
    (tmp_path / name).write_text(f"\ufeff [{', '.join(lines)}]" if name == "list.json" else "\n".join(lines))
    assert len(texts(read_data(tmp_path / name)["train"])) == 9


def test_a_glob_reads_its_files_in_order_and_names_each_in_errors(tmp_path):
    write(tmp_path / "b.jsonl", pairs(5, 5))
    write(tmp_path / "a.csv", pairs(5))
    write(tmp_path / "c.txt.jsonl", [{"prompt": "x", "chosen": 5, "rejected": "y"}])
    splits = read_data(f"{tmp_path}/[ab].*").values()
    found = sorted(
        (text.prompt, Path(text.source).name, text.row) for data in splits for group in data for text in group
    )
    assert found == [(f"Say {i}.", ("a.csv", "b.jsonl")[i // 5], i % 5 + 1) for i in range(10)]
    with pytest.raises(UserError, match=r"c\.txt\.jsonl, row 1: chosen must be a text, not int"):
        read_data(f"{tmp_path}/*")


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


def test_tables_keep_values_of_several_types_and_images_are_not_decoded(tmp_path):
    """One call of a tool has a number, the other a text, so that the library keeps the turns as JSON."""
    turns = [{"role": "user", "content": "Hi."}]
    calls = [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": x}}]} for x in (1, "a")
    ]
    rows = [
        {"prompt": turns, "chosen": [call], "rejected": "no", "image": {"path": None, "bytes": b"no image"}}
        for call in calls
    ]
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json").cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    (found,) = open_source(str(tmp_path / "saved"), ANY).train
    for read in ([row for _, row in found], [found[0], found[1]]):
        assert [row["chosen"] for row in read] == [[call] for call in calls]
        assert [row["prompt"] for row in read] == [turns] * 2


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


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.parquet", b"not parquet", "a.parquet: cannot be read"),
        ("a.csv", b"", "a.csv, row 0: the first line must name each column"),
        ("a.csv", b"prompt,prompt\n1,2\n", "a.csv, row 0: the first line must name each column once"),
        ("a.csv", b"prompt,chosen,rejected\na,b,c,d\n1,2,3,4\n1,2,3,4,5\n", "a.csv: cannot be read"),
        ("a.csv", b"prompt,chosen\xff,rejected\na,b,c\n", "a.csv, row 0: cannot be read"),
        ("a.csv", "prompt".encode("utf-16"), "save it as UTF-8, which Excel calls CSV UTF-8"),
        ("a.json", b'{\n "data": []}', "a .json file is one list of rows, or has a row per line"),
        ("a.json", b"[1, 2", "a.json, row 1 and on: is not a valid JSON list"),
        ("a.json", b'[{"a": 1}, 5]', "a.json, row 1: chosen must be a text, not missing; the row's columns: a"),
        *((f"a.{kind}.{suffix}", b"12", f"a.{kind}.{suffix}, {at}: cannot be read (")
          for kind, at in (("jsonl", "after row 0"), ("json", "after row 0"), ("csv", "row 0"))
          for suffix in ("gz", "bz2", "xz", "zst")),
        ("a.txt", b"", "neither a known data set"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named_in_one_line(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_data(tmp_path / name)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_file_may_be_one_of_excel_or_of_pandas(delimiter, tmp_path):
    """A byte order mark, quotes, a line break within a cell, Windows line ends; a column without a name."""
    cells = [["", "prompt", "chosen", "rejected"], *([str(i), f'"{i}", {delimiter}?', "a\nb", "c"] for i in range(10))]
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(cells)
    (table,) = open_source(str(tmp_path / "a.csv"), ANY).train
    row = {"Unnamed: 0": "1", "prompt": f'"1", {delimiter}?', "chosen": "a\nb", "rejected": "c"}
    assert list(table)[1] == (2, row)
    (tmp_path / "b.csv").write_text('prompt;chosen;"rejected, worse"\n1;2;3\n')
    assert csv_form(tmp_path / "b.csv", ",")[0] == ";"


def test_a_folder_of_folders_with_splits_of_their_own_is_refused(tmp_path, monkeypatch):
    for place in ("harmless", "helpful"):
        for split in ("train", "test"):
            write(tmp_path / place / f"{split}.jsonl", pairs(3))
    folders = f"{tmp_path}/harmless,{tmp_path}/helpful"
    with pytest.raises(UserError, match=rf"its folders have splits of their own; give datasets=\[{folders}\]"):
        open_source(str(tmp_path), ANY)
    write(tmp_path / "train.jsonl", pairs(3))
    assert splits_of(open_source(str(tmp_path), ANY)) == (["train.jsonl"], None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert splits_of(open_source("~/harmless/*.jsonl", ANY)) == (["test.jsonl", "train.jsonl"], None)
    for name in ("~/gone.jsonl", "~no-such-user/a.jsonl"):
        with pytest.raises(UserError, match=rf"datasets=\[{name}\]: there is no such file"):
            open_source(name, ANY)


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_a_compressed_file_that_is_cut_is_refused_and_two_files_in_a_row_are_read_to_the_end(suffix, tmp_path):
    content = write(tmp_path / f"a.jsonl.{suffix}", pairs(10)).read_bytes()
    (tmp_path / f"twice.jsonl.{suffix}").write_bytes(content + content)
    data = read_data(tmp_path / f"twice.jsonl.{suffix}")
    assert data["train"].counts.read == 20
    for name in ("cut.jsonl", "cut.json"):
        (tmp_path / f"{name}.{suffix}").write_bytes(content[:-4])
        with pytest.raises(UserError, match=rf"{name}\.{suffix}, after row \d+: cannot be read"):
            read_data(tmp_path / f"{name}.{suffix}")


def test_a_file_of_json_that_changes_while_it_is_read_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(10))
    train = read_data(path)["train"]
    assert train[0][0].prompt == "Say 0."
    path.write_text(path.read_text().replace("Say", "Sing"))
    with pytest.raises(UserError, match=r"a\.jsonl: has changed since the run began"):
        train[0][0]


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


def test_a_note_is_one_short_line_whatever_the_names():
    names = [f"{i:02}\n\x1b[31merror: forged" for i in range(30)]
    (line,) = note_columns("data", COLUMNS, Counter(names), ())
    assert line.isprintable() and line.count("forged") == 8 and "and 22 more" in line
    assert join_names(["a", "b"]) == "a, b"
