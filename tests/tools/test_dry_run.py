"""dry_run=true: what is counted and measured of a run that is then not made."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import TINY, compose, inputs_of, tiny_config, tiny_tokenizer, validated
from transformers import AutoModelForCausalLM

import train
from dpo.system.devices import peak_memory, reset_peak_memory, total_memory
from dpo.system.errors import UserError
from dpo.system.signals import Signals
from tools.dry_run import (
    Seconds,
    count_evaluations,
    duration,
    memory_of_processes,
    read_workload,
    time_to_the_end,
)

CPU = torch.device("cpu")
SHORT = ("n_examples=16", "n_eval_examples=8", "eval_batch_size=4", "do_first_eval=false")


# The whole


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss=dpo", "background_saves=true", "eval_every=8"],
        ["loss=dpo", "loss.precompute_reference=true"],
        ["loss=dpo", "lora=default", "activation_checkpointing=true"],
        ["loss=sft", "optimizer=Muon", "sample_during_eval=true"],
    ],
    ids=["dpo", "cached", "adapter", "sft"],
)
def test_a_dry_run_prints_its_forecast_and_leaves_nothing(overrides, tmp_path, capsys):
    folder = tmp_path / "run"
    settings = [*TINY, *SHORT, "dry_run=true", f"local_run_dir='{folder}'", f"local_dirs=['{tmp_path / 'cache'}']"]
    train.run(compose(*settings, "precision=auto", "max_tokens_per_pass=200", *overrides), Signals(), ())
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    titles = ["Updates", "Time", "Time to the end", "Peak memory"]
    assert [line.split(":")[0] for line in out.splitlines()][-4:] == titles
    assert ("the reference's log-probabilities" in out) == ("loss.precompute_reference=true" in overrides)
    assert ("samples" in out.split("Time to the end")[1]) == ("sample_during_eval=true" in overrides)
    peaks = re.search(r"Peak memory: ([\d.]+) of .*; an update needs ([\d.]+) GB, its longest microbatch", out)
    assert float(peaks[1]) >= float(peaks[2]) > 0.05


@pytest.mark.parametrize("in_background", [True, False])
def test_the_copy_from_which_a_checkpoint_is_written_adds_to_the_peak_of_an_update(
    in_background, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("tools.dry_run.peak_memory", lambda device: 10**9)
    monkeypatch.setattr("tools.dry_run.copied_bytes", lambda settings, *_: 2 * 10**9 * settings.background_saves)
    settings = [*TINY, *SHORT, "loss=sft", "dry_run=true", f"local_run_dir='{tmp_path / 'run'}'"]
    train.run(compose(*settings, f"background_saves={in_background}"), Signals(), ())
    line = capsys.readouterr().out.splitlines()[-1]
    peak = (
        r"3\.00 of .* GB, in an update while a checkpoint is written"
        if in_background
        else r"1\.00 of .* GB, in [a-z ]*"
    )
    assert re.match(f"Peak memory: {peak}; an update needs 1.00 GB", line), line


# Counts


def test_the_workload_counts_tokens_and_finds_the_longest_microbatch(make_trainer, monkeypatch):
    trainer = make_trainer("loss=dpo", "max_tokens_per_pass=300", "max_length=100", "max_prompt_length=60")
    batches = list(trainer.train_batches.from_start())
    workload = read_workload(trainer)
    examples = [example for batch in batches for example in batch.examples]
    assert (workload.examples, workload.tokens) == (len(examples), sum(map(len, examples)))
    sizes = [one.n_tokens for batch in batches for one in trainer.packer(batch.examples)]
    of_longest = [one.n_tokens for one in trainer.packer(workload.longest.examples)]
    assert workload.longest_microbatch == max(sizes) == max(of_longest) <= 300
    monkeypatch.setattr("tools.dry_run.COUNTED", 17)
    first = read_workload(trainer)
    assert (first.examples, first.tokens) == (16, sum(sum(map(len, batch.examples)) for batch in batches[:2]))


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


# Time


def test_the_time_is_that_of_updates_evaluations_and_samples(make_trainer):
    """3 updates of 8 examples of 100 tokens at 0.01 s. 3 evaluations, the first at 0.001 s per token, then 0.0004.

    Samples of 5 s come with each evaluation, and once from the reference. A cached reference takes a pass over 24
    training examples and the evaluation's.
    """
    settings = ("loss=dpo", "n_examples=24", "n_eval_examples=8", "eval_every=16")
    seconds = Seconds(0.01, 0.001, 0.0004, 5.0)
    for cached in (False, True):
        trainer = make_trainer(*settings, f"loss.precompute_reference={cached}")
        workload = replace(read_workload(trainer), examples=10, tokens=1000)
        test = sum(len(example) for batch in trainer.eval_batches.from_start() for example in batch.examples)
        parts = {
            "3 updates": 24.0,
            "3 evaluations": (0.001 + 2 * 0.0004) * test,
            "samples": 4 * 5.0,
        }
        if cached:
            parts["the reference's log-probabilities"] = 0.001 * (2400 + test)
        assert time_to_the_end(trainer, trainer.eval_batches, workload, seconds) == pytest.approx(parts)


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


# Several processes


def memory(*overrides):
    """What is printed for several processes: total GB, GB of weights and so on, tokens of the longest microbatch."""
    settings = (*TINY, "loss=dpo", "max_tokens_per_pass=300", "dry_run=true", *overrides)
    line = memory_of_processes(*validated(*settings), inputs_of(*settings))
    pattern = r"Estimated peak memory: ([\d.]+) GB on each of .* \(([\d.]+) GB .* microbatch of ([\d,]+) tokens"
    assert "That fits into" in line and "its share of the memory here" in line
    total, fixed, tokens = re.match(pattern, line).groups()
    return float(total), float(fixed), int(tokens.replace(",", ""))


@pytest.fixture
def wide(tmp_path):
    """Return the setting of a model of 14.6 million weights, 58 MB in float32."""
    tokenizer = tiny_tokenizer("llama")
    tokenizer.save_pretrained(tmp_path / "wide")
    config = tiny_config("llama", len(tokenizer))
    config.hidden_size, config.intermediate_size, config.head_dim = 512, 4096, 128
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    return f"model.name_or_path='{tmp_path / 'wide'}'"


def test_more_processes_hold_smaller_parts_and_replicas_hold_all(wide, monkeypatch):
    """Sharded are policy, reference, gradient and RMSprop's state, 4 * 58 MB: 117 MB of 2 processes, 29 of 8."""
    monkeypatch.setattr("build.load_models", lambda *_: pytest.fail("weights were loaded"))
    fsdp = (wide, "trainer=FSDPTrainer", "reduce_every_pass=true")
    one, two, eight = (memory(*fsdp, f"n_processes={n}")[1] for n in (1, 2, 8))
    assert one > two and two - eight == pytest.approx(0.117 - 0.029, abs=0.011)
    assert memory(*fsdp, "n_processes=4", "replicate=2")[1] == two
    assert memory(wide, "trainer=FSDPTrainer", "ddp=true", "n_processes=4")[1] == one
    assert memory(wide, "trainer=TensorParallelTrainer", "reduce_every_pass=true", "n_processes=2")[1] == two


def test_a_pass_holds_what_a_process_gets_of_a_batch():
    tokens = [memory("trainer=FSDPTrainer", f"n_processes={n}", "max_tokens_per_pass=10000")[2] for n in (1, 2, 8)]
    assert tokens[0] > tokens[1] > tokens[2] > 0


def test_a_number_of_processes_that_a_run_would_refuse_is_refused():
    with pytest.raises(UserError, match="must divide the number of processes, 3"):
        memory("trainer=FSDPTrainer", "n_processes=3", "replicate=2")


def test_a_dry_run_of_several_processes_prints_their_memory_and_leaves_nothing(tmp_path, capsys):
    settings = [*TINY, "loss=dpo", "dry_run=true", "trainer=FSDPTrainer", "n_processes=8"]
    train.run(compose(*settings, f"local_run_dir='{tmp_path / 'run'}'"), Signals(), ())
    assert "Estimated peak memory: " in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
