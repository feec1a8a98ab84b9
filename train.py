"""The command line: python train.py loss=dpo model=gpt2.

Prints help and reports mistyped commands at once. Then it composes and validates the config, builds the trainer and
trains. Functions import what they use, since signals must be handled before any slow import, and a mistyped command is
reported before torch is imported.
"""

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.settings.config_files import format_value, read_config_files
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
    from build import build_trainer, load_inputs
    from dpo.reporting.page import RunFiles, log_verdict
    from dpo.reporting.stopping import STOPPED, Stop
    from dpo.runs.export import upload_later
    from dpo.runs.run_dir import open_run
    from tools.dry_run import dry_run
    from tools.inspection import inspect_inputs

    if not on_terminal():
        from transformers.utils import logging

        logging.disable_progress_bar()
    with open_run(Path(settings.local_run_dir), config, overrides, ranks) as run_dir:
        if not settings.inspect and not settings.dry_run:
            run_dir.check_free()
        inputs = load_inputs(settings, loss, run_dir.start_time())
        if inputs.template_time is not None and run_dir.config.get("chat_template_time") is None:
            run_dir.config.chat_template_time = inputs.template_time.isoformat()
        if settings.inspect:
            return inspect_inputs(settings, loss, inputs)
        if settings.dry_run:
            dry_run(settings, loss, inputs, run_dir.config, signals)
            return
        stop = ranks.run_on_main(lambda: Stop.read(run_dir.path)) if run_dir.resumed else None
        has_ended = stop is not None and stop.holds(settings) and (stop.step is None or run_dir.is_exported())
        if has_ended or run_dir.is_complete(len(inputs.train_batches)):
            export = (run_dir.path / "LATEST").resolve() / "hf"
            for key in {"export_dtype", "lora.export_merged"} & set(overrides or {}):
                raise UserError(f"{key}: {export} is already written; remove that folder, and resume the run again")
            if has_ended and stop is not None:
                stop.report(run_dir.path)
            else:
                log_message(f"{run_dir.path}: the run is complete; raise n_epochs or n_examples to continue it.")
            return ranks.run_on_main(lambda: upload_later(export, settings.push_to_hub))
        if run_dir.resumed and run_dir.checkpoint is None:
            log_message(f"{run_dir.path} holds no checkpoint yet, so the run starts over.")
        log_message("\nSettings that differ from the defaults (config.yaml in the run directory has all):")
        changed = " ".join(changed_settings(run_dir.config))
        lines = textwrap.wrap(changed, width=98, break_long_words=False, break_on_hyphens=False)
        log_message(textwrap.indent("\n".join(lines), "  "))
        log_message(f"Run directory: {run_dir.path}")
        trainer = build_trainer(settings, loss, inputs, run_dir, signals)
        ranks.run_on_main(lambda: (run_dir.path / STOPPED).unlink(missing_ok=True))
        try:
            trainer.train()
        except (Stopped, KeyboardInterrupt):
            log_message(f"To resume: {COMMAND} resume={shlex.quote(str(run_dir.path))}")
            raise
    ranks.run_on_main(lambda: log_verdict(RunFiles(run_dir.path)))
    examples, updates = trainer.examples, trainer.updates
    log_message(f"Done: {examples:,} examples in {updates:,} updates. Everything is in {run_dir.path}")


def changed_settings(config: "DictConfig") -> list[str]:
    """The settings of a run that differ from the defaults, as on the command line, without its name and its folder.

    Interpolations stay as they are, since they could expose secrets.
    """
    from omegaconf import OmegaConf

    from dpo.settings.schema import default_values, flatten_plain

    loss, values = config.loss.name, OmegaConf.to_container(config, resolve=False)
    assert isinstance(values, dict)
    defaults = default_values(CONFIG, loss, resumed=True) | default_values(CONFIG, loss)
    shown_elsewhere = ("exp_name", "local_run_dir", "loss.name")
    changed = {key: value for key, value in flatten_plain(values).items() if key not in shown_elsewhere}
    changed = {key: value for key, value in changed.items() if key not in defaults or value != defaults[key]}
    groups = [f"loss={loss}", *(["lora=default"] if "lora" in values else [])]
    return groups + [f"{key}={format_value(value)}" for key, value in changed.items()]


def resume(arguments: Sequence[str], signals: Signals) -> None:
    """Continue the run that resume=RUN names, with its settings; UserError for overrides that it cannot take."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        raise UserError(f"{flags[0]}: resume=RUN continues one run; leave this flag out")
    from dpo.settings.run_config import find_run_dir, override_run_config, read_run_config

    paths = [argument.removeprefix("resume=") for argument in arguments if argument.startswith("resume=")]
    paths = list(dict.fromkeys(re.sub(r"""^(['"])(.*)\1$""", r"\2", path) for path in paths))
    if len(paths) > 1:
        raise UserError(f"resume={paths[0]} resume={paths[1]}: one of them is enough; leave the other out")
    if paths == ["auto"]:
        return continue_or_start(arguments, signals)
    run_dir = find_run_dir(Path(paths[0]))
    config = read_run_config(run_dir)
    config.local_run_dir = str(run_dir)
    overrides = [argument for argument in arguments if not argument.startswith("resume=")]
    run(config, signals, arguments, override_run_config(config, overrides, read_config_files(CONFIG).keys()))


def continue_or_start(arguments: Sequence[str], signals: Signals) -> None:
    """Continue the run in local_run_dir, or start it if there is none: resume=auto.

    UserError if the run has other settings that a resumed run cannot change.
    """
    from dpo.settings.run_config import change_run_config, changes_of_command, plain_settings, read_run_config

    others = [argument for argument in arguments if not argument.startswith("resume=")]
    typed = [argument.partition("=")[0] for argument in others]
    check_arguments(others)
    known = read_config_files(CONFIG).keys()
    command = compose("config", others, known)
    if "local_run_dir" not in typed or "${now:" in plain_settings(command)["local_run_dir"]:
        raise UserError("resume=auto: needs the same run directory at every start; set local_run_dir=FOLDER")
    run_dir = Path(command.local_run_dir)
    if not (run_dir / "config.yaml").is_file():
        return run(command, signals, others)
    config = read_run_config(run_dir, setting="resume=auto local_run_dir=")
    config.local_run_dir = str(run_dir)
    log_message(f"resume=auto: {run_dir} holds a run, which continues.")
    run(config, signals, arguments, change_run_config(config, changes_of_command(config, command, typed), known))


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
    from dpo.reporting.findings import FIGURES
    from preference_datasets import DATASETS
    from utils import register_resolvers

    help_code = print_help(arguments, CONFIG, list(DATASETS), load_losses, metrics=FIGURES)
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
