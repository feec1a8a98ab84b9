"""LoRA: what an adapter computes and trains, what the reference beside it is, and what is saved, merged and refused."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import GOLDENS, ROOT, TINY, compose, inputs_of, validated, without_measurements
from safetensors.torch import save_file
from tiny_models import EXAMPLES, PLENTY, composite, sums_of_logps, tiny

from dpo.model import lora
from dpo.model.archives import load_archive, weights_checksum
from dpo.model.loading import keep_weights_unpacked
from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.lora import AdapterShape, find_targets, read_adapter
from dpo.model.packing import LAYOUTS, make_microbatches
from dpo.runs.checkpoints import read_checkpoint
from dpo.runs.weights import add_adapter
from dpo.settings import constraints
from dpo.settings.config_files import read_config_files
from dpo.settings.run_config import override_run_config
from dpo.system.errors import UserError
from dpo.training.references import AdapterReference

# peft asks transformers for an attribute by its old name.
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LORA = ("lora=default", "lora.r=4", "lora.alpha=8", "lr=1e-3", "warmup_steps=0")
GPT2_LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def settings_of(*overrides: str):
    return validated("loss=dpo", *TINY, *LORA, *overrides)[0]


def adapted(family: str, *overrides: str):
    """A tiny model with an adapter that changes what it computes, and the adapter."""
    model = tiny(family)
    adapter = add_adapter(model, settings_of(*overrides))
    move(adapter)
    return model, adapter


@torch.no_grad()
def move(adapter, std: float = 0.1) -> None:
    """Move every matrix of an adapter by noise, so that it computes something."""
    generator = torch.Generator().manual_seed(0)
    for parameter in lora.adapter_parameters(adapter.model, lora.POLICY).values():
        parameter += std * torch.randn(parameter.shape, generator=generator)


def first(trainer):
    """The first batch of a trainer, and the first microbatch of it."""
    batch = next(iter(trainer.train_batches))
    return batch, next(trainer.packer(batch.examples))


# Which layers


def test_auto_means_all_linear_layers_of_the_blocks_and_not_the_head():
    gpt2 = {f"transformer.h.{block}.{layer}" for block in range(2) for layer in GPT2_LAYERS}
    assert set(find_targets(tiny("GPT2"), "auto")) == gpt2
    llama = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert [name.rpartition(".")[2] for name in find_targets(tiny("Llama"), "auto")] == [*llama, *llama]


def test_targets_are_names_or_ends_of_names():
    assert find_targets(tiny("GPT2"), ["c_attn"]) == ("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn")
    assert find_targets(tiny("GPT2"), ["0.mlp.c_proj"]) == ("transformer.h.0.mlp.c_proj",)


@pytest.mark.parametrize("wrong", ["q_proj", "proj", "lm_head"])
def test_a_name_that_no_layer_has_is_refused_with_those_that_there_are_before_weights_load(wrong):
    line = f"lora.targets: no linear layer of this model's blocks is called {wrong}; it has c_attn, c_proj, c_fc"
    with pytest.raises(UserError, match=line):
        inputs_of("loss=dpo", *TINY, *LORA, f"lora.targets=[c_fc,{wrong}]")


EXPERTS = "lora.targets=[q_proj,gate_up_proj,down_proj]"
EXPERT_LAYERS = ("self_attn.q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def test_tensors_of_all_experts_are_adapted_only_where_they_are_named(capsys):
    model = tiny("Mixtral")
    adapter = add_adapter(model, settings_of(EXPERTS))
    adapted_tensors = {f"model.layers.{block}.{layer}" for block in range(2) for layer in EXPERT_LAYERS}
    assert {*adapter.shape.targets, *adapter.shape.parameters} == adapted_tensors
    assert "frozen" not in capsys.readouterr().out
    assert add_adapter(tiny("Mixtral"), settings_of()).shape.parameters == ()
    names = "[q_proj,k_proj,v_proj,o_proj,gate_up_proj,down_proj]"
    line = f"the experts (gate_up_proj and down_proj) stay frozen; lora.targets={names} adapts them as well."
    assert line in capsys.readouterr().out
    add_adapter(tiny("Llama"), settings_of())
    assert "experts" not in capsys.readouterr().out


def test_experts_alone_can_be_adapted():
    shape = add_adapter(tiny("Mixtral"), settings_of("lora.targets=[experts.down_proj]")).shape
    assert shape.targets == () and len(shape.parameters) == 2


ALL_EXPERTS = "lora.targets: gate_up_proj, down_proj hold all experts in one tensor, which needs"


@pytest.mark.parametrize(
    "other, line",
    [
        ("lora.dropout=0.1", f"{ALL_EXPERTS} lora.dropout=0"),
        ("lora.use_dora=true", f"{ALL_EXPERTS} lora.use_dora=false"),
        ("compile=true", "compile=true: layers whose experts are adapted cannot be compiled; set compile=false"),
    ],
)
def test_what_peft_cannot_do_with_experts_is_refused_before_weights_load(other, line, write_tiny_folder):
    with pytest.raises(UserError, match=line):
        inputs_of("loss=dpo", *TINY, *LORA, EXPERTS, other, f"model.name_or_path='{write_tiny_folder('mixtral')}'")


# What is computed

VARIANTS = ((), ("lora.use_rslora=true",), ("lora.use_dora=true",), ("lora.targets=auto", "lora.init=gaussian"))


@pytest.mark.parametrize("overrides", VARIANTS, ids=["plain", "rslora", "dora", "gaussian"])
@pytest.mark.parametrize("family", ["GPT2", "Llama", "GPTNeoX", "Qwen3", "Gemma3Text", "Mixtral"])
def test_the_policy_equals_the_merged_model_within_1e_5(family, overrides, report):
    base = sums_of_logps(ResponseLogps.wrap(tiny(family)), EXAMPLES, "shared_prefix")
    model, adapter = adapted(family, *overrides)
    policy = sums_of_logps(ResponseLogps.wrap(model), EXAMPLES, "shared_prefix")
    merged = tiny(family)
    merged.load_state_dict(adapter.merged_weights(model.state_dict()))
    apart = (sums_of_logps(ResponseLogps.wrap(merged), EXAMPLES, "shared_prefix") - policy).abs()
    assert (policy - base).abs().max() > 0.1
    assert (apart / policy.abs()).max() < 1e-5
    report(f"LoRA, {family} {' '.join(overrides)}: policy and merged model within {apart.max():.1g} nats")


def test_a_compiled_run_gives_the_numbers_of_another_with_the_adapter_and_without(make_trainer, monkeypatch):
    """Were a layer to keep what it was compiled with, the reference would move along and rewards would stay at 0.

    Graphs are captured and guarded as ever, each once, but not made into kernels, which takes most of a minute.
    """
    metrics, graphs, compile_module = [], [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **how: compile_module(*args, backend="eager", **how))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for setting in ("false", "true"):
        trainer = make_trainer("loss=dpo", *LORA, "lora.targets=[c_fc]", "lr=1e-2", f"compile={setting}")
        metrics.append([])
        for batch, _ in zip(trainer.train_batches, range(3), strict=False):
            metrics[-1].append(trainer.train_step(batch))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[:3] == [0, 0, 0] and graphs[3] == graphs[4] == graphs[5] > 0
    for plain, other in zip(*metrics, strict=True):
        assert without_measurements(other) == pytest.approx(without_measurements(plain), rel=1e-4)
    assert metrics[1][0]["rewards_train/margins"] == 0 != metrics[1][2]["rewards_train/margins"]


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_a_policy_with_adapted_experts_equals_the_merged_model_and_without_its_adapter_the_base(family):
    """GPT-OSS stores the matrices of its experts transposed."""
    base = sums_of_logps(ResponseLogps.wrap(tiny(family)), EXAMPLES, "shared_prefix")
    model, adapter = adapted(family, EXPERTS)
    module = ResponseLogps.wrap(model)
    policy = sums_of_logps(module, EXAMPLES, "shared_prefix")
    merged = tiny(family)
    merged.load_state_dict(adapter.merged_weights(model.state_dict()))
    apart = (sums_of_logps(ResponseLogps.wrap(merged), EXAMPLES, "shared_prefix") - policy).abs()
    assert (policy - base).abs().max() > 0.1
    assert (apart / policy.abs()).max() < 1e-5
    with adapter.as_reference():
        assert torch.equal(sums_of_logps(module, EXAMPLES, "shared_prefix"), base)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["GPTNeoX", "Llama", "Gemma3Text"])
def test_without_its_adapter_the_policy_is_the_base_model_bit_for_bit(family, layout):
    base = sums_of_logps(ResponseLogps.wrap(tiny(family)), EXAMPLES, layout)
    model, adapter = adapted(family, "lora.dropout=0.5")
    module = ResponseLogps.wrap(model.train())
    reference = AdapterReference(module, adapter, None)
    with torch.no_grad():
        batches = list(make_microbatches(EXAMPLES, layout, PLENTY))
        found = torch.cat([reference.logps(batch).sums for batch in batches]).double()
    rows = [example for batch in batches for example in batch.examples]
    assert torch.equal(found, base[[EXAMPLES.index(example) for example in rows]])
    assert not torch.equal(sums_of_logps(module, EXAMPLES, layout), base)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_an_adapter_of_bfloat16_weights_is_in_float32(family):
    model = tiny(family).bfloat16()
    adapter = add_adapter(model, settings_of("model.policy_dtype=bfloat16", "precision=bfloat16"))
    assert {value.dtype for value in adapter.tensors().values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}


def test_scale_is_alpha_by_r_or_by_its_root():
    """r=4, alpha=8: 2, and with rslora 8 / 2 = 4."""
    for overrides, scale in (((), 2.0), (("lora.use_rslora=true",), 4.0)):
        _, adapter = adapted("GPT2", *overrides)
        assert {layer.scaling[lora.POLICY] for layer in adapter.layers.values()} == {scale}


def test_frozen_weights_get_no_gradient_and_every_matrix_of_the_adapter_gets_one():
    model, adapter = adapted("Llama")
    (batch,) = make_microbatches(EXAMPLES, "shared_prefix", PLENTY)
    response_logps(ResponseLogps.wrap(model), batch).sums.sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".lora_" in name}
    own = lora.adapter_parameters(model, lora.POLICY)
    assert len(own) == len(with_gradient) == 2 * 14
    assert all(parameter.grad.abs().max() > 0 for parameter in own.values())


@pytest.mark.parametrize("overrides", [(), ("activation_checkpointing=true",), ("gradient_accumulation_steps=4",)])
def test_an_update_is_the_same_with_recomputed_activations_and_in_parts(overrides, make_trainer):
    after = []
    for more in ((), overrides):
        trainer = make_trainer("loss=dpo", *LORA, "lora.dropout=0", *more)
        move(trainer.weights)
        trainer.train_step(first(trainer)[0])
        after.append(trainer.weights.state_dict()["weights"])
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-5, atol=1e-5)


# The reference and the first margin


@pytest.mark.parametrize(
    "overrides",
    [
        ("layout=padded",),
        ("lora.dropout=0.5",),
        ("precision=bfloat16",),
        ("precision=auto", "model.policy_dtype=bfloat16"),
        ("lora.use_dora=true",),
        ("lora.use_dora=true", "precision=bfloat16"),
        ("activation_checkpointing=true",),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_the_first_margin_is_exactly_0_and_the_second_is_not(overrides, make_trainer, capsys):
    trainer = make_trainer("loss=dpo", *LORA, *overrides)
    told = capsys.readouterr().out
    assert "Reference: the base model, which is the policy with its adapter off; no second model is loaded." in told
    steps = [trainer.train_step(batch) for batch, _ in zip(trainer.train_batches, range(2), strict=False)]
    rewards = [[step[f"rewards_train/{what}"] for what in ("chosen", "rejected", "margins")] for step in steps]
    assert rewards[0] == [0.0] * 3 and all(value != 0.0 for value in rewards[1])
    assert steps[0]["loss/train"] == pytest.approx(0.6931472)


@pytest.mark.parametrize("cached", ["false", "true"])
def test_a_run_checks_its_first_margin(cached, make_trainer, monkeypatch):
    def add_moved(*args):
        adapter = add_adapter(*args)
        move(adapter)
        return adapter

    monkeypatch.setattr("build.add_adapter", add_moved)
    with pytest.raises(UserError, match="policy and reference differ by up to .* nats per response"):
        make_trainer("loss=dpo", *LORA, f"loss.precompute_reference={cached}", "debug=true")


def test_dropout_is_random_in_the_policys_training_alone(make_trainer):
    trainer = make_trainer("loss=dpo", *LORA, "lora.dropout=0.5")
    move(trainer.weights)
    _, part = first(trainer)
    passes = {"training": [], "evaluation": [], "reference": []}
    for seed in range(2):
        torch.manual_seed(seed)
        trainer.policy.train()
        passes["training"].append(response_logps(trainer.policy, part).sums)
        passes["reference"].append(trainer.reference.logps(part).sums)
        trainer.policy.eval()
        passes["evaluation"].append(response_logps(trainer.policy, part).sums)
    assert {name: torch.equal(*pair) for name, pair in passes.items()} == {
        "training": False,
        "evaluation": True,
        "reference": True,
    }


def test_the_reference_samples_what_the_base_model_samples(make_trainer):
    settings = ("n_eval_model_samples=2", "max_length=48", "max_prompt_length=24")
    trainer = make_trainer("loss=dpo", *LORA, *settings)
    prompts = next(iter(trainer.eval_batches.from_start())).examples[:2]
    base = trainer.sampler.sample(trainer.policy.model, prompts, "base")
    move(trainer.weights, 0.3)
    assert trainer.reference.generate(prompts) == base != trainer.sampler.sample(trainer.policy.model, prompts, "now")


def test_a_cached_reference_gives_the_updates_of_a_live_one_and_one_cache_serves_all_adapters(
    make_trainer, tmp_path, capsys
):
    settings = ("max_length=48", "max_prompt_length=24", "n_eval_examples=8", f"local_dirs=['{tmp_path}']")
    steps = {}
    for cached in ("true", "false"):
        trainer = make_trainer("loss=dpo", *LORA, *settings, f"loss.precompute_reference={cached}")
        batches = zip(trainer.train_batches, range(3), strict=False)
        steps[cached] = [trainer.train_step(batch)["loss/train"] for batch, _ in batches]
    assert steps["true"] == pytest.approx(steps["false"], rel=1e-6)
    capsys.readouterr()
    make_trainer("loss=dpo", *LORA, *settings, "loss.precompute_reference=true", "lora.r=2", "lora.dropout=0.1")
    assert "Reference: log-probabilities read from" in capsys.readouterr().out


# What is saved


@pytest.fixture
def trained(make_trainer):
    """A function that builds a trainer with an adapter, makes two updates, saves and exports."""

    def train(*overrides: str, loss: str = "dpo"):
        trainer = make_trainer(f"loss={loss}", *LORA, "lora.export_merged=true", *overrides)
        for batch, _ in zip(trainer.train_batches, range(2), strict=False):
            trainer.train_step(batch)
        move(trainer.weights)
        trainer.save()
        trainer.export({})
        return trainer, trainer.run.path / "LATEST"

    return train


def logits_of(model) -> torch.Tensor:
    """A model's logits of some tokens, as float64."""
    with torch.no_grad():
        return model.eval()(torch.arange(5, 45)[None]).logits.double()


def test_a_checkpoint_holds_the_adapter_and_its_optimizer_alone(trained):
    trainer, latest = trained()
    states = read_checkpoint(latest.resolve())
    names = set(states["policy"]["weights"])
    layers = [f"transformer.h.{block}.{layer}" for block in range(2) for layer in GPT2_LAYERS]
    assert names == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    assert len(states["optimizer"]["state"]) == len(states["optimizer"]["param_groups"][0]["params"]) == len(names)
    n_adapter = sum(value.numel() for value in states["policy"]["weights"].values())
    assert (latest / "policy.pt").stat().st_size < 4 * n_adapter + 16_000
    assert load_archive(str(latest / "policy.pt"))["adapter"]["r"] == 4


@OLD_NAME
@pytest.mark.parametrize("overrides", [(), ("lora.use_dora=true",), ("lora.targets=[c_attn]",)])
def test_peft_and_transformers_open_the_export_and_the_merged_model(overrides, trained):
    from peft import PeftModel

    trainer, latest = trained(*overrides)
    policy = logits_of(trainer.policy.model)
    config = json.loads((latest / "hf" / "adapter_config.json").read_text())
    base = transformers.AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    assert (logits_of(base) - policy).abs().max() > 0.01
    opened = PeftModel.from_pretrained(base, latest / "hf")
    assert torch.equal(logits_of(opened), policy)
    if "lora.use_dora=true" not in overrides:  # transformers 5.23 does not find DoRA's magnitudes, which peft finds
        by_path = transformers.AutoModelForCausalLM.from_pretrained(latest / "hf")
        assert torch.equal(logits_of(by_path), policy)
    merged = transformers.AutoModelForCausalLM.from_pretrained(latest / "hf" / "merged")
    assert (logits_of(merged) - policy).abs().max() < 1e-5 * policy.abs().max()
    assert (
        config["target_modules"] == ["c_attn"] if "lora.targets=[c_attn]" in overrides else ["c_attn", "c_proj", "c_fc"]
    )
    assert transformers.AutoTokenizer.from_pretrained(latest / "hf").vocab_size
    assert not (trainer.run.path / "base").exists()


def test_an_archive_of_an_adapter_is_merged_and_what_comes_out_is_the_reference(trained, make_trainer, capsys):
    before, latest = trained(loss="sft")
    archive = f"model.archive='{latest / 'policy.pt'}'"
    after = make_trainer("loss=dpo", *LORA, archive, "lora.r=2")
    batch, part = first(after)
    with torch.no_grad():
        expected = response_logps(before.policy.eval(), part).sums
        torch.testing.assert_close(after.reference.logps(part).sums, expected, rtol=1e-5, atol=1e-5)
    assert after.train_step(batch)["rewards_train/margins"] == 0.0
    full = make_trainer("loss=dpo", archive)  # all weights, from the merged ones
    assert full.train_step(batch)["rewards_train/margins"] == 0.0
    assert not hasattr(full.policy.model, "peft_config")
    assert all(parameter.requires_grad for parameter in full.policy.parameters())
    torch.testing.assert_close(full.reference.logps(part).sums, expected, rtol=1e-5, atol=1e-5)


@OLD_NAME
def test_weights_that_are_nowhere_else_are_exported_beside_the_adapter_that_belongs_to_them(
    trained, make_trainer, tmp_path
):
    from peft import PeftModel

    _, latest = trained(loss="sft")
    second, newest = trained(f"model.archive='{latest / 'policy.pt'}'", "lora.export_merged=false")
    base = second.run.path / "base"
    assert not (newest / "hf" / "merged").exists()
    assert json.loads((newest / "hf" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    opened = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), newest / "hf")
    assert torch.equal(logits_of(opened), logits_of(second.policy.model))
    archive = f"model.archive='{newest / 'policy.pt'}'"
    for other in (archive, f"lora.path='{newest / 'hf'}'"):
        setting = other.partition("=")[0]
        with pytest.raises(UserError, match=f"{setting}=.*: this adapter was trained on other weights; .*=RUN/base"):
            make_trainer("loss=dpo", *LORA, other, f"exp_name={setting}", f"local_run_dir='{tmp_path / setting}'")
    third = make_trainer("loss=dpo", archive, f"model.name_or_path='{base}'")
    apart = (logits_of(third.policy.model) - logits_of(second.policy.model)).abs().max()
    assert apart < 1e-5 * logits_of(second.policy.model).abs().max()


# An adapter of experts


@OLD_NAME
def test_an_adapter_of_experts_is_opened_merged_and_trained_further_like_any_other(
    trained, make_trainer, write_tiny_folder
):
    from peft import PeftModel

    folder = write_tiny_folder("mixtral")
    settings = (f"model.name_or_path='{folder}'", EXPERTS)
    trainer, latest = trained(*settings)
    policy = logits_of(trainer.policy.model)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (logits_of(base) - policy).abs().max() > 0.01
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, latest / "hf")), policy)
    assert torch.equal(logits_of(transformers.AutoModelForCausalLM.from_pretrained(latest / "hf")), policy)
    merged = transformers.AutoModelForCausalLM.from_pretrained(latest / "hf" / "merged")
    assert (logits_of(merged) - policy).abs().max() < 1e-5 * policy.abs().max()
    archived = make_trainer("loss=dpo", *LORA, *settings, f"model.archive='{latest / 'policy.pt'}'")
    further = make_trainer("loss=dpo", *LORA, *settings, f"lora.path='{latest / 'hf'}'")
    assert torch.equal(logits_of(further.policy.model), policy)
    for after in (archived, further):
        assert (logits_of(after.policy.model) - policy).abs().max() < 1e-5 * policy.abs().max()
        batch, _ = first(after)
        assert after.train_step(batch)["rewards_train/margins"] == 0.0
        assert not torch.equal(logits_of(after.policy.model), policy)
    assert further.weights.shape == trainer.weights.shape
    other = (f"model.name_or_path='{folder}'", "lora.targets=[q_proj,down_proj]", f"lora.path='{latest / 'hf'}'")
    with pytest.raises(UserError, match=r"add lora.targets=\[q_proj,gate_up_proj,down_proj\]"):
        make_trainer("loss=dpo", *LORA, *other)


# An adapter that is trained further


def test_an_adapter_is_trained_further_from_a_frozen_copy_of_itself(trained, make_trainer, capsys):
    before, latest = trained(loss="sft")
    path = f"lora.path='{latest / 'hf'}'"
    after = make_trainer("loss=dpo", *LORA, path, "lora.dropout=0.5")
    assert "Reference: the base model with a frozen copy of the adapter of lora.path" in capsys.readouterr().out
    batch, part = first(after)
    with torch.no_grad():
        expected = response_logps(before.policy.eval(), part).sums
        assert torch.equal(after.reference.logps(part).sums, expected)
        assert torch.equal(response_logps(after.policy.eval(), part).sums, expected)
    after.train_step(batch)
    assert torch.equal(after.reference.logps(part).sums, expected)
    assert not torch.equal(response_logps(after.policy.eval(), part).sums, expected)
    assert len(after.optimizer.state) == len(after.weights.state_dict()["weights"]) == 16
    after.save()
    after.export({})
    assert read_adapter(str(after.run.path / "LATEST" / "hf")).shape == read_adapter(str(latest / "hf")).shape


def test_the_cached_reference_of_an_adapter_that_is_trained_further_has_no_dropout(trained, make_trainer):
    """A model made from scratch begins in training mode."""
    scratch = "model.from_scratch=true"
    _, latest = trained(scratch, loss="sft")
    further = (scratch, f"lora.path='{latest / 'hf'}'", "lora.dropout=0.5")
    cached = make_trainer("loss=dpo", *LORA, *further, "loss.precompute_reference=true")
    live = make_trainer("loss=dpo", *LORA, *further)
    _, part = first(live)
    torch.testing.assert_close(cached.reference.logps(part).sums, live.reference.logps(part).sums)


def test_other_settings_than_those_of_the_adapter_are_refused_with_those_to_add(trained, make_trainer):
    _, latest = trained("lora.use_rslora=true", "lora.targets=[c_attn,c_fc]")
    path = f"lora.path='{latest / 'hf'}'"
    with pytest.raises(UserError) as refusal:
        make_trainer("loss=dpo", "lora=default", path)
    added = "add lora.r=4 lora.alpha=8 lora.use_rslora=true lora.targets=[c_attn,c_fc]"
    assert str(refusal.value).endswith(f"was made with other settings; {added}")
    make_trainer("loss=dpo", "lora=default", path, *added.split()[1:])


@pytest.mark.parametrize(
    "change", [{"peft_type": "IA3"}, {"init_lora_weights": "pissa"}, {"rank_pattern": {"c_fc": 2}}]
)
def test_what_is_not_a_plain_adapter_is_refused(change, trained, make_trainer):
    _, latest = trained()
    config = latest / "hf" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match="lora.path=.*: not a plain LoRA adapter"):
        make_trainer("loss=dpo", *LORA, f"lora.path='{latest / 'hf'}'")


def test_a_folder_without_an_adapters_weights_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="lora.path=.*: cannot be read"):
        read_adapter(str(tmp_path))


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_an_adapter_that_was_cut_off_is_refused(share, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.c_fc.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}, path)
    assert len(read_adapter(str(tmp_path)).weights) == 2
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(UserError, match="lora.path=.*: cannot be read"):
        read_adapter(str(tmp_path))


# Resuming, of which tests/test_resume.py kills whole runs


def test_a_resumed_run_must_find_its_frozen_weights_and_keeps_its_adapter(trained, make_trainer):
    before, latest = trained(loss="sft")
    assert before.run.fingerprints["the base model's weights"] == before.weights.base
    further = make_trainer("loss=sft", *LORA, f"lora.path='{latest / 'hf'}'")
    assert {"the base model's weights", "the adapter of lora.path"} < set(further.run.fingerprints)
    scratch = make_trainer("loss=sft", *LORA, "model.from_scratch=true")
    assert scratch.weights.base != before.weights.base


def test_a_resumed_run_takes_another_place_of_its_adapter_and_no_other_setting_of_it(tmp_path):
    config = compose("loss=dpo", *TINY, *LORA, f"lora.path='{tmp_path}'", "exp_name=x", "local_run_dir=x")
    known = read_config_files(ROOT / "config").keys()
    taken = override_run_config(config.copy(), ["lora.path=moved", "lora.export_merged=true"], known)
    assert taken == {"lora.path": "moved", "lora.export_merged": True}
    for wrong, line in (("lora.r=2", "a resumed run keeps lora.r=4"), ("lora=default", "keeps its own lora")):
        with pytest.raises(UserError, match=line):
            override_run_config(config.copy(), [wrong], known)


def test_a_checkpoint_of_another_adapter_does_not_fit(make_trainer):
    weights = [make_trainer("loss=sft", *LORA, f"lora.targets=[{name}]").weights for name in ("c_attn", "c_fc")]
    with pytest.raises(UserError, match="resume=RUN: does not fit the model: missing .*c_fc.*unexpected .*c_attn"):
        weights[1].load_state_dict(weights[0].state_dict(), "resume=RUN")


# Settings


def problems(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as refusal:
        settings_of(*overrides)
    return str(refusal.value).splitlines()


def test_without_peft_lora_is_refused_before_anything_loads(monkeypatch):
    monkeypatch.setattr(constraints, "is_installed", lambda library: library != "peft")
    assert problems() == ["lora.r=4: needs the library peft; pip install peft"]


def test_without_peft_an_archive_of_an_adapter_is_refused(trained, make_trainer, monkeypatch):
    _, latest = trained()
    monkeypatch.setattr(lora, "is_installed", lambda library: False)
    with pytest.raises(UserError, match="model.archive=.*: holds an adapter, which needs the library peft"):
        make_trainer("loss=dpo", f"model.archive='{latest / 'policy.pt'}'")


def test_a_forged_adapter_is_refused_in_one_line():
    model = tiny("GPT2")
    state = {"adapter": {"r": 4}, "base": weights_checksum(model.state_dict()), "weights": {}}
    with pytest.raises(UserError, match="model.archive=X: its adapter cannot be read"):
        lora.merge_adapter(model, state, "model.archive=X")


@pytest.mark.parametrize(
    "overrides, line",
    [
        (
            ("model.reference_dtype=bfloat16",),
            "reference=start lora.r=4 model.reference_dtype=bfloat16: the policy without its adapter is the reference",
        ),
        (
            ("lora.use_dora=true", "model.policy_dtype=bfloat16", "precision=auto"),
            "lora.use_dora=true model.policy_dtype",
        ),
        (("lora.path=/nowhere",), "lora.path=/nowhere: holds no adapter_config.json"),
        (("lora.quantize=nf4", "device=auto", "lora.use_dora=true"), "lora.quantize=nf4 lora.use_dora=true: "),
        (
            ("lora.quantize=nf4", "device=auto", "lora.export_merged=true"),
            "lora.quantize=nf4 lora.export_merged=true: ",
        ),
        (("lora.quantize=nf4", "device=auto", "model.from_scratch=true"), "lora.quantize=nf4 model.from_scratch"),
        (("lora.quantize=nf4", "device=mps"), "lora.quantize=nf4 device=mps: there are no kernels for MPS"),
        (("push_to_hub=me/name",), "push_to_hub=me/name lora.r=4 model.name_or_path="),
        (
            ("push_to_hub=me/name", "lora.export_merged=true"),
            "push_to_hub=me/name lora.r=4 model.name_or_path=",
        ),
    ],
)
def test_settings_that_an_adapter_cannot_have_are_one_line(overrides, line, monkeypatch):
    monkeypatch.setattr(constraints, "is_installed", lambda library: True)
    (found,) = problems(*overrides)
    assert found.startswith(line)


def test_quantizing_needs_its_library_and_the_device_that_auto_finds(monkeypatch, make_trainer):
    nf4 = ("lora.quantize=nf4", "device=auto")
    monkeypatch.setattr(constraints, "is_installed", lambda library: library == "peft")
    assert problems(*nf4) == ["lora.quantize=nf4: needs the library bitsandbytes; pip install bitsandbytes"]
    monkeypatch.setattr(constraints, "is_installed", lambda library: True)
    monkeypatch.setattr("build.pick_device", lambda name: torch.device("mps"))
    with pytest.raises(UserError, match="lora.quantize=nf4: has no kernels for MPS"):
        make_trainer("loss=dpo", *LORA, *nf4)


# Quantized weights


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    """The folder of a tiny Llama whose linear layers are as wide as a block of NF4 or wider."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = transformers.AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


NF4 = ("loss=dpo", *LORA, "lora.quantize=nf4")
HALF_STEP = 0.152  # half the widest gap, from -1 to -0.696, between NF4's levels from -1 to 1: arXiv 2305.14314


def steps(trainer, n: int) -> list[dict[str, float]]:
    """Make n updates and return their metrics without times."""
    batches = zip(trainer.train_batches, range(n), strict=False)
    return [without_measurements(trainer.train_step(batch)) for batch, _ in batches]


def test_quantized_layers_have_4_bits_and_are_near_the_weights_that_they_stand_for(llama, make_trainer):
    trainer = make_trainer(*NF4, f"model.name_or_path='{llama}'")
    plain = transformers.AutoModelForCausalLM.from_pretrained(llama)
    layers = {name: m for name, m in trainer.policy.model.named_modules() if type(m).__name__ == "Linear4bit"}
    layers = {name: layer for name, layer in layers.items() if name.endswith("base_layer")}
    assert len(layers) == 2 * 7 and not any(p.requires_grad for m in layers.values() for p in [m.weight])
    for name, layer in layers.items():
        weight = plain.get_submodule(name.removesuffix(".base_layer")).weight
        assert layer.weight.numel() == weight.numel() / 2 and layer.weight.dtype == torch.uint8
        error = (dequantized(layer) - weight).flatten().view(-1, 64)
        largest = weight.flatten().view(-1, 64).abs().amax(1)  # of each block, by which its numbers are scaled
        assert (error.abs().amax(1) <= 1.05 * HALF_STEP * largest).all() and error.abs().max() > 0


def dequantized(layer) -> torch.Tensor:
    """The weights of a layer of bitsandbytes, as its products see them."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight, layer.weight.quant_state)


def test_a_quantized_run_begins_at_margin_0_trains_and_resumes_bit_for_bit(llama, make_trainer, tmp_path):
    whole = make_trainer(*NF4, f"model.name_or_path='{llama}'", "lora.dropout=0.1")
    expected = steps(whole, 4)
    assert whole.reference is not None and expected[-1]["loss/train"] < expected[0]["loss/train"]
    plain = make_trainer(*NF4, f"model.name_or_path='{llama}'")
    assert steps(plain, 1)[0]["rewards_train/margins"] == 0.0
    stopped = make_trainer(*NF4, f"model.name_or_path='{llama}'", "lora.dropout=0.1")
    before = steps(stopped, 2)
    stopped.save()
    states = read_checkpoint((stopped.run.path / "LATEST").resolve())
    resumed = make_trainer(*NF4, f"model.name_or_path='{llama}'", "lora.dropout=0.1")
    resumed.load_state_dict(states)
    assert before + steps(resumed, 2) == expected


def test_a_quantized_run_trains_every_adapter_also_where_bitsandbytes_would_pack_weights_for_a_cpu(
    llama, make_trainer, monkeypatch
):
    """It packs them on a CPU with AVX-512 and bfloat16, in a forward pass without a gradient, and loses gradients."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    trainer = make_trainer(*NF4, f"model.name_or_path='{llama}'", "n_examples=8", "debug=true")
    gradients = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad for n, p in trainer.policy.named_parameters() if ".lora_B." in n})
    )
    trainer.train()
    layers = [m for name, m in trainer.policy.named_modules() if name.endswith("_proj.base_layer")]
    states = [layer.weight.quant_state for layer in layers]
    assert len(states) == 2 * 7 and not any(getattr(state, "packing_format_for_cpu", False) for state in states)
    assert len(gradients) == 2 * 7 and all(gradient.any() for gradient in gradients.values())


@OLD_NAME
def test_the_export_of_a_quantized_run_is_the_adapter_on_the_quantized_model(llama, make_trainer):
    from peft import PeftModel

    trainer = make_trainer(*NF4, f"model.name_or_path='{llama}'")
    steps(trainer, 2)
    move(trainer.weights)
    trainer.save()
    trainer.export({})
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(llama, quantization_config=nf4, device_map={"": "cpu"})
    keep_weights_unpacked(base)  # as bitsandbytes packs them, they would be rounded
    policy = logits_of(trainer.policy.model)
    assert (logits_of(base) - policy).abs().max() > 0.01
    opened = PeftModel.from_pretrained(base, trainer.run.path / "LATEST" / "hf")
    assert (logits_of(opened) - policy).abs().max() < 1e-4 * policy.abs().max()


@OLD_NAME
@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_of_a_checkpoint_that_is_quantized_already_trains_and_opens_on_it(
    bits, llama, make_trainer, tmp_path
):
    from peft import PeftModel

    stored = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    options = {"device_map": {"": "cpu"}, "dtype": torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, quantization_config=stored, **options)
    model.save_pretrained(tmp_path / "quantized")
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "quantized")
    trainer = make_trainer("loss=dpo", *LORA, f"model.name_or_path='{tmp_path / 'quantized'}'")
    assert trainer.packer.layout == "shared_prefix" and trainer.policy.model.dtype == torch.float32
    updates = steps(trainer, 3)
    assert updates[0]["rewards_train/margins"] == 0.0 and updates[2]["loss/train"] < updates[0]["loss/train"]
    move(trainer.weights)
    trainer.save()
    trainer.export({})
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map={"": "cpu"})
    keep_weights_unpacked(base)
    before = logits_of(base)
    opened = PeftModel.from_pretrained(base, trainer.run.path / "LATEST" / "hf")
    error = (logits_of(opened) - logits_of(trainer.policy.model)).abs().max()
    assert error < 0.1 * (logits_of(opened) - before).abs().max()  # transformers opens the rest in bfloat16


def test_an_adapter_of_other_layers_with_the_same_ends_is_refused_without_a_setting_to_add():
    """As one of the language model alone, for a model that also sees images."""
    settings = settings_of()
    shape = AdapterShape(4, 8, False, False, ("model.language_model.layers.0.q_proj",))
    with pytest.raises(UserError, match="adapts layers that are not those of this language model$"):
        lora.check_shape(settings.lora, shape, replace(shape, targets=("model.layers.0.q_proj",)))


@pytest.mark.parametrize("family", ["Gemma3", "Qwen3_5"])
def test_only_the_language_model_of_a_composite_model_is_adapted(family):
    model = composite(family)
    for targets in ("auto", ["q_proj"]):
        found = find_targets(model, targets)
        assert found and all(".language_model." in name for name in found)


def test_a_vision_model_inside_the_language_model_is_not_adapted():
    """As in Phi-4-multimodal, where it is a part of the embeddings."""
    model = tiny("Llama")
    model.model.vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(num_hidden_layers=1))
    assert not any("vision" in name for name in find_targets(model, "auto"))


def test_a_learning_rate_for_all_weights_gets_a_line_of_advice(make_trainer, capsys):
    for lr, advised in (("5e-7", True), ("5e-5", False)):
        make_trainer("loss=dpo", *LORA, f"lr={lr}")
        assert ("LoRA: lr=" in capsys.readouterr().out) == advised


def test_what_a_model_freezes_itself_stays_frozen_when_an_adapter_is_merged():
    """As the biases of some routers, which no gradient reaches."""
    state = adapted("Llama")[1].state_dict()
    model = tiny("Llama")
    model.model.norm.weight.requires_grad_(False)
    lora.merge_adapter(model, state, "model.archive=policy.pt")
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["model.norm.weight"]


def test_an_adapter_has_the_same_matrices_for_the_same_seed():
    weights = [add_adapter(tiny("GPT2"), settings_of(f"seed={seed}")).state_dict()["weights"] for seed in (1, 1, 2)]
    name = "transformer.h.0.attn.c_attn.lora_A.weight"
    assert torch.equal(weights[0][name], weights[1][name]) and not torch.equal(weights[0][name], weights[2][name])


def test_whole_names_are_written_where_other_layers_share_their_ends():
    model = tiny("GPT2")
    adapter = add_adapter(model, settings_of("lora.targets=[0.mlp.c_proj]"))
    assert adapter.shape == AdapterShape(4, 8, False, False, ("transformer.h.0.mlp.c_proj",))
    assert adapter.short_targets() == ["transformer.h.0.mlp.c_proj"]
    assert Path(adapter.base_name).is_absolute()
