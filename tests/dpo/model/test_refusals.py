"""Which models are refused: by their config, or by outputs that are random or not causal."""

import re

import pytest
import torch
import transformers
from conftest import TINY, validated
from tiny_models import COMMON, EXPERTS, ROTARY, make_examples, tiny, tiny_config

from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.packing import LAYOUTS
from dpo.model.refusals import (
    check_causal,
    check_deterministic,
    disable_randomness,
    is_random,
    quantization_problems,
    rope_problem,
)
from dpo.system.errors import UserError

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
    torch.manual_seed(0)  # with one model in three, the experts that are drawn are the same for two seeds
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


# Quantized checkpoints


def quantized_config(**values) -> transformers.PreTrainedConfig:
    config = tiny_config("Llama")
    config.quantization_config = values
    return config


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "fp8", "mxfp4"])
def test_weights_in_a_format_without_a_backward_pass_are_refused_also_for_an_adapter(method):
    for lora in ((), ("lora=default",)):
        settings, _ = validated("loss=dpo", *TINY, *lora)
        (line,) = quantization_problems(settings, quantized_config(quant_method=method), torch.device("cpu"))
        assert line.startswith(f"its weights are quantized already ({method}), so they cannot be trained; choose the u")
        assert "lora.quantize=nf4" in line


def test_all_weights_of_a_checkpoint_of_bitsandbytes_are_refused_and_an_adapter_is_not():
    config = quantized_config(load_in_4bit=True)  # early versions wrote no quant_method
    (line,) = quantization_problems(validated("loss=dpo", *TINY)[0], config, torch.device("cpu"))
    assert "only an adapter can be trained on them" in line and line.endswith("set lora=default")
    settings, _ = validated("loss=dpo", *TINY, "lora=default")
    assert list(quantization_problems(settings, config, torch.device("cpu"))) == []
    assert list(quantization_problems(settings, tiny_config("Llama"), torch.device("cpu"))) == []


@pytest.mark.parametrize(
    "setting", ["lora.export_merged=true", "lora.use_dora=true", "model.resize_embeddings=true", "lora.quantize=nf4"]
)
def test_what_quantized_weights_do_not_support_is_refused_by_name(setting):
    settings, _ = validated("loss=dpo", *TINY, "lora=default", setting)
    config = quantized_config(quant_method="bitsandbytes", load_in_8bit=True)
    (line,) = quantization_problems(settings, config, torch.device("cpu"))
    assert f"which {setting} does not support; leave it out" in line
