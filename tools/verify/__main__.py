"""python -m tools.verify model=... [any setting of a run]

Checks what a run promises on this machine, with this model and some rows of its data: packed rows and updates against
plain transformers, the reference, stopping and resuming, the export, several processes, speed and memory. Prints a
table and a line to copy into an issue; docs/verify.md explains both. Takes about two minutes with a small model.
Nothing is left on the disk.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import TextIOBase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TextIO

from dpo.settings.config_files import read_config_files
from dpo.settings.hints import argument_problems
from dpo.system.console import guard_streams, write_text
from dpo.system.errors import RunError, UserError, exit_on_error, raise_problems
from dpo.system.installation import CONFIG
from dpo.system.signals import ProcessSignals
from train import compose

if TYPE_CHECKING:
    from tools.verify.session import Session
    from tools.verify.table import Row
    from trainers import Inputs

STDOUT = "-"
DEFAULTS = {"loss": "dpo", "datasets": "[demo]", "max_length": "128", "max_prompt_length": "64"}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = " ".join(f"{key}={value}" for key, value in DEFAULTS.items())
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=f"settings of a run; by default {defaults}")
    json_help = "also write the table to this file as JSON; without FILE, print JSON, and the table to stderr"
    parser.add_argument("--json", nargs="?", const=STDOUT, metavar="FILE", help=json_help)
    options = parser.parse_intermixed_args()
    settings, target = options.settings, options.json
    if target is not None and "=" in target:  # --json KEY=VALUE
        settings, target = [*settings, target], STDOUT
    if target is not None and not Path(target).parent.is_dir():
        raise UserError(f"--json {target}: there is no folder {Path(target).parent}")
    verify(settings, target)


def verify(arguments: Sequence[str], json_target: str | None) -> None:
    """Print the table; RunError if a check fails. json_target is a file, or "-" for stdout."""
    from utils import register_resolvers

    register_resolvers()
    files = read_config_files(CONFIG)
    raise_problems(argument_problems(arguments, files.keys(), files.options()))
    if any(argument.startswith("resume=") for argument in arguments):
        raise UserError("resume: a new short run is verified; give the settings of the run instead")
    if "RANK" in os.environ:
        raise UserError("torchrun: starts one process too many; set trainer=FSDPTrainer n_processes=N instead")
    given = {argument.partition("=")[0] for argument in arguments}
    defaults = [f"{key}={value}" for key, value in DEFAULTS.items() if key not in given]
    config = compose("config", [*defaults, *arguments], files.keys())
    from transformers.utils import logging

    from tools.verify.session import Session
    from tools.verify.table import FAIL, as_json, count, summary

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    start = time.monotonic()
    shown = sys.stderr if json_target == STDOUT else sys.stdout
    with TemporaryDirectory(prefix="verify-") as folder:
        session = Session.of(config, Path(folder))
        with redirect_stdout(Log()):
            inputs = session.load_inputs()
        rows = print_rows(session, inputs, shown)
        about = facts(session, inputs) | {"seconds": round(time.monotonic() - start)}
    write_text(shown, f"\n{summary(rows, about)}\n")
    if json_target == STDOUT:
        write_text(sys.stdout, as_json(rows, about))
    elif json_target is not None:
        Path(json_target).write_text(as_json(rows, about), encoding="utf-8")
    if failed := count(rows, FAIL):
        raise RunError(f"{failed} of {len(rows)} checks failed; docs/verify.md says what they mean", "verification")


class Log(TextIOBase):
    """Takes what a run prints, and drops it."""

    def write(self, text: str) -> int:
        return len(text)


def print_rows(session: "Session", inputs: "Inputs", stream: TextIO) -> list["Row"]:
    """Make all checks, and print each row as soon as it is known."""
    from tools.verify.checks import CHECKS
    from tools.verify.table import heading, line

    rows = []
    write_text(stream, f"{heading()}\n")
    with redirect_stdout(Log()):
        for check in CHECKS:
            for row in check.rows(session, inputs):
                write_text(stream, f"{line(row)}\n")
                rows.append(row)
    return rows


def facts(session: "Session", inputs: "Inputs") -> dict[str, Any]:
    """What a maintainer needs to know of the machine and the run."""
    from dpo.system.devices import platform

    settings = session.settings
    dtype = str(session.dtype(inputs)).removeprefix("torch.")
    n = {} if settings.trainer == "BasicTrainer" else {"processes": settings.n_processes}
    lora = {} if settings.lora is None else {"lora": f"r={settings.lora.r}"}
    model = Path(settings.model.name_or_path).name
    return {
        "python": sys.version.split()[0],
        **platform(inputs.device),
        "dtype": dtype,
        "loss": session.config.loss.name,
        "model": model,
        **lora,
        "trainer": settings.trainer,
        **n,
    }


if __name__ == "__main__":
    guard_streams()
    with ProcessSignals().installed():
        exit_on_error(main)
