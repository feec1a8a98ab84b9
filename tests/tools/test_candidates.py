"""Whose weights and settings a candidate has: a run's policy, its reference, or a folder for from_pretrained."""

import json
import re
import warnings

import pytest
import torch
from conftest import GOLDENS
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dpo.system.errors import UserError
from tools.candidates import find_candidate, load_model

TINY = GOLDENS / "tiny-gpt2"


def weights(candidate):
    return load_model(candidate, torch.device("cpu")).state_dict()


@pytest.mark.parametrize("lora", [(), ("lora=default",)], ids=["all weights", "adapter"])
def test_the_policy_has_the_trained_weights_and_the_reference_those_of_the_start(lora, trained):
    run = trained("loss=dpo", *lora)
    policy, reference = find_candidate(run), find_candidate(run, as_reference=True)
    assert (policy.name, reference.name) == ("dpo_tiny-gpt2", "reference of dpo_tiny-gpt2")
    found, start = weights(policy), weights(reference)
    saved = torch.load(run / "LATEST" / "policy.pt")["state"]
    saved = saved["weights"] if lora else saved
    kept = re.compile(r"\.default\b")
    named = {kept.sub("", name).removesuffix(".weight"): value for name, value in found.items()}
    for name, value in saved.items():
        assert torch.equal(named[name.removesuffix(".weight")], value), name
    moved = [name for name in found if not torch.equal(found[name], start[name])]
    assert moved and all(("lora_" in name) == bool(lora) for name in moved)


def test_a_policy_needs_no_more_what_its_run_started_from(trained, tmp_path):
    first = trained("loss=sft")
    second = trained("loss=dpo", f"model.archive='{first / 'LATEST' / 'policy.pt'}'")
    first.rename(tmp_path / "moved")
    assert find_candidate(second).weights == second / "LATEST" / "policy.pt"
    with pytest.raises(UserError, match="model.archive=.*: no such file"):
        find_candidate(second, as_reference=True)


def test_a_checkpoint_of_a_run_can_be_named_and_a_run_without_one_is_refused(trained, tmp_path):
    run = trained("loss=dpo")
    for name in ("step-8", "LATEST"):
        assert find_candidate(run / name).weights == run / name / "policy.pt"
    with pytest.raises(UserError, match=r"step-9/policy.pt: there is no such file; give a run that has written"):
        find_candidate(run / "step-9")
    with pytest.raises(UserError, match="not a run directory"):
        find_candidate(tmp_path)


def test_no_tracker_of_the_run_is_needed(trained, monkeypatch):
    run = trained("loss=dpo")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("- wandb\n", "- trackio\n"))
    monkeypatch.setattr("dpo.settings.constraints.is_installed", lambda library: library != "trackio")
    assert "- trackio\n" in (run / "config.yaml").read_text() and find_candidate(run).settings.trackers == []


def test_a_models_folder_has_its_own_weights_and_the_settings_of_a_run(trained):
    run = trained("loss=dpo", "model.policy_dtype=float32", "sample_temperature=0.5")
    exported = run / "LATEST" / "hf"
    candidate = find_candidate(exported, like=find_candidate(run))
    assert candidate.name == str(exported) and candidate.settings.sample_temperature == 0.5
    model = candidate.settings.model
    assert (model.name_or_path, model.tokenizer_name_or_path, model.archive) == (str(exported), str(exported), None)
    expected = weights(find_candidate(run))
    assert all(torch.equal(value, expected[name]) for name, value in weights(candidate).items())
    default = find_candidate(exported).settings
    positions = AutoConfig.from_pretrained(exported).max_position_embeddings
    assert default.sample_temperature == 1.0 and default.max_length == positions < 512
    with pytest.raises(UserError, match="hf: is a model's folder, which does not name a reference"):
        find_candidate(exported, as_reference=True)


def test_a_models_folder_without_a_tokenizer_has_that_of_the_run(trained, tmp_path):
    run = trained("loss=dpo")
    AutoModelForCausalLM.from_pretrained(run / "LATEST" / "hf").save_pretrained(tmp_path / "bare")
    model = find_candidate(tmp_path / "bare", like=find_candidate(run)).settings.model
    assert (model.name_or_path, model.tokenizer_name_or_path) == (str(tmp_path / "bare"), str(TINY))


def make_adapter(folder, **settings):
    """Write an adapter of the tiny model as peft does, with random weights; return the whole model's state."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(TINY)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, fan_in_fan_out=True, **settings)
    with warnings.catch_warnings(action="ignore"):  # of peft's use of transformers
        adapted = get_peft_model(base, config)
        adapted.save_pretrained(folder)
        return adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize("more", [{}, {"rank_pattern": {"c_proj": 4}}, {"modules_to_save": ["wte"], "use_dora": True}])
def test_an_adapter_of_any_kind_is_merged_into_its_base_model(more, tmp_path):
    """lora.path takes none of the last two."""
    expected = make_adapter(tmp_path / "adapter", target_modules=["c_attn", "c_proj"], **more)
    candidate = find_candidate(tmp_path / "adapter")
    model = candidate.settings.model
    assert (model.name_or_path, model.tokenizer_name_or_path) == (str(TINY), None)
    found = weights(candidate)
    assert found.keys() == expected.keys()
    start = AutoModelForCausalLM.from_pretrained(TINY).state_dict()
    assert all(torch.allclose(found[name], value) for name, value in expected.items())
    assert not all(torch.equal(found[name], value) for name, value in start.items())


def test_the_tokenizer_beside_an_adapter_is_used(tmp_path):
    make_adapter(tmp_path / "adapter", target_modules=["c_attn"])
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "adapter")
    assert find_candidate(tmp_path / "adapter").settings.model.tokenizer_name_or_path == str(tmp_path / "adapter")


def test_an_adapter_that_is_not_loaded_in_full_is_refused(tmp_path):
    """peft warns only, and leaves such layers as they are."""
    folder = tmp_path / "adapter"
    make_adapter(folder, target_modules=["c_attn"])
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_modules": ["c_attn", "c_proj"]}))
    with pytest.raises(
        UserError, match=r"adapter: its weights do not fit its .*tensors are missing or unknown, such as .*c_proj"
    ):
        weights(find_candidate(folder))
    path.write_text(json.dumps(config | {"target_modules": ["c_proj"]}))
    with pytest.raises(UserError, match="adapter: its weights do not fit its .*tensors are missing"):
        weights(find_candidate(folder))
    for name, reason in ((None, "names no base model"), ("/no/such", "there is no folder /no/such")):
        path.write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises(UserError, match=f"adapter_config.json: {reason}; write the folder"):
            find_candidate(folder)
    path.write_text("{")
    with pytest.raises(UserError, match="adapter_config.json: cannot be read"):
        find_candidate(folder)
