"""The forms that a row may have, and which columns are taken for what."""

import pytest

from dpo.data import rows
from dpo.data.messages import UnusableRow
from dpo.data.rows import Row, find_columns, parse_row
from dpo.settings.schema import Column
from dpo.system.errors import UserError

USER = {"role": "user", "content": "Hi."}
SYSTEM = {"role": "system", "content": "Be brief."}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))


def parse(row, sft=False, labels=False, **given):
    return parse_row(row, find_columns(row, given, "data"), sft, labels=labels)


def sides(row):
    return row.prompt, row.responses


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
    ],
)
def test_conversations_come_in_three_forms(row):
    found = parse(row)
    assert (found.prompt, found.responses) == ([USER], (YES, NO))


def test_the_prompt_of_whole_conversations_is_all_but_their_last_turn():
    turns = [SYSTEM, USER, YES, USER]
    assert parse({"chosen": [*turns, YES], "rejected": [*turns, NO]}).prompt == turns
    with pytest.raises(UnusableRow, match="the conversations differ in more than their last turn"):
        parse({"chosen": [USER, YES, USER, YES], "rejected": [USER, NO, USER, NO]})


@pytest.mark.parametrize(
    "row, prompt, target",
    [
        ({"prompt": "Hi.", "completion": " yes"}, "Hi.", " yes"),
        ({"prompt": "Hi.", "chosen": " yes"}, "Hi.", " yes"),
        ({"prompt": "Hi.", "chosen": " yes", "completion": " other"}, "Hi.", " yes"),
        ({"prompt": [USER], "completion": [YES]}, [USER], YES),
        ({"prompt": [USER], "completion": "Yes."}, [USER], YES),
        ({"messages": [SYSTEM, USER, YES]}, [SYSTEM, USER], YES),
        ({"chosen": [USER, YES]}, [USER], YES),
        ({"chosen": "\n\nHuman: Hi.\n\nAssistant: yes"}, "\n\nHuman: Hi.\n\nAssistant:", " yes"),
    ],
)
def test_sft_needs_no_rejected_response(row, prompt, target):
    found = parse(row, sft=True)
    assert (found.prompt, found.responses) == (prompt, (target,))
    with pytest.raises(UserError):
        parse(row)


def test_system_and_tools_columns_go_with_the_conversation():
    row = {"system": "Be brief.", "tools": '[{"name": "clock"}]', "chosen": [USER, YES], "rejected": [USER, NO]}
    found = parse(row)
    assert (found.prompt, found.tools) == ([SYSTEM, USER], [{"name": "clock"}])
    assert found.columns_read == {"chosen", "rejected", "system", "tools"}
    assert parse(row | {"system": None, "tools": None}).prompt == [USER]
    listed = parse(row | {"tools": [{"name": "clock", "at": None}]})
    assert listed.tools == [{"name": "clock"}]
    texts = parse({"prompt": "Hi.", "chosen": "a", "rejected": "b", "system": "Be brief."})
    assert texts.columns_read == {"prompt", "chosen", "rejected"}


SCORES = {"score_chosen": "first", "score_rejected": "second"}


def test_of_two_responses_the_one_with_the_higher_score_is_the_chosen_one():
    row = {"prompt": "Hi.", "chosen": "a", "rejected": "b"}
    assert parse(row | {"first": 2, "second": 1.5}, **SCORES).responses == ("a", "b")
    found = parse(row | {"first": "-1", "second": "3.5"}, **SCORES)  # a CSV file has texts
    assert (found.responses, found.extras["scores"]) == (("b", "a"), (3.5, -1.0))
    with pytest.raises(UnusableRow, match="both scores are equal"):
        parse(row | {"first": 1, "second": 1.0}, **SCORES)
    for score in (None, "much", float("nan")):
        with pytest.raises(UserError, match="first"):
            parse(row | {"first": score, "second": 1}, **SCORES)


# Rows of one response with a label


@pytest.mark.parametrize(
    "row, prompt, response",
    [
        ({"prompt": "Hi.", "completion": " yes"}, "Hi.", " yes"),
        ({"prompt": "Hi.", "response": " yes"}, "Hi.", " yes"),
        ({"prompt": [USER], "completion": [YES]}, [USER], YES),
        ({"prompt": [USER], "completion": "Yes."}, [USER], YES),
        ({"messages": [SYSTEM, USER, YES]}, [SYSTEM, USER], YES),
    ],
)
def test_a_completion_or_messages_may_have_a_label(row, prompt, response):
    for label in (True, False):
        found = parse(row | {"label": label}, labels=True)
        assert (found.prompt, found.responses, found.extras.get("label")) == (prompt, (response,), label)
        assert found.columns_read >= {"label"}


def test_sft_trains_on_desirable_responses_alone_and_reads_no_label_of_another_kind():
    row = {"prompt": "Hi.", "completion": "a"}
    for label in (True, 1, "True"):
        found = parse(row | {"label": label}, sft=True)
        assert (found.responses, found.extras.get("label")) == (("a",), None) and "label" in found.columns_read
    for label in (False, 0, "false"):
        with pytest.raises(UnusableRow, match="^the response is labelled undesirable$"):
            parse(row | {"label": label}, sft=True)
    for label in ("math", 3, None):
        assert "label" not in parse(row | {"label": label}, sft=True).columns_read
        with pytest.raises(UserError, match="label must be true or false"):
            parse(row | {"label": label}, sft=True, label="label")
    pair = {"prompt": "Hi.", "chosen": "a", "rejected": "b", "label": False}
    assert parse(pair, sft=True).responses == ("a", "b")


def test_a_label_is_true_or_false_1_or_0_or_their_text():
    values = {True: (True, 1, "true", "True", "1"), False: (False, 0, "false", "FALSE ", "0")}
    for label, written in values.items():
        for value in written:
            assert parse({"prompt": "Hi.", "completion": "a", "label": value}, labels=True).extras["label"] is label
    for value in (None, "", "good", 2, 0.5, [True]):
        with pytest.raises(UserError, match="^label must be true or false, not "):
            parse({"prompt": "Hi.", "completion": "a", "label": value}, labels=True)


def test_a_pair_stays_a_pair_whatever_label_it_has_unless_the_labels_column_is_given():
    row = {"prompt": "Hi.", "chosen": "a", "rejected": "b", "completion": "c", "label": 0}
    assert parse(row, labels=True).responses == parse(row).responses == ("a", "b")
    assert parse(row, labels=True).extras == {}
    found = parse(row, labels=True, label="label")
    assert (found.responses, found.extras.get("label")) == (("c",), False)


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


# Columns


def test_of_several_columns_for_one_response_or_for_messages_the_first_is_taken():
    assert find_columns(["response", "completion"], {}, "data")["completion"] == "completion"
    assert find_columns(["conversation", "messages"], {}, "data")["messages"] == "messages"
    given = find_columns(["response", "completion"], {"completion": "response"}, "data")
    assert given["completion"] == "response"


def test_columns_are_found_by_their_names_or_given():
    found = find_columns(["instruction", "chosen", "worse"], {"rejected": "worse"}, "data")
    assert (found["prompt"], found["chosen"], found["rejected"]) == ("instruction", "chosen", "worse")
    assert "score_chosen" not in found
    assert find_columns([], {}, "data")["prompt"] == "prompt"


@pytest.mark.parametrize(
    "found, given, words",
    [
        (
            ["question", "prompt", "chosen"],
            {},
            "data: prompt and question could each be the prompt; set columns",
        ),
        (
            ["instruction", "input"],
            {},
            "instruction and input could each be the prompt; .* its columns: input, i",
        ),
        (["chosen", "response_j"], {}, "chosen and response_j could each be the chosen"),
        (["a", "b"], {"prompt": "c"}, "columns.prompt=c: data has no such column; its columns: a, b"),
    ],
)
def test_an_ambiguous_or_missing_column_is_refused_with_the_list_of_columns(found, given, words):
    with pytest.raises(UserError, match=words):
        find_columns(found, given, "data")
    assert find_columns([*found, "c"], {"prompt": "c", "chosen": "c"}, "data")["prompt"] == "c"


def test_columns_are_found_in_capitals_and_with_spaces_around_them_if_there_is_none_without():
    found = find_columns(["Prompt", " chosen ", "REJECTED"], {}, "data")
    assert (found["prompt"], found["chosen"], found["rejected"]) == ("Prompt", " chosen ", "REJECTED")
    assert find_columns(["Prompt", "prompt"], {}, "data")["prompt"] == "prompt"
    for order in (["Prompt", "PROMPT"], ["PROMPT", "Prompt"]):
        with pytest.raises(UserError, match="PROMPT and Prompt could each be the prompt"):
            find_columns(order, {}, "data")
    with pytest.raises(UserError, match="or columns.input=Input to read it after the instruction"):
        find_columns(["Instruction", "Input"], {}, "data")


def test_alpacas_input_follows_the_instruction_where_its_column_is_given():
    row = {"instruction": "Add.", "input": "1 and 2", "completion": "3"}
    with pytest.raises(UserError, match="set columns.prompt=NAME, or columns.input=input to read it after the"):
        parse(row, sft=True)
    found = parse(row, sft=True, input="input")
    assert (found.prompt, found.responses) == ("Add.\n1 and 2", ("3",)) and found.columns_read >= {"prompt", "input"}
    assert parse(row | {"input": ""}, sft=True, input="input").prompt == "Add."
    pair = {"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4"}
    assert parse(pair, input="input").prompt == "Add.\n1 and 2"
    rendered = parse_row(pair, find_columns(pair, {"input": "input"}, "data"), sft=False, chat=True)
    assert rendered.prompt == [{"role": "user", "content": "Add.\n1 and 2"}]
    assert parse(row | {"input": None}, sft=True, input="input").prompt == "Add."
    with pytest.raises(UserError, match="input must be a text, not int"):
        parse(row | {"input": 3}, sft=True, input="input")
    with pytest.raises(UserError, match="columns.input=input: needs a text prompt, which this row does not have"):
        parse({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c", "input": "1 and 2"}, input="input")


# What has no known form

PAIR = {"chosen": [USER, YES], "rejected": [USER, NO]}
BAD = {
    "an unknown role": (
        PAIR | {"chosen": [{"role": "bot", "content": "a"}, YES]},
        "turn 1 must have one of the",
    ),
    "no role": (
        PAIR | {"chosen": [{"content": "a"}, YES]},
        "chosen, turn 1 must be a message with role and content, no",
    ),
    "other names": (PAIR | {"chosen": [{"by": "human", "text": "a"}, YES]}, "turn 1 must be .* not with by, text"),
    "content null": (
        PAIR | {"chosen": [{"role": "user", "content": None}, YES]},
        "content of chosen, turn 1 must",
    ),
    "content a list": (PAIR | {"rejected": [{"role": "user", "content": ["a"]}, NO]}, "content of rejected, turn 1"),
    "content a number": (PAIR | {"rejected": [USER, {"role": "assistant", "content": 3}]}, "must be a text, not int"),
    "a surrogate": (PAIR | {"chosen": [{"role": "user", "content": "\ud800"}, YES]}, "half of a surrogate pair"),
    "a turn that is text": (PAIR | {"chosen": ["hi", YES]}, "turn 1 must be a message with role and content, not str"),
    "no turns": (PAIR | {"chosen": []}, "chosen must be a list of messages, not empty"),
    "a dict": (PAIR | {"chosen": {"role": "user"}}, "the content of chosen must be a text, not NoneType"),
    "mixed": (PAIR | {"chosen": "a"}, "chosen and rejected must both be texts or both be messages"),
    "one whole, one answer": (PAIR | {"chosen": [YES]}, "both be whole conversations, or both be single answers"),
    "no prompt": (
        {"chosen": [YES], "rejected": [NO]},
        "prompt is missing; responses that are single answers need a prompt",
    ),
    "two system turns": (PAIR | {"chosen": [SYSTEM, SYSTEM, USER, YES]}, "a system turn that is not its first turn"),
    "system twice": (
        {"system": "a", "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
        "already has a system",
    ),
    "two answers": ({"chosen": [USER, YES, YES], "rejected": [USER, YES, NO]}, "must be the user's or a tool's"),
    "null": (PAIR | {"chosen": None}, "texts or both be messages"),
    "tools": (PAIR | {"tools": "{"}, "tools is not JSON"),
    "tools of text": (PAIR | {"tools": ["clock"]}, "tools must be a list of functions"),
    "nothing": ({}, "chosen must be a text, not missing"),
    "a response alone": (
        {"prompt": "a", "chosen": "b", "response": "c"},
        "rejected must be a text, not missing; the row's columns: prompt, chosen, response; set columns.rejected=NAME",
    ),
    "messages as JSON": (
        {"prompt": '[{"role": "user", ', "chosen": "a", "rejected": "b"},
        "prompt holds messages as a",
    ),
    "whole messages as JSON": (
        {"chosen": '[{"role": "user", "content": "a"}]', "rejected": "b"},
        "chosen holds messages as a text",
    ),
    "no dialogue": ({"chosen": "a", "rejected": "b"}, "not such a dialogue needs a prompt; set columns.prompt=NAME"),
    "messages as printed": ({"prompt": " [ {'content': ", "chosen": [YES], "rejected": [NO]}, "prompt holds messages"),
    "a list": ([1], "must be an object"),
}


@pytest.mark.parametrize("row, words", BAD.values(), ids=BAD)
def test_a_row_of_another_form_is_refused(row, words):
    columns = find_columns(row if isinstance(row, dict) else (), {}, "data")
    with pytest.raises(UserError, match=words) as caught:
        parse_row(row, columns, False)
    assert not isinstance(caught.value, UnusableRow)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"chosen": [USER, USER], "rejected": [USER, USER]}, "the last turn of a conversation is not the assistant's"),
        ({"chosen": [USER | {"content": " "}, YES], "rejected": [USER | {"content": " "}, NO]}, "a turn is empty"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_told_from_one_of_another_form(row, reason):
    with pytest.raises(UnusableRow, match=reason):
        parse(row)


def test_sft_names_all_columns_that_it_could_train_on():
    words = (
        "chosen, completion or messages must be a text, not missing; the row's columns: text; set columns.completion"
    )
    with pytest.raises(UserError, match=words):
        parse({"text": "a"}, sft=True)


def test_texts_that_are_rendered_as_turns_take_system_and_tools_along():
    row = {"system": "Be brief.", "question": "Hi.", "chosen": "Yes.", "rejected": "No.", "tools": [{"name": "clock"}]}
    found = parse_row(row, find_columns(row, {}, "data"), sft=False, chat=True)
    assert (found.prompt, found.responses) == ([SYSTEM, USER], (YES, NO)) and found.tools == [{"name": "clock"}]
    assert found.columns_read == {"prompt", "chosen", "rejected", "system", "tools"}
    assert sides(parse(row)) == ("Hi.", ("Yes.", "No.")) and parse(row).columns_read == {"prompt", "chosen", "rejected"}
    pair = {"prompt": "Hi.", "completion": "Yes."}
    assert sides(parse_row(pair, find_columns(pair, {}, "data"), sft=True, chat=True)) == ([USER], (YES,))


def test_two_rows_are_told_apart_by_all_that_a_template_sees():
    rows = [Row([USER], (YES, NO)), Row([SYSTEM, USER], (YES, NO)), Row([USER], (YES, NO), tools=[{"name": "clock"}])]
    assert len({row.texts[0] for row in rows}) == 3
    assert rows[0].texts[1] == ("Yes.", "No.")
    calls = YES | {"tool_calls": [{"name": "clock"}]}
    assert Row([USER], (calls, YES)).texts[1][0] != "Yes."


def test_a_further_column_of_numbers_goes_to_the_example(monkeypatch):
    """As Column(is_number=True) in ColumnSettings declares it; no column of today is one."""
    monkeypatch.setitem(rows.COLUMNS, "weight", Column(is_number=True))
    monkeypatch.setattr(rows, "NUMBERS", ["weight"])
    row = {"prompt": "Hi.", "chosen": "a", "rejected": "b", "w": "2.5"}
    parsed = parse(row, weight="w")
    assert parsed.extras == {"weight": 2.5} and "weight" in parsed.columns_read
    assert parse(row).extras == {}
    with pytest.raises(UserError, match="w must be a finite number, not 'nan'"):
        parse(row | {"w": "nan"}, weight="w")
