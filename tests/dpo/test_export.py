"""The export, as transformers 5 opens it, and with the keys that transformers 4 needs."""

import json

import pytest
import torch
from conftest import FAMILIES, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.export import export_model

KEYS_OF_5 = {"backend", "is_local", "local_files_only", "extra_special_tokens"}


def export(family, folder, tokenizer, **rope):
    """Export a tiny model of a family, whose rotary embeddings have the given settings, and return it."""
    config = tiny_config(family, len(tokenizer))
    if rope:
        config.rope_parameters = rope
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    export_model(folder, model, tokenizer)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_is_written_in_keys_that_transformers_4_knows(family, tmp_path):
    tiny_tokenizer(family).save_pretrained(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|extra|>"]})
    export(family, tmp_path / "hf", tokenizer)
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|extra|>"] and not KEYS_OF_5 & set(written)
    opened = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Hello<|extra|> world"
    assert opened(text).input_ids == tokenizer(text).input_ids
    assert opened.all_special_tokens == tokenizer.all_special_tokens
    assert opened.model_max_length == tokenizer.model_max_length


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
TWO = {"full_attention": {"rope_type": "default", "rope_theta": 3e6}}
TWO |= {"sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}
ROPES = [
    ("gpt2", {}, {}),
    ("qwen2", {"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 1e6}),
    ("llama", {**LLAMA3, "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    (
        "gpt_neox",
        {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 5e4, "rotary_pct": 0.5},
    ),
    ("gemma3", TWO, {"rope_theta": 3e6, "rope_local_base_freq": 2e4}),
]
KEYS_OF_4 = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}
KEYS_OF_4 |= {"rotary_emb_base", "rotary_pct"}


@pytest.mark.parametrize("family, rope, expected", ROPES, ids=[family for family, *_ in ROPES])
def test_rotary_embeddings_are_written_in_the_keys_of_transformers_4_too(family, rope, expected, tmp_path):
    """With these files transformers 4.56.2 gave the same logits to the last bit; without the keys up to 10.7 apart."""
    model = export(family, tmp_path / "hf", tiny_tokenizer("llama"), **rope)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {key: written[key] for key in KEYS_OF_4 & set(written)} == expected
    assert not rope or written["rope_parameters"] == rope
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert not rope or opened.config.rope_parameters == model.config.rope_parameters
    ids = torch.arange(5, 205)[None]
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, model(ids).logits)


def test_settings_of_generation_that_cannot_be_written_are_left_out_but_for_the_stops(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config("llama", 300))
    model.generation_config.eos_token_id, model.generation_config.num_return_sequences = [7, 0], 3
    export_model(tmp_path / "hf", model, tiny_tokenizer("llama"))
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [7, 0] and "num_return_sequences" not in written
