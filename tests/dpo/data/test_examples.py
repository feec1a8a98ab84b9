"""Tokenization, truncation, and the iterator's order."""

import hashlib
import json
import logging
import random
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import Listed, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dpo.data.batches import BatchIterator
from dpo.data.examples import TextExample, Tokenization, bos_notes, padding_id, special_token_problems
from dpo.system.errors import UserError

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
    example = Tokenization(Letters(), *lengths)([TextExample(prompt, responses, keep, 1, "")])[0]
    tokens = [[ord(letter) for letter in response] + [EOS] for response in responses]
    expected = originals_rule([ord(letter) for letter in prompt], tokens, keep, *lengths)
    assert (example.prompt, list(example.responses)) == expected


@many
@given(**PAIRS, add_bos=st.booleans())
def test_truncation_leaves_what_fits_and_a_token_a_side_and_tells_what_it_cut(
    prompt, responses, keep, lengths, add_bos
):
    max_length, max_prompt_length = lengths
    example = Tokenization(Letters(), max_length, max_prompt_length, add_bos)(
        [TextExample(prompt, responses, keep, 1, "")]
    )[0]
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
    assert example.truncated == tuple(what for what, there in cut.items() if there)


def test_one_over_long_response_cuts_the_other_though_it_fits():
    """Prompt 4 + longest 9 > 10; the prompt cut to 3 leaves 12 > 10; so both are cut to 10 - 3 = 7: 7 and 7 of 8."""
    item = TextExample("pqrs", ("abababab", "bbbbbbb"), "keep_end", 1, "")
    example = Tokenization(Letters(), 10, 3)([item])[0]
    assert example.prompt == [ord(letter) for letter in "qrs"]
    assert example.responses == ([ord(letter) for letter in "abababa"], [ord(letter) for letter in "bbbbbbb"])


# The iterator


def walk(sizes, batch_size, seed=0, **limits):
    """Make an iterator over groups of these sizes whose items are numbered from 1, and whose tokenizer does nothing."""
    numbers = iter(range(1, sum(sizes) + 1))
    groups = [
        [TextExample(f"{i}", ("a", "b"), "keep_end", next(numbers), "") for _ in range(n)] for i, n in enumerate(sizes)
    ]
    examples = Listed(groups, lambda texts: [SimpleNamespace(text=text) for text in texts])
    return BatchIterator(examples, Tokenization(Letters(), 20, 10), batch_size, seed, **limits)


def rows_of(batches):
    return [[example.text.row for example in batch.examples] for batch in batches]


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
    iterator.examples.tokenize = lambda items: tokenized.append(len(items)) or items
    list(iterator)
    assert sum(tokenized) == 8


def test_the_start_is_where_an_iterator_begins_that_was_walked_in_part():
    batches = walk(UNEVEN, 4, n_epochs=2)
    for _ in zip(range(7), batches, strict=False):
        pass
    assert rows_of(batches.from_start()) == rows_of(walk(UNEVEN, 4, n_epochs=2))
    assert batches.position == {"epoch": 1, "batch": 2}


def test_epochs_have_the_originals_order():
    """Its seeds are draws from NumPy's generator below 2**32; each epoch shuffles the list that the one before left."""
    seeds, order, expected = np.random.RandomState(3).randint(0, 2**32, size=3), list(range(8)), []
    for seed in seeds:
        random.Random(int(seed)).shuffle(order)
        expected += [[f"{i}" for i in order[:4]], [f"{i}" for i in order[4:]]]
    batches = walk([1] * 8, 4, seed=3, n_epochs=3)
    assert [[example.text.prompt for example in batch.examples] for batch in batches] == expected


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
    limited = rows_of(walk(UNEVEN, 4, n_epochs=1, n_examples=10, keep_last=True))
    assert limited == [rows[0], rows[1], rows[2][:2]]  # ten examples


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


# The fingerprint


class Named(Letters):
    """Letters that knows its vocabulary."""

    def get_vocab(self):
        return {"b": 2, "a": 1}


class Backed(Named):
    """A tokenizer that is made of one of the tokenizers library."""

    backend_tokenizer = SimpleNamespace(to_str=lambda: "rules and vocabulary")


@pytest.mark.parametrize(
    "tokenizer, vocabulary", [(Named(), "[('a', 1), ('b', 2)]"), (Backed(), "'rules and vocabulary'")]
)
def test_a_fingerprint_of_earlier_versions_depends_on_rules_and_texts_alone(tokenizer, vocabulary):
    groups = [
        [TextExample("p\ud800", ("a", "b"), "keep_end", 1, "mine", (2.0, 1.0))],
        [TextExample("q", ("c",), "keep_start", 2, "mine", label=True)],
    ]
    tokenize = Tokenization(tokenizer, 20, 10)
    batches = BatchIterator(Listed(groups, tokenize), tokenize, 2, n_epochs=1)
    rules = f"(({vocabulary}, (20, 10, False)), 2)"
    texts = "[('p\\ud800', ('a', 'b'), 'keep_end')]" + "[('q', ('c',), 'keep_start', True)]"
    assert batches.earlier_fingerprint() == hashlib.sha256((rules + texts).encode()).hexdigest()
    assert replace(batches, batch_size=1, seed=1, n_epochs=2).earlier_fingerprint() == batches.earlier_fingerprint()


# BOS


def test_bos_is_added_only_if_asked_for_even_to_a_tokenizer_that_would(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    item = TextExample("garden river", (" lamp",), "keep_end", 1, "")
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


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_tokenizer_that_adds_bos_where_training_does_not_or_the_reverse_gets_a_note(tiny_folder, add_bos):
    """Of the tiny families Llama and Gemma add BOS by themselves, GPT-2 has one and does not, the others have none."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    habit = {"<s>": True, "<bos>": True, "<|endoftext|>": False, None: None}[tokenizer.bos_token]
    notes = bos_notes(tokenizer, add_bos)
    if habit is None or habit == add_bos:
        assert notes == []
    else:
        (note,) = notes
        assert "model.add_bos=true" in note and tokenizer.bos_token in note and "\n" not in note
        assert note.startswith("Training puts" if add_bos else "The tokenizer puts")


def test_a_text_that_is_longer_than_the_tokenizer_expects_gets_no_warning(caplog, monkeypatch):
    """Training cuts it anyway; the tokenizer's model takes 256 tokens."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = tiny_tokenizer("gpt2")
    (example,) = Tokenization(tokenizer, 64, 32)([TextExample("garden " * 300, (" lamp",), "keep_end", 1, "")])
    assert len(example.prompt) == 32 and caplog.records == []
    tokenizer("garden " * 300)
    assert "longer than the specified maximum sequence length" in caplog.text


# Special tokens, and tokens beyond the model's embeddings


def special(**ids):
    """Make what is read of a tokenizer with these special tokens' ids."""
    fields = {f"{name}_token_id": ids.get(name) for name in ("eos", "bos", "pad")}
    return SimpleNamespace(**fields, eos_token="</s>", bos_token="<s>")


@pytest.mark.parametrize(
    "ids, add_bos, problems",
    [
        ({"eos": 2, "bos": 1}, True, []),
        ({"eos": 9}, False, []),
        ({"eos": 9, "bos": 10, "pad": 11}, False, []),  # a BOS or pad that is not used may be anything
        ({}, False, ["model.tokenizer_name_or_path: the tokenizer has no eos token, which must end each response$"]),
        ({"eos": 10}, False, ["model.tokenizer_name_or_path: .* eos token </s> has id 10, .* 10 embeddings"]),
        ({"eos": 2}, True, ["model.add_bos=true: the tokenizer has no bos token, set it to false"]),
        ({"eos": 2, "bos": 12}, True, ["model.add_bos=true: .* bos token <s> has id 12, .* 10 embeddings"]),
        ({"bos": 12}, True, ["no eos token", "bos token <s> has id 12, .*; choose the model's own tokenizer$"]),
    ],
)
def test_special_tokens_are_refused_only_if_they_are_used_and_cannot_be(ids, add_bos, problems):
    found = special_token_problems(special(**ids), 10, add_bos)
    assert len(found) == len(problems)
    assert all(re.search(words, line) for words, line in zip(problems, found, strict=True)), found


@pytest.mark.parametrize("pad, vocab_size, expected", [(None, 10, 2), (5, 10, 5), (10, 10, 2), (10, None, 10)])
def test_padding_is_the_tokenizers_pad_or_eos_where_the_model_has_no_such_id(pad, vocab_size, expected):
    assert padding_id(special(eos=2, pad=pad), vocab_size) == expected


class NamedLetters(Letters):
    def convert_ids_to_tokens(self, token_id):
        return f"<{chr(token_id)}>"


@pytest.mark.parametrize("prompt, responses", [("az", ("a", "b")), ("a", ("b", "az")), ("a", ("z",))])
def test_an_example_with_a_token_beyond_the_embeddings_is_refused_by_row_and_token(prompt, responses):
    tokenize = Tokenization(NamedLetters(), 20, 10, vocab_size=ord("z"))
    text = TextExample(prompt, responses, "keep_end", 7, "mine")
    with pytest.raises(UserError, match="mine, row 7: the text contains the token '<z>' with id 122, .* below 122"):
        tokenize([TextExample("a", ("b", "c"), "keep_end", 6, "mine"), text])
    for fits in (replace(tokenize, vocab_size=ord("z") + 1), replace(tokenize, vocab_size=None)):
        assert len(fits([text])) == 1


def test_a_token_beyond_the_embeddings_may_be_in_what_is_cut_off():
    """Prompt 4 + response 2 > 5, so the prompt is cut to its last 2 letters."""
    (example,) = Tokenization(NamedLetters(), 5, 2, vocab_size=ord("z"))(
        [TextExample("zabc", ("a",), "keep_end", 1, "")]
    )
    assert example.prompt == [ord("b"), ord("c")]


# Prompts without a token


class NoSpaces(Letters):
    """A tokenizer that strips white space."""

    def __call__(self, texts, **_):
        return super().__call__(["".join(text.split()) for text in texts])


def test_a_prompt_without_a_token_is_refused():
    text = TextExample(" ", ("a",), "keep_end", 7, "mine")
    with pytest.raises(UserError, match="mine, row 7: the prompt has no tokens"):
        Tokenization(NoSpaces(), 20, 10)([text])
    assert Tokenization(NoSpaces(), 20, 10, add_bos=True)([text])[0].prompt == [1]
