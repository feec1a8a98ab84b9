"""What a resumed run takes over from its directory, what it takes from the command line, and what it refuses."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, ROOT, Run
from faults import BUSY, again, at_event, command_line, few_rows, fresh, kill

import trainers
from dpo.data.batches import BatchIterator
from dpo.model import layout_check
from dpo.model.archives import load_archive
from dpo.runs import checkpoints, run_dir
from dpo.runs.run_dir import Checkpoint, read_environment
from dpo.settings import run_config
from dpo.system.devices import platform

FIXTURES = ROOT / "tests" / "fixtures"
TINY_GPT2 = GOLDENS / "tiny-gpt2"
SETTINGS = (*BUSY, "loss=dpo", "n_examples=24", "eval_every=1000", "sample_during_eval=false", "do_first_eval=false")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was killed in the last of its three updates, with checkpoints after the first two."""
    tmp_path = tmp_path_factory.mktemp("stopped")
    folder, data = tmp_path / "run", few_rows(tmp_path / "data", 40, 8)
    arguments = fresh(folder, *SETTINGS, f"datasets=['{data}']", f"local_dirs=['{tmp_path}']")
    assert command_line(folder, arguments, at_event(4, kill)).returncode < 0
    assert [path.name for path in run_config.list_checkpoints(folder)] == ["step-16", "step-8"]
    return folder


@pytest.fixture
def copied(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run", symlinks=True)


def edit(folder: Path, old: str, new: str) -> None:
    """Replace a line of a run's config.yaml."""
    text = (folder / "config.yaml").read_text()
    assert text.count(f"{old}\n") == 1
    (folder / "config.yaml").write_text(text.replace(f"{old}\n", f"{new}\n"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(folder: Path, *arguments: str) -> str:
    """The one line in which a command is refused, which changes nothing in the run."""
    before = contents(folder)
    run = command_line(folder, arguments)
    assert run.returncode == 2 and contents(folder) == before, run
    (line,) = run.stderr.splitlines()
    return line.removeprefix("error: ")


def stored_fingerprints(folder: Path) -> dict[str, str]:
    """The fingerprints in a run's newest checkpoint."""
    _, states = checkpoints.newest_checkpoint(folder)
    return states["run"]["fingerprints"]


def resumed(folder: Path, *overrides: str, fault: Callable[[], None] = lambda: None, at: str = "") -> Run:
    """Resume a run to its end."""
    run = command_line(folder, again(folder / at if at else folder, *overrides), fault)
    assert run.returncode == 0, run.stderr
    assert [record["updates"] for record in run.records() if "loss/train" in record][-1] == 3
    return run


# Which checkpoint


@pytest.mark.parametrize("name", ["LATEST", "step-16"])
def test_a_run_resumes_by_the_name_of_its_newest_checkpoint(name, copied):
    resumed(copied, at=name)
    (line,) = map(json.loads, (copied / "resumed.jsonl").read_text().splitlines())
    assert line["from"] == "step-16"


def test_an_older_checkpoint_is_refused_with_the_command_that_starts_from_it(copied):
    line = refusal(copied, *again(copied / "step-8"))
    assert line == (
        f"resume={copied}/step-8: a run continues from its newest checkpoint, step-16;"
        f" start a new run with model.archive={copied}/step-8/policy.pt"
    )
    line = refusal(copied, *again(copied / "step-24"))
    assert line == f"resume={copied}/step-24: a run continues from its newest checkpoint, step-16"


def test_a_resumed_run_is_no_sweep(copied):
    assert refusal(copied, *again(copied), "-m") == "-m: resume=RUN continues one run; leave this flag out"


# Overrides


def test_a_setting_that_matters_is_refused_and_the_way_to_a_new_run_named(copied):
    assert refusal(copied, *again(copied, "max_grad_norm=1.0")) == (
        "max_grad_norm=1.0: a resumed run keeps max_grad_norm=10.0; leave this out,"
        f" or start a new run with model.archive={copied}/LATEST/policy.pt"
    )


@pytest.mark.parametrize("old, new", [("lr: 0.001", "lr: 0.002"), ("max_grad_norm: 10.0", "max_grad_norm: 1.0")])
def test_an_edited_config_is_refused(old, new, copied):
    edit(copied, old, new)
    line = refusal(copied, *again(copied))
    assert line == f"resume={copied}: the settings have changed since the run began"


def test_a_run_of_a_version_that_kept_compile_resumes_whatever_it_is_now(tmp_path, monkeypatch):
    folder, data = tmp_path / "run", few_rows(tmp_path / "data", 40, 8)
    arguments = fresh(folder, *SETTINGS, "compile=false", f"datasets=['{data}']", f"local_dirs=['{tmp_path}']")
    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "MAY_CHANGE", [key for key in run_config.MAY_CHANGE if key != "compile"])
        assert command_line(folder, arguments, at_event(4, kill)).returncode < 0
    resumed(folder, "compile=auto")


def test_data_may_move_and_not_change(copied, tmp_path):
    data = few_rows(tmp_path / "moved", 40, 8)
    rows = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(rows.replace(" the ", " that ", 1))
    line = refusal(copied, *again(copied, f"datasets=['{data}']"))
    assert line == f"resume={copied}: the training data have changed since the run began"
    (data / "train.jsonl").write_text(rows)
    resumed(copied, f"datasets=['{data}']")
    assert f"- {data}\n" in (copied / "config.yaml").read_text()


def test_a_run_of_an_earlier_version_which_hashed_the_texts_of_its_data_goes_on(tmp_path):
    folder, data = tmp_path / "run", few_rows(tmp_path / "data", 40, 8)
    arguments = fresh(folder, *SETTINGS, f"datasets=['{data}']", f"local_dirs=['{tmp_path}']")

    def as_before() -> None:
        BatchIterator.fingerprint = BatchIterator.earlier_fingerprint
        at_event(3, kill)()

    assert command_line(folder, arguments, as_before).returncode < 0
    before = stored_fingerprints(folder)
    resumed(folder)
    after = stored_fingerprints(folder)
    assert {name for name in after if before[name] != after[name]} == {"the training data", "the evaluation data"}


# What rounds numbers otherwise


def test_the_environment_and_the_fingerprints_of_earlier_versions_are_read():
    """They stored the layout as a text, which is checked again."""
    stored = {"torch": "2.11", "the device": "cpu A", "the number of threads": 2, "the number of parts of a batch": 4}
    states = {"run": {"surroundings": stored | {"the layout": "padded, sdpa attention"}, "identity": {"data": "ab"}}}
    assert read_environment(states) == {"torch": "2.11", "device": "cpu A", "threads": 2, "data_size": 4}
    assert Checkpoint(Path("step-1"), states).fingerprints() == {"data": "ab"}


@pytest.mark.parametrize("states", [{}, {"run": None}, {"run": {}}, {"run": {"environment": 3}}])
def test_states_of_another_form_tell_nothing_of_the_environment(states):
    assert read_environment(states) == {}


def with_platform(**changed: str) -> Callable[[], None]:
    """Resume where platform() has other values."""

    def install() -> None:
        layout_check.platform = trainers.platform = lambda device: platform(device) | changed

    return install


def test_a_run_resumes_in_silence_with_its_layout_where_nothing_changed(copied):
    run = resumed(copied, "device=auto", "device=cpu")
    assert "not be bit for bit" not in run.stdout and "Checking layout" not in run.stdout


@pytest.mark.parametrize("what", ["torch", "transformers", "device"])
def test_a_change_of_versions_or_device_is_noted_and_the_layout_checked_again(what, copied):
    run = resumed(copied, "device=auto", fault=with_platform(**{what: "other"}))
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("Results will not be bit for bit ")]
    assert f"{what} was " in line and line.endswith(", is other.")
    assert "Checking layout=shared_prefix" in run.stdout


# A stranger's config.yaml

TRICKS = ("${oc.env:SECRET}", "${ oc.env:SECRET}", "${${wandb.project}:SECRET}", "a-${oc.env:SECRET}-b")


@pytest.mark.parametrize("value", TRICKS)
@pytest.mark.parametrize("key, old", [("exp_name", "exp_name: dpo_tiny-gpt2"), ("lr", "lr: 0.001")])
def test_an_interpolation_is_refused_unresolved(key, old, value, copied, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    edit(copied, old, f"{key}: '{value}'")
    edit(copied, "  project: direct-preference-optimization", "  project: oc.env")
    line = refusal(copied, *again(copied))
    assert line == f"{key}={value}: is not resolved again when a run is resumed; add {key}=VALUE"


def test_an_interpolation_gives_way_to_a_value_which_must_be_the_runs_own(copied, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    edit(copied, "exp_name: dpo_tiny-gpt2", "exp_name: '${oc.env:SECRET}'")
    edit(copied, "lr: 0.001", "lr: ${oc.env:SECRET}")
    line = refusal(copied, *again(copied, "exp_name=mine", "lr=2e-3"))
    assert line == f"resume={copied}: the settings have changed since the run began"
    run = resumed(copied, "exp_name=mine", "lr=1e-3")
    kept = b"".join(contents(copied).values())
    assert b"hunter2" not in kept and b"oc.env" not in kept and b"exp_name: mine" in kept
    assert "hunter2" not in run.stdout + run.stderr


def little_memory() -> None:
    """Allow 300 MB more than is mapped."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 300_000_000,) * 2)


def test_a_yaml_alias_bomb_is_refused_before_it_is_expanded(tmp_path):
    """Of 9^12 values; those that are quicker to make than to refuse would not fit into the memory."""
    lines = [f"a0: &a0 [{', '.join('x' * 9)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "config.yaml").write_text("\n".join(lines) + "\n")
    run = command_line(tmp_path, again(tmp_path), little_memory)
    assert run.returncode == 2 and "it holds YAML aliases, which no run writes" in run.stderr, run


# Runs of the first version


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_a_run_of_the_first_version_resumes_to_the_metrics_it_would_have_had(loss, tmp_path):
    """tests/fixtures/README.md says how the run was made."""
    folder = shutil.copytree(FIXTURES / f"run-v1-{loss}", tmp_path / "run", symlinks=True)
    run = command_line(folder, again(folder))
    assert run.returncode == 0, run.stderr
    lines = (FIXTURES / f"run-v1-{loss}.metrics.jsonl").read_text().splitlines()
    for record, line in zip(run.records(), lines, strict=True):
        expected = {key: value for key, value in json.loads(line).items() if not key.endswith("_per_second")}
        assert {key: record[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert (folder / "LATEST" / "hf" / "model.safetensors").is_file()


def test_the_weights_of_a_run_of_the_first_version_start_a_new_run(make_trainer):
    archive = FIXTURES / "run-v1-sft" / "LATEST" / "policy.pt"
    model = (f"model.name_or_path='{FIXTURES / 'run-v1-model'}'", f"model.tokenizer_name_or_path='{TINY_GPT2}'")
    trainer = make_trainer("loss=dpo", *model, "max_length=48", "max_prompt_length=24", f"model.archive='{archive}'")
    weights, own = load_archive(str(archive)), trainer.policy.model.state_dict()
    assert weights.keys() == own.keys() and all(torch.equal(weights[name], own[name]) for name in own)
    assert trainer.evaluate()["rewards_eval/margins"] == 0.0


def test_the_runs_of_the_first_version_name_no_machine():
    paths = [path for path in FIXTURES.rglob("*") if path.suffix in (".yaml", ".json", ".jsonl")]
    assert len(paths) == 9
    for path in paths:
        assert not [word for word in ("/home", "/root", "/tmp", "/Users") if word in path.read_text()]


def test_the_warnings_of_the_start_are_kept_also_by_a_resumed_run_and_repeated_beside_the_verdict(copied):
    kept = (copied / "warnings.json").read_text()
    (copied / "warnings.json").unlink()
    done = command_line(copied, again(copied))
    assert done.returncode == 0 and (copied / "warnings.json").read_text() == kept, done.stderr
    (warning,) = json.loads(kept)
    lines = done.stdout.splitlines()
    last = next(i for i, line in enumerate(lines) if line.startswith("Verdict: 8 pairs say nothing: "))
    assert warning.startswith("8 evaluation examples are too few") and lines.count(f"Warning: {warning}") == 2
    assert lines[last + 1] == f"Warning: {warning}" and lines[-1].startswith("Done: 24 examples in 3 updates.")
