"""The check at the start: which kinds of model take the shared_prefix layout, and which fall back and still train."""

import pytest
import torch
import transformers

from packing import check_layout, find_head, make_passes, sequence_logps
from preference_datasets import Example, Item

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
NOT_EXACT = {
    "Mistral": {**ROTARY, "sliding_window": 16},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def tiny(name: str):
    """Make a random model with weights large enough for every token to depend on those before it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON, **{**EXACT, **NOT_EXACT}[name])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def make_examples(lengths) -> list[Example]:
    """Make examples of random tokens, lengths (prompt, chosen, rejected)."""
    random = torch.Generator().manual_seed(1)
    ids = [[torch.randint(3, 97, (n,), generator=random).tolist() for n in triple] for triple in lengths]
    items = [Item(str(i), ("a", "b"), "keep_end", i, "") for i in range(len(lengths))]
    return [Example(item, p, (c, r)) for item, (p, c, r) in zip(items, ids, strict=True)]


EXAMPLES = make_examples([(9, 5, 3), (4, 2, 8), (13, 1, 6)])


@pytest.mark.parametrize("name", EXACT)
def test_the_shared_prefix_is_exact(name):
    assert check_layout(tiny(name), EXAMPLES, "shared_prefix", 64, torch.float32) is None


@pytest.mark.parametrize("name", NOT_EXACT)
def test_a_model_that_cannot_take_the_shared_prefix_falls_back_and_trains(name):
    model = tiny(name)
    problem = check_layout(model, EXAMPLES, "shared_prefix", 64, torch.float32)
    assert problem is not None and ("differ by" in problem or "fails" in problem)
    logps = [sequence_logps(model, layout, find_head(model)) for layout in make_passes(EXAMPLES, "padded", 1000)]
    torch.cat(logps).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


def test_a_window_that_no_real_example_fills_is_still_found():
    short = make_examples([(2, 2, 2), (3, 1, 2)])
    assert "differ by" in check_layout(tiny("Mistral"), short, "shared_prefix", 64, torch.float32)
    assert check_layout(tiny("Mistral"), short, "shared_prefix", 16, torch.float32) is None


def test_logits_that_a_model_caps_or_scales_are_left_to_the_model():
    assert find_head(tiny("Gemma2")) is None
    assert find_head(tiny("Llama")) is not None


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
@pytest.mark.parametrize("budget", [10, 40, 1000])
def test_a_token_budget_changes_no_log_probability_and_no_gradient(layout, budget):
    results = []
    for max_tokens in (10**6, budget):
        model = tiny("Llama").double()
        logps = {}
        for laid_out in make_passes(EXAMPLES, layout, max_tokens):
            part = sequence_logps(model, laid_out, find_head(model))
            part.sum().backward()
            logps |= {e.item: row for e, row in zip(laid_out.examples, part.tolist(), strict=True)}
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((torch.tensor([logps[e.item] for e in EXAMPLES]), gradient))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_every_example_lies_in_exactly_one_pass_within_the_budget(layout):
    examples = make_examples([(n, n % 5 + 1, n % 3 + 1) for n in range(1, 60, 3)])
    passes = list(make_passes(examples, layout, 100))
    assert sorted(e.item.row for p in passes for e in p.examples) == list(range(len(examples)))
    assert all(p.inputs["input_ids"].numel() <= 100 or len(p.examples) == 1 for p in passes)
    assert 1 < len(passes) < len(examples)


def test_chunked_logits_give_the_same_numbers_and_gradients(monkeypatch):
    results = []
    monkeypatch.setattr("packing.CHUNK_BYTES", 0)
    for tokens in (10_000, 3):  # all at once, and three at a time
        monkeypatch.setattr("packing.CHUNK_TOKENS", tokens)
        model, sizes = tiny("Llama").double(), []
        (layout,) = make_passes(EXAMPLES, "shared_prefix", 1000)
        head = find_head(model)
        head.register_forward_hook(lambda module, inputs, logits, sizes=sizes: sizes.append(len(logits)))
        logps = sequence_logps(model, layout, head)
        logps.sum().backward()
        assert max(sizes) == min(tokens, len(layout.targets))
        results.append((logps.detach(), model.lm_head.weight.grad, model.model.embed_tokens.weight.grad))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)
