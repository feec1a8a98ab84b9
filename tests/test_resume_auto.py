"""resume=auto: the same command starts a run, continues it, and says when there is nothing left to do."""

import signal
from pathlib import Path

import pytest
from faults import BUSY, assert_same, at_event, command_line, kill, send
from ranks import command_lines

from dpo.settings.run_config import list_checkpoints, read_run_config

RUN = (*BUSY, "loss=dpo", "n_examples=24", "sample_during_eval=false", "do_first_eval=false", "report=false")


def command(folder, *overrides):
    return (*RUN, f"local_run_dir='{folder}'", "resume=auto", *overrides)


def run(folder, *overrides, faults=(), code=0):
    result = command_line(folder, command(folder, *overrides), *faults)
    assert result.returncode == code, result.stdout[-2000:] + result.stderr
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


@pytest.mark.parametrize("moment, fault, code", [(5, kill, -signal.SIGKILL), (5, send(signal.SIGTERM), 143)])
def test_the_same_command_starts_continues_and_ends_a_run(moment, fault, code, whole, tmp_path):
    folder = tmp_path / "run"
    run(folder, faults=[at_event(moment, fault)], code=code)
    assert list_checkpoints(folder)
    assert f"resume=auto: {folder} holds a run, which continues." in run(folder).stdout
    assert_same(folder, whole)
    before = (folder / "metrics.jsonl").read_bytes()
    assert "the run is complete" in run(folder).stdout
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_directory_that_was_only_created_or_has_no_checkpoint_yet_begins_a_run(whole, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".staging-config.yaml.123").touch()
    run(folder, faults=[at_event(0, kill)], code=-signal.SIGKILL)
    assert (folder / "config.yaml").exists() and not list_checkpoints(folder)
    run(folder)
    assert_same(folder, whole)


def test_other_settings_are_refused_all_at_once_and_those_that_may_change_are_taken(whole, tmp_path):
    folder = tmp_path / "run"
    run(folder, faults=[at_event(5, kill)], code=-signal.SIGKILL)
    shorter = tuple(argument for argument in command(folder, "loss.beta=0.3") if argument != "lr=1e-3")
    refused = command_line(folder, shorter)
    assert refused.returncode == 2
    lines = refused.stderr.splitlines()  # what the command leaves out is the default, 5e-7
    assert [line.partition(";")[0] for line in lines] == [
        "error: loss.beta=0.3: a resumed run keeps loss.beta=0.1",
        "error: lr=5e-07: a resumed run keeps lr=0.001",
    ]
    for other in (("loss=ipo",), ("lora=default",)):
        refused = run(folder, *other, code=2).stderr
        assert len(refused.splitlines()) == 1 and "a resumed run keeps" in refused
    run(folder, "keep_checkpoints=1")
    assert read_run_config(folder).keep_checkpoints == 1
    assert_same(folder, whole)


def test_the_run_directory_must_be_given_and_be_the_same_every_time(tmp_path):
    for place in ((), (f"local_run_dir={tmp_path}/${{now:%H}}",)):
        result = command_line(tmp_path, (*RUN, *place, "resume=auto"))
        assert result.returncode == 2
        assert (
            result.stderr
            == "error: resume=auto: needs the same run directory at every start; set local_run_dir=FOLDER\n"
        )


def test_a_run_directory_is_named_once(tmp_path):
    result = command_line(tmp_path, (*command(tmp_path / "run"), "resume=runs/other"))
    assert result.returncode == 2
    assert result.stderr == "error: resume=auto resume=runs/other: one of them is enough; leave the other out\n"


def test_a_sweep_cannot_be_continued_so(tmp_path):
    result = command_line(tmp_path, ("-m", *command(tmp_path / "run", "lr=1e-3,1e-4")))
    assert result.returncode == 2 and result.stderr.startswith("error: -m: resume=RUN continues one run")


def test_without_it_the_same_command_names_the_one_that_continues_the_run_before_anything_loads(whole):
    plain = tuple(argument for argument in command(whole) if argument != "resume=auto")
    result = command_line(whole, plain)
    assert result.returncode == 2 and result.stdout == ""
    assert f"holds another run; to continue it: python train.py resume={whole} (or " in result.stderr


def test_several_processes_decide_alike(tmp_path):
    folder = tmp_path / "run"
    sharded = command(folder, "trainer=FSDPTrainer")
    faults = {rank: [at_event(3, kill)] for rank in range(2)}
    assert any(one.returncode for one in command_lines(folder, sharded, 2, faults))
    assert list_checkpoints(folder)
    for said in ("Done: 24 examples in 3 updates", "the run is complete"):
        done = command_lines(folder, sharded, 2)
        assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
        assert said in done[0].stdout


def test_processes_that_do_not_see_the_same_run_are_refused(tmp_path):
    def not_there():
        is_file = Path.is_file
        Path.is_file = lambda self: self.name != "config.yaml" and is_file(self)

    folder = tmp_path / "run"
    sharded = command(folder, "trainer=FSDPTrainer")
    assert any(one.returncode for one in command_lines(folder, sharded, 2, {0: [at_event(3, kill)]}))
    done = command_lines(folder, sharded, 2, {1: [not_there]})
    assert {one.returncode for one in done} == {2}
    assert "1 of 2 processes find a run in it" in done[0].stderr + done[1].stderr
