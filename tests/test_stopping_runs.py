"""Runs that keep their best checkpoint and that evaluations end: killed anywhere and resumed, they leave the same."""

import json
import os
import re
import shutil
import signal
import sys

import pytest
import torch
from faults import BUSY, again, assert_same, command_line, copy_until, fresh, kill, send
from safetensors.torch import load_file

import trainers
from dpo.runs import checkpoints
from dpo.settings.run_config import list_checkpoints, read_run_config
from dpo.system.files import write_manifest

RUN = (*BUSY, "loss=dpo", "sample_during_eval=false", "keep_checkpoints=1", "report=false")
BEST = (*RUN, "keep_best=loss/eval")
STOP = (*BEST, "stop_after=1")
COLLAPSE = (*RUN, "stop_if.max_loss=1.5")
# loss/eval of each evaluation, by examples: every machine must find the same one the best
LOSSES = {0: 0.7, 16: 0.4, 32: 0.5, 48: 0.6}
BROKEN = LOSSES | {32: 1.1, 48: 1.2}


def evaluations(losses):
    """Return a fault that gives evaluations these values of loss/eval."""

    def install():
        evaluate = trainers.BasicTrainer.evaluate
        trainers.BasicTrainer.evaluate = lambda self: evaluate(self) | {"loss/eval": losses[self.examples]}

    return install


def start(folder, settings, *faults, losses=LOSSES, code=0):
    result = command_line(folder, fresh(folder, *settings), evaluations(losses), *faults)
    assert result.returncode == code, result.stdout[-3000:] + result.stderr
    return result


def resume(folder, *overrides, losses=LOSSES, code=0):
    result = command_line(folder, again(folder, *overrides), evaluations(losses))
    assert result.returncode == code, result.stdout[-3000:] + result.stderr
    return result


def links(folder):
    return {name: os.readlink(folder / name) for name in ("LATEST", "BEST") if (folder / name).is_symlink()}


def contents(folder):
    """Return every file of a run, without the content of those that clocks, copies and the run's name change."""
    varied = {"metrics.jsonl", "config.yaml", "README.md", "MANIFEST", "metrics.json"}
    varied |= {f"{part}.pt" for part in checkpoints.PARTS}  # assert_same compares the newest ones, and hf/ has the best
    names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != "resumed.jsonl"}
    return {name: None if name.name in varied else (folder / name).read_bytes() for name in names}


def same(folder, other):
    """Assert that two runs left the same: logs, states, links, and every file."""
    assert_same(folder, other)
    assert links(folder) == links(other)
    assert contents(folder) == contents(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a function that gives the folder of an uninterrupted run."""
    done = {}

    def run(settings, losses):
        key = (settings, str(losses))
        if key not in done:
            done[key] = tmp_path_factory.mktemp("whole") / "run"
            start(done[key], settings, losses=losses)
        return done[key]

    return run


def copy_of(folder, tmp_path):
    """Copy a run that has ended."""
    return shutil.copytree(folder, tmp_path / "copy", symlinks=True)


def card(folder):
    return (folder / "hf" / "README.md").read_text()


def test_a_run_keeps_and_exports_its_best_checkpoint_beside_the_last_one(whole):
    folder = whole(BEST, LOSSES)
    assert links(folder) == {"LATEST": "step-48", "BEST": "step-16"}
    assert [path.name for path in list_checkpoints(folder)] == ["step-48", "step-16"]  # keep_checkpoints=1
    assert not (folder / "stopped.json").exists()
    state = torch.load(folder / "BEST" / "policy.pt")["state"]
    best, last = (load_file(folder / name / "hf" / "model.safetensors") for name in ("BEST", "LATEST"))
    assert all(torch.equal(best[name], state[name]) for name in best) and best.keys() == last.keys()
    assert not all(torch.equal(best[name], last[name]) for name in best)
    assert "16 examples in 2 updates" in card(folder / "BEST")
    assert "at the best evaluation by `keep_best=loss/eval`" in card(folder / "BEST")
    assert "| loss/eval | 0.4 |" in card(folder / "BEST")
    assert "after the last update" in card(folder / "LATEST") and "| loss/eval | 0.6 |" in card(folder / "LATEST")


def test_a_run_whose_last_evaluation_is_the_best_exports_once(tmp_path):
    start(tmp_path / "run", BEST, losses={0: 0.7, 16: 0.6, 32: 0.5, 48: 0.4})
    assert links(tmp_path / "run") == {"LATEST": "step-48", "BEST": "step-48"}
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-48"]


def test_a_run_without_a_better_evaluation_ends_and_says_why(whole, tmp_path):
    folder = copy_of(whole(STOP, LOSSES), tmp_path)
    assert links(folder) == {"LATEST": "step-32", "BEST": "step-16"}
    assert all((folder / name / "hf" / "model.safetensors").is_file() for name in ("LATEST", "BEST"))
    stored = json.loads((folder / "stopped.json").read_text())
    cause = {"setting": "stop_after", "value": 1, "metric": "loss/eval", "figure": 0.5, "bound": 0.4}
    assert stored == {"examples": 32, "updates": 4, "step": 32, "causes": [cause]}
    before = contents(folder)
    assert "after 32 examples: stop_after=1: loss/eval is 0.5, the best is 0.4" in resume(folder).stdout
    assert contents(folder) == before


def test_a_last_evaluation_that_is_no_better_completes_the_run(tmp_path):
    start(tmp_path / "run", STOP, losses={0: 0.7, 16: 0.5, 32: 0.4, 48: 0.5})
    assert links(tmp_path / "run") == {"LATEST": "step-48", "BEST": "step-32"}
    assert not (tmp_path / "run" / "stopped.json").exists()
    assert "the run is complete" in resume(tmp_path / "run").stdout


def test_another_stop_after_continues_as_if_it_had_been_set_from_the_start(whole, tmp_path):
    folder = copy_of(whole(STOP, LOSSES), tmp_path)
    resume(folder, "stop_after=5")
    assert not (folder / "stopped.json").exists() and read_run_config(folder).stop_after == 5
    assert_same(folder, whole(BEST, LOSSES))
    assert links(folder) == {"LATEST": "step-48", "BEST": "step-16"}


def test_a_broken_condition_ends_the_run_with_its_last_good_checkpoint(whole, tmp_path):
    folder = copy_of(whole(COLLAPSE, BROKEN), tmp_path)
    assert [path.name for path in list_checkpoints(folder)] == ["step-16"]  # step-24, of save_every, was not judged
    assert links(folder) == {"LATEST": "step-16"}
    assert "at the last evaluation before `stop_if` ended the run" in card(folder / "LATEST")
    exported = load_file(folder / "LATEST" / "hf" / "model.safetensors")
    state = torch.load(folder / "LATEST" / "policy.pt")["state"]
    assert all(torch.equal(exported[name], state[name]) for name in exported)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss/eval"] == 1.1 and records[-1]["examples"] == 32
    said = resume(folder, losses=BROKEN).stdout
    assert "after 32 examples: stop_if.max_loss=1.5: loss/eval is 1.1, the bound 1.05. LATEST is step-16" in said
    resume(folder, "stop_if.max_loss=1.6", losses=BROKEN)  # 1.12, which the last evaluation breaks
    assert links(folder) == {"LATEST": "step-32"}
    resume(folder, "stop_if=null", losses=BROKEN)
    assert links(folder) == {"LATEST": "step-48"} and not (folder / "stopped.json").exists()


def test_a_run_without_a_good_checkpoint_exports_nothing_and_ends_with_code_9(tmp_path):
    folder, losses = tmp_path / "run", LOSSES | {16: 1.1}
    result = start(folder, COLLAPSE, losses=losses, code=9)
    assert "so nothing is exported; try a lower lr, or a smaller eval_every" in result.stderr
    assert list_checkpoints(folder) == [] and not links(folder)
    result = resume(folder, code=9)
    assert "stop_if.max_loss=1.5" in result.stderr and "starts over" not in result.stdout
    resume(folder, "stop_if.max_loss=null", losses=losses)
    assert links(folder) == {"LATEST": "step-48"}


LONGER = LOSSES | {40: 0.45, 48: 2.0}  # 40 is not part of a longer run's schedule


def test_a_longer_run_goes_back_to_the_end_of_the_shorter_one(tmp_path):
    folder = tmp_path / "run"
    start(folder, (*RUN, "n_examples=40"), losses=LONGER)
    assert [path.name for path in list_checkpoints(folder)] == ["step-40"]  # keep_checkpoints=1
    resume(folder, "n_examples=96", "stop_if.max_loss=1.5", losses=LONGER)
    assert links(folder) == {"LATEST": "step-40"} and (folder / "LATEST" / "hf" / "model.safetensors").is_file()


def test_a_longer_run_keeps_the_best_checkpoint_from_the_end_of_the_shorter_one(tmp_path):
    folder, losses = tmp_path / "run", LONGER | {40: 0.3}
    start(folder, (*BEST, "n_examples=40"), losses=losses)
    said = resume(folder, "n_examples=48", losses=losses).stdout
    assert "Best evaluation: step-40 (loss/eval 0.3" in said and "is gone" not in said
    assert links(folder) == {"LATEST": "step-48", "BEST": "step-40"}


# Killed

CHANGES = {"os.rename", "os.symlink", "os.remove", "os.mkdir", "os.rmdir"}


def at_change(folder, count, log=None):
    """Return a fault that kills right before the count-th change of a name in a run directory; log has the number."""
    seen = [0]

    def watch(name, arguments):
        is_change = name in CHANGES or (name == "open" and arguments[1] and re.search("[wxa]", str(arguments[1])))
        if not is_change or str(folder) not in str(arguments[0]) + str(arguments[1] if len(arguments) > 1 else ""):
            return
        seen[0] += 1
        if log is not None:
            os.write(log, b".")
        if seen[0] == count:
            kill()

    return lambda: sys.addaudithook(watch)


@pytest.mark.parametrize(
    "settings, losses", [(BEST, LOSSES), (STOP, LOSSES), (COLLAPSE, BROKEN)], ids=["best", "stop_after", "stop_if"]
)
def test_a_run_that_is_killed_before_any_change_of_its_files_leaves_the_same(
    settings, losses, whole, tmp_path, counts, report
):
    saves = "background_saves=false"  # so that the changes come in one order
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    start(tmp_path / "counted", (*settings, saves), at_change(tmp_path / "counted", 0, log), losses=losses)
    n = (tmp_path / "log").stat().st_size
    assert n > 40
    chosen = counts(small=(n - 12, n - 3), full=range(12, n + 1))
    for count in chosen:
        folder = tmp_path / f"run{count}"
        start(folder, (*settings, saves), at_change(folder, count), losses=losses, code=-signal.SIGKILL)
        resume(folder, losses=losses)
        same(folder, whole(settings, losses))
    report(f"kill -9 before {len(chosen)} of {n} changes of names, {settings[-1]}: all resumed runs identical")


@pytest.mark.parametrize("settings, losses", [(STOP, LOSSES), (COLLAPSE, BROKEN)], ids=["stop_after", "stop_if"])
def test_a_signal_during_the_evaluation_that_ends_a_run_changes_nothing(settings, losses, whole, tmp_path):
    def interrupt():
        evaluate = trainers.BasicTrainer.evaluate

        def interrupted(self):
            if self.examples == 32:
                send(signal.SIGTERM)()
            return evaluate(self)

        trainers.BasicTrainer.evaluate = interrupted

    folder = tmp_path / "run"
    start(folder, settings, interrupt, losses=losses, code=143)
    assert "step-32" in [path.name for path in list_checkpoints(folder)]  # which the signal wrote, not an evaluation
    resume(folder, losses=losses)
    same(folder, whole(settings, losses))


def test_best_is_mended_and_a_lost_best_checkpoint_is_said(whole, tmp_path):
    folder = copy_until(whole((*BEST, "keep_checkpoints=null"), LOSSES), tmp_path / "run", 32)
    (folder / "BEST").unlink()
    resume(folder)
    assert links(folder)["BEST"] == "step-16"
    folder = copy_until(whole((*BEST, "keep_checkpoints=null"), LOSSES), tmp_path / "lost", 24)
    checkpoints.remove_checkpoint(folder / "step-16")
    assert "step-16, the best checkpoint, is gone; the best one from now on is kept." in resume(folder).stdout
    assert links(folder)["BEST"] == "step-32"


def test_a_checkpoint_of_a_version_without_this_resumes(whole, tmp_path):
    folder = copy_until(whole(BEST, LOSSES), tmp_path / "run", 16)
    (folder / "BEST").unlink()
    path = folder / "step-16" / "run.pt"
    stored = torch.load(path)
    del stored["state"]["progress"]
    torch.save(stored, path)
    (folder / "step-16" / "MANIFEST").unlink()
    write_manifest(folder / "step-16", {})
    earlier = shutil.copytree(folder, tmp_path / "earlier", symlinks=True)
    resume(folder)
    assert links(folder)["BEST"] == "step-32"

    def fall():
        evaluate, fallen = trainers.BasicTrainer.evaluate, {"diagnosis/chosen_log_ratio_per_token": -1.0}
        trainers.BasicTrainer.evaluate = lambda self: evaluate(self) | fallen

    result = command_line(earlier, again(earlier, "stop_if.min_log_ratio=-0.5", "stop_if.max_loss=1.5"), fall)
    assert result.returncode == 0 and "stop_if.max_loss=1.5 is never checked: the evaluation before" in result.stdout
    assert links(earlier)["LATEST"] == "step-16"  # and is not removed


def test_best_of_an_adapter_is_exported_in_its_format(tmp_path):
    folder = tmp_path / "run"
    start(folder, (*BEST, "lora=default", "lora.r=2"))
    assert links(folder) == {"LATEST": "step-48", "BEST": "step-16"}
    best, last = (load_file(folder / name / "hf" / "adapter_model.safetensors") for name in ("BEST", "LATEST"))
    stored = torch.load(folder / "BEST" / "policy.pt")["state"]["weights"]
    assert sum(float(value.norm()) for value in best.values()) == pytest.approx(
        sum(float(value.norm()) for value in stored.values())
    )
    assert any(not torch.equal(best[name], last[name]) for name in best)
