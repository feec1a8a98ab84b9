"""Runs a command whose processes never outlive the program that started it, also if that is killed with -9.

This file is also the script that runs in between: the program holds one end of a pipe, and the script ends the
command's process group when it reads that the pipe was closed, by the program or by the system after its death.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

GRACE = 10.0  # seconds between SIGTERM and SIGKILL
EXIT_TIME = 5.0  # seconds that killed processes may take to give their memory back
NOT_STARTED = 127  # the exit code if there is no such command, as in a shell


@contextmanager
def supervised(command: Sequence[str], grace: float = GRACE, **streams: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a command in a process group of its own, and end all of the group at the end of the context.

    The process that it yields has the command's streams and exit code: 128 plus the number of a signal that ended it.
    streams are arguments of subprocess.Popen; pipes are for the caller to close.
    """
    watched, held = os.pipe()
    script = [sys.executable, "-I", "-S", __file__, str(watched), str(grace), *command]
    try:
        process = subprocess.Popen(script, pass_fds=(watched,), start_new_session=True, **streams)
        try:
            yield process
        finally:
            os.close(held)
            process.wait()
    finally:
        os.close(watched)


def supervise(watched: int, grace: float, command: Sequence[str]) -> int:
    """Run a command until it ends or the pipe is closed; its exit code."""
    try:
        child = subprocess.Popen(command, start_new_session=True)
    except OSError as error:
        print(f"{command[0]}: cannot be started ({error.strerror})", file=sys.stderr)
        return NOT_STARTED
    os.close(0)  # so that the command alone holds its pipes, and their ends are seen
    os.close(1)

    def end_when_closed() -> None:
        os.read(watched, 1)
        kill_group(child.pid, signal.SIGTERM)
        time.sleep(grace)
        kill_group(child.pid, signal.SIGKILL)

    threading.Thread(target=end_when_closed, daemon=True).start()
    code = child.wait()
    end = time.monotonic() + EXIT_TIME
    while kill_group(child.pid, signal.SIGKILL) and time.monotonic() < end:  # what the command has started
        time.sleep(0.02)
    return code if code >= 0 else 128 - code


def kill_group(group: int, number: signal.Signals) -> bool:
    """Send a signal to a process group; whether there is one."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS refuses where all have ended
        return False
    return True


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
