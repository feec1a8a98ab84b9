"""Whole trainers: the first margin, and gradients against one sequence at a time."""

import copy
import dataclasses
import gc
import json
import math
import re
import threading
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from chat_families import FAMILIES, TURNS, answer
from conftest import TINY, golden_rows, inputs_of, tiny_config, tiny_tokenizer, without_measurements
from tiny_models import mask_responses, weigh
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, MistralConfig

import build
import losses
from dpo.data.mixture import Mixture
from dpo.distributed.splitting import Microbatch
from dpo.model import logps
from dpo.model.logps import response_logps
from dpo.model.packing import LAYOUTS
from dpo.model.sampling import Sampler, distinct_prompts
from dpo.reporting.findings import Rule, findings
from dpo.runs.checkpoints import read_checkpoint
from dpo.runs.run_dir import Checkpoint
from dpo.system.errors import RunError, Stopped, UserError
from dpo.system.signals import ProcessSignals
from dpo.training.objectives import mismatch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_margin_is_exactly_0_though_the_models_config_has_dropout(tiny_folder, layout, make_trainer):
    config = AutoConfig.from_pretrained(tiny_folder).to_dict()
    assert [value for key, value in config.items() if "drop" in key and value == 0.1]
    settings = (f"model.name_or_path='{tiny_folder}'", f"layout={layout}", "lr=1e-3", "warmup_steps=0")
    trainer = make_trainer("loss=dpo", *settings)
    assert trainer.packer.layout == layout
    first, second = (trainer.train_step(batch) for batch, _ in zip(trainer.train_batches, range(2), strict=False))
    rewards = [f"rewards_train/{what}" for what in ("chosen", "rejected", "margins", "accuracies")]
    assert [first[key] for key in rewards] == [0.0] * 4
    assert second["rewards_train/margins"] > 1


def test_a_reference_stays_bit_for_bit_what_the_policy_was_before_training(make_trainer):
    """Two updates move the policy by more than 10 nats per response."""
    trainer = make_trainer("loss=dpo", "lr=1e-3", "warmup_steps=0")
    first, second = islice(trainer.train_batches, 2)
    part = next(trainer.packer(first.examples))
    before = response_logps(trainer.policy, part).sums.detach()
    for batch in (first, second):
        trainer.train_step(batch)
    assert torch.equal(trainer.reference.logps(part).sums, before)
    assert (response_logps(trainer.policy, part).sums.detach() - before).abs().mean() > 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_that_cannot_share_a_row_is_trained_padded(layout, make_trainer, tmp_path, capsys):
    """Its window of 16 tokens counts those of other examples too."""
    folder = tmp_path / "windowed"
    tokenizer = tiny_tokenizer("llama")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    windowed = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, sliding_window=16, **sizes)
    AutoModelForCausalLM.from_config(windowed).save_pretrained(folder)
    trainer = make_trainer("loss=dpo", f"model.name_or_path='{folder}'", f"layout={layout}")
    assert trainer.packer.layout == "padded"
    assert ("Using layout=padded." in capsys.readouterr().out) == (layout == "shared_prefix")
    models = (trainer.policy.model, trainer.reference.module.model)
    assert {model.config._attn_implementation for model in models} == {"sdpa"}
    batch = next(iter(trainer.train_batches))
    assert all(part.segments is None for part in trainer.packer(batch.examples))
    assert trainer.train_step(batch)["rewards_train/margins"] == 0.0


def test_throughput_is_counted_in_the_examples_and_tokens_of_a_second(make_trainer, monkeypatch):
    trainer = make_trainer("loss=dpo")
    batch = next(iter(trainer.train_batches))
    monkeypatch.setitem(vars(trainer.utilization), "rate", 1e9)  # which would be measured by this clock
    clock = iter((10.0, 14.0))  # an update of 4 seconds
    monkeypatch.setattr("trainers.time.perf_counter", lambda: next(clock))
    metrics = trainer.train_step(batch)
    tokens = sum(len(part.prompt) + sum(map(len, part.responses)) for part in batch.examples)
    assert metrics["examples_per_second"] == len(batch.examples) / 4
    assert metrics["tokens_per_second"] == tokens / 4
    sizes = {name: p.numel() for name, p in trainer.policy.model.named_parameters() if p.dim() == 2}
    head, positions = sizes.pop("transformer.wte.weight"), sizes.pop("transformer.wpe.weight")
    n_responses = sum(len(response) for part in batch.examples for response in part.responses)
    flops = 8 * (sum(sizes.values()) * tokens + head * n_responses)  # 2 in each of 2 forward passes, 4 in the backward
    assert positions and metrics["mfu"] == pytest.approx(flops / 4 / 1e9, rel=1e-12)


def test_each_record_has_the_seconds_and_the_memory_that_went_into_it(make_trainer, monkeypatch):
    """By a clock that moves by 2 for a batch of the data, by 3 for a pass of the reference and by 5 for a checkpoint.

    The reference's pass over an evaluation's samples counts as sampling.
    """
    clock = SimpleNamespace(now=0.0)

    def slow(seconds, work):
        def slowly(*args, **kwargs):
            clock.now += seconds
            return work(*args, **kwargs)

        return slowly

    settings = ("n_examples=16", "n_eval_examples=8", "sample_during_eval=true", "eval_every=8")
    trainer = make_trainer("loss=dpo", *settings, "max_tokens_per_pass=100000")
    monkeypatch.setattr("dpo.system.stopwatch.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(trainer.reference, "logps", slow(3, trainer.reference.logps))
    monkeypatch.setattr(trainer.writer, "write", slow(5, trainer.writer.write))
    for batch in trainer.clock.waiting("data", map(slow(2, lambda batch: batch), trainer.train_batches)):
        trainer.log(trainer.train_step(batch))
    trainer.evaluate_and_save()
    trainer.log({})
    records = [json.loads(line) for line in (trainer.run.path / "metrics.jsonl").read_text().splitlines()]
    spent = [{k.removeprefix("seconds/"): v for k, v in r.items() if k.startswith("seconds/")} for r in records]
    assert spent[:2] == [{"data": 2, "reference": 3, "forward_backward": 0, "optimizer": 0}] * 2
    assert spent[2:] == [{"data": 0, "reference": 3, "evaluation": 0, "sampling": 3}, {"saving": 5}]
    assert all(record["memory_gb/max"] > 0.05 for record in records)


@pytest.mark.parametrize("precomputed", [True, False])
def test_logits_are_computed_in_float32_where_the_reference_was_precomputed_in_bfloat16(
    precomputed, make_trainer, monkeypatch
):
    dtypes, compute = set(), logps.target_logps
    monkeypatch.setattr(logps, "target_logps", lambda logits, t: dtypes.add(logits.dtype) or compute(logits, t))
    setting = f"loss.precompute_reference={precomputed}"
    trainer = make_trainer("loss=dpo", "precision=bfloat16", setting)
    dtypes.clear()
    trainer.train_step(next(iter(trainer.train_batches)))
    assert dtypes == {torch.float32 if precomputed else torch.bfloat16}


def gradient(trainer, batch, accumulation):
    """Return the gradient before clipping of one update."""
    kept = []
    clip = trainer.clip_gradient
    trainer.clip_gradient = lambda: kept.append(flat_gradient(trainer.policy)) or clip()
    trainer.settings = trainer.settings.model_copy(update={"gradient_accumulation_steps": accumulation})
    trainer.train_step(batch)
    del trainer.clip_gradient
    return kept[0]


def flat_gradient(model):
    """Return the gradient as one vector."""
    return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])


def sum_of_logps(model, prompt, response):
    """Return log pi(response | prompt) from one unpadded sequence."""
    return sum_of_trained_logps(model, prompt, response, [True] * len(response))


def sum_of_trained_logps(model, prompt, response, mask):
    """Return the sum of log pi(token | all before it) over the tokens of a response that its mask has."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), response][torch.tensor(mask)].sum()


def oracle_gradient(trainer, examples):
    """Return the gradient of the mean loss in float64, one unpadded sequence at a time; beta is 0.1.

    The mean is weighted, and a response has the log-probability of its trained tokens.
    """
    policy = copy.deepcopy(trainer.policy.model).double()
    reference = trainer.reference and copy.deepcopy(trainer.reference.module.model).double()
    for example in examples:
        masks = example.loss_masks or [[True] * len(response) for response in example.responses]
        responses = list(zip(example.responses, masks, strict=True))
        sums = [sum_of_trained_logps(policy, example.prompt, *response) for response in responses]
        if len(sums) == 1:
            loss = -sums[0]
        else:
            with torch.no_grad():
                others = [sum_of_trained_logps(reference, example.prompt, *response) for response in responses]
            loss = losses.preference_loss(*sums, *others, beta=0.1)[0]
        (example.text.weight * loss / sum(other.text.weight for other in examples)).backward()
    return flat_gradient(policy)


@pytest.mark.parametrize("max_tokens", [100_000, 300])
@pytest.mark.parametrize("loss", ["sft", "dpo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accumulation_and_token_budget_change_nothing_in_the_gradient(layout, loss, max_tokens, make_trainer):
    """The policy is moved away from the reference first, so that each pair has a weight of its own."""
    trainer = make_trainer(f"loss={loss}", f"layout={layout}", f"max_tokens_per_pass={max_tokens}", "lr=1e-30")
    assert trainer.packer.layout == layout
    perturb(trainer.policy)
    batch = next(iter(trainer.train_batches))
    assert len({len(response) for example in batch.examples for response in example.responses}) >= 6
    assert (len(list(trainer.packer(batch.examples))) > 1) == (max_tokens == 300)
    expected, passes = oracle_gradient(trainer, batch.examples), []
    trainer.policy.register_forward_hook(lambda *_: passes.append(1))
    for accumulation in (1, 2, 4):
        passes.clear()
        actual = gradient(trainer, batch, accumulation)
        assert (actual - expected).norm() < 1e-5 * expected.norm(), accumulation
        assert len(passes) == accumulation or max_tokens == 300


@pytest.mark.parametrize("loss", ["sft", "dpo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_and_weights_have_the_gradient_of_the_trained_tokens_in_a_weighted_mean(layout, loss, make_trainer):
    """Every third token is context, in every other example; the weights are 1/2, 1, 3/2, ..."""
    trainer = make_trainer(f"loss={loss}", f"layout={layout}", "max_tokens_per_pass=300", "lr=1e-30")
    perturb(trainer.policy)
    batch = next(iter(trainer.train_batches))
    examples = [weigh(example, 0.5 + 0.5 * i) for i, example in enumerate(batch.examples)]
    for i in range(0, len(examples), 2):
        masks = [[j % 3 != 1 for j in range(len(response))] for response in examples[i].responses]
        examples[i] = mask_responses(examples[i], *masks)
    expected, plain = oracle_gradient(trainer, examples), oracle_gradient(trainer, batch.examples)
    for accumulation in (1, 4):
        actual = gradient(trainer, dataclasses.replace(batch, examples=examples), accumulation)
        assert (actual - expected).norm() < 1e-5 * expected.norm() < 0.1 * (actual - plain).norm()


@pytest.mark.parametrize("settings", [("loss=dpo",), ("loss=sft",), ("loss=sft", "loss.normalize=tokens")], ids=str)
def test_a_weight_of_2_counts_as_the_same_example_twice(settings, make_trainer):
    """Also where the batch is accumulated, and in the mean loss of an evaluation; other means count it once."""
    trainer = make_trainer(*settings, "max_tokens_per_pass=300", "lr=1e-30")
    perturb(trainer.policy)
    batch = next(iter(trainer.train_batches))
    first, *others = batch.examples
    once = dataclasses.replace(batch, examples=[weigh(first, 2.0), *others])
    twice = dataclasses.replace(batch, examples=[first, *batch.examples])
    expected = gradient(trainer, twice, 1)
    for accumulation in (1, 4):
        assert (gradient(trainer, once, accumulation) - expected).norm() < 1e-5 * expected.norm()
    found = []
    for some in (once, twice, batch):
        trainer.eval_batches = SimpleNamespace(from_start=lambda some=some: [some])
        found.append((trainer.train_step(some), trainer.evaluate()))
    for split, (of_once, of_twice, of_batch) in zip(("train", "eval"), zip(*found, strict=True), strict=True):
        assert of_once[f"loss/{split}"] == pytest.approx(of_twice[f"loss/{split}"], rel=1e-5)
        assert of_once[f"loss/{split}"] != pytest.approx(of_batch[f"loss/{split}"], rel=2e-5)
        assert of_once[f"logps_{split}/chosen"] == pytest.approx(of_batch[f"logps_{split}/chosen"], rel=1e-5)


@pytest.mark.parametrize("every_pass", [False, True])
def test_a_pass_that_keeps_up_with_another_rank_counts_nowhere_and_ranks_sum_gradients_after_the_last_or_each(
    every_pass, make_trainer, monkeypatch
):
    def split_among_two(examples, n_equal=1):
        yield from (Microbatch(batch, 1.0, False) for batch in trainer.packer(examples, n_equal))
        yield Microbatch(next(trainer.packer(examples[:1])), 0.0, True)

    trainer = make_trainer("loss=dpo", "max_tokens_per_pass=300", "lr=1e-30")
    trainer.settings = trainer.settings.model_copy(update={"reduce_every_pass": every_pass})
    perturb(trainer.policy)
    batch = next(iter(trainer.train_batches))
    synced, found = [], []
    monkeypatch.setattr(trainer.policy, "set_requires_gradient_sync", synced.append)
    for split_batch in (trainer.split_batch, split_among_two):
        monkeypatch.setattr(trainer, "split_batch", split_batch)
        synced.clear()
        metrics = without_measurements(trainer.train_step(batch))
        found.append({name: value for name, value in metrics.items() if not name.startswith("counters/")})
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert synced == [every_pass] * len(list(trainer.packer(batch.examples))) + [True] and len(synced) > 2


@pytest.mark.parametrize("setting", ["CHUNK_TOKENS", "activation_checkpointing"])
def test_recomputing_changes_nothing_in_the_gradient(setting, make_trainer, monkeypatch):
    """Of logits, 7 tokens at a time, or of activations."""
    trainer = make_trainer("loss=dpo", f"activation_checkpointing={setting == 'activation_checkpointing'}", "lr=1e-30")
    if setting == "CHUNK_TOKENS":
        monkeypatch.setattr(logps, "CHUNK_BYTES", 0)
        monkeypatch.setattr(logps, "CHUNK_TOKENS", 7)
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


def test_the_gradient_is_clipped_to_its_largest_norm_and_its_norm_before_that_is_recorded(make_trainer):
    """One step of SGD with a rate of 1 moves the weights by the clipped gradient."""
    norms, moved = [], []
    for limit in (0.5, 1e6):
        trainer = make_trainer("loss=dpo", "optimizer=SGD", "lr=1.0", "warmup_steps=0", f"max_grad_norm={limit}")
        before = flat_values(trainer.policy)
        norms.append(trainer.train_step(next(iter(trainer.train_batches)))["grad_norm"])
        moved.append((flat_values(trainer.policy) - before).norm().item())
    assert norms[0] == norms[1] > 1.0
    assert moved == pytest.approx([0.5, norms[1]], rel=1e-4)


def flat_values(model):
    """Return the parameters as one vector."""
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])


def test_the_next_batch_is_made_while_an_update_is_computed(make_trainer, monkeypatch):
    trainer = make_trainer("loss=sft", "n_examples=16", "n_eval_examples=8", "do_first_eval=false", "debug=true")
    read, second, waited = [], threading.Event(), []
    get, train_step = Mixture.__getitem__, trainer.train_step

    def counted(examples, index):
        read.append(index)
        if len(read) == 16:
            second.set()
        return get(examples, index)

    monkeypatch.setattr(Mixture, "__getitem__", counted)
    monkeypatch.setattr(trainer, "train_step", lambda batch: waited.append(second.wait(60)) or train_step(batch))
    trainer.train()
    assert waited == [True, True]


WAITS = {
    "dpo": (("loss=dpo", "loss.ld_alpha=0.5"), 1),
    "dpo, wpo": (("loss=dpo", "loss.token_weights=wpo", "gradient_accumulation_steps=2"), 1),
    "dpo, cached": (("loss=dpo", "loss.precompute_reference=true", "max_tokens_per_pass=300"), 1),
    "kto": (("loss=kto", "max_tokens_per_pass=300"), 2),  # also for the divergence, from which the losses are computed
    "orpo": (("loss=orpo",), 1),
}


@pytest.mark.parametrize("overrides, n", WAITS.values(), ids=WAITS)
def test_an_update_reads_from_the_device_once_whatever_the_number_of_its_passes(
    overrides, n, make_trainer, monkeypatch
):
    """Tensors on the device meta have no values: all that would wait for a GPU's fails, but for what is counted."""
    trainer, reads, meta = make_trainer(*overrides), [], torch.device("meta")
    monkeypatch.setitem(logps.FLOAT32_BYTES, "meta", 2**22)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: reads.append(tensor.device) or torch.ones(tensor.shape))
    monkeypatch.setattr(trainer, "utilization", lambda *_: {})  # measures the device's rate
    trainer.packer = dataclasses.replace(trainer.packer, device=meta)
    for module in {trainer.policy, getattr(trainer.reference, "module", trainer.policy)}:
        module.to(meta)
    trainer.gradients_checked, trainer.updates = True, 1
    metrics = trainer.train_step(next(iter(trainer.train_batches)))
    assert metrics["loss/train"] == metrics["grad_norm"] == 1 and reads.count(meta) == n


@pytest.mark.parametrize("overrides", [(), ("loss.precompute_reference=true",)], ids=["live", "cached"])
def test_updates_leave_no_memory_behind_and_no_cycles_for_the_garbage_collector(overrides, make_trainer):
    """By the allocator's own count: what a graph of autograd keeps is no Python object."""
    sizes = ("n_examples=44", "batch_size=2", "max_length=64", "max_prompt_length=32", "max_tokens_per_pass=100")
    trainer = make_trainer("loss=dpo", "precision=bfloat16", *sizes, *overrides)
    batches = iter(trainer.train_batches)
    for batch in islice(batches, 2):  # the first allocates the optimizer's state
        trainer.train_step(batch)
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            for batch in batches:
                trainer.train_step(batch)
    finally:
        gc.enable()
    allocated = [event.self_cpu_memory_usage for event in profiled.events()]
    assert trainer.updates == 22 and max(allocated) > 0 and sum(allocated) == 0


def test_policy_and_reference_are_compiled_where_that_is_asked(make_trainer, monkeypatch):
    compiled = []
    monkeypatch.setattr(build, "compile_layers", compiled.append)
    assert make_trainer("loss=dpo") and compiled == []
    trainer = make_trainer("loss=dpo", "compile=true")
    assert compiled == [trainer.policy.model, trainer.reference.module.model]


def test_a_resumed_trainer_lets_go_of_the_checkpoint_that_it_has_loaded(make_trainer):
    trainer = make_trainer("loss=sft")
    states, run = trainer.state_dict([0, 0, 0]), trainer.run
    run.checkpoint, run.resumed = Checkpoint(run.path / "step-0", states), True
    build.resume_trainer(trainer, run)
    assert run.checkpoint == Checkpoint(run.path / "step-0", {})


# Losses that depend on the whole batch

BATCH_LOSSES = {
    "sft": ("loss=sft", "loss.normalize=tokens"),
    "kto": ("loss=kto", "loss.undesirable_weight=1.5"),
    "bco": ("loss=bco", "loss.shift_decay=0.5"),
    "wpo": ("loss=dpo", "loss.token_weights=wpo"),
}


def golden_texts(split):
    """Yield prompt, chosen and rejected response of the goldens' dialogues."""
    for row in golden_rows(split):
        n = row["chosen"].rindex("\n\nAssistant:") + len("\n\nAssistant:")
        yield row["chosen"][:n], row["chosen"][n:], row["rejected"][n:]


def labelled_rows(folder):
    """Write the goldens' responses as rows with a label, those of every third prompt both, and return their setting."""
    folder.mkdir()
    for split in ("train", "test"):
        rows = []
        for i, (prompt, chosen, rejected) in enumerate(golden_texts(split)):
            found = [(chosen, True), (rejected, False)]
            found = found if i % 3 == 0 else found[i % 2 :][:1]
            rows += [{"prompt": prompt, "completion": text, "label": v} for text, v in found]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"datasets=['{folder}']"


def test_unbalanced_labels_are_printed_with_weights_before_training(tmp_path, capsys):
    folder = tmp_path / "labels"
    folder.mkdir()
    rows = [{"prompt": "Hi.", "completion": f"a{i}", "label": i % 4 == 0} for i in range(16)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs_of(*TINY, "loss=kto", f"datasets=['{folder}']", f"local_dirs=['{tmp_path}']")
    line = "Labels: 4 desirable and 12 undesirable responses, with their weights 0.333 to 1, "
    assert line in capsys.readouterr().out
    settings = ("loss.desirable_weight=3.75", "loss=kto")
    inputs_of(*TINY, *settings, f"datasets=['{folder}']", f"local_dirs=['{tmp_path}']")
    inputs_of(*TINY, "loss=kto", f"local_dirs=['{tmp_path}']")  # pairs count one each
    assert "Labels:" not in capsys.readouterr().out


def settings_of(name, folder):
    """Return the settings of a case of BATCH_LOSSES, with its data."""
    return (*BATCH_LOSSES["kto"], labelled_rows(folder)) if name == "kto of labels" else BATCH_LOSSES[name]


@pytest.mark.parametrize("name", [*BATCH_LOSSES, "kto of labels"])
def test_one_batch_split_three_ways_has_one_gradient(name, make_trainer, tmp_path):
    """In one pass, in passes of 300 tokens, and in 4 parts; the policy is moved away from its reference first."""
    trainer = make_trainer(*settings_of(name, tmp_path / "data"), "max_tokens_per_pass=100000", "lr=1e-30")
    perturb(trainer.policy)
    batch = next(iter(trainer.train_batches))
    trainer.loss_state = {"shift": 0.3} if name == "bco" else {}
    state = trainer.loss_state
    gradients = []
    for max_tokens, accumulation in ((100_000, 1), (300, 1), (100_000, 4)):
        trainer.packer = dataclasses.replace(trainer.packer, max_tokens=max_tokens)
        trainer.loss_state = state
        gradients.append(gradient(trainer, batch, accumulation))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("name", ["kto", "sft"])
def test_sums_over_a_batch_leave_the_gradient_whole_under_autocast(name, make_trainer):
    """Weights that autocast casts without a gradient must not be kept for the passes; bfloat16 moves it by percents."""
    gradients = []
    for precision in ("float32", "bfloat16"):
        trainer = make_trainer(*BATCH_LOSSES[name], f"precision={precision}", "lr=1e-30")
        perturb(trainer.policy)
        gradients.append(gradient(trainer, next(iter(trainer.train_batches)), 2))
    assert (gradients[1] - gradients[0]).norm() < 0.1 * gradients[0].norm()


@pytest.mark.parametrize("name", ["kto", "kto of labels"])
def test_ktos_divergence_comes_from_all_mismatched_pairs_of_the_batch(name, make_trainer, tmp_path):
    """Against sums of log-probabilities in float64, one unpadded sequence at a time."""
    trainer = make_trainer(*settings_of(name, tmp_path / "data"), "max_tokens_per_pass=300", "lr=1e-30")
    perturb(trainer.policy)
    examples = next(iter(trainer.train_batches)).examples
    policy = copy.deepcopy(trainer.policy.model).double()
    reference = copy.deepcopy(trainer.reference.module.model).double()
    expected = 0.0
    with torch.no_grad():
        for example in mismatch(examples):
            for response in example.responses:
                expected += sum_of_logps(policy, example.prompt, response).item()
                expected -= sum_of_logps(reference, example.prompt, response).item()
    sums = trainer.loss.batch_sums(iter(examples), trainer.sums_of_logps)
    n_responses = sum(len(example.responses) for example in examples)
    assert n_responses == len(examples) * (2 if name == "kto" else 1)
    assert sums["responses"] == n_responses and sums["log_ratios"] == pytest.approx(expected, rel=1e-4)


def test_an_update_on_rows_with_a_label_is_that_of_its_equation(make_trainer, tmp_path):
    """The weighted mean of sigmoid(z - r) and 1.5 sigmoid(r - z), in float64, one unpadded sequence at a time.

    beta is 0.1. z, the rewards and the accuracy are means without weights.
    """
    trainer = make_trainer(*settings_of("kto of labels", tmp_path / "data"), "lr=1e-30")
    perturb(trainer.policy)
    batch = next(iter(trainer.train_batches))
    weights = [1.0 + i % 3 for i in range(len(batch.examples))]
    batch = dataclasses.replace(batch, examples=list(map(weigh, batch.examples, weights)))
    policy = copy.deepcopy(trainer.policy.model).double()
    reference = copy.deepcopy(trainer.reference.module.model).double()

    def log_ratio(example):
        (response,) = example.responses
        return sum_of_logps(policy, example.prompt, response) - sum_of_logps(reference, example.prompt, response)

    with torch.no_grad():
        z = 0.1 * max(0.0, sum(map(log_ratio, mismatch(batch.examples))).item() / len(batch.examples))
    rewards = {True: [], False: []}
    total = 0.0
    for example in batch.examples:
        reward = 0.1 * log_ratio(example)
        rewards[example.text.label].append(reward.item())
        loss = (z - reward).sigmoid() if example.text.label else 1.5 * (reward - z).sigmoid()
        mean = example.text.weight * loss / sum(weights)
        mean.backward()
        total += mean.item()
    expected = flat_gradient(policy)
    assert all(rewards.values())
    assert (gradient(trainer, batch, 2) - expected).norm() < 1e-5 * expected.norm()
    metrics = trainer.train_step(batch)
    right = sum(r > z for r in rewards[True]) + sum(r < z for r in rewards[False])
    assert metrics["loss/train"] == pytest.approx(total, rel=1e-5)
    assert metrics["rewards_train/accuracies"] == right / len(batch.examples)
    for side, label in (("desirable", True), ("undesirable", False)):
        mean = sum(rewards[label]) / len(rewards[label])
        assert metrics[f"rewards_train/{side}"] == pytest.approx(mean, rel=1e-4, abs=1e-6)
        assert f"lengths_train/{side}" in metrics and f"logps_train/{side}" in metrics
    assert not any("chosen" in name or "rejected" in name for name in metrics)


def test_the_whole_batch_pass_of_an_evaluation_heeds_signals_and_names_the_settings_that_need_less_memory(
    make_trainer, monkeypatch
):
    trainer = make_trainer("loss=kto", "max_tokens_per_pass=1000", "n_eval_examples=8")
    trainer.signals.stop = "SIGTERM"
    calls = []
    monkeypatch.setattr(trainer.reference, "logps", lambda batch: calls.append(batch))
    with pytest.raises(Stopped):
        trainer.evaluate()
    assert calls == []
    trainer.signals.stop = None

    def no_memory(batch):
        raise MemoryError

    monkeypatch.setattr(trainer.reference, "logps", no_memory)
    with pytest.raises(RunError, match="in a microbatch of .* lower max_tokens_per_pass, which is 1000"):
        trainer.evaluate()


@pytest.mark.parametrize("name", ["dpo", "apo_zero"])
def test_rows_with_a_label_are_refused_by_a_loss_of_pairs_before_any_weights_load(name, tmp_path):
    line = "train.jsonl, row 1: has one response and a label, for loss=kto; this loss needs a chosen and a rejected"
    with pytest.raises(UserError, match=line):
        inputs_of(*TINY, f"loss={name}", labelled_rows(tmp_path / "data"))


def test_the_mean_over_tokens_is_that_of_the_whole_batch_and_of_the_whole_evaluation(make_trainer):
    """Whatever eval_batch_size; the logged mean loss times the tokens is the sum of all."""
    found = []
    for size in (3, 8):
        settings = ("max_tokens_per_pass=300", f"eval_batch_size={size}", "n_eval_examples=16")
        trainer = make_trainer("loss=sft", "loss.normalize=tokens", *settings, "lr=1e-30")
        batch = next(iter(trainer.train_batches))
        metrics = trainer.train_step(batch)
        n_tokens = sum(len(example.responses[0]) for example in batch.examples)
        expected = -metrics["logps_train/chosen"] * len(batch.examples) / n_tokens
        assert metrics["loss/train"] == pytest.approx(expected, rel=1e-6)
        found.append(trainer.evaluate()["loss/eval"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_bcos_shift_moves_and_survives_a_checkpoint(make_trainer):
    trainer = make_trainer("loss=bco", "loss.shift_decay=0.5", "lr=1e-3")
    batches = iter(trainer.train_batches)
    first = trainer.train_step(next(batches))
    assert first["loss/train"] == pytest.approx(2 * math.log(2), rel=1e-6) and trainer.loss_state == {"shift": 0.0}
    second = trainer.train_step(next(batches))
    shift = (second["rewards_train/chosen"] + second["rewards_train/rejected"]) / 2 * 0.5
    assert trainer.loss_state["shift"] == pytest.approx(shift, rel=1e-12) and shift != 0
    states = trainer.state_dict([0, 0])
    other = make_trainer("loss=bco", "loss.shift_decay=0.5", "lr=1e-3")
    other.load_state_dict(states)
    assert other.loss_state == trainer.loss_state
    del states["run"]["loss"]  # as in a checkpoint of an earlier version
    other.load_state_dict(states)
    assert other.loss_state == {}


SCORE_COLUMNS = ("columns.score_chosen=score_chosen", "columns.score_rejected=score_rejected")


def scored_rows(folder):
    """Write the goldens' pairs with scores that differ by 1/2 to 3, and return the folder."""
    folder.mkdir()
    for split in ("train", "test"):
        rows = []
        for i, (prompt, chosen, rejected) in enumerate(golden_texts(split)):
            scores = {"score_chosen": i % 6 / 2 + 1.5, "score_rejected": 1}
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected} | scores)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_scores_reach_odpo_and_the_fingerprints_of_the_run(make_trainer, tmp_path):
    """At h = 0 the mean loss is that of log(1 + d), d the differences of the scores: -log sigmoid(-log d)."""
    data = scored_rows(tmp_path / "data")
    trainer = make_trainer("loss=odpo", f"datasets=['{data}']", *SCORE_COLUMNS)
    batch = next(iter(trainer.train_batches))
    gaps = [example.text.scores[0] - example.text.scores[1] for example in batch.examples]
    expected = sum(math.log1p(gap) for gap in gaps) / len(gaps)
    assert len(set(gaps)) > 2 and trainer.train_step(batch)["loss/train"] == pytest.approx(expected, rel=1e-6)
    assert "the scores" in trainer.run.fingerprints
    assert "the scores" not in make_trainer("loss=dpo", f"datasets=['{data}']", *SCORE_COLUMNS).run.fingerprints


@pytest.mark.parametrize(
    "scores, line",
    [
        (
            {"score_chosen": 1},
            "FILE, row 2: score_rejected must be a number, not null; on_inconsistent=drop skips such rows",
        ),
        ({"score_chosen": True, "score_rejected": 0}, "FILE, row 2: score_chosen must be a finite number, not 'True'"),
        (
            {"score_chosen": math.inf, "score_rejected": 0},
            "FILE, row 2: score_chosen must be a finite number, not 'inf'",
        ),
    ],
)
def test_rows_without_usable_scores_are_refused_by_number(scores, line, tmp_path):
    rows = [{"prompt": f"{i}:", "chosen": " a", "rejected": " b"} for i in range(30)]
    rows[0] |= {"score_chosen": 2, "score_rejected": 1}
    rows[1] |= scores
    for row in rows[2:]:
        row |= {"score_chosen": 2, "score_rejected": 1}
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as error:
        inputs_of(*TINY, "loss=odpo", f"datasets=['{path}']", *SCORE_COLUMNS)
    assert str(error.value) == line.replace("FILE", str(path))


def test_odpo_without_scores_is_refused():
    with pytest.raises(UserError, match="set columns.score_chosen=NAME and columns.score_rejected=NAME"):
        inputs_of(*TINY, "loss=odpo")


WAYS = (
    ("layout=shared_prefix", "max_tokens_per_pass=100000", "gradient_accumulation_steps=1"),
    ("layout=padded", "max_tokens_per_pass=300", "gradient_accumulation_steps=4"),
)


@pytest.mark.parametrize("name", [*losses.LOSSES, "kto of labels"])
def test_ten_updates_depend_on_no_layout_budget_or_accumulation(name, make_trainer, tmp_path):
    """From a rate at which the losses move, each metric of each update within rounding, relative to its size."""
    runs = []
    data = (f"datasets=['{scored_rows(tmp_path / 'scored')}']", *SCORE_COLUMNS) if name == "odpo" else ()
    data = (labelled_rows(tmp_path / "labelled"),) if name == "kto of labels" else data
    for way in WAYS:
        trainer = make_trainer(
            f"loss={name.split()[0]}", *way, *data, "batch_size=4", "lr=1e-4", "warmup_steps=0", "optimizer=SGD"
        )
        steps = [trainer.train_step(batch) for batch, _ in zip(trainer.train_batches, range(10), strict=False)]
        runs.append([without_measurements(step) for step in steps])
    assert len(runs[0]) == len(runs[1]) == 10
    for one, other in zip(*runs, strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    assert runs[0][0]["loss/train"] != runs[0][-1]["loss/train"]


# Evaluations

SHORTER = ("max_length=48", "max_prompt_length=24")


def single_logps(trainer, example):
    """Return log pi and log ref of each response of an example, in float32, one unpadded sequence at a time."""
    models = (trainer.policy.model, trainer.reference.module.model)
    with torch.no_grad():
        return [[sum_of_logps(m, example.prompt, y).item() for y in example.responses] for m in models]


def evaluated_examples(trainer):
    """Return the examples of an evaluation, in their order."""
    return [example for batch in trainer.eval_batches.from_start() for example in batch.examples]


def test_each_line_of_pairs_jsonl_has_the_numbers_of_its_own_row(make_trainer):
    """On a policy that has moved, in passes of 300 tokens, which sort the examples; beta is 0.1."""
    trainer = make_trainer("loss=dpo", "n_eval_examples=8", "max_tokens_per_pass=300")
    perturb(trainer.policy)
    trainer.evaluate()
    lines = (trainer.run.path / "pairs.jsonl").read_text().splitlines()
    found = {record["row"]: record for record in map(json.loads, lines)}
    examples = evaluated_examples(trainer)
    assert len(lines) == len(examples) == len(found) == 8
    for example in examples:
        record, (policy, reference) = found[example.text.row], single_logps(trainer, example)
        ratios = [own - other for own, other in zip(policy, reference, strict=True)]
        for i, side in enumerate(("chosen", "rejected")):
            assert record[f"log_ratios/{side}"] == pytest.approx(ratios[i], rel=1e-3, abs=1e-3)
            assert record[f"rewards/{side}"] == pytest.approx(0.1 * ratios[i], rel=1e-3, abs=1e-4)
            assert record[f"lengths/{side}"] == len(example.responses[i])


@pytest.mark.parametrize("name", ["kto", "kto of labels"])
def test_ktos_divergence_in_an_evaluation_is_that_of_all_its_examples(name, make_trainer, tmp_path):
    """Whatever the passes and batches: the mean of sigmoid(z - r) and 1.5 sigmoid(r - z), where beta is 0.1.

    The reference is moved, so that the policy is the better model and z is above 0.
    """
    settings, losses_found = settings_of(name, tmp_path / "data"), []
    for max_tokens, size in ((100_000, 16), (300, 3)):
        passes = (f"max_tokens_per_pass={max_tokens}", f"eval_batch_size={size}")
        trainer = make_trainer(*settings, *passes, "n_eval_examples=16")
        perturb(trainer.reference.module)
        losses_found.append(trainer.evaluate()["loss/eval"])
    examples = evaluated_examples(trainer)
    divergences, expected = [], []
    for example in mismatch(examples):
        policy, reference = single_logps(trainer, example)
        divergences += [own - other for own, other in zip(policy, reference, strict=True)]
    z = 0.1 * sum(divergences) / len(divergences)
    for example in examples:
        policy, reference = single_logps(trainer, example)
        labels = [True, False] if example.text.label is None else [example.text.label]
        for own, other, label in zip(policy, reference, labels, strict=True):
            distance = z - 0.1 * (own - other)
            expected.append(1 / (1 + math.exp(-distance)) if label else 1.5 / (1 + math.exp(distance)))
    assert z > 0.1
    assert losses_found == pytest.approx([sum(expected) / len(expected)] * 2, rel=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_only_the_policys_training_passes_are_differentiated(loss, make_trainer):
    """A graph that an evaluation kept would fill the memory."""
    trainer = make_trainer(f"loss={loss}", "n_eval_examples=8", "n_eval_model_samples=2", *SHORTER)
    found = {"policy": [], "reference": []}
    for name, module in (("policy", trainer.policy), ("reference", trainer.reference.module)):
        module.register_forward_hook(lambda *args, name=name: found[name].append(args[2].requires_grad))
    batch = next(iter(trainer.train_batches))
    n_passes, n_others = (len(list(trainer.packer(some))) for some in (batch.examples, mismatch(batch.examples)))
    for _ in range(2):
        found["policy"].clear()
        trainer.evaluate()
        trainer.sample()
        assert found["policy"] and not any(found["policy"]) and not trainer.policy.training
        found["policy"].clear()
        trainer.train_step(batch)
        assert found["policy"] == [False] * (n_others if loss == "kto" else 0) + [True] * n_passes
        assert trainer.policy.training
    assert found["reference"] and not any(found["reference"])


@pytest.mark.parametrize(
    "phase, nth", [("an evaluation", 2), ("the policy's samples", 1), ("the reference's samples", 3)]
)
def test_a_signal_in_the_midst_of_the_last_evaluation_stops_the_run_with_every_update_saved(
    phase, nth, make_trainer, monkeypatch
):
    """An update is one pass; the evaluation has two batches, and so have the samples of each model."""
    sizes = ("n_eval_examples=8", "eval_batch_size=4", "n_eval_model_samples=8", "max_tokens_per_pass=100000")
    settings = ("n_examples=8", "do_first_eval=false", "sample_during_eval=true", *sizes, *SHORTER)
    trainer = make_trainer("loss=dpo", *settings)
    owner, name = (trainer, "losses") if phase == "an evaluation" else (Sampler, "generate_batch")
    work, calls = getattr(owner, name), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == nth:
            trainer.signals.stop = "SIGTERM"
        return work(*args)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(Stopped):
        trainer.train()
    assert len(calls) == nth
    folder = trainer.run.path / "step-8"
    assert read_checkpoint(folder)["run"]["counters"]["updates"] == 1 and not (folder / "hf").exists()


def test_a_wish_for_a_checkpoint_during_an_evaluation_is_granted_after_the_next_update(make_trainer, monkeypatch):
    trainer = make_trainer("loss=sft", "n_examples=24", "n_eval_examples=8")
    trainer.signals, evaluate = ProcessSignals(), trainer.evaluate

    def interrupted():
        trainer.signals.save = not trainer.examples
        return evaluate()

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    trainer.train()
    assert {path.name for path in trainer.run.path.glob("step-*")} == {"step-8", "step-24"}


# The schedule


def test_what_is_due_between_two_updates_comes_after_the_second(make_trainer):
    """At 12, 24, 36 and 48 examples, in batches of 8; the evaluation at the end is the last one's."""
    trainer = make_trainer("loss=sft", "n_examples=56", "eval_every=12", "n_eval_examples=8", "debug=true")
    trainer.train()
    records = [json.loads(line) for line in (trainer.run.path / "metrics.jsonl").read_text().splitlines()]
    assert [record["examples"] for record in records if "loss/eval" in record] == [0, 16, 24, 40, 48, 56]


def test_checkpoints_that_are_due_between_two_updates_come_after_the_second(make_trainer):
    settings = ("n_examples=56", "save_every=12", "eval_every=20", "n_eval_examples=8", "do_first_eval=false")
    trainer = make_trainer("loss=sft", *settings)
    saved = []
    trainer.save = lambda *args, **kwargs: (
        saved.append(trainer.examples) or type(trainer).save(trainer, *args, **kwargs)
    )
    trainer.train()
    assert [step for step in saved if step] == [16, 24, 40, 48, 56]
    assert {path.name for path in trainer.run.path.glob("step-*")} == {f"step-{step}" for step in saved}


def test_every_update_is_logged_and_one_per_interval_is_shown_beside_every_evaluation(make_trainer, capsys):
    """A rate of 3, 2 and 1 thousandths in 3 updates."""
    settings = ("n_examples=24", "n_eval_examples=8", "eval_every=8", "minimum_log_interval_secs=1000", "debug=true")
    trainer = make_trainer("loss=sft", *settings, "scheduler=linear", "lr=3e-3", "warmup_steps=0")
    trainer.train()
    records = [json.loads(line) for line in (trainer.run.path / "metrics.jsonl").read_text().splitlines()]
    updates = [record for record in records if "loss/train" in record]
    assert [record["lr"] for record in updates] == pytest.approx([3e-3, 2e-3, 1e-3])
    assert all(record["grad_norm"] > 0 for record in updates)
    assert sum(record.get("seconds/data", 0.0) for record in records) > 0
    counts = [[record[f"counters/{name}"] for name in ("examples", "updates")] for record in updates]
    assert counts == [[8, 1], [16, 2], [24, 3]] == [[record["examples"], record["updates"]] for record in updates]
    out = capsys.readouterr().out
    assert re.findall("(.*) updates: loss ", out) == ["8 examples, 1"]
    evaluations = ["0 examples, 0", "8 examples, 1", "16 examples, 2", "24 examples, 3"]
    assert re.findall("(.*) updates, evaluation: loss ", out) == evaluations


def test_an_evaluation_prints_how_much_was_truncated_so_far_also_after_a_resume(make_trainer, capsys):
    settings = ("loss=dpo", "max_length=60", "max_prompt_length=30", "n_eval_examples=8", "debug=true")
    trainer, resumed = make_trainer(*settings), make_trainer(*settings)
    batches = [batch for batch, _ in zip(trainer.train_batches, range(2), strict=False)]
    for batch in batches:
        trainer.train_step(batch)
    cut = Counter(what for batch in batches for example in batch.examples for what in example.truncated)
    assert len(cut) > 1 and min(cut.values()) > 0
    counts = ", ".join(f"{what} {cut[what]}" for what in sorted(cut))
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict([0, 0, 0])))
    capsys.readouterr()
    for one in (trainer, resumed):
        one.evaluate_and_save()
        assert f"Truncated so far, of 16 training examples: {counts}\n" in capsys.readouterr().out


def test_an_evaluation_prints_its_first_finding_once(make_trainer, monkeypatch, capsys):
    trainer = make_trainer("loss=dpo", "n_eval_examples=8", "debug=true")
    trainer.updates = 1  # before that, a difference from the reference is none that training has made
    trainer.evaluate_and_save()
    assert "Advice:" not in capsys.readouterr().out
    rules = [Rule(name, lambda figures: f"{figures['pairs']} pairs", "", "this; that", "") for name in "ab"]
    monkeypatch.setattr("trainers.findings", lambda figures: findings(figures, rules))
    for advice in (["Advice: a: 8 pairs. Try this."], []):  # it is not repeated
        trainer.evaluate_and_save()
        assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("Advice")] == advice
    rules.reverse()
    trainer.evaluate_and_save()
    assert "Advice: b: 8 pairs. Try this.\n" in capsys.readouterr().out


# Checkpoints


SHORT = ("loss=sft", "n_examples=16", "n_eval_examples=8", "do_first_eval=false")


def test_a_checkpoint_has_its_evaluation_and_the_last_one_repeats_it_where_a_run_goes_on(make_trainer):
    trainer = make_trainer(*SHORT, "eval_every=8")
    trainer.train()
    content = (trainer.run.path / "metrics.jsonl").read_bytes()
    evaluated = {r["examples"]: r["loss/eval"] for r in map(json.loads, content.splitlines()) if "loss/eval" in r}
    for step, kept in ((8, [False, True]), (16, [False, True, False])):
        folder = trainer.run.path / f"step-{step}"
        assert json.loads((folder / "metrics.json").read_text())["loss/eval"] == evaluated[step]
        run = read_checkpoint(folder)["run"]
        records = map(json.loads, content[: run["logs"][0]].splitlines())
        assert ["loss/eval" in record for record in records] == kept
        assert run["fingerprints"] == trainer.run.fingerprints


def test_a_stop_while_an_evaluation_samples_repeats_all_of_it_where_the_run_goes_on(make_trainer, monkeypatch):
    def stop():
        raise Stopped("SIGTERM")

    trainer = make_trainer("loss=dpo", "n_eval_examples=8", "sample_during_eval=true")
    trainer.train_step(next(iter(trainer.train_batches)))
    before = trainer.logger.sizes()
    monkeypatch.setattr(trainer, "sample", stop)
    with pytest.raises(Stopped):
        trainer.evaluate_and_save()
    assert trainer.logger.sizes() != before == read_checkpoint(trainer.run.path / "step-8")["run"]["logs"]


@pytest.mark.parametrize("asked, steps", [("save", {"step-8", "step-16"}), ("stop", {"step-8"})])
def test_a_signal_during_an_update_gives_a_checkpoint_right_after_it(asked, steps, make_trainer, monkeypatch):
    trainer = make_trainer(*SHORT)
    if asked == "save":
        monkeypatch.setattr(trainer.signals, "pop_save", lambda: trainer.updates == 1)
        trainer.train()
    else:
        trainer.signals.stop = "SIGTERM"
        with pytest.raises(Stopped):
            trainer.train()
    assert {path.name for path in trainer.run.path.glob("step-*")} == steps


def test_only_the_last_checkpoint_which_the_export_needs_is_waited_for(make_trainer, monkeypatch):
    trainer, waited = make_trainer(*SHORT, "save_every=8", "background_saves=true"), []
    write = trainer.writer.write
    monkeypatch.setattr(
        trainer.writer, "write", lambda *what, blocking: waited.append(blocking) or write(*what, blocking=blocking)
    )
    trainer.train()
    assert waited == [False, True]
    assert (trainer.run.path / "step-8" / "policy.pt").is_file() and (trainer.run.path / "step-16" / "hf").is_dir()


@pytest.mark.parametrize(
    "part, hint",
    [
        ("clip_gradient", "outside of a forward pass; a smaller model or fewer trained parameters need less"),
        ("state_dict", "while saving a checkpoint; background_saves=false makes no copy of it in memory"),
    ],
)
def test_a_lack_of_memory_outside_of_a_pass_names_what_needs_less(part, hint, make_trainer, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    trainer = make_trainer(*SHORT, "save_every=8")
    monkeypatch.setattr(trainer, part, no_memory)
    with pytest.raises(RunError, match=f"^out of memory {hint} .MemoryError.$"):
        trainer.train()


def test_an_export_has_the_facts_of_its_run_and_is_uploaded_where_that_is_asked(make_trainer, monkeypatch):
    uploads = []
    monkeypatch.setattr("trainers.upload", lambda *what: uploads.append(what))
    trainer = make_trainer(*SHORT, "push_to_hub=me/name")
    trainer.train()
    folder = trainer.run.path / "step-16" / "hf"
    assert uploads == [(folder, "me/name")]
    card = (folder / "README.md").read_text()
    assert "trained with `loss=sft` on data: 16 examples in 2 updates." in card
    assert "On 8 evaluation examples, after the last update." in card
    last = json.loads((trainer.run.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| loss/eval | {last['loss/eval']:.4g} |" in card
    hashes = [f"| {what} | {digest} |" for what, digest in trainer.run.fingerprints.items() if what != "the settings"]
    assert hashes and all(line in card for line in hashes)


def test_the_card_of_an_export_has_the_figures_of_the_last_evaluation_of_all_pairs(make_trainer, tmp_path):
    """Of 40 pairs each fourth has the wrong label: 75% are right, and all of the training pairs."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows = golden_rows(split)
        for row in rows[::4] if split == "test" else ():
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("n_examples=16", "eval_every=8", "n_eval_examples=1000", "lr=1e-4", "warmup_steps=0")
    trainer = make_trainer("loss=dpo", f"datasets=['{tmp_path / 'data'}']", *settings)
    trainer.train()
    *_, before, update, last = map(json.loads, (trainer.run.path / "metrics.jsonl").read_text().splitlines())
    card = (trainer.run.path / "step-16" / "hf" / "README.md").read_text()
    assert "On 40 evaluation examples, after the last update." in card
    assert last["rewards_eval/accuracies"] == 0.75 and update["rewards_train/accuracies"] == 1.0
    for name in ("loss/eval", "rewards_eval/accuracies", "rewards_eval/margins"):
        assert f"| {name} | {last[name]:.4g} |" in card
        assert last[name] != before[name] or name == "rewards_eval/accuracies"
    diagnosis = {k.removeprefix("diagnosis/"): v for k, v in last.items() if k.startswith("diagnosis/")}
    low, high = (diagnosis.pop(f"accuracy_{end}") for end in ("low", "high"))
    assert f"| {last['rewards_eval/accuracies']:.4g} | {low:.4g} to {high:.4g} |" in card
    assert len(diagnosis) > 5 and all(f"{name} | {value:.4g} |" in card for name, value in diagnosis.items())


# Samples


def test_samples_and_figures_of_a_policy_that_has_moved_are_each_models_own(make_trainer):
    """The divergence is that of the policy's own samples, one unpadded sequence at a time."""
    trainer = make_trainer("loss=dpo", "sample_during_eval=true", "n_eval_model_samples=3", *SHORTER)
    perturb(trainer.policy)
    found, prompts = trainer.sample(), distinct_prompts(trainer.eval_batches, 3)
    models = {"policy": trainer.policy.model, "reference": trainer.reference.module.model}
    drawn = {name: trainer.sampler.sample(model, prompts, "again") for name, model in models.items()}
    rows = map(json.loads, (trainer.run.path / "samples.jsonl").read_text().splitlines())
    expected = [(name, sample.text.responses[0]) for name in models for sample in drawn[name]]
    assert [(row["model"], row["sample"]) for row in rows] == expected
    assert all(own.responses != other.responses for own, other in zip(*drawn.values(), strict=True))
    sums = [single_logps(trainer, sample) for sample in drawn["policy"]]
    n_tokens, n_others = (sum(len(sample.responses[0]) for sample in drawn[name]) for name in models)
    divergence = sum(policy - reference for (policy,), (reference,) in sums)
    assert found["diagnosis/kl"] == pytest.approx(divergence / 3, rel=1e-4)
    assert found["diagnosis/kl_per_token"] == pytest.approx(divergence / n_tokens, rel=1e-4)
    assert found["diagnosis/entropy_per_token"] == pytest.approx(-sum(p for (p,), _ in sums) / n_tokens, rel=1e-4)
    assert found["diagnosis/sample_length_difference"] == pytest.approx((n_tokens - n_others) / 3)


def test_each_evaluation_records_the_divergence_of_its_samples_which_is_zero_before_the_first_update(make_trainer):
    settings = ("sample_during_eval=true", "n_eval_model_samples=4", "n_eval_examples=8", "lr=1e-3", "warmup_steps=0")
    trainer = make_trainer("loss=dpo", "n_examples=16", "eval_every=8", "debug=true", *settings)
    trainer.train()
    records = [json.loads(line) for line in (trainer.run.path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "loss/eval" in record]
    assert [record["examples"] for record in evaluations] == [0, 8, 16]
    assert [record["diagnosis/kl"] == 0.0 for record in evaluations] == [True, False, False]
    assert [record["diagnosis/sample_length_difference"] == 0.0 for record in evaluations][0]


def test_a_cached_reference_gives_lengths_of_its_samples_but_no_divergence(make_trainer):
    trainer = make_trainer("loss=dpo", "loss.precompute_reference=true", "sample_during_eval=true")
    found = trainer.sample()
    assert found["diagnosis/sample_length_difference"] == 0.0 and "diagnosis/kl" not in found


# State


BUSY = ("loss=dpo", "n_examples=32", "eval_every=16", "n_eval_examples=8", "do_first_eval=false", "lr=1e-3")
BUSY += ("warmup_steps=2", "sample_during_eval=true", "n_eval_model_samples=2", "save_every=8")


def without_clocks(path):
    """Return the records of metrics.jsonl without what depends on the time."""
    records = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [without_measurements(record) for record in records]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_trainer_that_loads_a_state_goes_on_as_the_one_that_gave_it(loss, make_trainer, capsys, tmp_path):
    busy = BUSY if loss == "dpo" else (*BUSY, "loss=kto", labelled_rows(tmp_path / "data"))
    whole = make_trainer(*busy)
    whole.train()
    part, other = make_trainer(*busy), make_trainer(*busy)
    for batch, _ in zip(part.train_batches, range(2), strict=False):
        part.log(part.train_step(batch))
    part.next_eval = 16
    state = copy.deepcopy(part.state_dict(part.logger.sizes()))
    other.logger.log({"examples": 99, "updates": 9})  # beyond the state, so it is cut
    other.load_state_dict(state | {"run": state["run"] | {"logs": [0, 0]}})
    assert (other.examples, other.updates, other.next_eval, other.next_save) == (16, 2, 16, 24)
    assert other.scheduler.get_last_lr() == part.scheduler.get_last_lr() != [1e-3 / 3]
    assert "not be bit for bit" not in capsys.readouterr().out
    other.train()
    assert without_clocks(other.run.path) == [
        r for r in without_clocks(whole.run.path) if r["updates"] > 2 or "loss/eval" in r
    ]
    samples = [(t.run.path / "samples.jsonl").read_text() for t in (whole, other)]
    assert samples[0] == samples[1] and samples[0].count("\n") == 8  # 2 evaluations, 2 models, 2 prompts
    for one, two in zip(whole.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_state_of_another_machine_is_taken_with_a_note_of_what_differs(make_trainer, capsys):
    settings = ("layout=padded", "precision=bfloat16", "max_tokens_per_pass=300", "activation_checkpointing=true")
    one, other = make_trainer("loss=sft", *settings), make_trainer("loss=sft", "max_tokens_per_pass=700")
    state = one.state_dict([0, 0])
    state["run"]["environment"] |= {"torch": "1.0", "threads": 64, "world_size": 64, "data_size": 64}
    capsys.readouterr()
    other.load_state_dict(state)
    changes = [
        f"torch was 1.0, is {torch.__version__}",
        f"the number of threads was 64, is {torch.get_num_threads()}",
        "the number of processes was 64, is 1",
        "the number of shares of a batch was 64, is 1",
        "layout was padded, is shared_prefix",
        "attention was sdpa, is packed",
        "the dtype of the computation was torch.bfloat16, is torch.float32",
        "max_tokens_per_pass was 300, is 700",
        "activation_checkpointing was True, is False",
    ]
    expected = f"Results will not be bit for bit the same as without the interruption: {'; '.join(changes)}.\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("part", ["policy", "optimizer", "scheduler", "run"])
def test_a_state_of_another_form_is_refused_in_one_line(part, make_trainer):
    trainer = make_trainer("loss=sft")
    state = trainer.state_dict([0, 0])
    del state[part]
    with pytest.raises(
        RunError, match=f"^{trainer.run.path}: the checkpoint does not fit this run .KeyError: '{part}'.$"
    ):
        trainer.load_state_dict(state)


def test_weights_of_another_model_are_refused_by_name(make_trainer):
    trainer = make_trainer("loss=sft")
    state = trainer.state_dict([0, 0])
    del state["policy"]["transformer.ln_f.bias"]
    with pytest.raises(
        UserError, match=f"resume={trainer.run.path}: does not fit the model: missing transformer.ln_f.bias"
    ):
        trainer.load_state_dict(state)


def test_policy_and_reference_are_sampled_for_the_first_distinct_prompts(make_trainer):
    trainer = make_trainer("loss=dpo", "sample_during_eval=true", "n_eval_model_samples=3")
    trainer.examples = 8
    trainer.sample()
    rows = [json.loads(line) for line in (trainer.run.path / "samples.jsonl").read_text().splitlines()]
    prompts = [example.text.prompt for example in distinct_prompts(trainer.eval_batches, 3)]
    assert len(set(prompts)) == 3
    assert [(row["examples"], row["model"], row["prompt"]) for row in rows] == [
        (8, model, prompt) for model in ("policy", "reference") for prompt in prompts
    ]
    assert [row["sample"] for row in rows[:3]] == [row["sample"] for row in rows[3:]]  # before any update


# Conversations


@pytest.mark.parametrize("overrides", [(), ("lora=default",)], ids=["all weights", "LoRA"])
def test_a_run_on_conversations_stops_at_both_ends_and_exports_them(overrides, make_trainer, tmp_path):
    """The model's own list of two ids is kept; the template ends a turn by id 2, <|im_end|>, a text by 0."""
    tokenizer = FAMILIES["ChatML"].tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer)))
    model.generation_config.eos_token_id = [7, 0]
    model.save_pretrained(tmp_path / "model")
    rows = [{"chosen": [*TURNS, answer(f"{i}.")], "rejected": [*TURNS, answer("No.")]} for i in range(8)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, data = f"model.name_or_path='{tmp_path / 'model'}'", f"datasets=['{tmp_path}']"
    trainer = make_trainer("loss=dpo", model, data, "lr=1e-3", "n_eval_examples=8", *overrides)
    trainer.train()
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]) == [2, 0]
    assert trainer.sampler.generation_config(5, 0).eos_token_id == [0, 2]
    folder = trainer.run.path / "LATEST" / "hf"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [7, 0, 2]
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    (record,) = [r for r in without_clocks(trainer.run.path) if "grad_norm" in r]
    assert record["counters/examples"] == 8
