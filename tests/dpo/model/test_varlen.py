"""Attention by torch's kernel for sequences of any lengths, with a stand-in for the kernel on a CPU."""

import pytest
import torch
import varlen_kernel
from tiny_models import EXACT, EXAMPLES, make_examples, respond, sums_of_logps, tiny
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.model import varlen
from dpo.model.attention import additive_mask, use_attention
from dpo.model.loading import compile_layers
from dpo.model.logps import ResponseLogps
from dpo.model.packing import LAYOUTS
from dpo.model.varlen import Gathered, make_segments, varlen_attention

CPU = torch.device("cpu")
FAMILIES = [name for name in EXACT if name not in ("GPTJ", "Falcon", "Gemma2")]  # these have attention of their own
ROWS = {
    "two responses": [(3, 2, 2), (1, 1, 1), (9, 4, 30)],
    "one response": [(3, 2), (1, 1)],
    "three responses": [(5, 3, 4, 1), (1, 1, 1, 1), (7, 9, 2, 6)],
}


@pytest.fixture(params=["in float32", "by the kernel"])
def way(request, monkeypatch):
    """Compute float32 as it is, or as if the kernel computed it."""
    if request.param == "by the kernel":
        monkeypatch.setattr(varlen, "HALF", (torch.float32, torch.float64))
    varlen_kernel.calls.clear()
    return request.param


def logps_and_gradients(module, examples, layout):
    module.zero_grad()
    logps = module(LAYOUTS[layout].pack(examples))
    (logps * torch.arange(len(logps)).sin()).sum().backward()
    return [logps.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def make_row(branches, dtype=torch.float64):
    """Make queries of 4 heads, keys and values of 2, their options, and the mask, of a row of examples."""
    torch.manual_seed(0)
    states = [torch.randn(1, heads, sum(map(sum, branches)), 8, dtype=dtype) for heads in (4, 2, 2)]
    lengths = torch.tensor([n for example in branches for n in example])
    numbers = torch.tensor([(i, k) for i, example in enumerate(branches) for k in range(len(example))]).T
    mask = additive_mask(numbers.repeat_interleave(lengths, dim=1), dtype)
    return states, {"segments": make_segments(branches, CPU), "scaling": 0.3}, mask


def test_segments_of_a_row_are_those_counted_by_hand():
    """Tokens 0-2 are the first prompt, 3-4 and 5-6 its responses; 7 is the second prompt, 8 and 9 its responses."""
    segments = make_segments([(3, 2, 2), (1, 1, 1)], CPU)
    assert segments.query_starts.tolist() == [0, 5, 7, 9, 10]
    assert segments.key_starts.tolist() == [0, 5, 10, 12, 14]
    assert segments.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 7, 9]
    assert segments.places.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 13]
    assert segments.prompts.tolist() == [0, 1, 2, 7] and [copy.tolist() for copy in segments.copies] == [[5, 6, 7, 12]]
    assert segments.lengths == ((5, 5), (2, 5), (2, 2), (1, 2))
    assert (segments.longest_query, segments.longest_key) == (5, 5)
    assert {index.dtype for index in (segments.query_starts, segments.keys, *segments.copies)} == {torch.int32}


@pytest.mark.parametrize("name", ROWS)
def test_the_gradient_of_what_is_gathered_is_that_of_an_index(name):
    segments = make_segments(ROWS[name], CPU)
    rows = torch.randn(len(segments.places), 2, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(segments.keys), 2, 8, dtype=torch.float64)
    index = segments.keys, segments.places, segments.prompts, *segments.copies
    found = []
    for gathered in (Gathered.apply(rows, *index), rows[segments.keys.long()]):
        found += [gathered, *torch.autograd.grad((gathered * weights).sum(), rows)]
    assert torch.equal(found[0], found[2]) and torch.allclose(found[1], found[3], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_attends_to_what_the_mask_shows(name, way):
    states, options, mask = make_row(ROWS[name], torch.float32)
    k, v = (state.repeat_interleave(2, 1) for state in states[1:])
    expected = torch.nn.functional.scaled_dot_product_attention(states[0], k, v, attn_mask=mask, scale=0.3)
    out, _ = varlen_attention(torch.nn.Identity(), *states, None, **options)
    assert torch.allclose(out, expected.transpose(1, 2), rtol=0, atol=1e-6)
    assert len(varlen_kernel.calls) == (way == "by the kernel")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_log_probabilities_and_gradients_of_the_padded_layout(name, way):
    module = ResponseLogps.wrap(tiny(name))
    expected = logps_and_gradients(module, EXAMPLES, "padded")
    use_attention(module.model, "varlen")
    found = logps_and_gradients(module, EXAMPLES, "shared_prefix")
    for actual, padded in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, padded, rtol=1e-4, atol=1e-4)
    assert len(varlen_kernel.calls) == (2 if way == "by the kernel" else 0)  # one for each layer


@pytest.mark.parametrize(
    "examples",
    [
        [respond([5, 6], [7], [8]), respond([9], [10], [11])],
        [respond([5, 6, 7], [8, 9]), respond([4], [3])],
        [respond([5, 6, 7], [8, 9], [10], [11, 12, 13]), respond([4], [3], [5], [6])],
    ],
    ids=["one token each", "one response", "three responses"],
)
def test_any_number_of_responses_and_tokens_has_the_log_probabilities_of_the_padded_layout(examples, way):
    module = ResponseLogps.wrap(tiny("Llama"))
    expected = logps_and_gradients(module, examples, "padded")
    use_attention(module.model, "varlen")
    for actual, padded in zip(logps_and_gradients(module, examples, "shared_prefix"), expected, strict=True):
        torch.testing.assert_close(actual, padded, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own compiler
def test_layers_are_compiled_as_one_graph_for_all_lengths():
    """Twice: in training, and in evaluation without gradients. fullgraph raises an error if the graph breaks."""
    torch.compiler.reset()
    module = ResponseLogps.wrap(tiny("Llama"))
    use_attention(module.model, "varlen")
    graphs = CompileCounter()
    for layer in module.model.model.layers:
        layer.compile(backend=graphs, dynamic=True, fullgraph=True)
    for examples in (EXAMPLES, EXAMPLES[1:], EXAMPLES[:1], make_examples([(20, 5, 7)] * 4)):
        batch = LAYOUTS["shared_prefix"].pack(examples)
        with torch.autocast("cpu", torch.bfloat16):
            module.train()(batch).sum().backward()
            with torch.no_grad():
                module.eval()(batch)
    assert graphs.frame_count == 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own compiler
def test_layers_stay_compiled_for_more_kinds_of_rows_than_torchs_default(monkeypatch):
    torch.compiler.reset()
    calls, compile_module = [], torch.nn.Module.compile

    def backend(graph, inputs):
        return lambda *args: calls.append(graph) or graph(*args)

    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **how: compile_module(layer, backend=backend, **how))
    module = ResponseLogps.wrap(tiny("Llama"))
    use_attention(module.model, "varlen")
    with torch._dynamo.config.patch(recompile_limit=8):  # its default, also after this test
        compile_layers(module.model)
        for n in range(1, 11):  # responses of an example
            calls.clear()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                module(LAYOUTS["shared_prefix"].pack([respond([5, 6, 7], *[[8, 9]] * n)] * 2))
            assert len(calls) == len(module.model.model.layers)


class Watch(TorchDispatchMode):
    """Notes the largest tensor that is made, and which operators read a value of a tensor."""

    def __init__(self):
        super().__init__()
        self.largest, self.waits = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "_local_scalar_dense" in str(function):
            self.waits.append(function)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self.largest = max(self.largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return result


def test_a_pass_makes_no_mask_and_waits_for_no_value(monkeypatch):
    """Of the 600 tokens, each has at most 64 numbers in a layer, in the feed-forward part."""
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, *args, **options: q + k.sum() + v.sum())
    model = tiny("Llama", max_position_embeddings=1024)
    use_attention(model, "varlen")
    batch = LAYOUTS["shared_prefix"].pack(make_examples([(290, 5, 5)] * 2))
    assert batch.varlen_segments.longest_key == 295  # made on the host
    with torch.autocast("cpu", torch.bfloat16), Watch() as watch:
        ResponseLogps(model, separate_head=True)(batch).sum().backward()
    assert watch.largest < 600**2 / 2 and not watch.waits


def test_policy_and_reference_share_what_is_made_of_the_lengths(monkeypatch):
    made = []
    monkeypatch.setattr("dpo.model.packing.make_segments", lambda *args: made.append(args) or make_segments(*args))
    modules = [ResponseLogps.wrap(tiny("Llama")) for _ in range(2)]
    batch = LAYOUTS["shared_prefix"].pack(EXAMPLES)
    for module in modules:
        use_attention(module.model, "varlen")
        module(batch)
    assert len(made) == 1


@pytest.mark.parametrize(
    "option",
    [{"softcap": 30.0}, {"s_aux": torch.ones(4)}, {"position_bias": 1}, {"dropout": 0.1}, {"sliding_window": 4}],
)
def test_what_the_kernel_does_not_compute_is_refused(option):
    states, options, mask = make_row([(3, 2, 1)])
    with pytest.raises(ValueError, match=f"varlen attention has no {next(iter(option)).replace('_', '.')}"):
        varlen_attention(torch.nn.Identity(), *states, None, **options, **option)
    with pytest.raises(ValueError, match="no mask"):
        varlen_attention(torch.nn.Identity(), *states, mask, **options)
    varlen_attention(torch.nn.Identity(), *states, None, **options, dropout=0.0, softcap=None, sliding_window=5)


@pytest.mark.parametrize("size", [12, 264])
def test_heads_of_other_sizes_are_refused_in_every_dtype(size):
    states = [torch.ones(1, 2, 6, size) for _ in range(3)]
    with pytest.raises(ValueError, match=f"not {size}"):
        varlen_attention(torch.nn.Identity(), *states, None, make_segments([(3, 2, 1)], CPU))


def test_a_model_can_be_switched_between_kinds_of_attention():
    module = ResponseLogps.wrap(tiny("Llama"))
    expected = sums_of_logps(module, EXAMPLES, "padded")
    for kind, layout in (
        ("varlen", "shared_prefix"),
        ("packed", "shared_prefix"),
        ("varlen", "shared_prefix"),
        ("sdpa", "padded"),
    ):
        use_attention(module.model, kind)
        assert module.model.config._attn_implementation == kind
        torch.testing.assert_close(sums_of_logps(module, EXAMPLES, layout), expected, rtol=1e-5, atol=1e-5)
