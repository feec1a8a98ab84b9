"""Attention in rows that hold several examples."""

import gc
import weakref

import pytest
import torch
from tiny_models import EXACT, EXAMPLES, make_examples, sums_of_logps, tiny
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as torch_flex_attention

from dpo.model import attention
from dpo.model.attention import (
    FLEX_BLOCK,
    MIN_BRANCHED_TOKENS,
    additive_mask,
    cpu_attention,
    flex_inputs,
    use_attention,
)
from dpo.model.loading import recompute_activations
from dpo.model.logps import ResponseLogps, has_separate_head
from dpo.model.packing import LAYOUTS


@pytest.fixture
def calls(monkeypatch):
    """Collect the queries' and keys' lengths and the dtypes of each call of torch's kernel."""
    found = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **how):
        tensors = [tensor for tensor in (query, key, value, how.get("attn_mask")) if tensor is not None]
        dtypes = {torch.bfloat16 if torch.is_autocast_enabled("cpu") else tensor.dtype for tensor in tensors}
        found.append((query.shape[2], key.shape[2], dtypes))
        return attend(query, key, value, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return found


@pytest.mark.parametrize("branched", [1, MIN_BRANCHED_TOKENS])
def test_attention_on_a_cpu_is_computed_in_float32_also_in_a_bfloat16_run(branched, make_trainer, monkeypatch, calls):
    monkeypatch.setattr(attention, "MIN_BRANCHED_TOKENS", branched)
    trainer = make_trainer("loss=dpo", "precision=bfloat16")
    calls.clear()  # of the check of the layout, which uses torch's own attention
    trainer.train_step(next(iter(trainer.train_batches)))
    assert {dtype for *_, dtypes in calls for dtype in dtypes} == {torch.float32}


def states_of(branches):
    """Make queries of 4 heads, keys and values of 2, and the mask, for an example of the given branches."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, sum(branches), 8, dtype=torch.float64) for n in (4, 2, 2))
    numbers = torch.arange(len(branches)).repeat_interleave(torch.tensor(branches))
    return [query, key, value], additive_mask(torch.stack((torch.zeros_like(numbers), numbers)), torch.float64)


@pytest.mark.parametrize("branches", [[5, 3], [5, 3, 4], [1, 1, 1], [7, 1, 9, 2, 6]])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_responses_that_attend_apart_attend_to_what_the_mask_shows(branches, scaling, monkeypatch):
    states, mask = states_of(branches)
    found = []
    for branched in (1, MIN_BRANCHED_TOKENS):
        monkeypatch.setattr(attention, "MIN_BRANCHED_TOKENS", branched)
        own = [state.clone().requires_grad_() for state in states]
        out = cpu_attention(*own, mask, branches, scaling=scaling)
        (out * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
        found.append([out, *(state.grad for state in own)])
    for apart, masked in zip(*found, strict=True):
        assert torch.allclose(apart, masked, rtol=0, atol=1e-12)


def test_responses_attend_apart_in_long_examples_alone(calls):
    for length in (MIN_BRANCHED_TOKENS - 1, MIN_BRANCHED_TOKENS):
        branches = [length - 7, 3, 4]
        states, mask = states_of(branches)
        cpu_attention(*states, mask, branches)
    assert [call[:2] for call in calls] == [
        (MIN_BRANCHED_TOKENS - 1, MIN_BRANCHED_TOKENS - 1),
        (MIN_BRANCHED_TOKENS - 4, MIN_BRANCHED_TOKENS - 4),
        (4, MIN_BRANCHED_TOKENS - 3),
    ]


@pytest.mark.parametrize("name", EXACT)
def test_responses_that_attend_apart_have_the_log_probabilities_of_rows_of_their_own(name, monkeypatch):
    monkeypatch.setattr(attention, "MIN_BRANCHED_TOKENS", 1)
    module = ResponseLogps.wrap(tiny(name))
    padded = sums_of_logps(module, EXAMPLES, "padded")
    use_attention(module.model, "packed")
    torch.testing.assert_close(sums_of_logps(module, EXAMPLES, "shared_prefix"), padded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["plain", "compiled", "with activation checkpointing"])
def test_layers_attend_example_by_example_and_are_compiled_once(how, monkeypatch):
    lengths, attend = [], attention.cpu_attention

    def spy(query, key, value, mask, branches, **kwargs):
        lengths.append(branches)
        return attend(query, key, value, mask, branches, **kwargs)

    monkeypatch.setattr(attention, "cpu_attention", spy)
    torch.compiler.reset()
    module = ResponseLogps.wrap(tiny("Llama"))
    use_attention(module.model, "packed")
    graphs = CompileCounter()
    for layer in module.model.model.layers if how == "compiled" else ():
        layer.compile(backend=graphs, dynamic=True)
    if how == "with activation checkpointing":
        module.train()
        recompute_activations(module.model)
    compiled = set()
    for examples in (EXAMPLES, EXAMPLES[:1], EXAMPLES[1:]):
        lengths.clear()
        module(LAYOUTS["shared_prefix"].pack(examples)).sum().backward()
        n_passes = 4 if how == "with activation checkpointing" else 2  # two layers, in the backward pass once more
        assert lengths.count((4, 2, 8)) == (n_passes if EXAMPLES[1] in examples else 0)
        assert len(lengths) == n_passes * len(examples)
        compiled.add(graphs.frame_count)
    assert len(compiled) == 1


# Flex attention

ROWS = {
    "less than a block": EXAMPLES,
    "long examples": make_examples([(400, 300, 300), (20, 300, 10), (150, 140, 130)]),
    "many short ones": make_examples([(9, 20, 30)] * 40),
    "blocks end where branches end": make_examples([(128, 128, 128), (256, 128, 256)]),
    "one token more": make_examples([(129, 128, 128)]),
}


def tokens_attended(inputs):
    """Which token attends to which by a block mask, (seq, seq), and how many pairs of blocks it computes."""
    mask, n_blocks = inputs["attention_mask"], inputs["input_ids"].shape[1] // FLEX_BLOCK
    order = torch.arange(n_blocks * FLEX_BLOCK)
    by_token = mask.mask_mod(None, None, order[:, None], order)
    seen, n_computed = torch.zeros_like(by_token), 0
    for row in range(n_blocks):
        for counts, indices, is_masked in (
            (mask.kv_num_blocks, mask.kv_indices, True),
            (mask.full_kv_num_blocks, mask.full_kv_indices, False),
        ):
            for column in indices[0, 0, row, : counts[0, 0, row]].tolist():
                own = (
                    slice(row * FLEX_BLOCK, (row + 1) * FLEX_BLOCK),
                    slice(column * FLEX_BLOCK, (column + 1) * FLEX_BLOCK),
                )
                seen[own], n_computed = by_token[own] if is_masked else True, n_computed + 1
    return seen, n_computed


@pytest.mark.parametrize("name", ROWS)
def test_the_block_mask_shows_what_the_additive_mask_shows_and_padding_sees_itself_alone(name):
    row = LAYOUTS["shared_prefix"].pack(ROWS[name])
    inputs, n = flex_inputs(row.inputs, row.segments), row.n_tokens
    seen, n_computed = tokens_attended(inputs)
    assert torch.equal(seen[:n, :n], additive_mask(row.segments, torch.float32)[0, 0] == 0)
    assert torch.equal(seen[n:], torch.eye(len(seen), dtype=torch.bool)[n:]) and not seen[:n, n:].any()
    blocks = seen.view(len(seen) // FLEX_BLOCK, FLEX_BLOCK, -1, FLEX_BLOCK).any(dim=3).any(dim=1)
    assert blocks.sum() <= n_computed <= 1.05 * blocks.sum() + 2  # few blocks in which nothing is seen


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_filled_to_whole_blocks_two_at_least(name):
    row = LAYOUTS["shared_prefix"].pack(ROWS[name])
    inputs = flex_inputs(row.inputs, row.segments)
    length = max(2 * FLEX_BLOCK, -(-row.n_tokens // FLEX_BLOCK) * FLEX_BLOCK)
    assert {tuple(inputs[key].shape) for key in row.inputs} == {(1, length)}
    assert inputs["attention_mask"].seq_lengths == (length, length)
    assert inputs["input_ids"][0, : row.n_tokens].tolist() == row.inputs["input_ids"][0].tolist()


@pytest.fixture
def graphs(monkeypatch):
    """Compile flex attention to what torch computes without a compiler, and count the compilations."""
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(torch_flex_attention.flex_attention, fullgraph=True, backend=counter)
    monkeypatch.setattr(attention, "compiled_flex_attention", lambda: compiled)
    return counter


@pytest.mark.parametrize("name", ["Llama", "GPTNeoX", "Gemma2", "Qwen3"])
def test_flex_attention_has_the_log_probabilities_of_the_padded_layout(name, graphs):
    """Grouped queries (Llama), none (GPTNeoX), capped scores and another scale (Gemma2), three heads (Qwen3)."""
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1} if name == "Qwen3" else {}
    module = ResponseLogps.wrap(tiny(name, **heads))
    before, padded = module.model.config._attn_implementation, sums_of_logps(module, EXAMPLES, "padded")
    use_attention(module.model, "flex_attention")
    torch.testing.assert_close(sums_of_logps(module, EXAMPLES, "shared_prefix"), padded, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1
    use_attention(module.model, "sdpa")
    assert module.model.config._attn_implementation == before


def test_flex_attention_is_compiled_once_for_policy_and_reference_and_keeps_no_batch(graphs, monkeypatch):
    """Once more for other lengths, and each time with and without gradients."""
    monkeypatch.setattr(torch_flex_attention, "_validate_device", lambda *states: None)  # refuses gradients on a CPU
    module, kept, compiled = ResponseLogps.wrap(tiny("Llama")), [], []
    use_attention(module.model, "flex_attention")
    for n in range(3, 8):  # in rows of 384, 384, 512, 640 and 768 tokens
        batch = LAYOUTS["shared_prefix"].pack(make_examples([(40 + n, 30, 20)] * n))
        for training in (False, True):
            with torch.set_grad_enabled(training):
                logps = module.train(training)(batch)
        logps.sum().backward()
        mask = batch.flex_inputs["attention_mask"]
        kept += [weakref.ref(each) for each in (batch.segments, mask, mask.kv_indices, batch.flex_inputs["input_ids"])]
        compiled.append(graphs.frame_count)
        del batch, mask, logps
    gc.collect()
    assert not any(each() is not None for each in kept)
    assert compiled == [2, 2, 4, 4, 4]


def test_compiled_layers_call_flex_attention_outside_of_their_graphs(graphs):
    module = ResponseLogps.wrap(tiny("Llama"))
    expected = sums_of_logps(module, EXAMPLES, "padded")
    use_attention(module.model, "flex_attention")
    layers = CompileCounter()
    for layer in module.model.model.layers:
        layer.compile(backend=layers, dynamic=True)
    torch.testing.assert_close(sums_of_logps(module, EXAMPLES, "shared_prefix"), expected, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1 and layers.frame_count > 0


@pytest.mark.parametrize("kind", ["varlen", "flex_attention", "packed"])
def test_whether_the_head_is_separate_is_found_without_compiled_layers_and_with_torchs_attention(kind):
    model, layers = tiny("Llama"), CompileCounter()
    use_attention(model, kind)
    for layer in model.model.layers:
        layer.compile(backend=layers, dynamic=True)
    assert has_separate_head(model)
    assert layers.frame_count == 0 and model.config._attn_implementation == kind


def test_what_packed_attention_does_not_compute_is_refused():
    states, mask = states_of([5, 3])
    branches = attention.BranchLengths(((5, 3),))
    with pytest.raises(ValueError, match="packed attention has no softcap"):
        attention.packed_attention(torch.nn.Identity(), *states, mask, branches, softcap=1.0)
