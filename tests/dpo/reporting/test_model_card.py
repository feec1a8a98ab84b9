"""The model card: valid for the Hub, true to the run, and without a path of the machine."""

import re

import pytest
import torch
import yaml
from conftest import GOLDENS, validated
from transformers import AutoModelForCausalLM

from dpo.reporting.model_card import Outcome, model_card, public_name

METRICS = {"loss/eval": 0.51234, "rewards_eval/accuracies": 0.75, "rewards_eval/margins": 0.4, "diagnosis/kl": 3.0}
METRICS |= {"diagnosis/kl_stderr": 0.5, "diagnosis/accuracy_low": 0.41, "diagnosis/accuracy_high": 0.93}
METRICS |= {"diagnosis/displaced": 0.625}
IDENTITY = {"the training data": "ab12", "the evaluation data": "cd34", "the settings": "ef56"}


def card(*overrides, metrics=METRICS):
    """Return the front matter and the text of a card."""
    settings, loss = validated(*overrides)
    name = next(o for o in overrides if o.startswith("loss=")).removeprefix("loss=")
    text = model_card(settings, loss, Outcome(name, 2048, 32, 256, metrics, IDENTITY), torch.bfloat16)
    _, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front), body


def rows(body):
    """Return the cells of the tables by the first of each row."""
    lines = [line[2:-1].split("|") for line in body.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


@pytest.mark.parametrize("path", ["../private/client/*.jsonl", "/data/client/*.jsonl", "data/deep/client/*.jsonl"])
def test_of_a_path_or_glob_the_last_part_alone_is_shown(path):
    assert public_name(path) == "*.jsonl"
    assert public_name("me/set:config") == "me/set:config" and public_name("hh") == "hh"


def test_the_front_matter_names_what_is_on_the_hub():
    front, _ = card("loss=dpo", "model=gpt2", "datasets=[hh,me/set:config]")
    assert front == {
        "base_model": "gpt2",
        "datasets": ["me/set"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["preference-optimization", "dpo"],
    }


def test_the_body_has_the_last_evaluation_with_intervals_the_diagnosis_the_hashes_and_the_settings():
    front, body = card("loss=apo_zero", "model=gpt2", "lr=1e-6", "loss.beta=0.3")
    table = rows(body)
    assert table["loss/eval"] == ["0.5123", ""] and table["rewards_eval/accuracies"] == ["0.75", "0.41 to 0.93"]
    assert table["diagnosis/kl"] == ["3", "2.02 to 3.98"] and table["diagnosis/displaced"] == [
        "0.625",
        "",
    ]  # 3 -+ 1.96 * 0.5
    assert table["the training data"] == ["ab12"] and "the settings" not in table
    assert table["lr"] == ["1e-06"] and table["loss.beta"] == ["0.3"]
    assert "trained with `loss=apo_zero` on hh: 2,048 examples in 32 updates" in body and "On 256 evaluation" in body
    assert front["tags"][1] == "apo_zero" and "arXiv" in body


def test_a_path_of_this_machine_is_shown_by_its_last_part_alone(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("")
    data = f"datasets=['{tmp_path}/pairs.jsonl','{tmp_path}/gone/other.jsonl']"
    front, body = card(
        "loss=dpo", f"model.name_or_path='{GOLDENS / 'tiny-gpt2'}'", data, "max_length=256", "max_prompt_length=128"
    )
    assert "base_model" not in front and "datasets" not in front
    assert "tiny-gpt2, trained with `loss=dpo` on pairs.jsonl, other.jsonl:" in body
    assert str(tmp_path) not in body and str(GOLDENS) not in body


def test_a_model_from_scratch_has_no_base_on_the_hub():
    front, body = card("loss=sft", "model=gpt2", "model.from_scratch=true")
    assert "base_model" not in front and "A model of the shape of gpt2, trained with `loss=sft`" in body


def test_the_run_is_named_whose_weights_it_began_with(tmp_path, monkeypatch):
    (tmp_path / "sft" / "LATEST").mkdir(parents=True)
    archive = tmp_path / "sft" / "LATEST" / "policy.pt"
    archive.touch()
    arguments = ("loss=dpo", "model=gpt2", f"model.archive='{archive}'")
    assert "It began with the weights of the file policy.pt." in card(*arguments)[1]
    config = {"exp_name": "warm", "loss": {"name": "sft"}, "datasets": ["/data/client/pairs.jsonl", "me/set"]}
    (tmp_path / "sft" / "config.yaml").write_text(yaml.safe_dump(config))
    line = "It began with the weights of the run warm (`loss=sft` on pairs.jsonl, me/set)."
    front, body = card(*arguments)
    assert line in body and "/data" not in body and front["base_model"] == "gpt2"
    assert "It began" not in card("loss=dpo", "model=gpt2")[1]
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "sft" / "config.yaml").write_text(yaml.safe_dump(config | {"exp_name": "${oc.env:SECRET}"}))
    assert "hunter2" not in card(*arguments)[1]


def test_every_setting_that_the_optimizer_and_the_schedule_read_is_in_the_card():
    adam = ("optimizer=AdamW", "optimizer_args={betas: [0.9, 0.95]}", "scheduler=cosine", "min_lr_ratio=0.1")
    table = rows(card("loss=dpo", "model=gpt2", *adam, "sync_reference=64", "sync_mix=0.6")[1])
    expected = {"optimizer_args": "{'betas': [0.9, 0.95]}", "scheduler": "cosine", "min_lr_ratio": "0.1"}
    expected |= {"sync_reference": "64", "sync_mix": "0.6"}
    assert {key: table[key] for key in expected} == {key: [value] for key, value in expected.items()}


def test_sft_has_no_diagnosis_and_needs_no_interval():
    front, body = card("loss=sft", "model=gpt2", metrics={"loss/eval": 1.5})
    assert front["tags"] == ["sft"] and "## Diagnosis" not in body
    assert rows(body)["loss/eval"] == ["1.5", ""]


@pytest.mark.parametrize("merged", [False, True])
def test_the_card_of_an_adapter_says_how_peft_loads_it(merged):
    front, body = card(
        "loss=dpo", "model=gpt2", "lora=default", f"lora.export_merged={merged}", "push_to_hub=me/adapter"
    )
    assert front["library_name"] == "peft" and "lora.r" in rows(body)
    merged_text = "merged/ holds the model with the adapter merged into it, in bfloat16."
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/adapter")' in body and (merged_text in body) == merged


def load_as_the_card_says(folder):
    """Execute the code of the card in an export, and return what it loads."""
    text = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    found = {}
    exec(code.replace("PATH/OF/THIS/FOLDER", str(folder)), found)
    return found["model"], found["tokenizer"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # which peft still uses
@pytest.mark.parametrize("lora", [(), ("lora=default",)])
def test_the_code_of_the_card_loads_the_model_that_was_trained(lora, make_trainer):
    settings = ("n_examples=8", "n_eval_examples=8", "do_first_eval=false", "lr=1e-2", "warmup_steps=0")
    trainer = make_trainer("loss=dpo", *settings, *lora)
    trainer.train()
    model, tokenizer = load_as_the_card_says(trainer.run.path / "LATEST" / "hf")
    ids = torch.tensor([tokenizer("Human: Hi").input_ids])
    trainer.policy.eval()
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, trainer.policy.model(ids).logits, atol=1e-5)
        base = AutoModelForCausalLM.from_pretrained(GOLDENS / "tiny-gpt2")
        assert not torch.allclose(base(ids).logits, model(ids).logits, atol=1e-3)
    table = rows((trainer.run.path / "LATEST" / "hf" / "README.md").read_text())
    assert table["the training data"] == [trainer.train_batches.fingerprint()]
