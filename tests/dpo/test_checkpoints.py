"""Files are written whole or not at all."""

import os

import pytest
import torch
from conftest import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dpo.checkpoints import PARTS, atomic_write, save_checkpoint
from dpo.errors import RunError
from dpo.export import export_model


def tiny(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, 20))


def archive_of(state, tmp_path):
    torch.save({"step_idx": 1, "state": state, "metrics": {"loss/eval": 1.0}}, tmp_path / "policy.pt")
    return str(tmp_path / "policy.pt")


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
