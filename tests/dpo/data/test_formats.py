"""Files: the rows of each format as they were written, their numbers, and what is refused with which remedy."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import read_data

from dpo.data.formats import DatasetTable, open_file
from dpo.system.errors import UserError

BOM = b"\xef\xbb\xbf"
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
COMPRESS[".zst"] = lambda content: pyarrow.compress(content, codec="zstd", asbytes=True)


def read(tmp_path, content, name="a.jsonl"):
    """Read a file of this content, compressed if its name says so."""
    path = tmp_path / name
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content.encode() if isinstance(content, str) else content))
    return list(open_file(path))


def rows_of(*rows):
    return list(enumerate(rows, start=1))


def as_file(rows, kind):
    """The rows in a format, as bytes."""
    if kind == "parquet" or kind == "arrow":
        table, file = pyarrow.Table.from_pylist(rows), io.BytesIO()
        if kind == "parquet":
            pyarrow.parquet.write_table(table, file)
        else:
            with pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        return file.getvalue()
    if kind == "json":
        return json.dumps(rows).encode()
    if kind in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# All formats


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "jsonlines", "json", "csv", "tsv", "parquet", "arrow"])
@pytest.mark.parametrize("compression", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_every_format_gives_the_same_rows_and_closes_its_file(kind, compression, tmp_path):
    rows = [
        {"prompt": "12", "chosen": "NA", "rejected": "None"},  # as texts, whatever a table could make of them
        {"prompt": 'a "quoted",\n\tcell', "chosen": " é😀", "rejected": " \u2028x\r\n"},
        *({"prompt": f"{i}", "chosen": '"', "rejected": ""} for i in range(300)),
    ]
    assert read(tmp_path, as_file(rows, kind), f"a.{kind}{compression}") == rows_of(*rows)
    table = open_file(tmp_path / f"a.{kind}{compression}")
    n_open = len(os.listdir("/proc/self/fd"))
    assert next(iter(table)) == (1, rows[0])
    assert len(os.listdir("/proc/self/fd")) == n_open


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "arrow"])
@pytest.mark.parametrize("compression", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_a_damaged_file_is_refused_with_its_name_in_one_line(kind, compression, tmp_path):
    content = as_file([{"a": f"{i}", "b": '"x"\n'} for i in range(300)], kind)
    cut = COMPRESS.get(compression, bytes)(content)[:-4]
    (tmp_path / f"a.{kind}{compression}").write_bytes(cut)
    (tmp_path / f"b.{kind}{compression}").write_bytes(b"\x00\x01\xff")
    for name in ("a", "b"):
        if (name, kind) == ("a", "arrow"):
            continue  # its rows are complete
        with pytest.raises(UserError, match=rf"{name}\.{kind}{compression}, ") as caught:
            list(open_file(tmp_path / f"{name}.{kind}{compression}"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_two_compressed_files_in_a_row_are_read_to_the_end(compression, tmp_path):
    parts = [COMPRESS[compression](f'{{"a": {i}}}\n'.encode()) for i in range(2)]
    (tmp_path / f"a.jsonl{compression}").write_bytes(b"".join(parts))
    assert list(open_file(tmp_path / f"a.jsonl{compression}")) == rows_of({"a": 0}, {"a": 1})


@pytest.mark.parametrize("module, suffix", [("bz2", "bz2"), ("lzma", "xz")])
def test_a_python_without_a_compression_reads_other_files_and_says_what_helps(module, suffix, tmp_path):
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(b"x")
    (tmp_path / "a.jsonl").write_text('{"a": 1}')
    code = f"""
import sys
sys.modules["{module}"] = None
from pathlib import Path
from dpo.data.formats import open_file
print(list(open_file(Path("{tmp_path}/a.jsonl"))))
list(open_file(Path("{tmp_path}/a.jsonl.{suffix}")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[(1, {'a': 1})]\n"
    assert re.search(
        rf"a\.jsonl\.{suffix}, row 0: cannot be decompressed here \(.*{module}.*\); decompress", done.stderr
    )


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
POINTERS = {
    LFS: "is not the data but a pointer of Git LFS; run git lfs pull",
    b"/annex/objects/SHA256E-s3--ab.csv\n": "is not the data but a pointer of git-annex; run git annex get",
    b"<!DOCTYPE html>\n<html>": "is not the data but a web page; download the file itself",
    BOM + b"\n <html lang='en'>": "is not the data but a web page",
}


@pytest.mark.parametrize("content", POINTERS)
@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.parquet", "a.jsonl", "a.json", "a.jsonl.gz", "a.arrow", "a.csv.zst"]
)
def test_a_file_that_stands_for_the_data_is_refused_with_what_fetches_it(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: {POINTERS[content]}"):
        list(open_file(tmp_path / name))


def test_a_link_to_nothing_is_refused_with_where_it_leads(tmp_path):
    targets = {"../.git/annex/objects/x": "; run git annex get in its folder", "../blobs/ab12": ""}
    for i, (target, mitigation) in enumerate(targets.items()):
        (tmp_path / f"{i}.jsonl").symlink_to(target)
        with pytest.raises(UserError, match=rf"{i}\.jsonl: is a link to {target}, which is not there{mitigation}$"):
            list(open_file(tmp_path / f"{i}.jsonl"))
    with pytest.raises(UserError, match=r"gone\.csv: cannot be read \(No such file or directory\)"):
        list(open_file(tmp_path / "gone.csv"))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_file_that_is_replaced_under_its_old_time_is_another_table(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    digests = []
    for text in ("x", "y", "x"):
        path.write_bytes(as_file([{"a": text}], kind))
        os.utime(path, (0, 0))
        table = open_file(path)
        digests.append(table.digest())
        assert list(table) == rows_of({"a": text})
    assert digests[0] == digests[2] != digests[1]


def test_a_file_that_is_read_as_another_format_is_another_table(tmp_path):
    for name in ("a.csv", "a.tsv", "b.csv"):
        (tmp_path / name).write_text("a\tb,c\n1\t2,3\n")
    first, other, same = (open_file(tmp_path / name).digest() for name in ("a.csv", "a.tsv", "b.csv"))
    assert first == same != other


def test_a_data_set_in_memory_and_on_disk_is_known_by_its_rows(tmp_path):
    def digest(rows):
        return DatasetTable("x", rows).digest()

    data = datasets.Dataset.from_list([{"a": f"{i}", "b": [{"c": i}]} for i in range(250)])
    data.save_to_disk(tmp_path / "saved")
    assert digest(datasets.load_from_disk(tmp_path / "saved")) == digest(data)
    assert digest(data.select(range(249))) == digest(data.select(range(250)).select(range(249))) != digest(data)
    assert digest(data.select([*range(248), 249, 248])) != digest(data)
    assert digest(data.rename_column("a", "z")) != digest(data)


# JSON


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    "content, rows",
    [
        (BOM + b'{"a": 1}\n{"a": 2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'{"a": 1}\n' + BOM + b'{"a": 2}', [(1, {"a": 1}), (2, {"a": 2})]),  # two files, concatenated
        (b'{"a": 1}\r\n{"a": 2}\r\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'\n{"a": 1}\n\n \t\n\r\n{"a": 2}\n\n', [(2, {"a": 1}), (6, {"a": 2})]),
        (BOM + b"\r\n", []),
        (BOM, []),
        (b"", []),
        (b'{"a": "\\ufeff\\r\\n"}', [(1, {"a": "\ufeff\r\n"})]),
        ('{"a": "\u2028\u0085\x7f"}\n'.encode(), [(1, {"a": "\u2028\u0085\x7f"})]),
        (b'{"a": 1}\n["a"]\n{"a": 2}\n', [(1, {"a": 1}), (2, ["a"]), (3, {"a": 2})]),
        (b'{"a": null, "b": [{"c": null}]}', [(1, {"a": None, "b": [{"c": None}]})]),
        (b'{"1": 12345678901234567890, "": 1e5}', [(1, {"1": 12345678901234567890, "": 1e5})]),
    ],
    ids=["BOM", "a second BOM", "CRLF", "blank lines", "BOM and a blank line", "BOM alone", "empty", "inside a text",
         "other line ends inside a text", "a list as a row", "nulls are data", "numbers"],
)  # fmt: skip
def test_lines_of_json_are_read_as_they_were_written(name, content, rows, tmp_path):
    assert read(tmp_path, content, name) == rows


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize(
    "content", ['[{"a": 1}, {"a": 2}]', '\ufeff\n [\n{"a": 1}\n,{"a":\n2}\n]\n\n', '{"a": 1}\n{"a": 2}']
)
def test_a_list_and_lines_are_told_by_their_beginning_whatever_the_suffix(name, content, tmp_path):
    assert read(tmp_path, content, name) == rows_of({"a": 1}, {"a": 2})


@pytest.mark.parametrize("content", ["[]", " [ \n] \n", ""])
def test_an_empty_list_has_no_rows(content, tmp_path):
    assert read(tmp_path, content, "a.json") == []


@pytest.mark.parametrize(
    "content, words",
    [
        ("1\n\n\n{\n", r"row 4: is not JSON \(.*\); each row is one line, unless the file is one list"),
        ('\n{\n  "a": 1\n}', r"row 2: is not JSON \(.*\); each row is one line, unless the file is one list"),
        ('{"data": [\n{"a": 1}]}', r"row 1: is not JSON \(.*\); each row is one line, unless the file is one list"),
        ('{"a": 1}\n{"a": "b', r"row 2: is not JSON \(.*\); the file ends in this row: is it complete\?"),
        ('{"a": 1}\nhello\n', r"row 2: is not JSON \(Expecting value.*\)$"),
        ("{'a': 1}\n", r"row 1: is not JSON \(Expecting property name"),
        ("{1: 1}\n", r"row 1: is not JSON \(Expecting property name"),
        ('{"a": 1}\n{"a": {"b": 1, "b": 1}}\n', r"row 2: is not JSON \(the key 'b' occurs twice in an object\)"),
        (f'{{"a": {"1" * 5000}}}\n', r"row 1: is not JSON \(Exceeds the limit"),
        ('{"a":' * 100_000 + "\n", r"row 1: is not JSON \(maximum recursion depth"),
        ('[{"a": 1}, {"a": 1, "a": 2}]', r"row 2: is not JSON \(the key 'a' occurs twice in an object\)"),
        ('[{"a": 1}, {"a": ', r"row 2: is not JSON \(Expecting value"),
        ('[{"a": 1},', r"row 2: is not JSON \(Expecting value"),
        ('[{"a": 1}', r"row 2: is not JSON \(Expecting value"),
        ('[{"a": 1}]\n[{"a": 2}]', "row 1: the list ends before the file; a file is one list of rows"),
        ('{"a": 1}\n'.encode("utf-16"), r"row 1: is not UTF-8 \(byte 0xff at character 1\); save it as UTF-8"),
        ('{"a": 1}\n'.encode("utf-16-le"), "row 1: contains zeros, as UTF-16 does; save it as UTF-8"),
        ('{"a": 1}\n{"a": "café"}\n'.encode("latin-1"), r"row 2: is not UTF-8 \(byte 0xe9 at character 11\)"),
    ],
)  # fmt: skip
def test_what_is_no_json_is_refused_with_its_row(content, words, tmp_path):
    with pytest.raises(UserError, match=rf"a\.jsonl, {words}"):
        read(tmp_path, content)


# CSV


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_csv_file_may_be_one_of_excel(name, delimiter, line_end, tmp_path):
    """A byte order mark, quotes, a line break within a cell; a column without a name."""
    if name == "a.tsv" and delimiter == ",":
        return
    cells = [["", "prompt", "chosen", "rejected"], *([str(i), f'"{i}", {delimiter}?', "a\nb", "c"] for i in range(10))]
    text = io.StringIO(newline="")
    quoting = (
        csv.QUOTE_ALL if line_end == "\r" else csv.QUOTE_MINIMAL
    )  # which does not see the line break within a cell
    csv.writer(text, delimiter=delimiter, lineterminator=line_end, quoting=quoting).writerows(cells)
    found = read(tmp_path, BOM + text.getvalue().encode(), name)
    row = {"Unnamed: 0": "1", "prompt": f'"1", {delimiter}?', "chosen": "a\nb", "rejected": "c"}
    assert found[1] == (2, row) and len(found) == 10


def test_a_delimiter_is_not_one_that_a_name_contains(tmp_path):
    assert read(tmp_path, 'prompt;chosen;"rejected, worse"\n1;2;3\n', "a.csv") == rows_of(
        {"prompt": "1", "chosen": "2", "rejected, worse": "3"}
    )


@pytest.mark.parametrize("name, sep", [("a.csv", ","), ("a.tsv", "\t"), ("b.csv", "\t")])
def test_what_pandas_writes_is_read_back(name, sep, tmp_path):
    cells = ["x\ty", "1\n\n2", 'say "hi"', '"Yes"', '"', "a,b", "", " ", "NA", "1.0", "x" * 200_000, '\n"\t"\n']
    data = datasets.Dataset.from_dict({"a": cells, "b": cells[::-1]})
    data.to_pandas().to_csv(tmp_path / name, sep=sep, index=False)
    assert list(open_file(tmp_path / name)) == rows_of(*data)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
@pytest.mark.parametrize(
    "lines",
    [
        ["Rome?\tYes.\tNo.", 'Oslo?\t"Yes\tNo.', "Bern?\tYes.\tNo.", 'Lima?\t"Yes\tNo.'],
        ["Rome?\tYes.\tNo.", 'Oslo?\t"Yes\tNo.'],
        ['"Yes" he said.\t"Sure"\tNo.', "a\tb\tc"],
        ['"\t"\t"', '"\t\t"', '"a\tb\tc"d'],
    ],
    ids=[
        "two quotes that are not closed",
        "one",
        "a quotation that begins a cell",
        "quotes alone",
    ],
)
def test_quotes_of_a_file_with_tabs_are_part_of_its_cells_if_they_are_not_closed(name, lines, tmp_path):
    names = ["prompt", "chosen", "rejected"]
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in lines]
    assert read(tmp_path, "\n".join(["\t".join(names), *lines]), name) == rows_of(*rows)


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "row 0: the header must name each column once, not nothing"),
        ("a,a\n1,2\n", "row 0: the header must name each column once, not a, a"),
        ("a,b\n\n1,2\n1,2,3\n", "row 2, line 4: its number of cells is 3, but the header's is 2; a cell that"),
        ('a,b\n"1\n2",2\n  \n1\n', "row 2, line 5: its number of cells is 1, but the header's is 2"),
        ('a,b\n1,2\n"1,2\n3,4\n', r"row 2, line 3: cannot be read \(unexpected end of data\); a cell that begins with"),
        ('a,b\n1,"2,3\n4,"5,6\n', r"row 1, line 2: cannot be read \(.*\); a cell that begins with a quotation mark"),
        ('a,b\n"say \\"hi\\" now",2\n', r"row 1, line 2: cannot be read \(.*\); .* one inside is written twice"),
        ("a,b\n1,2\ncafé,4\n".encode("cp1252"), r"line 3: is not UTF-8 \(byte 0xe9 at character 4\); save it as UTF-8"),
        ("prompt".encode("utf-16"), "save it as UTF-8, which Excel calls CSV UTF-8"),
        (b"prompt,chosen\xff,rejected\na,b,c\n", r"line 1: is not UTF-8 \(byte 0xff at character 14\)"),
        (gzip.compress(b"a,b\n1,2\n", mtime=0), "line 1: is not UTF-8"),
    ],
)  # fmt: skip
def test_a_csv_file_that_could_be_misread_is_refused(content, words, tmp_path):
    with pytest.raises(UserError, match=rf"a\.csv, .*{words}"):
        read(tmp_path, content, "a.csv")


def test_a_file_with_tabs_that_is_regular_in_neither_way_or_in_two_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"a\.tsv, row 0: a quotation mark that begins a cell may end in a later row, or"
    ):
        read(tmp_path, 'a\tb\n1\t"It is\n2\tso."\n3\t3\n', "a.tsv")
    with pytest.raises(UserError, match=r"a\.tsv, row 2, line 4: its number of cells is 3"):
        read(tmp_path, 'a\tb\n"1\n1"\t2\n1\t2\t3\n', "a.tsv")


def test_cells_are_limited_so_that_a_quote_does_not_read_a_whole_file_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo.data.formats.MAX_CELL", 1000)
    with pytest.raises(UserError, match=r"row 2, line 3: cannot be read \(field larger than field limit"):
        read(tmp_path, 'a,b\n1,2\n"1,2\n' + "3,4\n" * 1000, "a.csv")


# Arrow


def test_values_of_several_types_are_decoded_and_nulls_of_the_table_are_removed(tmp_path):
    """JSON keeps its nulls, and so do columns and lists; a key that only other objects have is no key."""
    turns = [{"role": "user", "content": "Hi.", "name": None}, {"role": "user", "content": "Ho.", "name": "x"}]
    calls = [{"name": "f", "arguments": arguments} for arguments in ({"x": 1, "y": None}, "none")]
    rows = [
        {"prompt": turns, "calls": calls, "other": None, "list": ["a", None], "image": {"path": None, "bytes": b"no"}},
        {"prompt": [turns[1], None], "calls": None, "other": "x", "list": None, "image": None},
    ]
    data = datasets.Dataset.from_list(rows, on_mixed_types="use_json").cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    expected = [dict(rows[0]), dict(rows[1])]
    expected[0] |= {"prompt": [{"role": "user", "content": "Hi."}, turns[1]], "image": {"bytes": b"no"}}
    tables = [open_file(tmp_path / "a.parquet"), open_file(tmp_path / "saved" / "data-00000-of-00001.arrow")]
    tables.append(DatasetTable("x", datasets.load_from_disk(tmp_path / "saved")))
    for table in tables:
        assert list(table) == rows_of(*expected)


def test_columns_that_begin_late_have_nulls_before(tmp_path):
    rows = [{"a": "x"}] * 150 + [{"a": "x", "late": "y"}]
    table = pyarrow.Table.from_pylist(rows, pyarrow.schema([("a", pyarrow.string()), ("late", pyarrow.string())]))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = list(open_file(tmp_path / "a.parquet"))
    assert found[0] == (1, {"a": "x", "late": None}) and found[-1] == (151, rows[-1])


def test_an_arrow_file_may_have_a_footer(tmp_path):
    table = pyarrow.table({"a": [f"{i}" for i in range(250)]})
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert list(open_file(tmp_path / "a.arrow")) == rows_of(*table.to_pylist())


def test_equal_names_of_columns_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([["x"], ["y"]], ["a", "a"])
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"a\.arrow, row 0: the header must name each column once, not a, a"):
        list(open_file(tmp_path / "a.arrow"))


def test_maps_are_objects(tmp_path):
    table = pyarrow.table({"a": pyarrow.array([[("x", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int64()))})
    pyarrow.parquet.write_table(table, tmp_path / "a.PARQUET")
    assert list(open_file(tmp_path / "a.PARQUET")) == rows_of({"a": {"x": 1}}, {"a": None})


def test_a_file_that_stands_for_the_data_has_no_digest(tmp_path):
    (tmp_path / "a.csv").write_bytes(LFS)
    for name in ("a.csv", "gone.csv"):
        with pytest.raises(UserError, match=name):
            open_file(tmp_path / name).digest()


# What a row means, whatever its file


KINDS = pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])


@KINDS
def test_a_label_may_be_a_fraction_only_if_it_means_true_or_false(kind, tmp_path):
    for folder, labels in (("whole", [1.0, 0.0, 1.0]), ("half", [1.0, 0.0, 0.5])):
        rows = [{"prompt": "Hi.", "completion": f"a{i}", "label": label} for i, label in enumerate(labels)]
        for split in ("train", "test"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{split}.{kind}").write_bytes(as_file(rows, kind))
    (group,) = read_data(tmp_path / "whole", labels=True)["train"]
    assert [example.label for example in group] == [True, False, True]
    with pytest.raises(UserError, match=rf"train\.{kind}, row 3: label must be true or false, not '0.5'"):
        read_data(tmp_path / "half", labels=True)


@KINDS
def test_lines_before_and_after_a_response_are_read_and_move_no_dialogue_apart(kind, tmp_path):
    prompt, texts = "\n\nHuman: Hi.\n\nAssistant:", {"chosen": "\n\nYes.\n", "rejected": "\nNo."}
    whole = {side: f"{prompt}{text}" for side, text in texts.items()}
    for folder, row in (("parts", {"prompt": prompt, **texts}), ("whole", whole)):
        (tmp_path / folder).mkdir()
        for split in ("train", "test"):
            (tmp_path / folder / f"{split}.{kind}").write_bytes(as_file([row], kind))
        ((example,),) = read_data(tmp_path / folder)["train"]
        assert (example.prompt, example.responses) == (prompt, tuple(texts.values()))
