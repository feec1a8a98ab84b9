"""dry_run=true: what is counted, measured and computed of a run that is then not made."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import TINY, compose

import train
from dpo.system.devices import peak_memory, reset_peak_memory, total_memory
from dpo.system.signals import Signals
from tools.forecast import (
    Workload,
    computed_remedies,
    count_evaluations,
    count_saves,
    duration,
    holds_copies,
    measured_remedies,
    memory_lines,
    time_lines,
    time_saving,
    workload_lines,
)

CPU = torch.device("cpu")
SHORT = ("n_examples=16", "n_eval_examples=8", "eval_batch_size=4", "do_first_eval=false")


# The whole


@pytest.mark.parametrize(
    "overrides, remedies",
    [
        (
            ["loss=dpo", "background_saves=true", "eval_every=8"],
            {"loss.precompute_reference", "lora", "model.policy_dtype"},
        ),
        (["loss=dpo", "loss.precompute_reference=true"], {"lora", "model.policy_dtype"}),
        (["loss=dpo", "lora=default", "activation_checkpointing=true"], {"model.policy_dtype"}),
        (["loss=sft", "optimizer=Muon", "sample_during_eval=true"], {"lora"}),
    ],
    ids=["dpo", "cached", "adapter", "sft"],
)
def test_a_dry_run_prints_its_forecast_and_leaves_nothing(overrides, remedies, tmp_path, capsys, monkeypatch):
    folder, copies = tmp_path / "run", []
    monkeypatch.setattr("tools.forecast.copy_to_host", lambda states, memo: copies.append(states) or {})
    settings = [*TINY, *SHORT, "dry_run=true", f"local_run_dir='{folder}'", f"local_dirs=['{tmp_path / 'cache'}']"]
    train.run(compose(*settings, "precision=auto", "max_tokens_per_pass=200", *overrides), Signals(), ())
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    starts = [line.split(":")[0] for line in out.splitlines()]
    assert [s for s in ("Updates", "Truncated", "Time", "Time to the end", "Peak memory") if s in starts] == [
        *("Updates", "Truncated", "Time", "Time to the end", "Peak memory")
    ]
    found = {key: kind for key, kind in re.findall(r"^  ([\w.]+)=\S+: [\d.]+ GB, (\w+)$", out, re.MULTILINE)}
    measured = {"max_tokens_per_pass"} | ({"activation_checkpointing"} - {o.split("=")[0] for o in overrides})
    assert found == dict.fromkeys(measured, "measured") | dict.fromkeys(remedies, "computed")
    assert ("the reference's log-probabilities" in out) == ("loss.precompute_reference=true" in overrides)
    assert ("samples" in out.split("Time to the end")[1]) == ("sample_during_eval=true" in overrides)
    assert re.search(r"saving [\d.]+ seconds.*\), besides loading and the report", out)
    assert len(copies) == ("background_saves=true" in overrides)


# Counts


def test_the_workload_counts_tokens_and_truncated_texts_and_finds_the_longest_pass(make_trainer):
    trainer = make_trainer("loss=dpo", "max_tokens_per_pass=300", "max_length=100", "max_prompt_length=60")
    batches = list(trainer.train_batches.from_start())
    workload = Workload.of(trainer, 10**6)
    examples = [example for batch in batches for example in batch.examples]
    assert (workload.examples, workload.tokens) == (len(examples), sum(map(len, examples)))
    assert workload.truncated == Counter(what for example in examples for what in example.truncated) != Counter()
    sizes = [one.n_tokens for batch in batches for one in trainer.packer(batch.examples)]
    assert workload.longest_pass.n_tokens == max(sizes) <= 300
    assert any(example.text == workload.longest_pass.examples[0].text for example in workload.longest.examples)
    first = Workload.of(trainer, 17)
    assert (first.examples, first.tokens) == (16, sum(sum(map(len, batch.examples)) for batch in batches[:2]))
    assert list(workload_lines(trainer, first))[1].startswith("Truncated of the first 16 examples: ")


@pytest.mark.parametrize(
    "settings, expected",
    [
        (["eval_every=1000", "do_first_eval=false"], 1),  # the last
        (["eval_every=1000", "do_first_eval=true"], 2),
        (["eval_every=8", "do_first_eval=false"], 3),  # after 8 and 16 of 24 examples, and the last
        (["eval_every=16", "do_first_eval=true"], 3),
        (["eval_every=24", "do_first_eval=true"], 2),  # 24 is the end
        (["eval_every=3", "do_first_eval=true"], 4),  # before each of 3 updates, and the last
    ],
)
def test_evaluations_are_counted_as_a_run_makes_them(settings, expected, make_trainer, monkeypatch):
    trainer = make_trainer("loss=sft", "n_examples=24", "n_eval_examples=8", "debug=true", *settings)
    assert count_evaluations(trainer) == expected
    made = []
    monkeypatch.setattr(trainer, "evaluate", lambda: made.append(1) or {"loss/eval": 0.0})
    trainer.train()
    assert len(made) == expected


@pytest.mark.parametrize(
    "settings, expected",
    [
        (["eval_every=1000", "do_first_eval=false"], 0),
        (["eval_every=8", "do_first_eval=true"], 2),  # after 8 and 16 of 24 examples
        (["eval_every=1000", "save_every=8"], 2),
        (["eval_every=8", "save_every=8"], 2),
        (["eval_every=1000", "save_every=3"], 2),  # 24 examples in 3 updates
        (["eval_every=1000", "save_every=20"], 0),  # reached by the last update alone
    ],
)
def test_checkpoints_are_counted_as_a_run_writes_them_and_copied_if_training_goes_on(settings, expected, make_trainer):
    settings = ("loss=sft", "n_examples=24", "n_eval_examples=8", *settings)
    trainer = make_trainer(*settings)
    assert count_saves(trainer) == expected and not holds_copies(trainer)
    assert holds_copies(make_trainer(*settings, "background_saves=true")) == (expected > 0)
    trainer.train()
    assert len(list(trainer.run.path.glob("step-*"))) == expected + 1


# Time


def test_the_time_of_a_checkpoint_is_scaled_from_a_part_of_it_and_the_export(make_trainer, monkeypatch):
    """The first tensor took 2 s, the others take as long per byte, and the export has the weights once more."""
    trainer = make_trainer("loss=sft", "optimizer=SGD")  # which keeps nothing beside the weights
    sizes = [4 * parameter.numel() for parameter in trainer.policy.parameters()]
    monkeypatch.setattr("tools.forecast.WRITTEN", 1)
    monkeypatch.setattr("tools.forecast.time.perf_counter", iter([0.0, 2.0]).__next__)
    assert time_saving(trainer) == pytest.approx(2 * 2 * sum(sizes) / sizes[0], rel=0.02)  # random states are saved too
    assert time_saving(make_trainer("loss=sft", "debug=true")) == 0.0


def test_the_saves_to_a_folder_that_cannot_be_written_take_no_time(make_trainer, monkeypatch):
    def refuse(**options: object) -> None:
        raise PermissionError

    trainer = make_trainer("loss=sft")
    monkeypatch.setattr("tools.forecast.TemporaryDirectory", refuse)
    assert time_saving(trainer) == 0.0


def test_the_time_is_that_of_updates_evaluations_and_samples(make_trainer):
    """3 updates of 8 examples of 100 tokens at 0.01 s: 8 s each, 24 s in all. 3 evaluations at 0.001 s per token,
    but 0.0004 from the second on.

    Samples of 5 s come with each evaluation, and once from the reference; two checkpoints take 1.5 s each.
    """
    trainer = make_trainer("loss=dpo", "n_examples=24", "n_eval_examples=8", "eval_every=16")
    workload = replace(Workload.of(trainer, 8), examples=10, tokens=1000)
    test = sum(len(example) for batch in trainer.eval_batches.from_start() for example in batch.examples)
    each, total = time_lines(trainer, workload, 0.01, (0.001, 0.0004), 5.0, 1.5)
    assert each == "Time: 8 seconds per update, 100 tokens per second."
    evaluations = (0.001 + 2 * 0.0004) * test
    seconds = 24 + evaluations + 4 * 5 + 2 * 1.5
    parts = f"3 updates 24.0 seconds, 3 evaluations {evaluations:.1f} seconds, samples 20.0 seconds"
    assert (
        total
        == f"Time to the end: {seconds:.1f} seconds ({parts}, saving 3.0 seconds), besides loading and the report."
    )


def test_a_cached_reference_takes_one_pass_over_all_examples(make_trainer):
    """24 of the training examples at 100 tokens, and those of the evaluation, at 0.001 s per token."""
    trainer = make_trainer("loss=dpo", "n_examples=24", "n_eval_examples=8", "loss.precompute_reference=true")
    workload = replace(Workload.of(trainer, 8), examples=10, tokens=1000)
    test = sum(len(example) for batch in trainer.eval_batches.from_start() for example in batch.examples)
    _, total = time_lines(trainer, workload, 0.01, (0.001, 0.0), 0.0, 0.0)
    assert f"the reference's log-probabilities {2.4 + 0.001 * test:.1f} seconds)" in total


def test_times_have_a_unit_that_suits_them():
    assert [duration(s) for s in (3.04, 119, 120, 7199, 7200)] == [
        *("3.0 seconds", "119.0 seconds", "2.0 minutes", "120.0 minutes", "2.0 hours")
    ]


# Memory


def test_a_peak_is_seen_and_can_be_counted_anew():
    """A tensor of 200 MB, filled, since pages that nothing wrote to are not in memory."""
    assert reset_peak_memory(CPU)
    before = peak_memory(CPU)
    torch.ones(50_000_000)
    peak = peak_memory(CPU)
    assert 190e6 < peak - before < 260e6
    reset_peak_memory(CPU)
    assert peak_memory(CPU) < peak - 150e6
    assert peak < total_memory(CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computed_remedies_leave_out_what_they_save(dtype, make_trainer, monkeypatch):
    """RMSprop keeps as much as the weights in float32, and a count of steps for each; so much are the gradients too.

    The batch passes in several parts, so that all gradients lie beside the activations. Where the run computes in
    bfloat16, so are the weights of the reference's linear layers: all that GPT-2 has in its blocks but for layer norms.
    """
    monkeypatch.setattr("dpo.system.devices.computes_bfloat16_natively", lambda device: dtype == torch.bfloat16)
    trainer = make_trainer("loss=dpo", "max_tokens_per_pass=200", "precision=auto")
    assert trainer.dtype == dtype
    workload = Workload.of(trainer, 8)
    trainer.train_step(workload.longest)
    sizes = {name: p.numel() for name, p in trainer.policy.model.named_parameters()}
    weights, steps = 4 * sum(sizes.values()), 4 * len(sizes)
    linear = sum(size for name, size in sizes.items() if ".attn." in name or ".mlp." in name)
    reference = weights - (4 - dtype.itemsize) * linear
    found = computed_remedies(trainer, workload, 10**9)
    assert found == {
        "loss.precompute_reference=true": 10**9 - reference,
        "lora=default": 10**9 - reference - 2 * weights - steps,
        "model.policy_dtype=bfloat16": 10**9 - (reference - weights // 2) - (3 * weights + steps) // 2,
    }
    copied = computed_remedies(trainer, workload, 10**9, copied=2 * weights)
    assert copied["lora=default"] == found["lora=default"] - 2 * weights
    assert copied["model.policy_dtype=bfloat16"] == found["model.policy_dtype=bfloat16"] - weights
    whole = make_trainer("loss=dpo", "max_tokens_per_pass=100000", "precision=auto")
    whole.train_step(workload.longest)
    assert computed_remedies(whole, workload, 10**9)["lora=default"] == 10**9 - reference - weights - steps


@pytest.mark.parametrize(
    "settings, refused",
    [
        (["precision=float32"], {"model.policy_dtype=bfloat16"}),
        (["model.reference_dtype=bfloat16"], {"loss.precompute_reference=true", "lora=default"}),
        (["loss.ld_alpha=0.5"], {"loss.precompute_reference=true"}),
        (["sync_reference=2"], {"loss.precompute_reference=true", "lora=default"}),
    ],
)
def test_remedies_that_the_settings_refuse_are_not_listed(settings, refused, make_trainer):
    trainer = make_trainer("loss=dpo", "precision=auto", *settings)
    every = {"loss.precompute_reference=true", "lora=default", "model.policy_dtype=bfloat16"}
    assert set(computed_remedies(trainer, Workload.of(trainer, 8), 10**9)) == every - refused


def test_measured_remedies_are_switched_off_again(make_trainer, monkeypatch):
    trainer = make_trainer("loss=dpo", "max_tokens_per_pass=500")
    workload, budgets = Workload.of(trainer, 8), []
    monkeypatch.setattr("tools.forecast.update_peak", lambda trainer, batch: budgets.append(trainer.packer.max_tokens))
    half = workload.longest_pass.n_tokens // 2
    found = measured_remedies(trainer, workload)
    assert list(found) == [f"max_tokens_per_pass={half}", "activation_checkpointing=true"] and budgets == [half, 500]
    recomputed = [module for module in trainer.policy.modules() if getattr(module, "gradient_checkpointing", False)]
    assert trainer.packer.max_tokens == 500 and not recomputed


def test_the_peak_of_a_run_is_that_of_its_largest_phase(make_trainer, monkeypatch):
    monkeypatch.setattr("tools.forecast.reset_peak_memory", lambda device: False)
    trainer = make_trainer("loss=sft")
    trainer.train_step(next(iter(trainer.train_batches)))
    peaks = {"loading": 4 * 10**9, "an update": 3 * 10**9, "sampling": 5 * 10**9}
    head, *remedies = memory_lines(trainer, Workload.of(trainer, 8), peaks)
    assert re.match(
        r"Peak memory: 5.00 of [\d.]+ GB, in sampling; an update needs 3.00 GB, in a pass of \d+ tokens", head
    )
    assert remedies and not [line for line in remedies if "measured" in line]  # where the peak cannot be counted anew
