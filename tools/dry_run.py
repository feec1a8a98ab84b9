"""dry_run=true: the time and memory that a run will take, without training it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import DictConfig

from build import build_trainer
from dpo.runs.run_dir import RunDir
from dpo.settings.schema import Settings
from dpo.system.errors import actionable_errors
from dpo.system.signals import Signals
from dpo.training.objectives import Loss
from tools.forecast import forecast
from tools.memory_plan import print_memory_plan
from trainers import NO_MEMORY, TRAINERS, Inputs


def dry_run(settings: Settings, loss: Loss, inputs: Inputs, config: DictConfig, signals: Signals) -> None:
    """Print what a run will take, of several processes the memory; its files go to a temporary folder."""
    alone = settings.model_copy(update={"debug": True, "trainer": "BasicTrainer"})
    with TemporaryDirectory() as folder, RunDir(Path(folder), config) as run:
        trainer = build_trainer(alone, loss, inputs, run, signals)
        with actionable_errors(NO_MEMORY):
            if settings.trainer == "BasicTrainer":
                forecast(trainer)
            else:
                print_memory_plan(trainer, settings, TRAINERS[settings.trainer].prepare)
