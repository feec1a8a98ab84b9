"""Conversations rendered by chat templates: what is trained on, token by token, for twelve families."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
from chat_families import CHATML, END, FAMILIES, SYSTEM, TIME, TURNS, answer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from dpo.data.chat import ChatTemplate, with_arguments_as_text
from dpo.data.examples import TextExample, Tokenization
from dpo.data.formatting import RowFormatter
from dpo.data.messages import A_THOUGHT, THOUGHT_KEYS, InconsistentRow, UnusableRow, as_messages, map_texts, map_tools
from dpo.data.places import texts_of
from dpo.data.records import Encoder
from dpo.data.rows import Row
from dpo.system.errors import UserError

TOKENIZERS = {name: family.tokenizer() for name, family in FAMILIES.items()}
TEMPLATES = {name: ChatTemplate.of(tokenizer, time=TIME) for name, tokenizer in TOKENIZERS.items()}
families = pytest.mark.parametrize("name", FAMILIES)


def whole_text(tokenizer, turns, tools=None, generate=False):
    """What transformers renders at TIME, with a template that it has not compiled before."""
    template = tokenizer.chat_template + "{# another one #}"
    with mock.patch.object(chat_template_utils, "datetime", SimpleNamespace(now=lambda: TIME)):
        return tokenizer.apply_chat_template(
            turns, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=generate
        )


def whole_ids(tokenizer, turns):
    return tokenizer(whole_text(tokenizer, turns), add_special_tokens=False)["input_ids"]


def example_of(tokenizer, prompt, *answers, lengths=(400, 300), add_bos=False, **keys):
    responses = tuple([answer(text)] for text in answers)
    return encode(tokenizer, Row(prompt, responses, **keys), lengths=lengths, add_bos=add_bos)


def encode(tokenizer, row, prompt_format="auto", lengths=(400, 300), add_bos=False):
    """The example of a row with one response, or with a pair, as a run makes it."""
    formatter = RowFormatter(prompt_format, tokenizer, time=TIME)
    encoder = Encoder(formatter, Tokenization(tokenizer, *lengths, add_bos), sft=len(row.responses) == 1)
    draft = encoder.draft(row if encoder.sft else replace(row, pairs=((0, 1),)))
    record = encoder.record(draft, encoder.tokenize.ids(draft.strings))
    return encoder.example(record, record.choices[0], 1, "data")


# The families, by hand


@families
def test_the_prompt_and_what_is_trained_on_are_what_was_derived_by_hand(name):
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    example = example_of(tokenizer, family.turns(), family.thought + "Yes.", family.thought + "No.")
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
    if family.thought:  # which the template leaves out of the whole conversation
        return
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
        example = example_of(tokenizer, family.turns(), family.thought + "Yes.", add_bos=True)
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
    except UnusableRow as error:
        assert isinstance(error, InconsistentRow) or chosen.strip() == rejected.strip()
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


# What a template leaves out

WORDS = st.sampled_from(
    ["ok", "user", "1", "tool", "Yes.", 'say "b"\nand c', "<b> & {c}", " padded ", "\u00e9\\n", "mark00000x"]
)
LEAVES = st.one_of(WORDS, st.integers(-3, 3), st.booleans(), st.none(), st.floats(-1, 1, width=16))
VALUES = st.recursive(LEAVES, lambda values: st.lists(values, max_size=2), max_leaves=3)
ARGUMENTS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=2)
CLOCK = {"name": "clock", "description": "Tells the time", "parameters": {"type": "object", "default": None}}
TOOLS = [{"type": "function", "function": CLOCK}]
STRUCTURAL = (
    "the chat template refuses it",
    "the rendered conversation does not begin with the rendered prompt",
    "the generation prompt opens a thought",
)


@st.composite
def turns_of(draw, role, features):
    """Draw a turn of a role in one of the forms of a message; the assistant's may have calls and thoughts."""
    turn = {"role": role, "content": draw(WORDS)}
    if role == "assistant" and "calls" in features and draw(st.booleans()):
        call = {"name": draw(WORDS), "arguments": draw(st.one_of(ARGUMENTS, ARGUMENTS.map(json.dumps)))}
        turn |= {"content": draw(st.sampled_from(["", "ok"])), "tool_calls": [{"type": "function", "function": call}]}
    if role == "assistant" and "thoughts" in features and draw(st.booleans()):
        thought, key = draw(WORDS), draw(st.sampled_from(["content", "reasoning_content", "thinking"]))
        turn[key] = f"<think>\n{thought}\n</think>\n\n{turn['content']}" if key == "content" else thought
    if draw(st.booleans()):
        turn["content"] = [{"type": "text", "text": text} for text in (turn["content"][:3], turn["content"][3:])]
    return turn | draw(st.sampled_from([{}, {"id": "x", "score": 3}]))


@st.composite
def conversations(draw):
    """Draw the name of a family, a prompt, a response of one or several turns, and tools."""
    name = draw(st.sampled_from(list(FAMILIES)))
    features = draw(st.sampled_from([(), ("calls",), ("thoughts",), ("calls", "thoughts"), ("tools",)]))
    start = draw(st.sampled_from([[], ["system"], ["developer"]]))
    exchange = st.sampled_from([["user", "assistant"], ["user", "assistant", "tool", "assistant"]])
    roles = [*start, *(role for part in draw(st.lists(exchange, max_size=2)) for role in part), "user"]
    between = draw(st.lists(st.sampled_from([["assistant"], ["user", "assistant"], ["tool", "assistant"]]), max_size=2))
    turns = [
        draw(turns_of(role, features)) for role in [*roles, "assistant", *(role for part in between for role in part)]
    ]
    messages = as_messages(turns, "a row", "user")
    if "</think>" not in messages[-1]["content"] and not messages[-1].keys() & set(THOUGHT_KEYS):
        messages[-1]["content"] = FAMILIES[name].thought + messages[-1]["content"]
    return name, messages[: len(roles)], messages[len(roles) :], TOOLS if "tools" in features else None


def with_other_text(messages, tools, number):
    """Put another text in place of the one with a number."""
    counter = itertools.count()

    def change(what, value):
        return "another text" if next(counter) == number else value

    return [map_texts(message, change) for message in messages], map_tools(tools, change)


def is_shown(template, messages, tools, number):
    """Whether transformers writes another text that stands in place of the one with a number."""
    messages, tools = with_other_text(messages, tools, number)
    if template.arguments_as_text:
        messages = [with_arguments_as_text(message) for message in messages]
    return "another text" in whole_text(template.tokenizer, messages, tools)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(conversations())
def test_every_text_is_shown_or_trained_on_or_named_where_the_conversation_is_refused(conversation):
    name, prompt, response, tools = conversation
    template, messages = TEMPLATES[name], [*prompt, *response]
    last = len(messages) - 1
    texts = texts_of(messages, tools)
    try:
        rendered = template.conversation(prompt, [response], tools).render()
    except InconsistentRow as error:
        if not error.reason.startswith(STRUCTURAL):
            what = error.reason.removeprefix("the chat template leaves out ")
            missing = [i for i, text in enumerate(texts) if text.what == what]
            assert not all(is_shown(template, messages, tools, number) for number in missing)
        return
    (segments,) = rendered.responses
    as_text = [with_arguments_as_text(message) if template.arguments_as_text else message for message in messages]
    whole = whole_text(template.tokenizer, as_text, tools)
    opens = rendered.prompt.endswith("<think>\n")
    assert opens or whole.startswith(rendered.prompt + "".join(segment.text for segment in segments))
    assert [segment.trained for segment in segments] == [i % 2 == 0 for i in range(len(segments))]
    for number, (turn, what, value) in enumerate(texts):
        if opens and turn == last and what == A_THOUGHT:
            assert value.strip() in segments[-1].text
        elif not (rendered.removed and turn < last and what == A_THOUGHT):
            assert is_shown(template, messages, tools, number), (what, value)
            others, other_tools = with_other_text(messages, tools, number)
            other = template.conversation(others[: len(prompt)], [others[len(prompt) :]], other_tools).render()
            is_trained = ["another text" in segment.text for segment in other.responses[0] if segment.trained]
            assert any(is_trained) == (turn >= len(prompt) and messages[turn]["role"] == "assistant")


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(conversations())
def test_tokens_are_those_of_the_whole_text_and_exactly_the_assistants_turns_are_trained_on(conversation):
    name, prompt, response, tools = conversation
    tokenizer = TOKENIZERS[name]
    try:
        example = encode(tokenizer, Row(prompt, (response,), tools=tools), lengths=(4000, 3000))
    except UnusableRow:
        return
    (segments,) = TEMPLATES[name].conversation(prompt, [response], tools).render().responses
    text = example.text.prompt + "".join(segment.text for segment in segments)
    (ids,) = example.responses
    assert example.prompt + ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    masks = example.loss_masks[0] if example.loss_masks else [True] * len(ids)
    pairs = zip(ids, masks, strict=True)
    runs = [(trained, [i for i, _ in run]) for trained, run in itertools.groupby(pairs, lambda pair: pair[1])]
    texts = [(trained, tokenizer.decode(run).strip()) for trained, run in runs]
    assert texts == [(segment.trained, segment.text.strip()) for segment in segments]


def row_of(*texts, **keys):
    return Row([{"role": "user", "content": "Hi."}], tuple([answer(text)] for text in texts), **keys)


def chatml(template=CHATML):
    return replace(FAMILIES["ChatML"], template=template).tokenizer()


# Responses of several turns, calls and thoughts, by hand

USER = {"role": "user", "content": "Hi."}
TOOL = {"role": "tool", "content": "noon"}
THOUGHT = {"role": "assistant", "content": "Hello.", "reasoning_content": "Be kind."}
CLOCK_CALL = {"type": "function", "function": {"name": "clock", "arguments": {"at": 1}}}
LOOK = {"role": "assistant", "content": "", "tool_calls": [CLOCK_CALL]}
EARLIER = "a thought of an earlier turn"


def render(name, *responses, prompt=(USER,), tools=None):
    template = TEMPLATES[name] if name in TEMPLATES else ChatTemplate.of(chatml(name))
    return template.conversation(list(prompt), responses, tools).render()


def test_each_turn_of_the_assistant_is_trained_on_with_its_end_and_what_others_say_is_not():
    rendered = render("ChatML", [answer("a"), USER, answer("b")], [answer("c")])
    context = "\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    chosen = (("a<|im_end|>", True), (context, False), ("b<|im_end|>", True))
    assert rendered.responses == (chosen, (("c<|im_end|>", True),))
    assert [text for text, trained in render("gpt-oss", [LOOK, TOOL, answer("b")]).responses[0] if trained] == [
        ' to=functions.clock<|channel|>commentary<|message|>{"at": 1}<|call|>',
        "<|channel|>final<|message|>b<|return|>",
    ]
    segments = render("Llama-3.1", [LOOK, TOOL, answer("b"), USER, answer("c")]).responses[0]
    assert [text for text, trained in segments if trained] == [
        '{"name": "clock", "parameters": {"at": 1}}<|eom_id|>', "b<|eot_id|>", "c<|eot_id|>",
    ]  # fmt: skip
    assert segments[1].text.endswith('"noon"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n')


def test_an_end_of_turn_in_another_turn_is_not_taken_for_that_of_an_empty_one():
    silent = TOOL | {"content": ""}
    assert render("Qwen3", [LOOK, silent, answer("b")]).responses[0][0].text.endswith("</tool_call><|im_end|>")
    assert render("ChatML", [answer(""), USER, answer("b")]).responses[0][0].text == "<|im_end|>"
    last = "{%- for m in messages %}{{ m.content + (eos_token if loop.last and not add_generation_prompt else '') }}"
    only_thought = render("Qwen3", [THOUGHT | {"content": ""}, USER, answer("b")])
    assert only_thought.responses[0][0] == ("<|im_end|>", True) and only_thought.removed == (EARLIER,)
    with pytest.raises(InconsistentRow, match="a turn of the response has no end of turn"):
        render(last + "{% endfor %}", [answer("a"), USER, answer("b")])


def test_a_token_that_may_begin_the_next_turn_is_not_taken_for_the_end_of_one():
    """Only the last answer has an end of turn; the next turn begins with a special token."""
    roles = "{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor -%}"
    roles += "{{- '<|assistant|>' if add_generation_prompt else '<|end|>' -}}"
    template = ChatTemplate.of(replace(FAMILIES["Phi"], template=roles).tokenizer())
    assert template.conversation([USER], [[answer("a")]], None).render().responses[0][0].text == "a<|end|>"
    with pytest.raises(InconsistentRow, match="a turn of the response has no end of turn"):
        template.conversation([USER], [[answer("a"), USER, answer("b")]], None).render()


def test_a_special_token_that_follows_the_last_text_of_a_call_is_not_taken_for_its_end():
    """The template quotes the argument with one; without another one as its end, the turn has none."""
    roles = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls -%}"
    call = "{{ '<|q|>' + m.tool_calls[0].function.name + '<|q|>' ~ m.tool_calls[0].function.arguments.at ~ '<|q|>}' }}"
    rest = "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor -%}"
    rest += "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"
    tokens = (*FAMILIES["ChatML"].tokens, "<|q|>", "<|call|>")
    for end in ("<|call|>", "stop"):
        text = f"{roles}{call}{end}{rest}"
        template = ChatTemplate.of(replace(FAMILIES["ChatML"], template=text, tokens=tokens).tokenizer())
        conversation = template.conversation([USER], [[LOOK, TOOL, answer("b")], [LOOK]], None)
        if end == "stop":
            with pytest.raises(InconsistentRow, match="a turn of the response has no end of turn"):
                conversation.render()
        else:
            responses = conversation.render().responses
            assert [segments[0].text for segments in responses] == ["<|q|>clock<|q|>1<|q|>}<|call|>"] * 2


def test_other_keys_that_a_template_reads_may_change_its_tokens():
    template = ChatTemplate.of(chatml(CHATML.replace("m.role +", "('<|im_start|>' if m.twice else '') + m.role +")))
    for twice in (False, True, False):
        turns = [answer("a"), USER | {"twice": twice}, answer("b")]
        context = template.conversation([USER], [turns], None).render().responses[0][1].text
        assert context.count("<|im_start|>") == 2 + twice


def test_a_template_without_an_end_of_turn_takes_responses_of_one_turn():
    template = "{%- for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor -%}{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif -%}"  # fmt: skip  # noqa: E501
    assert render(template, [answer("a")]).responses == ((("a" + END, True),),)
    with pytest.raises(InconsistentRow, match="writes no end of turn, so a response can have only one turn"):
        render(template, [answer("a"), USER, answer("b")])


def test_thoughts_of_earlier_turns_are_removed_where_the_template_does_so_and_named():
    in_content = answer("<think>\nBe kind.\n</think>\n\nHello.")
    for name, thought, rest in (
        ("Qwen3", THOUGHT, "Hello."),
        ("Qwen3", in_content, "Hello."),
        ("R1", THOUGHT, "Hello."),
        ("R1", in_content, "\n\nHello."),  # which is what this template writes
    ):
        plain = render(name, [answer("a</think>b")], prompt=[USER, answer(rest), USER])
        assert render(name, [answer("a</think>b")], prompt=[USER, thought, USER]) == replace(plain, removed=(EARLIER,))
    several = render("Qwen3", [THOUGHT, TOOL, THOUGHT, USER, THOUGHT])
    assert [text.count("Be kind.") for text, _ in several.responses[0]] == [0, 0, 0, 0, 1]
    kept = render("Qwen3", [THOUGHT, TOOL, THOUGHT])
    assert [text.count("Be kind.") for text, _ in kept.responses[0]] == [1, 0, 1] and kept.removed == ()


def test_a_pair_whose_prompt_loses_a_thought_on_one_side_alone_is_refused():
    prompt = [USER, THOUGHT | LOOK, TOOL]
    render("Qwen3", [answer("a"), USER, answer("b")], prompt=prompt)
    with pytest.raises(InconsistentRow, match="the prompt is rendered differently before each response"):
        render("Qwen3", [answer("a"), USER, answer("b")], [answer("c")], prompt=prompt)


def test_a_response_continues_the_thought_that_the_generation_prompt_opens():
    for response in (
        THOUGHT,
        answer("<think>\nBe kind.\n</think>\n\nHello."),
        answer("Be kind.\n</think>\n\nHello."),
    ):
        rendered = render("R1", [response])
        assert rendered.prompt.endswith("<|Assistant|><think>\n")
        assert rendered.responses == ((("Be kind.\n</think>\n\nHello.<|end|>", True),),)
    with pytest.raises(
        InconsistentRow, match="does not continue .write it as thought</think>answer, .* chat_template="
    ):
        render("R1", [answer("Hello.")])
    with pytest.raises(InconsistentRow, match="only the last turn of a response continues .set train_on=last"):
        render("R1", [THOUGHT, USER, THOUGHT])
    thinks = CHATML.replace("assistant\n'", "assistant\n' + ('' if enable_thinking is false else '<think>\n')")
    with pytest.raises(InconsistentRow, match="or set chat_template_args={enable_thinking: false}"):
        render(thinks, [answer("Hello.")])
    without = ChatTemplate.of(chatml(thinks), {"enable_thinking": False})
    assert without.conversation([USER], [[answer("Hello.")]], None).render().responses[0][0].text == "Hello.<|im_end|>"


@pytest.mark.parametrize(
    "name, response, words",
    [
        ("ChatML", [THOUGHT], "leaves out a thought .turn 2: 'Be kind.'; use chat_template=FILE with a place for it"),
        ("ChatML", [answer("a") | {"thinking": "user"}], "leaves out a thought .turn 2: 'user'"),
        ("ChatML", [LOOK, USER, answer("a")], "leaves out a call of a tool .turn 2: 'clock'"),
        ("gpt-oss", [LOOK | {"tool_calls": LOOK["tool_calls"] * 2}], "leaves out a call of a tool .turn 2: 'clock'"),
        ("Llama-3.1", [LOOK | {"content": "1"}], "leaves out a turn of the assistant .turn 2: '1'"),
        (CHATML.replace("m.content", "m.content + (m.tool_calls or []) | map(attribute='function.name') | join"),
         [LOOK], "leaves out an argument of a call .turn 2: 1; use"),
        (CHATML.replace("m.content", "m.content | replace('H', 'h')"), [answer("Hello.")],
         "changes a turn of the assistant .turn 2: 'Hello.' is not in 'hello."),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_named_even_if_the_same_text_stands_elsewhere(name, response, words):
    with pytest.raises(InconsistentRow, match=f"the chat template {words}"):
        render(name, response, prompt=[USER | {"content": "1 user clock"}])


def test_keys_without_meaning_for_a_template_change_nothing():
    special = FAMILIES["ChatML"].end_of_turn
    other = answer("a") | {"score": 3, "note": f"b{special}", "weight": None}
    assert render("ChatML", [other]) == render("ChatML", [answer("a")])
    named = CHATML.replace("m.role +", "m.role + (m.name or '') +")
    assert (
        "<|im_start|>assistantb"
        in render(named, [answer("a")], prompt=[USER, answer("a") | {"name": "b"}, USER]).prompt
    )
    with pytest.raises(UnusableRow, match="a turn contains a special token"):
        render(named, [answer("a")], prompt=[USER, answer("a") | {"name": special}, USER])


def test_an_empty_system_turn_is_what_the_template_makes_of_it():
    default = (
        "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif -%}" + CHATML
    )
    empty = SYSTEM | {"content": ""}
    assert render(default, [answer("a")]).prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert render(default, [answer("a")], prompt=[empty, USER]).prompt.startswith("<|im_start|>system\n<|im_end|>")


def test_a_template_that_only_writes_arguments_as_text_gets_them_so():
    assert TEMPLATES["R1"].arguments_as_text and not TEMPLATES["Qwen3"].arguments_as_text
    rendered = render("R1", [answer("a</think>b")], prompt=[USER, LOOK, TOOL])
    assert '<|call|>clock\n{"at": 1}<|end of call|>' in rendered.prompt


# Arguments and the time


def test_arguments_reach_the_template_and_those_that_it_does_not_read_are_refused():
    tokenizer = TOKENIZERS["gpt-oss"]
    template = ChatTemplate.of(tokenizer, {"reasoning_effort": "high"}, TIME)
    assert "Reasoning: high" in template.render(TURNS, None, True)
    with pytest.raises(
        UserError, match="^chat_template_args.effort: the chat template does not read it; it reads .*reasoning_effort"
    ):
        ChatTemplate.of(tokenizer, {"effort": "high"})
    with pytest.raises(UserError, match="^chat_template_args.messages: .* it reads none$"):
        ChatTemplate.of(TOKENIZERS["ChatML"], {"messages": []})


def test_a_template_sees_one_time_and_its_identity_changes_with_what_it_writes_of_it():
    for name, formats in (("gpt-oss", ("%Y-%m-%d",)), ("Llama-3.1", ("%d %b %Y",)), ("ChatML", ())):
        early, late = (ChatTemplate.of(TOKENIZERS[name], time=TIME.replace(hour=hour)) for hour in (1, 2))
        assert early.clock_formats == formats and early.identity == late.identity
        next_day = ChatTemplate.of(TOKENIZERS[name], time=TIME.replace(day=30))
        assert (next_day.identity == early.identity) == (not formats)
        texts = [template.render(TURNS, None, True) for template in (early, next_day, early)]
        assert texts[0] == texts[2] and (texts[0] == texts[1]) == (not formats)


# What is refused, dropped or said


def test_a_template_whose_prompt_does_not_begin_the_whole_is_refused_with_the_texts_around_the_difference():
    """This one names the answer where it is to come, and not where it has come."""
    template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\nAnswer:'")
    with pytest.raises(InconsistentRow) as caught:
        example_of(chatml(template), row_of("Yes.").prompt, "Yes.")
    words = str(caught.value)
    assert words.startswith(
        "the rendered conversation does not begin with the rendered prompt (at character 53 the prompt has "
    )
    assert "assistant\\nAnswer:'" in words and "assistant\\nYes.<|im_end|>\\n'" in words


def test_a_template_that_changes_a_response_or_leaves_out_a_turn_is_refused():
    shouts = chatml(CHATML.replace("m.content", "m.content | replace('Yes', 'YES')"))
    with pytest.raises(
        InconsistentRow, match="the chat template changes a turn of the assistant .turn 4: 'Yes.' is not in 'YES"
    ):
        example_of(shouts, TURNS, "Yes.")
    template = CHATML.replace("in messages %}", "in messages if m.role != 'system' %}")
    deaf = chatml(template)
    example_of(deaf, TURNS, "Yes.")
    with pytest.raises(
        InconsistentRow, match="leaves out a turn of the system .turn 1: 'Be brief.'; use chat_template=FILE"
    ):
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
    words = "the conversation's tokens do not begin with the prompt's tokens (at token 0 the prompt"
    assert str(caught.value).startswith(words)


def test_an_answer_gets_an_end_where_the_template_writes_none():
    plain = chatml("{%- for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor -%}"
                   "{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif -%}")  # fmt: skip
    template = ChatTemplate.of(plain)
    assert (template.end_of_turn, template.writes_end) == (END, False)
    example = example_of(plain, row_of().prompt, "Yes.")
    assert example.text.responses == (f"Yes.{END}",)
    assert example.responses[0][-1] == plain.eos_token_id and example.responses[0].count(plain.eos_token_id) == 1


def test_white_space_around_a_response_is_trained_on_or_what_the_template_trims_is_named():
    texts = ("\n\nYes.", "\nNo.\n")
    kept, trimmed = chatml(), chatml(CHATML.replace("m.content", "m.content | trim"))
    for tokenizer, expected, warnings in (
        (kept, ("\n\nYes.<|im_end|>", "\nNo.\n<|im_end|>"), ()),
        (trimmed, ("Yes.<|im_end|>", "No.<|im_end|>"), ("white space at the start or the end of a response",)),
    ):
        rendered = RowFormatter("auto", tokenizer, time=TIME).conversation(row_of(*texts)).render()
        assert tuple(segment.text for (segment,) in rendered.responses) == expected
        assert rendered.removed == warnings
    assert RowFormatter("auto", trimmed, time=TIME).conversation(row_of("Yes.", "No.")).render().removed == ()


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
        encode(tokenizer, row_of("Yes."))


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
    example = encode(chatml(WITH_CALLS), Row(TURNS[:1], ([CALL], [answer("Yes.")])))
    assert example.text.responses == ("clock<|im_end|>", "Yes.<|im_end|>")


@pytest.mark.parametrize(
    "row, reason",
    [
        (Row(TURNS[:1], ([answer("Yes.")],), tools=[{"type": "function", "function": {"name": "clock"}}]), "the tools"),
        (Row(TURNS[:1], ([CALL],)), "a call of a tool"),
        (Row([TURNS[0], CALL, {"role": "tool", "content": "noon"}], ([answer("Yes.")],)), "a call of a tool"),
    ],
)
def test_a_template_that_has_no_place_for_tools_is_not_trained_on_in_silence(row, reason):
    """Of a call alone an empty turn would be trained on."""
    with pytest.raises(InconsistentRow, match=f"the chat template leaves out {reason}"):
        encode(TOKENIZERS["ChatML"], row)


def test_what_a_tool_returned_may_be_written_as_json_and_not_left_out():
    returned = [TURNS[0], answer("Hello."), {"role": "tool", "content": 'at "noon"'}]
    as_json = CHATML.replace("m.content + '", "(m.content if m.role != 'tool' else m.content | tojson) + '")
    assert example_of(chatml(as_json), returned, "Yes.").text.prompt.count('at \\"noon\\"') == 1
    without = "{%- set messages = messages | rejectattr('role', 'equalto', 'tool') | list -%}" + CHATML
    with pytest.raises(InconsistentRow, match="leaves out what a tool returned"):
        example_of(chatml(without), returned, "Yes.")


# Truncation


def sizes(name, turns):
    return len(example_of(TOKENIZERS[name], turns, FAMILIES[name].thought + "Yes.").prompt)


@families
def test_an_over_long_conversation_loses_its_oldest_turns_and_never_its_system_turn(name):
    """With room for one token less than all, the first turn of the user goes, and its answer with it."""
    tokenizer, system = TOKENIZERS[name], FAMILIES[name].turns()[: FAMILIES[name].system]
    n = sizes(name, [*system, *TURNS])
    answers = [FAMILIES[name].thought + text for text in ("Yes.", "No.")]
    example = example_of(tokenizer, [*system, *TURNS], *answers, lengths=(n + 1, n - 1))
    short = example_of(tokenizer, [*system, TURNS[2]], *answers)
    assert example.truncated[0] == "oldest turns"
    assert example.prompt == short.prompt
    fits = example_of(tokenizer, [*system, *TURNS], answers[0], lengths=(n + 90, n - 1))
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
    with pytest.raises(UnusableRow, match="the last turn alone is longer than max_prompt_length"):
        example_of(TOKENIZERS["ChatML"], turns, "Yes.", lengths=(60, 40))


# Other formats


def test_hh_writes_turns_as_humans_and_assistants_and_eos_comes_after_the_response():
    tokenizer = TOKENIZERS["ChatML"]
    row = Row(TURNS, ([answer("Yes.")], [answer("No.")]))
    text = encode(tokenizer, row, "hh").text
    prompt = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Bye?\n\nAssistant:"
    assert (text.prompt, text.responses, text.truncation) == (prompt, (" Yes.", " No."), "keep_end")
    with pytest.raises(UserError, match="prompt_format=hh supports only user and assistant turns"):
        encode(tokenizer, Row([SYSTEM, *TURNS], row.responses), "hh")
    several = [answer("Yes."), TURNS[2], answer("No.")]
    with pytest.raises(UserError, match="supports only responses of one turn; set train_on=last"):
        encode(tokenizer, Row(TURNS, (several, several)), "hh")


def test_texts_stay_as_they_are_and_text_refuses_messages():
    tokenizer = TOKENIZERS["ChatML"]
    for chosen in ("auto", "text", "hh"):
        expected = TextExample("Hi.", ("Yes.", "No."), "keep_end", 1, "data")
        assert encode(tokenizer, Row("Hi.", ("Yes.", "No.")), chosen).text == expected
    with pytest.raises(UserError, match="prompt_format=text does not support"):
        encode(tokenizer, row_of("Yes."), "text")
    with pytest.raises(UserError, match="prompt_format=chat needs messages"):
        encode(tokenizer, Row("\n\nHuman: Hi.\n\nAssistant:", (" a",), every_target=False), "chat")
