"""The export, as transformers 5 opens it, and with the keys that transformers 4 needs."""

import json
import re

import huggingface_hub
import pytest
import torch
from conftest import FAMILIES, TINY, tiny_config, tiny_tokenizer, validated
from families import build
from safetensors.torch import load_file
from tiny_models import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.distributed.ranks import ALONE
from dpo.runs.export import describe_export, export_model, upload
from dpo.settings.run_config import read_run_config
from dpo.system.errors import RunError, UserError
from dpo.system.signals import Signals
from train import train

KEYS_OF_5 = {"backend", "is_local", "local_files_only", "extra_special_tokens"}


def export(family, folder, tokenizer, **rope):
    """Export a tiny model of a family, whose rotary embeddings have the given settings, and return it."""
    config = tiny_config(family, len(tokenizer))
    if rope:
        config.rope_parameters = rope
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    export_model(folder, model, tokenizer)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_is_written_in_keys_that_transformers_4_knows(family, tmp_path):
    tiny_tokenizer(family).save_pretrained(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|extra|>"]})
    export(family, tmp_path / "hf", tokenizer)
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|extra|>"] and not KEYS_OF_5 & set(written)
    opened = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Hello<|extra|> world"
    assert opened(text).input_ids == tokenizer(text).input_ids
    assert opened.all_special_tokens == tokenizer.all_special_tokens
    assert opened.model_max_length == tokenizer.model_max_length


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
TWO = {"full_attention": {"rope_type": "default", "rope_theta": 3e6}}
TWO |= {"sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}
ROPES = [
    ("gpt2", {}, {}),
    ("qwen2", {"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 1e6}),
    ("llama", {**LLAMA3, "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    (
        "gpt_neox",
        {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 5e4, "rotary_pct": 0.5},
    ),
    ("gemma3", TWO, {"rope_theta": 3e6, "rope_local_base_freq": 2e4}),
]
KEYS_OF_4 = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}
KEYS_OF_4 |= {"rotary_emb_base", "rotary_pct"}


@pytest.mark.parametrize("family, rope, expected", ROPES, ids=[family for family, *_ in ROPES])
def test_rotary_embeddings_are_written_in_the_keys_of_transformers_4_too(family, rope, expected, tmp_path):
    """With these files transformers 4.56.2 gave the same logits to the last bit; without the keys up to 10.7 apart."""
    model = export(family, tmp_path / "hf", tiny_tokenizer("llama"), **rope)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {key: written[key] for key in KEYS_OF_4 & set(written)} == expected
    assert not rope or written["rope_parameters"] == rope
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert not rope or opened.config.rope_parameters == model.config.rope_parameters
    ids = torch.arange(5, 205)[None]
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, model(ids).logits)


# Tied embeddings


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_config_says_whether_the_embeddings_are_tied_whatever_it_said_before(tied, flag, tmp_path):
    """A model whose checkpoint has a separate head is not tied, though its config says so: transformers 4 would."""
    model = tiny("Llama", tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.config.tie_word_embeddings = flag
    export_model(tmp_path / "hf", model, tiny_tokenizer("llama"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in load_file(tmp_path / "hf" / "model.safetensors")) != tied


def test_a_composite_model_says_it_in_both_of_its_configs(tmp_path):
    model = build("gemma3")
    for config in (model.config, model.config.text_config):
        config.tie_word_embeddings = False  # which is wrong
    export_model(tmp_path / "hf", model, tiny_tokenizer("llama"))
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["tie_word_embeddings"] is True and written["text_config"]["tie_word_embeddings"] is True


def test_gathered_weights_decide_instead_of_the_models_own(tmp_path):
    """Those of a sharded model, or with a merged adapter of the head, whose weights are then its own."""
    model = tiny("Llama", tie_word_embeddings=True)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    export_model(tmp_path / "hf", model, tiny_tokenizer("llama"), weights)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "hf" / "model.safetensors")


# Code


def test_no_config_names_a_file_with_code_since_none_is_exported(tmp_path):
    model, tokenizer = tiny("Llama"), tiny_tokenizer("llama")
    model.config.auto_map = {"AutoConfig": "configuration_foo.FooConfig"}
    model.config.custom_pipelines = {"foo": {"impl": "foo.FooPipeline"}}
    model.generation_config.auto_map = {"AutoModel": "foo.Foo"}
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["foo.FooTokenizer", None]}
    model.save_pretrained(tmp_path / "as transformers")
    tokenizer.save_pretrained(tmp_path / "as transformers")
    export_model(tmp_path / "hf", model, tokenizer)
    named = [[path.name for path in (tmp_path / folder).glob("*.json") if "foo" in path.read_text()]
             for folder in ("as transformers", "hf")]  # fmt: skip
    assert sorted(named[0]) == ["config.json", "generation_config.json", "tokenizer_config.json"] and named[1] == []
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)


def test_infinite_numbers_are_written_as_transformers_4_reads_them(tmp_path):
    export_model(tmp_path / "hf", build("mamba2"), tiny_tokenizer("llama"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["time_step_limit"] == [0.0, float("inf")]


# The dtype


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_written_in_the_dtype_that_is_asked_for(dtype, gathered, tmp_path):
    model = tiny("Llama", tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {name: value.detach().clone() for name, value in model.named_parameters()} if gathered else None
    export_model(tmp_path / "hf", model, tiny_tokenizer("llama"), weights, dtype=dtype)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" not in stored  # tied ones are stored once
    assert all(torch.equal(value, before[name].to(dtype)) for name, value in stored.items())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == dtype
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) and after[name].dtype == torch.float32 for name, value in before.items())


def test_nested_configs_name_the_same_dtype(tmp_path):
    model = build("gemma3")
    model.config.text_config.dtype = model.config.vision_config.dtype = torch.float32
    export_model(tmp_path / "hf", model, tiny_tokenizer("llama"), dtype=torch.bfloat16)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {written["dtype"], written["text_config"]["dtype"], written["vision_config"]["dtype"]} == {"bfloat16"}


def test_buffers_and_what_transformers_keeps_in_float32_are_not_rounded(tmp_path):
    model = tiny("Llama")
    model.register_buffer("count", torch.tensor(2**40))
    model.register_buffer("scale", torch.tensor(0.1))
    model._keep_in_fp32_modules_strict = {"input_layernorm"}
    export_model(tmp_path / "hf", model, tiny_tokenizer("llama"), dtype=torch.bfloat16)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(stored.pop("count"), model.count) and torch.equal(stored.pop("scale"), model.scale)
    kept = {name for name, value in stored.items() if value.dtype == torch.float32}
    assert kept == {f"model.layers.{i}.input_layernorm.weight" for i in range(2)}
    assert {value.dtype for name, value in stored.items() if name not in kept} == {torch.bfloat16}


def test_float16_that_cannot_hold_a_weight_is_refused_with_the_setting_to_resume_with(tmp_path):
    model = tiny("Llama")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e5
    message = "export_dtype=float16: lm_head.weight has values beyond 65,504; resume .* export_dtype=bfloat16"
    with pytest.raises(RunError, match=message):
        export_model(tmp_path / "hf", model, tiny_tokenizer("llama"), dtype=torch.float16)
    assert not (tmp_path / "hf").exists()


def test_the_log_says_the_size_and_dtype_of_an_export_and_what_it_rounds(tmp_path):
    model = tiny("Llama")
    n = sum(parameter.numel() for parameter in model.parameters())
    for dtype, size in ((torch.float32, 4 * n), (torch.bfloat16, 2 * n)):
        folder = tmp_path / str(dtype)
        export_model(folder, model, tiny_tokenizer("llama"), dtype=dtype)
        line = f"Exported {folder}: {size / 1e6:,.1f} MB in {str(dtype).removeprefix('torch.')}."
        note = " Its float32 parameters were rounded to bfloat16: export_dtype=float32 keeps them."
        assert describe_export(folder, torch.bfloat16) == line
        assert describe_export(folder, torch.float32) == line + note * (dtype != torch.float32)


SHORT = ("loss=sft", "n_examples=8", "n_eval_examples=8", "do_first_eval=false")


@pytest.mark.parametrize(
    "overrides, dtype",
    [
        (("precision=bfloat16",), torch.bfloat16),
        (("precision=float32",), torch.float32),
        (("precision=bfloat16", "export_dtype=float32"), torch.float32),
        (("precision=float32", "export_dtype=float16"), torch.float16),
    ],
)
def test_a_run_exports_in_the_dtype_that_it_computed_in_or_in_export_dtype(overrides, dtype, make_trainer, capsys):
    trainer = make_trainer(*SHORT, *overrides)
    trainer.train()
    folder = (trainer.run.path / "LATEST").resolve()
    stored = load_file(folder / "hf" / "model.safetensors")
    name = str(dtype).removeprefix("torch.")
    assert {value.dtype for value in stored.values()} == {dtype}
    assert f"The weights are in {name}." in (folder / "hf" / "README.md").read_text()
    exported = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Exported")]
    assert len(exported) == 1 and ("were rounded" in exported[0]) == (dtype != torch.float32)
    policy = torch.load(folder / "policy.pt")["state"]
    assert {value.dtype for value in policy.values()} == {torch.float32}
    assert all(torch.equal(value, policy[name].to(dtype)) for name, value in stored.items())


@pytest.mark.parametrize(
    "export_dtype, adapter, merged",
    [("auto", "float32", "bfloat16"), ("float32", "float32", "float32"), ("bfloat16", "bfloat16", "bfloat16")],
)
def test_an_adapter_stays_in_float32_unless_export_dtype_is_set_and_its_base_stays_as_it_was_trained_on(
    export_dtype, adapter, merged, make_trainer
):
    pytest.importorskip("peft")
    settings = ("lora=default", "lora.r=2", "lora.export_merged=true", "model.from_scratch=true", "lr=1e-3")
    trainer = make_trainer(*SHORT, *settings, "precision=bfloat16", f"export_dtype={export_dtype}")
    trainer.train()
    folder = (trainer.run.path / "LATEST" / "hf").resolve()
    files = (folder / "adapter_model.safetensors", folder / "merged" / "model.safetensors")
    dtypes = [{str(value.dtype).removeprefix("torch.") for value in load_file(file).values()} for file in files]
    assert dtypes == [{adapter}, {merged}]
    base = load_file(trainer.run.path / "base" / "model.safetensors")
    assert {value.dtype for value in base.values()} == {torch.float32}
    make_trainer(*SHORT, f"model.name_or_path='{trainer.run.path / 'base'}'", *settings[:2], f"lora.path='{folder}'")


def test_a_complete_run_is_not_asked_for_another_export_in_vain(make_trainer):
    trainer = make_trainer(*SHORT)
    trainer.train()
    trainer.run.open_files.close()
    place = f"local_run_dir='{trainer.run.path}'"
    settings, loss = validated(*TINY, *SHORT, place, "export_dtype=bfloat16")
    config = read_run_config(trainer.run.path)
    config.export_dtype = "bfloat16"
    with pytest.raises(UserError, match="export_dtype: .*/hf is already written; remove that folder, and resume"):
        train(settings, loss, config, Signals(), ALONE, {"export_dtype": "bfloat16"})


def test_settings_of_generation_that_cannot_be_written_are_left_out_but_for_the_stops(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config("llama", 300))
    model.generation_config.eos_token_id, model.generation_config.num_return_sequences = [7, 0], 3
    export_model(tmp_path / "hf", model, tiny_tokenizer("llama"))
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [7, 0] and "num_return_sequences" not in written


# The upload


class FakeHub:
    """Stands for huggingface_hub.HfApi: records what is asked of it, and fails where it is told to."""

    def __init__(self, failing=""):
        self.failing, self.calls = failing, []

    def __call__(self):
        return self

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name == self.failing:
                raise ConnectionError("no route to the hub\nwith a second line")

        return call


def test_an_export_is_uploaded_into_a_repository_that_is_private_if_it_is_new(tmp_path, monkeypatch, capsys):
    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    upload(tmp_path / "hf", "me/name")
    assert hub.calls == [
        ("create_repo", ("me/name",), {"private": True, "exist_ok": True}),
        ("upload_folder", (), {"repo_id": "me/name", "folder_path": tmp_path / "hf"}),
    ]
    assert capsys.readouterr().out == f"Uploaded {tmp_path / 'hf'} to me/name on the Hub.\n"


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_an_upload_that_fails_is_one_line_that_names_the_command_to_try_again(step, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub(step))
    upload(tmp_path / "my run", "me/name")
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert re.match(r"push_to_hub=me/name: not uploaded \(.*no route to the hub.*\)\. To upload it: hf upload", printed)
    assert printed.endswith(f"hf upload me/name '{tmp_path / 'my run'}'\n")


def test_a_complete_run_uploads_its_export_where_it_is_resumed_with_the_name_of_a_repository(
    make_trainer, monkeypatch, capsys
):
    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    short = ("loss=sft", *TINY, "n_examples=8", "n_eval_examples=8", "do_first_eval=false")
    trainer = make_trainer(*short)
    trainer.train()
    trainer.run.open_files.close()
    card = trainer.run.path / "LATEST" / "hf" / "README.md"
    assert hub.calls == [] and 'from_pretrained("PATH/OF/THIS/FOLDER")' in card.read_text()
    config = read_run_config(trainer.run.path)
    for repository in (None, "me/nmae", "me/name"):
        place = f"local_run_dir='{trainer.run.path}'"
        settings, loss = validated(*short, place, *([f"push_to_hub={repository}"] if repository else []))
        train(settings, loss, config, Signals(), ALONE, {})
    assert [call[0] for call in hub.calls] == ["create_repo", "upload_folder"] * 2
    assert hub.calls[3][2] == {"repo_id": "me/name", "folder_path": card.resolve().parent}
    assert 'from_pretrained("me/name")' in card.read_text() and "nmae" not in card.read_text()
    assert capsys.readouterr().out.count("the run is complete") == 3


@pytest.mark.parametrize("settings", [(), ("push_to_hub=me/name",)])
def test_a_run_uploads_its_export_at_the_end_if_it_is_asked_to_and_loses_nothing_by_a_failure(
    settings, make_trainer, monkeypatch, capsys
):
    hub = FakeHub("upload_folder")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    trainer = make_trainer("loss=sft", "n_examples=8", "n_eval_examples=8", "do_first_eval=false", *settings)
    trainer.train()
    folder = (trainer.run.path / "LATEST").resolve() / "hf"
    assert (folder / "model.safetensors").exists() and (folder / "README.md").exists()
    uploads = [call[2]["folder_path"] for call in hub.calls if call[0] == "upload_folder"]
    assert uploads == ([folder] if settings else [])
    assert ("push_to_hub=me/name: not uploaded" in capsys.readouterr().out) == bool(settings)
