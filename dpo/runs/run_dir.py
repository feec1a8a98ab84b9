"""A run directory: making, locking and recording it, and opening it again to resume."""

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf

from dpo.distributed.ranks import ALONE, Ranks
from dpo.runs.checkpoints import clear_leftovers, newest_checkpoint
from dpo.settings.run_config import MAY_CHANGE, MAY_GROW, MAY_MOVE, read_run_config
from dpo.settings.schema import flatten
from dpo.system.console import log_message
from dpo.system.errors import RunError, UserError
from dpo.system.files import atomic_write, naming_file

# Of what decides how numbers are rounded, in messages; other keys of a run's environment are called by themselves
LABELS = {
    "device": "the device",
    "threads": "the number of threads",
    "world_size": "the number of processes",
    "data_size": "the number of shares of a batch",
    "dtype": "the dtype of the computation",
}
# The keys of earlier versions; their layout and attention were one text, and are checked again.
EARLIER_KEYS = {label: key for key, label in LABELS.items()} | {"the number of parts of a batch": "data_size"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, and the state of each of its parts."""

    folder: Path
    states: dict[str, Any]

    def fingerprints(self) -> dict[str, str]:
        """Read the fingerprints of what the run began with; RunError if this is no checkpoint of a run."""
        try:
            run = self.states["run"]
            return dict(run["fingerprints"] if "fingerprints" in run else run["identity"])  # their earlier name
        except (KeyError, TypeError, ValueError):
            raise RunError(f"{self.folder}: is not a checkpoint of a run", "no checkpoint") from None


class RunDir:
    """The directory of one run: new, or resumed with what its newest checkpoint holds.

    `fingerprints` names what a resumed run must find again: data, settings, reference.
    """

    def __init__(self, path: Path, config: DictConfig, ranks: Ranks = ALONE):
        self.path, self.config, self.ranks = path, config, ranks
        self.fingerprints: dict[str, str] = {}
        self.resumed = False
        self.checkpoint: Checkpoint | None = None
        self.overrides: dict[str, Any] = {}
        self.open_files = ExitStack()

    @classmethod
    def reopen(cls, path: Path, config: DictConfig, overrides: dict[str, Any], ranks: Ranks = ALONE) -> "RunDir":
        """Lock a run's directory, clear what a killed process left there, and read the newest checkpoint."""
        run = cls(path, config, ranks)
        run.resumed, run.overrides = True, overrides

        def read() -> tuple[Path, dict[str, Any]] | None:
            run.open_files.enter_context(lock_run_dir(path))
            clear_leftovers(path)
            return newest_checkpoint(path)

        newest = run.ranks.run_on_main(read)
        run.checkpoint = None if newest is None else Checkpoint(*newest)
        if newest is None:
            log_message(f"{path} holds no checkpoint yet, so the run begins again.")
        return run

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *exception: object) -> None:
        self.open_files.close()

    def create(self) -> None:
        """Make, lock and record the directory of a new run; UserError if it holds anything or cannot be made."""

        def make() -> None:
            make_run_dir(self.path)
            self.open_files.enter_context(lock_run_dir(self.path))

        if not self.resumed:
            self.ranks.run_on_main(make)
            self.record()

    def check_fingerprints(self, fingerprints: Mapping[str, str], earlier: Mapping[str, Callable[[], str]]) -> None:
        """Keep the run's fingerprints; UserError if the checkpoint that is resumed from has others.

        earlier computes the fingerprints that earlier versions stored under some of the names, which are accepted too.
        """
        self.fingerprints = dict(fingerprints) | {"the settings": settings_fingerprint(self.config)}
        if self.checkpoint is None:
            return
        stored = self.checkpoint.fingerprints()
        earlier = {**earlier, "the settings": partial(settings_fingerprint, self.config, with_device=True)}
        for name, value in self.fingerprints.items():
            if stored.get(name) != value and (name not in earlier or stored.get(name) != earlier[name]()):
                raise UserError(f"resume={self.path}: {name} are not those that the run began with")

    def recorded_environment(self) -> dict[str, Any]:
        """Read what decided how numbers were rounded before the stop; nothing in a new run."""
        return {} if self.checkpoint is None else read_environment(self.checkpoint.states)

    def is_complete(self, n_updates: int) -> bool:
        """Whether no update is left and the export, which comes last, was written."""
        if self.checkpoint is None:
            return False
        export = self.checkpoint.folder / "hf"
        is_exported = self.ranks.run_on_main(lambda: export.is_dir() and not export.is_symlink())
        try:
            return is_exported and self.checkpoint.states["run"]["counters"]["updates"] >= n_updates
        except (KeyError, TypeError):  # a forged one, which is refused when its states are loaded
            return False

    def record(self) -> None:
        """Write config.yaml, and for a resumed run the checkpoint and the overrides that it continues with."""
        self.ranks.run_on_main(self._write_record)

    def _write_record(self) -> None:
        text = OmegaConf.to_yaml(self.config)
        atomic_write(self.path / "config.yaml", text.encode())
        if self.resumed:
            start = None if self.checkpoint is None else self.checkpoint.folder.name
            time = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
            path = self.path / "resumed.jsonl"
            with naming_file(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time, "from": start, "overrides": self.overrides}) + "\n")


def open_run(path: Path, config: DictConfig, overrides: dict[str, Any] | None, ranks: Ranks) -> RunDir:
    """Open the directory of a new run, or with overrides that of the run that is resumed.

    A run that torchrun has started again goes on from its newest checkpoint.
    """
    first_path, restarted = ranks.keep_first("run", str(path))  # ranks may have composed other time stamps
    path = Path(first_path)
    if restarted and overrides is None and ranks.run_on_main(lambda: (path / "config.yaml").is_file()):
        config, overrides = read_run_config(path), {}
    config.local_run_dir = str(path)
    return RunDir(path, config, ranks) if overrides is None else RunDir.reopen(path, config, overrides, ranks)


def make_run_dir(path: Path) -> None:
    """Make the run's directory; UserError if it holds anything or cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        occupied = any(path.iterdir())
    except OSError as error:
        raise UserError(f"local_run_dir={path}: cannot be made ({error.strerror}); choose another") from None
    if occupied:
        raise UserError(f"local_run_dir={path}: holds another run; choose a new exp_name or local_run_dir")


def lock_run_dir(path: Path) -> TextIO:
    """Lock the run's directory until the returned file is closed; UserError if another process holds it."""
    try:
        file = open(path / ".lock", "a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{path}: another process writes to this run; wait for it, or stop it") from None
    except OSError as error:
        log_message(f"{path}: cannot be locked ({error.strerror}), so make sure that no other process writes to it.")
    return file


def settings_fingerprint(config: DictConfig, with_device: bool = False) -> str:
    """Compute a SHA-256 of the settings that may not change. Paths are left out: their content is compared elsewhere.

    with_device gives the fingerprint of earlier versions, where a resumed run kept its device.
    """
    free = ("exp_name", "local_run_dir", *MAY_MOVE, *MAY_CHANGE, *MAY_GROW)
    values = flatten(config).items()
    kept = {key: value for key, value in values if key not in free or (with_device and key == "device")}
    return hashlib.sha256(repr(sorted(kept.items())).encode()).hexdigest()


def read_environment(states: Any) -> dict[str, Any]:
    """Read from a checkpoint's states what decided how numbers were rounded; nothing where they have another form."""
    try:
        run = states["run"]
        if "environment" in run:
            return dict(run["environment"])
        environment = {EARLIER_KEYS.get(name, name): value for name, value in run["surroundings"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
    environment.pop("the layout", None)
    return environment


def log_changes(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Print the changes since a run's stop that may change how its numbers are rounded."""
    changed = [name for name, value in old.items() if new.get(name) != value]
    if changed:
        changes = "; ".join(f"{LABELS.get(name, name)} was {old[name]}, is {new.get(name)}" for name in changed)
        log_message(f"Not bit for bit what it would have been without the stop: {changes}.")
