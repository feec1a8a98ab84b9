"""Signals before training begins."""

import subprocess
import sys

from conftest import ROOT

HEAVY = {"torch", "numpy", "transformers", "hydra", "omegaconf", "pydantic", "tqdm"}


def test_the_command_line_imports_nothing_slow_before_it_handles_signals():
    code = f"import sys, train; print({HEAVY!r} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


def test_a_wish_for_a_checkpoint_before_training_is_kept_once():
    code = """
import os, signal
from dpo.system.signals import ProcessSignals
with ProcessSignals().installed() as signals:
    os.kill(os.getpid(), signal.SIGUSR1)
    with signals.deferred():
        print(signals.pop_save(), signals.pop_save(), signals.stop)
"""
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert printed == "True False None\n"
