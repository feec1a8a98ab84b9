"""Files of JSON lines: tolerance, row numbers, and rows that are read when they are needed."""

import gzip

import pytest

from dpo.data.jsonl import JsonRows
from dpo.system.errors import UserError

BOM = b"\xef\xbb\xbf"


def read(tmp_path, content, name="train.jsonl"):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return list(JsonRows(path))


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
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
    ],
    ids=["BOM", "a second BOM", "CRLF", "blank lines", "BOM and a blank line", "BOM alone", "empty", "inside a text"],
)
def test_byte_order_marks_blank_lines_and_windows_line_ends_are_no_rows(name, content, rows, tmp_path):
    assert read(tmp_path, content, name) == rows


def test_a_malformed_row_is_named_by_its_line_though_blank_lines_come_before_it(tmp_path):
    with pytest.raises(UserError, match=r"train\.jsonl, row 4: is not JSON"):
        read(tmp_path, b"1\n\n\n{\n")


@pytest.mark.parametrize("content, row", [(b'[\n{"a": 1}\n]', 1), (b'\n{\n  "a": 1\n}', 2)])
def test_a_row_of_several_lines_is_refused_with_what_a_row_is(content, row, tmp_path):
    words = rf"row {row}: is not JSON \(.*\); each row is one line; a file that is one list needs the suffix .json"
    with pytest.raises(UserError, match=words):
        read(tmp_path, content)


def test_a_byte_order_mark_of_another_encoding_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"row 1: is not UTF-8"):
        read(tmp_path, '{"a": 1}'.encode("utf-16"))
