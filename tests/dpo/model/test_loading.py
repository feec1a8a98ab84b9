"""What a model must be before it trains: without randomness, and with rotary frequencies that lengths do not change."""

import os
import re

import pytest
import torch
import transformers
from conftest import GOLDENS, TINY, inputs_of, validated
from tiny_models import COMMON, EXPERTS, ROTARY, make_examples, tiny, tiny_config

import build
from dpo.model import loading
from dpo.model.loading import (
    check_causal,
    check_deterministic,
    compile_layers,
    disable_randomness,
    is_random,
    load_model_config,
    rope_problem,
)
from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.packing import LAYOUTS
from dpo.system.errors import UserError

TINY_GPT2 = GOLDENS / "tiny-gpt2"
DBRX = transformers.DbrxConfig(
    **COMMON,
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=64,
    attn_config={"attn_pdrop": 0.1, "kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
    ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.1},
)
RANDOM = {
    "GPT2": tiny_config("GPT2", attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1),
    "OPT": tiny_config("OPT", dropout=0.1, layerdrop=0.5),
    "Mixtral": tiny_config("Mixtral", router_jitter_noise=0.1),
    "Dbrx": DBRX,  # in the configs that its config holds
}


@pytest.mark.parametrize("family", RANDOM)
def test_everything_random_that_the_config_names_is_switched_off(family):
    config = RANDOM[family]
    assert is_random(transformers.AutoModelForCausalLM.from_config(config))
    disable_randomness(config)
    check_deterministic(transformers.AutoModelForCausalLM.from_config(config))


def test_a_model_that_stays_random_is_refused_by_the_names_of_its_settings():
    """Phimoe draws its experts at random in training, whatever its config says."""
    config = transformers.PhimoeConfig(**COMMON, **ROTARY, **EXPERTS, router_jitter_noise=0.1)
    disable_randomness(config)
    assert config.router_jitter_noise == 0.0
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="outputs are random.*router_jitter_noise"):
        check_deterministic(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["GPT2", "Llama", "Mixtral"])
def test_decoders_are_causal(family, dtype):
    check_causal(tiny(family).to(dtype))


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_a_model_whose_tokens_see_later_ones_is_refused(family):
    """With is_decoder=true they are causal."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{family}Config")(**COMMON, **sizes)
    with pytest.raises(UserError, match=f"this {family.lower()} model is not causal"):
        check_causal(transformers.AutoModelForCausalLM.from_config(config))
    config.is_decoder = True
    check_causal(transformers.AutoModelForCausalLM.from_config(config))


def test_the_test_of_randomness_leaves_the_mode_and_the_random_numbers_as_they_were():
    model = tiny("GPT2", attn_pdrop=0.1)
    state = torch.get_rng_state()
    assert is_random(model)
    assert torch.equal(torch.get_rng_state(), state) and not model.training


# Rotary frequencies

LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 10_000.0}
LONG_ROPE = {"rope_parameters": LONG, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_rope_makes_a_log_probability_depend_on_a_long_neighbour_and_on_no_short_one(layout):
    """Which is why it is refused: no layout can change it."""
    module = ResponseLogps.wrap(tiny("Phi3", **LONG_ROPE))
    short, long = make_examples([(6, 5, 4), (9, 9, 9)]), make_examples([(30, 9, 9)])
    with torch.no_grad():
        alone, beside_short, beside_long = (
            response_logps(module, LAYOUTS[layout].pack(examples)).sums[0]
            for examples in (short[:1], short, short[:1] + long)
        )
    torch.testing.assert_close(alone, beside_short, rtol=1e-5, atol=1e-5)
    assert (alone - beside_long).abs().max() > 0.1


@pytest.mark.parametrize(
    "config, limit",
    [
        (tiny_config("Phi3", **LONG_ROPE), 32),
        (tiny_config("Llama", rope_parameters=DYNAMIC), 128),
        (tiny_config("Gemma3Text", rope_parameters={"full_attention": DYNAMIC}), 128),
    ],
)
def test_a_length_from_which_rotary_frequencies_depend_on_neighbours_is_refused(config, limit):
    assert rope_problem(config, limit) is None
    assert re.fullmatch(
        f"max_length={limit + 1}: .* set max_length to {limit} or less", rope_problem(config, limit + 1)
    )


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Phi3", "Gemma3Text", "Bloom"])
def test_other_positions_allow_every_length(name):
    assert rope_problem(tiny_config(name), 10**6) is None


def test_a_model_without_known_layers_is_not_compiled():
    with pytest.raises(UserError, match="compile=true"):
        compile_layers(torch.nn.Linear(2, 2))


# A hub that cannot be reached


@pytest.fixture
def hub(monkeypatch):
    """The hub client's constants, online, and whether and how often the hub is asked for a sign of life."""
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(loading, "is_reachable", lambda url: asked.append(url) or False)
    return constants, asked


@pytest.mark.parametrize(
    "settings, is_needed",
    [
        ((f"model.name_or_path='{TINY_GPT2}'", f"datasets=['{GOLDENS / 'data'}']"), False),
        ((f"model.name_or_path='{TINY_GPT2}'", "datasets=[demo]"), False),
        ((f"model.name_or_path='{TINY_GPT2}'", "datasets=[hh]"), True),
        ((f"model.name_or_path='{TINY_GPT2}'", "model.tokenizer_name_or_path=no/such"), True),
        (("model.name_or_path=no/such", f"datasets=['{GOLDENS / 'data'}']"), True),
    ],
)
def test_a_hub_that_is_needed_and_cannot_be_reached_is_not_tried(settings, is_needed, hub, capsys, monkeypatch):
    """Its client would try again for minutes, for each file."""
    constants, asked = hub
    monkeypatch.setattr(build, "load_model_config", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inputs_of("loss=dpo", "device=cpu", "max_length=160", "max_prompt_length=96", *settings)
    assert asked == [constants.ENDPOINT] * is_needed
    assert constants.HF_HUB_OFFLINE == is_needed and os.environ["HF_HUB_OFFLINE"] == str(int(is_needed))
    assert ("The hub cannot be reached: using only files on this machine." in capsys.readouterr().out) == is_needed


def test_a_hub_that_can_be_reached_is_used(hub, monkeypatch, capsys):
    constants, _ = hub
    monkeypatch.setattr(loading, "is_reachable", lambda url: True)
    loading.skip_unreachable_hub({"no/such": True})
    assert not constants.HF_HUB_OFFLINE and capsys.readouterr().out == ""


def test_a_chat_template_of_the_run_is_exported_and_its_file_must_exist(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }}é", encoding="utf-8")
    for value in (str(file), file.read_text(encoding="utf-8")):
        settings = validated("loss=dpo", *TINY)[0].model
        tokenizer = load_model_config(settings, value)[1]
        assert tokenizer.chat_template == "{{ messages[0].content }}é"
    tokenizer.save_pretrained(tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    with pytest.raises(UserError, match="chat_template=no.jinja: no such file; give the path of a Jinja template"):
        validated("loss=dpo", *TINY, "chat_template=no.jinja")
