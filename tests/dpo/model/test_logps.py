"""Log-probabilities, against one token at a time."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDENS
from tiny_models import EXAMPLES, PLENTY, mask_responses, respond, sums_of_logps, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.data.examples import TextExample, Tokenization
from dpo.model import logps
from dpo.model.attention import use_attention
from dpo.model.logps import FLOAT32_BYTES, ResponseLogps, response_logps, target_logps, uses_float32_product
from dpo.model.packing import LAYOUTS, make_microbatches

BUDGETS = (PLENTY, 90)  # tokens a microbatch: everything in one, and about one long example
TEXTS = (
    ("\n\nHuman: Which garden?\n\nAssistant:", " The quiet one by the river.", " None."),
    ("\n\nHuman: Hi\n\nAssistant:", "", " Hello there! What can I do for you on this bright day, and the next?"),
    ("A", " list of things: é, 木, 😀", " list"),
    ("\n\nHuman: one two three four five six seven\n\nAssistant:", " eight", " nine ten"),
)


def wrapped(name):
    return ResponseLogps.wrap(tiny(name))


# The oracle


@torch.no_grad()
def oracle(model, tokenizer, prompt, *responses):
    """Log pi(response, eos | prompt) of each response: one token at a time, unpadded, without special tokens."""
    sums = []
    for response in responses:
        ids, logp = tokenizer(prompt, add_special_tokens=False)["input_ids"], 0.0
        for token in tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]:
            logp += model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
            ids = [*ids, token]
        sums.append(logp)
    return sums


@pytest.fixture(scope="module")
def family(tiny_folder):
    """A family's model in float64, its examples, and what the oracle says of them."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64).eval()
    items = [TextExample(prompt, responses, "keep_end", 1, "") for prompt, *responses in TEXTS]
    expected = torch.tensor([oracle(model, tokenizer, *texts) for texts in TEXTS], dtype=torch.float64)
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, examples=Tokenization(tokenizer, 256, 128)(items), expected=expected
    )


@pytest.fixture(params=["model", "head", "head in chunks"])
def module(request, family, monkeypatch):
    """Compute logits by the model itself, and by its output embeddings, also for 5 tokens at a time."""
    if request.param == "head in chunks":
        monkeypatch.setattr("dpo.model.logps.CHUNK_BYTES", 0)
        monkeypatch.setattr("dpo.model.logps.CHUNK_TOKENS", 5)
    return ResponseLogps(family.model, separate_head=request.param != "model")


@pytest.mark.parametrize("max_tokens", BUDGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probabilities_are_those_of_one_token_at_a_time(family, layout, max_tokens, module):
    actual = sums_of_logps(module, family.examples, layout, max_tokens)
    torch.testing.assert_close(actual, family.expected, rtol=1e-6, atol=1e-6)


def test_these_families_logits_are_made_by_their_output_embeddings(family):
    """So that `module` tests what training uses; a model that scales its logits must not take this way."""
    assert ResponseLogps.wrap(family.model).separate_head
    forward = family.model.forward
    family.model.forward = lambda **inputs: SimpleNamespace(logits=forward(**inputs).logits * 0.5)
    assert not ResponseLogps.wrap(family.model).separate_head
    del family.model.forward


def test_the_oracle_depends_on_the_prompt(family):
    """So that a layout that mixed up prompts would be seen."""
    prompts = [prompt for prompt, *_ in TEXTS]
    for (_, *responses), expected, other in zip(TEXTS, family.expected, prompts[1:] + prompts[:1], strict=True):
        changed = torch.tensor(oracle(family.model, family.tokenizer, other, *responses), dtype=torch.float64)
        assert (changed - expected).abs().min() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_of_one_equals_a_batch_of_many(family, layout):
    many = sums_of_logps(ResponseLogps(family.model), family.examples, layout)
    ones = torch.cat([sums_of_logps(ResponseLogps(family.model), [example], layout) for example in family.examples])
    torch.testing.assert_close(ones, many, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_longer_neighbour_changes_nothing(family, layout):
    """It makes the others' padding 150 tokens longer, or stands before and after them in their row."""
    vocabulary = range(family.model.config.vocab_size)
    long = respond(vocabulary[:60], vocabulary[100:240], vocabulary[50:55])
    alone = sums_of_logps(ResponseLogps(family.model), family.examples, layout)
    between = sums_of_logps(ResponseLogps(family.model), [long, *family.examples, long], layout)
    torch.testing.assert_close(between[1:-1], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft_examples_have_the_log_probability_of_their_one_response(family, layout):
    chosen = [respond(example.prompt, example.responses[0]) for example in family.examples]
    actual = sums_of_logps(ResponseLogps(family.model), chosen, layout)
    torch.testing.assert_close(actual, family.expected[:, :1], rtol=1e-6, atol=1e-6)


# Masked responses


def without_every_third(example):
    """Make context of the second token of each three, but not of a response's last one."""
    masks = [[i % 3 != 1 or i == len(y) - 1 for i in range(len(y))] for y in example.responses]
    return mask_responses(example, *masks)


@pytest.mark.parametrize("max_tokens", BUDGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_context_in_a_response_is_seen_and_not_counted(family, layout, max_tokens, module):
    """Against the sum over the trained tokens, of one unpadded sequence at a time."""
    examples, expected = [without_every_third(example) for example in family.examples], []
    with torch.no_grad():
        for example in examples:
            for response, mask in zip(example.responses, example.loss_masks, strict=True):
                logits = family.model(torch.tensor([example.prompt + response])).logits[0, len(example.prompt) - 1 : -1]
                tokens = logits.log_softmax(-1)[range(len(response)), response]
                expected.append(tokens[torch.tensor(mask)].sum())
    actual = sums_of_logps(module, examples, layout, max_tokens)
    torch.testing.assert_close(actual, torch.stack(expected).view(-1, 2), rtol=1e-6, atol=1e-6)
    assert ((actual - family.expected).abs() > 0.1).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_gradient_comes_from_the_logits_that_predict_context(layout):
    """The last hidden state at a position has a gradient only from the logits there."""
    module, hidden = wrapped("Llama"), []
    example = mask_responses(respond([5, 6, 7], [8, 9, 10, 11, 12], [13]), [1, 1, 0, 0, 1], [1])
    (batch,) = make_microbatches([example], layout, PLENTY)

    def keep(_, __, output):
        output[0].retain_grad()
        hidden.append(output[0])

    module.model.base_model.register_forward_hook(keep)
    response_logps(module, batch).sums.sum().backward()
    with_gradient = hidden[0].grad.flatten(0, 1).abs().sum(1).nonzero().flatten().tolist()
    assert with_gradient == sorted(set(batch.sources.tolist()))
    assert with_gradient == {"shared_prefix": [2, 3, 6], "padded": [2, 3, 6, 10]}[layout]


# Hand-derived: a model whose prediction never depends on the context


class Constant(torch.nn.Module):
    """A model that predicts the same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.dtype = torch.tensor(logits), torch.get_default_dtype()
        self.config = SimpleNamespace(_attn_implementation="eager")

    def forward(self, input_ids, logits_to_keep=slice(None), **_):
        kept = input_ids[:, logits_to_keep]
        return SimpleNamespace(logits=self.logits.expand(*kept.shape, -1))


EOS = 4
PAIRS = [respond([3, 3, 3], [1, EOS], [2, 2, 0, EOS]), respond([0], [EOS], [3, 1, EOS]), respond([1] * 9, [2], [0, 0])]


@pytest.mark.parametrize("max_tokens", [PLENTY, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_response_token_and_eos_count_and_prompt_and_padding_never(layout, max_tokens):
    """Token t has probability p[t]; the prompts' token 3, and padding, whatever its id, would show.

    p = (1, 2, 4, 8, 16) / 31: log2 of 31^n times a response's probability is the sum of its ids.
    """
    model = Constant([math.log(2**i / 31) for i in range(5)])
    sums = sums_of_logps(ResponseLogps(model), PAIRS, layout, max_tokens)
    powers = (sums + torch.tensor([[2, 4], [1, 3], [1, 2]]) * math.log(31)) / math.log(2)
    expected = torch.tensor([[1 + 4, 2 + 2 + 0 + 4], [4, 3 + 1 + 4], [2, 0 + 0]], dtype=torch.float64)
    torch.testing.assert_close(powers, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probabilities_of_half_precision_logits_are_summed_in_float32(dtype):
    """1,000 tokens of probability 1/2: -1,000 ln 2 = -693.147; a sum in bfloat16 would stop growing by 256."""
    model = Constant([0.0, 0.0])
    model.logits = model.logits.to(dtype)
    (part,) = make_microbatches([respond([0], [1] * 1000)], "padded", PLENTY)
    logps = response_logps(ResponseLogps(model), part).sums
    assert logps.dtype == torch.float32
    assert logps.item() == pytest.approx(-1000 * math.log(2), rel=1e-4)


@pytest.mark.parametrize("tokens_at_a_time", [1, 3, 100])
@pytest.mark.parametrize(
    "dtype, computed, error, rounding",
    [(torch.float64, torch.float64, 1e-12, 1e-12), (torch.bfloat16, torch.float32, 1e-6, 2**-7)],
)
def test_the_gradient_of_a_log_probability_is_that_of_log_softmax(
    dtype, computed, error, rounding, tokens_at_a_time, monkeypatch
):
    monkeypatch.setitem(FLOAT32_BYTES, "cpu", tokens_at_a_time * 4 * 11)
    torch.manual_seed(0)
    logits, targets, weights = torch.randn(7, 11).to(dtype), torch.randint(11, (7,)), torch.randn(7).to(computed)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    logps = target_logps(ours, targets)
    expected = theirs.log_softmax(1, dtype=computed)[range(7), targets]
    (logps @ weights).backward()
    (expected @ weights).backward()
    assert torch.allclose(logps, expected, rtol=error, atol=0)
    assert torch.allclose(ours.grad, theirs.grad, rtol=rounding, atol=error / 1000)


class Largest(TorchDispatchMode):
    """Notes the most rows of any float32 tensor as wide as a vocabulary of 11."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32 and result.shape[1:] == (11,):
            self.rows = max(self.rows, len(result))
        return result


@pytest.mark.parametrize("size, rows", [(3 * 4 * 11, 3), (4 * 11 - 1, 1)])
def test_float32_logits_of_bfloat16_ones_exist_a_few_tokens_at_a_time(size, rows, monkeypatch):
    monkeypatch.setitem(FLOAT32_BYTES, "cpu", size)
    logits, kept = torch.randn(7, 11, dtype=torch.bfloat16).requires_grad_(), []
    with Largest() as forward, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        logps = target_logps(logits, torch.arange(7))
    with Largest() as backward:
        logps.sum().backward()
    assert (forward.rows, backward.rows) == (rows, rows)
    assert [t.dtype for t in kept if t.is_floating_point()] == [torch.bfloat16]


class Softmaxes(TorchDispatchMode):
    """Counts softmaxes."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "softmax" in function._schema.name
        return function(*args, **(kwargs or {}))


def test_on_cuda_each_chunk_of_logits_takes_one_softmax_each_way(monkeypatch):
    """A vocabulary of 152k had a launch for every 55 tokens."""
    assert FLOAT32_BYTES["cuda"] == logps.CHUNK_BYTES
    monkeypatch.setattr(logps, "CHUNK_BYTES", 4 * 97 * 20)
    monkeypatch.setattr(logps, "CHUNK_TOKENS", 1)
    monkeypatch.setitem(FLOAT32_BYTES, "cpu", logps.CHUNK_BYTES)
    (batch,) = make_microbatches(EXAMPLES, "shared_prefix", PLENTY)
    with Softmaxes() as softmaxes:
        ResponseLogps(tiny("Llama"), separate_head=True)(batch).sum().backward()
    n_chunks = -(-len(batch.targets) // 20)
    assert softmaxes.count == 3 * n_chunks > 3  # forward, and both again in the backward pass


def test_the_gradient_of_logits_takes_their_place_once():
    logits = torch.randn(7, 11).requires_grad_()
    logps, where = target_logps(logits * 1, torch.arange(7)), []
    logps.grad_fn.register_hook(lambda gradients, _: where.append(gradients[0].data_ptr()))
    kept = logps.grad_fn.saved_tensors[0].data_ptr()
    logps.sum().backward(retain_graph=True)
    assert where == [kept]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_the_gradient_of_a_log_probability_has_no_gradient_of_its_own():
    logits = torch.randn(7, 11).requires_grad_()
    logps = target_logps(logits, torch.arange(7))
    (gradient,) = torch.autograd.grad((logps**2).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_goldens_tokenizer_has_no_pad_and_eos_is_token_0():
    """So that padding with 0 meets responses that hold eos, and masking by id would be seen."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2")
    assert tokenizer.pad_token_id is None and tokenizer.eos_token_id == 0


def test_chunked_logits_give_the_same_numbers_and_gradients(monkeypatch):
    results = []
    monkeypatch.setattr("dpo.model.logps.CHUNK_BYTES", 0)
    for tokens in (10_000, 3):  # all at once, and three at a time
        monkeypatch.setattr("dpo.model.logps.CHUNK_TOKENS", tokens)
        model, sizes = tiny("Llama").double(), []
        (layout,) = make_microbatches(EXAMPLES, "shared_prefix", 1000)
        module = ResponseLogps.wrap(model)
        module.head.register_forward_hook(lambda head, inputs, logits, sizes=sizes: sizes.append(len(logits)))
        logps = module(layout)
        logps.sum().backward()
        assert max(sizes) == min(tokens, len(layout.targets))
        results.append((logps.detach(), model.lm_head.weight.grad, model.model.embed_tokens.weight.grad))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "n_bytes, calls", [(25 * 4 * 97, [25]), (24 * 4 * 97, [24, 1, 1, 24]), (7 * 4 * 97, [7, 7, 7, 4, 4, 7, 7, 7])]
)
def test_logits_of_up_to_so_many_bytes_are_kept_and_beyond_recomputed_in_chunks_of_them(n_bytes, calls, monkeypatch):
    """25 response tokens, a vocabulary of 97; the head alone is trained."""
    monkeypatch.setattr("dpo.model.logps.CHUNK_BYTES", n_bytes + 4 * 97 - 1)
    monkeypatch.setattr("dpo.model.logps.CHUNK_TOKENS", 6)
    model, sizes = tiny("Llama"), []
    model.base_model.requires_grad_(False)
    model.lm_head.register_forward_hook(lambda head, inputs, logits: sizes.append(len(logits)))
    module = ResponseLogps(model, separate_head=True)
    (part,) = make_microbatches(EXAMPLES, "shared_prefix", PLENTY)
    module(part).sum().backward()
    assert sizes == calls and model.lm_head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("separate", [True, False])
def test_a_pass_keeps_no_keys_and_values_for_generating(separate):
    model, caches = tiny("Llama"), []
    model.base_model.register_forward_hook(lambda body, args, output: caches.append(output.past_key_values))
    (part,) = make_microbatches(EXAMPLES, "shared_prefix", PLENTY)
    response_logps(ResponseLogps(model, separate), part)
    assert caches == [None]


def test_attention_in_a_shared_row_looks_at_one_example_at_a_time(monkeypatch):
    """Prompts and responses of 9 + 5 + 3, 4 + 2 + 8 and 13 + 1 + 6 tokens, in 2 layers."""
    model, widths = tiny("Llama"), []
    use_attention(model, "packed")
    attend = torch.nn.functional.scaled_dot_product_attention
    spy = lambda *states, **how: widths.extend(each.shape[2] for each in states) or attend(*states, **how)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    (part,) = make_microbatches(EXAMPLES, "shared_prefix", PLENTY)
    response_logps(ResponseLogps(model, separate_head=True), part)
    assert widths == ([17] * 3 + [14] * 3 + [20] * 3) * 2


def test_logits_that_a_model_caps_or_scales_are_left_to_the_model():
    assert not wrapped("Gemma2").separate_head
    assert wrapped("Llama").separate_head


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
@pytest.mark.parametrize("budget", [10, 40, 1000])
def test_a_token_budget_changes_no_log_probability_and_no_gradient(layout, budget):
    results = []
    for max_tokens in (10**6, budget):
        model = tiny("Llama").double()
        logps = {}
        for laid_out in make_microbatches(EXAMPLES, layout, max_tokens):
            part = response_logps(ResponseLogps.wrap(model), laid_out).sums
            part.sum().backward()
            logps |= {e.text: row for e, row in zip(laid_out.examples, part.tolist(), strict=True)}
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((torch.tensor([logps[e.text] for e in EXAMPLES]), gradient))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


# Adapters and precision


def test_an_adapter_is_computed_and_trained_through_the_wrapper_and_without_it_the_base_is_unchanged():
    from peft import LoraConfig, inject_adapter_in_model  # slow to import
    from peft.tuners.tuners_utils import BaseTunerLayer

    module = ResponseLogps.wrap(tiny("Llama"))
    (batch,) = make_microbatches(EXAMPLES, "shared_prefix", PLENTY)
    base = module(batch).detach()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"]), module.model)
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    adapter = {name: p for name, p in module.model.named_parameters() if "lora_" in name}
    for name, parameter in adapter.items():
        if "lora_B" in name:  # which is 0 at first
            torch.nn.init.normal_(parameter, std=0.1)
    on = module(batch)
    for layer in layers:
        layer.enable_adapters(False)
    off = module(batch)
    for layer in layers:
        layer.enable_adapters(True)
    assert torch.equal(off, base)
    assert (on - base).abs().max() > 0.01
    on.sum().backward()
    assert len(adapter) == 2 * (2 * 2 + 1)
    assert {name for name, p in module.model.named_parameters() if p.grad is not None} == set(adapter)
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.values())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_float32_head_computes_logits_in_float32_of_the_hidden_states_of_a_bfloat16_body(stored):
    """The weights are stored in float32, under autocast, or in bfloat16."""
    (batch,) = make_microbatches(EXAMPLES, "shared_prefix", PLENTY)
    model, hidden = tiny("Llama").to(stored), []
    model.base_model.register_forward_hook(lambda body, args, output: hidden.append(output[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=stored == torch.float32):
        plain, exact = (ResponseLogps(model, True, float32_head)(batch) for float32_head in (False, True))
    logits = hidden[1].flatten(0, 1)[batch.sources].double() @ model.lm_head.weight.double().T
    expected = logits.log_softmax(1).gather(1, batch.targets[:, None])[:, 0]
    assert exact.dtype == torch.float32
    assert (exact - expected).abs().max() < 1e-5
    assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize("separate", [True, False])
def test_collisions_are_the_log_of_the_sum_of_squared_probabilities(separate, monkeypatch):
    """In float64 from a pass of its own per response; logits are computed 7 tokens at a time, and 2 rows of softmax."""
    model = tiny("GPT2")
    (batch,) = make_microbatches(EXAMPLES, "padded", PLENTY)
    module = ResponseLogps(model, separate)
    plain = response_logps(module, batch)
    monkeypatch.setattr("dpo.model.logps.CHUNK_BYTES", 0)
    monkeypatch.setattr("dpo.model.logps.CHUNK_TOKENS", 7)
    monkeypatch.setitem(FLOAT32_BYTES, "cpu", 4 * 97 * 2)
    module.with_collisions = True
    found = response_logps(module, batch)
    assert torch.allclose(found.tokens, plain.tokens, atol=1e-6) and found.tokens.requires_grad
    assert plain.collisions is None and not found.collisions.requires_grad
    assert torch.equal(found.lengths, batch.lengths)
    expected = []
    with torch.no_grad():
        for example in EXAMPLES:
            for response in example.responses:
                logits = model(torch.tensor([example.prompt + response])).logits[0, len(example.prompt) - 1 : -1]
                expected.append(logits.double().softmax(-1).square().sum(-1).log())
    assert torch.allclose(found.collisions.double(), torch.cat(expected), atol=1e-5)


@pytest.fixture
def float32_product(monkeypatch):
    """Compute on a CPU as on an NVIDIA GPU, whose tensor cores multiply bfloat16 exactly and add in float32."""
    used, product = [], torch.mm

    def mm(a, b, out_dtype=None):
        if out_dtype is None:
            return product(a, b)
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        used.append(tuple(b.shape))
        with torch.autocast("cpu", enabled=False):
            return product(a.float(), b.float())

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr("dpo.model.logps.uses_float32_product", lambda weight: True)
    return used


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_float32_head_of_a_gpu_rounds_its_inputs_alone_and_has_the_gradient_of_a_bfloat16_layer(
    stored, float32_product, monkeypatch
):
    monkeypatch.setattr("dpo.model.logps.CHUNK_BYTES", 0)
    monkeypatch.setattr("dpo.model.logps.CHUNK_TOKENS", 7)
    (batch,) = make_microbatches(EXAMPLES, "shared_prefix", PLENTY)
    model, hidden, gradients = tiny("Llama").to(stored), [], []
    model.base_model.register_forward_hook(lambda body, args, output: hidden.append(output[0].detach()))
    for on in (True, False):
        monkeypatch.setattr("dpo.model.logps.uses_float32_product", lambda weight, on=on: on)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=stored == torch.float32):
            found = ResponseLogps(model, True, float32_head=True)(batch)
            (found * torch.arange(len(found)).sin()).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        if on:
            rounded = [
                part.bfloat16().double() for part in (hidden[0].flatten(0, 1)[batch.sources], model.lm_head.weight)
            ]
            expected = (rounded[0] @ rounded[1].T).log_softmax(1).gather(1, batch.targets[:, None])[:, 0]
            assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-5
    assert len(float32_product) == 2 * -(-len(batch.targets) // 7)  # again in the backward pass
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() < 0.02 * gradient.norm(), name


@pytest.mark.parametrize(
    "kind, dtype, autocast, expected",
    [
        ("cuda", torch.float32, True, True),
        ("cuda", torch.bfloat16, False, True),
        ("cuda", torch.float32, False, False),  # as the check of the layout computes
        ("cpu", torch.float32, True, False),
        ("mps", torch.bfloat16, False, False),
    ],
)
def test_nvidia_gpus_that_compute_in_bfloat16_take_that_product(kind, dtype, autocast, expected, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: autocast and device_type == kind)
    assert uses_float32_product(SimpleNamespace(device=torch.device(kind), dtype=dtype)) == expected
