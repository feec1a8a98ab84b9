"""Data sets, tokens and truncation, the accounting of rows, and the iterator."""

import gzip
import inspect
import json
import random
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
from conftest import GOLDENS, TINY, compose
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import preference_datasets
import train
from preference_datasets import BatchIterator, Item, PreferenceData, Tokenization, get_dataset, make_groups
from utils import UserError

PROMPT = "\n\nHuman: hi\n\nAssistant:"
EOS = 0


# Truncation


class Letters:
    """A tokenizer for which each letter is a token, and eos is 0."""

    eos_token_id, bos_token_id = EOS, 1

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def originals_rule(prompt, responses, keep, max_length, max_prompt_length):
    """Cut lists of tokens as the original does, by the words of original.md."""
    longest = max(map(len, responses))
    if len(prompt) + longest > max_length:
        prompt = prompt[:max_prompt_length] if keep == "keep_start" else prompt[-max_prompt_length:]
        if len(prompt) + longest > max_length:
            responses = [response[: max_length - max_prompt_length] for response in responses]
    return prompt, responses


LETTERS = st.text("ab", max_size=12)  # two letters, so that sides often become equal
PAIRS = {
    "prompt": st.text("pqr", min_size=1, max_size=14),
    "responses": st.tuples(LETTERS, LETTERS) | st.tuples(LETTERS),
    "keep": st.sampled_from(["keep_start", "keep_end"]),
    "lengths": st.integers(2, 24).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))),
}
many = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@many
@given(**PAIRS)
def test_truncation_is_the_originals_rule(prompt, responses, keep, lengths):
    example = Tokenization(Letters(), *lengths)([Item(prompt, responses, keep, 1, "")])[0]
    tokens = [[ord(letter) for letter in response] + [EOS] for response in responses]
    expected = originals_rule([ord(letter) for letter in prompt], tokens, keep, *lengths)
    assert (example.prompt, list(example.responses)) == expected


@many
@given(**PAIRS, add_bos=st.booleans())
def test_truncation_leaves_what_fits_and_a_token_a_side_and_tells_what_it_cut(
    prompt, responses, keep, lengths, add_bos
):
    max_length, max_prompt_length = lengths
    example = Tokenization(Letters(), max_length, max_prompt_length, add_bos)([Item(prompt, responses, keep, 1, "")])[0]
    whole_prompt = [1] * add_bos + [ord(letter) for letter in prompt]
    whole = tuple([ord(letter) for letter in response] + [EOS] for response in responses)
    assert len(example.prompt) + max(map(len, example.responses)) <= max_length
    assert all(example.responses)
    assert not add_bos or example.prompt[0] == 1
    if len(whole_prompt) + max(map(len, whole)) <= max_length:
        assert (example.prompt, example.responses) == (whole_prompt, whole)
    cut = {
        "prompt": len(example.prompt) < len(whole_prompt),
        "response": example.responses != whole,
        "sides made equal": whole[0] != whole[-1] and example.responses[0] == example.responses[-1],
    }
    assert example.cut == tuple(what for what, there in cut.items() if there)


def test_one_over_long_response_cuts_the_other_though_it_fits():
    """Prompt 4 + longest 9 > 10; the prompt cut to 3 leaves 12 > 10; so both are cut to 10 - 3 = 7: 7 and 7 of 8."""
    item = Item("pqrs", ("abababab", "bbbbbbb"), "keep_end", 1, "")
    example = Tokenization(Letters(), 10, 3)([item])[0]
    assert example.prompt == [ord(letter) for letter in "qrs"]
    assert example.responses == ([ord(letter) for letter in "abababa"], [ord(letter) for letter in "bbbbbbb"])


def test_sides_made_equal_by_truncation_are_counted_and_reported(tmp_path, capsys):
    """The responses differ only after 200 letters; at most 160 - 96 tokens of each are kept."""
    rows = [{"prompt": f"{i}" * 150, "chosen": "ab" * 100 + "x", "rejected": "ab" * 100 + "y"} for i in range(8)]
    rows = [row | {"chosen": f"{i}"} if i < 3 else row for i, row in enumerate(rows)]  # three that stay different
    folder = write(tmp_path / "data", rows, rows[:3])
    run = tmp_path / "run"
    overrides = ["loss=dpo", f"datasets=['{folder}']", f"local_run_dir='{run}'", "debug=true", "eval_batch_size=8"]
    train.run(compose(*TINY, *overrides))
    assert "of 8 training examples: prompt 8, response 8, sides made equal 5" in capsys.readouterr().out


def test_an_unknown_truncation_mode_is_refused():
    with pytest.raises(ValueError, match="truncation_mode=keep_middle"):
        preference_datasets.tokenize_batch_element("a", "b", "c", "keep_middle", Letters(), 9, 3)


# Folders: what is dropped is counted, what cannot be read stops the run


def pair(prompt=PROMPT, chosen=" yes", rejected=" no"):
    """Make a row of one's own data."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def dialogue(chosen=PROMPT + " yes", rejected=PROMPT + " no"):
    """Make a row in the form of hh."""
    return {"chosen": chosen, "rejected": rejected}


def write(folder, train_rows, test_rows=None):
    """Write a data set of JSON lines."""
    folder.mkdir(parents=True)
    for split, rows in (("train", train_rows), ("test", test_rows)):
        if rows is not None:
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def counts(data):
    """Return the counts that are not 0."""
    return {what: n for what, n in data.counts.items() if n}


def own(tmp_path, *rows):
    """Read rows as the training split of one's own data."""
    return get_dataset(str(write(tmp_path / "data", rows, [pair()])), "train")


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
    assert list(data) == [PROMPT, "b"]
    assert data.rows == {PROMPT: [1], "b": [3]}


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
    assert data[PROMPT]["pairs"] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]


@pytest.mark.parametrize("sft, kept", [(False, [" yes", " later"]), (True, [" later"])])
def test_rows_with_eos_inside_the_text_are_dropped_and_counted(sft, kept, tmp_path):
    """SFT sees a prompt's last chosen response alone, so it never meets the eos of a rejected one."""
    rows = [pair(), pair(chosen="a<eos>"), pair("p<eos>"), pair(rejected="<eos>"), pair(chosen=" later")]
    data = own(tmp_path, *rows)
    groups = make_groups(data, "own", sft, "<eos>")
    assert [item.responses[0] for group in groups for item in group] == kept
    assert data.counts["dropped: the text holds <eos>"] == (1 if sft else 3)


def test_several_pairs_of_a_prompt_are_kept_in_the_order_of_the_file(tmp_path):
    data = own(tmp_path, pair(chosen="1"), pair("other"), pair(chosen="2"), pair(chosen="3"))
    assert data[PROMPT] == {
        "responses": ["1", " no", "2", " no", "3", " no"],
        "pairs": [(0, 1), (2, 3), (4, 5)],
        "sft_target": "3",
    }
    groups = make_groups(data, "own", False, "<eos>")
    assert [[(item.responses, item.row) for item in group] for group in groups] == [
        [(("1", " no"), 1), (("2", " no"), 3), (("3", " no"), 4)],
        [((" yes", " no"), 2)],
    ]
    assert [[(item.responses, item.row) for item in group] for group in make_groups(data, "own", True, "<eos>")] == [
        [(("3",), 4)],
        [((" yes",), 2)],
    ]


@pytest.mark.parametrize("drop_unusable", [False, True])
def test_a_prompt_without_a_pair_takes_part_in_the_shuffle_as_in_the_original(drop_unusable):
    """It comes from se, as a question with one answer; in one's own data it would be a prompt whose rows all drop."""
    data = PreferenceData("keep_start", drop_unusable)
    data.add("alone", ["a"], [], "a")
    data.add("pair", ["a", "b"], [(0, 1)], "a")
    assert [len(group) for group in make_groups(data, "se", False, "<eos>")] == ([1] if drop_unusable else [0, 1])
    assert [len(group) for group in make_groups(data, "se", True, "<eos>")] == [1, 1]


GOOD = json.dumps(pair()).encode()
UNREADABLE = {
    "no assistant": (json.dumps({"chosen": "yes", "rejected": "no"}).encode(), "has no '\\n\\nAssistant:'"),
    "a null field": (json.dumps(pair(chosen=None)).encode(), "chosen must be a text, not NoneType"),
    "a number": (json.dumps(pair(rejected=5)).encode(), "rejected must be a text, not int"),
    "a list": (json.dumps(pair(prompt=["hi"])).encode(), "prompt must be a text, not list"),
    "a missing field": (b'{"chosen": "\\n\\nAssistant: yes"}', "rejected must be a text, not missing"),
    "no object": (b'["chosen", "rejected"]', "is no object"),
    "null": (b"null", "is no object"),
    "invalid JSON": (b'{"chosen": "a", ', "is not JSON"),
    "a number of 5,000 digits": (b'{"chosen": ' + b"1" * 5000 + b"}", "is not JSON"),
    "JSON 100,000 deep": (b"[" * 100_000, "is not JSON"),
    "a blank line": (b"", "is not JSON"),
    "bytes that are no UTF-8": (GOOD.replace(b"yes", b"y\xe9s"), "is not UTF-8"),
    "half of a surrogate pair": (GOOD.replace(b"yes", b"\\ud83d"), "holds half of a surrogate pair"),
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("line, reason", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_malformed_row_stops_the_run_with_one_line_that_names_file_and_row(line, reason, zipped, tmp_path):
    name = "train.jsonl.gz" if zipped else "train.jsonl"
    with (gzip.open if zipped else open)(tmp_path / name, "wb") as file:
        file.write(b"\n".join([GOOD, GOOD, line, GOOD, b""]))
    with pytest.raises(UserError) as caught:
        get_dataset(str(tmp_path), "train")
    message = str(caught.value)
    assert str(tmp_path / name) in message and reason in message
    assert message.count("row 3") == 1 and "\n" not in message


def test_a_truncated_gzip_file_stops_the_run_and_names_the_last_good_row(tmp_path):
    """Random letters hardly compress, so that half of the file's bytes hold at least a quarter of its rows."""
    letters = random.Random(0)
    rows = [json.dumps(pair(f"{i} {letters.randbytes(40).hex()}")) for i in range(2000)]
    whole = gzip.compress("\n".join(rows).encode())
    (tmp_path / "train.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train\.jsonl\.gz, after row (\d+): cannot be read") as caught:
        get_dataset(str(tmp_path), "train")
    last = int(str(caught.value).split("after row ")[1].split(":")[0])
    assert 500 < last < 1500


def test_a_file_that_is_no_gzip_stops_the_run(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(GOOD)
    with pytest.raises(UserError, match=r"train\.jsonl\.gz, after row 0: cannot be read"):
        get_dataset(str(tmp_path), "train")


def test_a_whole_surrogate_pair_and_any_other_text_are_read(tmp_path):
    lines = GOOD.replace(b"yes", b"\\ud83d\\ude00") + b"\n" + json.dumps(pair("é\u2028"), ensure_ascii=False).encode()
    (tmp_path / "train.jsonl").write_bytes(lines)
    (tmp_path / "test.jsonl").write_bytes(GOOD)
    data = get_dataset(str(tmp_path), "train")
    assert data[PROMPT]["sft_target"] == " 😀"
    assert list(data) == [PROMPT, "é\u2028"]


@pytest.mark.parametrize("name, words", [("nowhere", "neither a known data set"), ("", "there is no train.jsonl")])
def test_a_data_set_that_is_not_there_is_named(name, words, tmp_path):
    with pytest.raises(UserError, match=words):
        get_dataset(str(tmp_path / name), "train")


def test_a_folder_with_two_files_for_a_split_is_refused(tmp_path):
    folder = write(tmp_path / "data", [pair()])
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(GOOD))
    with pytest.raises(UserError, match="both train.jsonl and train.jsonl.gz"):
        get_dataset(str(folder), "train")


@pytest.mark.parametrize("n", [1, 9, 10, 19, 20, 105])
def test_a_folder_without_test_file_holds_out_at_most_a_tenth_of_its_prompts(n, tmp_path):
    rows = [pair(f"prompt {i % n}", f" {i}") for i in range(2 * n)]  # two pairs a prompt, n rows apart
    folder = str(write(tmp_path / "data", rows))
    first, again = ([get_dataset(folder, split) for split in ("train", "test")] for _ in range(2))
    train_data, test_data = first
    assert len(test_data) == n // 10
    assert not set(train_data) & set(test_data)
    assert set(train_data) | set(test_data) == {f"prompt {i}" for i in range(n)}
    assert [list(data.items()) for data in first] == [list(data.items()) for data in again]
    for data, other in (first, first[::-1]):
        left = [n for what, n in data.counts.items() if what.startswith("left to the other split")]
        assert sum(left) == 2 * len(other)
    if n == 20:  # the same in every run, on every machine
        assert list(test_data) == ["prompt 12", "prompt 13"]


# hh, shp and se keep what the original keeps


@pytest.fixture
def hub(monkeypatch):
    """Return a function that puts rows in the place of what the hub would send."""

    def serve(*rows):
        table = datasets.Dataset.from_list(list(rows))
        monkeypatch.setattr(preference_datasets, "load_hub_split", lambda path, split, cache_dir: table)

    return serve


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
    assert counts(data) == {
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
    hub(dialogue(), dialogue(rejected=PROMPT + " <eos>"))
    data = get_dataset("hh", "train")
    assert [len(group) for group in make_groups(data, "hh", False, "<eos>")] == [2]
    assert data.counts["kept although the text holds <eos>"] == 1


def test_a_dialogue_of_hh_without_an_assistant_is_named(hub):
    hub(dialogue(), dialogue(chosen="\n\nHuman: hi"))
    with pytest.raises(UserError, match=r"hh.*row 2: .* no '\\n\\nAssistant:'"):
        get_dataset("hh", "train")


def test_hh_and_a_folder_of_the_same_rows_are_the_same_data(hub):
    for split in ("train", "test"):
        hub(*(json.loads(line) for line in open(GOLDENS / "data" / f"{split}.jsonl", encoding="utf-8")))
        assert get_dataset("hh", split) == get_dataset(str(GOLDENS / "data"), split)


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
    assert data.rows == {PROMPT: [1, 3], "\n\nHuman: ho\n\nAssistant:": [4]}
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
        "kept": 4,
        "kept although it has one answer and so no pair": 1,
        "kept although it repeats an earlier row": 1,
        "replaced by a later row with the same question": 1,
    }
    assert data[PROMPT] == {
        "responses": [" 2, 0", " 5, 1", " 2, 2"],
        "pairs": [(1, 0), (2, 0), (1, 2)],
        "sft_target": " 5, 1",
    }
    assert data["\n\nHuman: alone\n\nAssistant:"]["pairs"] == []
    assert data["\n\nHuman: twice\n\nAssistant:"]["pairs"] == [(1, 0)]
    assert data.truncation == "keep_start"


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
    return train.prepare(compose(*TINY, "loss=dpo", f"datasets=['{folder}']", *overrides))[-1]


def numbered(n):
    """Make n rows with prompts of their own."""
    return [pair(f"prompt {i}", f" {i}") for i in range(n)]


def test_too_little_data_is_told_in_one_line(tmp_path, run_cli):
    folder = write(tmp_path / "data", numbered(3), numbered(1))
    overrides = ["loss=dpo", *TINY, f"datasets=['{folder}']"]
    run = run_cli(*overrides)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1:] == [
        "error: batch_size=8: the training data holds 3 examples; lower it to 3 or less"
    ]
    assert "Traceback" not in run.stderr and not run.folder.exists()


def test_no_data_and_no_evaluation_data_are_told_together(tmp_path):
    folder = write(tmp_path / "data", [], [])
    with pytest.raises(UserError) as caught:
        prepare(folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and "the training data holds 0 examples" in lines[0]
    assert "0 or less" not in lines[0]
    assert "no example to evaluate on" in lines[1]


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
    assert "train: 12 rows read" in line
    assert set(line.split("; ")[1:]) == {
        "1 dropped: the prompt is empty",
        "1 dropped: the text holds <|endoftext|>",
        "1 kept although it repeats an earlier row",
    }
    assert "The last 2 of an epoch's 10 examples fill no batch and are left out." in out
    assert (train_batches.n_items, len(train_batches)) == (10, 1)
    assert (eval_batches.n_items, len(eval_batches)) == (2, 1)


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


# The iterator


def walk(sizes, batch_size, seed=0, **limits):
    """Make an iterator over groups of these sizes whose items are numbered from 1, and whose tokenizer does nothing."""
    numbers = iter(range(1, sum(sizes) + 1))
    groups = [[Item(f"{i}", ("a", "b"), "keep_end", next(numbers), "") for _ in range(n)] for i, n in enumerate(sizes)]
    return BatchIterator(
        groups, lambda items: [SimpleNamespace(item=item) for item in items], batch_size, seed, **limits
    )


def rows_of(batches):
    """Return the rows of each batch."""
    return [[example.item.row for example in batch.examples] for batch in batches]


UNEVEN = [1, 3, 2, 1, 1, 4, 2, 1, 1, 3, 1, 2]  # 22 items


def test_an_iterator_resumes_from_every_position_of_three_epochs():
    batches = list(walk(UNEVEN, 4, n_epochs=3))
    assert len(batches) == 15  # 22 // 4 an epoch
    for i, batch in enumerate(batches):
        position = json.loads(json.dumps(batch.position))
        assert rows_of(walk(UNEVEN, 4, n_epochs=3, position=position)) == rows_of(batches[i + 1 :])
    assert rows_of(walk(UNEVEN, 4, n_epochs=3)) == rows_of(batches)


def test_an_iterators_own_position_is_that_of_its_last_batch():
    batches = walk(UNEVEN, 4, n_epochs=3)
    for batch in batches:
        assert batches.position == batch.position
    assert batches.position == {"epoch": 3, "batch": 0}


def test_an_epoch_is_reached_without_walking_those_before_it():
    tokenized = []
    iterator = walk(UNEVEN, 4, n_epochs=3, position={"epoch": 2, "batch": 3})
    iterator.tokenize = lambda items: tokenized.append(len(items)) or items
    list(iterator)
    assert tokenized == [4, 4]


def test_two_seeds_give_two_orders_and_one_seed_one():
    orders = [rows_of(walk(UNEVEN, 4, seed, n_epochs=2)) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_each_epoch_has_an_order_of_its_own():
    batches = rows_of(walk(UNEVEN, 4, n_epochs=3))
    assert batches[:5] != batches[5:10] != batches[10:] != batches[:5]


def test_what_is_left_of_an_epoch_is_left_out_and_no_item_comes_twice():
    for rows in (rows_of(walk(UNEVEN, 4, seed, n_epochs=1)) for seed in range(5)):
        assert [len(batch) for batch in rows] == [4] * 5
        assert max(Counter(sum(rows, [])).values()) == 1


def test_keep_last_yields_the_remainder_too():
    rows = rows_of(walk(UNEVEN, 4, n_epochs=1, keep_last=True))
    assert [len(batch) for batch in rows] == [4, 4, 4, 4, 4, 2]
    assert sorted(sum(rows, [])) == list(range(1, 23))


def test_pairs_of_a_prompt_follow_each_other_in_the_order_of_the_file():
    rows = sum(rows_of(walk(UNEVEN, 4, n_epochs=1, keep_last=True)), [])
    first = 1
    for size in UNEVEN:
        start = rows.index(first)
        assert rows[start : start + size] == list(range(first, first + size))
        first += size


@pytest.mark.parametrize(
    "limits, n", [((3, 20), 5), ((3, 21), 6), ((1, 100), 5), ((None, 28), 7), ((2, None), 10), ((None, 1), 1)]
)
def test_training_ends_with_the_first_limit_that_is_reached(limits, n):
    """22 items in batches of 4: 5 batches an epoch; n_examples ends after the batch that reaches it."""
    iterator = walk(UNEVEN, 4, n_epochs=limits[0], n_examples=limits[1])
    assert len(iterator) == n
    assert len(list(iterator)) == n


def test_an_iterator_without_a_full_batch_is_empty_and_ends():
    assert list(walk([1, 1], 4, n_epochs=3)) == []
    assert list(walk([1, 1], 4, n_epochs=None, n_examples=10)) == []
    assert list(walk([], 4, n_epochs=1, keep_last=True)) == []


# BOS


def test_bos_is_added_only_if_asked_for_even_to_a_tokenizer_that_would(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    item = Item("garden river", (" lamp",), "keep_end", 1, "")
    plain = Tokenization(tokenizer, 64, 32)([item])[0]
    assert plain.prompt == tokenizer("garden river", add_special_tokens=False)["input_ids"]
    assert plain.responses[0][-1] == tokenizer.eos_token_id
    assert plain.responses[0].count(tokenizer.eos_token_id) == 1
    if tokenizer.bos_token_id is not None:
        assert tokenizer.bos_token_id not in plain.prompt
        with_bos = Tokenization(tokenizer, 64, 32, add_bos=True)([item])[0]
        assert with_bos.prompt == [tokenizer.bos_token_id, *plain.prompt]
        assert with_bos.responses == plain.responses
    if tokenizer.bos_token not in (None, tokenizer.eos_token):  # Llama's and Gemma's own habit
        assert tokenizer("garden river")["input_ids"] == [tokenizer.bos_token_id, *plain.prompt]
