"""Files are written whole or not at all."""

import errno
import hashlib
import json
import os
import re
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dpo.runs.checkpoints import (
    INDEX,
    PARTS,
    clear_leftovers,
    find_corruption,
    newest_checkpoint,
    read_checkpoint,
    read_metrics,
    save_checkpoint,
)
from dpo.runs.export import export_model
from dpo.system.errors import EXIT_CODES, RunError
from dpo.system.files import atomic_dir, atomic_write


def tiny(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, 20))


def test_latest_leads_to_the_newest_checkpoint(tmp_path):
    for step in (4, 8):
        save_checkpoint(tmp_path, step, dict.fromkeys(PARTS, {}) | {"policy": {"w": torch.tensor(float(step))}}, {})
    assert torch.load(tmp_path / "LATEST" / "policy.pt")["state"]["w"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-4", "step-8"]


STATES = dict.fromkeys(PARTS, {})


def to_full_disk(path):
    path.symlink_to("/dev/full")
    path.write_bytes(b"x")


def torch_fails(path):
    path.write_bytes(b"half of it")
    raise RuntimeError("unexpected pos 64 vs 0")


def fail(error):
    raise error


def disk_full(*_, **__):
    fail(OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.parametrize("write", [to_full_disk, torch_fails, disk_full])
def test_a_file_that_cannot_be_written_stays_as_it_was_and_is_named(write, tmp_path):
    path = tmp_path / "config.yaml"
    atomic_write(path, b"before")
    with pytest.raises(OSError) as failure:
        atomic_write(path, write)
    assert failure.value.filename == str(path)
    assert path.read_bytes() == b"before" and [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    atomic_write(path, lambda staging: staging.write_bytes(b"after"))
    assert path.read_bytes() == b"after"


@pytest.mark.parametrize("name", PARTS)
def test_a_full_disk_names_the_part_of_a_checkpoint(name, tmp_path, monkeypatch):
    save = torch.save
    monkeypatch.setattr(
        torch, "save", lambda value, path: torch_fails(path) if path.stem == name else save(value, path)
    )
    with pytest.raises(RunError) as failure:
        save_checkpoint(tmp_path, 8, STATES, {})
    assert str(failure.value).startswith(
        f"{tmp_path / 'step-8' / name}.pt: cannot be written (unexpected pos 64 vs 0; "
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["optimizer.pt", "MANIFEST"])
def test_a_disk_that_is_full_only_when_a_file_is_flushed_names_it_too(name, tmp_path, monkeypatch):
    fsync = os.fsync

    def flush(descriptor):
        return disk_full() if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name) else fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(RunError) as failure:
        save_checkpoint(tmp_path, 8, STATES, {})
    reason = "cannot be written (No space left on device); earlier checkpoints are intact"
    assert str(failure.value) == f"{tmp_path}/step-8/{name}: {reason}"
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_the_disk_does_not_take_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(RunError, match=re.escape(f"{tmp_path}/step-8/MANIFEST: cannot be written (No space left")):
        save_checkpoint(tmp_path, 8, STATES, {})


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(tmp_path):
    with pytest.raises(RunError) as failure:
        save_checkpoint(tmp_path / "gone", 8, STATES, {})
    assert str(failure.value).startswith(f"{tmp_path}/gone/step-8: cannot be written (")
    with pytest.raises(RunError, match=re.escape(f"{tmp_path}/hf: cannot be written (unexpected pos 64 vs 0); ")):
        atomic_dir(tmp_path / "hf", lambda folder: torch_fails(folder / "model.safetensors"))


def test_a_lack_of_memory_is_no_failure_of_the_disk(tmp_path, monkeypatch):
    saved(tmp_path, 4)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, lambda *_, **__: fail(RuntimeError("can't allocate memory")))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        save_checkpoint(tmp_path, 8, STATES, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-4"]
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        read_checkpoint(tmp_path / "step-4")


def test_a_checkpoint_holds_step_state_and_metrics_and_those_of_an_evaluation_may_come_later(tmp_path):
    def metrics():
        return json.loads((folder / "metrics.json").read_text())

    (tmp_path / ".staging-step-4").mkdir()  # what a killed process left
    folder = save_checkpoint(tmp_path, 4, STATES | {"policy": {"w": 2}}, {"loss/eval": 1.5})
    assert torch.load(folder / "policy.pt") == {"step_idx": 4, "state": {"w": 2}, "metrics": {"loss/eval": 1.5}}
    assert metrics() == {"loss/eval": 1.5} and find_corruption(folder) is None
    for _ in range(2):
        folder = save_checkpoint(tmp_path, 8, STATES, {})
        assert not (folder / "metrics.json").exists()
    for loss in (2.5, 3.5):  # the file is not written a second time
        assert save_checkpoint(tmp_path, 8, STATES, {"loss/eval": loss}) == folder
        assert metrics() == {"loss/eval": 2.5} and find_corruption(folder) is None


@pytest.mark.parametrize("has_links", [True, False])
def test_weights_of_evaluations_are_kept_only_if_asked_for(has_links, tmp_path, monkeypatch):
    """Of steps 4 to 12 the newest checkpoint stays; an evaluation was made at 4 and 8, and 12 is the newest."""
    if not has_links:
        monkeypatch.setattr(os, "link", disk_full)
    for name, options in (("kept", {"keep_policies": True}), ("removed", {})):
        (tmp_path / name).mkdir()
        for step, metrics in ((2, {}), (4, {"loss/eval": 4.0}), (8, {"loss/eval": 8.0}), (12, {})):
            save_checkpoint(tmp_path / name, step, STATES | {"policy": {"w": step}}, metrics, keep=1, **options)
    assert sorted(path.name for path in (tmp_path / "removed").iterdir()) == ["LATEST", "step-12"]
    policies = tmp_path / "kept" / "policies"
    names = ["step-4.json", "step-4.pt", "step-8.json", "step-8.pt"]
    assert sorted(path.name for path in policies.iterdir()) == names
    for step in (4, 8):
        assert torch.load(policies / f"step-{step}.pt")["state"] == {"w": step}
        assert json.loads((policies / f"step-{step}.json").read_text()) == {"loss/eval": step}


def test_a_checkpoint_that_cannot_be_removed_is_named_and_stops_nothing(tmp_path, monkeypatch, capsys):
    saved(tmp_path, 4)
    monkeypatch.setattr(Path, "rename", lambda path, to: disk_full() if path.name == "step-4" else os.rename(path, to))
    save_checkpoint(tmp_path, 8, STATES, {}, keep=1)
    assert f"{tmp_path}/step-4: cannot be removed (No space left on device)" in capsys.readouterr().out
    assert (tmp_path / "LATEST").resolve() == tmp_path / "step-8"


def test_a_copy_of_a_checkpoint_in_the_place_of_latest_is_set_aside(tmp_path):
    """As by a tool that copies what a link leads to."""
    for step in (4, 8):
        saved(tmp_path, step)
        (tmp_path / "LATEST").unlink()
        shutil.copytree(tmp_path / f"step-{step}", tmp_path / "LATEST")
    saved(tmp_path, 12)
    assert (tmp_path / "LATEST").is_symlink() and (tmp_path / "LATEST").resolve() == tmp_path / "step-12"
    copies = [torch.load(tmp_path / name / "policy.pt")["state"]["w"] for name in ("LATEST-copied", "LATEST-copied-2")]
    assert copies == [4, 8]


class Killed(BaseException):
    """In place of the end of the process."""


def killed_at(n, function):
    """A function that ends the process in its n-th call."""
    calls = count(1)
    return lambda *args, **kwargs: fail(Killed()) if next(calls) == n else function(*args, **kwargs)


@pytest.mark.parametrize("module, name", [(os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")])
def test_a_save_that_ends_at_any_moment_leaves_whole_files_and_nothing_else_after_the_clearing(
    module, name, tmp_path, monkeypatch
):
    function = getattr(module, name)
    for n in range(1, 30):
        folder = tmp_path / f"{n}"
        folder.mkdir()
        save_checkpoint(folder, 4, STATES, {"loss/eval": 1.0})
        with monkeypatch.context() as patched:
            patched.setattr(module, name, killed_at(n, function))
            try:
                save_checkpoint(folder, 8, STATES, {"loss/eval": 1.0}, keep=1, keep_policies=True)
                break
            except Killed:
                pass
        clear_leftovers(folder)
        names = {path.name for path in folder.iterdir()}
        assert {"LATEST"} < names <= {"LATEST", "step-4", "step-8", "policies"}
        assert list(folder.rglob(".*")) == []
        assert all(find_corruption(folder / step) is None for step in names & {"step-4", "step-8"})
        assert find_corruption(folder / "LATEST") is None
        assert "step-4" in names or len(list((folder / "policies").iterdir())) == 2
    assert n > 1


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_readable_as_the_umask_says(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path, 4, STATES, {"loss/eval": 1.0})
        save_checkpoint(tmp_path, 8, STATES, {}, keep=1, keep_policies=True)
        export_model(tmp_path / "hf", tiny("gpt2"), tiny_tokenizer("gpt2"))
    finally:
        assert os.umask(before) == umask
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 10 and {path.name for path in files} >= {"policy.pt", "step-4.pt", "model.safetensors"}
    assert {path.name: path.stat().st_mode & 0o777 for path in files if path.stat().st_mode & 0o777 != mode} == {}


# Finding and verifying


def sharded(folder, digests):
    """Write checkpoint 4 of a run whose tensors are in a shard and its index."""
    shards = folder / ".staging-shards"
    shards.mkdir()
    (shards / INDEX).write_text("index")
    (shards / "__0_0.distcp").write_text("tensors")
    states = {"scheduler": {"a": 1}, "run": {"b": 2}, "shards": shards, "digests": digests}
    return save_checkpoint(folder, 4, states, {})


def saved(folder, *steps):
    """Write a checkpoint per step, whose policy holds the step's number, and return the run directory."""
    for step in steps:
        save_checkpoint(folder, step, STATES | {"policy": {"w": torch.tensor(float(step))}}, {})
    return folder


def flip(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def relist(folder, *names):
    """Write a manifest with a right checksum of its own that lists these files."""
    lines = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    (folder / "MANIFEST").write_text(f"{lines}# {hashlib.sha256(lines.encode()).hexdigest()}\n")


def replace_by_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


CORRUPTIONS = {
    "MANIFEST cannot be read (FileNotFoundError)": lambda folder: (folder / "MANIFEST").unlink(),
    "MANIFEST cannot be read (UnicodeDecodeError)": lambda folder: (folder / "MANIFEST").write_bytes(b"\xff"),
    "MANIFEST is damaged": lambda folder: flip(folder / "MANIFEST"),
    "MANIFEST lists nothing": lambda folder: relist(folder),
    "MANIFEST lists optimizer.pt, policy.pt, run.pt": lambda folder: relist(
        folder, "policy.pt", "optimizer.pt", "run.pt"
    ),
    "MANIFEST lists run.pt, scheduler.pt": lambda folder: relist(folder, "run.pt", "scheduler.pt"),
    "run.pt is missing": lambda folder: (folder / "run.pt").unlink(),
    "policy.pt is missing": lambda folder: replace_by_link(folder / "policy.pt"),
    "scheduler.pt is damaged": lambda folder: flip(folder / "scheduler.pt"),
}


@pytest.mark.parametrize("problem", CORRUPTIONS)
def test_a_corrupt_checkpoint_says_what_is_wrong_with_it(problem, tmp_path):
    folder = saved(tmp_path, 4) / "step-4"
    assert find_corruption(folder) is None
    CORRUPTIONS[problem](folder)
    assert find_corruption(folder) == problem
    assert read_checkpoint(folder) == problem


def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path):
    folder = saved(tmp_path, 4) / "step-4"
    (tmp_path / "secret").write_text("x")
    relist(folder, *(f"{name}.pt" for name in PARTS), "../secret")
    assert find_corruption(folder).startswith("MANIFEST lists ../secret, ")


def test_a_checkpoint_that_is_whole_but_no_tensors_is_refused(tmp_path):
    folder = saved(tmp_path, 4) / "step-4"
    torch.save({"state": find_corruption}, folder / "policy.pt")  # a function, which weights_only refuses
    relist(folder, *(f"{name}.pt" for name in PARTS))
    assert find_corruption(folder) is None
    assert read_checkpoint(folder).startswith("it cannot be read (Weights only load failed")


def test_a_checkpoint_in_shards_is_their_folder_and_the_state_of_the_other_parts(tmp_path):
    for _ in range(2):  # the second time the step is there already
        folder = sharded(tmp_path, {})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-4"]
        assert read_checkpoint(folder) == {"scheduler": {"a": 1}, "run": {"b": 2}, "shards": folder}
    assert (folder / "__0_0.distcp").read_text() == "tensors"


def test_a_shard_that_changed_after_its_rank_wrote_it_is_damaged(tmp_path):
    folder = sharded(tmp_path, {"__0_0.distcp": hashlib.sha256(b"what the rank wrote").hexdigest()})
    assert read_checkpoint(folder) == "__0_0.distcp is damaged"


def test_the_newest_checkpoint_that_is_whole_is_used_and_damaged_ones_set_aside(tmp_path, capsys):
    saved(tmp_path, 4, 8, 16, 100)
    (tmp_path / "damaged-step-16").mkdir()
    for step in (16, 100):
        (tmp_path / f"step-{step}" / "run.pt").unlink()
    folder, states = newest_checkpoint(tmp_path)
    assert folder == tmp_path / "step-8" and states["policy"]["w"] == 8 and set(states) == set(PARTS)
    names = ["LATEST", "damaged-step-100", "damaged-step-16", "damaged-step-16-2", "step-4", "step-8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "LATEST").resolve() == folder
    assert f"{tmp_path}/step-100 is not used: run.pt is missing." in capsys.readouterr().out


def test_a_run_without_any_checkpoint_begins_again_and_one_that_lost_all_is_refused(tmp_path):
    (tmp_path / "step-9-of-mine").mkdir()
    (tmp_path / "step-9").write_text("no folder")
    assert newest_checkpoint(tmp_path) is None
    (saved(tmp_path, 4) / "step-4" / "run.pt").unlink()
    for _ in range(2):  # the second time, with the checkpoint gone
        with pytest.raises(RunError, match="no valid checkpoint is left to resume from") as refusal:
            newest_checkpoint(tmp_path)
        assert refusal.value.exit_code == EXIT_CODES["no checkpoint"]
        shutil.rmtree(tmp_path / "step-4", ignore_errors=True)
    (tmp_path / "LATEST").unlink()
    (tmp_path / "damaged-step-4").mkdir()
    with pytest.raises(RunError, match="no valid checkpoint"):
        newest_checkpoint(tmp_path)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    saved(tmp_path, 4)
    (tmp_path / "policies").mkdir()
    kept = sorted(tmp_path.rglob("*"))
    for name in (".staging-step-8", ".doomed-step-4", "step-4/.staging-hf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("x")
    (tmp_path / "policies" / ".staging-step-4.pt").write_text("x")
    (tmp_path / ".staging-LATEST").symlink_to("step-4")
    clear_leftovers(tmp_path)
    assert sorted(tmp_path.rglob("*")) == kept
    assert find_corruption(tmp_path / "step-4") is None


@pytest.mark.parametrize("text", ["", "[1]", "null", '{"loss/eval": "x"}', "{"])
def test_metrics_of_a_form_that_no_run_writes_are_none(text, tmp_path):
    (tmp_path / "metrics.json").write_text(text)
    assert read_metrics(tmp_path) == {}
    (tmp_path / "metrics.json").write_text('{"loss/eval": 0.5}')
    assert read_metrics(tmp_path) == {"loss/eval": 0.5}
