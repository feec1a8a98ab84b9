"""Starting processes, by the real launcher."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import make_dataclass

import pytest
import torch
from conftest import ROOT
from faults import BUSY, HANG, command_line

from dpo.distributed import launch
from dpo.runs.checkpoints import find_corruption

SHORT = (*BUSY, "loss=sft", "trainer=FSDPTrainer", "n_examples=8", "do_first_eval=false", "n_eval_examples=4")


def test_every_visible_gpu_gets_a_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [launch.count_processes("auto", device) for device in ("auto", "cuda", "cpu")] == [8, 8, 1]
    assert launch.count_processes(3, "auto") == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launch.count_processes("auto", "auto") == 1


def test_the_processes_get_time_to_shut_down_where_torch_can_be_told(monkeypatch, capsys):
    def standing_in(shutdown_timeout=30, **options):
        return options | {"shutdown_timeout": shutdown_timeout}

    monkeypatch.setattr(launch, "LaunchConfig", standing_in)
    config = launch.make_config(3)
    assert (config["nproc_per_node"], config["shutdown_timeout"]) == (3, 600)
    assert capsys.readouterr().out == ""


def test_where_torch_cannot_be_told_the_user_is(monkeypatch, capsys):
    names = "min_nodes max_nodes nproc_per_node run_id rdzv_backend rdzv_endpoint local_addr max_restarts logs_specs"
    as_in_torch_2_11 = make_dataclass("LaunchConfig", names.split())
    monkeypatch.setattr(launch, "LaunchConfig", as_in_torch_2_11)
    assert launch.make_config(3).nproc_per_node == 3
    assert "kills the processes 30 seconds after a signal" in capsys.readouterr().out


@pytest.mark.parametrize("end", ["exits", "is killed", "is signalled"])
def test_the_launcher_ends_as_its_processes(end, tmp_path, capfd):
    code = {"exits": "sys.exit(4)", "is killed": "os.kill(os.getpid(), 9)", "is signalled": "time.sleep(60)"}[end]
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys, time\nopen({str(tmp_path / 'up')!r}, 'w').close()\n{code}\n")
    pid = os.fork()
    if pid == 0:
        try:
            launch.launch(script, [], 1)
        except SystemExit as ended:
            os._exit(ended.code)
        os._exit(99)
    if end == "is signalled":
        while not (tmp_path / "up").exists():
            time.sleep(0.05)
        os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == {"exits": 4, "is killed": 7, "is signalled": 143}[end]
    assert ("rank 0: was killed by SIGKILL" in capfd.readouterr().err) == (end == "is killed")


def test_the_command_line_starts_its_processes(tmp_path, counts):
    """A name with a quote and a space reaches them whole."""
    n = counts(small=1, full=2)
    folder = tmp_path / "o'er there"
    quoted = str(folder).replace("'", "\\'")
    done = command_line(folder, (f"local_run_dir='{quoted}'", *SHORT, f"n_processes={n}"))
    assert done.returncode == 0, done.stderr
    assert f"Starting {n} process" in done.stdout and f"Everything is in {folder}" in done.stdout
    assert find_corruption(folder / "LATEST") is None and (folder / "LATEST" / "hf").is_dir()
    assert len(list((folder / "LATEST").glob("*.distcp"))) == n


def test_tasks_of_srun_train_together(tmp_path):
    """Each composes its own time stamp; the main one's run directory is the run's."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NODELIST": "localhost", "MASTER_PORT": str(port)}
    slurm |= {"SLURM_JOB_ID": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    command = [sys.executable, str(ROOT / "train.py"), *SHORT, "device=cpu", f"local_dirs=['{tmp_path}']"]
    tasks = [
        subprocess.Popen(
            command,
            env=os.environ | slurm | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    outputs = [task.communicate(timeout=HANG)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    (config,) = tmp_path.glob("*/*/config.yaml")
    assert "Done: 8 examples" in outputs[0] and outputs[1] == "" and (config.parent / "LATEST" / "hf").is_dir()
