"""Files are written whole or not at all."""

import hashlib
import os
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dpo.checkpoints import (
    PARTS,
    atomic_write,
    clear_leftovers,
    find_corruption,
    newest_checkpoint,
    random_states,
    read_checkpoint,
    save_checkpoint,
    set_random_states,
)
from dpo.errors import EXIT_CODES, RunError
from dpo.export import export_model


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


@pytest.mark.parametrize("write", [to_full_disk, torch_fails])
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
    assert read_checkpoint(folder).startswith("it cannot be read (")


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


def test_random_states_come_back_from_a_checkpoint_in_all_generators(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    before = random_states()
    torch.save({"state": before}, tmp_path / "states.pt")
    drawn = [draw() for _ in range(2)]
    assert len(set(drawn)) == 2
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True)["state"])
    assert [draw() for _ in range(2)] == drawn
