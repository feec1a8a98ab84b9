"""Config files of an export: what transformers 4 calls otherwise is written too, and transformers 5 reads the same.

What transformers 4.56.2 computes from them is in docs/models.md, which `make soak` checks.
"""

import copy

import pytest
from families import NAMES, SIZES, make_config, set_rotary_frequencies
from transformers import CONFIG_MAPPING

from dpo.runs.transformers_4 import add_config_keys

LINEAR = {"rope_type": "linear", "factor": 4.0}


def written(name, **values):
    """Return a family's config, what is written of it, and whether that holds all settings of rotary embeddings."""
    config = make_config(CONFIG_MAPPING[name], SIZES | values)
    content = config.to_dict()
    complete = add_config_keys(config, content)
    return config, content, complete


def added(name, **values):
    """Return the keys that are added to a family's config or changed in it."""
    config, content, complete = written(name, **values)
    before = config.to_dict()
    return {key: value for key, value in content.items() if key not in before or before[key] != value}, complete


ROPE = {"rope_type": "default", "rope_theta": 5e5}
BY_LAYER = {"full_attention": {**ROPE}, "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}
SCALED = {**LINEAR, "rope_theta": 5e5}
CASES = [
    ("qwen2", {"rope_parameters": ROPE}, {"rope_theta": 5e5}),
    ("qwen2", {"rope_parameters": SCALED}, {"rope_theta": 5e5, "rope_scaling": LINEAR}),
    ("gpt2", {}, {}),
    ("qwen3_moe", {"rope_parameters": ROPE, "num_local_experts": 4}, {"rope_theta": 5e5, "num_experts": 4}),
    (
        "apertus",
        {"rope_parameters": SCALED},
        {"rope_theta": 5e5, "rope_scaling": LINEAR},
    ),  # has no theta without scaling
    (
        "gpt_neox",
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 5e5, "rotary_pct": 0.5},
    ),
    (
        "gpt_neox_japanese",
        {"rope_parameters": {**SCALED, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 5e5, "rotary_pct": 0.5, "rope_scaling": LINEAR},
    ),
    ("modernbert-decoder", {"rope_parameters": BY_LAYER}, {"global_rope_theta": 5e5, "local_rope_theta": 2e4}),
    ("gemma3_text", {"rope_parameters": BY_LAYER}, {"rope_theta": 5e5, "rope_local_base_freq": 2e4}),
]


@pytest.mark.parametrize("name, values, expected", CASES, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(CASES)])
def test_the_old_keys_of_a_family_are_added_and_no_others(name, values, expected):
    assert added(name, **copy.deepcopy(values)) == (expected, True)


def test_the_layer_types_of_hybrid_models_have_their_old_names():
    types = ["linear_attention", "full_attention"]
    config, content, _ = written("granitemoehybrid", layer_types=types)
    assert config.layer_types == types and content["layer_types"] == ["mamba", "attention"]
    assert type(config)(**content).layer_types == types


@pytest.mark.parametrize("name", ["qwen3_next", "minimax"])
def test_families_that_always_had_the_new_names_keep_them(name):
    config, content, _ = written(name, layer_types=["linear_attention", "full_attention"])
    assert content["layer_types"] == ["linear_attention", "full_attention"]


def test_the_config_of_a_composite_models_language_model_has_them_as_well():
    config = make_config(CONFIG_MAPPING["gemma3"], SIZES)
    config.text_config.rope_parameters = {**BY_LAYER, "full_attention": SCALED}
    content = config.to_dict()
    assert add_config_keys(config, content)
    keys = ("rope_theta", "rope_local_base_freq", "rope_scaling")
    assert [content["text_config"][key] for key in keys] == [5e5, 2e4, LINEAR]
    assert not set(keys) & set(content)


def test_scaling_that_transformers_4_cannot_limit_to_a_type_of_layer_is_left_out_and_reported():
    """As rope_scaling, transformers 5 too would apply it to all layers of this family."""
    old, complete = added("modernbert-decoder", rope_parameters={**BY_LAYER, "full_attention": SCALED})
    assert old == {"global_rope_theta": 5e5, "local_rope_theta": 2e4} and not complete


def test_layers_without_rotary_embeddings_among_others_are_no_error():
    config = make_config(CONFIG_MAPPING["beam"], SIZES)
    assert None in config.rope_parameters.values()
    add_config_keys(config, config.to_dict())


def test_transformers_5_reads_the_same_config():
    """A rope_scaling beside nested settings, for one, replaces them all in Gemma 4. `make soak` has all families."""
    read = 0
    for name in ("gemma4_text", *NAMES[::8]):
        try:
            config = make_config(CONFIG_MAPPING[name], SIZES)
        except Exception:  # of any kind: the sizes do not fit this family
            continue
        set_rotary_frequencies(config)
        content = config.to_dict()
        add_config_keys(config, content)
        again, expected = (type(config)(**copy.deepcopy(each)).to_dict() for each in (content, config.to_dict()))
        assert all(again[key] == value for key, value in expected.items() if not isinstance(value, dict)), name
        assert again.get("rope_parameters") == expected.get("rope_parameters"), name
        read += 1
    assert read > 15
