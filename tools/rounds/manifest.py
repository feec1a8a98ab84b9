"""OUT/manifest.json: which stages are done, from which inputs, with which outputs."""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from dpo.system.console import log_message
from dpo.system.errors import UserError
from dpo.system.files import atomic_write, sha256

Counts = dict[str, int]
LIBRARIES = ("torch", "transformers", "tokenizers")  # on whose versions the numbers of a stage depend


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    inputs and outputs have a hash of each, by its file or by what it is; settings is a hash of all settings of the run.
    """

    inputs: dict[str, str]
    outputs: dict[str, str]
    settings: str
    versions: dict[str, str]
    counts: Counts
    seconds: float
    done: bool = True


class Manifest:
    """The finished stages by name, in their order; written whole after each stage."""

    def __init__(self, out: Path, settings: str):
        self.out, self.settings = out, settings
        self.path = out / "manifest.json"
        self.stages: dict[str, Stage] = {}
        if self.path.exists():
            stages = json.loads(self.path.read_text(encoding="utf-8"))["stages"]
            self.stages = {name: Stage(**stage) for name, stage in stages.items()}

    def run(
        self, name: str, inputs: Mapping[str, str], work: Callable[[], Counts], outputs: Callable[[], Sequence[Path]]
    ) -> None:
        """Run a stage unless it is done; inputs are hashes by name, outputs the files that it leaves.

        UserError that names the input or output that has changed since a stage was done.
        """
        if name in self.stages:
            stage = self.stages[name]
            if stage.settings != self.settings:
                raise UserError(f"{self.out}: the settings have changed since {name}; begin with a new local_run_dir")
            found = {key: hash_file(self.out / key) for key in stage.outputs}
            self.check(name, stage.inputs | stage.outputs, {**inputs, **found})
            return
        log_message(f"{name} ...")
        start = time.perf_counter()
        counts = work()
        written = {path.relative_to(self.out).as_posix(): hash_file(path) for path in outputs()}
        seconds = round(time.perf_counter() - start, 1)
        self.stages[name] = Stage(dict(inputs), written, self.settings, versions(), counts, seconds)
        content = {"stages": {name: asdict(stage) for name, stage in self.stages.items()}}
        atomic_write(self.path, (json.dumps(content, indent=1) + "\n").encode())
        described = ", ".join(f"{n:,} {what}" for what, n in counts.items())
        log_message(f"{name}: {described or 'done'} ({seconds:,.1f} s)")

    def check(self, name: str, recorded: Mapping[str, str], found: Mapping[str, str]) -> None:
        for key in sorted(recorded.keys() | found.keys()):
            if recorded.get(key) != found.get(key):
                what = "is gone, or cannot be read," if found.get(key, GONE) == GONE else "has changed"
                other = "go on with it: accept_scorer=true" if key == SCORER else "begin with a new local_run_dir"
                raise UserError(f"{self.out}: {key} {what} since {name}; restore it, or {other}")


GONE, SCORER = "gone", "scorer"  # a hash, and the name of an input


@cache
def hash_file(path: Path) -> str:
    """The SHA-256 of a file, which is read once per process; GONE if it cannot be read."""
    try:
        return sha256(path)
    except OSError:
        return GONE


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
