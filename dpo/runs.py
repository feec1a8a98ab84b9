"""A run directory: making, locking and recording it, and opening it again to resume."""

import fcntl
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo.checkpoints import atomic_write, checkpoints, clear_leftovers, newest_checkpoint
from dpo.console import log_message
from dpo.distributed import ALONE, Ranks
from dpo.errors import RunError, UserError, naming_file, raise_problems, summarize_error
from dpo.settings import flatten, flatten_plain
from dpo.suggestions import suggest, written

# What may change in a resumed run: it touches no trained number, but for the rounding of the last three settings.
MAY_CHANGE = (
    *("trackers", "wandb.enabled", "wandb.entity", "wandb.project", "minimum_log_interval_secs", "report"),
    *("sample_during_eval", "n_eval_model_samples", "sample_temperature", "sample_top_k", "sample_top_p"),
    *("save_every", "keep_checkpoints", "keep_policies", "eval_batch_size", "push_to_hub"),
    *("max_tokens_per_pass", "activation_checkpointing", "device", "lora.export_merged"),
    *("n_processes", "replicate", "tensor_parallel", "ddp", "reduce_every_pass", "collective_timeout"),
)
MAY_GROW = ("n_epochs", "n_examples")
MAY_MOVE = (
    *("datasets", "local_dirs", "model.name_or_path", "model.tokenizer_name_or_path"),
    *("model.archive", "lora.path"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, and the state of each of its parts."""

    folder: Path
    states: dict[str, Any]


class RunDir:
    """The directory of one run: new, or resumed with what its newest checkpoint holds.

    `identity` names what a resumed run must find again (data, settings, reference), each by a fingerprint.
    """

    def __init__(self, path: Path, config: DictConfig, ranks: Ranks = ALONE):
        self.path, self.config, self.ranks = path, config, ranks
        self.identity: dict[str, str] = {}
        self.resumed = False
        self.checkpoint: Checkpoint | None = None
        self.overrides: dict[str, Any] = {}
        self.open_files = ExitStack()

    @classmethod
    def reopen(cls, path: Path, config: DictConfig, overrides: dict[str, Any], ranks: Ranks = ALONE) -> "RunDir":
        """Lock a run's directory, clear what a killed process left there, and read the newest checkpoint."""
        run = cls(path, config, ranks)
        run.resumed, run.overrides = True, overrides

        def find() -> tuple[Path, dict[str, Any]] | None:
            run.open_files.enter_context(lock_run_dir(path))
            clear_leftovers(path)
            return newest_checkpoint(path)

        found = run.ranks.on_main(find)
        run.checkpoint = None if found is None else Checkpoint(*found)
        if found is None:
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
            self.ranks.on_main(make)
            self.record()

    def identify(self, identity: Mapping[str, str], earlier: Mapping[str, Callable[[], str]]) -> None:
        """Keep the run's identity; UserError if the checkpoint that is resumed from has another.

        earlier computes what earlier versions stored under some of the names, which is as good.
        """
        self.identity = dict(identity) | {"the settings": settings_fingerprint(self.config)}
        if self.checkpoint is None:
            return
        try:
            stored = dict(self.checkpoint.states["run"]["identity"])
        except (KeyError, TypeError):
            raise RunError(f"{self.checkpoint.folder}: is not a checkpoint of a run", "no checkpoint") from None
        earlier = {**earlier, "the settings": partial(settings_fingerprint, self.config, with_device=True)}
        for name, value in self.identity.items():
            if stored.get(name) != value and (name not in earlier or stored.get(name) != earlier[name]()):
                raise UserError(f"resume={self.path}: {name} are not those that the run began with")

    def is_complete(self, n_updates: int) -> bool:
        """Return whether no update is left and the export, which comes last, was written."""
        if self.checkpoint is None:
            return False
        export = self.checkpoint.folder / "hf"
        is_exported = self.ranks.on_main(lambda: export.is_dir() and not export.is_symlink())
        try:
            return is_exported and self.checkpoint.states["run"]["counters"]["updates"] >= n_updates
        except (KeyError, TypeError):  # a forged one, which is refused when its states are loaded
            return False

    def record(self) -> None:
        """Write config.yaml, and, of a resumed run, from where and with which overrides it goes on."""
        self.ranks.on_main(self.write_record)

    def write_record(self) -> None:
        """Write what record does, on the main rank."""
        text = OmegaConf.to_yaml(self.config)
        atomic_write(self.path / "config.yaml", text.encode())
        if self.resumed:
            start = None if self.checkpoint is None else self.checkpoint.folder.name
            time = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
            path = self.path / "resumed.jsonl"
            with naming_file(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time, "from": start, "overrides": self.overrides}) + "\n")


def open_run(path: Path, config: DictConfig, overrides: dict[str, Any] | None, ranks: Ranks) -> RunDir:
    """Return a new run's directory, or with overrides that of the run that is resumed.

    A run that torchrun has started again goes on from its newest checkpoint.
    """
    path, restarted = ranks.same_run(path)
    if restarted and overrides is None:
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
    """Return a SHA-256 of the settings that may not change; what lies behind a path is compared by its content.

    with_device gives the fingerprint of earlier versions, in which a resumed run kept its device.
    """
    free = ("exp_name", "local_run_dir", *MAY_MOVE, *MAY_CHANGE, *MAY_GROW)
    values = flatten(config).items()
    kept = {key: value for key, value in values if key not in free or (with_device and key == "device")}
    return hashlib.sha256(repr(sorted(kept.items())).encode()).hexdigest()


# Resuming by the command line


def find_run_dir(path: Path) -> Path:
    """Return the run directory that RUN, RUN/LATEST or RUN/step-N stands for; N must be the newest."""
    if path.name != "LATEST" and not re.fullmatch(r"step-\d+", path.name):
        return path
    steps = checkpoints(path.parent)
    if path.name != "LATEST" and steps and path.name != steps[0].name:
        problem = f"resume={path}: a run goes on from its newest checkpoint, {steps[0].name}"
        raise UserError(f"{problem}; start a new run with model.archive={path}/policy.pt" if path.is_dir() else problem)
    return path.parent


def read_run_config(run_dir: Path) -> DictConfig:
    """Read a run's config.yaml as plain values; UserError if the folder is not a run directory."""
    try:
        own = ("LATEST", ".staging-LATEST")
        links = [path.name for path in run_dir.iterdir() if path.is_symlink() and path.name not in own]
        text = (run_dir / "config.yaml").read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it holds YAML aliases, which no run writes")
        config = OmegaConf.create(text)
        assert isinstance(config, DictConfig)
        OmegaConf.to_yaml(config)
    except (OSError, yaml.YAMLError, OmegaConfBaseException, AssertionError, AttributeError, TypeError, ValueError,
            RecursionError) as error:  # fmt: skip
        reason = summarize_error(error)
        raise UserError(f"resume={run_dir}: not a run directory: its config.yaml cannot be read ({reason})") from None
    if links:
        raise UserError(f"resume={run_dir}: holds links ({', '.join(sorted(links))}), which no run makes; remove them")
    return config


def override_run_config(config: DictConfig, arguments: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """Change a resumed run's config by the overrides that it may take, and return these; UserError for any other.

    Interpolations that the config holds are refused, since whoever wrote the file could have secrets resolved by them.
    """
    path, stored = config.local_run_dir, OmegaConf.to_container(config, resolve=False)
    assert isinstance(stored, dict)
    settings = flatten_plain(stored)
    try:
        overrides = [(o, o.key_or_group, o.value()) for o in OverridesParser.create().parse_overrides(list(arguments))]
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(" ".join(str(error).split())) from None
    problems, taken = [], {}
    for override, key, value in overrides:
        if value == settings.get(key, settings.get(f"{key}.name", override)):  # loss=dpo, as the run has it
            continue
        if key not in settings and key not in ("model", "loss", "lora"):
            problems.append(suggest(key, written(value), known))
        elif override.type != OverrideType.CHANGE or override.is_sweep_override():
            problems.append(f"{override.input_line}: a resumed run takes KEY=VALUE alone")
        elif key in MAY_GROW and (name := settings.get("scheduler", "constant")) != "constant":
            fixed = f"{name} lowers the learning rate over the run's {key}={written(settings[key])}"
            problems.append(f"{key}={written(value)}: scheduler={fixed}, so a longer run is another one; start it anew")
        elif may_change(key, settings.get(key), value):
            OmegaConf.update(config, key, value)
            taken[key] = value
        else:
            own = f"{key}={written(settings[key])}" if key in settings else f"its own {key}"
            remedy = f"or start a new run, which can begin with model.archive={path}/LATEST/policy.pt"
            problems.append(f"{key}={written(value)}: a resumed run keeps {own}; leave this out, {remedy}")
    for key, value in settings.items():
        if key not in taken and is_interpolated(value):
            problems.append(f"{key}={value}: is not resolved again when a run is resumed; add {key}=VALUE")
    raise_problems(problems)
    return taken


def may_change(key: str, old: object, new: object) -> bool:
    """Return whether a resumed run takes a new value; one for an interpolation is compared with the checkpoint's."""
    return key in (*MAY_CHANGE, *MAY_MOVE) or (key in MAY_GROW and grows(old, new)) or is_interpolated(old)


def is_interpolated(value: object) -> bool:
    """Return whether OmegaConf would look something up in a stored value, but for a path in this project."""
    return "${" in str(value) and not re.fullmatch(r"\$\{project_dir:[\w./-]+\}", str(value))


def grows(old: object, new: object) -> bool:
    """Return whether a limit is raised, or lifted."""
    if not isinstance(old, (int, float)) or isinstance(new, bool):
        return False
    return new is None or (isinstance(new, (int, float)) and new > old)
