"""Rows in files that only grow: what is left after a kill, and what is written at the end."""

import pytest

from tools.rounds.store import Shards, read_rows, write_rows

ROWS = [{"id": "a", "text": "x\u2028y"}, {"id": "b", "text": "\U0001f600 \\ \n"}, {"id": "c", "text": ""}]


def test_rows_are_read_as_they_were_written(tmp_path):
    write_rows(tmp_path / "new" / "rows.jsonl", ROWS)
    assert read_rows(tmp_path / "new" / "rows.jsonl") == ROWS
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_row_cut_off_anywhere_is_removed_and_the_rows_before_it_stay(tmp_path):
    path = tmp_path / "rows-0.jsonl"
    write_rows(path, ROWS)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in range(len(content)):
        path.write_bytes(content[:size])
        whole = sum(end <= size for end in ends)
        shards = Shards(tmp_path / "rows.jsonl")
        assert list(shards.rows.values()) == ROWS[:whole]
        shards.append(ROWS)
        assert path.read_bytes() == content


def test_shards_of_several_processes_are_read_together_and_merged_in_the_given_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    Shards(path).append(ROWS[:1], rank=1)
    Shards(path).append(ROWS[1:], rank=0)
    shards = Shards(path)
    assert shards.rows.keys() == {"a", "b", "c"}
    shards.merge(["c", "a", "b"])
    assert [row["id"] for row in read_rows(path)] == ["c", "a", "b"]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_row_is_not_added_twice(tmp_path):
    shards = Shards(tmp_path / "rows.jsonl")
    shards.append(ROWS[:2])
    shards.append(ROWS)
    shards.append([{"id": "a", "text": "another answer"}])
    assert read_rows(tmp_path / "rows-0.jsonl") == ROWS
    assert Shards(tmp_path / "rows.jsonl").rows["a"] == ROWS[0]


def test_merging_again_after_a_kill_writes_the_same_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    Shards(path).append(ROWS)
    before = (tmp_path / "rows-0.jsonl").read_bytes()
    Shards(path).merge("abc")
    merged = path.read_bytes()
    (tmp_path / "rows-0.jsonl").write_bytes(before)  # the process was killed before it removed the shards
    Shards(path).merge("abc")
    assert path.read_bytes() == merged


def test_a_row_that_is_not_valid_json_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Shards(tmp_path / "rows.jsonl").append([{"id": "a", "score": float("nan")}])
    assert read_rows(tmp_path / "rows-0.jsonl") == []
