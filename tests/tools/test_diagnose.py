"""The diagnosis of any model: the figures of a run's own evaluation, what loads, what is refused, what is written."""

import json
import re
import shutil

import pytest
import torch
from conftest import GOLDENS, ROOT, without_measurements
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.system.errors import UserError
from tools.diagnose.__main__ import start
from tools.diagnose.checkpoints import find

MODEL = GOLDENS / "tiny-gpt2"
SHORT = ("n_examples=16", "n_eval_examples=8", "eval_batch_size=8", "lr=1e-2", "warmup_steps=0", "export_dtype=float32")
SAMPLES = ("sample_during_eval=true", "n_eval_model_samples=4")
FEW = ("n_eval_examples=8", "eval_batch_size=8", "n_eval_model_samples=4", "max_length=160", "max_prompt_length=96")
PLACE = ("precision=float32", "device=cpu", f"datasets=['{GOLDENS / 'data'}']")


@pytest.fixture
def trained(make_trainer):
    """Return a function that trains a tiny model by two updates and returns its run directory."""

    def train(*overrides):
        trainer = make_trainer(*SHORT, *SAMPLES, *overrides)
        trainer.train()
        return trainer.run.path

    return train


@pytest.fixture
def diagnose(tmp_path):
    """Return a function that diagnoses, and returns the folder and the figures."""

    def run(*arguments):
        out = tmp_path / f"diagnosis{len(list(tmp_path.glob('diagnosis*')))}"
        start([*arguments, f"local_dirs=['{tmp_path}']", f"out='{out}'"])
        return out, json.loads((out / "metrics.json").read_text())

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(out):
    return [finding["name"] for finding in json.loads((out / "findings.json").read_text())["findings"]]


def check_same(run, out, figures, tolerance=1e-4):
    """Compare a diagnosis with what the run recorded at its end: figures, pairs and samples."""
    own = {name: value for name, value in without_measurements(lines(run / "metrics.jsonl")[-1]).items()}
    compared = [name for name in own if name not in ("examples", "updates")]
    assert len(compared) > 30 and "diagnosis/kl" in compared
    for name in compared:
        assert figures[name] == pytest.approx(own[name], abs=tolerance), name
    pairs, own_pairs = lines(out / "pairs.jsonl"), lines(run / "pairs.jsonl")[-8:]
    texts = {"prompt", "chosen", "rejected"}  # which a run writes at its first evaluation only
    assert [pair.keys() - texts for pair in pairs] == [pair.keys() for pair in own_pairs]
    for pair, own_pair in zip(sorted(pairs, key=by_row), sorted(own_pairs, key=by_row), strict=True):
        assert (pair["source"], pair["row"], pair["pair"]) == (own_pair["source"], own_pair["row"], own_pair["pair"])
        assert pair["rewards/margins"] == pytest.approx(own_pair["rewards/margins"], abs=tolerance)
    texts = [(row["model"], row["prompt"], row["sample"]) for row in lines(out / "samples.jsonl")]
    assert texts == [(row["model"], row["prompt"], row["sample"]) for row in lines(run / "samples.jsonl")[-8:]]


def by_row(pair):
    return pair["row"], pair["pair"]


# The figures


def test_a_run_has_the_figures_that_it_recorded_itself(trained, diagnose):
    run = trained("loss=dpo")
    out, figures = diagnose(f"policy='{run}'")
    check_same(run, out, figures)
    assert (figures["examples"], figures["updates"]) == (16, 2)
    assert figures["first_loss"] == pytest.approx(0.6931, abs=1e-4) and figures["train_accuracy"] >= 0
    assert figures["weights_changed"] > 0.9 and figures["start_distance"] > 0.01


def test_the_export_of_a_run_has_the_same_figures_against_the_model_that_it_started_from(trained, diagnose):
    run = trained("loss=dpo", "loss.beta=0.3", "keep_best=loss/eval", "stop_if.max_loss=9")
    out, figures = diagnose(f"policy='{run / 'LATEST' / 'hf'}'", f"reference='{MODEL}'", "loss.beta=0.3", *FEW, *PLACE)
    check_same(run, out, figures)
    assert figures["tokenizer/same"] == figures["tokenizer/round_trip"] == figures["tokenizer/stops"] == 1


@pytest.mark.parametrize("of", ["RUN", "hf"])
def test_an_adapter_has_the_same_figures_and_its_base_is_the_reference(of, trained, diagnose):
    run = trained("loss=dpo", "lora=default")
    if of == "RUN":
        out, figures = diagnose(f"policy='{run / 'step-16'}'")
    else:
        out, figures = diagnose(f"policy='{run / 'LATEST' / 'hf'}'", *FEW, *PLACE)
        assert (figures["adapter/fitting"], figures["adapter/active"]) == (1, 1)
    check_same(run, out, figures)
    assert 0.1 < figures["weights_changed"] < 0.9  # only the adapted layers


def test_another_run_can_be_the_reference(trained, diagnose):
    start_of_both, run = trained("loss=sft"), trained("loss=dpo")
    _, against_sft = diagnose(f"policy='{run}'", f"reference='{start_of_both}'")
    _, against_export = diagnose(f"policy='{run}'", f"reference='{start_of_both / 'LATEST' / 'hf'}'")
    for name, value in against_sft.items():
        assert against_export[name] == pytest.approx(value, abs=1e-5), name
    _, against_start = diagnose(f"policy='{run}'")
    assert against_sft["rewards_eval/margins"] != pytest.approx(against_start["rewards_eval/margins"], abs=1e-3)


def test_a_loss_without_a_reference_is_evaluated_as_dpo(trained, diagnose):
    run = trained("loss=simpo", "loss.beta=2")
    _, figures = diagnose(f"policy='{run}'")
    margins = figures["log_ratios_eval/chosen"] - figures["log_ratios_eval/rejected"]
    assert figures["rewards_eval/margins"] == pytest.approx(0.1 * margins, rel=1e-4)


# What is found


def test_a_model_against_itself_is_unchanged(diagnose):
    out, figures = diagnose(f"policy='{MODEL}'", f"reference='{MODEL}'", *FEW, *PLACE)
    assert "policy unchanged" in names(out)
    assert (figures["start_distance"], figures["weights_changed"], figures["weights_distance"]) == (0, 0, 0)


def change_adapter(folder, target, change):
    shutil.copytree(folder, target)
    save_file(change(load_file(folder / "adapter_model.safetensors")), target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize(
    ("change", "figure"),
    [
        (lambda tensors: {name: t * (0 if "lora_B" in name else 1) for name, t in tensors.items()}, "adapter/active"),
        (lambda tensors: {name.replace("model.", "module."): t for name, t in tensors.items()}, "adapter/fitting"),
    ],
    ids=["zeros", "other names"],
)
def test_an_adapter_that_changes_nothing_is_not_loaded(change, figure, trained, diagnose, tmp_path):
    adapter = trained("loss=dpo", "lora=default") / "LATEST" / "hf"
    out, figures = diagnose(f"policy='{change_adapter(adapter, tmp_path / 'changed', change)}'", *FEW, *PLACE)
    assert figures[figure] == 0 and figures["start_distance"] == 0
    assert names(out)[0] == "adapter not loaded" or "policy unchanged" in names(out)
    assert "adapter not loaded" in names(out)


def test_a_tokenizer_with_another_vocabulary_is_broken(trained, diagnose, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(trained("loss=dpo") / "LATEST" / "hf", folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    tokens = [name for name in vocabulary["model"]["vocab"] if len(name) > 1 and name != "<|endoftext|>"]
    ids = [vocabulary["model"]["vocab"][name] for name in tokens]
    vocabulary["model"]["vocab"] |= dict(zip(tokens, ids[1:] + ids[:1], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    out, figures = diagnose(f"policy='{folder}'", f"reference='{MODEL}'", *FEW, *PLACE)
    assert figures["tokenizer/same"] < 0.5 and "broken tokenizer" in names(out)


def test_an_export_that_does_not_stop_is_found(diagnose, tmp_path):
    folder = tmp_path / "endless"
    shutil.copytree(MODEL, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    out, figures = diagnose(f"policy='{folder}'", f"reference='{MODEL}'", *FEW, *PLACE)
    assert figures["tokenizer/stops"] == 0 and "generation does not stop" in names(out)


# What is written, and printed


def test_everything_is_written_and_the_findings_are_printed_with_cause_and_advice(diagnose, capsys):
    out, figures = diagnose(f"policy='{MODEL}'", f"reference='{MODEL}'", *FEW, *PLACE)
    printed = capsys.readouterr().out
    found = json.loads((out / "findings.json").read_text())
    first = found["findings"][0]
    assert re.search(rf"1\. {first['name']}: ", printed)
    for key in ("text", "source"):
        assert first[key] in printed
    words = " ".join(printed.split())
    assert f"Usual cause: {first['cause']}" in words and f"Try: {first['advice']}" in words
    assert found["verdict"] in printed and printed.index("1. ") < printed.index(found["verdict"])
    assert {*figures} <= {*lines(out / "metrics.jsonl")[0]}
    page = (out / "report.html").read_text()
    assert "Samples" in page and lines(out / "samples.jsonl")[0]["prompt"].strip()[:20] in page
    settings = (out / "config.yaml").read_text()
    assert f"policy: {MODEL}" in settings and "n_eval_examples: 8" in settings and "batch_size: 1" not in settings


def test_without_out_a_new_folder_is_named_by_the_time(diagnose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start([f"policy='{MODEL}'", f"reference='{MODEL}'", *FEW, *PLACE, f"local_dirs=['{tmp_path}']"])
    assert len(list(tmp_path.glob("diagnosis_*/metrics.json"))) == 1


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"policy: is missing; set policy=PATH"),
        ([f"policy='{MODEL}'"], r"reference: is missing; set reference=PATH"),
        (["policy=/nowhere", f"reference='{MODEL}'"], r"policy=/nowhere: there is no such folder"),
        ([f"policy='{MODEL}'", "reference=/nowhere"], r"reference=/nowhere: there is no such folder"),
        ([f"policy='{ROOT / 'train.py'}'", f"reference='{MODEL}'"], r"policy=.*train.py: is a file"),
        ([f"policy='{ROOT / 'docs'}'", f"reference='{MODEL}'"], r"policy=.*docs: holds neither config.json"),
        ([f"policy='{GOLDENS}'", f"reference='{MODEL}'"], r"policy=.*: holds no model itself.*: tiny-gpt2"),
        ([f"policy='{MODEL}'", f"reference='{MODEL}'", "lr=1"], r"lr: a diagnosis trains nothing"),
        ([f"policy='{MODEL}'", f"reference='{MODEL}'", "n_eval_exampels=1"], r"did you mean n_eval_examples"),
        ([f"policy='{MODEL}'", f"refernce='{MODEL}'"], r"did you mean reference"),
        ([f"policy='{MODEL}'", f"reference='{MODEL}'", "max_tokens_per_pass=fit"], r"fit: is measured by training"),
        ([f"policy='{MODEL}'", f"reference='{MODEL}'", "beta=1"], r"use loss.beta=1"),
        ([f"policy='{MODEL}'", f"reference='{MODEL}'", "--json"], r"--json: a diagnosis takes settings alone"),
        ([f"policy='{MODEL}'", f"reference='{MODEL}'", f"out='{ROOT / 'docs'}'"], r"out=.*docs: is not empty"),
    ],
)
def test_an_error_names_its_own_argument(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        start([f"local_dirs=['{tmp_path}']", f"out='{tmp_path / 'out'}'", *PLACE, *FEW, *arguments])


def test_data_are_needed_unless_a_run_has_them(tmp_path):
    with pytest.raises(UserError, match=r"datasets: is missing; set datasets="):
        start([f"policy='{MODEL}'", f"reference='{MODEL}'"])


def test_a_reference_with_a_smaller_vocabulary_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=r"reference=.*small: has 300 token ids"):
        start([f"policy='{MODEL}'", f"reference='{tmp_path / 'small'}'", *PLACE, *FEW, f"local_dirs=['{tmp_path}']",
               f"out='{tmp_path / 'out'}'"])  # fmt: skip


def test_an_adapter_without_its_base_is_refused_by_its_own_name(trained, tmp_path):
    folder = tmp_path / "lost"
    shutil.copytree(trained("loss=dpo", "lora=default") / "LATEST" / "hf", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/moved"}))
    with pytest.raises(UserError, match=r"policy=.*lost: .*adapter_config.json: there is no folder /moved"):
        start([f"policy='{folder}'", f"reference='{MODEL}'", *PLACE, *FEW, f"local_dirs=['{tmp_path}']",
               f"out='{tmp_path / 'out'}'"])  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match=r"policy=.*lost: .*adapter_config.json: names no base model"):
        find("policy", str(folder))


# Training


def test_updates_of_adam_alone_bound_the_difference_of_the_weights(trained):
    assert find("policy", str(trained("loss=dpo", "optimizer=AdamW"))).training()["lr_sum"] == pytest.approx(0.02)
    assert "lr_sum" not in find("policy", str(trained("loss=dpo", "optimizer=RMSprop"))).training()


def test_the_state_of_another_trainer_tells_updates_and_learning_rates(tmp_path):
    folder = tmp_path / "checkpoint-20"
    shutil.copytree(MODEL, folder)
    log = [{"learning_rate": rate * 1e-3, "rewards/accuracies": rate / 10} for rate in range(10)] + [{"eval_loss": 0.6}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": log}))
    training = find("policy", str(folder)).training()
    assert training == {"updates": 20, "lr_sum": pytest.approx(0.09), "train_accuracy": 0.9}
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": log[1:]}))
    assert "lr_sum" not in find("policy", str(folder)).training()  # of too few learning rates
    (folder / "trainer_state.json").write_text("[]")
    assert find("policy", str(folder)).training() == {}


def test_the_best_checkpoint_of_a_run_is_one_of_its_own(trained):
    run = trained("loss=dpo", "keep_best=loss/eval")
    assert find("policy", str(run / "BEST")).model_name == find("policy", str(run)).model_name


def test_a_folder_of_checkpoints_names_those_inside(tmp_path):
    shutil.copytree(MODEL, tmp_path / "out" / "checkpoint-20")
    with pytest.raises(UserError, match=r"holds no model itself; give one of its folders: checkpoint-20"):
        find("policy", str(tmp_path / "out"))


def test_nothing_of_the_models_is_trained_or_changed(diagnose):
    before = {path.name: path.read_bytes() for path in MODEL.iterdir()}
    diagnose(f"policy='{MODEL}'", f"reference='{MODEL}'", *FEW, *PLACE)
    assert {path.name: path.read_bytes() for path in MODEL.iterdir()} == before
    assert torch.is_grad_enabled()
