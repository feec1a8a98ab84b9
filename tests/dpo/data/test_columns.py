"""Which column is taken for what."""

import pytest

from dpo.data.columns import find_columns
from dpo.system.errors import UserError


def test_of_several_columns_for_one_response_or_for_messages_the_first_is_taken():
    assert find_columns(["response", "completion"], {}, "data")["completion"] == "completion"
    assert find_columns(["conversation", "messages"], {}, "data")["messages"] == "messages"
    given = find_columns(["response", "completion"], {"completion": "response"}, "data")
    assert given["completion"] == "response"


def test_columns_are_found_by_their_names_or_given():
    found = find_columns(["instruction", "chosen", "worse"], {"rejected": "worse"}, "data")
    assert (found["prompt"], found["chosen"], found["rejected"]) == ("instruction", "chosen", "worse")
    assert not {"score_chosen", "responses", "preferred", "weight"} & found.keys()
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


@pytest.mark.parametrize("role", ["prompt", "chosen", "messages", "system", "label"])
def test_a_role_may_have_no_column(role):
    assert role in find_columns([role], {}, "data")
    assert role not in find_columns([role], {role: "none"}, "data")


def test_a_list_of_responses_is_found_only_where_there_are_no_other_responses():
    assert find_columns(["prompt", "answers", "scores"], {}, "data")["responses"] == "answers"
    for other in ("chosen", "completion", "messages"):
        assert "responses" not in find_columns(["prompt", "answers", other], {}, "data")
    with pytest.raises(UserError, match="the responses could be completions, or answers; set columns.chosen=NAME"):
        find_columns(["prompt", "answers", "completions"], {}, "data")


def test_messages_are_the_chosen_conversation_only_beside_a_rejected_response_alone():
    assert find_columns(["messages", "rejected_response"], {}, "data")["chosen"] == "messages"
    assert find_columns(["messages", "chosen", "rejected_response"], {}, "data")["chosen"] == "chosen"
    assert find_columns(["prompt", "rejected_response"], {}, "data")["chosen"] == "chosen"
