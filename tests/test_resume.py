"""A run that was killed, stopped, or met a full disk goes on and ends as if nothing had happened, to the last bit."""

import json
import os
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from faults import (
    BUSY,
    PHASES,
    SAVE_POINTS,
    again,
    assert_same,
    at_event,
    command_line,
    copy_until,
    dropout,
    few_rows,
    forget_position,
    forget_random_states,
    fresh,
    kill,
    kill_in_save,
    limit_file,
    limit_files,
    logs_of,
    rng,
    send,
    state_of,
)
from transformers import PreTrainedModel

import build
import trainers
from dpo.model.archives import load_archive
from dpo.reporting import trackers
from dpo.runs import checkpoints, run_dir
from dpo.settings import run_config
from dpo.system import errors
from dpo.system import threads as thread_check
from dpo.training.precomputation import Precomputation

DPO = (*BUSY, "loss=dpo", "keep_checkpoints=2")
SFT = (*BUSY, "loss=sft", "keep_checkpoints=2")
N_EVENTS = 6 + 4 + 4 + 7  # updates, evaluations, samplings, and calls of save in the busy run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a function that gives the folder of an uninterrupted run with dropout."""
    done = {}

    def run(settings: tuple[str, ...]) -> Path:
        if settings not in done:
            done[settings] = tmp_path_factory.mktemp("whole") / "run"
            result = command_line(done[settings], fresh(done[settings], *settings), dropout)
            assert result.returncode == 0, result.stderr
        return done[settings]

    return run


def resumed(folder: Path, *faults, overrides: tuple[str, ...] = ()):
    """Resume a run, with dropout as it was begun, and require that it ends well."""
    result = command_line(folder, again(folder, *overrides), dropout, *faults)
    assert result.returncode == 0, result.stderr[-2000:]
    return result


# Killed


@pytest.mark.parametrize("settings", [SFT, DPO], ids=["sft", "dpo"])
def test_a_run_that_is_killed_at_any_moment_ends_as_if_it_had_not_been(settings, whole, tmp_path, counts, report):
    draw, hit = rng(0), dict.fromkeys(PHASES, 0)
    for i in range(counts(small=5 if settings == DPO else 2, full=55)):  # the moments of both are the same
        folder, log = tmp_path / f"run{i}", tmp_path / "phase"
        moment = at_event(int(draw.randint(N_EVENTS)), kill, delay=float(draw.uniform(1e-4, 0.05)), log=log)
        saves = f"background_saves={i % 2 == 0}"
        killed = command_line(folder, fresh(folder, *settings, saves), dropout, moment)
        assert killed.returncode in (-signal.SIGKILL, 0)  # 0: the run was over before its end came
        hit[log.read_text()] += killed.returncode != 0
        resumed(folder)
        assert_same(folder, whole(settings))
    assert sum(hit.values())
    report(f"kill -9, {settings[-2]}: {sum(hit.values())} kills, {hit}; all resumed runs identical")


LORA = (*BUSY, "loss=dpo", "lora=default", "lora.r=4", "lora.dropout=0.2")


def test_a_lora_run_that_is_killed_ends_as_if_it_had_not_been_with_the_adapters_own_dropout(tmp_path, counts, report):
    def finish(folder: Path, arguments: tuple[str, ...], *faults) -> Path:
        result = command_line(folder, arguments, *faults)
        assert result.returncode == 0, result.stderr[-2000:]
        return folder

    whole = finish(tmp_path / "whole", fresh(tmp_path / "whole", *LORA))
    moments = counts(small=(8, 14), full=range(1, N_EVENTS))
    for moment in moments:
        folder = tmp_path / f"run{moment}"
        killed = command_line(folder, fresh(folder, *LORA), at_event(moment, kill, delay=0.003))
        assert killed.returncode == -signal.SIGKILL
        assert_same(finish(folder, again(folder)), whole)
    remembered, forgetful = (copy_until(whole, tmp_path / name, 24) for name in ("remembered", "forgetful"))
    assert_same(finish(remembered, again(remembered)), whole)
    with pytest.raises(AssertionError):
        assert_same(finish(forgetful, again(forgetful), forget_random_states), whole)
    report(f"kill -9, LoRA with dropout: {len(moments)} kills; all resumed runs identical")


@pytest.mark.parametrize("point", SAVE_POINTS)
def test_a_run_that_is_killed_in_a_save_ends_as_if_it_had_not_been(point, whole, tmp_path, counts):
    for nth in counts(small=(4,), full=(1, 2, 3, 4, 5, 6)):
        folder, saves = tmp_path / f"run{nth}", f"background_saves={(SAVE_POINTS.index(point) + nth) % 2 == 0}"
        killed = command_line(folder, fresh(folder, *DPO, saves), dropout, kill_in_save(point, nth))
        assert killed.returncode == -signal.SIGKILL
        found = run_config.list_checkpoints(folder)
        assert [checkpoints.find_corruption(checkpoint) for checkpoint in found] == [None] * len(found)
        assert not (folder / "LATEST").is_symlink() or (folder / "LATEST").resolve() in found
        resumed(folder)
        assert_same(folder, whole(DPO))
        assert not [path for path in folder.iterdir() if path.name.startswith((".staging", ".doomed"))]


@pytest.mark.parametrize("forget", [forget_random_states, forget_position])
def test_a_resume_that_forgets_something_is_caught_by_the_same_comparison(forget, whole, tmp_path):
    everything = (*DPO, "keep_checkpoints=null")
    for folder, faults in ((tmp_path / "whole", ()), (tmp_path / "forgetful", (forget,))):
        resumed(copy_until(whole(everything), folder, 24), *faults)
    assert_same(tmp_path / "whole", whole(everything))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "forgetful", whole(everything))


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_a_run_resumes_from_every_step_over_three_epochs(layout, cached, whole, tmp_path, counts, report):
    if cached != (layout == "padded") and counts(small=True, full=False):
        pytest.skip("in make soak")
    data = few_rows(tmp_path / "data", 26, 6)
    settings = (*BUSY, "loss=dpo", f"datasets=['{data}']", "n_examples=null", "n_epochs=3", f"layout={layout}")
    settings += (f"loss.precompute_reference={str(cached).lower()}", f"local_dirs=['{tmp_path}']")
    original = whole(settings)
    steps = [int(path.name.removeprefix("step-")) for path in run_config.list_checkpoints(original)]
    assert len(steps) == 9
    chosen = counts(small=(steps[1], steps[5]), full=steps)
    for step in chosen:
        folder = copy_until(original, tmp_path / f"from{step}", step)
        resumed(folder)
        assert_same(folder, original)
    report(f"resume from {len(chosen)} of 9 steps, {layout}, {'cached' if cached else 'live'} reference: identical")


def test_a_run_killed_before_its_first_checkpoint_begins_again(whole, tmp_path):
    folder = tmp_path / "run"
    assert command_line(folder, fresh(folder, *DPO), dropout, at_event(2, kill)).returncode == -signal.SIGKILL
    assert "holds no checkpoint yet, so the run starts over" in resumed(folder).stdout
    assert_same(folder, whole(DPO))


def test_a_run_killed_before_its_export_gives_the_export_and_no_record_twice(whole, tmp_path):
    def killed_export(self, metrics):
        kill()

    folder = tmp_path / "run"
    fault = lambda: setattr(trainers.BasicTrainer, "export", killed_export)  # noqa: E731
    assert command_line(folder, fresh(folder, *DPO), dropout, fault).returncode == -signal.SIGKILL
    assert (folder / "step-48").is_dir() and not (folder / "step-48" / "hf").exists()
    resumed(folder)
    assert_same(folder, whole(DPO))
    assert (folder / "LATEST" / "hf" / "model.safetensors").exists()


@pytest.mark.parametrize("end", ["killed", "jittered"])
def test_an_evaluation_that_is_made_again_never_spoils_its_checkpoint(end, whole, tmp_path):
    def jittered(self):
        return {name: value + 1e-8 for name, value in evaluate(self).items()}

    evaluate, folder = trainers.BasicTrainer.evaluate, tmp_path / "run"
    settings = (*DPO, "keep_checkpoints=1")
    no_export = lambda: setattr(trainers.BasicTrainer, "export", lambda self, metrics: kill())  # noqa: E731
    assert command_line(folder, fresh(folder, *settings), dropout, no_export).returncode == -signal.SIGKILL
    if end == "killed":
        faults = (lambda: setattr(checkpoints, "point_latest", count_to_kill(2)),)
    else:
        faults = (lambda: setattr(trainers.BasicTrainer, "evaluate", jittered), no_export)
    assert command_line(folder, again(folder), dropout, *faults).returncode == -signal.SIGKILL
    resumed(folder)
    assert_same(folder, whole(DPO))


def count_to_kill(n: int):
    """Return what point_latest becomes to be killed in its nth call."""
    point, left = checkpoints.point_latest, iter(range(n - 1, -1, -1))
    return lambda *args: point(*args) if next(left) else kill()


def test_the_metrics_of_an_evaluation_after_a_stop_are_added_whole(whole, tmp_path):
    folder = tmp_path / "run"
    assert command_line(folder, fresh(folder, *DPO), dropout, at_event(6, send(signal.SIGTERM))).returncode == 143
    assert not (folder / "step-16" / "metrics.json").exists()

    def full(folder, metrics):
        raise OSError(28, "No space left on device")

    fault = lambda: setattr(checkpoints, "write_metrics", full)  # noqa: E731
    assert command_line(folder, again(folder), dropout, fault).returncode == 4
    assert checkpoints.find_corruption(folder / "step-16") is None
    assert command_line(folder, again(folder), dropout, at_event(4, kill)).returncode == -signal.SIGKILL
    assert json.loads((folder / "step-16" / "metrics.json").read_text())["loss/eval"] > 0
    resumed(folder)
    assert_same(folder, whole(DPO))


def test_a_run_copied_by_a_tool_that_follows_links_resumes(whole, tmp_path):
    everything = (*DPO, "keep_checkpoints=null")
    folder = copy_until(whole(everything), tmp_path / "run", 24)
    (folder / "LATEST").unlink()
    shutil.copytree(folder / "step-24", folder / "LATEST")
    resumed(folder)
    assert_same(folder, whole(everything))


def test_a_run_directory_of_any_name_resumes_by_the_line_that_was_printed(tmp_path):
    folder = tmp_path / "lr=1 (höher), neu"
    stopped = command_line(folder, fresh(folder, *DPO), at_event(9, send(signal.SIGTERM)))
    (line,) = [line for line in stopped.stdout.splitlines() if line.startswith("To resume: python train.py ")]
    arguments = tuple(shlex.split(line.removeprefix("To resume: python train.py ")))
    assert arguments == (f"resume={folder}",)
    assert command_line(folder, arguments).returncode == 0


def test_a_resumed_run_can_be_killed_again(whole, tmp_path):
    folder = tmp_path / "run"
    assert command_line(folder, fresh(folder, *DPO), dropout, at_event(9, kill)).returncode == -signal.SIGKILL
    assert command_line(folder, again(folder), dropout, at_event(5, kill)).returncode == -signal.SIGKILL
    resumed(folder)
    assert_same(folder, whole(DPO))


# Stopped by a signal


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_stops_after_the_update_and_nothing_is_lost(name, code, whole, tmp_path, counts, report):
    draw, stopped = rng(1), 0
    for i in range(counts(small=2 if name == "SIGTERM" else 1, full=55 if name == "SIGTERM" else 10)):
        folder = tmp_path / f"run{i}"
        ask = send(getattr(signal, name))
        moment = at_event(int(draw.randint(N_EVENTS)), ask, delay=float(draw.uniform(1e-4, 0.05)))
        result = command_line(folder, fresh(folder, *DPO), dropout, moment)
        assert result.returncode in (code, 0), result.stderr
        if result.returncode:
            stopped += 1
            updates = max(record["updates"] for record in logs_of(folder)[0]) if logs_of(folder)[0] else 0
            found = checkpoints.newest_checkpoint(folder)
            assert (found[1]["run"]["counters"]["updates"] if found else 0) == updates
            assert f"To resume: python train.py resume={shlex.quote(str(folder))}" in result.stdout
        resumed(folder)
        assert_same(folder, whole(DPO))
    assert stopped
    report(f"{name}: {stopped} stops with exit code {code}, no completed update lost; all resumed runs identical")


def test_a_signal_that_was_ignored_from_the_start_stays_ignored(tmp_path):
    folder = tmp_path / "run"
    faults = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), at_event(6, send(signal.SIGHUP)))  # as under nohup
    assert command_line(folder, fresh(folder, *DPO), *faults).returncode == 0


def test_a_second_interrupt_stops_at_once(tmp_path):
    def twice() -> None:
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    folder = tmp_path / "run"
    result = command_line(folder, fresh(folder, *DPO), at_event(6, twice))  # as the evaluation after 16 examples begins
    assert result.returncode == 130 and "Traceback" not in result.stderr
    assert [path.name for path in run_config.list_checkpoints(folder)] == [
        "step-8"
    ]  # step-16 would come of a patient stop


def test_an_interrupt_after_another_signal_still_waits_and_a_second_one_does_not(tmp_path):
    def many() -> None:
        for name in ("SIGTERM", "SIGINT", "SIGINT"):
            send(getattr(signal, name))()

    folder = tmp_path / "run"
    assert command_line(folder, fresh(folder, *DPO), at_event(6, many)).returncode == 130
    assert [path.name for path in run_config.list_checkpoints(folder)] == ["step-8"]


@pytest.mark.parametrize("moment, code", [("evaluate", 143), ("export", 0)])
def test_a_signal_in_the_last_evaluation_stops_the_run_and_one_after_it_lets_it_end(moment, code, tmp_path):
    def interrupted(self, *args, **kwargs):
        if self.examples == 16:
            send(signal.SIGTERM)()
        return work(self, *args, **kwargs)

    work, folder = getattr(trainers.BasicTrainer, moment), tmp_path / "run"
    short = ("n_examples=16", "eval_every=1000", "save_every=null", "sample_during_eval=false", "do_first_eval=false")
    fault = lambda: setattr(trainers.BasicTrainer, moment, interrupted)  # noqa: E731
    result = command_line(folder, fresh(folder, *BUSY, "loss=dpo", *short), fault)
    assert result.returncode == code, result.stderr
    assert [path.name for path in run_config.list_checkpoints(folder)] == ["step-16"]
    assert (folder / "LATEST" / "hf" / "model.safetensors").exists() == (code == 0)
    assert ("To resume: python train.py resume=" in result.stdout) == (code == 143)


@pytest.mark.parametrize("phase", ["choose_layout", "precomputation"])
def test_a_signal_before_training_stops_at_once(phase, tmp_path):
    """In the check of the layout, or in the first of several batches of which a cached reference is computed."""
    owner, name = (build, phase) if phase == "choose_layout" else (Precomputation, "fill")
    work, calls = getattr(owner, name), tmp_path / "calls"

    def interrupted(*args, **kwargs):
        calls.write_text(calls.read_text() + name if calls.exists() else name)
        send(signal.SIGTERM)()
        return work(*args, **kwargs)

    folder = tmp_path / "run"
    cached = ("loss=dpo", "loss.precompute_reference=true", "sample_during_eval=false")
    settings = (*BUSY, *cached, f"local_dirs=['{tmp_path}']")
    result = command_line(folder, fresh(folder, *settings), lambda: setattr(owner, name, interrupted))
    assert result.returncode == 143 and "Traceback" not in result.stderr, result.stderr
    assert calls.read_text() == name and not list(tmp_path.rglob("*.pt"))


def test_sigusr1_saves_and_goes_on(whole, tmp_path):
    settings = (*DPO, "save_every=null", "eval_every=1000")
    folder = tmp_path / "run"
    result = command_line(folder, fresh(folder, *settings), dropout, at_event(4, send(signal.SIGUSR1)))
    assert result.returncode == 0
    assert [path.name for path in run_config.list_checkpoints(folder)] == ["step-48", "step-16"]
    assert_same(folder, whole(settings))


def test_sigusr1_before_training_begins_saves_after_the_first_update(tmp_path):
    settings = (*BUSY, "loss=sft", "save_every=null", "eval_every=1000", "n_examples=16", "do_first_eval=false")
    folder = tmp_path / "run"
    make = trainers.BasicTrainer.__init__

    def interrupted(self, *args, **kwargs) -> None:
        send(signal.SIGUSR1)()
        make(self, *args, **kwargs)

    fault = lambda: setattr(trainers.BasicTrainer, "__init__", interrupted)  # noqa: E731
    assert command_line(folder, fresh(folder, *settings), fault).returncode == 0
    assert [path.name for path in run_config.list_checkpoints(folder)] == ["step-16", "step-8"]


def test_a_stop_before_training_begins_needs_no_checkpoint(tmp_path):
    folder = tmp_path / "run"
    stop = lambda: setattr(trainers.BasicTrainer, "train", lambda self: send(signal.SIGTERM)())  # noqa: E731
    assert command_line(folder, fresh(folder, *DPO), stop).returncode == 143


# The newest checkpoint is damaged, or the disk full


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(whole, tmp_path):
    everything = (*DPO, "keep_checkpoints=null")
    folder = copy_until(whole(everything), tmp_path / "run", 32)
    with open(folder / "step-32" / "optimizer.pt", "r+b") as file:
        file.seek(1000)
        file.write(b"\x00\xff")
    result = resumed(folder)
    assert f"{folder / 'step-32'} is not used: optimizer.pt is damaged." in result.stdout
    assert (folder / "damaged-step-32").is_dir()
    assert_same(folder, whole(everything))


def test_with_no_valid_checkpoint_left_the_run_does_not_start_afresh(whole, tmp_path):
    folder = copy_until(whole((*DPO, "keep_checkpoints=null")), tmp_path / "run", 8)
    before = (folder / "metrics.jsonl").read_bytes()
    os.truncate(folder / "step-8" / "policy.pt", 100)
    result = command_line(folder, again(folder))
    assert result.returncode == 3 and result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    shutil.rmtree(folder / "step-8")
    assert command_line(folder, again(folder)).returncode == 3
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_no_flipped_bit_and_no_truncation_of_a_checkpoint_is_accepted(whole, tmp_path, report):
    folder = copy_until(whole((*DPO, "keep_checkpoints=null")), tmp_path / "run", 8) / "step-8"
    assert checkpoints.find_corruption(folder) is None
    files, draw = sorted(folder.iterdir()), rng(2)
    for i in range(1000):
        path = files[i % len(files)]
        content = path.read_bytes()
        at = int(draw.randint(len(content)))
        flipped = content[:at] + bytes([content[at] ^ (1 << draw.randint(8))]) + content[at + 1 :]
        path.write_bytes(flipped if draw.rand() < 0.7 else content[:at])
        assert checkpoints.find_corruption(folder) is not None, (path.name, at)
        path.write_bytes(content)
    assert checkpoints.find_corruption(folder) is None
    report("bit flips and truncations: 1,000, none accepted")


FULL = [("policy.pt", share) for share in (0.02, 0.3, 0.6, 0.95)]
FULL += [("optimizer.pt", 0.1), ("optimizer.pt", 0.9), ("scheduler.pt", 0.5), ("run.pt", 0.5), ("MANIFEST", 0.5)]
FULL += [("hf", 0.5)]


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so_in_one_line(whole, tmp_path, counts, report):
    chosen = counts(small=FULL[1::4], full=FULL)
    for name, share in chosen:
        folder, at = tmp_path / f"{name}{share}", 48 if name == "hf" else 24
        size = (whole(DPO) / "step-48" / ("hf/model.safetensors" if name == "hf" else name)).stat().st_size
        result = command_line(folder, fresh(folder, *DPO), dropout, limit_file(name, int(size * share), at))
        told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 4 and len(told) == 1 and "Traceback" not in result.stderr, result.stderr
        assert f"/{name}" in told[0].split(":")[1], told  # the file, or the export's folder
        assert not list(folder.rglob(".staging*"))
        assert run_config.list_checkpoints(folder)[0].name == ("step-48" if name == "hf" else "step-16")
        assert checkpoints.find_corruption((folder / "LATEST").resolve()) is None
        resumed(folder)
        assert_same(folder, whole(DPO))
    report(f"disk full at {len(chosen)} points of a save: exit code 4, one line, resumed from the checkpoint before")


def test_a_log_that_cannot_be_written_stops_the_run_in_one_line(tmp_path):
    folder = tmp_path / "run"
    result = command_line(folder, fresh(folder, *DPO), limit_files("train_step", 500, 8))
    assert (
        result.returncode == 4
        and f"error: {folder / 'metrics.jsonl'}: cannot be read or written (File too large)" in result.stderr
        and "Traceback" not in result.stderr
    )


# What a resumed run takes over, and what it refuses


def test_an_override_that_would_change_the_result_is_refused_by_name(whole, tmp_path):
    folder = copy_until(whole((*DPO, "keep_checkpoints=null")), tmp_path / "run", 8)
    before = (folder / "config.yaml").read_bytes()
    wrong = (
        "lr=1e-3",
        "loss=dpo",
        "lr=2e-3",
        "loss=sft",
        "model=gpt2",
        "batch_size=4",
        "n_examples=40",
        "sede=1",
        "seed=3",
        "+a=1",
    )
    result = command_line(folder, again(folder, *wrong))
    told = [line.removeprefix("error: ") for line in result.stderr.splitlines()]
    assert result.returncode == 2
    assert [line.split(":")[0] for line in told] == [
        "lr=0.002", "loss=sft", "model=gpt2", "batch_size=4", "n_examples=40", "sede", "seed=3", "a",
    ]  # fmt: skip
    assert "did you mean seed?" in told[5] and "a resumed run keeps lr=0.001" in told[0]
    assert (folder / "config.yaml").read_bytes() == before


def test_a_harmless_override_is_taken_and_recorded(whole, tmp_path):
    folder = copy_until(whole((*DPO, "keep_checkpoints=null")), tmp_path / "run", 24)
    resumed(folder, overrides=("keep_checkpoints=1", "n_examples=64", "sample_during_eval=false"))
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert (settings["keep_checkpoints"], settings["n_examples"], settings["sample_during_eval"]) == (1, 64, False)
    (line,) = map(json.loads, (folder / "resumed.jsonl").read_text().splitlines())
    assert line["from"] == "step-24"
    assert line["overrides"] == {"keep_checkpoints": 1, "n_examples": 64, "sample_during_eval": False}
    assert [path.name for path in run_config.list_checkpoints(folder)] == ["step-64"]
    assert logs_of(folder)[0][-1]["updates"] == 8
    longer = whole((*DPO, "n_examples=64"))
    assert state_of(folder) == state_of(longer)


def test_checkpoints_written_in_the_background_are_those_that_training_would_have_waited_for(whole, tmp_path):
    folder, expected = tmp_path / "run", whole((*DPO, "keep_checkpoints=null"))
    result = command_line(folder, fresh(folder, *DPO, "keep_checkpoints=null", "background_saves=true"), dropout)
    assert result.returncode == 0 and result.stdout.count(" s in the background\n") == 5
    for checkpoint in run_config.list_checkpoints(expected):
        states = [checkpoints.read_checkpoint(run / checkpoint.name) for run in (folder, expected)]
        for part in ("policy", "optimizer", "scheduler"):
            torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)
        assert str(states[0]["run"]["random"]) == str(states[1]["run"]["random"])
    assert_same(folder, expected)


def test_a_complete_run_is_left_as_it_is(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole(DPO), folder, symlinks=True)
    before = (folder / "metrics.jsonl").read_bytes()
    assert "the run is complete" in resumed(folder).stdout
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("what", ["train", "test", "settings"])
def test_other_data_or_settings_are_refused_and_change_nothing(what, tmp_path):
    data = few_rows(tmp_path / "data", 60, 8)
    folder = tmp_path / "run"
    settings = ("loss=dpo", "loss.precompute_reference=true", f"datasets=['{data}']", f"local_dirs=['{tmp_path}']")
    killed = command_line(folder, fresh(folder, *BUSY, *settings), at_event(9, kill))
    assert killed.returncode < 0
    if what == "settings":
        (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    else:
        lines = (data / f"{what}.jsonl").read_text().splitlines()
        (data / f"{what}.jsonl").write_text("\n".join([lines[0].replace(" the ", " that "), *lines[1:]]) + "\n")
    before = {name: (folder / name).read_bytes() for name in ("config.yaml", "metrics.jsonl", "reference.pt")}
    result = command_line(folder, again(folder, "n_examples=64"))
    named = {"train": "the training data", "test": "the evaluation data", "settings": "the settings"}[what]
    assert result.returncode == 2 and f"{named} have changed since the run began" in result.stderr
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert not (folder / "resumed.jsonl").exists()


def test_other_weights_of_the_reference_are_refused(tmp_path, whole):
    archive = tmp_path / "policy.pt"
    steps = run_config.list_checkpoints(whole((*DPO, "keep_checkpoints=null")))
    shutil.copy(steps[0] / "policy.pt", archive)
    folder = tmp_path / "run"
    settings = (*DPO, f"model.archive='{archive}'")
    assert command_line(folder, fresh(folder, *settings), at_event(9, kill)).returncode < 0
    shutil.copy(steps[2] / "policy.pt", archive)
    result = command_line(folder, again(folder))
    assert result.returncode == 2 and "the reference's weights have changed since the run began" in result.stderr


def threads(n: int, variable: str | None = None):
    """Compute with n threads, as OMP_NUM_THREADS would set them or as torch would choose them."""

    def install() -> None:
        os.environ.pop("MKL_NUM_THREADS", None)
        os.environ["OMP_NUM_THREADS"] = variable or ""
        torch.set_num_threads(n)

    return install


def test_a_resumed_run_computes_with_the_threads_of_before_its_stop(whole, tmp_path):
    expected = whole((*DPO, "keep_checkpoints=null"))
    folder = copy_until(expected, tmp_path / "run", 40)
    result = resumed(folder, threads(2))
    assert "Number of threads: 1, as before the stop" in result.stdout and "not be bit for bit" not in result.stdout
    assert_same(folder, expected)


def test_another_number_of_threads_that_the_environment_sets_is_said(whole, tmp_path):
    folder = copy_until(whole((*DPO, "keep_checkpoints=null")), tmp_path / "run", 40)
    result = resumed(folder, threads(2, variable="2"))
    assert "not be bit for bit" in result.stdout and "the number of threads was 1, is 2" in result.stdout


def test_a_run_whose_threads_are_timed_gives_the_numbers_of_one_whose_are_not(tmp_path):
    timed, plain = tmp_path / "timed", tmp_path / "plain"

    def always_advise() -> None:
        thread_check.RATIO = 0

    def never_time() -> None:
        thread_check.ROUNDS = 0

    short = (*DPO, "do_first_eval=false", "eval_every=48", "save_every=null", "sample_during_eval=false")
    one = command_line(timed, fresh(timed, *short), dropout, threads(2), always_advise)
    other = command_line(plain, fresh(plain, *short), dropout, threads(2), never_time)
    assert one.returncode == other.returncode == 0
    advised = "as fast as the 2 of this run"
    assert one.stdout.count(advised) == 1 and advised not in other.stdout
    assert_same(timed, plain)


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    result = command_line(tmp_path, again(tmp_path))
    assert result.returncode == 2 and "not a run directory" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_second_writer_is_refused(whole, tmp_path):
    folder = copy_until(whole((*DPO, "keep_checkpoints=null")), tmp_path / "run", 8)
    with run_dir.lock_run_dir(folder):
        result = command_line(folder, again(folder))
    assert result.returncode == 2 and "another process writes to this run" in result.stderr


# What is kept


def test_only_the_newest_checkpoints_and_the_policies_of_evaluations_are_kept(tmp_path):
    folder = tmp_path / "run"
    result = command_line(folder, fresh(folder, *BUSY, "loss=sft", "keep_checkpoints=1", "keep_policies=true"))
    assert result.returncode == 0
    assert [path.name for path in run_config.list_checkpoints(folder)] == ["step-48"]
    kept = sorted(path.name for path in (folder / "policies").iterdir())
    # Evaluations, not the saves at 8, 24 and 40.
    assert kept == ["step-16.json", "step-16.pt", "step-32.json", "step-32.pt"]
    assert torch.load(folder / "policies" / "step-16.pt")["metrics"]["loss/eval"] > 0
    assert load_archive(str(folder / "policies" / "step-16.pt"))


def test_a_checkpoint_can_be_checked_with_sha256sum(whole):
    folder = whole(DPO) / "step-48"
    lines = [line for line in (folder / "MANIFEST").read_text().splitlines() if not line.startswith("#")]
    assert {line.split("  ")[1] for line in lines} == {*(f"{name}.pt" for name in checkpoints.PARTS), "metrics.json"}
    assert os.system(f"cd '{folder}' && sha256sum --check --quiet MANIFEST 2>/dev/null") == 0
    assert os.system(f"cd '{folder}/hf' && sha256sum --check --quiet MANIFEST 2>/dev/null") == 0


# Numbers that are not finite, and a lack of memory


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_update(position, where, make_trainer):
    trainer = make_trainer("loss=dpo", "gradient_accumulation_steps=4")
    before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
    losses, calls = trainer.losses, iter(range(100))

    def broken(layout, metrics, sums):
        values = losses(layout, metrics, sums)
        if next(calls) != position:
            return values
        if where == "loss":
            metrics.values["loss"][-1] = metrics.values["loss"][-1] * torch.nan
            return values * torch.nan
        values.register_hook(lambda gradient: gradient * torch.inf)
        return values

    trainer.losses = broken
    batch = next(iter(trainer.train_batches))
    with pytest.raises(errors.RunError, match="update 1 is not finite") as stop:
        trainer.train_step(batch)
    assert stop.value.exit_code == 5
    assert all(torch.equal(value, before[name]) for name, value in trainer.policy.state_dict().items())
    assert trainer.updates == 0 and not trainer.optimizer.state and not run_config.list_checkpoints(trainer.run.path)
    rows = [json.loads(line) for line in (trainer.run.path / "not-finite-update-1.jsonl").read_text().splitlines()]
    assert {row["row"] for row in rows} == {example.text.row for example in batch.examples}
    assert all(row["prompt"] and len(row["responses"]) == 2 and "logps/chosen" in row for row in rows)
    assert sum(row["loss"] == "nan" for row in rows) == (2 if where == "loss" else 0)


def test_a_run_that_meets_a_number_that_is_not_finite_ends_with_exit_code_5(tmp_path):
    folder = tmp_path / "run"
    result = command_line(
        folder, fresh(folder, *DPO, "lr=1e38", "warmup_steps=0", "optimizer=SGD", "max_grad_norm=1e30")
    )
    assert result.returncode == 5 and len(result.stderr.splitlines()) == 1, result.stderr
    assert (folder / "not-finite-update-2.jsonl").exists() and "nan" not in (folder / "metrics.jsonl").read_text()


def test_an_evaluation_that_is_not_finite_saves_nothing(tmp_path):
    def spoilt(self):
        if self.examples == 32:
            next(self.policy.parameters()).data.fill_(torch.nan)
        return evaluate(self)

    evaluate, folder = trainers.BasicTrainer.evaluate, tmp_path / "run"
    result = command_line(folder, fresh(folder, *DPO), lambda: setattr(trainers.BasicTrainer, "evaluate", spoilt))
    assert result.returncode == 5 and len(result.stderr.splitlines()) == 1
    assert "the evaluation after 32 examples gave a loss of nan" in result.stderr
    assert [path.name for path in run_config.list_checkpoints(folder)] == ["step-24", "step-16"]


@pytest.mark.parametrize("n, key", [(8, "max_tokens_per_pass, which is 768"), (1, "max_length in a new run")])
def test_a_lack_of_memory_is_one_line_that_names_the_key_to_lower(n, key, tmp_path):
    def greedy(self, layout, metrics, sums):
        torch.empty(10**16)

    folder = tmp_path / "run"
    fault = lambda: setattr(trainers.BasicTrainer, "losses", greedy)  # noqa: E731
    result = command_line(folder, fresh(folder, *DPO, f"batch_size={n}", f"eval_batch_size={n}"), fault)
    assert result.returncode == 6 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"{n} examples, the longest of" in line and f"lower {key}" in line and "tokens" in line


def test_a_lack_of_memory_while_the_model_loads_is_one_line(tmp_path):
    fault = lambda: setattr(PreTrainedModel, "to", lambda self, device: torch.empty(10**16))  # noqa: E731
    result = command_line(tmp_path / "run", fresh(tmp_path / "run", *DPO), fault)
    assert result.returncode == 6 and len(result.stderr.splitlines()) == 1, result.stderr


def test_a_failure_that_is_not_of_memory_is_no_message_about_memory(tmp_path):
    def broken(self, layout, metrics, sums):
        raise RuntimeError("an illegal memory access was encountered")

    folder = tmp_path / "run"
    fault = lambda: setattr(trainers.BasicTrainer, "losses", broken)  # noqa: E731
    result = command_line(folder, fresh(folder, *DPO), fault)
    assert result.returncode == 1 and "illegal memory access" in result.stderr


# Wandb


def test_a_resumed_run_keeps_its_wandb_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = trackers.WandbTracker(tmp_path, {"project": "p"})
    first.log({"loss": 1.0}, 1)
    first.finish()
    time.sleep(1.1)  # wandb names its folders by the second
    second = trackers.WandbTracker(tmp_path, {"project": "p"})
    told = trackers.wandb_folders(tmp_path)
    second.finish()
    assert len(told) == 2 and len({folder.name.rsplit("-", 1)[1] for folder in told}) == 1


def test_wandb_that_fails_in_the_middle_changes_nothing(whole, tmp_path):
    def fail() -> None:
        import wandb

        run = type("Run", (), {"log": lambda *a, **k: 1 / 0, "finish": lambda *a: 1 / 0})()
        run.settings = type("Settings", (), {"sync_dir": str(tmp_path)})()
        wandb.init = lambda **settings: run

    folder = tmp_path / "run"
    settings = tuple(setting for setting in DPO if not setting.startswith("wandb"))
    result = command_line(folder, fresh(folder, *settings, "wandb.enabled=true"), dropout, fail)
    assert result.returncode == 0 and "wandb: switched off after ZeroDivisionError" in result.stdout
    assert_same(folder, whole(DPO))


# Secrets


def test_an_environment_interpolation_stays_unresolved_where_it_is_shown_or_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    folder = tmp_path / "run"
    result = command_line(folder, fresh(folder, *DPO, "wandb.entity=${oc.env:SECRET}"))
    assert result.returncode == 0
    kept = "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())
    for text in (result.stdout, result.stderr, kept):
        assert "hunter2" not in text and "k" * 40 not in text
    assert "${oc.env:SECRET}" in (folder / "config.yaml").read_text()
