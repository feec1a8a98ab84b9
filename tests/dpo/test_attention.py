"""Attention in rows that hold several examples."""

import pytest
import torch
from tiny_models import EXACT, EXAMPLES, sums_of_logps, tiny

from dpo import attention
from dpo.attention import BRANCHED, additive_mask, cpu_attention, use_attention
from dpo.logps import ResponseLogps


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


@pytest.mark.parametrize("branched", [1, BRANCHED])
def test_attention_on_a_cpu_is_computed_in_float32_also_in_a_bfloat16_run(branched, make_trainer, monkeypatch, calls):
    monkeypatch.setattr(attention, "BRANCHED", branched)
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
    for branched in (1, BRANCHED):
        monkeypatch.setattr(attention, "BRANCHED", branched)
        own = [state.clone().requires_grad_() for state in states]
        out = cpu_attention(*own, mask, branches, scaling=scaling)
        (out * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
        found.append([out, *(state.grad for state in own)])
    for apart, masked in zip(*found, strict=True):
        assert torch.allclose(apart, masked, rtol=0, atol=1e-12)


def test_responses_attend_apart_in_long_examples_alone(calls):
    for length in (BRANCHED - 1, BRANCHED):
        branches = [length - 7, 3, 4]
        states, mask = states_of(branches)
        cpu_attention(*states, mask, branches)
    assert [call[:2] for call in calls] == [
        (BRANCHED - 1, BRANCHED - 1),
        (BRANCHED - 4, BRANCHED - 4),
        (4, BRANCHED - 3),
    ]


@pytest.mark.parametrize("name", EXACT)
def test_responses_that_attend_apart_have_the_log_probabilities_of_rows_of_their_own(name, monkeypatch):
    monkeypatch.setattr(attention, "BRANCHED", 1)
    module = ResponseLogps.wrap(tiny(name))
    padded = sums_of_logps(module, EXAMPLES, "padded")
    use_attention(module.model, "packed")
    torch.testing.assert_close(sums_of_logps(module, EXAMPLES, "shared_prefix"), padded, rtol=1e-5, atol=1e-5)
