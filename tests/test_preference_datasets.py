"""Data sets and the accounting of rows."""

import gzip
import inspect
import json
import random
import re
from collections import Counter
from dataclasses import replace

import datasets
import pytest
from conftest import GOLDENS, TINY, compose, golden_rows, inputs_of, load_entries, read_data
from faults import command_line, fresh
from tokenizers import normalizers
from transformers import AutoTokenizer

import preference_datasets
import train
from dpo.system.errors import UserError
from dpo.system.signals import Signals
from preference_datasets import PreferenceData, distinct_datasets, get_dataset

PROMPT = "\n\nHuman: hi\n\nAssistant:"
EOS = "<|endoftext|>"  # of the goldens' tokenizer

# Folders: what is dropped is counted, what cannot be read stops the run


def pair(prompt=PROMPT, chosen=" yes", rejected=" no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def dialogue(chosen=PROMPT + " yes", rejected=PROMPT + " no"):
    return {"chosen": chosen, "rejected": rejected}


def write(folder, train_rows, test_rows=None):
    folder.mkdir(parents=True)
    for split, rows in (("train", train_rows), ("test", test_rows)):
        if rows is not None:
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def numbered(n):
    return [pair(f"prompt {i}", f" {i}") for i in range(n)]


def counts(data):
    return {"read": data.counts.read} | {what: n for what, n in data.counts.items() if n}


def own(tmp_path, *rows, **options):
    return read_data(write(tmp_path / "data", rows, [pair()]), **options)["train"]


def kept(data):
    return {group[0].prompt: [text.row for text in group] for group in data}


@pytest.fixture
def hub(monkeypatch):
    """Return a function that puts rows in the place of what the hub would send."""

    def serve(*rows):
        table = datasets.Dataset.from_list(list(rows))
        monkeypatch.setattr(preference_datasets, "load_hub_split", lambda path, split, cache_dir: table)

    return serve


@pytest.mark.parametrize(
    "row, reason",
    [
        (pair(prompt=""), "the prompt is empty"),
        (pair(prompt=" \n"), "the prompt is empty"),
        (pair(chosen=""), "a response is empty"),
        (pair(rejected=" \n"), "a response is empty"),
        (dialogue(rejected=PROMPT), "a response is empty"),
        (pair(chosen=" no"), "both responses are equal"),
        (dialogue(chosen=PROMPT + " no"), "both responses are equal"),
    ],
)
def test_unusable_rows_of_ones_own_are_dropped_and_counted_by_reason(row, reason, tmp_path):
    data = own(tmp_path, pair(), row, pair("b"), row)
    assert counts(data) == {"read": 4, "kept": 2, f"dropped: {reason}": 2}
    assert kept(data) == {PROMPT: [1], "b": [3]}


def test_a_dropped_row_is_not_counted_as_kept_too(tmp_path):
    """The rejected dialogue ends within the chosen one's prompt, so its response is empty."""
    data = own(tmp_path, pair(), dialogue(rejected="\n\nHuman: ho"))
    assert counts(data) == {"read": 2, "kept": 1, "dropped: a response is empty": 1}


def test_repeated_rows_and_differing_prompts_are_kept_and_counted(tmp_path):
    """In an hh pair both responses begin where the chosen dialogue's answer does, here after 25 characters."""
    shifted = dialogue(rejected="\n\nHuman: ho\n\nAssistant: no")
    data = own(tmp_path, pair(), dialogue(), pair(rejected=" never"), pair(), shifted)
    assert counts(data) == {
        "read": 5,
        "kept": 5,
        "kept although it repeats an earlier row": 3,
        "kept although the rejected dialogue's prompt differs": 1,
    }
    assert kept(data) == {PROMPT: [1, 2, 3, 4, 5]}


@pytest.mark.parametrize("sft, dropped", [(False, 3), (True, 2)])
def test_rows_with_eos_inside_the_text_are_dropped_and_counted(sft, dropped, tmp_path):
    """SFT sees chosen responses alone, so it never meets the eos of a rejected one: that row repeats the first."""
    rows = [pair(), pair(chosen=f"a{EOS}"), pair(f"p{EOS}"), pair(rejected=EOS), pair(chosen=" later")]
    data = own(tmp_path, *rows, sft=sft)
    assert [text.responses[0] for group in data for text in group] == [" yes", " later"]
    left_out = {"dropped: an earlier row has the same prompt and chosen response": 1} if sft else {}
    assert counts(data) == {"read": 5, "kept": 2, f"dropped: the text contains {EOS}": dropped} | left_out


def test_several_pairs_of_a_prompt_are_kept_in_the_order_of_the_file(tmp_path):
    data = own(tmp_path, pair(chosen="1"), pair("other"), pair(chosen="2"), pair(chosen="3"))
    assert [[(item.responses, item.row) for item in group] for group in data] == [
        [(("1", " no"), 1), (("2", " no"), 3), (("3", " no"), 4)],
        [((" yes", " no"), 2)],
    ]


@pytest.mark.parametrize(
    "drop_unusable, sft, sizes", [(False, False, [0, 1]), (True, False, [1]), (False, True, [1, 1])]
)
def test_a_prompt_without_a_pair_takes_part_in_the_shuffle_as_in_the_original(drop_unusable, sft, sizes):
    """It comes from se, as a question with one answer; in one's own data it would be a prompt whose rows all drop."""
    data = PreferenceData("keep_start", drop_unusable)
    data.add("alone", ["a"], [], "a")
    data.add("pair", ["a", "b"], [(0, 1)], "a")
    assert [len(group) for group in load_entries(data, "se", sft)] == sizes


GOOD = json.dumps(pair()).encode()
UNREADABLE = {
    "no assistant": (json.dumps({"chosen": "yes", "rejected": "no"}).encode(), "has no '\\n\\nAssistant:'"),
    "a number": (json.dumps(pair(rejected=5)).encode(), "rejected must be a text, not int"),
    "a list": (
        json.dumps(pair(prompt=["hi"])).encode(),
        "prompt, turn 1 must be a message with role",
    ),
    "a missing field": (b'{"chosen": "\\n\\nAssistant: yes"}', "rejected must be a text, not missing"),
    "no object": (b'["chosen", "rejected"]', "must be an object"),
    "null": (b"null", "must be an object"),
    "invalid JSON": (b'{"chosen": "a", ', "is not JSON"),
    "a number of 5,000 digits": (b'{"chosen": ' + b"1" * 5000 + b"}", "is not JSON"),
    "JSON 100,000 deep": (b"[" * 100_000, "is not JSON"),
    "bytes that are no UTF-8": (GOOD.replace(b"yes", b"y\xe9s"), "is not UTF-8"),
    "half of a surrogate pair": (GOOD.replace(b"yes", b"\\ud83d"), "contains half of a surrogate pair"),
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("line, reason", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_malformed_row_stops_the_run_with_one_line_that_names_file_and_row(line, reason, zipped, tmp_path):
    name = "train.jsonl.gz" if zipped else "train.jsonl"
    with (gzip.open if zipped else open)(tmp_path / name, "wb") as file:
        file.write(b"\n".join([GOOD, GOOD, line, GOOD, b""]))
    with pytest.raises(UserError) as caught:
        read_data(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / name) in message and reason in message
    assert len(re.findall("(row|line) 3", message)) == 1 and "\n" not in message


def test_a_truncated_gzip_file_stops_the_run_and_names_the_last_good_row(tmp_path):
    """Random letters hardly compress, so that half of the file's bytes hold at least a quarter of its rows."""
    letters = random.Random(0)
    rows = [json.dumps(pair(f"{i} {letters.randbytes(40).hex()}")) for i in range(2000)]
    whole = gzip.compress("\n".join(rows).encode())
    (tmp_path / "train.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train\.jsonl\.gz, after row (\d+): cannot be read") as caught:
        read_data(tmp_path)
    last = int(str(caught.value).split("after row ")[1].split(":")[0])
    assert 500 < last < 1500


def test_a_file_that_is_no_gzip_stops_the_run(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(GOOD)
    with pytest.raises(UserError, match=r"train\.jsonl\.gz, after row 0: cannot be read"):
        read_data(tmp_path)


def test_a_whole_surrogate_pair_and_any_other_text_are_read(tmp_path):
    lines = GOOD.replace(b"yes", b"\\ud83d\\ude00") + b"\n" + json.dumps(pair("é\u2028"), ensure_ascii=False).encode()
    (tmp_path / "train.jsonl").write_bytes(lines)
    (tmp_path / "test.jsonl").write_bytes(GOOD)
    data = read_data(tmp_path)["train"]
    assert data[0][0].responses[0] == " 😀"
    assert list(kept(data)) == [PROMPT, "é\u2028"]


@pytest.mark.parametrize("name, words", [("nowhere", "neither a known data set"), ("", "there is no train.jsonl")])
def test_a_data_set_that_is_not_there_is_named(name, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read_data(tmp_path / name)


def test_a_folder_with_two_files_for_a_split_is_refused(tmp_path):
    folder = write(tmp_path / "data", [pair()])
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(GOOD))
    with pytest.raises(UserError, match="both train.jsonl and train.jsonl.gz"):
        read_data(folder)["train"]


@pytest.mark.parametrize("n", [1, 9, 10, 19, 20, 105])
def test_a_folder_without_test_file_holds_out_at_most_a_tenth_of_its_prompts(n, tmp_path):
    rows = [pair(f"prompt {i % n}", f" {i}") for i in range(2 * n)]  # two pairs a prompt, n rows apart
    folder = write(tmp_path / "data", rows)
    first, again = (list(read_data(folder).values()) for _ in range(2))
    train_data, test_data = first
    assert len(test_data) == n // 10
    assert not set(kept(train_data)) & set(kept(test_data))
    assert set(kept(train_data)) | set(kept(test_data)) == {f"prompt {i}" for i in range(n)}
    assert [kept(data) for data in first] == [kept(data) for data in again]
    for data, other in (first, first[::-1]):
        reason = f"dropped: there is no test file: {n // 10} of {n} prompts are held out as the test split"
        assert counts(data) == {"read": 2 * n, "kept": 2 * len(data), reason: 2 * len(other)} or n < 10
    if n == 20:  # the same in every run, on every machine
        assert list(kept(test_data)) == ["prompt 12", "prompt 13"]


@pytest.mark.parametrize("name", ["pairs.jsonl", "train.jsonl", "pairs.jsonl.gz"])
def test_a_single_file_is_a_whole_data_set_of_which_a_tenth_of_the_prompts_is_held_out(name, tmp_path, capsys):
    """A test.jsonl beside it belongs to the folder, not to the file."""
    folder = write(tmp_path / "data", numbered(20), [pair()])
    content = (folder / "train.jsonl").read_bytes()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    train_data, test_data = read_data(folder / name).values()
    reason = "dropped: there is no test file: 2 of 20 prompts are held out as the test split"
    assert counts(train_data) == {"read": 20, "kept": 18, reason: 2}
    assert counts(test_data) == {"read": 20, "kept": 2, reason: 18}
    assert set(kept(train_data)) | set(kept(test_data)) == {f"prompt {i}" for i in range(20)}
    assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.parametrize("name", ["pairs.txt", "pairs.xlsx", "pairs"])
def test_a_file_of_another_kind_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(UserError, match=r"neither a known data set \(hh, .*\) nor a folder or file of .jsonl, .json"):
        read_data(tmp_path / name)


def test_ignored_files_and_columns_are_noted_once(tmp_path, capsys):
    rows = [pair(f"{i}") | {"id": i} for i in range(20)]
    folder = write(tmp_path / "data", [*rows, pair() | {"system": "Be brief."}], [pair() | {"id": 1}])
    (folder / "other.jsonl").write_bytes(GOOD)
    words = "prompt, chosen, rejected are read"
    note = f"{folder / 'train.jsonl'}: columns ignored: id (in 20 rows), system (in 1 rows); {words}"
    test_note = f"{folder / 'test.jsonl'}: columns ignored: id (in 1 rows); {words}"

    def notes():
        read_data(folder)
        return [line for line in capsys.readouterr().out.splitlines() if "ignored:" in line]

    assert notes() == [note, f"{folder}: files ignored: other.jsonl; read: test.jsonl, train.jsonl", test_note]
    (folder / "test.jsonl").unlink()  # so that both splits are read from one file
    assert notes() == [note, f"{folder}: files ignored: other.jsonl; read: train.jsonl"]


def test_rows_are_numbered_by_their_lines(tmp_path):
    folder = write(tmp_path / "data", [], [pair()])
    lines = [b"\xef\xbb\xbf" + GOOD, b"", b"  ", json.dumps(pair("b")).encode(), b""]
    (folder / "train.jsonl").write_bytes(b"\r\n".join(lines))
    data = read_data(folder)["train"]
    assert kept(data) == {PROMPT: [1], "b": [4]}
    assert counts(data) == {"read": 2, "kept": 2}


def test_spellings_of_one_path_are_one_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("d/mix", "other", "hh"):
        write(tmp_path / folder, [pair()], [pair()])
    (tmp_path / "link").symlink_to("d/mix")
    names = ["d/mix", "hh", "d/mix/", "other", "./d/mix", "link", "hh", str(tmp_path / "other"), "./hh", "d/../other"]
    assert distinct_datasets(names) == ["d/mix", "hh", "other", "./hh"]


def test_sft_on_ones_own_rows_with_a_prompt_trains_on_every_distinct_row(tmp_path):
    """Rows 1 and 4 are equal, 3 differs in the rejected response alone."""
    rows = [pair("p", "1"), pair("p", "2"), pair("p", "1", "x"), pair("p", "1"), pair("q", "1")]
    data = own(tmp_path, *rows, sft=True)
    assert [[(text.responses, text.row) for text in group] for group in data] == [
        [(("1",), 1), (("2",), 2)],
        [(("1",), 5)],
    ]
    repeated = "dropped: an earlier row has the same prompt and chosen response"
    assert counts(data) == {"read": 5, "kept": 3, repeated: 2}


ONE_TARGET = "dropped: SFT trains on one target per prompt, and a later row has the same prompt"


def test_sft_on_dialogues_trains_on_the_last_target_of_a_prompt_and_reports_it(tmp_path, hub):
    rows = [dialogue(PROMPT + " 1"), dialogue(PROMPT + " 2"), dialogue(PROMPT + " 3")]
    hub(*rows)
    named, mine = get_dataset("hh", "train"), own(tmp_path, *rows, sft=True)
    for data in (load_entries(named, "hh", sft=True), mine):
        ((text,),) = data
        assert (text.responses, text.row) == ((" 3",), 3)
        assert counts(data) == {"read": 3, "kept": 1, ONE_TARGET: 2}


# hh, shp and se keep what the original keeps


def test_hh_keeps_what_the_original_keeps_and_counts_it(hub):
    two_turns = "\n\nAssistant: a\n\nHuman: b\n\nAssistant:"
    hub(
        dialogue(),
        dialogue(),
        dialogue(chosen=PROMPT),
        dialogue(rejected=PROMPT + " yes"),
        dialogue(rejected="\n\nHuman: other\n\nAssistant: no"),
        dialogue(chosen=two_turns + " c", rejected=two_turns),
    )
    data = get_dataset("hh", "train")
    assert counts(load_entries(data, "hh")) == {
        "read": 6,
        "kept": 6,
        "kept although it repeats an earlier row": 1,
        "kept although a response is empty": 2,
        "kept although both responses are equal": 1,
        "kept although the rejected dialogue's prompt differs": 1,
    }
    assert dict(data) == {
        PROMPT: {
            "responses": [" yes", " no", " yes", " no", "", " no", " yes", " yes", " yes", "nt: no"],
            "pairs": [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)],
            "sft_target": " yes",
        },
        two_turns: {"responses": [" c", ""], "pairs": [(0, 1)], "sft_target": " c"},
    }
    assert data.truncation == "keep_end"


def test_hh_keeps_eos_inside_the_text_and_counts_it(hub):
    hub(dialogue(), dialogue(rejected=PROMPT + f" {EOS}"))
    data = load_entries(get_dataset("hh", "train"), "hh")
    assert [len(group) for group in data] == [2]
    assert data.counts[f"kept although the text contains {EOS}"] == 1


def test_a_dialogue_of_hh_without_an_assistant_is_named(hub):
    hub(dialogue(), dialogue(chosen="\n\nHuman: hi"))
    with pytest.raises(UserError, match=r"hh.*row 2: .* no '\\n\\nAssistant:'"):
        get_dataset("hh", "train")


@pytest.mark.parametrize("sft", [False, True])
def test_hh_and_a_folder_of_the_same_rows_are_the_same_data(sft, hub):
    mine = read_data(GOLDENS / "data", sft)
    for split in ("train", "test"):
        hub(*golden_rows(split))
        data = load_entries(get_dataset("hh", split), "hh", sft)
        assert data == [[replace(text, source="hh") for text in group] for group in mine[split]]
        assert counts(data) == counts(mine[split])


def test_shp_keeps_what_the_original_keeps_and_counts_it(hub):
    """Kept are 4 to 2 and 1 to 2, with labels 1 and 0, and 3 to 0; dropped are 3 to 2 and 0 to 0."""

    def row(score_a, score_b, history="hi"):
        label = int(score_a > score_b)
        fields = {"history": history, "human_ref_A": f"{score_a}a", "human_ref_B": f"{score_b}b", "labels": label}
        return fields | {"score_A": score_a, "score_B": score_b}

    hub(row(4, 2), row(3, 2), row(1, 2), row(3, 0, "ho"), row(0, 0))
    data = get_dataset("shp", "train")
    assert counts(data) == {
        "read": 5,
        "kept": 3,
        "dropped: neither score is twice the other": 2,
        "kept although a score is 0": 1,
    }
    assert dict(data) == {
        PROMPT: {"responses": [" 4a", " 2b", " 1a", " 2b"], "pairs": [(0, 1), (3, 2)], "sft_target": " 4a"},
        "\n\nHuman: ho\n\nAssistant:": {"responses": [" 3a", " 0b"], "pairs": [(0, 1)], "sft_target": " 3a"},
    }
    numbers = {prompt: [row.number for row in rows] for prompt, rows in data.rows.items()}
    assert numbers == {PROMPT: [1, 3], "\n\nHuman: ho\n\nAssistant:": [4]}
    assert data.truncation == "keep_start"


def test_se_keeps_what_the_original_keeps_and_counts_it(hub):
    """All pairs of three answers; on a tie the later answer is preferred."""

    def row(question, *scores):
        answers = [{"text": f"<p>{score}, {i}</p>", "pm_score": score} for i, score in enumerate(scores)]
        return {"question": f"<p>{question}</p>", "answers": answers}

    hub(row("hi", 2, 5, 2), row("alone", 7), row("twice", 1, 2), row("twice", 1, 2))
    data = get_dataset("se", "train")
    assert counts(data) == {
        "read": 4,
        "kept": 3,
        "kept although it has one answer and so no pair": 1,
        "dropped: a later row has the same question": 1,
    }
    assert data[PROMPT] == {
        "responses": [" 2, 0", " 5, 1", " 2, 2"],
        "pairs": [(1, 0), (2, 0), (1, 2)],
        "sft_target": " 5, 1",
    }
    assert data["\n\nHuman: alone\n\nAssistant:"]["pairs"] == []
    assert data["\n\nHuman: twice\n\nAssistant:"]["pairs"] == [(1, 0)]
    assert data.truncation == "keep_start"


@pytest.mark.parametrize("sft", [False, True])
def test_a_question_of_se_that_comes_again_and_again_is_kept_once(sft, hub):
    answers = [{"text": "<p>a</p>", "pm_score": 1}, {"text": "<p>b</p>", "pm_score": 2}]
    hub(*({"question": "<p>hi</p>", "answers": answers} for _ in range(3)))
    data = load_entries(get_dataset("se", "train"), "se", sft)
    ((text,),) = data
    assert text.row == 3
    assert counts(data) == {"read": 3, "kept": 1, "dropped: a later row has the same question": 2}


def test_public_names_keep_their_original_signatures():
    loader = {"split": inspect.Parameter.empty, "silent": False, "cache_dir": None}
    names = ["get_hh", "get_shp", "get_se"]
    for signature in (inspect.signature(getattr(preference_datasets, name)) for name in names):
        assert {name: parameter.default for name, parameter in signature.parameters.items()} == loader
    assert list(inspect.signature(get_dataset).parameters) == ["name", "split", "silent", "cache_dir"]
    fields = ["prompt", "chosen", "rejected", "truncation_mode", "tokenizer", "max_length", "max_prompt_length"]
    assert list(inspect.signature(preference_datasets.tokenize_batch_element).parameters) == fields


# Amounts, as the command line sees them


def prepare(folder, *overrides):
    """Check a config and load its data as the command line does; return the iterators."""
    inputs = inputs_of(*TINY, "loss=dpo", f"datasets=['{folder}']", *overrides)
    return inputs.train_batches, inputs.eval_batches


def rows_of(batches):
    return [[example.text.row for example in batch.examples] for batch in batches]


@pytest.mark.parametrize(
    ("columns", "digests"),
    [
        ([], ["7a58e6bcafd9", "3aa2ae612b54"]),
        (["columns.score_chosen=a", "columns.score_rejected=b"], ["5ba66ab2764f", "1d26e91de792"]),
    ],
)
def test_rows_of_texts_keep_the_digest_of_earlier_versions(columns, digests, tmp_path):
    rows = [pair(f"{i % 25}?", f"{i}", "no") | {"a": i % 3, "b": i % 2} for i in range(40)]
    assert [data.examples.digest().hex()[:12] for data in prepare(write(tmp_path / "d", rows), *columns)] == digests


def ranked(scores):
    return {"prompt": "hi", "responses": ["a", "b", "c"], "scores": scores}


@pytest.mark.parametrize("other", [[1, 2, 3], [3, 1, 2]])
def test_the_digest_tells_apart_which_response_is_better(other, tmp_path):
    """Otherwise a cached reference of the one would be taken for the other."""
    digests = set()
    for name, scores in (("a", [3, 2, 1]), ("b", other)):
        folder = write(tmp_path / name, [ranked(scores)], [ranked(scores)])
        digests |= {prepare(folder, "batch_size=1", "pairs=all")[0].examples.digest()}
    assert len(digests) == 2


def prompts_of_an_epoch(tmp_path, share):
    """The prompts that an epoch takes of 8 prompts, of 2 pairs each, and how often."""
    rows = [pair(f"prompt {i % 8}", f" {i}") for i in range(16)]
    data, _ = prepare(write(tmp_path / "d", rows, rows[:1]), f"shares=[{share}]", "batch_size=1", "warmup_steps=0")
    return Counter(example.text.prompt for batch in data for example in batch.examples)


@pytest.mark.parametrize(("share", "times"), [(0.5, [2] * 4), (2, [4] * 8), (1.25, [2] * 6 + [4] * 2), (1, [2] * 8)])
def test_a_share_takes_whole_prompts_as_often_as_it_says(share, times, tmp_path, capsys):
    prompts = prompts_of_an_epoch(tmp_path, share)
    assert sorted(prompts.values()) == times
    assert (f"an epoch takes {sum(times)} of 16 examples" in capsys.readouterr().out) == (share != 1)


def test_a_share_of_no_prompt_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^shares: 0\.01 of the 8 prompts of .*/d is none; raise it$"):
        prompts_of_an_epoch(tmp_path, 0.01)


def test_sides_made_equal_by_truncation_are_counted_and_reported(tmp_path, capsys):
    """The responses differ only after 200 letters; at most 160 - 96 tokens of each are kept."""
    rows = [{"prompt": f"{i}" * 150, "chosen": "ab" * 100 + "x", "rejected": "ab" * 100 + "y"} for i in range(8)]
    rows = [row | {"chosen": f"{i}"} if i < 3 else row for i, row in enumerate(rows)]  # three that stay different
    folder = write(tmp_path / "data", rows, rows[:3])
    run = tmp_path / "run"
    overrides = ["loss=dpo", f"datasets=['{folder}']", f"local_run_dir='{run}'", "debug=true", "eval_batch_size=8"]
    train.run(compose(*TINY, *overrides), Signals(), ())
    assert "of 8 training examples: prompt 8, response 8, sides made equal 5" in capsys.readouterr().out


def test_too_little_data_is_told_in_one_line(tmp_path):
    folder = write(tmp_path / "data", numbered(3), numbered(1))
    run = command_line(tmp_path / "run", fresh(tmp_path / "run", "loss=dpo", *TINY, f"datasets=['{folder}']"))
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1:] == [
        "error: batch_size=8: the training data holds 3 examples; lower it to 3 or less"
    ]
    assert "Traceback" not in run.stderr and not run.folder.exists()


def test_a_reason_of_all_lost_rows_is_said_once_with_a_row(tmp_path):
    folder = write(tmp_path / "data", [pair(chosen="a", rejected="a")] * 3, numbered(1))
    reason = r"3 of 3 rows are dropped because both responses are equal \(.*train\.jsonl, row 1\)$"
    with pytest.raises(UserError, match=reason):
        prepare(folder)


def test_no_data_and_no_evaluation_data_are_told_together(tmp_path):
    folder = write(tmp_path / "data", [], [])
    with pytest.raises(UserError) as caught:
        prepare(folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and "there is no example to train on: it has no row" in lines[0]
    assert "no example to evaluate on: it has no row" in lines[1]


def test_evaluation_data_that_are_all_dropped_or_cannot_be_held_out_say_why(tmp_path):
    folder = write(tmp_path / "data", numbered(8), [pair(prompt="")])
    with pytest.raises(UserError, match=r"evaluate on: 1 of 1 rows are dropped because the prompt is empty \("):
        prepare(folder)
    folder = write(tmp_path / "few", numbered(8))
    with pytest.raises(
        UserError, match="evaluate on: 8 of 8 rows are dropped because there is no test file: 0 of 8 pr"
    ):
        prepare(folder)


def test_dropped_rows_count_towards_too_little_data(tmp_path):
    folder = write(tmp_path / "data", numbered(7) + [pair(prompt="")], numbered(1))
    with pytest.raises(UserError, match="batch_size=8: the training data holds 7 examples"):
        prepare(folder)


def test_everything_read_kept_and_dropped_is_printed(tmp_path, capsys):
    rows = [*numbered(8), pair(prompt=""), pair(chosen="<|endoftext|>"), pair("prompt 0", " 0"), pair("prompt 1")]
    folder = write(tmp_path / "data", rows, numbered(2))
    train_batches, eval_batches = prepare(folder)
    out = capsys.readouterr().out.splitlines()
    line = next(line for line in out if line.startswith(f"Data {folder} train"))
    reasons = "1 because the prompt is empty, 1 because the text contains <|endoftext|>"
    assert f"12 rows read: 10 kept, 2 dropped ({reasons}); 8 prompts; 1 kept although it repeats" in line
    assert "Each epoch skips the last 2 of 10 examples, too few for a batch." in out
    assert (train_batches.n_items, len(train_batches)) == (10, 1)
    assert (eval_batches.n_items, len(eval_batches)) == (2, 1)


@pytest.mark.parametrize("setting", ["columns.prompt=x", "split_train=x", "split_test=x", "prompt_format=chat"])
def test_what_a_named_data_set_reads_by_itself_cannot_be_set(setting):
    with pytest.raises(UserError, match=rf"{setting.split('=')[0]}.*: datasets=\[demo\] reads its own columns, splits"):
        inputs_of(*TINY, "loss=dpo", "datasets=[demo]", setting)


def test_named_data_sets_and_files_mix(tmp_path):
    folder = write(tmp_path / "data", numbered(8), numbered(2))
    sizes = [prepare(folder, f"datasets=[{names}]") for names in ("demo", f"'{folder}',demo", f"demo,'{folder}'")]
    (demo, demo_test), *mixed = [(train.n_items, test.n_items) for train, test in sizes]
    assert mixed == [(demo + 8, demo_test + 2)] * 2
    order = [example.text.source for example in sizes[1][0].examples]
    assert order == [str(folder)] * 8 + ["demo"] * demo


@pytest.mark.parametrize("other", ["demo", "pairs.jsonl"])
def test_rows_with_a_label_and_pairs_do_not_mix(other, tmp_path):
    rows = [{"prompt": f"{i}", "completion": "a", "label": i % 2} for i in range(20)]
    for name, table in (("labels.jsonl", rows), ("pairs.jsonl", numbered(20))):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in table))
    other = other if other == "demo" else str(tmp_path / other)
    names = (str(tmp_path / "labels.jsonl"), other)
    line = f"datasets: {names[0]} has rows with a label, {other} has pairs of responses; a run trains on one kind"
    with pytest.raises(UserError, match=re.escape(line)):
        inputs_of(*TINY, "loss=kto", f"datasets={list(names)}")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join((tmp_path / name).read_text() for name in ("labels.jsonl", "pairs.jsonl")))
    with pytest.raises(UserError, match="mixed.jsonl has rows with a label, .*mixed.jsonl has pairs"):
        inputs_of(*TINY, "loss=kto", f"datasets=['{mixed}']")


def test_a_plain_dict_of_a_data_set_function_trains(tmp_path, monkeypatch, capsys):
    """The original's functions return prompt -> {"responses", "pairs", "sft_target"}."""
    entry = {"responses": [" a", " b"], "pairs": [(0, 1)], "sft_target": " a"}
    plain = {f"prompt {i}": entry for i in range(8)}
    monkeypatch.setitem(preference_datasets.DATASETS, "mine", lambda split, silent, cache_dir: plain)
    train_batches = inputs_of(*TINY, "loss=dpo", "datasets=[mine]").train_batches
    assert len(train_batches) == 1
    assert "Data mine train: 8 rows read: 8 kept; 8 prompts" in capsys.readouterr().out


def test_what_is_ignored_of_ones_own_data_is_printed(tmp_path, capsys):
    folder = write(tmp_path / "data", [row | {"system": "Be brief."} for row in numbered(8)], numbered(2))
    (folder / "other.jsonl").write_bytes(GOOD)
    prepare(folder)
    lines = [line for line in capsys.readouterr().out.splitlines() if "ignored:" in line]
    assert len(lines) == 2 and "system (in 8 rows)" in lines[0] and "other.jsonl" in lines[1]


def test_a_prompt_without_a_token_is_dropped_before_training(tmp_path, monkeypatch, capsys):
    """The tiny tokenizer has a token for every byte, so one that strips the letter z stands for those that do not."""
    rows = [*numbered(8), pair("zz"), pair("zz" * 50), pair("zz" * 50 + "a")]
    folder = write(tmp_path / "data", rows, [pair("z"), *numbered(1)])
    tokenizer = strip_z(GOLDENS / "tiny-gpt2", tmp_path / "tokenizer")
    name = f"model.tokenizer_name_or_path='{tokenizer}'"
    train_batches, eval_batches = prepare(folder, name)
    out = capsys.readouterr().out
    dropped = "2 dropped (2 because the prompt has no tokens)"
    assert f"train: 11 rows read: 9 kept, {dropped}; 9 prompts" in out
    assert (train_batches.n_items, eval_batches.n_items) == (9, 1)
    assert [len(batch.examples) for batch in train_batches] == [8]
    train_batches, eval_batches = prepare(folder, name, "model.add_bos=true")
    assert (train_batches.n_items, eval_batches.n_items) == (11, 2)


def strip_z(source, target):
    """Copy a tokenizer, with a normalizer that removes the letter z."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    tokenizer.save_pretrained(target)
    return target


def test_a_data_set_that_is_named_in_two_spellings_counts_once(tmp_path):
    folder = write(tmp_path / "data", numbered(8), numbered(2))
    train_batches, eval_batches = prepare(folder, f"datasets=['{folder}','{folder}/']")
    assert (train_batches.n_items, eval_batches.n_items) == (8, 2)


def test_an_evaluation_set_smaller_than_a_batch_is_one_whole_batch(tmp_path):
    folder = write(tmp_path / "data", numbered(8), numbered(3))
    eval_batches = prepare(folder, "eval_batch_size=16")[1]
    assert [len(batch.examples) for batch in eval_batches] == [3]


def test_the_seed_changes_the_order_of_training_and_never_that_of_evaluation(tmp_path):
    folder = write(tmp_path / "data", numbered(40), numbered(20))
    orders = [[rows_of(batches) for batches in prepare(folder, f"seed={seed}")] for seed in (0, 5)]
    assert orders[0][0] != orders[1][0]
    assert orders[0][1] == orders[1][1]
    assert sorted(sum(orders[0][1], [])) == list(range(1, 21))


# Tokens


def test_an_unknown_truncation_mode_is_refused():
    with pytest.raises(ValueError, match="truncation_mode=keep_middle"):
        preference_datasets.tokenize_batch_element("a", "b", "c", "keep_middle", None, 9, 3)
