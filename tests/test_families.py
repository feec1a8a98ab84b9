"""Families of models: log-probabilities as plain transformers', and exports that compute what was trained.

With --soak all families, also in transformers 4.56.2, against the table in docs/models.md.
"""

import json

import pytest
import torch
from conftest import tiny_tokenizer
from families import ALIKE, PAGE, build, make_table, measure, measure_all, randomize, replace_table
from open_export import logps, open_export

from dpo.runs.export import export_model

# A family for each way in which they differ: position embeddings, experts, mixed layers, recurrence, images
EXACT = {
    "gpt2": "shared_prefix",
    "gpt_neox_japanese": "shared_prefix",
    "qwen3_moe": "shared_prefix",
    "modernbert-decoder": "shared_prefix",
    "gemma3": "shared_prefix",
    "gemma4": "shared_prefix",  # whose audio encoder has no kind of attention but its own
    "granitemoehybrid": "padded",
    "bloom": "padded",
    "xlstm": "padded",  # which ignores which logits it is asked for
}


@pytest.mark.parametrize("name", EXACT)
def test_a_family_trains_exactly_and_its_export_computes_the_same(name, tmp_path):
    outcome = measure(name, tmp_path)
    assert (outcome.trains, outcome.opens) == (f"exact, {EXACT[name]}", "yes")


def test_a_family_that_is_not_causal_is_refused(tmp_path):
    assert measure("bert", tmp_path).trains == "refused (this model is not causal)"


def difference(model, folder):
    """Return the largest difference of an export's log-probabilities from a model's."""
    return max(abs(one - two) for one, two in zip(logps(model), open_export(str(folder)), strict=True))


def test_the_comparison_of_an_export_sees_a_wrong_rotary_base_and_a_wrong_tie(tmp_path):
    model = build("llama")
    export_model(tmp_path / "hf", model, tiny_tokenizer("llama"))
    assert difference(model, tmp_path / "hf") < ALIKE
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    other = {"rope_parameters": {**config["rope_parameters"], "rope_theta": 1e4}, "rope_theta": 1e4}
    path.write_text(json.dumps({**config, **other}))
    assert difference(model, tmp_path / "hf") > 100 * ALIKE
    path.write_text(json.dumps(config))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    assert difference(model, tmp_path / "hf") > 100 * ALIKE


def test_the_change_that_stands_for_training_is_seen(tmp_path):
    model = build("llama")
    export_model(tmp_path / "hf", model, tiny_tokenizer("llama"))
    randomize(model, 0.1)
    assert difference(model, tmp_path / "hf") > 100 * ALIKE


def test_the_table_of_all_families_is_what_is_measured(tmp_path, request):
    if not request.config.getoption("--soak"):
        pytest.skip("in make soak")
    page = PAGE.read_text(encoding="utf-8")
    assert replace_table(page, make_table(measure_all(tmp_path))) == page
