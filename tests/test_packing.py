"""Layouts and log-probabilities, against one token at a time, and gradients, against one sequence at a time."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDENS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import losses
import packing
from preference_datasets import Example, Item, Tokenization

PLENTY = 2**30  # tokens a pass
BUDGETS = (PLENTY, 90)  # tokens a pass: everything in one, and about one long example
TEXTS = (
    ("\n\nHuman: Which garden?\n\nAssistant:", " The quiet one by the river.", " None."),
    ("\n\nHuman: Hi\n\nAssistant:", "", " Hello there! What can I do for you on this bright day, and the next?"),
    ("A", " list of things: é, 木, 😀", " list"),
    ("\n\nHuman: one two three four five six seven\n\nAssistant:", " eight", " nine ten"),
)


def respond(prompt, *responses):
    """Make an example of token ids."""
    return Example(Item("", ("",) * len(responses), "keep_end", 1, ""), list(prompt), tuple(map(list, responses)))


@torch.no_grad()
def response_logps(model, examples, layout, max_tokens=PLENTY, head=None):
    """Return the log-probabilities (examples, n_responses) in the order of the batch, by passes of a layout."""
    rows = {}
    for part in packing.make_passes(examples, layout, max_tokens):
        sums = packing.sequence_logps(model, part, head).double()
        rows |= {id(example): row for example, row in zip(part.examples, sums, strict=True)}
    return torch.stack([rows[id(example)] for example in examples])


# The oracle


@torch.no_grad()
def oracle(model, tokenizer, prompt, *responses):
    """Return log pi(response, eos | prompt) of each response: one token at a time, unpadded, without special tokens."""
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
    """Return a family's model in float64, its examples, and what the oracle says of them."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64).eval()
    items = [Item(prompt, responses, "keep_end", 1, "") for prompt, *responses in TEXTS]
    expected = torch.tensor([oracle(model, tokenizer, *texts) for texts in TEXTS], dtype=torch.float64)
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, examples=Tokenization(tokenizer, 256, 128)(items), expected=expected
    )


@pytest.fixture(params=["model", "head", "head in chunks"])
def head(request, family, monkeypatch):
    """Give logits by the model itself, and by its output embeddings, also for 5 tokens at a time."""
    if request.param == "head in chunks":
        monkeypatch.setattr(packing, "CHUNK_BYTES", 0)
        monkeypatch.setattr(packing, "CHUNK_TOKENS", 5)
    return None if request.param == "model" else packing.find_head(family.model)


@pytest.mark.parametrize("max_tokens", BUDGETS)
@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_log_probabilities_are_those_of_one_token_at_a_time(family, layout, max_tokens, head):
    actual = response_logps(family.model, family.examples, layout, max_tokens, head)
    torch.testing.assert_close(actual, family.expected, rtol=1e-6, atol=1e-6)


def test_these_families_logits_are_made_by_their_output_embeddings(family):
    """So that `head` is tested; a model that scales its logits must not take this way."""
    head = packing.find_head(family.model)
    assert head is family.model.get_output_embeddings()
    forward = family.model.forward
    family.model.forward = lambda **inputs: SimpleNamespace(logits=forward(**inputs).logits * 0.5)
    assert packing.find_head(family.model) is None
    del family.model.forward


def test_the_oracle_depends_on_the_prompt(family):
    """So that a layout that mixed up prompts would be seen."""
    prompts = [prompt for prompt, *_ in TEXTS]
    for (_, *responses), expected, other in zip(TEXTS, family.expected, prompts[1:] + prompts[:1], strict=True):
        changed = torch.tensor(oracle(family.model, family.tokenizer, other, *responses), dtype=torch.float64)
        assert (changed - expected).abs().min() > 0.1


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_a_batch_of_one_equals_a_batch_of_many(family, layout):
    many = response_logps(family.model, family.examples, layout)
    ones = torch.cat([response_logps(family.model, [example], layout) for example in family.examples])
    torch.testing.assert_close(ones, many, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_a_longer_neighbour_changes_nothing(family, layout):
    """It makes the others' padding 150 tokens longer, or stands before and after them in their row."""
    vocabulary = range(family.model.config.vocab_size)
    long = respond(vocabulary[:60], vocabulary[100:240], vocabulary[50:55])
    alone = response_logps(family.model, family.examples, layout)
    between = response_logps(family.model, [long, *family.examples, long], layout)
    torch.testing.assert_close(between[1:-1], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_sft_examples_have_the_log_probability_of_their_one_response(family, layout):
    chosen = [respond(example.prompt, example.responses[0]) for example in family.examples]
    actual = response_logps(family.model, chosen, layout)
    torch.testing.assert_close(actual, family.expected[:, :1], rtol=1e-6, atol=1e-6)


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
@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_every_response_token_and_eos_count_and_prompt_and_padding_never(layout, max_tokens):
    """Token t has probability p[t]; the prompts' token 3, and padding, whatever its id, would show.

    p = (1, 2, 4, 8, 16) / 31: log2 of 31^n times a response's probability is the sum of its ids.
    """
    model = Constant([math.log(2**i / 31) for i in range(5)])
    sums = response_logps(model, PAIRS, layout, max_tokens)
    powers = (sums + torch.tensor([[2, 4], [1, 3], [1, 2]]) * math.log(31)) / math.log(2)
    expected = torch.tensor([[1 + 4, 2 + 2 + 0 + 4], [4, 3 + 1 + 4], [2, 0 + 0]], dtype=torch.float64)
    torch.testing.assert_close(powers, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [PLENTY, 12, 1])
@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_every_example_is_in_exactly_one_pass_with_its_targets_and_lengths(layout, max_tokens):
    passes = list(packing.make_passes(PAIRS, layout, max_tokens))
    assert sorted(PAIRS.index(example) for part in passes for example in part.examples) == [0, 1, 2]
    for part in passes:
        responses = [response for example in part.examples for response in example.responses]
        assert part.targets.tolist() == sum(responses, [])
        assert part.lengths.tolist() == [[len(response) for response in example.responses] for example in part.examples]
        assert len(part.sources) == len(part.targets)
    assert len(passes) == {PLENTY: 1, 1: 3}.get(max_tokens, len(passes))


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_each_target_is_predicted_from_the_token_before_it(layout):
    for part in packing.make_passes(PAIRS, layout, PLENTY):
        before = part.inputs["input_ids"].flatten()[part.sources].tolist()
        expected = [
            token
            for example in part.examples
            for response in example.responses
            for token in [example.prompt[-1], *response[:-1]]
        ]
        assert before == expected


def test_a_shared_prefix_is_computed_once_and_without_padding():
    (part,) = packing.make_passes(PAIRS, "shared_prefix", PLENTY)
    assert part.inputs["input_ids"].tolist() == [
        [*[3, 3, 3], *[1, EOS], *[2, 2, 0, EOS], *[0], *[EOS], *[3, 1, EOS], *[1] * 9, *[2], *[0, 0]]
    ]
    assert part.inputs["position_ids"].tolist() == [
        [*[0, 1, 2], *[3, 4], *[3, 4, 5, 6], *[0], *[1], *[1, 2, 3], *range(9), *[9], *[9, 10]]
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probabilities_of_half_precision_logits_are_summed_in_float32(dtype):
    """1,000 tokens of probability 1/2: -1,000 ln 2 = -693.147; a sum in bfloat16 would stop growing by 256."""
    model = Constant([0.0, 0.0])
    model.logits = model.logits.to(dtype)
    (part,) = packing.make_passes([respond([0], [1] * 1000)], "padded", PLENTY)
    logps = packing.sequence_logps(model, part, None)
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
    monkeypatch.setitem(packing.FLOAT32_BYTES, "cpu", tokens_at_a_time * 4 * 11)
    torch.manual_seed(0)
    logits, targets, weights = torch.randn(7, 11).to(dtype), torch.randint(11, (7,)), torch.randn(7).to(computed)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    logps = packing.target_logps(ours, targets)
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


def test_float32_logits_of_bfloat16_ones_exist_a_few_tokens_at_a_time(monkeypatch):
    monkeypatch.setitem(packing.FLOAT32_BYTES, "cpu", 3 * 4 * 11)
    logits, kept = torch.randn(7, 11, dtype=torch.bfloat16).requires_grad_(), []
    with Largest() as forward, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        logps = packing.target_logps(logits, torch.arange(7))
    with Largest() as backward:
        logps.sum().backward()
    assert (forward.rows, backward.rows) == (3, 3)
    assert [t.dtype for t in kept if t.is_floating_point()] == [torch.bfloat16]


def test_the_gradient_of_a_log_probability_has_no_gradient_of_its_own():
    logits = torch.randn(7, 11).requires_grad_()
    logps = packing.target_logps(logits, torch.arange(7))
    (gradient,) = torch.autograd.grad((logps**2).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# Whole trainers


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_the_first_margin_is_exactly_0_though_the_models_config_has_dropout(tiny_folder, layout, make_trainer):
    config = AutoConfig.from_pretrained(tiny_folder).to_dict()
    assert [value for key, value in config.items() if "drop" in key and value == 0.1]
    trainer = make_trainer("loss=dpo", f"model.name_or_path='{tiny_folder}'", f"layout={layout}", "lr=1e-3")
    assert trainer.layout == layout
    first, second = (trainer.train_step(batch) for batch, _ in zip(trainer.train_batches, range(2), strict=False))
    rewards = [f"rewards_train/{what}" for what in ("chosen", "rejected", "margins", "accuracies")]
    assert [first[key] for key in rewards] == [0.0] * 4
    assert all(second[key] != 0.0 for key in rewards[:3])


def gradient(trainer, batch, accumulation):
    """Return the gradient before clipping of one update."""
    kept = []
    clip = trainer.clip_gradient
    trainer.clip_gradient = lambda: kept.append(flat_gradient(trainer.policy)) or clip()
    trainer.config.gradient_accumulation_steps = accumulation
    trainer.train_step(batch)
    del trainer.clip_gradient
    return kept[0]


def flat_gradient(model):
    """Return the gradient as one vector."""
    return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])


def sum_of_logps(model, prompt, response):
    """Return log pi(response | prompt) from one unpadded sequence."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), response].sum()


def oracle_gradient(trainer, examples):
    """Return the gradient of the mean loss in float64, one unpadded sequence at a time; beta is 0.1."""
    policy = copy.deepcopy(trainer.policy).double()
    reference = trainer.reference and copy.deepcopy(trainer.reference.model).double()
    for example in examples:
        logps = [sum_of_logps(policy, example.prompt, response) for response in example.responses]
        if len(logps) == 1:
            loss = -logps[0]
        else:
            with torch.no_grad():
                others = [sum_of_logps(reference, example.prompt, response) for response in example.responses]
            loss = losses.preference_loss(*logps, *others, beta=0.1)[0]
        (loss / len(examples)).backward()
    return flat_gradient(policy)


@pytest.mark.parametrize("max_tokens", [100_000, 300])
@pytest.mark.parametrize("loss", ["sft", "dpo"])
@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_accumulation_and_token_budget_change_nothing_in_the_gradient(layout, loss, max_tokens, make_trainer):
    """The policy is moved away from the reference first, so that each pair has a weight of its own."""
    trainer = make_trainer(f"loss={loss}", f"layout={layout}", f"max_tokens_per_pass={max_tokens}", "lr=1e-30")
    assert trainer.layout == layout
    perturb(trainer.policy)
    batch = next(iter(trainer.train_batches))
    assert len({len(response) for example in batch.examples for response in example.responses}) >= 6
    assert (len(list(trainer.passes(batch.examples))) > 1) == (max_tokens == 300)
    expected = oracle_gradient(trainer, batch.examples)
    for accumulation in (1, 2, 4):
        actual = gradient(trainer, batch, accumulation)
        assert (actual - expected).norm() < 1e-5 * expected.norm(), accumulation


@pytest.mark.parametrize("setting", ["CHUNK_TOKENS", "activation_checkpointing"])
def test_recomputing_changes_nothing_in_the_gradient(setting, make_trainer, monkeypatch):
    """Of logits, 7 tokens at a time, or of activations."""
    trainer = make_trainer("loss=dpo", f"activation_checkpointing={setting == 'activation_checkpointing'}", "lr=1e-30")
    if setting == "CHUNK_TOKENS":
        monkeypatch.setattr(packing, "CHUNK_BYTES", 0)
        monkeypatch.setattr(packing, "CHUNK_TOKENS", 7)
    perturb(trainer.policy)
    batch = next(iter(trainer.train_batches))
    expected = oracle_gradient(trainer, batch.examples)
    assert (gradient(trainer, batch, 1) - expected).norm() < 1e-5 * expected.norm()


def perturb(model):
    """Move a model's parameters by a little noise, the same each time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_the_goldens_tokenizer_has_no_pad_and_eos_is_token_0():
    """So that padding with 0 meets responses that hold eos, and masking by id would be seen."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2")
    assert tokenizer.pad_token_id is None and tokenizer.eos_token_id == 0
