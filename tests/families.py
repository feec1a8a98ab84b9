"""A tiny random model of every causal language model that transformers implements.

One table of sizes serves all families; a config takes from it what it has. Weights are large, norms are not 1, and
rotary frequencies are not the default ones, so that a wrong key of a config changes log-probabilities by far.
"""

import dataclasses
import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 128
MAX_PARAMETERS = 5_000_000
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "audio_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "ffn_hidden_size", "hidden_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "prefix_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **{"encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "global_head_dim": 8},
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "block_size"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_topk", "moe_top_k"), 2),
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    **{"index_n_heads": 2, "index_head_dim": 8, "index_topk": 64, "rotary_dim": 4, "hidden_size_per_layer_input": 8},
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "state_size": 4},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"n_group": 1, "topk_group": 1, "image_size": 8, "patch_size": 4, "initializer_range": 0.02},
}
# What some families need instead, tried in turn
ALTERNATIVES: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": None},
    {"num_key_value_heads": 4},
    {"num_experts_per_tok": 1},
    {"hidden_size_per_layer_input": 0},
    {"num_hidden_layers": 4},
    {"head_dim": 16},
    {"is_decoder": True},
)


class NotBuilt(Exception):
    """No tiny model of a family; the reason in one line."""


def build(name: str) -> PreTrainedModel:
    """Make a random model of a family; NotBuilt if the sizes fit none that is small and runs."""
    reasons = []
    for changes in ALTERNATIVES:
        try:
            config = make_config(CONFIG_MAPPING[name], SIZES | changes)
            set_rotary_frequencies(config)
            with torch.device("meta"):
                n = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
            if n > MAX_PARAMETERS:
                raise NotBuilt(f"{n:,} parameters with these sizes")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            randomize(model)
            with torch.no_grad():
                model(input_ids=torch.arange(8)[None], use_cache=False).logits
            return model
        except Exception as error:  # of any kind: a config that does not fit itself
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())}"[:120])
    raise NotBuilt(reasons[0])


def make_config(kind: type[PreTrainedConfig], sizes: dict[str, Any]) -> PreTrainedConfig:
    """Make a config and its nested configs with the sizes that they have."""
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    fields |= set(kind.attribute_map) | set(inspect.signature(kind.__init__).parameters)
    values = {key: value for key, value in sizes.items() if key in fields and value is not None}
    for key, nested in kind.sub_configs.items():
        default = getattr(kind(), key, None) if nested is AutoConfig else None
        nested = type(default) if default is not None else nested
        if nested is not AutoConfig:
            values[key] = make_config(nested, sizes)
    return kind(**values)


def set_rotary_frequencies(config: PreTrainedConfig) -> None:
    """Give rotary embeddings a base other than the default, a different one for each kind of layer."""
    for each in nested_configs(config):
        rope = getattr(each, "rope_parameters", None) or {}
        for i, one in enumerate([value for value in rope.values() if isinstance(value, dict)] or [rope]):
            if "rope_theta" in one:
                one["rope_theta"] = 300.0 / (i + 1)


def nested_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return a config and all below it."""
    below = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(each for value in below for each in nested_configs(value))]


@torch.no_grad()
def randomize(model: PreTrainedModel, scale: float = 1.0) -> None:
    """Add noise to every parameter: to matrices as much as keeps activations of size 1, to others a tenth."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        size = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter += scale * size * noise.to(parameter.dtype)
