"""The command line: python -m tools.rounds model=gpt2 prompts=[prompts.jsonl] scorer=module:function loss=dpo."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo.settings.config_files import read_config_files
from dpo.settings.help import Program, print_help
from dpo.settings.hints import argument_problems
from dpo.system.console import guard_streams, log_message
from dpo.system.errors import EXIT_CODES, UserError, exit_on_error, raise_problems
from dpo.system.installation import COMMAND, CONFIG
from dpo.system.signals import ProcessSignals
from train import compose, load_losses, quoted

if TYPE_CHECKING:
    from tools.rounds.settings import Config

ROUNDS = "python -m tools.rounds"
PROGRAM = Program(
    ROUNDS,
    "rounds",
    "Trains a language model in rounds on pairs of its own samples: sample, score, pair, train, judge. Everything is "
    "written to one folder, OUT, and a stage that is done is never repeated.",
    (
        (
            f"{ROUNDS} loss=dpo model.name_or_path=PATH prompts=[prompts.jsonl] scorer=judges:kindness",
            "judges.py has the function kindness(prompt, response)",
        ),
        (f"{ROUNDS} resume=OUT", "continue after a stop"),
        (f"{ROUNDS} resume=OUT rounds=5", "add rounds"),
    ),
    (
        ("--help KEY", "help on a setting, group or option: --help samples, --help scorer, --help engine=server"),
        ("loss=help", "the formulas of all losses"),
    ),
)


def start(arguments: Sequence[str]) -> None:
    """Print help, resume rounds, or begin new ones."""
    from preference_datasets import DATASETS
    from utils import register_resolvers

    help_code = print_help(arguments, CONFIG, list(DATASETS), load_losses, PROGRAM)
    if help_code is not None:
        sys.exit(help_code)
    register_resolvers()
    try:
        if "RANK" in os.environ:
            raise UserError("torchrun: starts one process too many for rounds; set trainer=FSDPTrainer instead")
        if flags := [argument for argument in arguments if argument.startswith("-")]:
            raise UserError(f"{flags[0]}: rounds take settings alone, KEY=VALUE; leave this flag out")
        if any(re.match(r"resume=(?!null$)", argument) for argument in arguments):
            resume(arguments)
        else:
            begin([part for argument in arguments for part in written_out(argument)])
    except UserError as error:  # hints name the help of a training run
        lines = [str(line).replace(f"`{COMMAND} --help", f"`{ROUNDS} --help") for line in error.args]
        raise UserError(*lines) from None


def written_out(argument: str) -> list[str]:
    """A scorer that is given without its kind, as module:function or a reward model's folder, with its kind."""
    key, _, value = argument.partition("=")
    path = value.strip("'\"")
    if key == "scorer" and Path(path).is_dir():
        return ["scorer=reward", f"scorer.model={quoted(path)}"]
    if key == "scorer" and "/" in path:
        raise UserError(f"scorer={path}: there is no such folder; give a reward model's folder, or scorer=NAME")
    if key == "scorer" and re.fullmatch(r"[\w.]+:\w+", path):
        return ["scorer=function", f"scorer.function={quoted(path)}"]
    return [argument]


def begin(arguments: Sequence[str]) -> None:
    """Begin rounds in a new folder, OUT."""
    files = read_config_files(CONFIG, PROGRAM.config)
    raise_problems(argument_problems(arguments, files.keys(), files.options()))
    if not any(argument.startswith("scorer=") for argument in arguments):
        forms = "module:function, a reward model's folder, or one of config/scorer/"
        raise UserError(f"scorer: is missing; set scorer=VALUE, {forms}: `{ROUNDS} --help scorer`")
    values = compose(PROGRAM.config, arguments, files.keys())
    from tools.rounds.settings import validate_config

    config = validate_config(values)
    check_exist(config)
    if config.run.dry_run:
        from tools.rounds.dry_run import dry_run

        return dry_run(config)
    from tools.rounds.out import create

    with create(config.out, values):
        run(validate_config(values), [])


def check_exist(config: "Config") -> None:
    """Refuse a scorer or a reference that is not there, before anything is sampled or written."""
    from dpo.model.reference_weights import open_reference

    config.scorer.fingerprint()
    if config.rounds.reference not in ("previous", "first"):
        open_reference(config.rounds.reference)


def resume(arguments: Sequence[str]) -> None:
    """Continue the rounds in OUT, with their settings and the overrides that they can take."""
    from tools.rounds.out import reopen, write_config
    from tools.rounds.settings import override_config, validate_config

    given = next(argument.removeprefix("resume=") for argument in arguments if argument.startswith("resume="))
    out = Path(re.sub(r"""^(['"])(.*)\1$""", r"\2", given))
    overrides = [argument for argument in arguments if not argument.startswith("resume=")]
    files = read_config_files(CONFIG, PROGRAM.config)
    with reopen(out) as values:
        of_runs = override_config(values, overrides, files.keys())
        config = validate_config(values)
        write_config(values)
        run(config, of_runs)


def run(config: "Config", overrides: Sequence[str]) -> None:
    """Run the rounds; overrides are those of the command line for a training run that is resumed."""
    from tools.rounds.loop import Rounds

    try:
        Rounds(config, overrides).run()
    except (KeyboardInterrupt, SystemExit) as stop:
        if getattr(stop, "code", None) == EXIT_CODES["refused"]:
            raise
        log_message(f"To resume: {ROUNDS} resume={shlex.quote(str(config.out))}")
        raise


if __name__ == "__main__":
    guard_streams()
    with ProcessSignals().installed():
        exit_on_error(lambda: start(sys.argv[1:]))
