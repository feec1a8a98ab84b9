"""Commands that end with the program that started them, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from tools.rounds.supervisor import NOT_STARTED, supervised

# A command that writes its number and that of a child, and sleeps; the second one ignores SIGTERM.
SLEEPER = "sleep 3600 & echo $$ $! > {path}.part && mv {path}.part {path}; wait"
STUBBORN = "trap '' TERM; " + SLEEPER + "; wait"


def wait_until(condition) -> None:
    """Wait as long as it takes on a busy machine; a minute is a failure."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def numbers_in(path: Path) -> list[int]:
    wait_until(path.exists)
    return [int(number) for number in path.read_text().split()]


def is_running(number: int) -> bool:
    """Whether a process runs; one that has ended may not have been collected yet."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        pass
    if Path("/proc").is_dir():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("script, grace", [(SLEEPER, 3600.0), (STUBBORN, 0.1)], ids=["polite", "stubborn"])
def test_the_command_and_its_children_end_with_the_context(script, grace, tmp_path):
    path = tmp_path / "numbers"
    with supervised(["bash", "-c", script.format(path=path)], grace):
        numbers = numbers_in(path)
        assert all(map(is_running, numbers))
    assert not any(map(is_running, numbers))


def test_a_command_ends_when_its_program_is_killed(tmp_path):
    path = tmp_path / "numbers"
    program = (
        "import sys, time; from tools.rounds.supervisor import supervised\n"
        "with supervised(sys.argv[1:]): time.sleep(3600)"
    )
    command = [sys.executable, "-c", program, "bash", "-c", SLEEPER.format(path=path)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        numbers = numbers_in(path)
        process.send_signal(signal.SIGKILL)
    for number in numbers:
        wait_until(lambda number=number: not is_running(number))


def test_children_end_with_a_command_that_ends_by_itself(tmp_path):
    path = tmp_path / "numbers"
    with supervised(["bash", "-c", f"sleep 3600 & echo $! > {path}; exit 3"]) as process:
        assert process.wait() == 3
        assert not any(map(is_running, numbers_in(path)))


@pytest.mark.parametrize("command, code", [("exit 4", 4), ("kill -SEGV $$", 128 + signal.SIGSEGV)])
def test_the_exit_code_is_the_commands(command, code):
    with supervised(["bash", "-c", command]) as process:
        assert process.wait() == code


def test_a_command_that_cannot_be_started_says_so():
    with supervised(["/nowhere/engine"], stderr=subprocess.PIPE) as process:
        with process.stderr:
            assert process.stderr.read() == b"/nowhere/engine: cannot be started (No such file or directory)\n"
        assert process.wait() == NOT_STARTED


def test_an_interrupted_program_ends_its_command(tmp_path):
    path = tmp_path / "numbers"
    with pytest.raises(KeyboardInterrupt), supervised(["bash", "-c", SLEEPER.format(path=path)]):
        numbers = numbers_in(path)
        raise KeyboardInterrupt
    assert not any(map(is_running, numbers))
