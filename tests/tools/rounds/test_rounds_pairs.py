"""Pairs of samples: which samples form one, what becomes of the others, and that training reads the rows."""

import json
from dataclasses import asdict
from itertools import combinations

import pytest
from conftest import TINY, inputs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tools.rounds.pairs import (
    DUPLICATE,
    EMPTY,
    KINDS,
    NO_SIMILAR_LENGTH,
    PAIRINGS,
    REASONS,
    TIED,
    TOO_CLOSE,
    TOO_FEW,
    UNFINISHED,
    UNSCORED,
    USABLE,
    make_pairs,
)
from tools.rounds.records import Prompt, Sample

TOKENIZER = AutoTokenizer.from_pretrained(TINY[0].split("=", 1)[1].strip("'"))


def prompt_of(number, prompt=None):
    text = f"Say {number}."
    return Prompt(number, prompt or text, text, [number + 1, 9])


def sample_of(prompt, index, text=None, n_tokens=3, finished=True):
    text = f" answer {index}" if text is None else text
    return Sample(f"round-1/{prompt}/{index}", prompt, index, text, [7] * n_tokens, finished)


def pair(scores, pairing="best_worst", min_margin=0, lengths=None, seed=0, name="round-1", prompt=0):
    """Pair samples of one prompt with these scores; return the indices (chosen, rejected) and the counts."""
    samples = [sample_of(prompt, i, n_tokens=lengths[i] if lengths else 3) for i in range(len(scores))]
    by_id = {sample.id: score for sample, score in zip(samples, scores, strict=True)}
    rows, counts = make_pairs([prompt_of(prompt)], {prompt: samples}, by_id, PAIRINGS[pairing], min_margin, seed, name)
    indices = [tuple(int(row[side].rsplit(maxsplit=1)[1]) for side in ("chosen", "rejected")) for row in rows]
    return indices, counts


def reason_of(counts):
    (reason,) = [reason for reason, n in counts.reasons.items() if n]
    return reason


# Which samples form a pair


def test_best_and_worst_are_a_pair_and_of_equal_ones_the_first():
    assert pair([1, 3, 0, 3, 0])[0] == [(1, 2)]


def test_all_pairs_are_those_of_different_scores_in_the_order_of_samples():
    assert pair([1, 3, 1, 0], "all")[0] == [(1, 0), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_the_best_is_paired_with_any_worse_one_and_the_draw_depends_on_seed_round_and_prompt():
    scores = [1, 5, 0, 5, 2, 3, 4, 1]
    draws = [pair(scores, "best_random", seed=seed)[0] for seed in range(60)]
    assert {one for ((one, _),) in draws} == {1}
    assert {other for ((_, other),) in draws} == {0, 2, 4, 5, 6, 7}
    for changed in ("seed", "name", "prompt"):
        values = range(60) if changed != "name" else [f"round-{i}" for i in range(60)]
        assert len({pair(scores, "best_random", **{changed: value})[0][0] for value in values}) == 6
    assert pair(scores, "best_random", seed=3) == pair(scores, "best_random", seed=3)


def test_a_random_one_is_drawn_among_those_with_the_margin():
    draws = [pair([4, 5, 0, 2], "best_random", min_margin=3, seed=seed)[0] for seed in range(30)]
    assert {other for ((_, other),) in draws} == {2, 3}


def test_length_matched_takes_the_largest_margin_among_similar_lengths():
    """100 and 80 are similar, 100 and 79 are not; (0, 3) has the larger margin of the similar ones."""
    assert pair([9, 0, 1, 5], "length_matched", lengths=[100, 79, 50, 80])[0] == [(3, 1)]
    assert pair([9, 0, 1, 2], "length_matched", lengths=[100, 79, 50, 80])[0] == [(0, 3)]
    indices, counts = pair([9, 0], "length_matched", lengths=[100, 79])
    assert indices == [] and reason_of(counts) == NO_SIMILAR_LENGTH
    assert pair([9, 0], "length_matched", lengths=[79, 100])[0] == []
    assert pair([9, 0], "length_matched", lengths=[80, 100])[0] == [(0, 1)]


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_ties_never_pair_and_the_margin_is_a_minimum(pairing):
    assert reason_of(pair([2, 2, 2], pairing)[1]) == TIED
    assert reason_of(pair([2, 1], pairing, min_margin=1.5)[1]) == TOO_CLOSE
    assert pair([2, 1], pairing, min_margin=1)[0] == [(0, 1)]
    assert reason_of(pair([2], pairing)[1]) == TOO_FEW


def test_some_samples_are_unusable_and_each_is_counted_by_the_first_reason():
    texts = [" a", " a", " ", " b", " c", " d", " c"]
    samples = [sample_of(0, i, text, finished=i != 3) for i, text in enumerate(texts)]
    scores = {sample.id: sample.index for sample in samples} | {samples[5].id: None}
    rows, counts = make_pairs([prompt_of(0)], {0: samples[::-1]}, scores, PAIRINGS["all"], 0, 0, "round-1")
    assert [(row["chosen"], row["rejected"], row["id"]) for row in rows] == [(" c", " a", "round-1/0/4>0")]
    expected = {UNFINISHED: 1, EMPTY: 1, DUPLICATE: 2, UNSCORED: 1, USABLE: 2}
    assert asdict(counts) == {
        "prompts": 1, "paired": 1, "pairs": 1, "reasons": dict.fromkeys(REASONS, 0), "samples": expected,
    }  # fmt: skip
    assert counts.summary() == (
        "1 pairs of 1 of 1 prompts; samples: 1 unfinished, 1 empty, 2 duplicate, 1 unscored, 2 usable"
    )


def test_a_prompt_without_samples_is_counted():
    rows, counts = make_pairs([prompt_of(0)], {}, {}, PAIRINGS["all"], 0, 0, "round-1")
    assert rows == [] and reason_of(counts) == TOO_FEW
    assert counts.summary() == "0 pairs of 0 of 1 prompts, 1 without a pair (fewer than two usable samples); samples: 0"


SAMPLES = st.lists(
    st.tuples(
        st.sampled_from(["", " ", " a", " b", " c", " d"]),
        st.booleans(),
        st.none() | st.sampled_from([0, 0.25, 1, 2]),
        st.integers(1, 12),
    ),
    max_size=7,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.lists(SAMPLES, max_size=5), st.sampled_from(sorted(PAIRINGS)), st.sampled_from([0, 0.25, 1, 1.5]), st.randoms()
)
def test_every_prompt_and_every_sample_is_accounted_for(drawn, pairing, min_margin, rng):
    prompts = [prompt_of(number) for number in range(len(drawn))]
    samples, scores = {}, {}
    for number, kinds in enumerate(drawn):
        samples[number] = [sample_of(number, i, text, n, done) for i, (text, done, _, n) in enumerate(kinds)]
        scores |= {sample.id: kind[2] for sample, kind in zip(samples[number], kinds, strict=True)}
    rows, counts = make_pairs(prompts, samples, scores, PAIRINGS[pairing], min_margin, 0, "round-1")
    in_disorder = {number: rng.sample(of_prompt, len(of_prompt)) for number, of_prompt in samples.items()}
    again = make_pairs(prompts, in_disorder, scores, PAIRINGS[pairing], min_margin, 0, "round-1")
    assert json.dumps([rows, asdict(counts)]) == json.dumps([again[0], asdict(again[1])])

    assert counts.prompts == len(prompts) == counts.paired + sum(counts.reasons.values())
    assert counts.paired == len({row["prompt"] for row in rows}) and counts.pairs == len(rows)
    assert sum(counts.samples.values()) == sum(map(len, drawn)) and set(counts.samples) == set(KINDS)
    assert len({row["id"] for row in rows}) == len(rows)
    for number, kinds in enumerate(drawn):
        texts = {}
        for text, done, score, _ in kinds:
            if done and text.strip() and score is not None:
                texts.setdefault(text, score)
        pairs = [(r["chosen"], r["rejected"]) for r in rows if r["prompt"] == prompts[number].prompt]
        possible = {
            pair
            for pair in combinations(texts, 2)
            if texts[pair[0]] != texts[pair[1]] and abs(texts[pair[0]] - texts[pair[1]]) >= min_margin
        }
        assert {tuple(sorted(each)) for each in pairs} <= {tuple(sorted(each)) for each in possible}
        assert bool(pairs) == bool(possible) or pairing == "length_matched"
        assert pairing != "all" or len(pairs) == len(possible)
        assert pairing == "all" or len(pairs) <= 1
    assert all(row["score_chosen"] >= row["score_rejected"] + max(min_margin, 1e-9) for row in rows)


# Training reads the rows


def rows_for(prompt):
    """Make rows of twelve prompts, of which each has samples of single letters with an end."""
    prompts = [prompt_of(number, prompt(number)) for number in range(12)]
    samples, scores = {}, {}
    for one in prompts:
        texts = [f" {answer} to question {one.id}." for answer in ("Yes", "No", "Nothing")]
        samples[one.id] = [
            Sample(f"round-1/{one.id}/{i}", one.id, i, text, [*map(token_of, text), TOKENIZER.eos_token_id], True)
            for i, text in enumerate(texts)
        ]
        scores |= {sample.id: (one.id + sample.index) % 3 + 0.5 for sample in samples[one.id]}
    return make_pairs(prompts, samples, scores, PAIRINGS["best_worst"], 0, 0, "round-1")[0]


def token_of(letter):
    (token,) = TOKENIZER(letter)["input_ids"]
    return token


TEMPLATE = "{%- for m in messages %}{{ m.role + ': ' + m.content }}{% endfor -%}{{ 'assistant:' }}"


@pytest.mark.parametrize("loss", ["odpo", "dpo"])
@pytest.mark.parametrize("is_chat", [False, True])
def test_training_reads_the_ids_and_the_scores_of_the_pairs(is_chat, loss, tmp_path):
    rows = rows_for(lambda number: [{"role": "user", "content": f"Say {number}."}] if is_chat else None)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "template").write_text(TEMPLATE)
    inputs = inputs_of(
        *TINY,
        f"loss={loss}",
        f"datasets=['{tmp_path / 'pairs.jsonl'}']",
        f"chat_template='{tmp_path / 'template'}'",
        f"local_dirs=['{tmp_path}']",
        "columns.score_chosen=score_chosen",
        "columns.score_rejected=score_rejected",
    )
    examples = [example for batches in (inputs.train_batches, inputs.eval_batches) for example in batches.examples]
    assert len(examples) == len(rows) == 12
    for example in examples:
        row = rows[example.text.row - 1]
        ids = row["sampled_ids"]
        assert (example.prompt, example.responses) == (ids["prompt"], (ids["chosen"], ids["rejected"]))
        assert example.text.scores == (row["score_chosen"], row["score_rejected"]) == (2.5, 0.5)
        assert example.text.original_prompt == row["prompt"]
