"""The run that is verified: its settings on a few rows, and the trainers that it would have."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from build import build_trainer, load_inputs
from dpo.runs.run_dir import RunDir
from dpo.settings.schema import REMOVED, Settings, StopIfSettings, default_values, flatten, validate
from dpo.system.devices import compute_dtype
from dpo.system.installation import CONFIG
from dpo.training.objectives import Loss
from losses import LOSSES
from trainers import BasicTrainer, Inputs

UPDATES = 2
MAX_BATCH = 4
# Settings that say how long a run is, and what it shows and keeps; all others are the user's own.
REPLACED: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "n_epochs": None,
    "warmup_steps": 0,
    "do_first_eval": False,
    "eval_every": 10**9,
    "save_every": None,
    "keep_checkpoints": None,
    "keep_policies": False,
    "keep_best": None,
    "stop_after": None,
    **{f"stop_if.{key}": None for key in StopIfSettings.model_fields},
    "background_saves": False,
    "sample_during_eval": False,
    "report": False,
    "trackers": [],
    "push_to_hub": None,
    "debug": False,
    "dry_run": False,
    "inspect": 0,
    "inspect_ids": False,
    "exp_name": "verify",
}
ONE_PROCESS = {
    "trainer": "BasicTrainer",
    "n_processes": "auto",
    "replicate": 1,
    "tensor_parallel": "auto",
    "ddp": False,
    "reduce_every_pass": False,
}


@dataclass(frozen=True)
class Session:
    """A run's config, which trains UPDATES times on a batch of at most MAX_BATCH rows, and a folder for its files."""

    config: DictConfig
    folder: Path

    @classmethod
    def of(cls, config: DictConfig, folder: Path) -> "Session":
        """Shorten the run that a command line's config describes."""
        n_processes = config.n_processes if isinstance(config.n_processes, int) else 1
        batch = max(min(int(config.batch_size), MAX_BATCH), n_processes)
        lengths = {"batch_size": batch, "n_examples": UPDATES * batch}
        lengths |= {"eval_batch_size": batch, "n_eval_examples": batch}
        places = {"local_dirs": [str(folder)], "local_run_dir": str(folder / "run")}
        lora = {} if config.get("lora") is None else {"lora.dropout": 0.0}
        own = changed(config, REPLACED | lengths | places | lora)
        if not OmegaConf.is_missing(own.model, "name_or_path"):
            OmegaConf.resolve(own)  # other processes read it as plain values
        return cls(own, folder)

    def with_settings(self, changes: Mapping[str, Any]) -> "Session":
        return replace(self, config=changed(self.config, changes))

    @property
    def alone(self) -> "Session":
        """The same run on one device."""
        return self.with_settings(ONE_PROCESS)

    @property
    def unsaved(self) -> "Session":
        """The same run without checkpoints and export."""
        return self.with_settings({"debug": True, "save_every": None, "export_dtype": "auto"})

    @cached_property
    def validated(self) -> tuple[Settings, Loss]:
        """The settings and the loss; UserError if a combination is refused."""
        values = {key: value for key, value in flatten(self.config).items() if key not in REMOVED}
        return validate(values, default_values(CONFIG, self.config.loss.name), LOSSES)

    @property
    def settings(self) -> Settings:
        return self.validated[0]

    @property
    def loss(self) -> Loss:
        return self.validated[1]

    def load_inputs(self) -> Inputs:
        """Read the data, from a table in the folder if it has been read before."""
        return load_inputs(*self.validated)

    @contextmanager
    def trainer(self, inputs: Inputs, run: RunDir | None = None) -> Iterator[BasicTrainer]:
        """Build the trainer, in a run directory that is removed; without one, it saves nothing."""
        session = self if run is not None else self.unsaved
        with TemporaryDirectory(dir=self.folder) as folder:
            own = run or RunDir(Path(folder) / "run", session.config)
            with own:
                yield build_trainer(*session.validated, from_start(inputs), own)

    def dtype(self, inputs: Inputs) -> torch.dtype:
        """The dtype of the computation."""
        stored = getattr(torch, self.settings.model.policy_dtype)
        return compute_dtype(self.settings.compute_precision, stored, inputs.device)


def from_start(inputs: Inputs) -> Inputs:
    return replace(inputs, train_batches=inputs.train_batches.from_start())


def changed(config: DictConfig, changes: Mapping[str, Any]) -> DictConfig:
    """A config with other values under dotted keys."""
    config = config.copy()
    OmegaConf.set_struct(config, False)
    for key, value in changes.items():
        OmegaConf.update(config, key, value, merge=False)
    return config


def free_memory() -> None:
    """Free what a trainer that is no longer used has held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
