"""Creates, locks and records a run directory, and reopens it to resume."""

import fcntl
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
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
from dpo.system.installation import COMMAND

# Names in messages for keys of the environment (what determines rounding); other keys are printed as they are.
LABELS = {
    "device": "the device",
    "threads": "the number of threads",
    "world_size": "the number of processes",
    "data_size": "the number of shares of a batch",
    "dtype": "the dtype of the computation",
}
# Keys of earlier versions, which stored layout and attention as one text; these are checked again.
EARLIER_KEYS = {label: key for key, label in LABELS.items()} | {"the number of parts of a batch": "data_size"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and states."""

    folder: Path
    states: dict[str, Any]

    def fingerprints(self) -> dict[str, str]:
        """The fingerprints that the run started with; RunError if this is not a run's checkpoint."""
        try:
            run = self.states["run"]
            return dict(run["fingerprints"] if "fingerprints" in run else run["identity"])  # the earlier name
        except (KeyError, TypeError, ValueError):
            raise RunError(f"{self.folder}: is not a checkpoint of a run", "no checkpoint") from None


class RunDir:
    """The directory of a new run, or of a resumed one with its newest checkpoint.

    `fingerprints` has hashes of what a resumed run must find unchanged: data, settings, reference.
    """

    def __init__(self, path: Path, config: DictConfig, ranks: Ranks = ALONE):
        self.path, self.config, self.ranks = path, config, ranks
        self.fingerprints: dict[str, str] = {}
        self.resumed = False
        self.checkpoint: Checkpoint | None = None
        self.overrides: dict[str, Any] = {}
        self.warnings: list[str] = []  # of the start, which the log and the report repeat at the end
        self.open_files = ExitStack()

    @classmethod
    def reopen(cls, path: Path, config: DictConfig, overrides: dict[str, Any], ranks: Ranks = ALONE) -> "RunDir":
        """Lock a run's directory, remove a killed process's leftovers, and read the newest checkpoint."""
        run = cls(path, config, ranks)
        run.resumed, run.overrides = True, overrides

        def read() -> tuple[Path, dict[str, Any]] | None:
            run.open_files.enter_context(lock_run_dir(path))
            clear_leftovers(path)
            return newest_checkpoint(path)

        newest = run.ranks.run_on_main(read)
        run.checkpoint = None if newest is None else Checkpoint(*newest)
        return run

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *exception: object) -> None:
        self.open_files.close()

    def start_time(self) -> datetime:
        """When the run started, as chat templates see it: recorded if one reads the clock, else now, on all ranks."""
        now = self.ranks.run_on_main(lambda: datetime.now().replace(microsecond=0))
        recorded = self.config.get("chat_template_time")
        return datetime.fromisoformat(recorded) if recorded else now

    def check_free(self) -> None:
        """Raise UserError if this is a new run and its directory is not empty."""
        if not self.resumed:
            self.ranks.run_on_main(lambda: check_free(self.path))

    def create(self) -> None:
        """Create, lock and record the directory of a new run; UserError if it is not empty or cannot be created."""

        def make() -> None:
            make_run_dir(self.path)
            self.open_files.enter_context(lock_run_dir(self.path))

        if not self.resumed:
            self.ranks.run_on_main(make)
            self.record()

    def check_fingerprints(self, fingerprints: Mapping[str, str], earlier: Mapping[str, Callable[[], str]]) -> None:
        """Store the run's fingerprints; UserError if the checkpoint has different ones.

        earlier computes the fingerprints that earlier versions stored under some of the names; these are accepted as
        well.
        """
        self.fingerprints = dict(fingerprints) | {"the settings": settings_fingerprint(self.config)}
        if self.checkpoint is None:
            return
        stored = self.checkpoint.fingerprints()
        for name, value in self.fingerprints.items():
            if stored.get(name) == value:
                continue
            known = [earlier[name]()] if name in earlier else []
            if name == "the settings":
                known = earlier_settings_fingerprints(self.config)
            if stored.get(name) not in known:
                raise UserError(f"resume={self.path}: {name} have changed since the run began")

    def recorded_environment(self) -> dict[str, Any]:
        """The environment before the interruption, which determined rounding; empty for a new run."""
        return {} if self.checkpoint is None else read_environment(self.checkpoint.states)

    def is_exported(self) -> bool:
        """Whether the newest checkpoint is exported, and the best one if keep_best is set."""
        if self.checkpoint is None:
            return False
        best = self.path / "BEST"
        exports = [self.checkpoint.folder / "hf"]
        if self.config.get("keep_best") is not None and best.exists():
            exports.append(best / "hf")
        return self.ranks.run_on_main(lambda: all(path.is_dir() and not path.is_symlink() for path in exports))

    def is_complete(self, n_updates: int) -> bool:
        """Whether all updates are done and the exports, the last step, are written."""
        is_exported = self.is_exported()
        if self.checkpoint is None:
            return False
        try:
            return is_exported and self.checkpoint.states["run"]["counters"]["updates"] >= n_updates
        except (KeyError, TypeError):  # forged: refused when its states are loaded
            return False

    def record(self) -> None:
        """Write config.yaml and warnings.json; for a resumed run also record its checkpoint and overrides."""
        self.ranks.run_on_main(self._write_record)

    def _write_record(self) -> None:
        text = OmegaConf.to_yaml(self.config)
        atomic_write(self.path / "config.yaml", text.encode())
        atomic_write(self.path / "warnings.json", json.dumps(self.warnings, ensure_ascii=False).encode())
        if self.resumed:
            start = None if self.checkpoint is None else self.checkpoint.folder.name
            time = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
            path = self.path / "resumed.jsonl"
            with naming_file(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time, "from": start, "overrides": self.overrides}) + "\n")


def open_run(path: Path, config: DictConfig, overrides: dict[str, Any] | None, ranks: Ranks) -> RunDir:
    """Open the directory of a new run or, with overrides, of a resumed one.

    A run that torchrun restarts continues from its newest checkpoint. UserError if only some ranks found a run there.
    """
    found = ranks.gather(overrides is not None)
    if len(set(found)) > 1:
        problem = f"{sum(found)} of {len(found)} processes find a run in it; choose a folder on a disk that all share"
        raise UserError(f"local_run_dir={path}: {problem}")
    first_path, restarted = ranks.keep_first("run", str(path))  # ranks may have different timestamps
    path = Path(first_path)
    if restarted and overrides is None and ranks.run_on_main(lambda: (path / "config.yaml").is_file()):
        config, overrides = read_run_config(path), {}
    config.local_run_dir = str(path)
    return RunDir(path, config, ranks) if overrides is None else RunDir.reopen(path, config, overrides, ranks)


def make_run_dir(path: Path) -> None:
    """Create the run's directory; UserError if it is not empty or cannot be created."""
    check_free(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"local_run_dir={path}: cannot be created ({error.strerror}); choose another") from None


def check_free(path: Path) -> None:
    """Raise UserError if the directory of a new run is not empty, with the command that continues the run in it.

    What a process leaves that is killed while it creates the directory does not count.
    """
    try:
        names = [entry.name for entry in path.iterdir()]
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"local_run_dir={path}: cannot be read ({error.strerror}); choose another") from None
    problem = f"local_run_dir={path}: holds another run"
    if "config.yaml" in names:
        command = f"{COMMAND} resume={shlex.quote(str(path))}"
        raise UserError(f"{problem}; to continue it: {command} (or choose a new exp_name or local_run_dir)")
    if any(name != ".lock" and not name.startswith(".staging-") for name in names):
        raise UserError(f"{problem}; choose a new exp_name or local_run_dir")


def lock_run_dir(path: Path) -> TextIO:
    """Lock the run's directory until the returned file is closed; UserError if another process has locked it."""
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
        log_message(f"{path}: cannot be locked ({error.strerror}); make sure that no other process writes to it.")
    return file


def settings_fingerprint(config: DictConfig, **fixed: object) -> str:
    """A SHA-256 of the settings that may not change, with the values of others (fixed).

    Paths are left out: their content is compared elsewhere.
    """
    free = ("exp_name", "local_run_dir", "chat_template_time", *MAY_MOVE, *MAY_CHANGE, *MAY_GROW)
    kept = {key: value for key, value in flatten(config).items() if key not in free}
    return hashlib.sha256(repr(sorted({**kept, **fixed}.items())).encode()).hexdigest()


def earlier_settings_fingerprints(config: DictConfig) -> list[str]:
    """The fingerprints of earlier versions, in which a resumed run kept `compile`, and before that its device too."""
    fixed: list[dict[str, object]] = [{}, {"compile": False}, {"compile": True}]
    fixed += [values | {"device": config.device} for values in fixed]
    return [settings_fingerprint(config, **values) for values in fixed]


def read_environment(states: Any) -> dict[str, Any]:
    """The environment in a checkpoint's states, which determined rounding; empty if they have another form."""
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
    """Print changes of the environment since the interruption, which may change rounding."""
    changed = [name for name, value in old.items() if new.get(name) != value]
    if changed:
        changes = "; ".join(f"{LABELS.get(name, name)} was {old[name]}, is {new.get(name)}" for name in changed)
        log_message(f"Results will not be bit for bit the same as without the interruption: {changes}.")
