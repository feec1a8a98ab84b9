"""The check that a layout changes no log-probability."""

import math
import re

import pytest
import torch
import varlen_kernel
from tiny_models import EXACT, EXAMPLES, NOT_EXACT, make_examples, mask_responses, sums_of_logps, tiny

from dpo.model import layout_check, varlen
from dpo.model.attention import KINDS, use_attention
from dpo.model.layout_check import choose_layout
from dpo.model.logps import ResponseLogps
from dpo.model.packing import make_microbatches


def layout_chosen_for(model, examples=EXAMPLES, max_length=64):
    """The layout that training uses for a model where shared_prefix is asked for."""
    module = ResponseLogps.wrap(model)
    return choose_layout(module, examples, "shared_prefix", max_length, torch.float32).layout


@pytest.mark.parametrize("name", EXACT)
def test_the_shared_prefix_is_exact(name):
    assert layout_chosen_for(tiny(name)) == "shared_prefix"


@pytest.mark.parametrize("name", NOT_EXACT)
def test_a_model_that_cannot_take_the_shared_prefix_falls_back_and_trains(name, capsys):
    model = tiny(name)
    assert layout_chosen_for(model) == "padded"
    assert re.search("differ by|the model fails", capsys.readouterr().out)
    logps = [ResponseLogps.wrap(model)(layout) for layout in make_microbatches(EXAMPLES, "padded", 1000)]
    torch.cat(logps).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


def test_all_tokens_of_masked_examples_are_compared(monkeypatch):
    counts, compare = [], layout_check.largest_difference
    monkeypatch.setattr(
        layout_check, "largest_difference", lambda a, b: counts.append((len(a), len(b))) or compare(a, b)
    )
    masked = [mask_responses(one, *([i == 0 for i in range(len(y))] for y in one.responses)) for one in EXAMPLES]
    assert [layout_chosen_for(tiny("Llama"), some) for some in (EXAMPLES, masked)] == ["shared_prefix"] * 2
    assert counts[0] == counts[1]


def test_a_window_that_no_real_example_fills_is_still_found():
    short = make_examples([(2, 2, 2), (3, 1, 2)])
    windowed = tiny("Mistral", sliding_window=48)
    assert layout_chosen_for(windowed, short, max_length=64) == "padded"
    assert layout_chosen_for(windowed, short, max_length=48) == "shared_prefix"


@pytest.mark.parametrize("separate_head", [True, False])
def test_experts_whose_model_has_a_loss_of_its_own_can_share_a_row(separate_head):
    """Transformers adds a loss over the router's logits, which fails with a mask of four dimensions."""
    module = ResponseLogps(tiny("Mixtral"), separate_head)
    assert module.model.config.output_router_logits
    padded, shared = (sums_of_logps(module, EXAMPLES, layout) for layout in ("padded", "shared_prefix"))
    torch.testing.assert_close(padded, shared, rtol=1e-5, atol=1e-5)


class Failing(ResponseLogps):
    """Fails in rows that hold several examples: forward in bfloat16, or backward."""

    fails_in = ""

    def forward(self, batch):
        logps = super().forward(batch)
        if batch.segments is None or not self.fails_in:
            return logps
        if self.fails_in == "bfloat16" and torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no kernel")
        if self.fails_in in ("backward", "memory") and logps.requires_grad:
            logps.register_hook(self.fail)
        return logps

    def fail(self, gradient):
        raise RuntimeError("no kernel" if self.fails_in == "backward" else "CUDA out of memory")


@pytest.mark.parametrize("fails_in", ["bfloat16", "backward"])
def test_a_kind_of_attention_that_fails_in_bfloat16_or_backward_is_not_used(fails_in, monkeypatch, capsys):
    module, tried = Failing(tiny("Llama"), True), []

    def switch(model, kind):
        tried.append(kind)
        module.fails_in = fails_in if kind == "flex_attention" else ""

    monkeypatch.setattr(layout_check, "attention_kinds", lambda facts: ["flex_attention", "packed"])
    monkeypatch.setattr(layout_check, "use_attention", switch)
    choice = choose_layout(module, EXAMPLES, "shared_prefix", 64, torch.bfloat16)
    assert choice.layout == "shared_prefix" and tried == ["flex_attention", "packed"]
    why = "the model fails in torch.bfloat16, forward and backward (RuntimeError: no kernel)"
    assert f"layout=shared_prefix cannot be used with flex_attention attention: {why}." in capsys.readouterr().out


def test_a_check_that_is_out_of_memory_in_its_backward_pass_ends_the_run():
    module = Failing(tiny("Llama"), True)
    module.fails_in = "memory"
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        choose_layout(module, EXAMPLES, "shared_prefix", 64, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checks_backward_pass_leaves_no_gradient_and_draws_no_random_number(dtype):
    module = ResponseLogps(tiny("Llama", attention_dropout=0.5), True).train()
    state = torch.get_rng_state()
    assert choose_layout(module, EXAMPLES, "shared_prefix", 64, dtype).layout == "shared_prefix"
    assert torch.equal(torch.get_rng_state(), state) and module.training
    assert all(parameter.grad is None for parameter in module.parameters())


class Shifted(ResponseLogps):
    """Gives another log-probability of one token, in rows that hold several examples."""

    token, shift = 0, 0.0

    def forward(self, batch):
        logps = super().forward(batch)
        if batch.segments is not None:
            logps[self.token] += self.shift
        return logps


@pytest.mark.parametrize("token", [0, 20, -1])
def test_one_token_that_differs_by_a_few_thousandths_of_a_nat_is_found_and_rounding_is_not(token):
    """Tokens 0 and 20 are of short examples, token -1 is one of the long example."""
    module, chosen = Shifted(tiny("Llama"), True), []
    module.token = token
    for module.shift in (1e-6, 2e-3, math.nan):
        chosen.append(choose_layout(module, EXAMPLES, "shared_prefix", 64, torch.float32).layout)
    assert chosen == ["shared_prefix", "padded", "padded"]


def test_one_example_is_enough_for_the_check():
    assert layout_chosen_for(tiny("Llama"), EXAMPLES[:1]) == "shared_prefix"
    assert {layout_chosen_for(tiny(name), EXAMPLES[:1]) for name in NOT_EXACT} == {"padded"}


def test_responses_of_one_token_are_enough_for_the_check(monkeypatch):
    """The only token of a response is predicted by its prompt, so it would not show that responses see each other."""
    short = make_examples([(3, 1, 1), (2, 1, 1)])
    assert layout_chosen_for(tiny("Llama"), short) == "shared_prefix"
    monkeypatch.setattr(
        "dpo.model.attention.visible", lambda segments, q, k: (segments[0][k] == segments[0][q]) & (k <= q)
    )
    assert layout_chosen_for(tiny("Llama"), short) == "padded"


def test_the_check_computes_little_more_than_twice_the_longest_example():
    examples, tokens = make_examples([(300, 200, 12)] * 8), []
    module = ResponseLogps(tiny("Llama", max_position_embeddings=512), True)
    module.register_forward_pre_hook(lambda module, args: tokens.append(args[0].inputs["input_ids"].numel()))
    choose_layout(module, examples, "shared_prefix", 512, torch.float32)
    assert 2 * 512 <= sum(tokens) <= 2 * 512 + 192


def test_a_check_that_was_made_before_is_not_repeated():
    policy = ResponseLogps(tiny("Llama"), True)
    known = choose_layout(policy, EXAMPLES, "shared_prefix", 64, torch.float32)
    use_attention(policy.model, "sdpa")
    policy.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    assert choose_layout(policy, EXAMPLES, "shared_prefix", 64, torch.float32, known) == known
    assert policy.model.config._attn_implementation == known.attention


# Kernels of 16 bits


def kind_chosen_for(model, monkeypatch, dtype=torch.bfloat16, kinds=("varlen", "packed")):
    """The kind of attention that is chosen on a device with these kinds."""
    monkeypatch.setattr(layout_check, "attention_kinds", lambda facts: list(kinds))
    return choose_layout(ResponseLogps.wrap(model), EXAMPLES, "shared_prefix", 64, dtype).attention


def hide(shape, n):
    """The keys after a query, causal from the end of the keys, and n more or fewer."""
    return torch.ones(shape, dtype=torch.bool).triu(shape[2] - shape[1] + 1 + n)


def causal_from_the_start(shape):
    return hide(shape, shape[1] - shape[2])


def without_the_first_key(shape):
    """Of the rows of the long example: one key of sixty is hidden from one query."""
    hidden = hide(shape, 0)
    hidden[:, -1, 0] = shape[1] > 40
    return hidden


def with_the_next_key(shape):
    return hide(shape, 1)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Qwen3"])
def test_a_kernel_that_rounds_is_used(name, stored, monkeypatch):
    assert kind_chosen_for(tiny(name).to(stored), monkeypatch) == "varlen"


@pytest.mark.parametrize("wrong", [causal_from_the_start, without_the_first_key, with_the_next_key])
def test_a_kernel_that_hides_or_shows_another_key_is_not_used(wrong, monkeypatch, capsys):
    def weights_of(q, k, scale):
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        return scores.masked_fill(wrong(scores.shape), -torch.inf).softmax(-1)

    monkeypatch.setattr(varlen_kernel, "weights_of", weights_of)
    assert kind_chosen_for(tiny("Llama"), monkeypatch) == "packed"
    assert "the output of its kernel differs from that of exact attention" in capsys.readouterr().out


def steeper(states):
    """The same numbers, with a gradient that is too large by a fifth."""
    return states + 0.2 * (states - states.detach())


@pytest.mark.parametrize(
    "what, distort",
    {
        "output": lambda q, k, v: (1.2 * q, k, v),  # as by another scale
        "values' gradient": lambda q, k, v: (q, k, steeper(v)),
        "queries' gradient": lambda q, k, v: (steeper(q), k, v),
        "keys' gradient": lambda q, k, v: (q, steeper(k), v),
        "output ": lambda q, k, v: (q, k.flip(1), v.flip(1)),  # heads in another order
    }.items(),
)
def test_a_kernel_that_is_wrong_in_16_bits_in_another_way_is_not_used(what, distort, monkeypatch, capsys):
    attend = varlen.varlen_attention

    def distorted(module, query, key, value, mask, **options):
        if varlen.attention_dtype(value) != torch.float32:
            query, key, value = distort(query, key, value)
        return attend(module, query, key, value, mask, **options)

    monkeypatch.setitem(KINDS, "varlen", distorted)
    assert kind_chosen_for(tiny("Llama"), monkeypatch) == "packed"
    assert f"the {what.strip()} of its kernel differs from that of exact attention" in capsys.readouterr().out


@pytest.mark.parametrize("dtype, kind", [(torch.bfloat16, "varlen"), (torch.float32, "packed")])
def test_a_kernel_that_fits_the_gpu_in_16_bits_alone_is_used_in_16_bits(dtype, kind, monkeypatch, capsys):
    def too_large(*args):
        raise RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376")

    monkeypatch.setattr(varlen, "exact_attention", too_large)
    assert kind_chosen_for(tiny("Llama"), monkeypatch, dtype) == kind
    assert "shared memory" in capsys.readouterr().out


def test_what_a_model_computes_itself_is_tried_last_where_torchs_attention_cannot_compute_it(monkeypatch, capsys):
    """Gemma 2 caps its scores, which the kernel refuses."""
    model = tiny("Gemma2")
    assert kind_chosen_for(model, monkeypatch) == "eager"
    assert "varlen attention has no softcap" in capsys.readouterr().out
    module = ResponseLogps.wrap(model)
    padded, shared = (sums_of_logps(module, EXAMPLES, layout) for layout in ("padded", "shared_prefix"))
    torch.testing.assert_close(padded, shared, rtol=1e-5, atol=1e-5)


def test_a_window_smaller_than_the_longest_example_is_refused(monkeypatch):
    assert kind_chosen_for(tiny("Mistral", sliding_window=48), monkeypatch) == "sdpa"  # the padded layout
    assert kind_chosen_for(tiny("Mistral", sliding_window=64), monkeypatch) == "varlen"
