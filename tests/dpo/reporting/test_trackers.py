"""What wandb, TensorBoard and trackio get, and what they may do when they fail."""

import sys
from types import ModuleType

import pytest
import torch.utils
from conftest import TINY, compose, validated

import build
from dpo.reporting.trackers import TensorBoardTracker, Tracker, Trackers, TrackioTracker, WandbTracker
from dpo.runs.run_dir import Checkpoint, RunDir
from dpo.settings import constraints
from dpo.system.errors import UserError


class Recorder:
    """Stands for a library's run, and records what is called."""

    def __init__(self, *args, **kwargs):
        self.calls = [("init", args, kwargs)]

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


class Broken:
    """Stands for a tracker whose every method fails."""

    def __getattr__(self, name):
        def fail(*args, **kwargs):
            raise RuntimeError("no space left on device")

        return fail


@pytest.fixture
def libraries(monkeypatch):
    """Put modules in the place of TensorBoard's writer and of trackio, which need not be installed."""
    tensorboard, trackio = ModuleType("torch.utils.tensorboard"), ModuleType("trackio")
    tensorboard.SummaryWriter = Recorder
    trackio.init = Recorder
    trackio.Table = lambda columns, data: [columns, *data]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setattr(torch.utils, "tensorboard", tensorboard, raising=False)
    monkeypatch.setitem(sys.modules, "trackio", trackio)


ROW = [[8, "Hi | there\nyou", "yes"]]
COLUMNS = ["step", "prompt", "sample"]


@pytest.mark.parametrize("resumed_at, purged", [(None, None), (0, 1), (16, 17)])
def test_tensorboard_gets_numbers_and_tables_and_of_a_resumed_run_hides_what_it_writes_again(
    resumed_at, purged, libraries, tmp_path
):
    tracker = TensorBoardTracker(tmp_path, resumed_at)
    run = tracker.writer
    tracker.log({"loss/train": 0.5, "lr": 1e-3}, 8)
    tracker.table("policy_samples", 8, COLUMNS, ROW)
    tracker.finish()
    table = "| step | prompt | sample |\n| --- | --- | --- |\n| 8 | Hi \\| there<br>you | yes |"
    assert run.calls == [
        ("init", (tmp_path / "tensorboard",), {"purge_step": purged}),
        ("add_scalar", ("loss/train", 0.5, 8), {}),
        ("add_scalar", ("lr", 1e-3, 8), {}),
        ("add_text", ("policy_samples", table, 8), {}),
        ("close", (), {}),
    ]


@pytest.mark.parametrize("is_resumed, resume", [(False, "never"), (True, "allow")])
def test_trackio_gets_numbers_and_tables_under_the_name_of_the_run_directory(is_resumed, resume, libraries, tmp_path):
    tracker = TrackioTracker("p", tmp_path / "dpo_1", {"lr": 1}, is_resumed)
    run = tracker.run
    tracker.log({"loss/train": 0.5}, 8)
    tracker.table("policy_samples", 8, COLUMNS, ROW)
    tracker.finish()
    settings = {"project": "p", "name": "dpo_1", "config": {"lr": 1}, "resume": resume, "embed": False}
    init, log, (_, (table,), step), finish = run.calls
    assert (init, log, finish) == (
        ("init", (), settings),
        ("log", ({"loss/train": 0.5},), {"step": 8}),
        ("finish", (), {}),
    )
    assert table == {"policy_samples": [COLUMNS, *ROW]} and step == {"step": 8}


def test_several_trackers_each_get_everything():
    runs = [Recorder(), Recorder()]
    tracker = Trackers({"one": lambda: runs[0], "other": lambda: runs[1]})
    tracker.log({"lr": 1.0}, 8)
    tracker.table("samples", 8, COLUMNS, ROW)
    tracker.finish()
    assert [[call[0] for call in run.calls] for run in runs] == [["init", "log", "table", "finish"]] * 2


def test_a_tracker_that_fails_in_the_middle_is_reported_once_and_the_others_go_on(capsys):
    recorder = Recorder()
    tracker = Trackers({"broken": Broken, "other": lambda: recorder})
    for step in (1, 2):
        tracker.log({"loss": 1.0}, step)
    tracker.table("samples", 1, ["step"], [[1]])
    tracker.finish()
    assert capsys.readouterr().out == "broken: switched off after RuntimeError: no space left on device\n"
    assert [call[0] for call in recorder.calls] == ["init", "log", "log", "table", "finish"]


MAKERS = {
    "wandb": lambda folder: WandbTracker(folder, {"project": "p"}),
    "tensorboard": lambda folder: TensorBoardTracker(folder, None),
    "trackio": lambda folder: TrackioTracker("p", folder, {}, False),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_library_that_cannot_be_imported_switches_its_tracker_off(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    tracker = Trackers({name: lambda: MAKERS[name](tmp_path)})
    tracker.log({"lr": 1.0}, 8)
    tracker.finish()
    assert capsys.readouterr().out.count(f"{name}: switched off after ModuleNotFoundError") == 1


def test_a_library_that_is_not_installed_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(constraints, "is_installed", lambda library: library != "trackio")
    validated("loss=dpo", *TINY, "trackers=[wandb,tensorboard]")
    with pytest.raises(UserError, match=r": the library trackio is not installed; pip install trackio$"):
        validated("loss=dpo", *TINY, "trackers=[wandb,tensorboard,trackio]")
    with pytest.raises(UserError, match=r"trackers=mlflow: must be a list of wandb, tensorboard and trackio"):
        validated("loss=dpo", *TINY, "trackers=[mlflow]")


@pytest.mark.parametrize(
    "settings, made",
    [
        ((), []),
        (("wandb.enabled=true",), ["WandbTracker"]),
        (("wandb.enabled=true", "trackers=[]"), []),
        (("trackers=[wandb,tensorboard]",), ["TensorBoardTracker"]),
        (("wandb.enabled=true", "trackers=[trackio,wandb]"), ["TrackioTracker", "WandbTracker"]),
    ],
)
def test_the_settings_name_the_trackers_and_wandb_has_a_switch_of_its_own(
    settings, made, libraries, tmp_path, monkeypatch
):
    monkeypatch.setattr(constraints, "is_installed", lambda library: True)
    monkeypatch.setattr(build, "WandbTracker", type("WandbTracker", (Tracker,), {"__init__": lambda *_: None}))
    overrides = ("loss=dpo", *TINY, f"local_run_dir='{tmp_path}'", *settings)
    tracker = build.make_tracker(validated(*overrides)[0], RunDir(tmp_path, compose(*overrides)))
    assert [type(one).__name__ for one in tracker.trackers.values()] == made
    debug = (*overrides, "debug=true")
    assert type(build.make_tracker(validated(*debug)[0], RunDir(tmp_path, compose(*debug)))) is Tracker


@pytest.mark.parametrize("resumed, purged, resume", [(False, None, "never"), (True, 17, "allow")])
def test_trackers_get_the_names_and_the_unresolved_settings_of_the_run_and_where_it_is_resumed(
    resumed, purged, resume, libraries, tmp_path, monkeypatch
):
    """A checkpoint after 16 examples; a tracker that resolved the settings would publish a secret."""
    monkeypatch.setattr(constraints, "is_installed", lambda library: True)
    monkeypatch.setattr(build, "WandbTracker", Recorder)
    monkeypatch.setenv("SECRET", "hunter2")
    names = ("wandb.entity=us", "wandb.project=p", "exp_name=e", "wandb.enabled=true")
    trackers = "trackers=[wandb,tensorboard,trackio]"
    overrides = ("loss=dpo", *TINY, f"local_run_dir='{tmp_path}'", *names, trackers)
    run = RunDir(tmp_path, compose(*overrides, "model.block_name=${oc.env:SECRET}"))
    run.resumed = resumed
    run.checkpoint = Checkpoint(tmp_path / "step-16", {}) if resumed else None
    wandb, tensorboard, trackio = build.make_tracker(validated(*overrides)[0], run).trackers.values()
    _, (folder, given), _ = wandb.calls[0]
    config = given.pop("config")
    assert (folder, given) == (tmp_path, {"entity": "us", "project": "p", "name": "e"})
    assert config["lr"] == 5e-7 and config["model"]["block_name"] == "${oc.env:SECRET}"
    assert tensorboard.writer.calls == [("init", (tmp_path / "tensorboard",), {"purge_step": purged})]
    expected = {"project": "p", "name": tmp_path.name, "config": config, "resume": resume, "embed": False}
    assert trackio.run.calls == [("init", (), expected)]
