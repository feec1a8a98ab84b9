"""The files of a pretrained model: what they hold, what a class leaves out, and why they do not load."""

import json
import os

import pytest
import torch
import transformers
from conftest import GOLDENS, inputs_of, validated
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tiny_models import composite, tiny

import build
from build import load_inputs
from dpo.model import pretrained
from dpo.model.loading import load_policy
from dpo.model.pretrained import auto_class, fetch, tensor_names, unexpected_tensors
from dpo.system.errors import UserError

TINY_GPT2 = GOLDENS / "tiny-gpt2"


# One remedy for each cause


def refusal(name: object, load=lambda settings: load_inputs(settings, None)) -> str:
    """What a run says of a model; by default, before it reads data."""
    settings, _ = validated("loss=dpo", f"model.name_or_path='{name}'", "datasets=[none.jsonl]", "device=cpu")
    with pytest.raises(UserError) as refused:
        load(settings)
    (line,) = str(refused.value).splitlines()
    return line.removeprefix(f"model.name_or_path={name}: ")


def refusal_of_weights(folder) -> str:
    config = transformers.AutoConfig.from_pretrained(TINY_GPT2)
    return refusal(folder, lambda settings: load_policy(settings, config, torch.device("cpu")))


def saved(folder, model=None) -> None:
    """Write a tiny GPT-2 or another model with a tokenizer."""
    (model or tiny("GPT2")).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY_GPT2).save_pretrained(folder)


def rewrite_config(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_adapter_is_named_with_the_settings_that_continue_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}')
    settings = f"model.name_or_path=me/base lora=default lora.path={tmp_path}"
    assert refusal(tmp_path) == f"is a LoRA adapter, not a model; set {settings}"


def test_what_else_is_no_model_is_told_apart(tmp_path):
    assert refusal(tmp_path / "none") == "there is no such folder"
    assert refusal(tmp_path).startswith("holds no config.json; give a folder that from_pretrained opens")
    (tmp_path / "config.yaml").write_text("")
    assert refusal(tmp_path).endswith(f"holds its model in {tmp_path}/LATEST/hf")
    (tmp_path / "policy.pt").write_text("")
    assert refusal(tmp_path).startswith(f"is a checkpoint of a run; set model.archive={tmp_path}/policy.pt")
    assert refusal(tmp_path / "policy.pt").startswith("is a file; give the model's folder")
    assert refusal("my model") == "there is no such folder, and no model on the Hub can have this name"


def test_a_model_without_a_tokenizer_needs_another_ones(tmp_path):
    tiny("GPT2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer; set model.tokenizer_name_or_path to a"):
        inputs_of("loss=dpo", f"model.name_or_path='{tmp_path}'", "device=cpu")


def test_code_of_its_own_and_an_unknown_kind_have_different_remedies(tmp_path):
    saved(tmp_path)
    rewrite_config(tmp_path, model_type="gpt9")
    version = f"transformers {transformers.__version__} does not know models of type gpt9; install a newer version"
    assert refusal(tmp_path).startswith(version)
    rewrite_config(tmp_path, auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (tmp_path / "code.py").write_text("raise SystemExit('this code must not run')")
    assert refusal(tmp_path).startswith("needs Python code that comes with its files; code from a model's files is ne")


@pytest.mark.parametrize(
    "config, reason",
    [
        (transformers.T5Config(), "t5 models have an encoder and a decoder"),
        (transformers.CLIPConfig(), "has no causal language model for the type clip; choose a model that AutoModelF"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_its_config(config, reason, tmp_path):
    config.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(TINY_GPT2).save_pretrained(tmp_path)
    assert reason in refusal(tmp_path)


def test_missing_partial_and_damaged_weights_are_refused_with_what_helps(tmp_path):
    saved(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert refusal_of_weights(tmp_path).endswith(
        "is not the data but a pointer of Git LFS; run git lfs pull in its folder"
    )
    weights.write_bytes(content[:1000])
    assert "copy or download them again" in refusal_of_weights(tmp_path)
    weights.unlink()
    assert (
        refusal_of_weights(tmp_path)
        == "holds no weights (model.safetensors or pytorch_model.bin); copy or download them"
    )
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_bytes(content)
    assert "names files that are not there: model-2.safetensors; copy" in refusal_of_weights(tmp_path)


@pytest.mark.parametrize(
    "error, remedy",
    [
        (
            GatedRepoError,
            "asks for a licence agreement; accept it on https://huggingface.co/me/model, then run hf auth",
        ),
        (RepositoryNotFoundError, "no folder and no model on the Hub has this name; for a private model"),
        (LocalEntryNotFoundError, "run hf download me/model where there is a network"),
    ],
)
def test_each_refusal_of_the_hub_has_its_remedy(error, remedy):
    def load():
        try:
            raise error.__new__(error, "no")  # some want the server's response
        except Exception as cause:
            raise OSError("You are trying to access a gated repo, or one that does not exist") from cause

    with pytest.raises(UserError) as refused:
        fetch("model.name_or_path", "me/model", load)
    assert str(refused.value).startswith("model.name_or_path=me/model: ") and remedy in str(refused.value)


# What files hold, and what a class leaves out


def test_the_names_of_tensors_are_those_of_the_files_in_every_format(tmp_path):
    model = tiny("GPT2")
    names = {name for name in model.state_dict() if name != "lm_head.weight"}  # which is tied
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    (tmp_path / "torch").mkdir()
    torch.save({name: model.state_dict()[name] for name in names}, tmp_path / "torch" / "pytorch_model.bin")
    assert len(list((tmp_path / "shards").glob("model-*"))) > 1
    assert all(tensor_names(str(tmp_path / folder)) == names for folder in ("one", "shards", "torch"))


def test_the_files_that_transformers_reads_first_count_and_left_over_ones_do_not(tmp_path):
    """An index of earlier shards, or of a format that was not downloaded, may be left beside the whole model."""
    model = tiny("GPT2")
    model.save_pretrained(tmp_path)
    names = tensor_names(str(tmp_path))
    for file in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (tmp_path / file).write_text('{"weight_map": {"a": "none-1"}}')
    assert tensor_names(str(tmp_path)) == names
    (tmp_path / "old").mkdir()
    old_format = tmp_path / "old" / "pytorch_model.bin"
    torch.save({name: model.state_dict()[name] for name in names}, old_format, _use_new_zipfile_serialization=False)
    assert tensor_names(str(tmp_path / "old")) == names


def test_tensors_that_a_class_has_no_place_for_are_named_also_where_transformers_hides_them(tmp_path, capsys):
    """Qwen3.5's causal class ignores `model.visual` and `mtp` without a word."""
    composite("Qwen3_5").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    n_visual = sum(name.startswith("model.visual.") for name in tensors)
    tensors |= {"mtp.fc.weight": torch.zeros(2), "other.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {"other.weight"}
    wrong = "model.layers.9.weight"
    assert unexpected_tensors(model, "me/model", tensors, [*info["unexpected_keys"], wrong]) == [wrong]
    counts = f"model.visual ({n_visual}), mtp (1), other (1)"
    assert f"modules that this model lacks: {counts}; an export will not hold them\n" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["Gemma3", "Qwen3_5"])
def test_the_class_of_a_composite_model_holds_all_of_its_tensors(family, tmp_path):
    model = composite(family)
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    opened = auto_class(config).from_pretrained(tmp_path)
    assert type(opened) is type(model) and opened.state_dict().keys() == model.state_dict().keys()
    config.architectures = None
    assert auto_class(config) is transformers.AutoModelForCausalLM


# A hub that cannot be reached


@pytest.fixture
def hub(monkeypatch):
    """The hub client's constants, online, and whether and how often the hub is asked for a sign of life."""
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(pretrained, "is_reachable", lambda url: asked.append(url) or False)
    return constants, asked


@pytest.mark.parametrize(
    "settings, is_needed",
    [
        ((f"model.name_or_path='{TINY_GPT2}'", f"datasets=['{GOLDENS / 'data'}']"), False),
        ((f"model.name_or_path='{TINY_GPT2}'", "datasets=[demo]"), False),
        ((f"model.name_or_path='{TINY_GPT2}'", "datasets=[hh]"), True),
        ((f"model.name_or_path='{TINY_GPT2}'", "model.tokenizer_name_or_path=no/such"), True),
        (("model.name_or_path=no/such", f"datasets=['{GOLDENS / 'data'}']"), True),
    ],
)
def test_a_hub_that_is_needed_and_cannot_be_reached_is_not_tried(settings, is_needed, hub, capsys, monkeypatch):
    """Its client would try again for minutes, for each file."""
    constants, asked = hub
    monkeypatch.setattr(build, "load_model_config", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inputs_of("loss=dpo", "device=cpu", "max_length=160", "max_prompt_length=96", *settings)
    assert asked == [constants.ENDPOINT] * is_needed
    assert constants.HF_HUB_OFFLINE == is_needed and os.environ["HF_HUB_OFFLINE"] == str(int(is_needed))
    assert ("The hub cannot be reached: using only files on this machine." in capsys.readouterr().out) == is_needed


def test_a_hub_that_can_be_reached_is_used(hub, monkeypatch, capsys):
    constants, _ = hub
    monkeypatch.setattr(pretrained, "is_reachable", lambda url: True)
    pretrained.skip_unreachable_hub({"no/such": True})
    assert not constants.HF_HUB_OFFLINE and capsys.readouterr().out == ""
