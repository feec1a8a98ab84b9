"""Any checkpoint as a model (tools/export.py): which weights, what the run's own export would hold, what is refused."""

import importlib
import json
import re
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import GOLDENS, TINY, compose, validated
from omegaconf import OmegaConf
from ranks import run_ranks
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

from build import build_trainer, load_inputs
from dpo.distributed.process_group import ProcessGroup
from dpo.distributed.sharding import whole_tensors
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
        with (
            safe_open(folder / "adapter_model.safetensors", "pt") as one,
            safe_open(other / "adapter_model.safetensors", "pt") as two,
        ):
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


def llama(folder: Path) -> Path:
    """Write a tiny Llama whose linear layers are as wide as a block of NF4 or wider."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2")
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_adapter_of_quantized_weights_is_exported_without_quantizing_them(trained, exported, tmp_path):
    run = trained(*LORA, "lora.quantize=nf4", f"model.name_or_path='{llama(tmp_path / 'base')}'")
    assert same_export(exported(run), run / "LATEST" / "hf")
    problem = "--merged: an adapter cannot be merged into the weights of lora.quantize=nf4; leave it out"
    assert problem in refusal(exported, run, "--merged")


def test_an_adapter_of_a_model_that_is_quantized_already_is_exported_alone(trained, exported, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        llama(tmp_path / "plain"), quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "base")
    run = trained(*LORA, f"model.name_or_path='{tmp_path / 'base'}'")
    assert same_export(exported(run), run / "LATEST" / "hf")
    assert "merged into weights that are quantized already; leave it out" in refusal(exported, run, "--merged")


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
    assert "the run mine (`loss=sft` on data)" in (out / "README.md").read_text()


def test_an_adapter_of_other_weights_is_refused(trained, exported, tmp_path):
    run = trained(*LORA)
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "tiny-gpt2")
    model.transformer.h[0].ln_1.bias.data += 1
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2").save_pretrained(tmp_path / "other")
    for options in ((), ("--merged",)):
        with pytest.raises(UserError, match="other weights than those that the adapter was trained on.*--model PATH"):
            exported(run, "--model", str(tmp_path / "other"), *options)


# The dtype


@OLD_NAME
@pytest.mark.parametrize("settings", [(), LORA, (*LORA, "lora.export_merged=true")])
def test_the_dtype_is_that_of_the_runs_own_export_or_the_one_that_is_asked_for(settings, trained, exported, capsys):
    run = trained("precision=bfloat16", *settings)
    assert same_export(exported(run), run / "LATEST" / "hf")
    adapter, model = {torch.float32}, {torch.bfloat16}
    assert dtypes(exported(run)) == {(): model, LORA: adapter}.get(settings, adapter | model)
    assert dtypes(exported(run, "--dtype", "float16")) == {torch.float16}
    assert "MB in float16. Its float32 parameters were rounded to float16: --dtype float32" in capsys.readouterr().out
    exact = exported(run / "step-8", "--dtype", "float32", *(["--merged"] if settings else []))
    assert dtypes(exact) == {torch.float32}
    if not settings:
        opened = AutoModelForCausalLM.from_pretrained(exact, dtype="auto")
        assert torch.equal(logits(opened), logits_of_state(read_state(run / "step-8" / "policy.pt")))


def dtypes(folder: Path) -> set[torch.dtype]:
    files = [safetensors.torch.load_file(path) for path in folder.rglob("*.safetensors")]
    return {value.dtype for file in files for value in file.values()}


# Shards of several processes


def train_sharded(rank: int, n: int, folder: Path) -> None:
    """Make an update of a run of all weights and of one of an adapter, with a checkpoint of shards and the weights."""
    ranks = ProcessGroup(torch.device("cpu"), timedelta(seconds=60))
    for name, overrides in (("all", ()), ("adapter", LORA)):
        places = (f"local_run_dir='{folder / name}'", f"local_dirs=['{folder}']")
        overrides = (*TINY, *RUN, "loss=dpo", "trainer=FSDPTrainer", *overrides, *places)
        settings, loss = validated(*overrides)
        run = RunDir(Path(settings.local_run_dir), compose(*overrides), ranks)
        trainer = build_trainer(settings, loss, load_inputs(settings, loss), run)
        trainer.train_step(next(iter(trainer.train_batches)))
        trainer.save()
        weights = whole_tensors(trainer.weights.tensors(), keep=True)
        if rank == 0:
            torch.save(weights, folder / f"{name}.pt")
    ranks.close()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(2, train_sharded, folder)
    return folder


@OLD_NAME
def test_shards_are_read_without_processes(sharded, exported, recwarn):
    step = sharded / "all" / "step-8"
    assert (step / "__1_0.distcp").is_file() and not (step / "policy.pt").exists()
    opened = AutoModelForCausalLM.from_pretrained(exported(step))
    expected = torch.load(sharded / "all.pt")
    assert all(torch.equal(value, expected[name]) for name, value in opened.state_dict().items())
    tensors = safetensors.torch.load_file(exported(sharded / "adapter") / "adapter_model.safetensors")
    expected = torch.load(sharded / "adapter.pt")
    assert {name.removeprefix("base_model.model.") for name in tensors} == expected.keys()
    assert all(torch.equal(value, expected[name.removeprefix("base_model.model.")]) for name, value in tensors.items())
    assert not [warning for warning in recwarn if "torch.distributed is disabled" in str(warning.message)]


def test_shards_that_do_not_fit_the_model_are_refused(sharded, exported, tmp_path):
    run = shutil.copytree(sharded / "all", tmp_path / "run", symlinks=True)
    config = OmegaConf.load(run / "config.yaml")
    config.model.name_or_path = str(tmp_path / "wider")
    OmegaConf.save(config, run / "config.yaml")
    shape = AutoConfig.from_pretrained(GOLDENS / "tiny-gpt2")
    shape.n_embd = 2 * shape.n_embd
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "wider")
    AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2").save_pretrained(tmp_path / "wider")
    with pytest.raises(UserError, match="step-8: does not fit the run's model"):
        exported(run)


# What is refused


def refusal(exported, checkpoint: Path, *options: str) -> str:
    with pytest.raises(UserError) as error:
        exported(checkpoint, *options)
    assert len(error.value.args) == 1 and "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_that_is_not_empty_or_lies_in_the_run_is_refused_and_an_empty_one_is_used(trained, tmp_path):
    run = trained()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()

    def write(out: Path) -> None:
        export(parse_arguments([str(run), str(out)]))

    for out in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(UserError, match="exists and is not empty; choose a new folder"):
            write(out)
    for out in (run, run / "step-8" / "hf", run / "hf"):
        with pytest.raises(UserError, match="exists and is not empty|lies in the run directory"):
            write(out)
    for out in (tmp_path / "empty", tmp_path / "new" / "folder"):
        write(out)
        assert (out / "model.safetensors").is_file()


def test_what_is_no_checkpoint_is_refused_with_those_that_there_are(trained, exported, tmp_path):
    assert "is not of a run; give RUN, RUN/step-N or" in refusal(exported, tmp_path)
    assert "is not of a run" in refusal(exported, GOLDENS / "tiny-gpt2" / "step-8")
    run = trained("keep_checkpoints=1", "keep_policies=true")
    for missing in ("step-9", "policies/step-9.pt"):
        problem = refusal(exported, run / missing)
        assert problem.endswith(f"{missing}: there is no such checkpoint; the run has step-16, policies/step-8.pt")
    (run / "step-16").rename(tmp_path / "elsewhere")
    assert "has written no checkpoint yet" in refusal(exported, run)


@pytest.mark.parametrize("name", ["policy.pt", "optimizer.pt", "MANIFEST"])
def test_a_damaged_checkpoint_is_refused(name, trained, exported):
    run = trained()
    flip(run / "step-8" / name)
    assert f"step-8: is damaged: {name} is damaged; export another" in refusal(exported, run / "step-8")
    exported(run / "step-16")


def test_damaged_weights_that_keep_policies_kept_are_refused(trained, exported):
    run = trained("keep_checkpoints=1", "keep_policies=true")
    path = run / "policies" / "step-8.pt"
    flip(path)
    assert "step-8.pt: is damaged" in refusal(exported, path)
    path.write_bytes(path.read_bytes()[:1000])
    assert "step-8.pt: is damaged" in refusal(exported, path)


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("function", ["dpo.runs.checkpoints.sha256", "tools.export.settings_to_load"])
def test_a_checkpoint_that_its_run_removes_meanwhile_is_said_to_be_gone(function, trained, exported, monkeypatch):
    run = trained()
    module, _, name = function.rpartition(".")
    original = getattr(importlib.import_module(module), name)

    def remove(*arguments):
        shutil.rmtree(run / "step-8", ignore_errors=True)
        return original(*arguments)

    monkeypatch.setattr(function, remove)
    assert "step-8: the run has removed it, as keep_checkpoints says" in refusal(exported, run / "step-8")


def test_options_that_do_not_fit_the_run_are_refused(trained, exported):
    run = trained()
    assert "--merged: this run trained all weights" in refusal(exported, run, "--merged")
    adapter = trained(*LORA)
    assert "--push me/name: only this machine has" in refusal(exported, adapter, "--push", "me/name")


def test_a_model_that_has_moved_is_found_by_its_new_place(trained, exported, tmp_path):
    shutil.copytree(GOLDENS / "tiny-gpt2", tmp_path / "here")
    run = trained(f"model.name_or_path='{tmp_path / 'here'}'")
    (tmp_path / "here").rename(tmp_path / "there")
    problem = refusal(exported, run)
    assert str(tmp_path / "here") in problem and problem.endswith("give the path of the run's model with --model PATH")
    assert files(exported(run, "--model", str(tmp_path / "there"))) == files(run / "LATEST" / "hf")


def test_nothing_in_a_runs_config_is_looked_up(trained, exported, monkeypatch):
    run = trained()
    monkeypatch.setenv("SECRET", "s3cret")
    config = OmegaConf.load(run / "config.yaml")
    config.exp_name = "${oc.env:SECRET}"
    OmegaConf.save(config, run / "config.yaml")
    problem = refusal(exported, run)
    assert "config.yaml: exp_name: ${oc.env:SECRET}: is not looked up" in problem and "s3cret" not in problem


def test_a_checkpoint_with_code_is_refused(trained, exported):
    run = trained("keep_checkpoints=1", "keep_policies=true")
    torch.save({"step_idx": 8, "state": Harmful()}, run / "policies" / "step-8.pt")
    assert "step-8.pt: cannot be read" in refusal(exported, run / "policies" / "step-8.pt")


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


# The command line


def test_the_command_line_writes_and_uploads(trained, tmp_path, monkeypatch, capsys):
    run = trained()
    uploaded = []
    monkeypatch.setattr("dpo.runs.export.upload", lambda folder, name: uploaded.append((folder, name)))
    monkeypatch.setattr(sys, "argv", ["export", str(run / "step-8"), str(tmp_path / "out"), "--push", "me/name"])
    main()
    assert uploaded == [(tmp_path / "out", "me/name")]
    line = rf"Exported {tmp_path}/out: 0\.\d MB in float32\. Step 8 of {run}\."
    assert re.search(line, capsys.readouterr().out)
    assert 'from_pretrained("me/name")' in (tmp_path / "out" / "README.md").read_text()


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
