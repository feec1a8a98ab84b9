"""What a rank finds out about the others, by a store in this process."""

import json
import os
import signal
import socket
import subprocess
import threading
import time

import pytest
from torch.distributed import HashStore

from dpo.distributed import watchdog
from dpo.distributed.watchdog import Failure, Watchdog, process_state
from dpo.system.errors import UserError


@pytest.fixture
def make(monkeypatch):
    """Make a function that makes the watchdog of a rank of two, whose thread never polls by itself."""
    monkeypatch.setattr(watchdog, "HEARTBEAT_INTERVAL", 3600)
    made = []

    def make(store, rank=0) -> Watchdog:
        made.append(Watchdog(store, rank, 2, hosts_store=False))
        return made[-1]

    yield make
    for one in made:
        one.close()


def alive(beat: int, pid: int, host: str = socket.gethostname()) -> str:
    """A heartbeat of a process."""
    return f"{beat} {pid} {host}"


def test_the_first_failure_is_everyones(make):
    store = HashStore()
    first, second = make(store, 0), make(store, 1)
    assert first.fail(UserError("lr=0: too low"), delay=0) and first.exit_code == 2
    second.poll()
    assert second.failure == Failure(0, "lr=0: too low", 2) and second.exit_code == 2
    assert not second.fail(ValueError("another"), delay=0)


def test_an_error_of_a_collective_waits_for_what_caused_it(make):
    store = HashStore()
    mine = make(store)
    store.set("failure", json.dumps(Failure(1, "no space left", 4)))
    mine.poll()
    assert not mine.fail(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), delay=0)
    assert mine.exit_code == 4


def test_a_rank_that_lives_is_left_alone_and_one_whose_process_is_gone_is_named(make, capsys):
    store, process = HashStore(), subprocess.Popen(["sleep", "60"])
    mine = make(store)
    mine.poll()  # before the other has sent any heartbeat
    store.set("alive-1", alive(1, process.pid))
    mine.poll()
    assert mine.failure is None
    process.kill()
    process.wait()
    mine.poll()
    assert mine.failure.rank == 1 and mine.exit_code == 7
    assert f"error: rank 1: process {process.pid} on " in capsys.readouterr().err


def test_a_rank_that_was_stopped_is_named_and_killed(make, monkeypatch, capsys):
    store, process = HashStore(), subprocess.Popen(["sleep", "60"])
    process.send_signal(signal.SIGSTOP)
    mine = make(store)
    store.set("alive-1", alive(1, process.pid))
    mine.poll()
    assert mine.failure is None
    monkeypatch.setattr(watchdog, "HEARTBEAT_TIMEOUT", 0.0)
    time.sleep(0.01)
    mine.poll()
    assert process.wait(5) == -signal.SIGKILL
    assert "sent no heartbeat for 0 s; all ranks end" in capsys.readouterr().err and mine.exit_code == 7


def test_a_process_of_another_machine_is_judged_by_its_heartbeats_alone(make, monkeypatch):
    store = HashStore()
    mine = make(store)
    monkeypatch.setattr(watchdog, "HEARTBEAT_TIMEOUT", 0.0)
    for beat in range(3):
        store.set("alive-1", alive(beat, 2**22 + 1, "elsewhere"))
        mine.heartbeat_time = time.monotonic() + 3600
        mine.poll()
    assert mine.failure is None
    mine.heartbeat_time = 0.0
    mine.poll()
    assert mine.failure.rank == 1


def test_a_store_that_does_not_respond_ends_the_process(monkeypatch, capsys):
    class Silent(HashStore):
        def set(self, *args: str) -> None:
            time.sleep(2)

    codes, ended = [], threading.Event()
    monkeypatch.setattr(watchdog, "HEARTBEAT_INTERVAL", 0.01)
    monkeypatch.setattr(watchdog, "HEARTBEAT_TIMEOUT", 0.1)
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: codes.append(code) or ended.set())
    mine = Watchdog(Silent(), 0, 2, hosts_store=False)
    ended.wait(60)
    mine.close()
    assert set(codes) == {7} and "rank 0: the store of all ranks gave no response for 0 s" in capsys.readouterr().err


def test_the_state_of_a_process_is_known_while_there_is_one():
    assert process_state(os.getpid()) in ("R", "S")
    assert process_state(2**22 + 1) == ""
