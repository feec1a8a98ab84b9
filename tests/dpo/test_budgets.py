"""max_tokens_per_pass=fit: the search for the budget, and that it leaves no trace in the run."""

import math

import pytest
import torch
from conftest import without_measurements

from dpo import budgets
from dpo.budgets import copied_bytes, heaviest_part, largest_budget, peak_of_pass, training_state
from dpo.checkpoints import random_states
from dpo.errors import UserError
from dpo.models import recompute_activations
from dpo.optimizers import stepped_optimizer

FIT = ("loss=dpo", "max_tokens_per_pass=fit", "n_eval_examples=8")

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
        patched.setattr(budgets, "peak_of_pass", tokens_as_bytes)
        fitted = make_trainer(*FIT)
    budget = fitted.packer.max_tokens
    assert 600 <= budget <= 800 and fitted.run.config.max_tokens_per_pass == budget
    passes = fitted.packer(heaviest_part(fitted.train_batches, 1, "shared_prefix"))
    assert max(one.n_tokens for one in passes) == budget  # no other batch fills a pass further
    plain = make_trainer(*FIT, f"max_tokens_per_pass={budget}")
    for trainer in (fitted, plain):
        trainer.metrics = [trainer.train_step(batch) for batch, _ in zip(trainer.train_batches, range(2), strict=False)]
    assert [without_measurements(m) for m in fitted.metrics] == [without_measurements(m) for m in plain.metrics]
    for ours, theirs in zip(fitted.policy.parameters(), plain.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("share, budget", [(0.8, "most"), (1e-9, 1)], ids=["plenty", "none"])
def test_real_passes_decide(share, budget, make_trainer, monkeypatch, capsys):
    monkeypatch.setitem(budgets.SHARE, "cpu", share)
    trainer = make_trainer(*FIT)
    most = sum(map(len, heaviest_part(trainer.train_batches, 1, "shared_prefix")))
    assert trainer.packer.max_tokens == (most if budget == "most" else budget)
    line = (
        f"max_tokens_per_pass={most}: its passes need" if budget == "most" else "not even the smallest pass fits into 0"
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


def test_the_heaviest_part_of_a_batch_is_found(make_trainer):
    batches = make_trainer("loss=dpo").train_batches
    halves = [part for b in batches.from_start() for part in (b.examples[:4], b.examples[4:])]
    assert sum(map(len, heaviest_part(batches, 2, "shared_prefix"))) == max(sum(map(len, part)) for part in halves)


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
        n_states = sum(len(part.state) for part in getattr(made[0], "parts", made))
        assert n_states == len(policy.trained_parameters()) and policy.model.is_activation_checkpointing
        peak_of_pass(policy, next(trainer.packer(next(iter(trainer.train_batches)).examples)), torch.float32)
        assert torch.rand(3).sum() > 0  # draws, as an adapter's dropout does
    assert not policy.model.is_activation_checkpointing
    assert not policy.training and all(parameter.grad is None for parameter in policy.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.parameters(), strict=True))
    assert torch.equal(states["torch"], random_states()["torch"])


def test_a_pass_without_memory_needs_infinitely_much_and_other_errors_are_raised(make_trainer, monkeypatch):
    trainer = make_trainer("loss=dpo")
    batch = next(trainer.packer(next(iter(trainer.train_batches)).examples))
    for error, expected in ((torch.OutOfMemoryError("CUDA out of memory"), math.inf), (RuntimeError("shape"), None)):

        def fail(module, batch, error=error):
            raise error

        monkeypatch.setattr(budgets, "response_logps", fail)
        if expected is None:
            with pytest.raises(RuntimeError, match="shape"):
                peak_of_pass(trainer.policy, batch, torch.float32)
        else:
            assert peak_of_pass(trainer.policy, batch, torch.float32) == expected


def test_a_device_whose_peak_cannot_be_measured_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(budgets, "reset_peak_memory", lambda device: False)
    with pytest.raises(UserError, match="max_tokens_per_pass=fit: the peak memory cannot be measured here"):
        make_trainer(*FIT)
