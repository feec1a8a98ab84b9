"""Tiny random models and examples of token ids, which several tests share."""

from dataclasses import replace

import torch
import transformers

from dpo.data.examples import TextExample, TokenizedExample
from dpo.model.logps import response_logps
from dpo.model.packing import make_microbatches

PLENTY = 2**30  # tokens a microbatch

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {"vocab_size": 97, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
ROTARY = {**SIZES, "max_position_embeddings": 128, "num_key_value_heads": 2}
EXACT = {
    "GPT2": GPT,
    "GPTNeoX": {**SIZES, "max_position_embeddings": 128},
    "GPTJ": {**GPT, "rotary_dim": 4},
    "OPT": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "init_std": 0.3},
    "Llama": ROTARY,
    "Qwen2": ROTARY,
    "Qwen3": {**ROTARY, "head_dim": 8},
    "Gemma2": {**ROTARY, "head_dim": 8},
    "Gemma3Text": {**ROTARY, "head_dim": 8},
    "Phi3": ROTARY,
    "Olmo2": ROTARY,
    "Falcon": {**SIZES, "max_position_embeddings": 128, "new_decoder_architecture": True, "num_kv_heads": 2},
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
EXACT["Mixtral"] = {**ROTARY, **EXPERTS}
NOT_EXACT = {
    "Mistral": {**ROTARY, "sliding_window": 16},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}
# Granite scales its logits, so its head is not computed apart; JetMoe's attention has routers too.
MIXTURES = {
    "Qwen3Moe": {**ROTARY, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 3, "head_dim": 8},
    "GraniteMoe": {**ROTARY, **EXPERTS, "logits_scaling": 4.0},
    "JetMoe": {**ROTARY, **EXPERTS, "kv_channels": 8},
    "GptOss": {**ROTARY, **EXPERTS, "head_dim": 8, "layer_types": ["full_attention"] * 2},
}


def tiny_config(name: str, **own) -> transformers.PreTrainedConfig:
    """Make a family's config for a model of 2 layers, with keys of one's own."""
    return getattr(transformers, f"{name}Config")(**{**COMMON, **{**EXACT, **NOT_EXACT, **MIXTURES}[name], **own})


def tiny(name: str, **own) -> transformers.PreTrainedModel:
    """Make a random model with weights large enough for every token to depend on those before it."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(tiny_config(name, **own)).eval()


def composite(family: str) -> transformers.PreTrainedModel:
    """Make a random model that sees images as well: Gemma3, or Qwen3_5, whose causal class is its language model."""
    text = {**COMMON, **ROTARY, "head_dim": 8, "vocab_size": 420}
    vision = {"hidden_size": 32, "intermediate_size": 64, "patch_size": 14}
    if family == "Gemma3":
        vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
        ids = {"image_token_index": 419, "boi_token_index": 418, "eoi_token_index": 417, "mm_tokens_per_image": 4}
    else:
        text |= {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4}
        text |= {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        vision |= {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16}
        ids = {"image_token_id": 419, "video_token_id": 418, "vision_start_token_id": 417, "vision_end_token_id": 416}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision, **ids)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()


def make_examples(lengths) -> list[TokenizedExample]:
    """Make examples of random tokens, lengths (prompt, chosen, rejected)."""
    random = torch.Generator().manual_seed(1)
    ids = [[torch.randint(3, 97, (n,), generator=random).tolist() for n in triple] for triple in lengths]
    items = [TextExample(str(i), ("a", "b"), "keep_end", i, "") for i in range(len(lengths))]
    return [TokenizedExample(item, p, (c, r)) for item, (p, c, r) in zip(items, ids, strict=True)]


EXAMPLES = make_examples([(9, 5, 3), (4, 2, 8), (13, 1, 6)])


def respond(prompt, *responses):
    """Make an example of token ids."""
    return TokenizedExample(
        TextExample("", ("",) * len(responses), "keep_end", 1, ""), list(prompt), tuple(map(list, responses))
    )


def mask_responses(example, *masks):
    """Set an example's loss masks, given as 1 for each trained token and 0 for each other."""
    return replace(example, loss_masks=tuple([bool(value) for value in mask] for mask in masks))


def weigh(example, weight):
    """Set an example's weight."""
    return replace(example, text=replace(example.text, numbers={"weight": weight}))


@torch.no_grad()
def sums_of_logps(module, examples, layout, max_tokens=PLENTY):
    """The log-probabilities (examples, n_responses) in the order of the batch, by microbatches of a layout."""
    rows = {}
    for part in make_microbatches(examples, layout, max_tokens):
        sums = response_logps(module, part).sums.double()
        rows |= {id(example): row for example, row in zip(part.examples, sums, strict=True)}
    return torch.stack([rows[id(example)] for example in examples])
