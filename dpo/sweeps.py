"""Hydra's sweeps: -m KEY=VALUE,VALUE makes a run of each combination of values."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

FLAGS = ("-m", "--multirun")


def first_run(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command line's only run, or of the first of its sweep; raises HydraException."""
    others = [argument for argument in arguments if argument not in FLAGS]
    if len(others) == len(arguments) or any(argument.startswith("-") for argument in others):
        return others
    return [
        f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
        if override.is_discrete_sweep()
        else str(override.input_line)
        for override in OverridesParser.create().parse_overrides(others)
    ]


def name_run(config: DictConfig, overrides: Sequence[str], arguments: Sequence[str]) -> None:
    """Add to the names of a sweep's run what differs between its runs, so that each has a directory of its own.

    overrides are those of the run, arguments those of the command line.
    """
    parse = OverridesParser.create().parse_overrides
    given = parse([argument for argument in arguments if not argument.startswith("-")])
    fixed = {override.key_or_group for override in given if not override.is_sweep_override()}
    varied = [str(override.input_line) for override in parse(list(overrides)) if override.key_or_group not in fixed]
    if varied:
        name = "_".join(re.sub(r"[^\w.+=-]+", "-", text) for text in varied)
        if "local_run_dir" in fixed:
            config.local_run_dir = str(Path(config.local_run_dir) / name)
        config.exp_name = f"{config.exp_name}_{name}"


@contextmanager
def hydra_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """For a sweep, let its flag stand anywhere, and give Hydra's own notes a folder that is removed afterwards."""
    others = [argument for argument in arguments if argument not in FLAGS]
    if len(others) == len(arguments):
        yield
        return
    with TemporaryDirectory() as notes:
        sys.argv[1:] = [FLAGS[0], f"hydra.sweep.dir='{notes}'", *others]
        yield
