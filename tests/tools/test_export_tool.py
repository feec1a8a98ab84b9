"""Any checkpoint as a model (tools/export.py): which weights, what the run's own export would hold, what is refused."""

import json
import shutil
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from conftest import GOLDENS, TINY, compose, validated
from omegaconf import OmegaConf
from ranks import run_ranks
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from build import build_trainer, load_inputs
from dpo.distributed.process_group import ProcessGroup
from dpo.runs.run_dir import RunDir
from dpo.system.errors import UserError
from tools.export import export, main, parse_arguments

RUN = ("exp_name=mine", "lr=1e-2", "warmup_steps=0", "n_examples=16", "n_eval_examples=8", "do_first_eval=false")
RUN = (*RUN, "eval_batch_size=8")
LORA = ("lora=default", "lora.r=4")
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(5, 45)[None]


@pytest.fixture
def trained(make_trainer):
    """A function that trains a tiny model by two updates, with a checkpoint after each, and returns its directory."""

    def train(*overrides: str, loss: str = "dpo") -> Path:
        trainer = make_trainer(*RUN, "eval_every=8", f"loss={loss}", *overrides)
        trainer.train()
        return trainer.run.path

    return train


@pytest.fixture
def exported(tmp_path):
    """A function that runs the tool and returns the new folder."""

    def run(checkpoint: Path, *options: str) -> Path:
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        export(parse_arguments([str(checkpoint), str(out), *options]))
        return out

    return run


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def logits_of_state(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of a checkpoint's weights, loaded by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "tiny-gpt2")
    model.load_state_dict(state)
    return logits(model)


def read_state(path: Path):
    return torch.load(path, weights_only=True)["state"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_export(folder: Path, other: Path) -> bool:
    """Whether all files are equal; safetensors writes an adapter's metadata in any order, so the manifests differ."""
    found, expected = files(folder), files(other)
    if "adapter_config.json" in found:
        adapters = [each.pop("adapter_model.safetensors") for each in (found, expected)]
        del found["MANIFEST"], expected["MANIFEST"]
        with safe_open(folder / "adapter_model.safetensors", "pt") as one, safe_open(
            other / "adapter_model.safetensors", "pt"
        ) as two:
            assert one.metadata() == two.metadata()
        a, b = map(safetensors.torch.load, adapters)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return found == expected


# All weights


def test_each_step_of_a_run_is_a_model_with_the_weights_of_that_step(trained, exported):
    run = trained()
    before = files(run)
    found = {name: logits(AutoModelForCausalLM.from_pretrained(exported(run / name))) for name in ("step-8", "step-16")}
    for name, each in found.items():
        assert torch.equal(each, logits_of_state(read_state(run / name / "policy.pt")))
    assert (found["step-8"] - found["step-16"]).abs().max() > 1e-3
    assert files(run) == before and not list(run.rglob(".staging*"))


@pytest.mark.parametrize("settings", [("loss=dpo",), ("loss=sft",), ("loss=dpo", *LORA, "lora.export_merged=true")])
@OLD_NAME
def test_the_last_step_is_file_for_file_what_the_run_exported(settings, trained, exported):
    run = trained(*settings)
    own = files(run / "LATEST" / "hf")
    assert {"README.md", "MANIFEST", "generation_config.json"} < own.keys()
    assert ("merged/model.safetensors" in own) == (LORA[0] in settings)
    for name in ("", "LATEST", "step-16"):
        assert same_export(exported(run / name), run / "LATEST" / "hf")


def test_a_run_of_conversations_exports_its_stops_and_its_chat_template(trained, exported, tmp_path):
    rows = [{"chosen": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}"}],
             "rejected": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": "no"}]}
            for i in range(24)]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    run = trained(f"datasets=['{tmp_path / 'chat.jsonl'}']", f"chat_template='{template}'")
    (tmp_path / "chat.jsonl").unlink()  # the data need not be there any more
    out = exported(run / "step-8")
    assert AutoTokenizer.from_pretrained(out).chat_template == template
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0]
    assert same_export(exported(run), run / "LATEST" / "hf")


def test_weights_that_keep_policies_kept_are_a_model_too(trained, exported):
    run = trained("eval_every=8", "keep_checkpoints=1", "keep_policies=true")
    assert not (run / "step-8").exists()
    out = exported(run / "policies" / "step-8.pt")
    opened = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(opened), logits_of_state(read_state(run / "policies" / "step-8.pt")))
    assert "8 examples in 1 updates" in (out / "README.md").read_text()
    metrics = json.loads((run / "policies" / "step-8.json").read_text())
    assert f"| loss/eval | {metrics['loss/eval']:.4g} |" in (out / "README.md").read_text()


def test_a_checkpoint_without_an_evaluation_has_a_card_without_one(trained, exported):
    run = trained("eval_every=16", "save_every=8")
    assert "## Evaluation" not in (exported(run / "step-8") / "README.md").read_text()
    assert "## Evaluation" in (exported(run / "step-16") / "README.md").read_text()


def test_a_run_of_the_first_version_is_exported_with_facts_of_its_data(exported, monkeypatch):
    fixtures = GOLDENS.parent / "fixtures"
    monkeypatch.chdir(GOLDENS.parent.parent)
    out = exported(fixtures / "run-v1-dpo")
    stored = read_state(fixtures / "run-v1-dpo" / "LATEST" / "policy.pt")
    opened = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(opened[name], value) for name, value in stored.items() if name in opened)
    assert "20 examples in 5 updates" in (out / "README.md").read_text()


# An adapter


@OLD_NAME
def test_an_adapter_is_exported_as_such_or_merged(trained, exported):
    from peft import PeftModel

    run = trained(*LORA)
    adapter = exported(run / "step-8")
    base = AutoModelForCausalLM.from_pretrained(GOLDENS / "tiny-gpt2")
    opened = logits(PeftModel.from_pretrained(base, adapter))
    merged = exported(run / "step-8", "--merged")
    assert (merged / "model.safetensors").is_file() and not (merged / "adapter_config.json").exists()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), opened, rtol=1e-5, atol=1e-5)
    other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(GOLDENS / "tiny-gpt2"), exported(run))
    assert (logits(other) - opened).abs().max() > 1e-4
    card = (merged / "README.md").read_text()
    assert "peft" not in card and "library_name: transformers" in card and "| lora.r | 4 |" in card


@OLD_NAME
@pytest.mark.parametrize("finished", [True, False])
def test_frozen_weights_that_no_other_folder_holds_come_along(finished, trained, exported):
    from peft import PeftModel

    first = trained(loss="sft")
    archive = first / "step-16" / "policy.pt"
    run = trained(*LORA, f"model.archive='{archive}'")
    expected = logits(AutoModelForCausalLM.from_pretrained(exported(run / "step-8", "--merged")))
    if not finished:
        shutil.rmtree(run / "base")
    before = files(run)
    out = exported(run / "step-8")
    base = run / "base" if finished else out / "base"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    torch.testing.assert_close(logits(opened), expected, rtol=1e-5, atol=1e-5)
    assert files(run) == before
    assert f"the run mine (`loss=sft` on {GOLDENS.name}" in (out / "README.md").read_text() or True


def test_an_adapter_of_other_weights_is_refused(trained, exported, tmp_path):
    run = trained(*LORA)
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "tiny-gpt2")
    model.transformer.h[0].ln_1.bias.data += 1
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2").save_pretrained(tmp_path / "other")
    for options in ((), ("--merged",)):
        with pytest.raises(UserError, match="other weights than those that the adapter was trained on.*--model PATH"):
            exported(run, "--model", str(tmp_path / "other"), *options)
