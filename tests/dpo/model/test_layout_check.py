"""The check that a layout changes no log-probability."""

import math
import re

import pytest
import torch
from tiny_models import EXACT, EXAMPLES, NOT_EXACT, make_examples, mask_responses, sums_of_logps, tiny

from dpo.model import layout_check
from dpo.model.attention import use_attention
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
