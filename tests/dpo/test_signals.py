"""Signals before training begins."""

import signal
import subprocess
import sys

from conftest import ROOT

HEAVY = {"torch", "numpy", "transformers", "hydra", "omegaconf", "pydantic", "tqdm"}


def test_the_command_line_imports_nothing_slow_before_it_handles_signals():
    code = f"import sys, train; print({HEAVY!r} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


def test_a_wish_for_a_checkpoint_during_imports_is_kept():
    code = """
from dpo.signals import ProcessSignals
with ProcessSignals().installed() as signals:
    print("ready", flush=True)
    input()  # until the signal has been sent
    import trainers
    with signals.deferred():
        print(signals.take_save(), signals.take_save(), signals.stop)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGUSR1)
    told, _ = child.communicate("go on\n", timeout=120)
    assert (child.returncode, told) == (0, "True False None\n")
