"""Figures of a diagnosis beyond those of a run: positions, BOS, formats of prompts, weights, tokenizers."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from torch import tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.data.examples import TextExample, Tokenization, TokenizedExample
from dpo.distributed.splitting import BatchSplitter
from dpo.model.logps import Logps, ResponseLogps
from dpo.model.packing import Packer
from dpo.settings.schema import Settings
from tools.diagnose.measures import (
    Formats,
    Tokens,
    as_turns,
    bos_gap,
    distance_figures,
    leading,
    position_figures,
    weight_figures,
)
from tools.diagnose.tokenizer_check import round_trip

MODEL = GOLDENS / "tiny-gpt2"
TEMPLATE = (
    "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def example(prompt, responses, truncated=(), messages=None, ids=([5, 6], [7, 8])):
    text = TextExample(prompt, responses, "keep_end", 1, "rows", messages=messages)
    return TokenizedExample(text, [3, 4], ids, truncated)


def tokens_of(lengths, policy, reference, examples):
    tokens = Tokens()
    tokens.add(examples, *(Logps.from_tokens(tensor(values), tensor(lengths)) for values in (policy, reference)))
    return tokens


# Positions


def test_positions_are_the_first_token_the_next_three_the_others_and_the_end():
    reference = [-8.0, -1, -2, -3, -4, -6, -9, -7.0, -5.0]  # of 7 and of 2 tokens
    tokens = tokens_of([[7, 2]], [value / 2 for value in reference], reference, [example("p", ("a", "b"))])
    figures = position_figures(tokens) | distance_figures(tokens)
    assert figures["position/first"] == pytest.approx(-7.5) and figures["position/early"] == pytest.approx(-2)
    assert figures["position/middle"] == pytest.approx(-5) and figures["position/end"] == pytest.approx(-7)
    assert figures["reference_per_token"] == pytest.approx(-5) and figures["policy_per_token"] == pytest.approx(-2.5)
    assert figures["start_distance"] == pytest.approx(2.5)
    assert tokens.per_token() == pytest.approx(-31 / 7)  # without the ends


def test_a_truncated_response_has_no_end():
    tokens = tokens_of([[2, 1]], [-1.0, -2, -3], [-1.0, -2, -3], [example("p", ("a", "b"), truncated=("response",))])
    figures = position_figures(tokens)
    assert "position/end" not in figures and "position/middle" not in figures
    assert figures["position/first"] == pytest.approx(-2) and figures["position/early"] == pytest.approx(-2)


# BOS


def token_logps_of(rule):
    """Return a function as Evaluation.token_logps, with the log-probability that rule gives a prompt's ids."""

    def compute(examples):
        tokens = Tokens()
        for one in examples:
            sizes = [len(response) for response in one.responses]
            values = tensor([float(rule(one.prompt))] * sum(sizes))
            logps = Logps.from_tokens(values, tensor([sizes]))
            tokens.add([one], logps, logps)
        return tokens

    return compute


class WithBos:
    bos_token_id = 1


@pytest.mark.parametrize(
    ("prompt", "toggled", "count"),
    [([4, 5], [1, 4, 5], 0), ([1, 4, 5], [4, 5], 1), ([1, 1, 4], [1, 4], 2), ([1], [1, 1], 1)],
)
def test_a_bos_is_added_or_one_is_removed(prompt, toggled, count):
    seen = []

    def rule(ids):
        seen.append(ids)
        return -1.0 if ids == toggled else -3.0

    one = replace(example("p", ("a", "b")), prompt=prompt)
    figures = bos_gap([one], WithBos(), token_logps_of(rule), max_length=9)
    assert seen == [toggled, prompt] and figures == {"position/bos": count, "position/gap_bos": pytest.approx(2)}
    assert leading(prompt, 1) == count


def test_an_example_of_max_length_has_no_position_for_a_bos():
    one = replace(example("p", ("a", "b")), prompt=[4, 5])
    n = 2 + max(map(len, one.responses))
    assert bos_gap([one], WithBos(), token_logps_of(lambda ids: -1), max_length=n) == {"position/bos": 0}
    assert "position/gap_bos" in bos_gap([one], WithBos(), token_logps_of(lambda ids: -1), max_length=n + 1)


def test_without_a_bos_token_there_is_no_gap():
    class Without:
        bos_token_id = None

    assert bos_gap([example("p", ("a", "b"))], Without(), token_logps_of(len), max_length=9) == {}


# Formats


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def formats_of(tokenizer):
    settings = Settings.model_construct(chat_template_args=None, chat_template_time=None)
    return Formats(tokenizer, Tokenization(tokenizer, 160, 96), settings)


def encoded(prompt, responses, tokenizer):
    text = TextExample(prompt, responses, "keep_end", 1, "rows")
    return Tokenization(tokenizer, 160, 96)([text])[0]


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("Name a river. ", ["user"]),
        ("\n\nHuman: Name a river.\n\nAssistant:", ["user"]),
        ("\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Name a river.\n\nAssistant:", ["user", "assistant", "user"]),
    ],
)
def test_a_text_becomes_the_turns_that_it_has(prompt, turns):
    row = as_turns(example(prompt, (" The Rhine. ", " No.")), None)
    assert [turn["role"] for turn in row.prompt] == turns and row.prompt[-1]["content"] == "Name a river."
    assert [response[0]["content"] for response in row.responses] == ["The Rhine.", "No."]


def test_messages_stay_and_truncated_examples_have_no_turns(chat_tokenizer):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    end = chat_tokenizer.convert_tokens_to_ids("<|end|>")
    ids = tuple([*chat_tokenizer(text)["input_ids"], end] for text in ("Hello", "No"))
    one = example("rendered", ("Hello<|end|>", "No<|end|>"), messages=messages, ids=ids)
    row = as_turns(one, chat_tokenizer)
    assert row.prompt == messages and [response[0]["content"] for response in row.responses] == ["Hello", "No"]
    assert as_turns(replace(one, truncated=("prompt",)), chat_tokenizer) is None


@pytest.mark.parametrize(
    ("prompt", "likelier"),
    [("Name a river.", "chat"), ("\n\nHuman: Name a river.\n\nAssistant:", "chat"), ("Name a river.", "hh")],
)
def test_the_format_that_the_reference_knows_is_likelier(prompt, likelier, chat_tokenizer):
    written = chat_tokenizer.decode

    def rule(ids):
        text = written(ids)
        known = "<|user|>" in text if likelier == "chat" else "Human:" in text
        return -1.0 if known else -4.0

    responses = (" The Rhine.", " The Nile.")
    figures = formats_of(chat_tokenizer).gaps([encoded(prompt, responses, chat_tokenizer)], token_logps_of(rule))
    gaps = {name: round(value, 6) for name, value in figures.items()}
    assert gaps[f"format/{likelier}"] == gaps[f"format/{likelier}_first"] == 3
    assert all(gap == 0 for name, gap in gaps.items() if not name.startswith(f"format/{likelier}"))


def test_the_format_of_the_data_itself_is_no_other_one():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    one = encoded("\n\nHuman: Name a river.\n\nAssistant:", (" The Rhine.", " No."), tokenizer)
    assert [*formats_of(tokenizer).gaps([one], token_logps_of(len))] == ["format/text", "format/text_first"]


def test_rows_that_a_format_cannot_render_leave_it_out(chat_tokenizer):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    one = example("rendered", ("a", "b"), messages=messages, ids=tuple(chat_tokenizer(["Yes", "No"])["input_ids"]))
    found = formats_of(chat_tokenizer).gaps([one], token_logps_of(len))
    assert [name for name in found if not name.endswith("_first")] == ["format/chat", "format/text"]


def test_token_logps_match_the_model(chat_tokenizer):
    """The reference's per-token figure, against plain transformers."""
    from tools.diagnose.evaluation import Evaluation

    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    one = encoded("\n\nHuman: Hi.\n\nAssistant:", (" Yes, of course.", " No."), tokenizer)
    from dpo.training.references import ModelReference

    reference = ModelReference(ResponseLogps.wrap(model), torch.float32)
    splitter = BatchSplitter(Packer("padded", 768, torch.device("cpu")))
    evaluation = Evaluation(None, None, None, None, reference, splitter, None)
    found = evaluation.token_logps([one])
    for values, response in zip(found.reference, one.responses, strict=True):
        ids = tensor([one.prompt + response])
        with torch.no_grad():
            logps = model(ids).logits.log_softmax(-1)[0, len(one.prompt) - 1 : -1]
        assert np.allclose(values, logps[range(len(response)), response].numpy(), atol=1e-5)


# Weights


def test_weights_are_compared_with_the_rounding_of_the_stored_policy():
    reference = AutoModelForCausalLM.from_pretrained(MODEL)
    rounded = AutoModelForCausalLM.from_pretrained(MODEL).bfloat16().float()
    same = {"weights_changed": 0.0, "weights_distance": 0.0}
    assert weight_figures(reference, reference) == same == weight_figures(rounded, reference)
    policy = AutoModelForCausalLM.from_pretrained(MODEL)
    weight = policy.transformer.h[0].attn.c_attn.weight
    with torch.no_grad():
        weight[0] += 0.01
    figures = weight_figures(policy, reference)
    total = sum(parameter.numel() for parameter in policy.parameters())
    norm = math.sqrt(sum(float(parameter.detach().square().sum()) for parameter in reference.parameters()))
    assert figures["weights_changed"] == pytest.approx(weight.shape[1] / total)
    assert figures["weights_step"] == pytest.approx(0.01, rel=1e-3)
    assert figures["weights_distance"] == pytest.approx(0.01 * math.sqrt(weight.shape[1]) / norm, rel=1e-3)


def test_what_rounding_leaves_of_a_policy_in_16_bits_is_no_step_of_training():
    reference = AutoModelForCausalLM.from_pretrained(MODEL)
    policy = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 1e-6
    assert weight_figures(policy, reference)["weights_step"] == pytest.approx(1e-6, rel=0.1)
    figures = weight_figures(policy.bfloat16().float(), reference)
    assert 0 < figures["weights_changed"] < 0.1 and "weights_step" not in figures


def test_weights_of_other_shapes_are_not_compared():
    policy, reference = (AutoModelForCausalLM.from_pretrained(MODEL) for _ in range(2))
    policy.resize_token_embeddings(500)
    assert weight_figures(policy, reference) == {}


# Tokenizers


def test_a_round_trip_is_the_share_of_texts_that_come_back(tmp_path):
    texts = ["Ein Fluß — 日本!", "plain words", "\n\nHuman: a  b"]
    assert round_trip(AutoTokenizer.from_pretrained(MODEL), texts) == 1
    shutil.copytree(MODEL, tmp_path / "lost")
    path = tmp_path / "lost" / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["decoder"] = None
    path.write_text(json.dumps(stored))
    assert round_trip(AutoTokenizer.from_pretrained(tmp_path / "lost"), texts) < 0.5
