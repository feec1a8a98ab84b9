"""From files to tables: what is kept and counted, tables that are read again, and 300 malformed files."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from chat_families import CHATML, FAMILIES, SYSTEM, TURNS, answer
from conftest import read_data, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data import loader
from dpo.data.batches import BatchIterator
from dpo.data.formats import FileTable
from dpo.data.formatting import RowFormatter
from dpo.data.mixture import Mixture, take_share
from dpo.data.records import hashes_of
from dpo.data.rows import Row
from dpo.data.selection import first_of_each
from dpo.data.table import RecordTable
from dpo.system import processes
from dpo.system.errors import UserError

TOKENIZER = FAMILIES["ChatML"].tokenizer()


def lines(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(i, **fields):
    turns = [SYSTEM, *TURNS[:2], {"role": "user", "content": f"Say {i}."}]
    return {"chosen": [*turns, answer(f"{i}.")], "rejected": [*turns, answer("No.")]} | fields


def read(folder, *rows, **options):
    """Read rows, of which none is held out, with ChatML's tokenizer."""
    for split in ("train", "test"):
        lines(folder / f"{split}.jsonl", *rows)
    return read_data(folder, tokenizer=TOKENIZER, **options)["train"]


def counts(data):
    return {"read": data.counts.read} | {what: n for what, n in data.counts.items() if n}


# Conversations


def test_conversations_are_counted_as_texts_are(tmp_path):
    twice, equal, empty = chat(1), chat(2), chat(3)
    equal["rejected"] = equal["chosen"]
    empty["chosen"] = [*empty["chosen"][:-1], answer(" ")]
    special, other = chat("<|im_end|>"), chat(4, rejected=[TURNS[0], answer("No.")])
    data = read(tmp_path, twice, twice, equal, empty, special, other, chat(5))
    assert counts(data) == {
        "read": 7,
        "kept": 3,
        "dropped: both responses are equal": 1,
        "dropped: a response is empty": 1,
        "dropped: a turn contains a special token": 1,
        "dropped: the conversations first differ in a turn of the system": 1,
        "kept although it repeats an earlier row": 1,
    }
    assert [[text.row for text in group] for group in data] == [[1, 2], [7]]
    assert data[1][0].responses == ("5.<|im_end|>", "No.<|im_end|>")


def test_sft_trains_on_each_distinct_last_turn(tmp_path):
    rows = [{"messages": chat(i)["chosen"]} for i in (1, 2, 1)]
    data = read(tmp_path, *rows, sft=True)
    assert [text.responses for group in data for text in group] == [("1.<|im_end|>",), ("2.<|im_end|>",)]
    assert counts(data)["dropped: an earlier row has the same prompt and chosen response"] == 1


def strict_template(text):
    """Make ChatML's tokenizer with a template that refuses conversations that hold a text."""
    tokenizer = FAMILIES["ChatML"].tokenizer()
    check = f"{{%- for m in messages %}}{{% if '{text}' in m.content %}}{{{{ raise_exception('no') }}}}{{% endif %}}"
    tokenizer.chat_template = check + "{% endfor -%}" + CHATML
    return tokenizer


def test_an_inconsistent_row_is_refused_by_number_or_dropped_and_counted(tmp_path):
    for split in ("train", "test"):
        lines(tmp_path / f"{split}.jsonl", *(chat(i) for i in range(4)))
    tokenizer = strict_template("Say 2")
    with pytest.raises(
        UserError, match=r"train\.jsonl, row 3: the chat template refuses it \(no\); on_inconsistent=drop"
    ):
        read_data(tmp_path, tokenizer=tokenizer)
    data = read_data(tmp_path, tokenizer=tokenizer, on_inconsistent="drop")["train"]
    assert counts(data) == {"read": 4, "kept": 3, "dropped: the chat template refuses it": 1}


def test_rows_are_also_refused_or_dropped_by_their_tokens(tmp_path):
    """Without line breaks "i" and "n" become one token; the other row does not."""
    tokenizer = FAMILIES["ChatML"].tokenizer()
    tokenizer.chat_template = "{%- for m in messages %}{{ m.content }}{% endfor -%}"
    rows = [{"prompt": [{"role": "user", "content": "i"}], "chosen": text, "rejected": "."} for text in ("n", "?")]
    for split in ("train", "test"):
        lines(tmp_path / f"{split}.jsonl", *rows)
    words = r"train\.jsonl, row 1: the conversation's tokens do not begin with the prompt's tokens \(at token 0"
    with pytest.raises(UserError, match=words):
        read_data(tmp_path, tokenizer=tokenizer)
    data = read_data(tmp_path, tokenizer=tokenizer, on_inconsistent="drop")["train"]
    assert [text.row for group in data for text in group] == [2]
    assert counts(data)["dropped: the conversation's tokens do not begin with the prompt's tokens"] == 1


def test_a_part_of_a_turn_that_is_no_text_is_refused_or_dropped_and_counted(tmp_path):
    image = chat(1)
    image["chosen"] = [{"from": "human", "value": [{"type": "image"}]}, *image["chosen"][1:]]
    with pytest.raises(
        UserError, match=r"row 2: a turn contains a part that is not text \(.*'image'\); on_inconsistent"
    ):
        read(tmp_path, chat(0), image)
    data = read(tmp_path, chat(0), image, on_inconsistent="drop")
    assert counts(data) == {"read": 2, "kept": 1, "dropped: a turn contains a part that is not text": 1}


def test_scores_are_known_without_reading_records(tmp_path, monkeypatch):
    rows = [{"prompt": f"{i % 3}:", "chosen": "a", "rejected": f"b{i}", "s": i, "t": 2.5} for i in range(6)]
    columns = {"score_chosen": "s", "score_rejected": "t"}
    (tmp_path / "other").mkdir()
    data, other = read(tmp_path, *rows, **columns), read(tmp_path / "other", chat(1))
    expected = [text.scores for group in data for text in group]
    assert len(expected) == 6 and expected[:2] == [(2.5, 0.0), (3.0, 2.5)]
    monkeypatch.setattr(RecordTable, "__getitem__", None)
    assert list(data.split.scores()) == expected
    assert list(Mixture([other.split, data.split]).scores()) == [(), *expected]


def test_labels_are_counted_over_an_epoch_and_a_pair_has_one_of_each(tmp_path):
    labelled = [{"prompt": f"{i}:", "completion": "a", "label": i == 0} for i in range(4)]
    (tmp_path / "pairs").mkdir()
    data, pairs = read(tmp_path, *labelled, labels=True), read(tmp_path / "pairs", chat(0), chat(1))
    assert data.split.label_counts() == (1, 3) and pairs.split.label_counts() == (2, 2)
    assert Mixture([take_share(data.split, 2, seed=0), pairs.split]).label_counts() == (4, 8)


def test_a_last_turn_that_is_too_long_is_dropped_and_counted_before_training(tmp_path):
    data = read(tmp_path, chat("a " * 100), chat(1), max_length=80, max_prompt_length=70)
    assert counts(data) == {"read": 2, "kept": 1, "dropped: the last turn alone is longer than max_prompt_length": 1}


def test_texts_are_rendered_as_turns_with_their_system_turn(tmp_path, capsys):
    rows = [{"system": "Be brief.", "prompt": f"Say {i}.", "chosen": "a", "rejected": "b"} for i in range(3)]
    data = read(tmp_path, *rows, prompt_format="chat")
    turns = ("system\nBe brief.<|im_end|>\n", "user\nSay 1.<|im_end|>\n", "assistant\n")
    assert data[1][0].prompt == "".join(f"<|im_start|>{turn}" for turn in turns)
    assert data[1][0].responses == ("a<|im_end|>", "b<|im_end|>")
    assert "ignored" not in capsys.readouterr().out
    read(tmp_path, *rows)
    assert "columns ignored: system (in 3 rows)" in capsys.readouterr().out


def test_the_first_text_prompt_that_might_be_a_turn_is_named_where_there_is_a_template(tmp_path):
    text, dialogue = Row("Hi.", ("a", "b")), Row("\n\nHuman: Hi.\n\nAssistant:", (" a", " b"))
    for tokenizer, prompt_format, expected in (
        (TOKENIZER, "auto", [False, True]),
        (TOKENIZER, "text", [False, False]),
        (tiny_tokenizer("gpt2"), "auto", [False, False]),
    ):
        assert list(map(RowFormatter(prompt_format, tokenizer).is_plain, (dialogue, text))) == expected
    plain = {"prompt": "Hi.", "chosen": "a", "rejected": "b"}
    dialogues = {"chosen": "\n\nHuman: Hi.\n\nAssistant: a", "rejected": "\n\nHuman: Hi.\n\nAssistant: b"}
    assert read(tmp_path, dialogues, plain, plain).loaded.plain_text == f"{tmp_path / 'train.jsonl'}, row 2"
    assert read(tmp_path, dialogues).loaded.plain_text is None


def test_nothing_is_said_of_columns_where_no_row_is_used(tmp_path, capsys):
    read(tmp_path, *({"chosen": TURNS[:1] * 2, "rejected": TURNS[:1] * 2} for _ in range(3)))
    assert "columns" not in capsys.readouterr().out


def test_texts_and_conversations_may_be_mixed(tmp_path):
    text = {"prompt": "Hi.", "chosen": "a", "rejected": "b"}
    data = read(tmp_path, text, chat(1))
    assert [group[0].messages is not None for group in data] == [False, True]
    assert data.loaded.is_chat


# Rows of one response with a label


def labelled(prompt, completion, label):
    return {"prompt": prompt, "completion": completion, "label": label}


def test_rows_with_a_label_are_counted_by_it(tmp_path):
    rows = [labelled("a", "b", True), labelled("a", "b", True), labelled("a", "b", False), labelled("c", " ", False)]
    chats = [labelled([TURNS[0]], [answer("Yes.")], True), {"messages": chat(1)["chosen"], "label": False}]
    data = read(tmp_path, *rows, *chats, labels=True)
    assert counts(data) == {
        "read": 6,
        "kept": 5,
        "desirable": 3,
        "undesirable": 2,
        "dropped: a response is empty": 1,
        "kept although it repeats an earlier row": 1,
    }
    found = [(text.row, text.responses, text.label) for group in data for text in group]
    assert found[:3] == [(1, ("b",), True), (2, ("b",), True), (3, ("b",), False)]
    assert found[3:] == [(5, ("Yes.<|im_end|>",), True), (6, ("1.<|im_end|>",), False)]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_labels_are_read_from_every_kind_of_table_and_belong_to_its_fingerprint(kind, tmp_path):
    """That of one data set, and that of several."""
    prints = []
    for last in (True, False, True):
        rows = [labelled(f"{i}", "yes", i % 2 == 0) for i in range(10)] + [labelled("10", "yes", last)]
        path = tmp_path / f"{len(prints)}.{kind}"
        if kind == "jsonl":
            lines(path, *rows)
        else:
            getattr(datasets.Dataset.from_list(rows), f"to_{kind}")(path)
        data = read_data(path, tokenizer=TOKENIZER, labels=True)
        found = {text.prompt: text.label for split in data.values() for group in split for text in group}
        assert found == {row["prompt"]: row["label"] for row in rows}
        train, test = data["train"].split, data["test"].split
        for splits in ([train], [train, test]):
            prints.append(BatchIterator(Mixture(splits), train.tokenize, 1, n_epochs=1).fingerprint())
    assert prints[:2] == prints[4:] and not set(prints[:2]) & set(prints[2:4])


# Reading again


def test_examples_are_read_again_from_a_table_as_they_were_checked(tmp_path):
    rows = [chat(i) for i in range(20)]
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "saved")
    mine = read_data(lines(tmp_path / "a.jsonl", *rows), tokenizer=TOKENIZER)
    saved = read_data(tmp_path / "saved", tokenizer=TOKENIZER)
    for split in ("train", "test"):
        read_again = [replace(text, source="") for group in saved[split] for text in group]
        assert [replace(text, source="") for group in mine[split] for text in group] == read_again


def test_several_data_sets_are_one_sequence(tmp_path):
    first, second = (
        read_data(lines(tmp_path / f"{n}.jsonl", *map(chat, range(n))), tokenizer=TOKENIZER) for n in (11, 5)
    )
    splits = [first["train"].split, second["train"].split, first["test"].split]
    mixture = Mixture(splits).numbered_from(100)
    assert len(mixture) == 10 + 5 + 1 and mixture.sizes.tolist() == [1] * 16
    assert [example.index for example in mixture] == list(range(100, 116))
    assert [example.text for example in mixture] == [example.text for split in splits for example in split]
    batches = BatchIterator(mixture, splits[0].tokenize, 4, n_epochs=1)
    rows = [example.text.row for batch in batches for example in batch.examples]
    assert len(rows) == 16 and sorted(rows) != rows


def test_the_fingerprint_tells_conversations_templates_and_orders_apart(tmp_path):
    digests = []
    for i, row in enumerate((chat(1), chat(1), chat(2), chat(1, system=None))):
        (tmp_path / f"{i}").mkdir()
        digests.append(Mixture([read(tmp_path / f"{i}", row).split]).digest())
    assert digests[0] == digests[1] == digests[3] != digests[2]
    other = FAMILIES["ChatML"].tokenizer()
    other.chat_template = CHATML + " "
    data = read_data(tmp_path / "0", tokenizer=other)["train"]
    assert Mixture([data.split]).digest() != digests[0]
    rows = [{"prompt": f"{i % 3}", "chosen": f"{i}", "rejected": "no"} for i in range(6)]
    splits = []
    for number, order in enumerate(((0, 1, 2, 3, 4, 5), (1, 0, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5))):
        datasets.Dataset.from_list(rows).select(order).save_to_disk(tmp_path / f"saved{number}")
        splits.append(read_data(tmp_path / f"saved{number}", tokenizer=TOKENIZER)["train"].split)
    first, second, third = (split.selection.digest for split in splits)
    assert first == third != second
    mixtures = ([splits[0]], splits[:2], [splits[1], splits[0]], splits)
    assert len({Mixture(parts).digest() for parts in mixtures}) == len(mixtures)


def test_hashes_and_first_values():
    """Those of earlier versions, which resumed runs are compared with: of '["a"]' and of '["a", "ü\\"c"]'."""
    texts = ("a", 'ü"c')
    known = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in ('["a"]', '["a", "ü\\"c"]')]
    assert hashes_of(*texts) == [int.from_bytes(digest, "big") for digest in known]
    assert len({hashes_of(*texts)[-1] for texts in (("a", "bc"), ("ab", "c"), ("a", "b", "c"))}) == 3
    assert first_of_each(np.array([3, 1, 3, 1, 2])).tolist() == [True, True, False, False, True]


TEXTS = st.sampled_from(["", " ", "a", "b", f"a{TOKENIZER.eos_token}", "c"])
ROWS = st.lists(st.tuples(TEXTS, TEXTS, TEXTS, st.booleans()), max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(ROWS, st.booleans(), st.booleans())
def test_rows_read_are_rows_kept_and_rows_left_out_in_every_mode(tmp_path_factory, rows, sft, hold_out):
    folder = tmp_path_factory.mktemp("data")
    table = []
    for prompt, chosen, rejected, has_prompt in rows:
        texts = {"chosen": chosen, "rejected": rejected}
        before = f"\n\nHuman: {prompt}\n\nAssistant:"
        table.append({"prompt": prompt} | texts if has_prompt else {k: before + v for k, v in texts.items()})
    lines(folder / "train.jsonl", *table)
    if not hold_out:
        lines(folder / "test.jsonl")
    for split, data in read_data(folder, sft=sft, tokenizer=TOKENIZER).items():
        assert data.counts["kept"] == sum(map(len, data))
        assert data.counts.read == (len(table) if hold_out or split == "train" else 0)
        assert min(data.counts.values(), default=0) >= 0


# 300 malformed tables


def spoil_message(turn, draw):
    values = (None, 3, "hi", [], [turn], {}, {"role": "user"}, {"content": "a"}, {"role": None, "content": "a"})
    changes = (
        {"role": "bot"},
        {"role": 5},
        {"content": None},
        {"content": 7},
        {"content": ["a"]},
        {"content": {"a": 1}},
    )
    texts = ({"content": ""}, {"content": " \n"}, {"content": "\ud83d"}, {"content": "x" * 5_000},
             {"content": "<|im_end|>"}, {"role": "system"}, {"role": "assistant"}, {"role": "tool"})  # fmt: skip
    i = draw.randint(len(values) + len(changes) + len(texts))
    return values[i] if i < len(values) else turn | (changes + texts)[i - len(values)]


def spoil_turns(turns, draw):
    i = draw.randint(6)
    at = int(draw.randint(len(turns)))
    return (
        turns[: at - (at == 3)],  # up to a turn of the assistant, it would be the beginning of the other conversation
        [SYSTEM, *turns],
        [*turns, turns[at - (at in (2, 4))]],  # another turn of the assistant would be one more of the response
        [turn["content"] for turn in turns],
        turns[::-1],
        {"messages": turns},
    )[i]


def spoil_row(row, draw):
    side = ("chosen", "rejected")[draw.randint(2)]
    kind = draw.randint(4)
    if kind == 0:
        at = int(draw.randint(len(row[side])))
        turns = [spoil_message(turn, draw) if i == at else turn for i, turn in enumerate(row[side])]
        return row | {side: turns}
    if kind == 1:
        return row | {side: spoil_turns(row[side], draw)}
    if kind == 2:
        values = (None, 5, True, "text", {}, [], [[]], 1.5, "x" * 5_000)
        return row | {side: values[draw.randint(len(values))]}
    rows = ({k: v for k, v in row.items() if k != side}, [row], None, 3, row | {"system": 5}, row | {"tools": "["},
            row | {"system": "Be long."}, row | {"tools": [3]}, {})  # fmt: skip
    return rows[draw.randint(len(rows))]


def malformed(folder, i):
    """Write 6 conversations, one of them spoilt; return the path, that row, and whether it stayed as it was."""
    draw = np.random.RandomState(i)
    rows, at = [chat(k) for k in range(6)], int(draw.randint(6))
    rows[at] = spoil_row(rows[at], draw)
    kind = ("jsonl", "json", "parquet")[0 if i % 10 < 6 else 1 if i % 10 < 9 else 2]
    path = folder / f"{i}.{kind}"
    if kind == "parquet":
        try:
            datasets.Dataset.from_list(rows).to_parquet(path)
            return path, at + 1, rows[at] == chat(at)
        except Exception:  # a table cannot hold everything that JSON can
            path = folder / f"{i}.jsonl"
    lines(path, *rows) if path.suffix == ".jsonl" else path.write_text(json.dumps(rows))
    return path, at + 1, rows[at] == chat(at)


def test_a_cell_of_5_megabytes_is_a_text(tmp_path):
    lines(tmp_path / "train.jsonl", {"prompt": "Hi.", "chosen": "y" * 5_000_000, "rejected": "no"}, chat(1))
    lines(tmp_path / "test.jsonl", chat(1))
    data = read_data(tmp_path, tokenizer=TOKENIZER)["train"]
    assert counts(data) == {"read": 2, "kept": 2}
    assert len(data[0][0].responses[0]) == 5_000_000


def test_no_malformed_table_gives_a_traceback_or_is_accepted_in_silence(tmp_path, report):
    outcomes = {"refused": 0, "counted": 0, "usable": 0}
    for i in range(300):
        path, row, is_same = malformed(tmp_path, i)
        try:
            data = read_data(path, tokenizer=TOKENIZER, max_length=400, max_prompt_length=300)["train"]
            kept = [text for group in data for text in group]
        except UserError as error:
            outcomes["refused"] += 1
            assert path.name in str(error) and len(str(error).splitlines()) == 1, error
            assert f"row {row}" in str(error), (i, str(error)[:200])
            continue
        assert len(kept) == data.counts["kept"] and data.counts.read == 6
        outcomes["counted" if data.counts["kept"] < 6 else "usable"] += 1
        if data.counts["kept"] == 6:  # long text is text, and a table drops or converts what its columns cannot hold
            assert is_same or path.suffix == ".parquet" or "x" * 1000 in str(kept), i
    report(f"300 malformed tables: {outcomes}; no traceback")


# Columns that begin late


def test_a_column_that_begins_in_a_later_chunk_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "CHUNK", 3)
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(10)]
    rows[9]["w"] = 2
    path = lines(tmp_path / "rows.jsonl", *rows)
    data = read_data(path, tokenizer=TOKENIZER, weight="w", on_inconsistent="drop")
    assert [text.weight for split in data.values() for group in split for text in group] == [2]
    with pytest.raises(UserError, match=r"columns.weight=v: .*rows\.jsonl has no such column; its columns: .*, w$"):
        read_data(path, tokenizer=TOKENIZER, weight="v")
    rows[9]["better_response_id"] = 1
    with pytest.raises(UserError, match="better_response_id may say which response is better"):
        read_data(lines(path, *rows), tokenizer=TOKENIZER)


@pytest.mark.parametrize(("weight", "n_times"), [("w", 1), ("late", 2), ("none", 1)])
def test_rows_are_read_again_only_to_find_a_column_that_begins_late(weight, n_times, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "CHUNK", 3)
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b", "w": 1} for i in range(10)]
    rows[9]["late"] = 2
    read_rows, times = FileTable.__iter__, []
    monkeypatch.setattr(FileTable, "__iter__", lambda table: times.append(table.name) or read_rows(table))
    path = lines(tmp_path / "rows.jsonl", *rows)
    read_data(path, tokenizer=TOKENIZER, weight=weight, on_inconsistent="drop")
    assert times == [str(path)] * n_times


# Several processes


@pytest.fixture
def several_processes(monkeypatch):
    monkeypatch.setattr(loader, "N_ALONE", 1)
    monkeypatch.setattr(loader, "CHUNK", 3)
    monkeypatch.setattr(processes, "count_cores", lambda: 2)
    monkeypatch.setattr(processes, "FASTER", math.inf)


def contents(path):
    splits = read_data(path, tokenizer=TOKENIZER).values()
    return [(counts(data), data.loaded.details, [repr(example) for example in data.split]) for data in splits]


def test_several_processes_give_what_one_gives(tmp_path, several_processes, monkeypatch):
    equal = chat(20, rejected=chat(20)["chosen"])
    path = lines(tmp_path / "rows.jsonl", *map(chat, range(20)), equal, {"chosen": None, "rejected": "a"})
    several = contents(path)
    monkeypatch.setattr(processes, "FASTER", 0)
    assert contents(path) == several


def test_a_row_that_is_refused_in_another_process_is_named(tmp_path, several_processes):
    path = lines(tmp_path / "rows.jsonl", *(chat(i, rejected="No.") if i == 13 else chat(i) for i in range(20)))
    with pytest.raises(UserError, match=r"rows\.jsonl, row 14: chosen and rejected must both be texts"):
        contents(path)
