"""The forms that a row may have, and what is trained on."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.columns import find_columns
from dpo.data.messages import InconsistentRow, UnusableRow
from dpo.data.rows import RowOptions, parse_row
from dpo.system.errors import UserError

USER = {"role": "user", "content": "Hi."}
WHY = {"role": "user", "content": "Why?"}
SYSTEM = {"role": "system", "content": "Be brief."}
YES, NO, SO = ({"role": "assistant", "content": text} for text in ("Yes.", "No.", "So."))
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "clock"}}]}
TIME = {"role": "tool", "content": "12:00"}
OPTIONS = ("sft", "labels", "chat", "train_on", "pairs")


def parse(row, **given):
    """Parse a row with options and columns, by their names."""
    options = {name: given.pop(name) for name in OPTIONS if name in given}
    return parse_row(row, find_columns(row, given, "data"), RowOptions(**options))


def sides(row):
    return row.prompt, row.responses


def best(row):
    """The first pair of a row: its chosen and its rejected response."""
    return tuple(row.responses[at] for at in row.pairs[0])


# The usual forms


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO], "messages": [USER, YES, USER]},
        {"messages": [USER], "chosen": YES, "rejected": NO},
        {"prompt": [USER], "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Hi.", "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "Hi.", "chosen": [USER, YES], "rejected": [USER, NO], "messages": [USER, YES], "score_chosen": 1.0},
        {"question": [USER], "response_j": [YES], "response_k": [NO]},
        {"chosen": [USER | {"name": None}, YES | {"tool_calls": None}], "rejected": [USER, NO]},  # as Arrow adds them
        {"chosen": [USER | {"id": 1}, YES], "rejected": [USER | {"id": 2}, NO]},
    ],
)
def test_conversations_come_in_three_forms(row):
    found = parse(row)
    assert [turn["content"] for turn in found.prompt] == ["Hi."]
    assert (found.responses, found.pairs, found.target) == (([YES], [NO]), ((0, 1),), 0)


@pytest.mark.parametrize(
    "row, prompt, target",
    [
        ({"prompt": "Hi.", "completion": " yes"}, "Hi.", " yes"),
        ({"prompt": "Hi.", "chosen": " yes"}, "Hi.", " yes"),
        ({"prompt": "Hi.", "chosen": " yes", "rejected": None}, "Hi.", " yes"),
        ({"prompt": "Hi.", "chosen": " yes", "completion": " other"}, "Hi.", " yes"),
        ({"prompt": [USER], "completion": [YES]}, [USER], [YES]),
        ({"prompt": [USER], "completion": "Yes."}, [USER], [YES]),
        ({"messages": [SYSTEM, USER, YES]}, [SYSTEM, USER], [YES]),
        ({"prompt": "Hi.", "messages": [USER, YES]}, [USER], [YES]),
        ({"chosen": [USER, YES]}, [USER], [YES]),
        ({"chosen": "\n\nHuman: Hi.\n\nAssistant: yes"}, "\n\nHuman: Hi.\n\nAssistant:", " yes"),
    ],
)
def test_sft_needs_no_rejected_response(row, prompt, target):
    found = parse(row, sft=True)
    assert (found.prompt, found.responses, found.pairs) == (prompt, (target,), ())
    with pytest.raises(UserError):
        parse(row)


def test_system_and_tools_columns_go_with_the_conversation():
    row = {"system": "Be brief.", "tools": '[{"name": "clock"}]', "chosen": [USER, YES], "rejected": [USER, NO]}
    found = parse(row)
    assert (found.prompt, found.tools) == ([SYSTEM, USER], [{"name": "clock"}])
    assert found.columns_read == {"chosen", "rejected", "system", "tools"}
    assert parse(row | {"system": None, "tools": None}).prompt == [USER]
    same = {"system": "Be brief.", "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]}
    assert parse(same).prompt == [SYSTEM, USER]
    empty = {"role": "system", "content": ""}
    assert parse({"prompt": [empty, USER], "chosen": [YES], "rejected": [NO]}).prompt == [empty, USER]


@pytest.mark.parametrize("column", [{"system": "Be brief."}, {"tools": [{"name": "clock"}]}])
def test_system_and_tools_beside_texts_are_read_with_the_prompt_as_a_turn_alone(column):
    """Otherwise the note on columns names them as ignored."""
    row = {"prompt": "Hi.", "chosen": "Yes.", "rejected": "No."} | column
    [name] = column
    assert sides(parse(row)) == ("Hi.", ("Yes.", "No.")) and name not in parse(row).columns_read
    found = parse(row, chat=True)
    assert (found.prompt[-1], found.responses) == (USER, ([YES], [NO])) and name in found.columns_read


def test_of_two_responses_the_one_with_the_higher_score_is_the_chosen_one():
    row = {"prompt": "Hi.", "chosen": "a", "rejected": "b"}
    scores = {"score_chosen": "first", "score_rejected": "second"}
    assert best(parse(row | {"first": 2, "second": 1.5}, **scores)) == ("a", "b")
    found = parse(row | {"first": "-1", "second": "3.5"}, **scores)  # a CSV file has texts
    assert (best(found), found.target, found.scores) == (("b", "a"), 1, (-1.0, 3.5))
    assert found.columns_read == {"prompt", "chosen", "rejected", *scores}
    with pytest.raises(UnusableRow, match="both scores are equal"):
        parse(row | {"first": 1, "second": 1.0}, **scores)
    for score in ("much", float("nan"), True):
        with pytest.raises(UserError, match="first must be a finite number"):
            parse(row | {"first": score, "second": 1}, **scores)
    with pytest.raises(InconsistentRow, match="first must be a number, not null"):
        parse(row | {"first": None, "second": 1}, **scores)


# Responses of several turns


@pytest.mark.parametrize(
    "chosen, rejected, n_prompt",
    [
        ([USER, YES, WHY, SO], [USER, NO, WHY, SO], 1),  # every turn of the assistant after what they share
        ([SYSTEM, USER, YES, WHY, SO], [SYSTEM, USER, YES, WHY, NO], 4),
        ([USER, CALL, TIME, YES], [USER, NO], 1),
        ([USER, CALL, TIME, YES], [USER, CALL, TIME, NO], 3),
        ([USER, YES], [USER, YES, WHY, SO], 1),  # one is the beginning of the other
        ([USER, YES, WHY, SO], [USER, YES], 1),
        ([USER, YES, SO], [USER, YES, NO], 1),  # an answer right before the one that differs
        ([USER, YES | {"tool_calls": []}, WHY, SO], [USER, YES | {"tool_calls": None}, WHY, NO], 3),
    ],
)
def test_responses_are_the_turns_after_what_the_conversations_share(chosen, rejected, n_prompt):
    found = parse({"chosen": chosen, "rejected": rejected})
    texts = [[turn["content"] for turn in turns] for turns in (found.prompt, *found.responses)]
    whole = [[turn["content"] for turn in turns] for turns in (chosen, rejected)]
    assert texts == [whole[0][:n_prompt], whole[0][n_prompt:], whole[1][n_prompt:]]


def test_conversations_that_part_in_a_turn_of_the_user_are_dropped():
    for turn in (WHY, TIME):
        with pytest.raises(UnusableRow, match=f"^the conversations first differ in a turn of the {turn['role']}$"):
            parse({"chosen": [USER, YES, turn, SO], "rejected": [USER, YES, SO]})
    with pytest.raises(UnusableRow, match="^the conversations first differ in a turn of the user$"):
        parse({"chosen": [USER, YES], "rejected": [WHY, YES]})


def test_a_conversation_is_trained_on_as_train_on_says():
    turns = [SYSTEM, USER, YES, WHY, CALL, TIME, SO]
    for row, options in (({"messages": turns}, {"sft": True}), ({"messages": turns, "label": True}, {"labels": True})):
        for train_on, start in (("response", 6), ("last", 6), ("all", 2)):
            assert sides(parse(row, train_on=train_on, **options)) == (turns[:start], (turns[start:],))
    greeting = [SO, USER, YES]
    assert sides(parse({"messages": greeting}, sft=True, train_on="all")) == ([SO, USER], ([YES],))
    pair = {"chosen": [USER, YES, WHY, YES], "rejected": [USER, NO, WHY, NO]}
    assert sides(parse(pair, train_on="all")) == sides(parse(pair)) == ([USER], ([YES, WHY, YES], [NO, WHY, NO]))
    with pytest.raises(UnusableRow, match="^the conversations differ in more than their last turn$"):
        parse(pair, train_on="last")
    pair = {"chosen": [USER, YES, WHY, YES], "rejected": [USER, YES, WHY, NO]}
    assert sides(parse(pair, train_on="last")) == ([USER, YES, WHY], ([YES], [NO]))
    single = {"prompt": [USER], "completion": [YES, WHY, SO]}
    for train_on, start in (("response", 1), ("all", 1), ("last", 3)):
        assert sides(parse(single, sft=True, train_on=train_on)) == (
            [USER, YES, WHY, SO][:start],
            ([YES, WHY, SO][start - 1 :],),
        )


TURNS = st.lists(st.sampled_from([SYSTEM, USER, WHY, YES, NO, CALL, TIME]), min_size=1, max_size=6)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(TURNS, TURNS, st.sampled_from(["response", "last", "all"]), st.booleans())
def test_prompt_and_responses_are_the_conversations(first, second, train_on, sft):
    row = {"messages": first} if sft else {"chosen": first, "rejected": second}
    try:
        found = parse(row, sft=sft, train_on=train_on)
    except UserError:
        return
    for whole, response in zip((first, second), found.responses, strict=False):
        assert found.prompt + response == whole
        assert response[0]["role"] == response[-1]["role"] == "assistant"
        assert found.prompt[-1]["role"] in ("user", "tool")
        assert train_on != "last" or len(response) == 1


# A prompt beside responses of several turns


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(TURNS | st.sampled_from(["Hi.", "Why?"]), TURNS, TURNS)
def test_nothing_of_prompt_and_responses_is_left_out(prompt, chosen, rejected):
    try:
        found = parse({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    except UserError:
        return
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for whole, response in zip((chosen, rejected), found.responses, strict=True):
        seen = found.prompt + response
        if whole[0]["role"] == "assistant":
            assert seen == turns + whole or (seen == whole and seen[: len(turns)] == turns)
        else:
            assert seen == whole and all(turn in seen for turn in turns)


def test_responses_continue_the_prompt_if_they_begin_with_the_assistant():
    row = {"prompt": [SYSTEM, USER], "chosen": [YES, WHY, SO], "rejected": [YES, WHY, NO]}
    assert sides(parse(row)) == ([SYSTEM, USER, YES, WHY], ([SO], [NO]))
    assert sides(parse(row | {"prompt": "Hi."})) == ([USER, YES, WHY], ([SO], [NO]))
    kto = {"prompt": [USER], "completion": [YES, WHY, SO], "label": False}
    assert sides(parse(kto, labels=True)) == ([USER], ([YES, WHY, SO],))


@pytest.mark.parametrize(
    "prompt",
    ["Hi.", " Hi.\n", "Why?", "Be brief.", "", [SYSTEM, USER], [USER], [USER, YES], [SYSTEM, USER, YES, WHY], None, []],
)
def test_a_prompt_that_the_responses_hold_is_not_read_twice(prompt):
    turns = [SYSTEM, USER, YES, WHY]
    row = {"prompt": prompt, "chosen": [*turns, SO], "rejected": [*turns, NO]}
    assert sides(parse(row)) == (turns, ([SO], [NO]))
    greeting = {"prompt": [SO, USER], "chosen": [SO, USER, YES], "rejected": [SO, USER, NO]}
    assert sides(parse(greeting)) == ([SO, USER], ([YES], [NO]))


@pytest.mark.parametrize("prompt", ["Ho.", [WHY], [SYSTEM], [USER, NO]])
def test_another_prompt_is_refused_with_a_way_on(prompt):
    row = {"prompt": prompt, "chosen": [USER, YES], "rejected": [USER, NO]}
    line = "chosen and rejected neither contain the turns of prompt nor continue them with a turn of the assistant"
    with pytest.raises(UserError, match=f"^{line}; columns.prompt=none reads them as whole conversations$"):
        parse(row)
    found = parse(row, prompt="none")
    assert sides(found) == ([USER], ([YES], [NO])) and "prompt" not in found.columns_read
    with pytest.raises(UserError, match="^messages neither contain the turns of prompt"):
        parse({"prompt": prompt, "messages": [USER, YES]}, sft=True)


def test_a_prompt_beside_whole_dialogues_is_refused():
    row = {"prompt": "Hi.", "chosen": "\n\nHuman: Hi.\n\nAssistant: a", "rejected": "\n\nHuman: Hi.\n\nAssistant: b"}
    with pytest.raises(UserError, match="chosen is a whole dialogue, but prompt is given as well; columns.prompt=none"):
        parse(row)
    assert sides(parse(row, prompt="none")) == ("\n\nHuman: Hi.\n\nAssistant:", (" a", " b"))


def test_the_answers_of_dialogues_begin_where_the_chosen_ones_does():
    row = {"chosen": "\n\nHuman: Hi.\n\nAssistant: a", "rejected": "\n\nHuman: Hi.\n\nAssistant: b"}
    found = parse(row)
    assert sides(found) == ("\n\nHuman: Hi.\n\nAssistant:", (" a", " b"))
    assert (found.prompts_differ, found.every_target) == (False, False)
    other = parse(row | {"rejected": "\n\nHuman: Ho.\n\nAssistant: b"})
    assert (other.responses, other.prompts_differ) == ((" a", " b"), True)


def test_every_role_can_have_no_column():
    row = {"prompt": "Hi.", "chosen": "a", "rejected": "b", "messages": [USER, YES], "completion": "c", "label": True}
    assert sides(parse(row, sft=True, chosen="none")) == ("Hi.", ("c",))
    assert sides(parse(row, sft=True, chosen="none", completion="none")) == ([USER], ([YES],))
    assert parse(row, label="none").pairs == ((0, 1),)


# Messages written as text


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_messages_as_json_are_read_in_every_column(column):
    row = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
    assert sides(parse({"messages": json.dumps([USER, YES])}, sft=True)) == ([USER], ([YES],))
    listed = {"prompt": [USER], "responses": json.dumps([YES, NO]), "scores": [1, 2]}
    assert sides(parse(listed)) == sides(parse(row))
    for written in (row[column], row[column][0]):
        assert sides(parse(row | {column: json.dumps(written)})) == ([USER], ([YES], [NO]))


PRINTED = [
    str([USER, YES]),
    str(YES),
    '[{"role": "user", ',
    "[{'content': 'Hi.', 'role': 'user'}\n {'content': 'Yes.', 'role': 'assistant'}]",  # of numpy, as pandas writes it
    "array([{'from': 'gpt', 'value': 'a'}], dtype=object)",
]


@pytest.mark.parametrize("written", PRINTED)
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected", "system"])
def test_messages_as_python_prints_them_are_refused_in_every_column(column, written):
    row = {"prompt": "Hi.", "chosen": "a", "rejected": "b", column: written}
    line = r"^messages are written as a text that is not JSON \("
    with pytest.raises(InconsistentRow, match=rf"{line}{column}; write them as a list, in .jsonl or .parquet, or as"):
        parse(row)
    with pytest.raises(InconsistentRow, match=f"{line}responses, response 2; "):
        parse({"prompt": "Hi.", "responses": ["a", written], "scores": [1, 2]})
    with pytest.raises(UserError, match="tools is not JSON"):
        parse({"prompt": [USER], "chosen": "a", "rejected": "b", "tools": "[{'name': 'clock'}]"})


@pytest.mark.parametrize("text", ['{"value": 3}', '[{"id": 1, "role": "admin"}]', '{"name": {"role": "user"}}', "[{"])
def test_json_of_another_kind_stays_a_text(text):
    assert sides(parse({"prompt": text, "chosen": text, "rejected": "b"})) == (text, (text, "b"))


# Which response is better

TWO = {"prompt": "Hi.", "response_0": "a", "response_1": "b"}
ONE_BASED = {"prompt": "Hi.", "response_1": "a", "response_2": "b"}
LETTERS = {"prompt": "Hi.", "response_a": "a", "response_b": "b"}
NAMED = {"prompt": "Hi.", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    "row, first, second",
    [
        (TWO, [0, "0", "response_0", 0.0, "0.0", True, "True"], [1, "1", "Response_1", "response 1", False, "false"]),
        (ONE_BASED, [1, "1", "response_1", "model_1", True], [2, "2", "response 2", False]),
        (LETTERS, ["a", "A", "response_a", "model_a", "Model A", True], ["b", "B", "response_b", "assistant_b", False]),
        (NAMED, ["chosen", 0, "A", True], ["rejected", 1, "b", False]),
    ],
)
def test_the_preferred_response_is_told_by_the_names_of_the_columns(row, first, second):
    for values, pair in ((first, ("a", "b")), (second, ("b", "a"))):
        for value in values:
            found = parse(row | {"best": value}, preferred="best")
            assert (best(found), found.scores) == (pair, ()) and "preferred" in found.columns_read
    for tie in ("tie", "tie (bothbad)", None, ""):
        with pytest.raises(UnusableRow, match="no response is better"):
            parse(row | {"best": tie}, preferred="best")


@pytest.mark.parametrize(
    "row, values",
    [
        (TWO, [2, -1, 0.5, "first", "A", "gpt4", "claude-1", "response_2"]),
        (ONE_BASED, [0, 3, "b"]),
        (LETTERS, [0, 1, "1", "c", "vicuna-b"]),  # 1 is the first in some data sets and the second in others
        (NAMED, [2, -1, "c", "response_1"]),
    ],
)
def test_a_preference_that_is_not_understood_is_refused(row, values):
    for value in values:
        with pytest.raises(UserError, match="best must say which response is better, .* or .*, not '"):
            parse(row | {"best": value}, preferred="best")


def test_the_sign_of_a_preference_strength_says_which_response_is_better():
    for strength, pair in ((-2, ("a", "b")), ("3", ("b", "a")), (0.5, ("b", "a"))):
        assert best(parse(ONE_BASED | {"preference_strength": strength})) == pair
    for strength in (0, "0.0"):
        with pytest.raises(UnusableRow, match="no response is better"):
            parse(ONE_BASED | {"preference_strength": strength})
    with pytest.raises(UserError, match="preference_strength must be a finite number, not 'much'"):
        parse(ONE_BASED | {"preference_strength": "much"})


@pytest.mark.parametrize(
    "name, setting, ignored",
    [
        ("better_response_id", "columns.preferred=better_response_id", "columns.preferred=none"),
        ("preferred", "columns.preferred=preferred", "columns.preferred=none"),
        ("Winner", "columns.preferred=Winner", "columns.preferred=none"),
        ("preference", "columns.preferred=preference", "columns.preferred=none"),
        ("label", "columns.preferred=label", "columns.label=none"),
        ("overall_preference", "columns.preference_strength=overall_preference", "columns.preference_strength=none"),
    ],
)
def test_a_column_that_may_say_which_response_is_better_is_not_ignored_beside_a_pair(name, setting, ignored):
    row = NAMED | {name: 1}
    line = f"data: {name} may say which response is better; set {setting} to use it, or {ignored} to ignore it"
    for options in ({}, {"sft": True}):
        with pytest.raises(UserError, match=f"^{line}; its columns: "):
            parse(row, **options)
    assert best(parse(row, **{ignored.split(".")[1].split("=")[0]: "none"})) == ("a", "b")
    key, value = setting.removeprefix("columns.").split("=")
    assert best(parse(row, **{key: value})) == ("b", "a")


def test_two_responses_without_anything_that_says_which_is_better_are_refused():
    settings = "columns.preferred=NAME, or columns.chosen=response_a columns.rejected=response_b if the first one is"
    with pytest.raises(UserError, match=f"no column says which of response_a and response_b is better; set {settings}"):
        parse(LETTERS)
    assert best(parse(LETTERS, chosen="response_a", rejected="response_b")) == ("a", "b")
    with pytest.raises(UserError, match="label may say which response is better; set columns.preferred=label"):
        parse(LETTERS | {"label": "A"})
    with pytest.raises(UserError, match="the responses could be response_0 and response_1, or response_1 and respo"):
        parse(TWO | ONE_BASED | {"preferred": 1})
    with pytest.raises(UserError, match="columns.scores=s and columns.ranks=r: each says which response is better"):
        parse({"responses": ["a"], "s": [1], "r": [1]}, scores="s", ranks="r")


# More than two responses

FOUR = {"prompt": "Hi.", "responses": ["a", "b", "c", "d"]}


@pytest.mark.parametrize(
    "scores, pairs, expected, ties",
    [
        ([2, 4, 1, 3], "best_worst", [(1, 2)], 0),
        ([2, 4, 1, 3], "best_rest", [(1, 0), (1, 2), (1, 3)], 0),
        ([2, 4, 1, 3], "all", [(1, 0), (0, 2), (3, 0), (1, 2), (1, 3), (3, 2)], 0),
        ([4, 4, 1, 1], "best_worst", [(0, 2)], 0),
        ([4, 4, 1, 1], "best_rest", [(0, 2), (0, 3)], 1),
        ([4, 4, 1, 1], "all", [(0, 2), (0, 3), (1, 2), (1, 3)], 2),
    ],
)
def test_pairs_of_several_responses_have_different_scores(scores, pairs, expected, ties):
    found = parse(FOUR | {"scores": scores}, pairs=pairs)
    assert (list(found.pairs), found.ties, found.scores) == (expected, ties, tuple(scores))
    ranked = parse(FOUR | {"ranks": [-score for score in scores]}, pairs=pairs)
    assert (list(ranked.pairs), ranked.ties, ranked.scores) == (expected, ties, ())
    assert found.columns_read == {"prompt", "responses", "scores"}
    assert parse(FOUR | {"scores": scores}, sft=True).target == scores.index(4)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=5))
def test_all_pairs_and_ties_are_every_two_responses(scores):
    row = {"prompt": "Hi.", "responses": [f"answer {at}" for at in range(len(scores))], "scores": scores}
    if len(set(scores)) == 1:
        with pytest.raises(UnusableRow, match="scores are equal$"):
            parse(row)
        return
    found = parse(row, pairs="all")
    assert len(found.pairs) + found.ties == len(scores) * (len(scores) - 1) // 2
    assert all(scores[chosen] > scores[rejected] for chosen, rejected in found.pairs)
    assert set(parse(row, pairs="best_rest").pairs) <= set(found.pairs)
    [(chosen, rejected)] = parse(row).pairs
    assert (scores[chosen], scores[rejected]) == (max(scores), min(scores))


def test_a_list_of_responses_may_hold_messages_or_objects_and_be_json():
    conversations = [[USER, YES, WHY, SO], [USER, NO], [USER, YES, WHY, NO]]
    found = parse({"responses": conversations, "scores": [3, 1, 2]}, pairs="all")
    assert sides(found) == ([USER], ([YES, WHY, SO], [NO], [YES, WHY, NO]))
    messages = {"prompt": [USER], "responses": [YES, NO], "scores": "[1, 2]"}
    assert sides(parse(messages)) == ([USER], ([YES], [NO]))
    objects = {"prompt": "Hi.", "answers": [{"text": "a", "votes": 3}, {"text": "b", "votes": "7"}]}
    assert best(parse(objects, scores="votes")) == ("b", "a")
    assert best(parse(objects, ranks="votes")) == ("a", "b")
    assert best(parse({"prompt": "Hi.", "responses": '["a", "b"]', "choice": 1}, preferred="choice")) == ("b", "a")
    pair = {"chosen": "c", "rejected": "d", "scores": [1, 2]}
    assert best(parse(FOUR | pair | {"responses": ["a", "b"]}, responses="responses")) == ("b", "a")
    assert best(parse(FOUR | pair)) == ("c", "d")


@pytest.mark.parametrize(
    "row, given, words",
    [
        (
            FOUR,
            {},
            "which of the 4 responses is better\\? no column and no key .*; set columns.scores, columns.ranks or",
        ),
        (FOUR | {"scores": [1, 2]}, {}, "scores has 2 values for 4 responses"),
        (FOUR | {"scores": 3}, {}, "scores must be a list or its JSON, not '3'"),
        (FOUR | {"scores": [1, 2, 3, "x"]}, {}, "scores must be a finite number, not 'x'"),
        (
            FOUR | {"responses": [{"body": "a"}, {"body": "b"}]},
            {},
            "response 1 must be an object with one of response, t",
        ),
        (
            FOUR | {"scores": [1] * 4, "ranks": [1] * 4},
            {},
            "scores and ranks may say which response is better; set col",
        ),
        (FOUR, {"scores": "votes"}, "no column and no key"),
        (FOUR | {"best": 4}, {"preferred": "best"}, "an index from 0 to 3, not '4'"),
        (
            {"responses": ["a", "b"], "scores": [1, 2]},
            {},
            "prompt must be a text, not missing; set columns.prompt=NAME",
        ),
    ],
)
def test_a_list_of_responses_that_is_not_understood_is_refused(row, given, words):
    with pytest.raises(UserError, match=words) as caught:
        parse(row, **given)
    assert not isinstance(caught.value, UnusableRow)


# Data sets as they are published

TEXTS = {"chosen": "Yes.", "rejected": "No."}
ULTRAFEEDBACK = {
    "source": "evol_instruct",
    "instruction": "Hi.",
    "models": ["alpaca-7b", "gpt-4"],
    "completions": [
        {"annotations": {"helpfulness": {"Rating": "2"}}, "critique": "Poor.", "custom_system_prompt": "",
         "fine-grained_score": 4.5, "model": "alpaca-7b", "overall_score": 6.0, "principle": "a", "response": "No."},
        {"annotations": {"helpfulness": {"Rating": "5"}}, "critique": "Good.", "custom_system_prompt": "",
         "fine-grained_score": 5.0, "model": "gpt-4", "overall_score": 8.5, "principle": "a", "response": "Yes."},
    ],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}  # fmt: skip
NECTAR = {
    "prompt": "\n\nHuman: Hi.\n\nAssistant: ",
    "answers": [
        {"answer": "Yes.", "model": "gpt-4", "rank": 1.0},
        {"answer": "So.", "model": "claude", "rank": 2.0},
        {"answer": "No.", "model": "llama", "rank": 3.0},
    ],
    "turns": 1,
    "num_responses": 3,
    "source": ["lmsys-chat-1m"],
    "good_natured": True,
}
PKU = {
    "prompt": "Hi.",
    "response_0": "No.",
    "response_1": "Yes.",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}
ARENA = {
    "question_id": "f1",
    "model_a": "vicuna-13b",
    "model_b": "koala-13b",
    "winner": "model_b",
    "conversation_a": [USER, NO],
    "conversation_b": [USER, YES],
    "turn": 1,
    "language": "English",
}
PUBLISHED = {
    "UltraFeedback": (ULTRAFEEDBACK, {}, "Hi.", ("Yes.", "No.")),
    "UltraFeedback, binarized": (
        {"prompt": "Hi.", "prompt_id": "f8", "chosen": [USER, YES], "rejected": [USER, NO], "messages": [USER, YES],
         "score_chosen": 6.0, "score_rejected": 4.0}, {}, [USER], ([YES], [NO])),
    "Nectar": (NECTAR, {}, "\n\nHuman: Hi.\n\nAssistant: ", ("Yes.", "No.")),
    "OpenAI": (
        {"input": {"messages": [USER], "tools": [{"type": "function", "function": {"name": "clock"}}],
                   "parallel_tool_calls": True}, "preferred_output": [YES], "non_preferred_output": [NO]},
        {}, [USER], ([YES], [NO])),
    "PKU-SafeRLHF": (PKU, {"preferred": "better_response_id"}, "Hi.", ("Yes.", "No.")),
    "PKU-SafeRLHF, safer": (PKU, {"preferred": "safer_response_id"}, "Hi.", ("No.", "Yes.")),
    "HelpSteer2, preferences": (
        {"split": "train", "prompt": "Hi.", "response_1": "Yes.", "response_2": "No.", "preference_strength": -2,
         "preference_statement": "Response 1 is.", "preference_elaboration": "Yes."}, {}, "Hi.", ("Yes.", "No.")),
    "HelpSteer3": (
        {"domain": "general", "language": "english", "context": [USER], "response1": "No.", "response2": "Yes.",
         "overall_preference": 1, "individual_preference": [{"score": 1}]},
        {"prompt": "context"}, [USER], ([YES], [NO])),
    "Chatbot Arena": (ARENA, {}, [USER], ([YES], [NO])),
    "ms-swift": ({"messages": [USER, NO, WHY, YES], "rejected_response": "No."}, {}, [USER, NO, WHY], ([YES], [NO])),
    "ms-swift, messages": ({"messages": [USER, YES], "rejected_messages": [USER, NO]}, {}, [USER], ([YES], [NO])),
    "LLaMA-Factory, ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi."}], "chosen": {"from": "gpt", "value": "Yes."},
         "rejected": {"from": "gpt", "value": "No."}}, {}, [USER], ([YES], [NO])),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "Hi.", "input": "", **TEXTS}, {"input": "input"}, "Hi.", ("Yes.", "No.")),
    "TRL, standard": ({"prompt": "Hi.", **TEXTS}, {}, "Hi.", ("Yes.", "No.")),
    "TRL, implicit prompt": ({"chosen": [USER, YES], "rejected": [USER, NO]}, {}, [USER], ([YES], [NO])),
    "TRL, explicit prompt": ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, {}, [USER], ([YES], [NO])),
    "Orca and Axolotl's chatml.intel": (
        {"system": "Be brief.", "question": "Hi.", **TEXTS}, {"chat": True}, [SYSTEM, USER], ([YES], [NO])),
    "Orca of distilabel": (
        {"system": "", "input": "Hi.", **TEXTS, "generations": ["Yes.", "No."], "order": ["chosen", "rejected"],
         "rating": [9.0, 8.0], "status": "unchanged", "chosen_score": 9.0}, {}, "Hi.", ("Yes.", "No.")),
    "Capybara": (
        {"source": "Dove", "conversation": [{"input": "Hi.", "output": "Yes."}], "original_response": "Yes.",
         "chosen": [USER, YES, WHY, SO], "rejected": [USER, YES, WHY, NO], "rating_chosen": 5, "rating_rejected": 3},
        {}, [USER, YES, WHY], ([SO], [NO])),
    "distilabel": (
        {"instruction": "Hi.", "generations": ["No.", "Yes."], "ratings": [2.0, 4.0], "rationales": ["Poor.", "Good."]},
        {}, "Hi.", ("Yes.", "No.")),
    "StackExchange, paired": (
        {"qid": 1, "question": "Hi.", "response_j": "Yes.", "response_k": "No."}, {}, "Hi.", ("Yes.", "No.")),
    "Summaries": (
        {"info": {"post": "Long."}, "text": "Hi.", "summaries": [{"text": "No.", "policy": "a"}, {"text": "Yes."}],
         "choice": 1}, {"prompt": "text", "responses": "summaries", "preferred": "choice"}, "Hi.", ("Yes.", "No.")),
}  # fmt: skip


@pytest.mark.parametrize("row, given, prompt, pair", PUBLISHED.values(), ids=PUBLISHED)
def test_published_data_sets_are_read(row, given, prompt, pair):
    found = parse(row, **given)
    assert (found.prompt, best(found)) == (prompt, pair)
    assert found.responses[parse(row, sft=True, **given).target] == pair[0]


KTO = {
    "TRL, unpaired": ({"prompt": "Hi.", "completion": "Yes.", "label": True}, {}, "Hi.", "Yes."),
    "TRL, messages": ({"prompt": [USER], "completion": [YES], "label": True}, {}, [USER], [YES]),
    "ms-swift": ({"messages": [USER, YES], "label": True}, {}, [USER], [YES]),
    "LLaMA-Factory, ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Yes."}], "kto_tag": True},
        {}, [USER], [YES]),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "Hi.", "input": "", "output": "Yes.", "kto_tag": True},
        {"input": "input", "completion": "output"}, "Hi.", "Yes."),
}  # fmt: skip


@pytest.mark.parametrize("row, given, prompt, response", KTO.values(), ids=KTO)
def test_published_data_of_single_responses_is_read(row, given, prompt, response):
    found = parse(row, labels=True, **given)
    assert (found.prompt, found.responses, found.label) == (prompt, (response,), True)


def test_what_is_ambiguous_in_published_data_is_refused_with_the_settings_to_give():
    line = (
        "better_response_id and safer_response_id may say which response is better; set columns.preferred=better_resp"
    )
    with pytest.raises(UserError, match=line):
        parse(PKU)
    with pytest.raises(UserError, match="set columns.prompt=NAME, or columns.input=input to read it after the instr"):
        parse({"instruction": "Hi.", "input": "", **TEXTS})
    with pytest.raises(UnusableRow, match="no response is better"):
        parse(ARENA | {"winner": "tie (bothbad)"})


def test_openais_tools_come_with_its_messages():
    tools = [{"type": "function", "function": {"name": "clock"}}]
    row = {"input": {"messages": [USER], "tools": tools}, "preferred_output": [YES], "non_preferred_output": [NO]}
    assert parse(row).tools == tools


# Rows of one response with a label


@pytest.mark.parametrize(
    "row, prompt, response",
    [
        ({"prompt": "Hi.", "completion": " yes"}, "Hi.", " yes"),
        ({"prompt": "Hi.", "response": " yes"}, "Hi.", " yes"),
        ({"prompt": [USER], "completion": [YES]}, [USER], [YES]),
        ({"prompt": [USER], "completion": "Yes."}, [USER], [YES]),
        ({"messages": [SYSTEM, USER, YES]}, [SYSTEM, USER], [YES]),
    ],
)
def test_a_completion_or_messages_may_have_a_label(row, prompt, response):
    for label in (True, False):
        found = parse(row | {"label": label}, labels=True)
        assert (found.prompt, found.responses, found.label, found.pairs) == (prompt, (response,), label, ())
        assert found.columns_read >= {"label"}


def test_sft_trains_on_desirable_responses_alone_and_reads_no_label_of_another_kind():
    row = {"prompt": "Hi.", "completion": "a"}
    for label in (True, 1, 1.0, "True"):
        found = parse(row | {"label": label}, sft=True)
        assert (found.responses, found.label) == (("a",), None) and "label" in found.columns_read
    for label in (False, 0, 0.0, "false"):
        with pytest.raises(UnusableRow, match="^the response is labelled undesirable$"):
            parse(row | {"label": label}, sft=True)
    for label in ("math", 3, None):
        assert "label" not in parse(row | {"label": label}, sft=True).columns_read
        with pytest.raises(UserError, match="label must be true or false"):
            parse(row | {"label": label}, sft=True, label="label")


def test_a_label_is_true_or_false_1_or_0_or_their_text():
    values = {True: (True, 1, 1.0, "true", "True", "1", "1.0"), False: (False, 0, 0.0, "false", "FALSE ", "0", "0.0")}
    for label, written in values.items():
        for value in written:
            assert parse({"prompt": "Hi.", "completion": "a", "label": value}, labels=True).label is label
    for value in ("good", 2, 0.5, "0.5", -1.0, float("nan"), [True]):
        with pytest.raises(UserError, match="^label must be true or false, not '"):
            parse({"prompt": "Hi.", "completion": "a", "label": value}, labels=True)
    for value, word in ((None, "null"), ("", "empty")):
        with pytest.raises(InconsistentRow, match=f"^label must be true or false, not {word}"):
            parse({"prompt": "Hi.", "completion": "a", "label": value}, labels=True)


def test_a_pair_stays_a_pair_beside_a_labelled_completion_unless_the_labels_column_is_given():
    row = {"prompt": "Hi.", "chosen": "a", "rejected": "b", "completion": "c", "label": 0}
    assert parse(row, labels=True).responses == parse(row).responses == ("a", "b")
    assert parse(row, labels=True).label is None
    found = parse(row, labels=True, label="label")
    assert (found.responses, found.label) == (("c",), False)


def test_one_response_is_refused_by_a_loss_of_pairs_and_without_a_label_by_a_loss_of_labels():
    row = {"prompt": "Hi.", "completion": "a"}
    line = "has one response and a label, for loss=kto; this loss needs a chosen and a rejected response"
    with pytest.raises(UserError, match=f"^{line}$"):
        parse(row | {"label": True})
    line = "^label must be true or false, not missing; the row's columns: prompt, completion$"
    with pytest.raises(UserError, match=line):
        parse(row, labels=True)
    with pytest.raises(UserError, match="^chosen must be a text, not missing"):
        parse({"prompt": "Hi.", "label": True}, labels=True)


# Weights


def test_a_row_may_have_a_weight():
    row = {"prompt": "Hi.", "chosen": "a", "rejected": "b"}
    assert parse(row).numbers == parse(row | {"weight": 3}).numbers == {}
    found = parse(row | {"w": "2.5"}, weight="w")
    assert found.numbers == {"weight": 2.5} and "weight" in found.columns_read
    with pytest.raises(UnusableRow, match="its weight is 0"):
        parse(row | {"w": 0}, weight="w")
    for value, word in ((None, "null"), ("", "empty")):
        with pytest.raises(InconsistentRow, match=f"w must be a number, not {word}"):
            parse(row | {"w": value}, weight="w")
    for weight, words in ((-1, "above 0, not -1"), ("nan", "finite number, not 'nan'"), (True, "finite number")):
        with pytest.raises(UserError, match=f"w must be a .*{words}"):
            parse(row | {"w": weight}, weight="w")


# Alpaca's input


def test_alpacas_input_follows_the_instruction_where_its_column_is_given():
    row = {"instruction": "Add.", "input": "1 and 2", "completion": "3"}
    found = parse(row, sft=True, input="input")
    assert (found.prompt, found.responses) == ("Add.\n1 and 2", ("3",)) and found.columns_read >= {"prompt", "input"}
    assert parse(row | {"input": ""}, sft=True, input="input").prompt == "Add."
    pair = {"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4"}
    assert parse(pair, input="input").prompt == "Add.\n1 and 2"
    assert parse(pair, input="input", chat=True).prompt == [{"role": "user", "content": "Add.\n1 and 2"}]
    assert parse(row | {"input": None}, sft=True, input="input").prompt == "Add."
    with pytest.raises(UserError, match="input must be a text, not int"):
        parse(row | {"input": 3}, sft=True, input="input")
    with pytest.raises(UserError, match="columns.input=input: this row has no text prompt to append it to"):
        parse({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c", "input": "1 and 2"}, input="input")


# What has no known form

PAIR = {"chosen": [USER, YES], "rejected": [USER, NO]}
BAD = {
    "mixed": (PAIR | {"chosen": "a"}, "chosen and rejected must both be texts or both be messages"),
    "one whole, one answer": (PAIR | {"chosen": [YES]}, "both be whole conversations, or both continue a prompt"),
    "no prompt": (
        {"chosen": [YES], "rejected": [NO]},
        "prompt is missing; responses that are single answers need a prompt",
    ),
    "system twice": (
        {"system": "a", "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
        "already has another system turn; columns.system=none",
    ),
    "nothing": ({}, "chosen must be a text, not missing"),
    "a response alone": (
        {"prompt": "a", "chosen": "b", "response": "c"},
        "rejected must be a text, not missing; the row's columns: prompt, chosen, response; set columns.rejected=NAME",
    ),
    "one response": ({"messages": [USER, YES]}, "set columns.chosen=NAME, or loss=sft to train on messages$"),
    "no dialogue": (
        {"chosen": "a", "rejected": "b"},
        "a row without dialogues needs a prompt; set columns.prompt",
    ),
    "a list": ([1], "must be an object"),
}


MESSAGES = {
    "an unknown role": (
        PAIR | {"chosen": [{"role": "bot", "content": "a"}, YES]},
        "turn 1 must have one of the",
    ),
    "no role": (
        PAIR | {"chosen": [{"content": "a"}, YES]},
        "chosen, turn 1 must be a message with role and content, no",
    ),
    "other names": (PAIR | {"chosen": [{"by": "human", "text": "a"}, YES]}, "turn 1 must be .* not with by, text"),
    "content a list": (PAIR | {"rejected": [{"role": "user", "content": ["a"]}, NO]}, "content of rejected, turn 1"),
    "content a number": (PAIR | {"rejected": [USER, {"role": "assistant", "content": 3}]}, "must be a text, not int"),
    "a surrogate": (PAIR | {"chosen": [{"role": "user", "content": "\ud800"}, YES]}, "half of a surrogate pair"),
    "a turn that is text": (PAIR | {"chosen": ["hi", YES]}, "turn 1 must be a message with role and content, not str"),
    "a system turn later": (PAIR | {"chosen": [USER, SYSTEM, YES]}, "a system turn that is not its first turn"),
    "tools": (PAIR | {"tools": "{"}, "tools is not JSON"),
    "tools of text": (PAIR | {"tools": [3]}, "tools must be a list of functions"),
    "a list as text": ({"prompt": "Hi.", "responses": "a"}, "responses must be a list or its JSON, not 'a'"),
}


@pytest.mark.parametrize("row, words", MESSAGES.values(), ids=MESSAGES)
def test_a_message_of_another_form_is_refused_with_its_column(row, words):
    with pytest.raises(UserError, match=words):
        parse(row)


@pytest.mark.parametrize("row, words", BAD.values(), ids=BAD)
def test_a_row_of_another_form_is_refused(row, words):
    columns = find_columns(row if isinstance(row, dict) else (), {}, "data")
    with pytest.raises(UserError, match=words) as caught:
        parse_row(row, columns, RowOptions())
    assert not isinstance(caught.value, UnusableRow)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"chosen": [USER, USER], "rejected": [USER, USER]}, "the last turn of a conversation is not the assistant's"),
        ({"chosen": [USER | {"content": " "}, YES], "rejected": [USER | {"content": " "}, NO]}, "a turn is empty"),
        (PAIR | {"chosen": None}, "a response is empty"),
        (PAIR | {"chosen": []}, "a response is empty"),
        ({"prompt": "Hi.", "chosen": "a", "rejected": None}, "a response is empty"),
        ({"prompt": "Hi.", "responses": None}, "a response is empty"),
        ({"prompt": "Hi.", "responses": ["a", None], "scores": [1, 2]}, "a response is empty"),
        ({"prompt": "Hi.", "responses": ["a"], "scores": [1]}, "it has too few responses"),
        ({"prompt": "Hi.", "responses": "[]", "scores": []}, "it has too few responses"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "the prompt is empty"),
        ({"prompt": [], "chosen": [YES], "rejected": [NO]}, "the prompt is empty"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_told_from_one_of_another_form(row, reason):
    with pytest.raises(UnusableRow, match=f"^{reason}$") as caught:
        parse(row)
    assert not isinstance(caught.value, InconsistentRow)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER, SO], "chosen": [YES], "rejected": [NO]},
        {"prompt": [SYSTEM], "chosen": "a", "rejected": "b"},
        {"chosen": [YES, USER, SO], "rejected": [NO, USER, SO]},
    ],
)
def test_a_response_after_another_turn_than_the_users_or_a_tools_may_be_dropped(row):
    with pytest.raises(InconsistentRow, match="^the turn before a response is not the user's or a tool's$"):
        parse(row)


def test_a_column_that_orders_responses_is_refused_where_there_is_one_response():
    row = {"prompt": "Hi.", "completion": "a", "best": 0}
    with pytest.raises(UserError, match="^columns.preferred=best: data has no two responses; its columns: best, comp"):
        parse(row, sft=True, preferred="best")
    with pytest.raises(UnusableRow, match="^a response is empty$"):  # it may be the better one
        parse({"prompt": "Hi.", "response_0": "a", "response_1": None, "better_response_id": 1}, sft=True)
    with pytest.raises(UserError, match="^columns.preference_strength=strength: compares two responses, not 4$"):
        parse(FOUR | {"strength": 1}, preference_strength="strength")


def test_helpsteers_scores_order_its_responses():
    row = {"prompt": "Hi.", "response_1": "a", "response_2": "b", "score_1": 2, "score_2": 3}
    assert best(parse(row, score_chosen="score_1", score_rejected="score_2")) == ("b", "a")


def test_sft_names_all_columns_that_it_could_train_on():
    words = (
        "chosen, completion or messages must be a text, not missing; the row's columns: text; set columns.completion"
    )
    with pytest.raises(UserError, match=words):
        parse({"text": "a"}, sft=True)
