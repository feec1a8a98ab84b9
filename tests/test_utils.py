"""The console, prefetching, the run directory, and what a failing wandb may do."""

import ctypes
import getpass
import json
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import utils


def test_prefetch_yields_everything_in_order_and_runs_ahead():
    made = []
    items = utils.prefetch((made.append(i) or i for i in range(6)), ahead=2)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) >= 3
    assert list(items) == [1, 2, 3, 4, 5]


def test_an_exception_while_prefetching_reaches_the_caller():
    def broken():
        yield 1
        raise utils.UserError("row 7")

    items = utils.prefetch(broken())
    assert next(items) == 1
    with pytest.raises(utils.UserError, match="row 7"):
        next(items)


def test_a_run_directory_lies_in_the_first_folder_that_exists(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    found = utils.local_run_dir("exp", [str(tmp_path / "missing"), str(there), str(tmp_path)])
    assert found.startswith(str(there / getpass.getuser() / "exp_"))
    assert utils.local_run_dir("exp", ["missing-a", "missing-b"]).startswith("missing-b")


def test_metrics_are_all_written_although_the_console_is_thinned(tmp_path, capsys):
    logger = utils.MetricLogger(tmp_path, utils.Tracker(), minimum_interval_secs=1000)
    for n in (1, 2, 3):
        logger.log({"examples": n, "updates": n, "loss/train": 0.5}, thin=True)
    logger.log({"examples": 3, "updates": 3, "loss/eval": 0.25})
    logger.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["examples"] == 2
    assert capsys.readouterr().out.splitlines() == [
        "1 examples, 1 updates: loss/train 0.5",
        "3 examples, 3 updates: loss/eval 0.25",
    ]


def test_a_wandb_that_fails_in_the_middle_is_said_once_and_touches_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = utils.WandbTracker(tmp_path, {"project": "p"})

    def broken(*args, **kwargs):
        raise RuntimeError("no space left on device")

    tracker.run.finish()
    tracker.run = type("Broken", (), {"log": broken, "finish": broken})()
    for step in (1, 2):
        tracker.log({"loss": 1.0}, step)
    tracker.table("samples", ["step"], [[1]])
    tracker.finish()
    assert capsys.readouterr().out.count("switched off after RuntimeError: no space left on device") == 1


def test_a_server_that_does_not_answer_costs_no_more_than_its_seconds():
    start = time.monotonic()
    assert not utils.answers("http://192.0.2.1", seconds=0.5)
    assert time.monotonic() - start < 3


def test_auto_precision_is_bfloat16_only_where_the_device_computes_it(monkeypatch):
    cpu = torch.device("cpu")
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(utils, "computes_bfloat16_natively", lambda device, native=native: native)
        assert utils.compute_dtype("auto", torch.float32, cpu) == expected
        assert utils.compute_dtype("auto", torch.bfloat16, cpu) == torch.bfloat16
    assert utils.compute_dtype("float32", torch.float32, cpu) == torch.float32


def test_importing_a_module_does_nothing_else():
    import subprocess
    import sys

    heavy = {"wandb", "datasets", "bs4"}
    code = "import sys, train, trainers; print(sorted({'wandb', 'datasets', 'bs4'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", heavy


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_memory_that_malloc_keeps_in_pieces_goes_back_to_the_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    tensors = [torch.ones(2**14) for _ in range(4000)]  # 64 KiB each, which malloc takes from its heap
    last = tensors[-1]  # holds the heap's end, below which malloc gives nothing back by itself
    del tensors
    before = resident()
    utils.give_back_memory(torch.device("cpu"))
    assert resident() < before - 200 * 2**20 and last[0] == 1
