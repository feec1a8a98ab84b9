"""Checkpoints that are written in the background: of the state when they were asked for, one at a time."""

import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, validated

from dpo.distributed.ranks import ALONE
from dpo.runs import writer as writer_module
from dpo.runs.checkpoints import PARTS, read_checkpoint
from dpo.runs.writer import CheckpointWriter
from dpo.system import state
from dpo.system.errors import RunError, Stopped


@pytest.fixture
def writer(tmp_path):
    """A writer that saves into tmp_path in the background."""
    return CheckpointWriter(tmp_path, ALONE, validated(*TINY, "loss=dpo", "background_saves=true")[0])


@pytest.fixture
def gate(monkeypatch):
    """An event that a save in the background waits for."""
    event, save = threading.Event(), writer_module.save_checkpoint
    monkeypatch.setattr(writer_module, "save_checkpoint", lambda *args: event.wait(60) and save(*args))
    return event


def states(value: float) -> dict:
    """States of all parts, one with a value."""
    return dict.fromkeys(PARTS, {}) | {"policy": {"w": torch.tensor([value])}}


def test_a_checkpoint_holds_the_state_of_when_it_was_asked_for(writer, gate, tmp_path, capsys):
    live = states(1.0)
    writer.write(8, live, {})
    live["policy"]["w"] += 1
    assert not (tmp_path / "step-8").exists()
    gate.set()
    writer.wait()
    assert read_checkpoint(tmp_path / "step-8")["policy"]["w"] == 1.0
    assert f"Wrote {tmp_path / 'step-8'} in " in (out := capsys.readouterr().out) and " s in the background" in out


def test_the_next_checkpoint_waits_for_the_one_before_also_where_training_waits_for_it(writer, gate, tmp_path):
    writer.write(8, states(1.0), {})
    threading.Timer(0.2, gate.set).start()
    writer.write(16, states(2.0), {}, blocking=True)
    assert [(tmp_path / name / "policy.pt").is_file() for name in ("step-8", "step-16", "LATEST")] == [True] * 3
    assert (tmp_path / "LATEST").resolve().name == "step-16"


@pytest.mark.parametrize("in_background, blocking", [(False, False), (True, True)])
def test_a_checkpoint_that_training_waits_for_is_written_from_no_copy(in_background, blocking, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "copy_to_host", lambda *args: pytest.fail("a copy was made"))
    settings = validated(*TINY, "loss=dpo", f"background_saves={in_background}")[0]
    writer = CheckpointWriter(tmp_path, ALONE, settings)
    writer.write(8, states(1.0), {}, blocking=blocking)
    assert writer.thread is None and (tmp_path / "LATEST" / "policy.pt").is_file()


def test_what_is_kept_is_what_the_settings_name(tmp_path):
    for n, policies in ((None, False), (2, True)):
        kept = (f"keep_checkpoints={'null' if n is None else n}", f"keep_policies={policies}")
        assert CheckpointWriter(tmp_path, ALONE, validated(*TINY, "loss=dpo", *kept)[0]).keep == (n, policies)


def fail(*args):
    raise RunError("the disk is full", "disk")


def test_a_failure_in_the_background_ends_the_training_at_its_next_update(writer, monkeypatch):
    monkeypatch.setattr(writer_module, "save_checkpoint", fail)
    writer.write(8, states(1.0), {})
    writer.thread.join()
    with pytest.raises(RunError, match="the disk is full"):
        writer.check()
    writer.check()  # raised once


def test_the_end_of_a_training_waits_and_fails_with_the_save(writer, monkeypatch):
    monkeypatch.setattr(writer_module, "save_checkpoint", fail)
    with pytest.raises(RunError, match="the disk is full"), writer:
        writer.write(8, states(1.0), {})


def test_a_training_that_fails_still_gets_its_checkpoint_and_names_its_own_failure(writer, gate, tmp_path):
    threading.Timer(0.2, gate.set).start()
    with pytest.raises(RunError, match="the loss is nan"), writer:
        writer.write(8, states(1.0), {})
        raise RunError("the loss is nan", "not finite")
    assert (tmp_path / "LATEST" / "policy.pt").is_file()


def test_a_training_that_is_stopped_fails_with_its_checkpoint(writer, monkeypatch):
    monkeypatch.setattr(writer_module, "save_checkpoint", fail)
    with pytest.raises(RunError, match="the disk is full"), writer:
        writer.write(8, states(1.0), {})
        raise Stopped("SIGTERM")


def test_a_rank_that_fails_does_not_wait_for_long(writer, gate, monkeypatch):
    monkeypatch.setattr(writer_module, "FAILURE_TIMEOUT", 0.1)
    writer.ranks = SimpleNamespace(world_size=2, run_on_main=lambda work: work())
    with pytest.raises(ValueError, match="mine"), writer:
        writer.write(8, states(1.0), {})
        thread = writer.thread
        raise ValueError("mine")
    assert thread.is_alive()
    gate.set()


def test_a_second_interrupt_ends_the_process_at_once(writer, gate, monkeypatch):
    codes = []
    monkeypatch.setattr(writer_module.os, "_exit", codes.append)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.write(8, states(1.0), {})
        raise KeyboardInterrupt
    assert codes == [130] and writer.thread.is_alive()
    gate.set()
