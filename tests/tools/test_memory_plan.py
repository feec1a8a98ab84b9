"""The memory that each of several processes will need; that ranks then hold it is shown by test_trainers_sharded."""

import pytest
import torch
from conftest import TINY, tiny_config, tiny_tokenizer, validated
from faults import command_line
from ranks import call_in_child
from transformers import AutoModelForCausalLM

from tools.memory_plan import is_cast_weight, kept_bytes, memory_plan, whole_bytes
from trainers import TRAINERS

PLAIN = ("loss=dpo", "max_tokens_per_pass=300")


def plan(trainer, n, *overrides):
    """Return the plan of n processes."""
    settings, _ = validated(*TINY, *PLAIN, "dry_run=true", f"n_processes={n}", *overrides)
    return call_in_child(lambda: memory_plan(trainer, settings, TRAINERS[settings.trainer].prepare, n))


def test_one_process_holds_all_and_more_of_them_hold_parts(make_trainer):
    trainer = make_trainer(*PLAIN)
    weights = sum(parameter.nbytes for parameter in trainer.policy.parameters())
    alone, eight = plan(trainer, 1, "trainer=FSDPTrainer"), plan(trainer, 8, "trainer=FSDPTrainer")
    assert {alone[what] for what in ("weights", "gradients", "reference")} == {weights}
    assert weights <= alone["optimizer state"] < 1.001 * weights  # RMSprop's squares and a count per tensor
    assert weights / 8 <= eight["weights"] < 1.1 * weights / 8
    assert eight["whole gradient between the passes of an update"] == 0  # each process has one pass
    assert alone["whole gradient between the passes of an update"] == weights


def test_copies_hold_more_and_ddp_holds_all(make_trainer):
    trainer = make_trainer(*PLAIN)
    weights = sum(parameter.nbytes for parameter in trainer.policy.parameters())
    two = plan(trainer, 4, "trainer=FSDPTrainer", "replicate=2")
    assert two["weights"] == plan(trainer, 2, "trainer=FSDPTrainer")["weights"]
    whole = plan(trainer, 4, "trainer=FSDPTrainer", "ddp=true")
    assert whole["weights"] == weights and whole["gathered layers, embeddings and head"] == 0


def test_what_is_gathered_is_two_layers_and_what_is_in_none_of_policy_and_reference(make_trainer):
    trainer = make_trainer(*PLAIN)
    model = trainer.policy.model
    sizes = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in model.transformer.h]
    rest = sum(parameter.nbytes for parameter in model.parameters()) - sum(sizes)
    gathered = plan(trainer, 4, "trainer=FSDPTrainer")["gathered layers, embeddings and head"]
    assert gathered == 2 * (rest + sum(sorted(sizes)[-2:]))


def test_tensor_parallel_processes_hold_parts_of_each_layer(make_trainer, tmp_path):
    tokenizer = tiny_tokenizer("llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer))).save_pretrained(tmp_path / "llama")
    name = f"model.name_or_path='{tmp_path / 'llama'}'"
    trainer, split = make_trainer(*PLAIN, name), ("trainer=TensorParallelTrainer", name)
    together, apart = plan(trainer, 2, *split), plan(trainer, 4, "tensor_parallel=2", *split)
    embeddings = sum(p.nbytes for n, p in trainer.policy.named_parameters() if "embed_tokens" in n or "lm_head" in n)
    weights = sum(parameter.nbytes for parameter in trainer.policy.parameters())
    assert weights / 2 < together["weights"] < (weights + embeddings) / 2 * 1.05  # norms are whole, too
    assert apart["weights"] < 0.6 * together["weights"]
    with pytest.raises(AssertionError, match="UserError.*must divide the number of processes, 3"):
        plan(trainer, 3, "tensor_parallel=2", *split)


def test_what_a_pass_keeps_is_that_of_its_operations():
    """x W^T keeps x, 12 numbers, and W, a parameter; a sigmoid keeps its result, 8 numbers."""

    class Trainer:
        def __init__(self):
            self.policy = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Sigmoid())

        def autocast(self):
            return torch.autocast("cpu", torch.bfloat16, enabled=False)

    assert kept_bytes(Trainer(), torch.randn(4, 3)) == (12 + 8) * 4


def test_weights_that_autocast_has_cast_are_no_activations():
    weight = torch.nn.Parameter(torch.randn(3, 3))
    assert is_cast_weight(weight.bfloat16(), []) and is_cast_weight(weight.bfloat16().t(), [])
    assert not is_cast_weight(weight * 2, []) and not is_cast_weight(torch.ones(3), [])
    frozen = torch.ones(2, 3)
    assert is_cast_weight(frozen.bfloat16().t(), {(2, 3)})
    assert not is_cast_weight(torch.ones(4, 3), {(2, 3)})


def test_what_is_gathered_in_16_bits_has_two_bytes_an_element_whatever_it_is_stored_in():
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(3, 5, dtype=dtype)
        assert whole_bytes(weight, in_half=True) == 30 and whole_bytes(weight) == weight.nbytes


def test_the_copy_from_which_a_checkpoint_is_written_is_one_of_weights_and_optimizer(make_trainer):
    saves = plan(make_trainer(*PLAIN), 2, "trainer=FSDPTrainer", "background_saves=true")
    assert saves["copy from which a checkpoint is written"] == saves["weights"] + saves["optimizer state"]
    assert "copy" not in " ".join(plan(make_trainer(*PLAIN), 2, "trainer=FSDPTrainer"))


def test_recomputed_activations_are_fewer(make_trainer):
    kept = [
        list(plan(make_trainer(*PLAIN, own), 2, "trainer=FSDPTrainer", own).values())[-1]
        for own in ("activation_checkpointing=false", "activation_checkpointing=true")
    ]
    assert 0 < kept[1] < 0.8 * kept[0]


def test_a_dry_run_of_several_processes_starts_none_and_prints_what_each_needs(tmp_path):
    settings = [
        *TINY,
        *PLAIN,
        "dry_run=true",
        "trainer=FSDPTrainer",
        "n_processes=8",
        f"local_run_dir='{tmp_path / 'run'}'",
    ]
    folder = tmp_path / "run"
    done = command_line(folder, (*settings, f"local_run_dir='{folder}'"))
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "Starting" not in out and not folder.exists()
    assert "activations of a pass of " in out and "A process needs 0.0" in out and "of 8:" in out
    assert "That fits into " in out and "its share of the memory here" in out
