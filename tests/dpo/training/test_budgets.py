"""max_tokens_per_pass: what auto estimates for a GPU, the search of fit, and that it leaves no trace in the run."""

import math

import pytest
import torch
from conftest import TINY, validated, without_measurements
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedModel

import build
from dpo.model.layout_check import LayoutChoice
from dpo.model.loading import recompute_activations
from dpo.model.logps import ResponseLogps
from dpo.system.devices import DeviceFacts
from dpo.system.errors import UserError
from dpo.system.state import random_states
from dpo.training import budgets
from dpo.training.budgets import (
    MemoryEstimate,
    auto_budget,
    copied_bytes,
    estimate_memory,
    heaviest_examples,
    largest_budget,
    peak_of_microbatch,
    resolve_max_tokens,
    training_state,
)
from dpo.training.optimizers import stepped_optimizer
from tools import inspection

FIT = ("loss=dpo", "max_tokens_per_pass=fit", "n_eval_examples=8")
GB = 10**9

# The estimate

SMOLLM2 = {
    **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}
PYTHIA = {
    **{"vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32},
    "num_attention_heads": 32,
}
SHAPES = {"SmolLM2": lambda: LlamaConfig(**SMOLLM2), "Pythia-2.8B": lambda: GPTNeoXConfig(**PYTHIA)}
KINDS = {
    "flex": LayoutChoice("shared_prefix", "flex_attention"),
    "varlen": LayoutChoice("shared_prefix", "varlen"),
    "packed": LayoutChoice("shared_prefix", "packed"),
    "padded": LayoutChoice("padded", "sdpa"),
    "eager": LayoutChoice("shared_prefix", "eager"),
}


def estimated(shape, kind="flex", *overrides, trained=True, n_shards=1):
    """Estimate the memory of a shape in bfloat16 on a GPU, with parameters in float32 and DPO's second model."""
    settings, loss = validated(*TINY, "loss=dpo", "precision=auto", *overrides)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=getattr(torch, settings.model.policy_dtype))
    model.requires_grad_(trained)
    module = ResponseLogps(model, separate_head=True)
    return estimate_memory(module, settings, loss, torch.bfloat16, KINDS[kind], n_shards)


def gpu(memory_gb):
    return DeviceFacts("cuda", int(memory_gb * GB), capability=(9, 0), triton=True)


# Peaks in GB of benchmarks/throughput.py, measured on one H200 with torch 2.11. 13,600 tokens are those of 64 pairs.
MEASURED = [
    ("SmolLM2", "flex", 8_192, 10),
    ("SmolLM2", "flex", 32_768, 34),
    ("Pythia-2.8B", "packed", 8_192, 63),
    ("Pythia-2.8B", "padded", 8_192, 70),
    ("Pythia-2.8B", "packed", 13_600, 78),
    ("Pythia-2.8B", "flex", 13_600, 79),
]


@pytest.mark.parametrize("shape, kind, n_tokens, peak", MEASURED)
def test_the_estimate_lies_above_what_was_measured_by_less_than_a_half(shape, kind, n_tokens, peak):
    assert peak * GB <= estimated(shape, kind).at(n_tokens) <= 1.5 * peak * GB


BUDGETS = [
    # shape, GB of the GPU, tokens
    ("SmolLM2", 16, 8_192),  # T4
    ("SmolLM2", 25, 14_336),  # RTX 4090
    ("SmolLM2", 85, 32_768),  # A100
    ("SmolLM2", 149, 32_768),  # H200
    ("Pythia-2.8B", 16, 1_024),  # even the weights do not fit: the run ends with what helps
    ("Pythia-2.8B", 85, 6_144),
    ("Pythia-2.8B", 149, 20_480),
]


@pytest.mark.parametrize("shape, memory, tokens", BUDGETS)
def test_a_gpus_microbatches_have_as_many_tokens_as_fit(shape, memory, tokens):
    facts, need = gpu(memory), estimated(shape)
    assert auto_budget(facts, need) == tokens
    share = 0.9 * memory * GB
    assert need.at(tokens) <= share or tokens == budgets.TOKEN_STEP
    assert need.at(tokens + budgets.TOKEN_STEP) > share or tokens == budgets.MAX_AUTO_TOKENS["cuda"]


def test_as_many_tokens_as_fit_are_found_also_where_memory_grows_with_their_square():
    need = MemoryEstimate(fixed=100.0, per_token=2.0, per_square=0.5)
    assert need.at(10) == 170 and need.max_tokens(170) == 10 and need.max_tokens(169) == 9
    assert MemoryEstimate(100.0, 2.0).max_tokens(171) == 35 and need.max_tokens(50) == 0


def test_settings_that_need_less_memory_are_estimated_to_need_less():
    n, plain = 16_384, estimated("Pythia-2.8B")
    less = {
        "activation_checkpointing=true": estimated("Pythia-2.8B", "flex", "activation_checkpointing=true"),
        "loss.precompute_reference=true": estimated("Pythia-2.8B", "flex", "loss.precompute_reference=true"),
        "lora=default": estimated("Pythia-2.8B", "flex", "lora=default", trained=False),
        "model.policy_dtype=bfloat16": estimated("Pythia-2.8B", "flex", "model.policy_dtype=bfloat16"),
        "four devices": estimated("Pythia-2.8B", "flex", "trainer=FSDPTrainer", "reduce_every_pass=true", n_shards=4),
    }
    assert {name: need.at(n) < plain.at(n) for name, need in less.items()} == dict.fromkeys(less, True)
    more = {
        "optimizer=AdamW": estimated("Pythia-2.8B", "flex", "optimizer=AdamW"),
        "a mask": estimated("Pythia-2.8B", "packed"),
        "all weights of attention": estimated("Pythia-2.8B", "eager"),
    }
    assert {name: need.at(n) > plain.at(n) for name, need in more.items()} == dict.fromkeys(more, True)


def test_eager_attention_keeps_its_weights_for_whole_rows():
    """111 GB at 8,192 tokens of Gemma 2 (26 layers of 8 heads), measured on one H200: 8 bytes each."""
    own = estimated("Pythia-2.8B", "eager")
    assert own.per_square == 8 * 32 * 32  # heads, layers
    assert estimated("Pythia-2.8B", "packed").per_square == 4  # one mask, in the dtype of the parameters
    assert estimated("Pythia-2.8B", "padded").per_square == estimated("Pythia-2.8B", "flex").per_square == 0
    assert 8 * 8 * 26 * 8_192**2 == pytest.approx(111 * GB, rel=0.01)


@pytest.mark.parametrize("shape, width", [("SmolLM2", 2 * 3 * 64), ("Pythia-2.8B", 2 * 2560)])
def test_varlen_attention_keeps_gathered_keys_and_values_and_no_mask(shape, width):
    """Of two tokens for each one in the row at most: all of it a prompt, gathered for both responses."""
    gathered, plain = estimated(shape, "varlen"), estimated(shape, "flex")
    n_layers = SHAPES[shape]().num_hidden_layers
    assert gathered.per_square == 0 and gathered.fixed == plain.fixed
    assert gathered.per_token - plain.per_token == pytest.approx(budgets.ACTIVATION_MARGIN * 2 * 2 * width * n_layers)


def test_inspecting_on_a_gpu_estimates_from_the_config_alone(monkeypatch, capsys):
    settings, loss = validated(*TINY, "loss=dpo", "inspect=1", "max_tokens_per_pass=auto")
    monkeypatch.setattr(inspection, "read_facts", lambda device: gpu(24))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("loads weights"))
    inspection.inspect_inputs(settings, loss, build.load_inputs(settings, loss))
    assert (
        "max_tokens_per_pass=auto: microbatches of up to 32,768 tokens; training is estimated"
        in capsys.readouterr().out
    )


def test_an_estimate_is_made_for_a_gpu_alone_and_a_number_is_kept(capsys):
    def estimate():
        return MemoryEstimate(GB, 2e6)

    for kind, tokens in (("cpu", 768), ("mps", 2048)):
        assert resolve_max_tokens("auto", DeviceFacts(kind, GB), lambda: pytest.fail("estimated")) == tokens
    assert resolve_max_tokens(5, gpu(1), lambda: pytest.fail("estimated")) == 5
    assert resolve_max_tokens("fit", gpu(25), estimate) == 10_240 and capsys.readouterr().out == ""
    assert resolve_max_tokens("auto", gpu(25), estimate) == 10_240  # (0.9 * 25 - 1) GB / 2 MB = 10,750
    said = (
        "max_tokens_per_pass=auto: microbatches of up to 10,240 tokens; training is estimated to need 21.5 of 22.5 GB"
    )
    assert capsys.readouterr().out == f"{said}.\n"
    assert resolve_max_tokens("auto", gpu(1), estimate) == 1_024
    assert "3.0 of 0.9 GB; set activation_checkpointing=true" in capsys.readouterr().out


def test_a_gpus_number_is_recorded_for_a_resumed_run_and_a_cpus_is_not(make_trainer, monkeypatch, capsys):
    assert make_trainer("loss=dpo").run.config.max_tokens_per_pass == "auto"
    monkeypatch.setattr(build, "read_facts", lambda device: gpu(24))
    monkeypatch.setattr(build, "float32_products", lambda facts: "highest")
    capsys.readouterr()
    trainer = make_trainer("loss=dpo", "max_tokens_per_pass=auto")
    assert trainer.packer.max_tokens == trainer.run.config.max_tokens_per_pass == 32_768
    assert (
        "max_tokens_per_pass=auto: microbatches of up to 32,768 tokens; training is estimated"
        in capsys.readouterr().out
    )


# The search


@pytest.mark.parametrize(
    "bytes_of, best, most_tried",
    [
        (lambda budget: 100 + 2 * budget, 450, 450),  # 100 + 2 * 450 = 1000, the limit
        (lambda budget: 100 + budget * budget / 225, 450, 900),  # grows faster than the line, so it is left once
        (lambda budget: 500 if budget <= 450 else math.inf, 450, 900),  # out of memory beyond, with no sign before
        (lambda budget: 2 * budget, 300, 300),  # no batch has more than 300 tokens
    ],
    ids=["linear", "quadratic", "sudden", "whole batch"],
)
def test_the_largest_budget_within_the_limit_is_found(bytes_of, best, most_tried):
    tried = []

    def measure(budget):
        tried.append(budget)
        return bytes_of(budget)

    budget, used = largest_budget(measure, start=64, most=300 if best == 300 else 10_000, limit=1000)
    assert 0.9 * best <= budget <= best and used == bytes_of(budget)
    assert max(tried) <= most_tried and len(tried) < 12


def test_a_start_that_does_not_fit_is_lowered_and_the_smallest_budget_returned_if_none_fits():
    assert largest_budget(lambda budget: 100 * budget, start=4096, most=8192, limit=1050)[0] == 10
    assert largest_budget(lambda budget: math.inf, start=4096, most=8192, limit=1000) == (1, math.inf)


# In a run


def test_a_fitted_run_is_bit_for_bit_one_with_that_number_of_tokens(make_trainer, monkeypatch):
    def tokens_as_bytes(policy, batch, dtype):
        return 1000.0 * batch.n_tokens

    monkeypatch.setattr(budgets, "available_memory", lambda device: 1_000_000)  # of which 0.8 may be used: 800 tokens
    with monkeypatch.context() as patched:
        patched.setattr(budgets, "peak_of_microbatch", tokens_as_bytes)
        fitted = make_trainer(*FIT)
    budget = fitted.packer.max_tokens
    assert 600 <= budget <= 800 and fitted.run.config.max_tokens_per_pass == budget
    passes = fitted.packer(heaviest_examples(fitted.train_batches, 1, "shared_prefix"))
    assert max(one.n_tokens for one in passes) == budget  # no other batch fills a pass further
    plain = make_trainer(*FIT, f"max_tokens_per_pass={budget}")
    for trainer in (fitted, plain):
        trainer.metrics = [trainer.train_step(batch) for batch, _ in zip(trainer.train_batches, range(2), strict=False)]
    assert [without_measurements(m) for m in fitted.metrics] == [without_measurements(m) for m in plain.metrics]
    for ours, theirs in zip(fitted.policy.parameters(), plain.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("share, budget", [(0.8, "most"), (1e-9, 1)], ids=["plenty", "none"])
def test_measured_microbatches_decide(share, budget, make_trainer, monkeypatch, capsys):
    monkeypatch.setitem(budgets.USABLE_SHARE, "cpu", share)
    trainer = make_trainer(*FIT)
    most = sum(map(len, heaviest_examples(trainer.train_batches, 1, "shared_prefix")))
    assert trainer.packer.max_tokens == (most if budget == "most" else budget)
    line = (
        f"max_tokens_per_pass={most}: its microbatches need"
        if budget == "most"
        else "not even the smallest microbatch fits into 0"
    )
    assert line in capsys.readouterr().out


def test_the_copy_from_which_a_checkpoint_is_written_needs_memory_of_a_cpu(make_trainer):
    trainer = make_trainer("loss=dpo")
    optimizer = stepped_optimizer(trainer.settings, trainer.policy)
    settings = [trainer.settings.model_copy(update={"background_saves": on}) for on in (True, False)]
    sizes = [copied_bytes(each, trainer.policy, optimizer, torch.device("cpu")) for each in settings]
    weights = sum(parameter.nbytes for parameter in trainer.policy.parameters())
    assert 2 * weights <= sizes[0] < 2.01 * weights and sizes[1] == 0  # RMSprop's squares and a count per tensor
    assert copied_bytes(settings[0], trainer.policy, optimizer, torch.device("cuda")) == 0


def test_the_heaviest_microbatch_is_found(make_trainer):
    batches = make_trainer("loss=dpo").train_batches
    halves = [part for b in batches.from_start() for part in (b.examples[:4], b.examples[4:])]
    assert sum(map(len, heaviest_examples(batches, 2, "shared_prefix"))) == max(sum(map(len, part)) for part in halves)


def recomputes(model) -> bool:
    """Whether some layer recomputes its activations; transformers has two names for a property that says so."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("optimizer", ["RMSprop", "AdamW", "Muon"])
def test_the_search_leaves_no_trace(optimizer, make_trainer, monkeypatch):
    trainer = make_trainer("loss=dpo", f"optimizer={optimizer}", "activation_checkpointing=true", "lora=default")
    policy, settings = trainer.policy.eval(), trainer.settings
    weights = [parameter.clone() for parameter in policy.parameters()]
    states, made = random_states(), []

    def make(*arguments):
        made.append(stepped_optimizer(*arguments))
        return made[-1]

    monkeypatch.setattr(budgets, "stepped_optimizer", make)
    recompute_activations(policy.model, on=False)
    with training_state(settings, policy, trainer.device):
        assert policy.training and all(p.grad is not None for p in policy.trained_parameters())
        n_states = sum(len(each.state) for each in getattr(made[0], "optimizers", made))
        assert n_states == len(policy.trained_parameters()) and recomputes(policy.model)
        peak_of_microbatch(policy, next(trainer.packer(next(iter(trainer.train_batches)).examples)), torch.float32)
        assert torch.rand(3).sum() > 0  # draws, as an adapter's dropout does
    assert not recomputes(policy.model)
    assert not policy.training and all(parameter.grad is None for parameter in policy.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.parameters(), strict=True))
    assert torch.equal(states["torch"], random_states()["torch"])


def test_a_microbatch_without_memory_needs_infinitely_much_and_other_errors_are_raised(make_trainer, monkeypatch):
    trainer = make_trainer("loss=dpo")
    batch = next(trainer.packer(next(iter(trainer.train_batches)).examples))
    for error, expected in ((torch.OutOfMemoryError("CUDA out of memory"), math.inf), (RuntimeError("shape"), None)):

        def fail(module, batch, error=error):
            raise error

        monkeypatch.setattr(budgets, "response_logps", fail)
        if expected is None:
            with pytest.raises(RuntimeError, match="shape"):
                peak_of_microbatch(trainer.policy, batch, torch.float32)
        else:
            assert peak_of_microbatch(trainer.policy, batch, torch.float32) == expected


def test_a_device_whose_peak_cannot_be_measured_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(budgets, "reset_peak_memory", lambda device: False)
    with pytest.raises(UserError, match="max_tokens_per_pass=fit: the peak memory cannot be measured here"):
        make_trainer(*FIT)
