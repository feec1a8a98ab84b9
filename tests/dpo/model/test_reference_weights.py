"""`reference`: which weights it names, what is computed with them, and what is refused."""

import json
import re
import shutil
import warnings
import weakref
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import islice

import pytest
import torch
import transformers
from conftest import GOLDENS, TINY, compose, inputs_of, validated, without_measurements
from faults import BUSY, again, assert_same, command_line, copy_until, fresh, logs_of
from ranks import command_lines, run_ranks
from test_trainers_sharded import build as build_sharded
from tiny_models import tiny
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

import build
from build import load_inputs
from dpo.distributed.process_group import ProcessGroup
from dpo.model.decoding import CachedRows
from dpo.model.logps import response_logps
from dpo.model.reference_weights import ReferenceWeights, same_config
from dpo.model.sampling import Sampler
from dpo.settings.run_config import override_run_config
from dpo.system.errors import UserError
from dpo.system.signals import Signals
from dpo.training.references import AdapterReference, CachedReference, ModelReference
from tools.candidates import find_candidate
from tools.candidates import load_model as load_candidate
from tools.dry_run import dry_run

TINY_GPT2 = GOLDENS / "tiny-gpt2"
DPO = ("loss=dpo", "n_examples=16", "n_eval_examples=8", "eval_every=8", "lr=1e-3", "warmup_steps=0")
LORA = (*DPO, "lora=default", "lora.r=4", "lora.alpha=8")
CACHED = "loss.precompute_reference=true"
MARGIN = re.compile(r"First margin: .* differs from reference=(\S+) by (\S+) nats per token, the mean over")


def policy_pt(folder, state):
    torch.save({"state": state}, folder)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Weights that differ from the tiny model's, in every form that `reference` takes.

    The adapter's forms hold one that changes what the tiny model computes, and `merged` the model with it merged.
    """
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("others")
    model = AutoModelForCausalLM.from_pretrained(TINY_GPT2)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    policy_pt(folder / "start.pt", start)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    policy_pt(folder / "other.pt", model.state_dict())
    model.save_pretrained(folder / "other")
    AutoTokenizer.from_pretrained(TINY_GPT2).save_pretrained(folder / "other")
    model.load_state_dict(start)
    torch.manual_seed(0)
    config = LoraConfig(r=6, lora_alpha=9, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    with warnings.catch_warnings():  # peft asks transformers for an attribute by its old name
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    return folder


def naming(path) -> str:
    return f"reference='{path}'"


def first_batch(trainer):
    return next(iter(trainer.train_batches.from_start()))


def records(trainer, n=None) -> list[dict]:
    """The records of a trainer's first updates, as it trains."""
    return [without_measurements(trainer.train_step(batch)) for batch in islice(trainer.train_batches, n)]


@torch.no_grad()
def sum_of_logps(model, prompt, response) -> float:
    """log pi(response | prompt), by one plain forward pass of transformers."""
    ids = torch.tensor([[*prompt, *response]])
    logps = model(ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
    return logps[torch.arange(len(response)), torch.tensor(response)].sum().item()


# What is computed


@pytest.mark.parametrize(
    "overrides, form",
    [(DPO, "other.pt"), (DPO, "other"), ((*DPO, CACHED), "other.pt"), (LORA, "other"), ((*LORA, CACHED), "other.pt")],
    ids=["policy.pt", "folder", "cached", "lora", "cached, lora"],
)
def test_the_first_loss_is_that_of_plain_transformers_with_the_other_weights(
    overrides, form, others, make_trainer, report
):
    trainer = make_trainer(*overrides, naming(others / form))
    policy = AutoModelForCausalLM.from_pretrained(TINY_GPT2).eval()
    reference = AutoModelForCausalLM.from_pretrained(others / "other").eval()
    losses, margins, batch = [], [], first_batch(trainer)
    for example in batch.examples:
        ratios = [
            sum_of_logps(policy, example.prompt, response) - sum_of_logps(reference, example.prompt, response)
            for response in example.responses
        ]
        margins.append(0.1 * (ratios[0] - ratios[1]))
        losses.append(-logsigmoid(torch.tensor(margins[-1], dtype=torch.float64)).item())
    record, n = trainer.train_step(batch), len(losses)
    differences = record["loss/train"] - sum(losses) / n, record["rewards_train/margins"] - sum(margins) / n
    report(f"{form}: loss {record['loss/train']:.6f}, by hand {sum(losses) / n:.6f}")
    assert max(map(abs, differences)) < 1e-5
    assert abs(record["rewards_train/margins"]) > 0.01


@pytest.mark.parametrize("settings", [DPO, LORA], ids=["second model", "lora"])
def test_a_precomputed_reference_gives_the_numbers_of_a_live_one_and_frees_its_model(
    settings, others, make_trainer, monkeypatch
):
    made = []
    init = ModelReference.__init__
    monkeypatch.setattr(
        ModelReference,
        "__init__",
        lambda self, module, *rest: made.append(weakref.ref(module)) or init(self, module, *rest),
    )
    live = make_trainer(*settings, naming(others / "other.pt"))
    assert isinstance(live.reference, ModelReference)
    expected = records(live)
    cached = make_trainer(*settings, naming(others / "other.pt"), CACHED)
    assert isinstance(cached.reference, CachedReference)
    assert len(made) == 2 and made[0]() is not None and made[1]() is None
    assert records(cached) == expected and abs(expected[0]["rewards_train/margins"]) > 0.01


def test_a_cache_belongs_to_the_weights_it_was_computed_with(others, make_trainer, capsys):
    settings = ("reference=start", *(naming(others / form) for form in ("other.pt", "adapter", "other.pt")))
    sums, are_read = [], []
    for setting in settings:
        sums.append(make_trainer(*DPO, CACHED, setting).reference.sums.nan_to_num())
        are_read.append("log-probabilities read from" in capsys.readouterr().out)
    assert are_read == [False, False, False, True] and torch.equal(sums[1], sums[3])
    assert not torch.equal(sums[0], sums[1]) and not torch.equal(sums[1], sums[2])


def test_an_adapter_is_the_same_reference_merged_or_frozen_beside_the_policys_own(others, make_trainer, capsys, report):
    """The policy's adapter has another rank and other layers."""
    frozen = make_trainer(*LORA, "lora.targets=[c_proj,c_fc]", naming(others / "adapter"))
    assert isinstance(frozen.reference, AdapterReference)
    assert "frozen adapter of `reference`; no second model is loaded" in capsys.readouterr().out
    second = make_trainer(*LORA, "lora.targets=[c_proj,c_fc]", naming(others / "merged"))
    all_weights = [make_trainer(*DPO, naming(others / form)) for form in ("adapter", "merged")]
    assert all(isinstance(each.reference, ModelReference) for each in (second, *all_weights))
    batch = first_batch(frozen)
    expected = frozen.train_step(batch)
    assert abs(expected["rewards_train/margins"]) > 0.01
    found = [trainer.train_step(batch) for trainer in (second, *all_weights)]
    names = ("loss/train", "rewards_train/chosen", "rewards_train/rejected", "rewards_train/margins")
    worst = max(abs(record[name] - expected[name]) for record in found for name in names)
    report(f"a frozen adapter and second models, largest difference of losses and rewards: {worst:.1g}")
    assert worst < 5e-5
    cached = make_trainer(*LORA, "lora.targets=[c_proj,c_fc]", naming(others / "adapter"), CACHED)
    assert cached.train_step(batch)["loss/train"] == expected["loss/train"]


def test_a_frozen_adapter_is_not_trained_nor_saved_nor_exported(others, make_trainer):
    trainer = make_trainer(*LORA, "lora.export_merged=true", naming(others / "adapter"))
    batch = next(trainer.packer(first_batch(trainer).examples))
    with torch.no_grad():
        before = trainer.reference.compute(batch).sums
    trainer.train()
    with torch.no_grad():
        assert torch.equal(trainer.reference.compute(batch).sums, before)
        policy = response_logps(trainer.policy.eval(), batch).sums
    latest = trainer.run.path / "LATEST"
    assert torch.load(latest / "policy.pt")["state"]["adapter"]["r"] == 4
    assert json.loads((latest / "hf" / "adapter_config.json").read_text())["r"] == 4
    merged = AutoModelForCausalLM.from_pretrained(latest / "hf" / "merged")
    trainer.policy.model = merged
    with torch.no_grad():
        torch.testing.assert_close(response_logps(trainer.policy, batch).sums, policy, rtol=1e-5, atol=1e-4)


def test_an_adapter_of_a_run_fits_only_the_weights_that_it_was_trained_on(others, make_trainer):
    """Beside a policy that starts from an archive, an adapter of the model itself becomes a second model."""
    run = make_trainer(*LORA)
    run.train()
    reference = naming(run.run.path / "LATEST" / "policy.pt")
    batch = first_batch(run)
    part = next(run.packer(batch.examples))
    with torch.no_grad():
        expected = response_logps(run.policy.eval(), part).sums
    archive = f"model.archive='{others / 'other.pt'}'"
    for overrides, kind in (
        (LORA, AdapterReference),
        ((*LORA, archive), ModelReference),
        ((*DPO, archive), ModelReference),
    ):
        trainer = make_trainer(*overrides, reference)
        assert isinstance(trainer.reference, kind)
        with torch.no_grad():
            torch.testing.assert_close(trainer.reference.logps(part).sums, expected, rtol=1e-5, atol=1e-4)
    for overrides in (LORA, DPO):
        with pytest.raises(UserError, match=r"^reference=.*policy.pt: this adapter was trained on other weights"):
            make_trainer(*overrides, f"model.name_or_path='{others / 'other'}'", reference)


def test_an_adapter_of_experts_is_a_second_model_beside_one_of_others(tmp_path, make_trainer):
    """peft takes only adapters of the same experts into one model."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_GPT2)
    tokenizer.save_pretrained(tmp_path / "model")
    tiny("Mixtral", vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(tmp_path / "model")
    model = f"model.name_or_path='{tmp_path / 'model'}'"
    run = make_trainer(*LORA, model, "lora.targets=[q_proj,gate_up_proj]")
    run.train()
    reference = naming(run.run.path / "LATEST" / "policy.pt")
    part = next(run.packer(first_batch(run).examples))
    with torch.no_grad():
        expected = response_logps(run.policy.eval(), part).sums
        for targets, kind in (("[k_proj]", AdapterReference), ("[down_proj]", ModelReference)):
            found = make_trainer(*LORA, model, f"lora.targets={targets}", reference).reference
            assert isinstance(found, kind)
            torch.testing.assert_close(found.logps(part).sums, expected, rtol=1e-5, atol=1e-3)


def test_lora_path_continues_an_adapter_beside_another_reference(others, make_trainer):
    run = make_trainer(*LORA)
    run.train()
    path = f"lora.path='{run.run.path / 'LATEST' / 'hf'}'"
    trainer = make_trainer(*LORA, path, naming(others / "adapter"))
    direct = make_trainer(*DPO, naming(others / "adapter"))
    part = next(trainer.packer(first_batch(trainer).examples))
    with torch.no_grad():
        torch.testing.assert_close(
            trainer.reference.logps(part).sums, direct.reference.logps(part).sums, rtol=1e-5, atol=1e-4
        )
        assert torch.equal(
            response_logps(trainer.policy.eval(), part).sums, response_logps(run.policy.eval(), part).sums
        )
    assert "the adapter of lora.path" not in trainer.run.fingerprints
    same = make_trainer(*LORA, path, naming(run.run.path / "LATEST" / "hf"))
    assert same.reference.start_tolerance == 0.0
    base = make_trainer(*LORA, path, naming(TINY_GPT2))  # the policy without its adapter
    assert isinstance(base.reference, AdapterReference) and base.reference.start_tolerance > 0
    start = make_trainer(*DPO)
    with torch.no_grad():
        assert torch.equal(base.reference.logps(part).sums, start.reference.logps(part).sums)


def test_samples_of_the_reference_come_from_its_weights(others, make_trainer):
    sampling = ("sample_during_eval=true", "n_eval_model_samples=3", "max_length=48", "max_prompt_length=24")
    model = AutoModelForCausalLM.from_pretrained(others / "other")
    for extra in ((), (CACHED,)):
        trainer = make_trainer(*DPO, *sampling, naming(others / "other.pt"), *extra)
        prompts = build.distinct_prompts(trainer.eval_batches, 3)
        expected = [one.responses for one in trainer.sampler.sample(model, prompts, "")]
        assert [one.responses for one in trainer.reference.generate(prompts)] == expected
        assert expected != [one.responses for one in trainer.sampler.sample(trainer.policy.model, prompts, "")]


def test_on_a_gpu_the_reference_is_sampled_with_a_cache_that_fits_its_own_kind_of_model(
    others, make_trainer, monkeypatch
):
    kinds = {}

    def fit(sampler, model):
        kinds[model] = partial(CachedRows)
        return replace(sampler, rows=kinds[model])

    monkeypatch.setattr(Sampler, "fit", fit)
    trainer = make_trainer(*DPO, "sample_during_eval=true", naming(others / "other.pt"))
    assert trainer.sampler.rows is kinds[trainer.policy.model]
    assert trainer.reference.sampler.rows is kinds[trainer.reference.module.model]
    copied = make_trainer(*DPO, "sample_during_eval=true")
    assert copied.reference.sampler is copied.sampler


def test_kto_compares_with_the_other_weights(others, make_trainer):
    """The divergence of a batch is over responses to other prompts, which no cache holds."""
    settings = ("loss=kto", *DPO[1:])
    live, merged = (make_trainer(*settings, naming(others / form)) for form in ("adapter", "merged"))
    lora = make_trainer("loss=kto", *LORA[1:], naming(others / "adapter"))
    batch = first_batch(live)
    sums = [one.loss.batch_sums(batch.examples, one.sums_of_logps) for one in (live, merged, lora)]
    assert sums[0] == pytest.approx(sums[1], abs=1e-3) and sums[0] == pytest.approx(sums[2], abs=1e-3)
    start = make_trainer(*settings)
    assert sums[0] != start.loss.batch_sums(batch.examples, start.sums_of_logps)


def test_a_synced_reference_starts_from_the_other_weights_and_follows_the_policy(others, make_trainer):
    trainer = make_trainer(*DPO, "sync_reference=2", "sync_mix=0.5", naming(others / "other.pt"))
    start = AutoModelForCausalLM.from_pretrained(others / "other").state_dict()
    module = trainer.reference.module
    assert all(torch.equal(value, start[name]) for name, value in module.model.state_dict().items())
    records(trainer, 2)
    for name, value in module.model.state_dict().items():
        torch.testing.assert_close(value, 0.5 * start[name] + 0.5 * trainer.policy.model.state_dict()[name])


@pytest.mark.parametrize("overrides", [DPO, (*DPO, CACHED), LORA], ids=["live", "cached", "lora"])
def test_reference_dtype_is_that_of_the_other_weights(overrides, others, make_trainer, monkeypatch):
    made = []
    monkeypatch.setattr(build, "ModelReference", lambda *arguments: made.append(ModelReference(*arguments)) or made[-1])
    make_trainer(*overrides, naming(others / "other.pt"), "model.reference_dtype=bfloat16")
    assert made[0].module.model.dtype == torch.bfloat16 and not any(
        p.requires_grad for p in made[0].module.parameters()
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a model of another architecture that has the tiny model's tokens, without a tokenizer."""
    folder, vocab_size = tmp_path_factory.mktemp("llama"), len(AutoTokenizer.from_pretrained(TINY_GPT2))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=vocab_size, num_key_value_heads=2, initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("overrides", [DPO, LORA, (*DPO, CACHED)], ids=["all weights", "lora", "cached"])
def test_a_model_of_another_architecture_is_a_reference(overrides, llama, make_trainer, capsys):
    trainer = make_trainer(*overrides, naming(llama))
    assert "its tokenizer differs" not in capsys.readouterr().out
    batch = first_batch(trainer)
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    found = trainer.reference.logps(next(trainer.packer(batch.examples)))
    for example, sums in zip(next(trainer.packer(batch.examples)).examples, found.sums.tolist(), strict=True):
        assert sums == pytest.approx([sum_of_logps(model, example.prompt, one) for one in example.responses], abs=1e-3)


def test_a_reference_that_cannot_share_a_row_is_computed_padded_like_the_policy(others, tmp_path, make_trainer, capsys):
    vocab_size = len(AutoTokenizer.from_pretrained(TINY_GPT2))
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=vocab_size)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    trainer = make_trainer(*DPO, naming(tmp_path / "bloom"))
    assert trainer.packer.layout == "padded" and "Using layout=padded" in capsys.readouterr().out
    assert trainer.train_step(first_batch(trainer))["loss/train"] > 0


# The first margin


@pytest.mark.parametrize(
    "overrides, form",
    [
        (("do_first_eval=true", *DPO), "other"),
        (("do_first_eval=false", *DPO, CACHED), "other.pt"),
        (("do_first_eval=true", *LORA), "adapter"),
        (("do_first_eval=false", *LORA, "lora.dropout=0.5"), "other.pt"),
        (("do_first_eval=true", *LORA, CACHED), "adapter"),
    ],
    ids=["live", "cached", "lora", "dropout", "cached adapter"],
)
def test_the_first_margin_is_logged_once_with_what_it_is_measured_against(
    overrides, form, others, make_trainer, capsys
):
    trainer = make_trainer(*overrides, naming(others / form), "debug=true")
    trainer.train()
    ((name, nats),) = MARGIN.findall(capsys.readouterr().out)
    assert name == str(others / form) and 0.001 < float(nats) < 10


def test_the_first_margin_is_the_mean_difference_per_token_of_the_first_evaluation(others, make_trainer, capsys):
    trainer = make_trainer(*DPO, naming(others / "other.pt"), "debug=true", "max_tokens_per_pass=200")
    difference, n_tokens = 0.0, 0
    with torch.no_grad():
        for batch in trainer.eval_batches.from_start():
            for part in trainer.packer(batch.examples):
                sums = response_logps(trainer.policy.eval(), part).sums - trainer.reference.logps(part).sums
                difference, n_tokens = difference + sums.abs().sum().item(), n_tokens + int(part.lengths.sum())
    trainer.train()
    ((_, nats),) = MARGIN.findall(capsys.readouterr().out)
    assert float(nats) == pytest.approx(difference / n_tokens, rel=1e-3)


@pytest.mark.parametrize(
    "overrides, form",
    [(DPO, "start"), (DPO, "start.pt"), (DPO, TINY_GPT2), ((*DPO, CACHED), TINY_GPT2), (LORA, "start.pt")],
    ids=["start", "policy.pt", "folder", "cached", "lora"],
)
def test_the_same_weights_must_give_a_margin_of_0(form, overrides, others, make_trainer, capsys):
    trainer = make_trainer(*overrides, "reference=start" if form == "start" else naming(others / form), "debug=true")
    assert trainer.reference.start_tolerance == 0.0
    if isinstance(trainer.reference, ModelReference):
        with torch.no_grad():
            next(trainer.reference.module.parameters()).add_(1e-3)
        with pytest.raises(UserError, match="before the first update, although they have the same weights"):
            trainer.train()
    else:
        trainer.train()
    assert not MARGIN.findall(capsys.readouterr().out)


def test_the_same_weights_with_another_config_are_another_reference(others, tmp_path, make_trainer):
    model = AutoModelForCausalLM.from_pretrained(TINY_GPT2)
    model.config.layer_norm_epsilon = 0.1
    model.save_pretrained(tmp_path / "changed")
    trainer = make_trainer(*DPO, naming(tmp_path / "changed"))
    assert trainer.train_step(first_batch(trainer))["rewards_train/margins"] != 0
    assert trainer.reference.start_tolerance > 0
    configs = [transformers.AutoConfig.from_pretrained(path) for path in (TINY_GPT2, TINY_GPT2, tmp_path / "changed")]
    assert same_config(*configs[:2]) and not same_config(*configs[1:])
    same = make_trainer(*DPO, naming(TINY_GPT2))
    found = [each.run.fingerprints["the reference's weights"] for each in (trainer, same)]
    assert found[0] != found[1]  # so a resumed run refuses the other one
    with pytest.raises(UserError, match="its config or shapes are not the policy's"):
        make_trainer(*DPO, "sync_reference=2", naming(tmp_path / "changed"))


# Resuming

RUN = (*BUSY, "loss=dpo")
KINDS = {
    "a second model": ((), "other.pt"),
    "a cache": ((CACHED,), "other"),
    "a frozen adapter": (("lora=default", "lora.r=4"), "adapter"),
    "a second model beside an adapter": (("lora=default", "lora.r=4"), "other.pt"),
    "a synced model": (("sync_reference=2", "sync_mix=0.5"), "adapter"),
}


def copy(source, target):
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return target


@pytest.mark.parametrize("overrides, form", KINDS.values(), ids=KINDS)
def test_a_resumed_run_goes_on_bit_for_bit_with_a_reference_that_has_moved_and_with_no_other(
    overrides, form, others, tmp_path
):
    first, moved, folder = copy(others / form, tmp_path / form), tmp_path / f"moved-{form}", tmp_path / "whole"
    done = command_line(folder, fresh(folder, *RUN, *overrides, naming(first)))
    assert done.returncode == 0, done.stderr
    first.rename(moved)
    resumed = copy_until(folder, tmp_path / "resumed", 24)
    done = command_line(resumed, again(resumed, naming(moved)))
    assert done.returncode == 0 and not MARGIN.findall(done.stdout), done.stderr
    assert_same(resumed, folder)
    refused = copy_until(folder, tmp_path / "refused", 24)
    done = command_line(refused, again(refused, naming(others / "start.pt")))
    assert done.returncode == 2 and "the reference's weights have changed since the run began" in done.stderr
    done = command_line(refused, again(refused))
    assert done.returncode == 2 and f"reference={first}: " in done.stderr


@pytest.mark.parametrize("old, new", [("start", "other.pt"), ("other.pt", "start")])
def test_a_resumed_run_does_not_change_between_its_start_and_another_reference(old, new):
    config = compose(*TINY, "loss=dpo", f"reference={old}")
    with pytest.raises(UserError, match=f"reference={new}: a resumed run keeps reference={old}"):
        override_run_config(config, [f"reference={new}"], [])


# What is refused


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        inputs_of(*TINY, *overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


FORMS = "give start, a policy.pt, an adapter's folder, or a model's folder or its name on the Hub"


@pytest.mark.parametrize("overrides", [("loss=sft",), ("loss=simpo",), ("loss=dpo", "loss.reference_free=true")])
def test_a_loss_without_a_reference_refuses_the_setting(overrides):
    with pytest.raises(UserError, match="reference=other.pt: the loss has no reference; set reference=start"):
        validated(*TINY, *overrides, "reference=other.pt")


def test_what_is_no_reference_is_refused_in_a_line_with_the_remedy_before_data_are_read(others, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "load_batches", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no weights")
    (tmp_path / "step-8").mkdir()
    policy_pt(tmp_path / "step-8" / "policy.pt", {})
    copy(others / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    lines = {
        "out/policy.pt": f"reference=out/policy.pt: there is no such file or folder; {FORMS}",
        "/no/such/folder": f"reference=/no/such/folder: there is no such file or folder; {FORMS}",
        "me/model": "reference=me/model: cannot be loaded (there is no such folder, the Hub's cache has no such model",
        f"{tmp_path / 'notes.txt'}": "reference must be a policy.pt of a run here or of the original",
        f"{tmp_path / 'empty'}": "holds no config.json; give a folder that from_pretrained opens",
        f"{tmp_path / 'step-8'}": f"is a checkpoint of a run; set reference={tmp_path / 'step-8' / 'policy.pt'}",
        f"{tmp_path / 'adapter'}": f"reference={tmp_path / 'adapter'}: not a plain LoRA adapter",
    }
    for name, line in lines.items():
        assert line in refusal("loss=dpo", naming(name)), name


def test_a_model_that_cannot_compute_the_policys_tokens_is_refused(others, llama, tmp_path, capsys):
    def write(name, **changes):
        config = transformers.LlamaConfig.from_pretrained(llama)
        for key, value in changes.items():
            setattr(config, key, value)
        config.save_pretrained(tmp_path / name)
        return naming(tmp_path / name)

    vocab_size = len(AutoTokenizer.from_pretrained(TINY_GPT2))
    message = refusal("loss=dpo", write("small", vocab_size=vocab_size - 1))
    assert f"has {vocab_size - 1:,} token ids, and the policy's tokenizer gives {vocab_size:,}; give a" in message
    assert "has 64 positions; lower max_length to 64" in refusal("loss=dpo", write("short", max_position_embeddings=64))
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert "its weights are quantized already (gptq)" in refusal("loss=dpo", write("quantized", **quantized))
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    assert "have an encoder and a decoder" in refusal("loss=dpo", naming(tmp_path / "t5"))
    parallel = ("trainer=TensorParallelTrainer", "tensor_parallel=3", f"model.name_or_path='{llama}'")
    tokenizer = f"model.tokenizer_name_or_path='{TINY_GPT2}'"
    assert "trainer=TensorParallelTrainer: transformers has no tensor-parallel plan" in refusal(
        "loss=dpo", *parallel, "tensor_parallel=2", tokenizer, naming(others / "other")
    )


def test_a_tokenizer_that_differs_from_the_policys_is_named_in_a_line(others, write_tiny_folder, capsys):
    inputs_of(*TINY, "loss=dpo", naming(others / "other"))
    assert "tokenizer differs" not in capsys.readouterr().out
    folder = write_tiny_folder("gpt2")
    overrides = (f"model.name_or_path='{folder}'", naming(others / "other"))
    inputs_of(*TINY, "loss=dpo", *overrides)
    line = f"reference={others / 'other'}: its tokenizer differs from the policy's, which is used for both."
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("overrides", [DPO, LORA], ids=["all weights", "lora"])
def test_weights_that_do_not_fit_the_policys_architecture_are_refused(overrides, tmp_path, others, make_trainer):
    state = torch.load(others / "other.pt")["state"]
    state["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(3, 3)
    policy_pt(tmp_path / "wrong.pt", state)
    with pytest.raises(UserError, match=r"^reference=.*wrong.pt: does not fit the model: transformer.h.0"):
        make_trainer(*overrides, naming(tmp_path / "wrong.pt"))


def test_settings_that_a_reference_cannot_honour_are_refused(others, llama, make_trainer, monkeypatch):
    with pytest.raises(UserError, match="its config or shapes are not the policy's.*set sync_reference=null"):
        make_trainer(*DPO, "sync_reference=2", naming(llama))
    with pytest.raises(UserError, match="model.reference_dtype=bfloat16: .*set model.reference_dtype=null"):
        make_trainer(*LORA, "model.reference_dtype=bfloat16", naming(others / "adapter"))
    for form in ("other.pt", "other"):
        message = refusal(*LORA, "lora.quantize=nf4", naming(others / form))
        assert "a second model beside quantized weights (nf4) is not supported; give an adapter of them" in message


def test_a_frozen_adapter_lies_beside_quantized_weights(others, make_trainer, capsys):
    pytest.importorskip("bitsandbytes")
    trainer = make_trainer(*LORA, "lora.quantize=nf4", naming(others / "adapter"))
    assert isinstance(trainer.reference, AdapterReference)
    assert trainer.train_step(first_batch(trainer))["rewards_train/margins"] != 0


# Where it is named


def test_the_model_card_names_the_reference(others, make_trainer):
    run = make_trainer(*DPO, naming(others / "other.pt"))
    run.train()
    card = (run.run.path / "LATEST" / "hf" / "README.md").read_text()
    assert "Its reference has the weights of the file other.pt." in card
    digest = run.run.fingerprints["the reference's weights"]
    assert f"| the reference's weights | {digest} |" in card
    again = make_trainer(*DPO, naming(run.run.path / "LATEST" / "hf"))
    again.train()
    card = (again.run.path / "LATEST" / "hf" / "README.md").read_text()
    assert re.search(r"Its reference has the weights of the run .* \(`loss=dpo` on data\)\.", card)
    start = make_trainer(*DPO)
    start.train()
    assert "Its reference" not in (start.run.path / "LATEST" / "hf" / "README.md").read_text()


@pytest.mark.parametrize(
    "overrides, form",
    [(DPO, "adapter"), (LORA, "adapter"), ((*LORA, CACHED), "other.pt")],
    ids=["merged", "frozen", "a second model"],
)
def test_the_reference_of_a_run_can_be_compared_with_its_policy(overrides, form, others, make_trainer):
    trainer = make_trainer(*overrides, naming(others / form))
    trainer.train()
    found = load_candidate(find_candidate(trainer.run.path, as_reference=True), torch.device("cpu")).eval()
    expected = AutoModelForCausalLM.from_pretrained(others / ("other" if form == "other.pt" else "merged")).eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainer", ["BasicTrainer", "FSDPTrainer"])
def test_a_dry_run_forecasts_with_the_reference(trainer, others, capsys):
    overrides = (*TINY, *DPO, f"trainer={trainer}", "dry_run=true")
    needed = []
    for setting in ("reference=start", naming(others / "other.pt")):
        settings, loss = validated(*overrides, setting)
        dry_run(settings, loss, load_inputs(settings, loss), compose(*overrides, setting), Signals())
        printed = capsys.readouterr().out
        needed += re.findall(r"[Pp]eak memory: (\S+) ", printed)
        assert not MARGIN.findall(printed)
    assert len(needed) == 2 and (trainer == "BasicTrainer" or needed[0] == needed[1])


# Several processes

SHARDED = {
    "live": (DPO, "other.pt"),
    "another dtype": ((*DPO, "model.reference_dtype=bfloat16"), "other"),
    "padded": ((*DPO, "layout=padded"), "adapter"),
    "cached": ((*DPO, CACHED), "other.pt"),
    "replicated": ((*DPO, "ddp=true"), "other"),
    "a frozen adapter": (LORA, "adapter"),
    "a cached adapter": ((*LORA, CACHED), "adapter"),
    "beside an adapter": (LORA, "other.pt"),
}


def train_sharded(others, llama, rank, n, folder) -> None:
    """Write what two ranks log and sample for each case; only the main one reads weights."""
    ranks = ProcessGroup(torch.device("cpu"), timedelta(seconds=60))
    if rank:
        build.load_policy = ReferenceWeights.load = None
    found = {}
    for name, (overrides, form) in SHARDED.items():
        ranks.init_mesh(n if "ddp=true" in overrides else 1)
        reference = naming(others / form)
        trainer = build_sharded(folder / name, ranks, *TINY, *overrides, reference, "trainer=FSDPTrainer")
        batch = first_batch(trainer)
        evaluation = trainer.evaluate()
        found[name] = (evaluation, without_measurements(trainer.train_step(batch)))
    ranks.init_mesh(1, 2)
    split = (*SPLIT, f"model.name_or_path='{llama}'", naming(folder / "llama.pt"), "trainer=TensorParallelTrainer")
    trainer = build_sharded(folder / "split", ranks, *TINY, *split, "tensor_parallel=2")
    found["split"] = (trainer.evaluate(), without_measurements(trainer.train_step(first_batch(trainer))))
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    ranks.close()


SPLIT = (*DPO, f"model.tokenizer_name_or_path='{TINY_GPT2}'")


def test_two_processes_compute_with_another_reference_as_one_does(others, llama, tmp_path, make_trainer, report):
    state = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    policy_pt(tmp_path / "llama.pt", {name: value + 0.02 for name, value in state.items()})
    run_ranks(2, partial(train_sharded, others, llama), tmp_path)
    split = (*SPLIT, f"model.name_or_path='{llama}'", naming(tmp_path / "llama.pt"))
    alone = {
        name: make_trainer(*(each for each in overrides if each != "ddp=true"), naming(others / form))
        for name, (overrides, form) in SHARDED.items()
    }
    alone["split"] = make_trainer(*split)
    worst = {}
    for name, found in json.loads((tmp_path / "found.json").read_text()).items():
        batch = first_batch(alone[name])
        for expected, other in zip((alone[name].evaluate(), alone[name].train_step(batch)), found, strict=True):
            keys = [key for key in expected if key.startswith(("loss", "rewards"))]
            worst[name] = max(worst.get(name, 0.0), *(abs(other[key] - expected[key]) for key in keys))
        assert abs(expected["rewards_train/margins"]) > 0.01
    report(f"two processes and one, largest difference of losses and rewards: {worst}")
    rounding = {name: 0.02 if name == "another dtype" else 5e-5 for name in worst}
    assert [name for name, value in worst.items() if value > rounding[name]] == []


def test_a_run_of_two_processes_resumes_bit_for_bit_and_logs_the_first_margin_of_one(others, tmp_path):
    settings = (*RUN, "trainer=FSDPTrainer", naming(others / "other.pt"))
    folder = tmp_path / "whole"
    done = command_lines(folder, fresh(folder, *settings), 2)
    assert [run.returncode for run in done] == [0, 0], done[0].stderr + done[1].stderr
    alone = command_line(tmp_path / "alone", fresh(tmp_path / "alone", *RUN, naming(others / "other.pt")))
    assert MARGIN.findall(done[0].stdout) == MARGIN.findall(alone.stdout) != [] and not MARGIN.findall(done[1].stdout)
    resumed = copy_until(folder, tmp_path / "resumed", 24)
    done = command_lines(resumed, again(resumed), 2)
    assert [run.returncode for run in done] == [0, 0], done[0].stderr
    assert logs_of(resumed) == logs_of(folder)
    for path in ((run / "LATEST" / "policy.pt") for run in (folder, resumed)):
        assert path.read_bytes() == (folder / "LATEST" / "policy.pt").read_bytes()
