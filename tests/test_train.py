"""The real command line on tiny models: what it refuses, what it writes, and that SFT leads into DPO."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import hydra
import pytest
import torch
import yaml
from conftest import GOLDENS, ROOT, TINY, compose, inputs_of, without_measurements
from faults import command_line, during_import, fresh, send
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.model import attention
from dpo.model.logps import response_logps
from dpo.model.sampling import distinct_prompts
from dpo.system.errors import UserError
from train import changed_settings

SHORT = (
    *TINY,
    "eval_batch_size=8",
    "n_eval_examples=10",
    "n_examples=24",
    "eval_every=16",
    "lr=1e-4",
    "warmup_steps=2",
)


@pytest.fixture
def run_forked(tmp_path):
    """Return a function that runs the command line in a forked child, without wandb; children cannot compile."""
    folder = tmp_path / "run"
    return lambda *overrides: command_line(folder, fresh(folder, "wandb.enabled=false", *overrides))


def errors(run) -> list[str]:
    """Return the lines in which a run told what is wrong."""
    return [line.removeprefix("error: ") for line in run.stderr.splitlines() if line.startswith("error: ")]


# Answers that need no torch

SEVERAL = """
import contextlib, io, json, sys
import train

answers = []
for arguments in json.load(sys.stdin):
    sys.argv, out, err = ["train.py", *arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    slow = sorted({"torch", "transformers"} & set(sys.modules))
    answers.append([code, out.getvalue(), err.getvalue(), slow])
json.dump(answers, sys.stdout)
"""
TINY_MODEL = ("loss=dpo", "model=tiny", "max_length=64", "max_prompt_length=32")
FINISHED = "resume=tests/fixtures/run-v1-dpo"
MISTYPED = {
    ("model=gpt2",): "You must specify 'loss', e.g, loss=<OPTION> Available options: apo_down apo_zero bco",
    ("loss=dpo",): "model.name_or_path: is missing; set model.name_or_path=VALUE, ",
    ("loss=dpoo",): "loss=dpoo: there is no such file in config/loss/; choose one of apo_down apo_zero bco",
    ("loss=dpo", "model=gpt22"): "model=gpt22: there is no such file in config/model/; choose one of blank_model",
    ("-m", "loss=dpo,sftt", "model=tiny"): "loss=sftt: there is no such file in config/loss/; choose one of apo_down",
    ("loss=dpo", "bacth_size=3"): "bacth_size: there is no such setting; did you mean batch_size?",
    ("loss=sft", "loss.beta=3"): "loss.beta: the chosen loss has no such setting",
    ("loss=dpo", "modle=gpt2"): "modle: there is no such setting; did you mean model?",
    (*TINY_MODEL, "datasets=[~/a.jsonl]"): "datasets=[~/a.jsonl]: quote a value with special characters, as in ",
    (FINISHED, "lrr=1"): "lrr: there is no such setting; did you mean lr?",
    (f"{FINISHED}/LATEST", "lr=1"): "lr=1: a resumed run keeps lr=",
    (FINISHED, "save_every=0"): "save_every=0: must be a whole number of examples, 1 or more",
}
QUICK = [
    (),
    ("-h",),
    ("--help",),
    ("--help", "lr"),
    (*TINY_MODEL, "--cfg", "job"),
    ("-sc", "install=bash"),
    ("loss=dpoo", "model=tiny", "learning_rate=1", "bacth_size=3"),
    (*TINY_MODEL, "lr=-1", "batch_size=0"),
    ("-m", *TINY_MODEL, "lr=-1,-2"),
    ("-m", "model=tiny", "lr=1,2"),
    ("resume=nowhere", "-m"),
    *MISTYPED,
]


@pytest.fixture(scope="module")
def answers():
    """Return what each command line of QUICK answers, in a process that imports torch only if one of them does."""
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL], input=json.dumps(QUICK), cwd=ROOT, capture_output=True, text=True, check=True
    )
    return dict(zip(QUICK, json.loads(done.stdout), strict=True))


def test_no_answer_to_help_or_to_a_wrong_word_or_value_imports_torch(answers):
    assert {arguments: slow for arguments, (_, _, _, slow) in answers.items() if slow} == {}


def test_help_is_one_page_however_it_is_asked_for(answers):
    page = answers[("--help",)][1]
    assert "python train.py loss=sft model=gpt2" in page and "learning rate after the warmup" in page
    for arguments, code in (((), 2), (("-h",), 0), (("--help",), 0)):
        assert answers[arguments][:3] == [code, page, ""]
    assert answers[("--help", "lr")][:3] == [
        0, "lr (Training)\n  learning rate after the warmup\n  default: 5e-7\n", "",
    ]  # fmt: skip


def test_help_is_printed_where_the_tasks_of_a_job_cannot_train():
    command, job = [sys.executable, "train.py"], os.environ | {"SLURM_NTASKS": "2"}
    page = subprocess.run([*command, "--help", "lr"], cwd=ROOT, env=job, capture_output=True, text=True, check=True)
    assert "default: 5e-7" in page.stdout
    refused = subprocess.run([*command, *TINY_MODEL], cwd=ROOT, env=job, capture_output=True, text=True)
    assert refused.returncode == 2 and "SLURM_NTASKS=2: this job has 2 tasks" in refused.stderr


def test_hydra_prints_the_composed_config_and_the_completion_of_a_shell(answers):
    code, config, refusal, _ = answers[(*TINY_MODEL, "--cfg", "job")]
    assert (code, refusal) == (0, "") and "max_length: 64\n" in config and "  name: dpo\n" in config
    code, script, refusal, _ = answers[("-sc", "install=bash")]
    assert (code, refusal) == (0, "") and "complete -o nospace" in script


@pytest.mark.parametrize(
    "arguments, starts",
    [
        (QUICK[6], ["loss=dpoo: there is no such file", "learning_rate: ", "bacth_size: "]),
        (QUICK[7], ["batch_size=0: must be", "lr=-1: must be"]),
        (QUICK[8], ["lr=-1: must be"]),
        (QUICK[9], ["You must specify 'loss'"]),
        (QUICK[10], ["-m: resume=RUN continues one run; leave this flag out"]),
    ],
)
def test_wrong_words_and_values_come_together_one_line_each(arguments, starts, answers):
    code, printed, refusal, _ = answers[arguments]
    lines = refusal.splitlines()
    assert (code, printed) == (2, "") and len(lines) == len(starts), refusal
    assert all(line.startswith(f"error: {start}") for line, start in zip(lines, starts, strict=True)), refusal


# What is noted, and what a sweep leaves


def test_several_processes_of_the_trainer_for_one_are_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = command_line(tmp_path / "run", fresh(tmp_path / "run", "loss=sft", *SHORT))
    assert run.returncode == 2 and not run.folder.exists()
    (line,) = errors(run)
    assert line.startswith("trainer=BasicTrainer WORLD_SIZE=2: this trainer uses one process; set trainer=")


@pytest.mark.parametrize(
    "warmup, note",
    [
        (2, None),
        (3, "ends at 7.5e-05 and the full rate is never reached"),
        (9, "ends at 3e-05 and probably almost nothing will be learned"),
    ],
)
def test_a_warmup_that_the_run_does_not_leave_is_noted_with_the_learning_rate_reached(warmup, note, capsys):
    """Of 24 examples in batches of 8: 3 updates, the last of which has lr * 3 / (warmup_steps + 1)."""
    inputs_of("loss=sft", *SHORT, f"warmup_steps={warmup}")
    lines = [line for line in capsys.readouterr().out.splitlines() if "warmup_steps" in line]
    assert [line.startswith("Warning: warmup_steps=") for line in lines] == [True] * (note is not None), lines
    assert not note or f"so the learning rate {note}; set warmup_steps=0." in lines[0]


@pytest.mark.parametrize("eval_every, noted", [(23, False), (24, True)])
def test_an_eval_every_beyond_the_run_is_noted(eval_every, noted, capsys):
    inputs_of("loss=sft", *SHORT, f"eval_every={eval_every}")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("eval_every=24: ")]
    assert len(lines) == noted and ("the run has 24 examples" in "".join(lines)) == noted


SWEEP = ("loss=dpo", *SHORT, "n_examples=8", "do_first_eval=false", "debug=true", "wandb.enabled=false")


@pytest.mark.parametrize("fixed", [False, True], ids=["local_dirs", "local_run_dir"])
def test_a_sweep_names_its_runs_by_what_differs_and_leaves_nothing_else(fixed, tmp_path):
    where = "local_run_dir=sweep" if fixed else "local_dirs=[runs]"
    arguments = (where, *SWEEP, "-m", "loss.beta=0.1,0.5")
    swept = command_line(tmp_path, arguments, lambda: os.chdir(tmp_path))
    assert swept.returncode == 0, swept.stderr
    configs = sorted(tmp_path.rglob("config.yaml"))
    names = ["loss.beta=0.1", "loss.beta=0.5"]
    values = [yaml.safe_load(path.read_text()) for path in configs]
    assert [value["exp_name"] for value in values] == [f"dpo_tiny-gpt2_{name}" for name in names]
    assert [value["loss"]["beta"] for value in values] == [0.1, 0.5]
    folders = {path.parent.parent for path in configs}
    assert [path.parent.name for path in configs] == names and len(folders) == 1
    (folder,) = folders
    if fixed:
        assert folder == tmp_path / "sweep"
    else:
        assert re.fullmatch(r"dpo_tiny-gpt2_[\d_-]+", folder.name) and folder.parent.parent == tmp_path / "runs"
    paths = [path for path in tmp_path.rglob("*") if "data_cache" not in path.parts]
    files = {path.name for path in paths if path.is_file()}
    assert files == {"config.yaml", "metrics.jsonl", "samples.jsonl", "pairs.jsonl", ".lock", "warnings.json"}
    assert all(any(folder.iterdir()) for folder in tmp_path.rglob("*") if folder.is_dir())
    assert {path.name for path in tmp_path.iterdir()} - {".cache"} == {"sweep" if fixed else "runs"}
    lines = [
        line
        for line in swept.stdout.splitlines()
        if re.match(r"loss\.beta=\S+: loss/eval [\d.]+, rewards_eval/accuracies", line)
    ]
    assert [line.split(":")[0] for line in lines] == names
    assert "No frontier.html: no evaluation recorded a KL" in swept.stdout


# Signals before training begins


def interrupt_hydra() -> None:
    hydra.main = lambda **settings: lambda function: send(signal.SIGINT)


@pytest.mark.parametrize("fault", [during_import("build", send(signal.SIGINT)), interrupt_hydra])
def test_an_interrupt_before_training_prints_one_word(fault, tmp_path):
    run = command_line(tmp_path / "run", fresh(tmp_path / "run", "loss=sft", *SHORT), fault)
    assert (run.returncode, run.stdout, run.stderr) == (130, "Interrupted.\n", "") and not run.folder.exists()


def test_a_wish_for_a_checkpoint_during_imports_is_granted_after_the_first_update(tmp_path):
    settings = ("loss=sft", *SHORT, "eval_every=1000", "wandb.enabled=false")
    fault = during_import("build", send(signal.SIGUSR1))
    run = command_line(tmp_path / "run", fresh(tmp_path / "run", *settings), fault)
    assert run.returncode == 0, run.stderr
    assert {path.name for path in run.folder.glob("step-*")} == {"step-8", "step-24"}


# What is refused


def test_all_problems_of_values_are_reported_together_before_any_model_loads(run_forked):
    wrong = [
        "batch_size=abc",
        "datasets=hh",
        "lr=-1",
        "optimizer=Sgd",
        "loss.label_smoothing=0.5",
        "n_epochs=null",
        "n_examples=null",
        "max_prompt_length=300",
        "max_length=300",
        "precision=float16",
        "gradient_accumulation_steps=0",
        "eval_every=1.5",
        "do_first_eval=maybe",
        "model.policy_dtype=float15",
        "exp_name=../escape",
    ]
    run = run_forked("loss=dpo", f"model.name_or_path='{GOLDENS / 'tiny-gpt2'}'", *wrong)
    told = errors(run)
    assert run.returncode == 2 and "Traceback" not in run.stderr and not run.folder.exists()
    for key in ("batch_size=abc", "datasets=hh", "lr=-1", "optimizer=Sgd", "loss.label_smoothing=0.5", "n_epochs=null"):
        assert sum(line.startswith(key) for line in told) == 1, (key, told)
    for key in ("precision=float16", "gradient_accumulation_steps=0", "eval_every=1.5", "do_first_eval=maybe"):
        assert sum(line.startswith(key) for line in told) == 1, (key, told)
    assert any(line.startswith("max_prompt_length=300 max_length=300: ") for line in told)
    assert any(line.startswith("exp_name=../escape: ") for line in told)
    assert any(line.startswith("model.policy_dtype=float15: ") for line in told)
    assert len(told) == 13


@pytest.mark.parametrize("arguments, told", MISTYPED.items())
def test_a_mistyped_key_or_group_is_one_line(arguments, told, answers):
    code, printed, refusal, _ = answers[arguments]
    assert (code, printed) == (2, "") and refusal.startswith(f"error: {told}") and len(refusal.splitlines()) == 1


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="device=mps: not available here"):
        inputs_of("loss=dpo", *TINY, "device=mps")


def test_a_data_set_smaller_than_a_batch_is_refused_with_its_size():
    with pytest.raises(UserError, match="batch_size=161: the training data holds 160 examples"):
        inputs_of("loss=dpo", *TINY, "batch_size=161")


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2")
    tokenizer.add_tokens([f"<extra{i}>" for i in range(3)])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError) as refusal:
        inputs_of("loss=dpo", *TINY, f"model.tokenizer_name_or_path='{tmp_path}'")
    told = str(refusal.value).splitlines()
    assert any("no eos token" in line for line in told)


@pytest.mark.parametrize(
    "policy, reference, precision",
    [
        ("bfloat16", "null", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"),
        *(("float32", other, precision) for other in ("bfloat16", "float16") for precision in ("float32", "bfloat16")),
    ],
)
def test_a_reference_in_another_dtype_and_a_policy_in_bfloat16_train(policy, reference, precision, make_trainer):
    dtypes = (f"model.policy_dtype={policy}", f"model.reference_dtype={reference}", f"precision={precision}")
    trainer = make_trainer("loss=dpo", *dtypes)
    metrics = trainer.train_step(next(iter(trainer.train_batches)))
    assert math.isfinite(metrics["loss/train"])
    assert reference != "null" or metrics["rewards_train/margins"] == 0.0


def test_a_model_whose_weights_do_not_fit_its_config_is_refused_by_name(tmp_path, run_forked):
    shutil.copytree(GOLDENS / "tiny-gpt2", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"n_positions": 256', '"n_positions": 300'))
    run = run_forked("loss=sft", *SHORT, f"model.name_or_path='{tmp_path / 'model'}'")
    assert run.returncode == 2 and "transformer.wpe.weight" in run.stderr and "Traceback" not in run.stderr
    assert not run.folder.exists()


def test_tensors_of_parts_that_the_model_does_not_have_are_listed_and_ignored_and_others_refused(tmp_path, run_forked):
    shutil.copytree(GOLDENS / "tiny-gpt2", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for extra, code in (("mtp.layers.0.weight", 0), ("transformer.surplus", 2)):
        save_file(weights | {extra: torch.zeros(2)}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        settings = ("n_examples=8", "debug=true", f"local_run_dir='{tmp_path / extra}'")
        run = run_forked("loss=sft", *SHORT, *settings, f"model.name_or_path='{tmp_path / 'model'}'")
        assert run.returncode == code, run.stderr
        assert ("that this model lacks: mtp (1)" in run.stdout) == (code == 0)
        assert ("unexpected ['transformer.surplus']" in run.stderr) == (code == 2)


def test_secrets_from_the_environment_are_neither_printed_nor_saved(run_forked, monkeypatch):
    monkeypatch.setenv("MY_TEAM", "s3cret")
    run = run_forked("loss=sft", *SHORT, "debug=true", "wandb.entity=${oc.env:MY_TEAM}")
    assert run.returncode == 0, run.stderr
    assert "${oc.env:MY_TEAM}" in (run.folder / "config.yaml").read_text()
    assert "s3cret" not in run.stdout + (run.folder / "config.yaml").read_text()


def test_a_model_that_cannot_be_fetched_is_one_line_with_advice(run_forked):
    run = run_forked("loss=dpo", "model.name_or_path=nobody/nothing")
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: model.name_or_path=nobody/nothing: cannot be loaded") and "try model=tiny" in line


def test_a_machine_that_cannot_compile_is_told_in_one_line(run_cli, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    run = run_cli("loss=sft", *SHORT, "compile=true")
    assert run.returncode == 2
    line = run.stderr.splitlines()[-1]
    assert line.startswith("error: the model cannot be compiled here (") and "set compile=false" in line
    assert "Traceback" not in run.stderr


# What a run leaves behind


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
    """Run SFT once, with samples, for the tests of what it wrote."""
    folder = tmp_path_factory.mktemp("sft") / "a run"  # a space, for which a command needs quotes
    samples = ("sample_during_eval=true", "n_eval_model_samples=3")
    done = command_line(folder, fresh(folder, "loss=sft", *SHORT, *samples, "exp_name=offline"))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_directory_holds_what_the_readme_says(sft_run):
    folder, _ = sft_run
    there = {path.name for path in folder.iterdir()}
    assert there == {
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "warnings.json",
        "pairs.jsonl",
        "step-16",
        "step-24",
        "LATEST",
        "wandb",
        ".lock",
    }
    assert (folder / "LATEST").resolve().name == "step-24"
    for step in (16, 24):
        for name in ("policy", "optimizer", "scheduler", "run"):
            part = torch.load(folder / f"step-{step}" / f"{name}.pt", weights_only=True)
            assert set(part) == {"step_idx", "state", "metrics"} and part["step_idx"] == step
            assert part["metrics"]["loss/eval"] > 0


def test_metrics_have_every_update_and_an_evaluation_at_each_multiple_and_at_the_end(sft_run):
    records = [json.loads(line) for line in (sft_run[0] / "metrics.jsonl").read_text().splitlines()]
    updates = [(r["examples"], r["updates"]) for r in records if "loss/train" in r]
    assert updates == [(8, 1), (16, 2), (24, 3)]
    assert [(r["examples"], r["updates"]) for r in records if "loss/eval" in r] == [(0, 0), (16, 2), (24, 3)]
    names = {"loss/train", "logps_train/chosen", "lengths_train/chosen", "grad_norm", "lr"}
    names |= {"counters/examples", "counters/updates", "examples", "updates"}
    first = next(r for r in records if "loss/train" in r)
    assert set(without_measurements(first)) == names and first["examples_per_second"] > 0
    assert [r["lr"] for r in records if "lr" in r] == pytest.approx([1e-4 / 3, 2e-4 / 3, 1e-4])


def test_samples_are_for_the_same_prompts_every_time(sft_run):
    rows = [json.loads(line) for line in (sft_run[0] / "samples.jsonl").read_text().splitlines()]
    by_step = {step: [r["prompt"] for r in rows if r["examples"] == step] for step in (0, 16, 24)}
    assert by_step[0] == by_step[16] == by_step[24] and len(set(by_step[0])) == 3
    assert {r["model"] for r in rows} == {"policy"}
    assert rows[0]["sample"] != rows[6]["sample"]


def test_other_tools_open_the_model_that_a_run_leaves(sft_run):
    folder = sft_run[0] / "LATEST"
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    assert AutoTokenizer.from_pretrained(folder / "hf").eos_token == "<|endoftext|>"
    state = torch.load(folder / "policy.pt", weights_only=True)["state"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_wandb_without_a_key_records_offline_with_the_samples_as_tables(sft_run):
    folder, printed = sft_run
    (recorded,) = (folder / "wandb").glob("offline-run-*")
    assert f"wandb sync {shlex.quote(str(recorded))}" in printed
    assert list(recorded.glob("*.wandb"))[0].stat().st_size > 1000
    tables = [json.loads(path.read_text()) for path in recorded.glob("files/media/table/policy_samples*.json")]
    assert len(tables) == 3
    assert all(table["columns"] == ["step", "prompt", "sample"] and len(table["data"]) == 3 for table in tables)


def test_latest_of_sft_serves_as_the_archive_of_dpo(sft_run, run_forked):
    archive = sft_run[0] / "LATEST" / "policy.pt"
    run = run_forked(
        "loss=dpo", *SHORT, f"model.archive='{archive}'", "sample_during_eval=true", "n_eval_model_samples=2"
    )
    assert run.returncode == 0, run.stderr
    records = run.records()
    first = next(r for r in records if "loss/train" in r)
    assert first["rewards_train/margins"] == 0.0
    assert first["loss/train"] == pytest.approx(0.6931472)
    sft_end = [json.loads(line) for line in (sft_run[0] / "metrics.jsonl").read_text().splitlines()][-1]
    assert records[0]["logps_eval/chosen"] != sft_end["logps_eval/chosen"]  # SFT evaluates one response a prompt
    rows = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    reference = [r["sample"] for r in rows if r["model"] == "reference"]
    assert len(reference) == 6 and reference[:2] == reference[2:4] == reference[4:]
    policy = [r["sample"] for r in rows if r["model"] == "policy"]
    assert policy[:2] == reference[:2]  # before the first update they are the same model, asked with the same seed


def test_debug_writes_neither_checkpoints_nor_wandb(run_forked):
    run = run_forked("loss=sft", *SHORT, "debug=true", "wandb.enabled=true")
    assert run.returncode == 0, run.stderr
    assert {path.name for path in run.folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "warnings.json",
        "pairs.jsonl",
        ".lock",
    }


def test_a_run_directory_that_holds_a_run_is_refused(run_forked):
    assert run_forked("loss=sft", *SHORT, "debug=true").returncode == 0
    again = run_forked("loss=sft", *SHORT, "debug=true")
    assert again.returncode == 2 and "holds another run" in again.stderr


def test_the_last_partial_evaluation_batch_counts_and_the_order_of_evaluation_ignores_the_seed(make_trainer):
    one, other = (
        make_trainer("loss=dpo", "n_eval_examples=10", "eval_batch_size=8", f"seed={seed}") for seed in (0, 5)
    )
    assert one.evaluate() == other.evaluate()
    assert sum(len(batch.examples) for batch in one.eval_batches) == 10


def test_sampling_leaves_the_randomness_of_training_alone(make_trainer):
    trainer = make_trainer("loss=sft", "n_eval_model_samples=2")
    before = torch.get_rng_state()
    trainer.sample()
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_ignores_the_generation_settings_that_came_with_the_model(make_trainer):
    trainer = make_trainer("loss=sft", "sample_top_k=1")
    prompts = distinct_prompts(trainer.eval_batches, 2)
    plain = trainer.sampler.generate(trainer.policy.model, prompts, "plain")
    trainer.policy.model.generation_config.repetition_penalty = 50.0
    assert trainer.sampler.generate(trainer.policy.model, prompts, "penalized") == plain
    assert trainer.policy.model.generation_config.repetition_penalty == 50.0


def test_activation_checkpointing_computes_a_layer_twice_in_every_update_and_changes_no_gradient(make_trainer):
    """Once forward, once more in the backward pass; an evaluation between two updates switches nothing off."""
    norms, calls = [], []
    for setting in ("false", "true"):
        trainer = make_trainer(
            "loss=dpo", f"activation_checkpointing={setting}", "max_tokens_per_pass=100000", "n_eval_examples=8"
        )
        computed = []
        layer = trainer.policy.model.transformer.h[0].ln_1
        layer.register_forward_hook(lambda *_, computed=computed: computed.append(1))
        for batch, _ in zip(trainer.train_batches, range(2), strict=False):
            computed.clear()
            norms.append(trainer.train_step(batch)["grad_norm"])
            calls.append(len(computed))
            trainer.evaluate()
    assert calls == [1, 1, 2, 2]
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-6)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
@pytest.mark.skipif(not Path(sysconfig.get_path("include"), "Python.h").is_file(), reason="needs Python.h")
def test_a_compiled_run_gives_the_same_numbers_and_does_not_compile_for_every_length(make_trainer, monkeypatch):
    attended = []
    attend = attention.cpu_attention
    monkeypatch.setattr(attention, "cpu_attention", lambda *args, **how: attended.append(1) or attend(*args, **how))
    losses, graphs = [], []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for setting in ("false", "true"):
        trainer = make_trainer("loss=dpo", f"compile={setting}", "lr=1e-4")
        batches = [batch for batch, _ in zip(trainer.train_batches, range(4), strict=False)]
        attended.clear()
        losses.append([trainer.train_step(batch)["loss/train"] for batch in batches[:2]])
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        losses[-1] += [trainer.train_step(batch)["loss/train"] for batch in batches[2:]]
        graphs.append((compiled, torch._dynamo.utils.counters["stats"]["unique_graphs"], len(attended)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert graphs[0][0] == graphs[0][1] == 0 < graphs[1][0] == graphs[1][1]
    assert graphs[0][2] == graphs[1][2] > 0, "compiled or not, each example is attended to by itself"


def test_samples_of_a_compiled_run_are_those_of_another(make_trainer):
    """And generating compiles nothing, since each of its steps would be a shape of its own."""
    samples = []
    for setting in ("false", "true"):
        trainer = make_trainer("loss=sft", f"compile={setting}")
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        samples.append(
            trainer.sampler.generate(
                trainer.policy.model,
                distinct_prompts(trainer.eval_batches, trainer.settings.n_eval_model_samples),
                "sampling",
            )
        )
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert samples[0] == samples[1]


def test_bfloat16_keeps_parameters_optimizer_and_log_probabilities_in_float32(make_trainer):
    trainer = make_trainer("loss=dpo", "precision=bfloat16", "model.fsdp_policy_mp=bfloat16")
    batch = next(iter(trainer.train_batches))
    with trainer.autocast():
        logps = response_logps(trainer.policy, next(trainer.packer(batch.examples))).sums
    assert trainer.dtype == torch.bfloat16 and logps.dtype == torch.float32
    assert trainer.train_step(batch)["rewards_train/margins"] == 0.0
    assert {p.dtype for p in trainer.policy.parameters()} == {torch.float32}
    states = [v for state in trainer.optimizer.state.values() for k, v in state.items() if k != "step"]
    assert {v.dtype for v in states} == {torch.float32}


def test_a_resumed_run_renders_its_data_at_the_time_at_which_it_started(tmp_path, run_forked):
    """The template writes seconds, and the reference was computed for the texts of the first start."""
    for split in ("train", "test"):
        rows = [
            {"prompt": [{"role": "user", "content": f"Is {n} even?"}], "chosen": "Y", "rejected": "N"} for n in range(8)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    template = tmp_path / "chat.jinja"
    turns = "{%- for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor -%}"
    template.write_text("{{- strftime_now('%H:%M:%S') -}}" + turns + "{{- 'assistant: ' if add_generation_prompt -}}")
    data = (f"datasets=['{tmp_path}']", f"chat_template='{template}'", "loss.precompute_reference=true")
    assert run_forked(*TINY, "loss=dpo", *data, "n_epochs=1", "chat_template_time=null").returncode == 0
    folder = tmp_path / "run"
    time = yaml.safe_load((folder / "config.yaml").read_text())["chat_template_time"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", time)
    resumed = command_line(folder, (f"resume={folder}", "n_epochs=2"))
    assert resumed.returncode == 0, resumed.stderr
    assert yaml.safe_load((folder / "config.yaml").read_text())["chat_template_time"] == time


def test_settings_of_chat_templates_that_change_nothing_are_refused():
    for setting, words in (
        ("chat_template_time=2026-01-31", "no chat template reads the clock"),
        ("chat_template_args={a: 1}", "no row is rendered with the chat template"),
    ):
        with pytest.raises(UserError, match=words):
            inputs_of("loss=dpo", *TINY, setting)


def test_the_log_names_the_settings_that_differ_from_the_defaults_and_no_others():
    config = compose("loss=dpo", "model=gpt2", "lora=default", "lora.r=8", "lr=1e-6", "loss.beta=0.1", "datasets=[a,b]")
    assert changed_settings(config)[:3] == ["loss=dpo", "lora=default", "model.name_or_path=gpt2"]
    assert set(changed_settings(config)[3:]) == {"lora.r=8", "lr=1e-06", "datasets=['a', 'b']", "wandb.enabled=false"}
    assert "lora=default" not in changed_settings(compose("loss=sft", "model=gpt2"))
