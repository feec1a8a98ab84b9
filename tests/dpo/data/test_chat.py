"""Conversations rendered by chat templates: what is trained on, token by token, for eight families."""

from dataclasses import replace

import pytest
from chat_families import CHATML, END, FAMILIES, SYSTEM, TURNS, answer
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.chat import ChatTemplate, RowFormatter
from dpo.data.examples import TextExample, Tokenization
from dpo.data.messages import InconsistentRow, UnusableRow
from dpo.data.rows import Row
from dpo.system.errors import UserError

TOKENIZERS = {name: family.tokenizer() for name, family in FAMILIES.items()}
families = pytest.mark.parametrize("name", FAMILIES)


def whole_ids(tokenizer, turns):
    return list(tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"])


def example_of(tokenizer, prompt, *answers, lengths=(400, 300), add_bos=False, **keys):
    text = RowFormatter("auto", tokenizer)(Row(prompt, tuple(map(answer, answers)), **keys), 1, "data")
    return Tokenization(tokenizer, *lengths, add_bos)([text])[0]


# The families, by hand


@families
def test_the_prompt_and_what_is_trained_on_are_what_was_derived_by_hand(name):
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    example = example_of(tokenizer, family.turns(), "Yes.", "No.")
    assert example.text.prompt == family.prompt
    assert example.text.responses == (family.trained, family.trained.replace("Yes", "No"))
    assert tokenizer.decode(example.prompt) == family.prompt
    for ids, text in zip(example.responses, example.text.responses, strict=True):
        assert tokenizer.decode(ids) == text
        assert ids[-1] == tokenizer.convert_tokens_to_ids(family.end_of_turn)
        assert ids.count(ids[-1]) == 1
    assert example.prompt.count(tokenizer.bos_token_id) == family.n_bos
    assert example.truncated == ()


@families
def test_prompt_and_response_are_the_tokens_of_the_whole_conversation_tokenized_once(name):
    """What the template writes after the end of the turn is left out: a line break, or Phi's end of text."""
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    example = example_of(tokenizer, family.turns(), "Yes.", "No.")
    for text, ids in zip(("Yes.", "No."), example.responses, strict=True):
        whole = whole_ids(tokenizer, [*family.turns(), answer(text)])
        n = len(example.prompt) + len(ids)
        assert example.prompt + ids == whole[:n]
        assert tokenizer.decode(whole[n:]) in ("", "\n", f"\n{END}")


@families
def test_generation_stops_at_the_end_of_a_turn_and_at_the_end_of_a_text(name):
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    names = dict.fromkeys((family.end_of_turn, family.eos))
    assert ChatTemplate.of(tokenizer).stops() == [tokenizer.convert_tokens_to_ids(token) for token in names]


@families
def test_there_is_one_bos_where_add_bos_asks_for_it_whether_or_not_the_template_writes_it(name):
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    if family.bos is not None:
        example = example_of(tokenizer, family.turns(), "Yes.", add_bos=True)
        assert example.prompt[0] == tokenizer.bos_token_id
        assert example.prompt.count(tokenizer.bos_token_id) == 1


TEXT = st.text("ab .\n<|é", min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(list(FAMILIES)), TEXT, st.lists(TEXT, min_size=1, max_size=5), TEXT, TEXT)
def test_any_conversation_has_one_end_of_turn_to_train_on_and_no_prompt_token(name, system, texts, chosen, rejected):
    """A conversation that a template trims or merges is refused; any other is the whole one's tokens, in its order."""
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    texts = texts if len(texts) % 2 else texts[:-1] or texts
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    prompt = [{"role": "system", "content": system}, *turns] if family.system else turns
    try:
        example = example_of(tokenizer, prompt, chosen, rejected, lengths=(2000, 1000))
    except InconsistentRow:
        return
    end = tokenizer.convert_tokens_to_ids(family.end_of_turn)
    assert example.prompt.count(tokenizer.bos_token_id) == family.n_bos
    for text, ids in zip((chosen, rejected), example.responses, strict=True):
        assert ids.count(end) == 1 and ids[-1] == end
        whole = whole_ids(tokenizer, [*prompt, answer(text)])
        assert whole[: len(example.prompt)] == example.prompt
        assert whole[len(example.prompt) : len(example.prompt) + len(ids)] == ids
        assert text.strip() in tokenizer.decode(ids)
    shown, place = tokenizer.decode(example.prompt), 0
    for text in texts:
        place = shown.index(text.strip(), place) + len(text.strip())


# What is refused, dropped or said


def row_of(*texts, **keys):
    return Row([{"role": "user", "content": "Hi."}], tuple(map(answer, texts)), **keys)


def chatml(template=CHATML):
    return replace(FAMILIES["ChatML"], template=template).tokenizer()


def test_a_template_whose_prompt_does_not_begin_the_whole_is_refused_with_the_texts_around_the_difference():
    """This one asks for thoughts where an answer is to come, and writes none where it has come."""
    template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'")
    with pytest.raises(InconsistentRow) as caught:
        example_of(chatml(template), row_of("Yes.").prompt, "Yes.")
    words = str(caught.value)
    assert words.startswith(
        "the rendered conversation does not begin with the rendered prompt (at character 53 the prompt has "
    )
    assert "assistant\\n<think>'" in words and "assistant\\nYes.<|im_end|>\\n'" in words


def test_a_template_that_changes_a_response_or_leaves_out_a_turn_is_refused():
    shouts = chatml(CHATML.replace("m.content", "m.content | replace('Yes', 'YES')"))
    with pytest.raises(InconsistentRow, match="the chat template changes the response"):
        example_of(shouts, TURNS, "Yes.")
    template = CHATML.replace("in messages %}", "in messages if m.role != 'system' %}")
    deaf = chatml(template)
    example_of(deaf, TURNS, "Yes.")
    with pytest.raises(InconsistentRow, match="leaves out or changes a turn of the system"):
        example_of(deaf, [SYSTEM, *TURNS], "Yes.")


def test_what_a_template_refuses_is_refused_in_its_words():
    with pytest.raises(InconsistentRow, match=r"the chat template refuses it \(System role not supported\)"):
        example_of(TOKENIZERS["Gemma"], [SYSTEM, *TURNS], "Yes.")
    with pytest.raises(InconsistentRow, match=r"the chat template refuses it \(roles must alternate\)"):
        example_of(TOKENIZERS["Mistral"], [TURNS[0], TURNS[0]], "Yes.")


def test_tokens_that_join_prompt_and_response_are_refused():
    """A template without line breaks, so that "a" of the prompt and "ab" of the answer become other tokens."""
    plain = chatml("{%- for m in messages %}{{ m.content }}{% endfor -%}")
    pieces = [plain.convert_tokens_to_ids(token) for token in ("i", "in")]
    assert None not in pieces and plain("in", add_special_tokens=False)["input_ids"] == [pieces[1]]
    with pytest.raises(UserError) as caught:
        example_of(plain, [{"role": "user", "content": "i"}], "n")
    words = "data, row 1: the conversation's tokens do not begin with the prompt's tokens (at token 0 the prompt"
    assert str(caught.value).startswith(words)


def test_an_answer_gets_an_end_where_the_template_writes_none():
    plain = chatml("{%- for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor -%}"
                   "{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif -%}")  # fmt: skip
    template = ChatTemplate.of(plain)
    assert (template.end_of_turn, template.writes_end) == (END, False)
    example = example_of(plain, row_of().prompt, "Yes.")
    assert example.text.responses == (f"Yes.{END}",)
    assert example.responses[0][-1] == plain.eos_token_id and example.responses[0].count(plain.eos_token_id) == 1


@pytest.mark.parametrize("place", ["prompt", "response"])
@pytest.mark.parametrize("name", ["ChatML", "Llama-3", "Zephyr"])
def test_a_turn_that_holds_a_special_token_is_not_trained_on(name, place):
    """As text it would end the turn, or begin another."""
    forged = f"Hi{FAMILIES[name].end_of_turn} and more"
    turns = [{"role": "user", "content": forged if place == "prompt" else "Hi."}]
    with pytest.raises(UnusableRow, match="a turn contains a special token"):
        example_of(TOKENIZERS[name], turns, forged if place == "response" else "Yes.")


def test_eos_within_a_rendered_conversation_is_normal():
    example = example_of(TOKENIZERS["Zephyr"], TURNS, "Yes.")
    assert example.prompt.count(TOKENIZERS["Zephyr"].eos_token_id) == 3


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = FAMILIES["ChatML"].tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="the tokenizer has no chat template; .* prompt_format=hh"):
        RowFormatter("auto", tokenizer)(row_of("Yes."), 1, "data")


def test_a_template_that_fails_on_any_conversation_or_writes_no_answer_is_refused():
    for template, words in (("{{ nothing.at.all }}", "the chat template fails"), ("{{ 'Hi' }}", "does not write")):
        with pytest.raises(UserError, match=words) as caught:
            ChatTemplate.of(chatml(template))
        assert not isinstance(caught.value, UnusableRow)


def test_tools_and_thoughts_go_to_the_template():
    template = "{{- (tools | map(attribute='name') | join(' ')) + ' ' if tools else '' -}}" + CHATML
    example = example_of(chatml(template), TURNS, "Yes.", tools=[{"name": "clock"}, {"name": "map"}])
    assert example.text.prompt.startswith("clock map <|im_start|>user")
    thought = example_of(TOKENIZERS["Qwen"], TURNS, "<think>\nWell.\n</think>\n\nYes.")
    assert thought.text.responses == ("<think>\nWell.\n</think>\n\nYes.<|im_end|>",)
    earlier = [TURNS[0], answer("<think>\nWell.\n</think>\n\nHello."), TURNS[2]]
    assert (
        example_of(TOKENIZERS["Qwen"], earlier, "Yes.").text.prompt
        == example_of(TOKENIZERS["Qwen"], TURNS, "Yes.").text.prompt
    )


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "clock"}}]}
NAMES = "(m.tool_calls or []) | map(attribute='function.name') | join(' ')"
WITH_CALLS = CHATML.replace("m.content", f"m.content + ({NAMES})")


def test_a_call_of_a_tool_is_trained_on():
    example = RowFormatter("auto", chatml(WITH_CALLS))(Row(TURNS[:1], (CALL, answer("Yes."))), 1, "data")
    assert example.responses == ("clock<|im_end|>", "Yes.<|im_end|>")


@pytest.mark.parametrize(
    "row, reason",
    [
        (Row(TURNS[:1], (answer("Yes."),), tools=[{"type": "function", "function": {"name": "clock"}}]), "the tools"),
        (Row(TURNS[:1], (CALL,)), "a call of a tool"),
        (Row([TURNS[0], CALL, {"role": "tool", "content": "noon"}], (answer("Yes."),)), "a call of a tool"),
    ],
)
def test_a_template_that_has_no_place_for_tools_is_not_trained_on_in_silence(row, reason):
    """Of a call alone an empty turn would be trained on."""
    with pytest.raises(InconsistentRow, match=f"the chat template leaves out {reason}"):
        RowFormatter("auto", TOKENIZERS["ChatML"])(row, 1, "data")


def test_what_a_tool_returned_may_be_written_as_json_and_not_left_out():
    returned = [TURNS[0], answer("Hello."), {"role": "tool", "content": 'at "noon"'}]
    as_json = CHATML.replace("m.content + '", "(m.content if m.role != 'tool' else m.content | tojson) + '")
    assert example_of(chatml(as_json), returned, "Yes.").text.prompt.count('at \\"noon\\"') == 1
    without = "{%- set messages = messages | rejectattr('role', 'equalto', 'tool') | list -%}" + CHATML
    with pytest.raises(InconsistentRow, match="leaves out or changes what a tool returned"):
        example_of(chatml(without), returned, "Yes.")


# Truncation


def sizes(name, turns):
    return len(example_of(TOKENIZERS[name], turns, "Yes.").prompt)


@families
def test_an_over_long_conversation_loses_its_oldest_turns_and_never_its_system_turn(name):
    """With room for one token less than all, the first turn of the user goes, and its answer with it."""
    tokenizer, system = TOKENIZERS[name], FAMILIES[name].turns()[: FAMILIES[name].system]
    n = sizes(name, [*system, *TURNS])
    example = example_of(tokenizer, [*system, *TURNS], "Yes.", "No.", lengths=(n + 1, n - 1))
    short = example_of(tokenizer, [*system, TURNS[2]], "Yes.", "No.")
    assert example.truncated[0] == "oldest turns"
    assert example.prompt == short.prompt
    fits = example_of(tokenizer, [*system, *TURNS], "Yes.", lengths=(n + 20, n - 1))
    assert fits.truncated == () and len(fits.prompt) == n


def test_a_conversation_loses_no_more_turns_than_it_must():
    turns = [*TURNS[:2], *TURNS[:2], *TURNS[:2], TURNS[2]]
    n = sizes("ChatML", turns[2:])
    example = example_of(TOKENIZERS["ChatML"], turns, "Yes.", lengths=(2 * n, n))
    assert example.truncated == ()
    example = example_of(TOKENIZERS["ChatML"], turns, "Yes. " * n, lengths=(2 * n, n))
    assert example.truncated == ("oldest turns", "response")
    assert len(example.prompt) == n and len(example.responses[0]) == n


def test_a_last_turn_that_is_longer_than_a_prompt_may_be_is_never_cut_in_two():
    turns = [*TURNS[:2], {"role": "user", "content": "Tell me more. " * 20}]
    with pytest.raises(UserError, match="data, row 1: the last turn alone is longer than max_prompt_length"):
        example_of(TOKENIZERS["ChatML"], turns, "Yes.", lengths=(60, 40))


# Other formats


def test_hh_writes_turns_as_humans_and_assistants_and_eos_comes_after_the_response():
    tokenizer = TOKENIZERS["ChatML"]
    row = Row(TURNS, (answer("Yes."), answer("No.")))
    text = RowFormatter("hh", tokenizer)(row, 1, "data")
    prompt = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Bye?\n\nAssistant:"
    assert (text.prompt, text.responses, text.truncation) == (prompt, (" Yes.", " No."), "keep_end")
    with pytest.raises(UserError, match="prompt_format=hh supports only user and assistant turns"):
        RowFormatter("hh", tokenizer)(Row([SYSTEM, *TURNS], row.responses), 1, "data")


def test_texts_stay_as_they_are_and_text_refuses_messages():
    tokenizer = TOKENIZERS["ChatML"]
    texts = Row("Hi.", ("Yes.", "No."))
    for chosen in ("auto", "text", "hh"):
        expected = TextExample("Hi.", ("Yes.", "No."), "keep_end", 1, "data")
        assert RowFormatter(chosen, tokenizer)(texts, 1, "data") == expected
    with pytest.raises(UserError, match="prompt_format=text does not support"):
        RowFormatter("text", tokenizer)(row_of("Yes."), 1, "data")
    with pytest.raises(UserError, match="prompt_format=chat needs messages"):
        RowFormatter("chat", tokenizer)(Row("\n\nHuman: Hi.\n\nAssistant:", (" a",), every_target=False), 1, "data")
