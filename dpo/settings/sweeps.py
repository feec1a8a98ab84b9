"""Hydra's sweeps: -m KEY=VALUE,VALUE makes one run per combination of values."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

FLAGS = ("-m", "--multirun")


def sweep_problems(arguments: Sequence[str]) -> list[str]:
    """One line for each argument that needs another sweeper or launcher than Hydra's own, such as Optuna's."""
    problems = []
    for argument in arguments:
        if plugin := re.fullmatch(r"\+*hydra/(sweeper|launcher)=(?!basic$).+", argument):
            problems.append(
                f"{argument}: only Hydra's basic {plugin[1]} is supported, which makes one run after another; "
                "leave it out, and sweep over values given as KEY=A,B"
            )
        elif sampled := re.fullmatch(r"([\w.]+)=interval\((.+)\)", argument):
            problems.append(
                f"{argument}: no value is drawn from an interval; give values, as {sampled[1]}={sampled[2]}"
            )
    return problems


def first_run(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line's only run, or of the first run of its sweep; raises HydraException."""
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
    """The runs of a command line with -m: those that have begun, and their folder.

    The folder is the run directory that the first run would have without -m.
    """

    def __init__(self, arguments: Sequence[str]):
        self.arguments = [argument for argument in arguments if not argument.startswith("-")]
        self.folder: Path | None = None
        self.runs: list[Path] = []

    def name_run(self, config: DictConfig, overrides: Sequence[str]) -> None:
        """Name a run and its directory by the values that are swept; a directory that is itself swept stays."""
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
    """For a sweep, put its flag first, as Hydra wants it, and give Hydra's own files a temporary folder."""
    others = [argument for argument in arguments if argument not in FLAGS]
    if len(others) == len(arguments):
        yield
        return
    with TemporaryDirectory() as folder:
        sys.argv[1:] = [FLAGS[0], f"hydra.sweep.dir='{folder}'", *others]
        yield
