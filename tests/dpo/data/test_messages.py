"""ShareGPT's messages and contents in parts become OpenAI's messages."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.columns import find_columns
from dpo.data.messages import InconsistentRow, as_message, as_messages, as_tools, comparable
from dpo.data.rows import RowOptions, parse_row
from dpo.system.errors import UserError

SHAREGPT = {"system": ["system"], "user": ["human", "user", "Human"], "assistant": ["gpt", "chatgpt", "assistant"]}
SHAREGPT["tool"] = ["tool", "observation", "function_response"]
CLOCK = {"name": "clock", "arguments": {"zone": "CET"}}


def parse(row, **options):
    return parse_row(row, find_columns(row, {}, "data"), RowOptions(**options))


def sides(row):
    return row.prompt, row.responses


TEXT = st.text("ab .\n[{é", min_size=1, max_size=12).filter(str.strip)


@st.composite
def conversations(draw):
    """Draw a conversation in the usual form that ends with the user or a tool, and the same one in other forms."""
    roles = ["system"] * draw(st.booleans()) + ["user", "assistant"] * draw(st.integers(0, 3))
    turns = [{"role": role, "content": draw(TEXT)} for role in [*roles, draw(st.sampled_from(["user", "tool"]))]]
    return turns, [other_form(draw, turn) for turn in turns]


def other_form(draw, turn):
    """Draw a message in ShareGPT's form or in parts, with the null fields that Arrow tables add."""
    content = turn["content"]
    if draw(st.booleans()):
        at = draw(st.integers(0, len(content)))
        content = [{"type": "text", "text": text, "image_url": None} for text in (content[:at], content[at:])]
    if draw(st.booleans()):
        return turn | {"content": content, "name": None}
    return {"from": draw(st.sampled_from(SHAREGPT[turn["role"]])), "value": content, "role": None}


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.data(), conversations())
def test_a_conversation_is_the_same_in_every_form(data, both):
    prompt, other = both
    chosen, rejected = ({"role": "assistant", "content": data.draw(TEXT)} for _ in range(2))
    answers = [other_form(data.draw, turn) for turn in (chosen, rejected)]
    rows = [
        {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]},
        {"prompt": other, "chosen": answers[0], "rejected": answers[1]},
        {"conversations": other, "chosen": answers[0], "rejected": answers[1]},  # as LLaMA-Factory has them
        {"messages": other, "chosen": chosen["content"], "rejected": rejected["content"]},
        {"chosen": [*other, answers[0]], "rejected": [*other, answers[1]], "conversation": other},
    ]
    for row in rows:
        assert sides(parse(row)) == (prompt, ([chosen], [rejected]))
    whole = {"conversations": [*other, answers[0]]}
    assert sides(parse(whole, sft=True)) == (prompt, ([chosen],))
    assert sides(parse(whole | {"label": False}, labels=True)) == (prompt, ([chosen],))


def test_a_function_call_becomes_a_call_of_a_tool():
    turns = [
        {"from": "human", "value": "What time is it?"},
        {"from": "function_call", "value": json.dumps(CLOCK)},
        {"from": "observation", "value": "12:00"},
        {"from": "gpt", "value": "Noon."},
    ]
    found = parse({"conversations": turns, "tools": json.dumps([{"name": "clock"}])}, sft=True)
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CLOCK}]}
    assert found.prompt[1:] == [call, {"role": "tool", "content": "12:00"}]
    assert found.tools == [{"name": "clock"}]
    several = as_message({"from": "function_call", "value": json.dumps([CLOCK, CLOCK])}, "a turn")
    assert len(several["tool_calls"]) == 2
    for value in ("{", "[]", "3", '{"arguments": {}}'):
        with pytest.raises(UserError, match="a turn is a function_call, "):
            as_message({"from": "function_call", "value": value}, "a turn")


CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": None, "at": [1.5, "a"]}}}


@pytest.mark.parametrize(
    "calls",
    [
        [{"type": "function", "function": {"name": "clock", "arguments": '{"zone": null, "at": [1.5, "a"]}'}}],
        [{"id": None, "type": "function", "function": CALL["function"] | {"parsed": None}}],
        json.dumps([CALL]),
    ],
)
def test_the_arguments_of_a_call_are_an_object_and_keep_their_nulls(calls):
    assert as_message({"role": "assistant", "content": None, "tool_calls": calls}, "a turn")["tool_calls"] == [CALL]
    for arguments in ("not JSON", '"Rome"', "3"):
        call = {"name": "clock", "arguments": arguments}
        assert as_message({"role": "assistant", "tool_calls": [call]}, "a turn")["tool_calls"] == [call]


def test_arguments_become_an_object_wherever_the_call_stands():
    texts = {"name": "clock", "arguments": '{"zone": "CET"}'}
    for message in (
        {"role": "assistant", "content": None, "tool_calls": [texts]},
        {"role": "assistant", "content": None, "function_call": texts},
        {"from": "function_call", "value": json.dumps(texts)},
        {"role": "tool_call", "content": json.dumps(texts)},
    ):
        (call,) = as_message(message, "a turn")["tool_calls"]
        assert call.get("function", call) == CLOCK
    empty = {"name": "clock", "arguments": ""}
    assert as_message({"role": "assistant", "tool_calls": [empty]}, "a turn")["tool_calls"][0]["arguments"] == {}
    for calls in ([3], {"name": "clock"}, "{"):
        with pytest.raises(InconsistentRow, match="the calls of a turn "):
            as_message({"role": "assistant", "content": "", "tool_calls": calls}, "a turn")


def test_the_parameters_of_a_tool_are_an_object_and_keep_their_nulls():
    schema = {"type": "object", "properties": {"zone": {"type": ["string", "null"], "default": None}}}
    tool = {"type": "function", "function": {"name": "clock", "parameters": schema}}
    as_text = {"type": "function", "function": {"name": "clock", "parameters": json.dumps(schema), "strict": None}}
    for value in ([tool], [as_text], json.dumps([tool]), [json.dumps(tool)], json.dumps([as_text])):
        assert as_tools(value, "tools") == [tool]


def test_an_empty_list_of_calls_is_no_call_and_a_null_text_is_empty():
    for calls in ([], None, ""):
        turn = {"role": "assistant", "content": "a", "tool_calls": calls, "refusal": None}
        assert as_message(turn, "a turn") == {"role": "assistant", "content": "a"}
    for role in ("system", "user", "assistant"):
        assert as_message({"role": role, "content": None}, "a turn") == {"role": role, "content": ""}
    assert as_messages(None, "chosen", "assistant") == [{"role": "assistant", "content": ""}]


def test_a_developer_turn_may_follow_the_system_turn():
    turns = [{"role": role, "content": "a"} for role in ("system", "developer", "user")]
    assert as_messages(turns, "prompt", "user") == turns
    for other in ([turns[0], *turns], [turns[2], turns[1]]):
        with pytest.raises(InconsistentRow, match="prompt has a system turn that is not its first turn"):
            as_messages(other, "prompt", "user")


def test_messages_are_compared_by_role_name_and_texts():
    call = {"id": "1", "function": CLOCK}
    turn = {"role": "assistant", "content": "a", "tool_calls": [call], "reasoning_content": "b"}
    same = {
        "role": "assistant",
        "content": "a",
        "score": 3,
        "tool_calls": [{"id": "2", "function": CLOCK}],
        "thinking": "b",
    }
    assert comparable(turn) == comparable(same)
    for other in ({"content": "c"}, {"reasoning_content": "c"}, {"tool_calls": [{"function": CLOCK | {"name": "c"}}]}):
        assert comparable(turn) != comparable(turn | other)


def test_other_keys_of_a_message_and_their_order_stay():
    message = {"content": "a", "name": "b", "role": "user"}
    assert list(as_message(message, "a turn").items()) == list(message.items())
    assert as_message({"from": "b", "role": "user", "content": "a"}, "a turn")["from"] == "b"
    assert as_messages({"from": "gpt", "value": "a"}, "chosen", "user") == [{"role": "assistant", "content": "a"}]


def test_a_part_that_is_no_text_makes_the_row_one_that_may_be_dropped():
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    words = r"a turn contains a part that is not text \(chosen, turn 1 has one of the type 'image_url'\)"
    with pytest.raises(InconsistentRow, match=words):
        parse({"chosen": [{"role": "user", "content": parts}], "rejected": [{"role": "user", "content": parts}]})


@pytest.mark.parametrize(
    "turn, words",
    [
        ({"from": "bot", "value": "a"}, "one of the roles system, .*, or ShareGPT's human and gpt, not 'bot'"),
        ({"from": "human"}, "the content of a turn must be a text, not NoneType"),
        (None, "a turn must be a message with role and content, not NoneType"),
        ({"from": "human", "value": 3}, "the content of a turn must be a text, not int"),
        ({"role": "user", "content": ["a"]}, "the content of a turn must be a text or a list of parts, not of str"),
        ({"role": "user", "content": [{"type": "text"}]}, "the content of a turn must be a text, not NoneType"),
    ],
)
def test_a_message_of_another_form_is_refused(turn, words):
    with pytest.raises(InconsistentRow, match=f"a message has a form that cannot be used .*{words}"):
        as_message(turn, "a turn")


def test_shareGPT_written_as_a_text_is_found_out():
    with pytest.raises(UserError, match="messages are written as a text that is not JSON"):
        parse({"prompt": "[{'from': 'human', 'value': 'a'}]", "chosen": "b", "rejected": "c"})
