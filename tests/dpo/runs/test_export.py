"""The export, as transformers 5 opens it, and with the keys that transformers 4 needs."""

import json
import re

import huggingface_hub
import pytest
import torch
from conftest import FAMILIES, TINY, tiny_config, tiny_tokenizer, validated
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.distributed.ranks import ALONE
from dpo.runs.export import export_model, upload
from dpo.settings.run_config import read_run_config
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
