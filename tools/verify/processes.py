"""Several processes against one: loss, gradient norm and every weight after some updates.

python -m tools.verify.processes CONFIG OUT is one of the processes.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers.utils import logging

from build import build_trainer
from dpo.distributed.launch import count_processes, launch
from dpo.distributed.process_group import join, joined
from dpo.distributed.sharding import whole_tensors
from dpo.runs.run_dir import RunDir
from dpo.system.console import discard, mark_rank
from dpo.system.errors import exit_on_error
from dpo.system.state import copy_to_host
from tools.verify.rounding import ratio
from tools.verify.session import UPDATES, Session, free_memory
from tools.verify.table import NOT_RUN, Row, measured
from trainers import BasicTrainer, Inputs

MULTIPLE = 6.0  # of what rounding changes on one process
LOSS, NORM = "processes: loss", "processes: gradient norm"
WEIGHTS = f"processes: every weight after {UPDATES} updates"
PROMISES = (LOSS, NORM, WEIGHTS)

Outcome = dict[str, Any]  # losses and norms of all updates, and the trained weights after them


def updates(trainer: BasicTrainer) -> Outcome:
    """Make all updates; the weights are whole, on the main rank's host."""
    metrics = [trainer.train_step(batch) for batch in trainer.train_batches]
    tensors = whole_tensors(trainer.weights.tensors(), keep=trainer.ranks.is_main)
    return {
        "losses": [each["loss/train"] for each in metrics],
        "norms": [each["grad_norm"] for each in metrics],
        "weights": {name: tensor.detach().cpu() for name, tensor in tensors.items()},
    }


def in_processes(session: Session) -> Outcome:
    """Start the processes of a run as train.py does, and return what the main rank computed."""
    config, out = session.folder / "processes.yaml", session.folder / "processes.pt"
    OmegaConf.save(session.config, config)
    n = count_processes(session.settings.n_processes, session.settings.device)
    try:
        launch(Path("-m"), ["tools.verify.processes", str(config), str(out)], n)
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > 128:  # a signal to this program
            raise
        raise RuntimeError(f"a process ended with exit code {end.code}; what it printed is above") from None
    outcome: Outcome = torch.load(out, weights_only=True)
    out.unlink()
    return outcome


def check_processes(session: Session, inputs: Inputs) -> Iterator[Row]:
    if session.settings.trainer == "BasicTrainer":
        detail = "one process; trainer=FSDPTrainer n_processes=2 checks it"
        yield from (Row(promise, NOT_RUN, detail=detail) for promise in PROMISES)
        return
    several = in_processes(session.unsaved)
    with session.alone.trainer(inputs) as trainer:
        start = copy_to_host(trainer.weights.tensors(), {})
        one = updates(trainer)
    del trainer
    free_memory()
    # The same updates with each example in a microbatch of its own: they differ by rounding alone.
    apart = session.alone.with_settings({"gradient_accumulation_steps": session.config.batch_size})
    with apart.trainer(inputs) as trainer:
        rounded = updates(trainer)
    del trainer
    free_memory()
    # The share of the updates that rounding changes. The losses and norms, a few numbers, may agree by chance.
    unit = distance(rounded["weights"], one["weights"]) / distance(one["weights"], start)
    for promise, name in ((LOSS, "losses"), (NORM, "norms")):
        value = max(map(relative, several[name], one[name]))
        yield measured(promise, value, MULTIPLE * unit, "relative", f"rounding changes {unit:.1e} of the updates")
    yield weights_row(several["weights"], one["weights"], rounded["weights"])


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum((one[name].double() - each.double()).square().sum().item() for name, each in other.items()) ** 0.5


def relative(value: float, expected: float) -> float:
    return abs(value - expected) / max(abs(expected), 1e-30)


def weights_row(several: dict[str, Tensor], one: dict[str, Tensor], rounded: dict[str, Tensor]) -> Row:
    """The worst tensor: its distance from that of one process, in units of what rounding changes."""
    if several.keys() != one.keys():
        return measured(WEIGHTS, float("nan"), MULTIPLE, detail="other tensors than on one process")
    units = {name: (rounded[name].double() - each).norm().item() for name, each in one.items()}
    sizes = {name: each.numel() ** 0.5 for name, each in one.items()}
    mean = sum(unit**2 for unit in units.values()) ** 0.5 / sum(size**2 for size in sizes.values()) ** 0.5
    ratios = {}
    for name, each in one.items():
        error = (several[name].double() - each).norm().item()
        unit = max(units[name], mean * sizes[name])
        ratios[name] = ratio(error, unit)
    worst = max(ratios, key=lambda name: ratios[name])
    return measured(WEIGHTS, ratios[worst], MULTIPLE, "x rounding", f"most in {worst}, of {len(one):,} tensors")


def of_rank(session: Session, out: Path) -> None:
    """Be one of several processes; the main one writes what they computed to a file."""
    with joined(lambda: join(session.settings)) as ranks, RunDir(session.folder / "run", session.config, ranks) as run:
        outcome = updates(build_trainer(*session.validated, session.load_inputs(), run))
        ranks.run_on_main(lambda: torch.save(outcome, out))


def main(config: Path, out: Path) -> None:
    values = OmegaConf.load(config)
    assert isinstance(values, DictConfig)
    of_rank(Session(values, config.parent), out)


if __name__ == "__main__":
    logging.set_verbosity_error()
    mark_rank(os.environ.get("RANK", "0"))
    discard(1)
    exit_on_error(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))
