"""What is kept of a data set: the account of its rows, SFT's targets, and plain dicts."""

from collections import defaultdict

import pytest
from conftest import load_entries
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.messages import naming_row
from dpo.data.preferences import PreferenceData, as_preference_data
from dpo.data.selection import ONE_TARGET
from dpo.system.errors import UserError


def data_of(*rows, drop_unusable=True):
    data = PreferenceData("keep_end", drop_unusable)
    for row in rows:
        data.add_pair(*row)
    return data


def counts(data):
    return {"read": data.counts.read} | {what: n for what, n in data.counts.items() if n}


class NoSpaces:
    """A tokenizer for which each letter but z and white space is a token."""

    eos_token, eos_token_id, bos_token_id, chat_template = "<eos>", 0, None, None
    special_tokens_map = {"eos_token": "<eos>"}

    def __call__(self, texts, **_):
        return {
            "input_ids": [[ord(letter) for letter in text if not letter.isspace() and letter != "z"] for text in texts]
        }

    def get_vocab(self):
        return {}


def load(data, sft):
    return load_entries(data, "data", sft, NoSpaces())


def examples(loaded):
    return [(example.text.row, example.text.responses) for example in loaded.split]


ROWS = [("p", "1", "x"), ("q", "1", "x"), ("p", "2", "x"), ("p", "1", "y"), ("p", "1", "x")]


def test_sft_trains_on_the_last_target_of_a_prompt():
    data = load(data_of(*ROWS), sft=True)
    assert examples(data) == [(5, ("1",)), (2, ("1",))]
    assert counts(data) == {"read": 5, "kept": 2, f"dropped: {ONE_TARGET}": 3}


def test_a_preference_loss_trains_on_every_row():
    data = load(data_of(*ROWS), sft=False)
    assert [row for row, _ in examples(data)] == [1, 3, 4, 5, 2]
    assert counts(data) == {"read": 5, "kept": 5, "kept although it repeats an earlier row": 1}


@pytest.mark.parametrize("drop_unusable", [True, False])
@pytest.mark.parametrize("sft", [True, False])
def test_a_prompt_without_a_token_is_dropped_and_counted_in_every_data_set(sft, drop_unusable):
    """Where the original's order counts, its empty group stays in the shuffle."""
    rows = (("p", "1", "2"), ("zz", "1", "2"), ("zz", "3", "4"))
    data = load(data_of(*rows, drop_unusable=drop_unusable), sft)
    assert data.split.sizes.tolist() == ([1] if drop_unusable else [1, 0])
    assert counts(data) == {"read": 3, "kept": 1, "dropped: the prompt has no tokens": 2}


def test_a_function_that_counts_its_rows_itself_as_earlier_ones_did_counts_them_once():
    data = PreferenceData("keep_end", drop_unusable=True)
    for row in (("p", "1", "x"), ("", "1", "x")):
        data.counts["read"] += 1
        data.add_pair(*row)
    assert (
        load(data, sft=False).counts.summary(1)
        == "2 rows read: 1 kept, 1 dropped (1 because the prompt is empty); 1 prompts"
    )


def test_a_row_of_another_form_is_named_by_its_number():
    with pytest.raises(UserError, match="data, row 9: has a wrong form"), naming_row("data", 9):
        raise KeyError("chosen")


TEXTS = st.sampled_from(["", " ", "a", "b", "a<eos>", "zz"])
KINDS = st.sampled_from([True, False])


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=12), KINDS, KINDS)
def test_rows_read_are_rows_kept_and_rows_left_out_in_every_mode(rows, sft, drop_unusable):
    data = load(data_of(*rows, drop_unusable=drop_unusable), sft)
    n_examples = len(examples(data))
    assert data.counts.read == len(rows)
    assert data.counts["kept"] == n_examples
    assert min(data.counts.values(), default=0) >= 0


def test_an_unknown_truncation_mode_of_a_data_set_is_refused():
    with pytest.raises(UserError, match="'keep_middle'.*keep_start, keep_end"):
        PreferenceData("keep_middle")


# Plain dicts


def entry(responses=("a", "b", "c"), pairs=((0, 1), (2, 1)), sft_target="a"):
    """Make what the original's functions return for a prompt."""
    return {"responses": list(responses), "pairs": list(pairs), "sft_target": sft_target}


def test_a_plain_dict_of_the_original_becomes_a_data_set_of_one_row_per_prompt():
    plain = defaultdict(lambda: defaultdict(list))
    plain["p"].update(entry())
    plain["q"].update(entry(pairs=[(0, 0)]))
    data = as_preference_data(plain, "mine")
    assert dict(data) == {"p": entry(), "q": entry(pairs=[(0, 0)])}
    assert data.truncation == "keep_start"
    pairs = load(data, sft=False)
    assert counts(pairs) == {"read": 2, "kept": 2, "kept although both responses are equal": 1}
    assert examples(pairs) == [(1, ("a", "b")), (1, ("c", "b")), (2, ("a", "a"))]
    assert examples(load(as_preference_data(plain, "mine"), sft=True)) == [(1, ("a",)), (2, ("a",))]


def test_preference_data_is_returned_as_it_is():
    data = PreferenceData("keep_end")
    assert as_preference_data(data, "mine") is data


@pytest.mark.parametrize(
    "value, words",
    [
        (None, r"DATASETS\['mine'\]: its function must return .*, not NoneType"),
        ([entry()], "must return .*, not list"),
        ({"p": ["a", "b"]}, "mine, row 1: must be a dict with responses, pairs and sft_target, not list"),
        ({"p": {"responses": ["a"], "pairs": []}}, "row 1: sft_target must be a text, not NoneType"),
        ({"p": entry(pairs=[(0, 3)])}, r"row 1: the pair \(0, 3\) must index the 3 responses"),
        ({"p": entry(pairs=[(0, -1)])}, r"row 1: the pair \(0, -1\) must index"),
        ({"p": entry(pairs=[(0, 1, 2)])}, "row 1: has a wrong form"),
        ({"p": entry(responses=["a", 5])}, "row 1: a response must be a text, not int"),
        ({"p": entry(), 5: entry()}, "row 2: the prompt must be a text, not int"),
    ],
)
def test_a_data_set_of_another_form_is_named(value, words):
    with pytest.raises(UserError, match=words):
        as_preference_data(value, "mine")
