"""The console, prefetching, the run directory, and what a failing wandb may do."""

import ctypes
import getpass
import json
import os
import subprocess
import sys
import time

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


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc")
@pytest.mark.skipif(not utils.computes_bfloat16_natively(torch.device("cpu")), reason="needs bfloat16 in hardware")
def test_products_of_many_shapes_leave_no_kernels_behind():
    code = """
import ctypes, sys, torch, utils
if sys.argv[1] == "few":
    utils.keep_few_kernels()
fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
Info = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in fields]})
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
weight = torch.ones(64, 64, dtype=torch.bfloat16)
def multiply(lengths):
    for n in lengths:
        torch.ones(n, 64, dtype=torch.bfloat16) @ weight
multiply(range(100, 110))
before = mallinfo().uordblks
multiply(range(110, 310))
print(mallinfo().uordblks - before)
"""
    ours = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    commands = [[sys.executable, "-c", code, which] for which in ("all", "few")]
    kept, few = (int(subprocess.check_output(command, cwd=ROOT, env=env)) for command in commands)
    assert few < kept / 2, (few, kept)


def test_the_environment_decides_how_many_kernels_are_kept(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")  # so that it is taken back, whatever it was
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    utils.keep_few_kernels()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
