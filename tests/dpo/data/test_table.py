"""The cache of tables: what its keys tell apart, and what damaged files, full disks and several processes do."""

import errno
import json
import multiprocessing
import os
import random
from pathlib import Path

import pytest
from chat_families import FAMILIES
from conftest import read_data, tiny_tokenizer

from dpo.data import table
from dpo.system.errors import RunError, UserError

PAIRS = [
    {"prompt": f"{i % 7}? " * 9, "chosen": f"{i} yes " * 9, "rejected": "no", "other": "No!", "s": i % 3, "t": i % 2}
    for i in range(30)
]
TURNS = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}]} for i in "abc"]
TOKENIZER = FAMILIES["ChatML"].tokenizer()


def write(folder: Path, rows) -> Path:
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def with_special(**tokens):
    """ChatML's tokenizer with other special tokens, but the same vocabulary."""
    tokenizer = FAMILIES["ChatML"].tokenizer()
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


def with_template(text):
    tokenizer = FAMILIES["ChatML"].tokenizer()
    tokenizer.chat_template += text
    return tokenizer


def content(folder, **options):
    """All that loading gives, or why it fails."""
    try:
        data = read_data(folder, **{"tokenizer": TOKENIZER} | options)
    except UserError as error:
        return str(error)
    return {
        split: (dict(groups.counts), [list(map(repr, groups.split)), groups.split.selection.digest])
        for split, groups in data.items()
    }


VARIANTS = [
    {},
    {"sft": True},
    {"max_length": 60, "max_prompt_length": 30},
    {"max_length": 60, "max_prompt_length": 20},
    {"add_bos": True},
    {"add_bos": True, "tokenizer": with_special(bos_token="a")},
    {"tokenizer": with_special(eos_token="a")},
    {"tokenizer": tiny_tokenizer("gpt2")},
    {"vocab_size": 9},
    {"prompt_format": "chat"},
    {"prompt_format": "chat", "tokenizer": with_template("{#- another -#}")},
    {
        "prompt_format": "chat",
        "tokenizer": with_template("{% if flag %}{% endif %}"),
        "chat_template_args": {"flag": 1},
    },
    {"prompt_format": "hh"},
    {"rejected": "other"},
    {"score_chosen": "s", "score_rejected": "t"},
    {"split_test": "train", "split_train": "test"},
    {"on_inconsistent": "drop"},
]


def test_a_shared_cache_gives_what_an_empty_one_gives(tmp_path):
    folders = [write(tmp_path / "pairs", PAIRS), write(tmp_path / "turns", TURNS)]
    kinds = [(folder, options) for folder in folders for options in VARIANTS]
    kinds += [(folders[1], {"sft": True, "train_on": name}) for name in ("response", "last", "all")]
    fresh = [content(folder, **options) for folder, options in kinds]
    for at in random.Random(0).sample(2 * list(range(len(kinds))), 2 * len(kinds)):
        assert content(kinds[at][0], cache=tmp_path / "cache", **kinds[at][1]) == fresh[at], kinds[at]


def test_a_second_start_reads_the_table_and_a_changed_file_is_read_again(tmp_path, monkeypatch):
    folder = write(tmp_path / "pairs", PAIRS)
    first = content(folder, cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("dpo.data.loader.Loader.encode", None)
        assert content(folder, cache=tmp_path / "cache") == first
    path = folder / "train.jsonl"
    times = path.stat()
    path.write_text(path.read_text().replace("4 yes", "5 yes"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and content(folder, cache=tmp_path / "cache") != first


def flip(data):
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("name", ["rows.arrow", "about.json", "selections.npz"])
@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-9], lambda data: b"", flip, None], ids=["cut", "empty", "flipped", "missing"]
)
def test_a_damaged_table_is_written_again(name, spoil, tmp_path):
    folder, cache = write(tmp_path / "pairs", PAIRS), tmp_path / "cache"
    first = content(folder, cache=cache)
    for path in cache.glob(f"*/{name}"):
        if spoil is None:
            path.unlink()
        else:
            path.write_bytes(spoil(path.read_bytes()))
    assert content(folder, cache=cache) == first
    assert len(list(cache.iterdir())) == 2


def test_a_full_disk_is_named_in_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder, cache = write(tmp_path / "pairs", PAIRS), tmp_path / "cache"
    monkeypatch.setattr("dpo.data.loader.write_facts", full)
    with pytest.raises(
        RunError, match=r"^.*cache: the table of the data cannot be written \(No space left on device\)$"
    ):
        content(folder, cache=cache)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_without_a_place_for_the_cache_a_table_is_temporary(tmp_path, capsys):
    folder = write(tmp_path / "pairs", PAIRS)
    (tmp_path / "cache").write_text("a file")
    assert content(folder, cache=tmp_path / "cache" / "a") == content(folder)
    assert "cannot be written (Not a directory), so the table of the data is temporary" in capsys.readouterr().out


def make(cache, key, started):
    """Write a table that counts how often it was written, slowly."""

    def fill(folder):
        with open(cache.parent / "writes", "a") as file:
            file.write("x")
        started.set()
        (folder / "value").write_text("whole")

    assert table.cached(cache, key, fill, lambda folder: (folder / "value").read_text()) == "whole"


def test_one_of_several_processes_writes_a_table_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    processes = [context.Process(target=make, args=(tmp_path / "cache", "key", started)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "writes").read_text() == "x"


def test_what_a_killed_writer_left_is_removed_and_written_again(tmp_path):
    def die(folder):
        (folder / "part").write_text("part")
        os._exit(9)

    cache, context = tmp_path / "cache", multiprocessing.get_context("fork")
    process = context.Process(target=table.cached, args=(cache, "key", die, os.listdir))
    process.start()
    process.join(20)
    assert process.exitcode == 9 and list(cache.glob(".staging-key-*"))
    make(cache, "key", context.Event())
    assert [path.name for path in cache.iterdir()] == ["key"]


def test_unused_tables_are_removed_after_a_month(tmp_path):
    cache, context = tmp_path / "cache", multiprocessing.get_context("fork")
    for key, days in (("old", 31), ("new", 29)):
        make(cache, key, context.Event())
        os.utime(cache / key, (0, os.stat(cache).st_mtime - days * 24 * 3600))
    make(cache, "key", context.Event())
    assert {path.name for path in cache.iterdir()} == {"new", "key"}
