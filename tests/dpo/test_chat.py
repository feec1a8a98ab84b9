"""Conversations rendered by chat templates: what is trained on, token by token, for eight families."""

import pytest
from chat_families import END, FAMILIES, answer
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.chat import ChatTemplate, Rendering
from dpo.conversations import Row
from dpo.examples import InconsistentRow, Tokenization

TOKENIZERS = {name: family.tokenizer() for name, family in FAMILIES.items()}
families = pytest.mark.parametrize("name", FAMILIES)


def whole_ids(tokenizer, turns):
    """Render a whole conversation and tokenize it once, as transformers does."""
    return list(tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"])


def example_of(tokenizer, prompt, *answers, lengths=(400, 300), add_bos=False, **keys):
    """Render and tokenize a conversation with its responses."""
    text = Rendering("auto", tokenizer)(Row(prompt, tuple(map(answer, answers)), **keys), 1, "data")
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
    shown = tokenizer.decode(example.prompt)
    places = [shown.find(text.strip()) for text in texts]
    assert -1 not in places
