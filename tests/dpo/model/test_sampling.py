"""Sampled texts: from the distribution that the settings name, within max_length, and never of padding."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, inputs_of, validated
from tiny_models import respond, tiny
from transformers import GenerationConfig

from dpo.model.decoding import CachedRows, StaticRows
from dpo.model.sampling import Sampler, add_stops, distinct_prompts


class Tokens:
    """Stands for a tokenizer: a text is the list of its ids."""

    eos_token_id, pad_token_id = 96, 0

    def batch_decode(self, ids: list[list[int]], skip_special_tokens: bool) -> list[list[int]]:
        assert skip_special_tokens
        return [[i for i in row if i not in (self.eos_token_id, self.pad_token_id)] for row in ids]


SAMPLER = Sampler(
    tokenizer=Tokens(),
    device=torch.device("cpu"),
    dtype=torch.float32,
    max_length=10,
    batch_size=4000,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    seed=0,
)
GREEDY = replace(SAMPLER, top_k=1)
BOTH = pytest.mark.parametrize("rows", [None, StaticRows], ids=["generate", "decoder"])  # on a CPU, on a GPU
PROMPT = (5, 17, 40)


@pytest.fixture(scope="module")
def model():
    """A model with an uncertain next token after PROMPT, never the end or padding."""
    model = tiny("GPT2", tie_word_embeddings=False)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(97), requires_grad=False)
    model.lm_head.bias[[Tokens.eos_token_id, Tokens.pad_token_id]] = -1e4
    return model


def kept(probabilities: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """A distribution cut to its k most likely tokens, or to the fewest whose probabilities reach p."""
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    n = top_k or int((before < top_p).sum())
    cut = torch.zeros_like(probabilities)
    cut[order[:n]] = probabilities[order[:n]]
    return cut / cut.sum()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The total variation between two distributions."""
    return float((one - other).abs().sum() / 2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.4}, {"temperature": 3.0}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 12, "temperature": 2.0}],
)
def test_tokens_have_the_distribution_that_the_settings_name(settings, model):
    """16,000 draws of the next token, whose frequencies lie within 0.05 of the true distribution."""
    logits = model(torch.tensor([PROMPT])).logits[0, -1].detach()
    plain = logits.softmax(0)
    probabilities = (logits / settings.get("temperature", 1.0)).softmax(0)
    expected = kept(probabilities, settings.get("top_k", 0), settings.get("top_p", 1.0))
    sampler = replace(SAMPLER, max_length=len(PROMPT) + 1, **settings)
    drawn = torch.tensor(sampler.generate(model, [respond(PROMPT, [1])] * 16_000, "sampling")).flatten()
    frequencies = drawn.bincount(minlength=97) / len(drawn)
    assert distance(frequencies, expected) < 0.05
    assert expected[drawn].min() > 0  # none is drawn that was cut off
    assert not settings or distance(expected, plain) > 0.12


@BOTH
def test_the_seed_alone_decides_what_is_drawn(rows, model):
    prompts = [respond(PROMPT, [1]), respond(PROMPT[:2], [1])]
    sampler = replace(SAMPLER, rows=rows)
    torch.manual_seed(1)
    first = sampler.generate(model, prompts, "sampling")
    torch.manual_seed(2)
    assert sampler.generate(model, prompts, "sampling") == first
    assert replace(sampler, seed=1).generate(model, prompts, "sampling") != first


def test_a_runs_settings_describe_its_samples():
    lengths = ("max_length=20", "max_prompt_length=10", "eval_batch_size=3")
    drawing = ("sample_temperature=0.5", "sample_top_k=7", "sample_top_p=0.9", "seed=5")
    settings, _ = validated("loss=dpo", *TINY, *lengths, *drawing)
    expected = replace(SAMPLER, max_length=20, batch_size=3, temperature=0.5, top_k=7, top_p=0.9, seed=5)
    assert Sampler.of(settings, SAMPLER.tokenizer, SAMPLER.device, SAMPLER.dtype) == expected


@BOTH
def test_prompt_and_sample_together_have_max_length_tokens(rows, model):
    for length, n in ((3, 7), (8, 2), (9, 1), (10, 1)):  # a prompt that leaves no room gets one token
        (sample,) = replace(SAMPLER, rows=rows).generate(model, [respond(range(20, 20 + length), [1])], "sampling")
        assert len(sample) == n


def test_a_decoder_draws_prompts_of_similar_length_together_and_returns_them_in_their_order(model):
    prompts = [respond(range(20, 20 + n), [1]) for n in (7, 2, 5, 6, 1)]
    lengths = []

    class Lengths(StaticRows):
        def __init__(self, model, prompts):
            super().__init__(model, prompts)
            lengths.append([len(prompt) for prompt in prompts])

    sampler = replace(SAMPLER, batch_size=2, rows=Lengths)
    texts = sampler.generate(model, prompts, "sampling")
    assert lengths == [[1, 2], [5, 6], [7]]
    assert [len(text) for text in texts] == [3, 8, 5, 4, 9]
    assert replace(sampler, batch_size=1).generate(model, prompts, "sampling") == texts


def test_a_decoder_samples_on_a_gpu(model):
    assert SAMPLER.fit(model) == SAMPLER
    assert replace(SAMPLER, device=torch.device("cuda")).fit(model).rows is CachedRows  # since this model is on a CPU


def test_padding_is_never_seen(model):
    """The most likely continuation of a short prompt is the same alone as beside a long one, which pads it."""
    short, long = respond(PROMPT, [1]), respond(range(30, 52), [1])
    sampler = replace(GREEDY, max_length=30)
    (alone,) = replace(sampler, max_length=11).generate(model, [short], "sampling")
    for prompts, at in (([short, long], 0), ([long, short], 1)):
        assert sampler.generate(model, prompts, "sampling")[at] == alone and len(alone) == 8
    assert len(set(alone)) > 2
    beyond = Tokens()
    beyond.pad_token_id = 97  # the model has no such embedding
    assert replace(sampler, tokenizer=beyond).generate(model, [short, long], "sampling")[0] == alone


def test_a_sample_ends_at_the_end_token_and_other_samples_of_its_batch_go_on(model):
    (sample,) = GREEDY.generate(model, [respond(PROMPT, [1])], "sampling")
    n = max(i for i, token in enumerate(sample) if token not in sample[:i])
    ends = Tokens()
    ends.eos_token_id = sample[n]
    sampler, other = replace(GREEDY, tokenizer=ends), respond((60, 61, 62), [1])
    texts = sampler.generate(model, [respond(PROMPT, [1]), other], "sampling")
    assert texts[0] == sample[:n] and 2 <= n < 7
    assert texts[1:] == sampler.generate(model, [other], "sampling") and len(texts[1]) > n


@BOTH
def test_a_sample_is_an_example_whose_response_holds_the_token_that_ended_it(rows, model):
    """As in the test above; the other sample of the batch is cut at max_length, and ends with no stop."""
    (whole,) = GREEDY.generate(model, [respond(PROMPT, [1])], "sampling")
    n = max(i for i, token in enumerate(whole) if token not in whole[:i])
    prompts = [respond(PROMPT, [1], [2]), respond((60, 61, 62), [1], [2])]
    sampler = replace(GREEDY, stops=[whole[n]], rows=rows)
    ended, cut = sampler.sample(model, prompts, "sampling")
    assert (ended.prompt, ended.responses) == (list(PROMPT), (whole[: n + 1],))
    assert len(cut.responses[0]) == 7 and whole[n] not in cut.responses[0]
    assert [sample.text.responses[0] for sample in (ended, cut)] == sampler.generate(model, prompts, "sampling")


def test_a_prompt_with_several_rows_is_sampled_for_once(tmp_path):
    rows = [("one", "a"), ("two", "b"), ("one", "c"), ("one", "d"), ("three", "e")]
    lines = [json.dumps({"prompt": p, "chosen": f" {c}.", "rejected": " no."}) for p, c in rows]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    batches = inputs_of("loss=dpo", *TINY, f"datasets=['{tmp_path}']", "batch_size=2", "eval_batch_size=2").eval_batches
    order = list(dict.fromkeys(example.text.prompt for batch in batches.from_start() for example in batch.examples))
    assert sorted(order) == ["one", "three", "two"]
    for n in (1, 2, 3, 4):
        assert [example.text.prompt for example in distinct_prompts(batches, n)] == order[:n]


def test_a_text_also_ends_at_further_stops(model):
    """As in the test above: the first token that the greedy continuation has not had before is made a stop."""
    (whole,) = GREEDY.generate(model, [respond(PROMPT, [1])], "sampling")
    n = next(i for i in range(1, len(whole)) if whole[i] not in whole[:i])
    (ended,) = replace(GREEDY, stops=[whole[n]]).generate(model, [respond(PROMPT, [1])], "sampling")
    assert [token for token in ended if token != whole[n]] == whole[:n]


@pytest.mark.parametrize("own, expected", [(None, [5, 2]), (2, [2, 5]), ([9, 5], [9, 5, 2])])
def test_stops_are_added_to_those_of_a_model(own, expected):
    config = GenerationConfig(eos_token_id=own)
    add_stops(config, [5, 2])
    assert config.eos_token_id == expected
