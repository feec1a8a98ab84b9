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


class Sweep:
    """The runs of a command line with -m: their folder, and those that have begun.

    The folder is the run directory that the first run would have by itself.
    """

    def __init__(self, arguments: Sequence[str]):
        """Take the arguments of the command line."""
        self.arguments = [argument for argument in arguments if not argument.startswith("-")]
        self.folder: Path | None = None
        self.runs: list[Path] = []

    def name_run(self, config: DictConfig, overrides: Sequence[str]) -> None:
        """Name a run and its directory, unless that is swept itself, by those of its overrides that are swept."""
        parse = OverridesParser.create().parse_overrides
        fixed = {o.key_or_group for o in parse(self.arguments) if not o.is_sweep_override()}
        varied = {o.key_or_group: str(o.input_line) for o in parse(list(overrides)) if o.key_or_group not in fixed}
        self.folder = self.folder or Path(config.local_run_dir)
        if varied:
            name = "_".join(re.sub(r"[^\w.+=-]+", "-", text) for text in varied.values())
            if "local_run_dir" not in varied:
                config.local_run_dir = str(self.folder / name)
            config.exp_name = f"{config.exp_name}_{name}"
        self.runs.append(Path(config.local_run_dir))


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
