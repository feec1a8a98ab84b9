"""The command line: python train.py loss=dpo model=gpt2.

Prints help and reports mistyped commands at once. Then it composes and validates the config, builds the trainer and
trains. Functions import what they use, since signals must be handled before any slow import, and a mistyped command is
reported before torch is imported.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.settings.config_files import read_config_files
from dpo.settings.help import print_help
from dpo.settings.hints import argument_problems, suggest
from dpo.system.console import guard_streams, log_message, mark_rank, on_terminal
from dpo.system.errors import Stopped, UserError, exit_on_error, raise_problems
from dpo.system.installation import COMMAND, CONFIG
from dpo.system.launchers import torchrun_variables
from dpo.system.signals import ProcessSignals, Signals

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dpo.distributed.ranks import Ranks
    from dpo.settings.schema import Settings
    from dpo.training.objectives import Loss

QUOTE = """: quote a value with special characters, as in "datasets=['~/pairs.jsonl']\""""


def run(
    config: "DictConfig", signals: Signals, arguments: Sequence[str], overrides: dict[str, Any] | None = None
) -> None:
    """Validate a config and train: a new run, or with overrides a resumed one.

    A trainer for several devices starts further processes with the same arguments.
    """
    from omegaconf import OmegaConf

    from dpo.settings.schema import REMOVED, default_values, flatten, validate
    from losses import LOSSES

    defaults = default_values(CONFIG, OmegaConf.select(config, "loss.name"), overrides is not None)
    settings, loss = validate({k: v for k, v in flatten(config).items() if k not in REMOVED}, defaults, LOSSES)
    config = config.copy()
    for key in ("exp_name", "local_run_dir"):  # all processes share one time stamp; other interpolations stay
        config[key] = getattr(settings, key)

    if settings.trainer != "BasicTrainer" and "RANK" not in os.environ and not settings.dry_run:
        from dpo.distributed.launch import count_processes, launch

        names = ("exp_name", "local_run_dir") if overrides is None else ()
        arguments = [*arguments, *(f"{key}={quoted(config[key])}" for key in names)]
        return launch(Path(__file__), arguments, count_processes(settings.n_processes, settings.device))
    from dpo.distributed.process_group import join, joined

    with joined(lambda: join(settings)) as ranks:
        train(settings, loss, config, signals, ranks, overrides)


def train(
    settings: "Settings",
    loss: "Loss",
    config: "DictConfig",
    signals: Signals,
    ranks: "Ranks",
    overrides: dict[str, Any] | None,
) -> None:
    """Build the trainer and train, in each process."""
    from omegaconf import OmegaConf

    from build import build_trainer, load_inputs
    from dpo.runs.export import upload_later
    from dpo.runs.run_dir import open_run
    from tools.dry_run import dry_run
    from tools.inspection import inspect_inputs

    if not on_terminal():
        from transformers.utils import logging

        logging.disable_progress_bar()
    with open_run(Path(settings.local_run_dir), config, overrides, ranks) as run_dir:
        inputs = load_inputs(settings, loss, run_dir.start_time())
        if inputs.template_time is not None and run_dir.config.get("chat_template_time") is None:
            run_dir.config.chat_template_time = inputs.template_time.isoformat()
        if settings.inspect:
            return inspect_inputs(settings, loss, inputs)
        if settings.dry_run:
            dry_run(settings, loss, inputs, run_dir.config, signals)
            return
        if run_dir.is_complete(len(inputs.train_batches)):
            export = (run_dir.path / "LATEST").resolve() / "hf"
            for key in {"export_dtype", "lora.export_merged"} & set(overrides or {}):
                raise UserError(f"{key}: {export} is already written; remove that folder, and resume the run again")
            log_message(f"{run_dir.path}: the run is complete; raise n_epochs or n_examples to continue it.")
            return ranks.run_on_main(lambda: upload_later(export, settings.push_to_hub))
        log_message(f"\n{OmegaConf.to_yaml(run_dir.config)}\nRun directory: {run_dir.path}")
        trainer = build_trainer(settings, loss, inputs, run_dir, signals)
        try:
            trainer.train()
        except (Stopped, KeyboardInterrupt):
            log_message(f"To resume: {COMMAND} resume={shlex.quote(str(run_dir.path))}")
            raise
    examples, updates = trainer.examples, trainer.updates
    log_message(f"Done: {examples:,} examples in {updates:,} updates. Everything is in {run_dir.path}")


def resume(arguments: Sequence[str], signals: Signals) -> None:
    """Continue the run that resume=RUN names, with its settings; UserError for overrides that it cannot take."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        raise UserError(f"{flags[0]}: resume=RUN continues one run; leave this flag out")
    from dpo.settings.run_config import find_run_dir, override_run_config, read_run_config

    paths = [argument.removeprefix("resume=") for argument in arguments if argument.startswith("resume=")]
    run_dir = find_run_dir(Path(re.sub(r"""^(['"])(.*)\1$""", r"\2", paths[-1])))
    config = read_run_config(run_dir)
    config.local_run_dir = str(run_dir)
    overrides = [argument for argument in arguments if not argument.startswith("resume=")]
    run(config, signals, arguments, override_run_config(config, overrides, read_config_files(CONFIG).keys()))


def quoted(value: str) -> str:
    """Quote a value for Hydra's command line."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def check_arguments(arguments: Sequence[str]) -> None:
    """Report mistyped keys and groups, one line each, before Hydra composes the config."""
    from dpo.settings.sweeps import first_run, sweep_problems

    files = read_config_files(CONFIG)
    raise_problems(sweep_problems(arguments) + argument_problems(arguments, files.keys(), files.options()))
    with explained_by_key(files.keys()):
        overrides = first_run(arguments)
    if not any(override.startswith("-") for override in overrides):
        compose("config", overrides, files.keys())


def compose(name: str, overrides: Sequence[str], known: Sequence[str]) -> "DictConfig":
    """Compose config/NAME.yaml with overrides; UserError in one line if Hydra refuses them. known are all keys."""
    import hydra

    with explained_by_key(known), hydra.initialize_config_dir(str(CONFIG), version_base=None):
        return hydra.compose(name, overrides=list(overrides))


@contextmanager
def explained_by_key(known: Sequence[str]) -> Iterator[None]:
    """Turn Hydra's errors into a UserError of one line, with a hint if a key is not one of those that are known."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        text = " ".join(str(error).split())
        text = re.sub(r"( \^)? See https://hydra\.cc/\S+ for details$", QUOTE, re.sub(r"^Lexer\w+: ", "", text))
        key = re.match(r"Could not override '([^']*)'", text)
        raise UserError(suggest(key[1], None, known) if key else text) from None


def load_losses() -> dict[str, type["Loss"]]:
    from losses import LOSSES

    return LOSSES


def start(arguments: Sequence[str], signals: Signals) -> None:
    """Print help, resume a run, or let Hydra compose the config of a run or of each run of a sweep."""
    from preference_datasets import DATASETS
    from utils import register_resolvers

    help_code = print_help(arguments, CONFIG, list(DATASETS), load_losses)
    if help_code is not None:
        sys.exit(help_code)
    os.environ.update(torchrun_variables(os.environ))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        mark_rank(os.environ.get("RANK", "0"))
    register_resolvers()
    if any(re.match(r"resume=(?!null$)", argument) for argument in arguments):
        return resume(arguments, signals)
    check_arguments(arguments)
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from dpo.settings.sweeps import FLAGS, Sweep, hydra_arguments
    from tools.frontier import close_sweep

    if "RANK" in os.environ and set(FLAGS) & set(arguments):
        raise UserError(f"{FLAGS[0]}: torchrun's processes belong to one run; start torchrun once per run")

    sweep = Sweep(arguments)

    def start_run(config: "DictConfig") -> None:
        """Run with a composed config; Hydra calls this once per run, and would print a traceback of an error."""
        hydra_config = HydraConfig.get()
        overrides = arguments
        if hydra_config.mode == RunMode.MULTIRUN:
            overrides = hydra_config.overrides.task
            sweep.name_run(config, overrides)
        exit_on_error(lambda: run(config, signals, overrides))

    with hydra_arguments(arguments):
        hydra.main(version_base=None, config_path=str(CONFIG), config_name="config")(start_run)()
    if len(sweep.runs) > 1:
        close_sweep(sweep.runs[0].parent, sweep.runs)


def main() -> None:
    """Run the command line; Hydra's flags (--multirun, --cfg, --shell-completion) work as usual."""
    guard_streams()
    arguments = sys.argv[1:]
    with ProcessSignals().installed() as signals:
        exit_on_error(lambda: start(arguments, signals))


if __name__ == "__main__":
    main()
