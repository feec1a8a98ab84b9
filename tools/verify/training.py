"""A short run from its first margin to its export: what must not change, stopping and resuming, and the export."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from dpo.model.logps import response_logps
from dpo.runs.run_dir import RunDir
from dpo.settings.run_config import list_checkpoints
from dpo.system.state import copy_to_host, tensors_in
from dpo.training.first_update import change_logps
from dpo.training.references import CachedReference, ModelReference, Reference, SyncedReference
from tools.verify import exports
from tools.verify.exports import check_export
from tools.verify.session import UPDATES, Session, free_memory
from tools.verify.table import NOT_RUN, Row, complete, measured
from trainers import BasicTrainer, Inputs

SPREAD = 4.0  # a resumed run may differ from another one this many times as much as two identical runs do

MARGIN, REFERENCE = "first margin is 0", "reference is unchanged after updates"
TRAINED, FROZEN = "every trained tensor has a gradient", "frozen weights are unchanged after updates"
RESUME = "a resumed run ends like one without a stop"
PROMISES = (MARGIN, REFERENCE, TRAINED, FROZEN, *exports.PROMISES, RESUME)


def check_training(session: Session, inputs: Inputs) -> Iterator[Row]:
    session = session.alone.with_settings({"save_every": session.config.batch_size})
    folder = session.folder / "whole"
    run = RunDir(folder, session.with_settings({"local_run_dir": str(folder)}).config)
    with session.trainer(inputs, run) as trainer:
        watched = Watched(trainer)
        yield watched.first_margin(session)
        trainer.train()
        yield watched.reference_row()
        yield watched.gradient_row()
        yield watched.frozen_row()
        end = copy_to_host(trainer.tensors(), {})
        trainer.optimizer.state.clear()  # makes room for the models that are opened
        trainer.reference = None
        yield from complete(exports.PROMISES, check_export(session, trainer, folder / "LATEST" / "hf"))
    del trainer, watched
    free_memory()

    spread = 0.0
    if not is_exact(inputs.device):
        with session.trainer(inputs) as again:
            for batch in again.train_batches:
                again.train_step(batch)
            spread = distance(end, again.tensors())
        del again
        free_memory()
    yield resumed_row(session, inputs, folder, end, spread)


def resumed_row(session: Session, inputs: Inputs, folder: Path, end: dict[str, Any], spread: float) -> Row:
    """Resume the run from its first checkpoint, as if it had been killed there, and compare where it ends."""
    first = min(list_checkpoints(folder), key=lambda path: int(path.name.removeprefix("step-")))
    for later in set(list_checkpoints(folder)) - {first}:
        shutil.rmtree(later)
    run = RunDir.reopen(folder, OmegaConf.load(folder / "config.yaml"), {})  # type: ignore[arg-type]
    with session.trainer(inputs, run) as trainer:
        done = trainer.updates
        trainer.train()
        states = trainer.tensors()
        n, total = different(end, states), len(tensors_in(end))
        away = distance(end, states)
    del trainer
    free_memory()
    where = f"stopped after update {done} of {UPDATES}"
    if is_exact(inputs.device):
        return measured(RESUME, n, 0, f"of {total:,}", f"tensors of weights and optimizer that differ; {where}")
    bound = SPREAD * spread
    detail = f"distance of the weights; two identical runs: {spread:.1e}; {where}"
    return measured(RESUME, away, bound, "", detail)


def is_exact(device: torch.device) -> bool:
    """Whether the same run gives the same numbers each time: on a GPU, sums may be taken in another order."""
    return device.type == "cpu"


def different(one: Any, other: Any) -> int:
    """How many tensors of two states are not the same to the last bit; all, if one has more."""
    pairs = tensors_in(one), tensors_in(other)
    if len(pairs[0]) != len(pairs[1]):
        return max(map(len, pairs))
    return sum(not torch.equal(a.cpu(), b.cpu()) for a, b in zip(*pairs, strict=True))


def distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The norm of the difference between the weights in two states."""
    pairs = zip(tensors_in(one["policy"]), tensors_in(other["policy"]), strict=True)
    return sum((a.cpu().double() - b.cpu().double()).square().sum().item() for a, b in pairs) ** 0.5


# What must not change


def checksum(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_of(reference: Reference) -> list[Tensor]:
    """What a reference computes or looks up its numbers with, beside the policy's frozen weights."""
    if isinstance(reference, CachedReference):
        return [reference.sums]
    return [*reference.module.parameters()] if isinstance(reference, ModelReference) else []


@dataclass
class Watched:
    """A trainer that has not been trained yet, and what is known of it then."""

    trainer: BasicTrainer

    def __post_init__(self) -> None:
        trainer = self.trainer
        self.frozen = self.checksums()
        self.reference = None if trainer.reference is None else checksum(weights_of(trainer.reference))
        self.without = {name for name, each in trainer.policy.named_parameters() if each.requires_grad}
        clip = trainer.clip_gradient

        def clip_gradient() -> Tensor:
            self.without -= {name for name, each in self.trained() if each.grad is not None and each.grad.any()}
            return clip()

        trainer.clip_gradient = clip_gradient  # type: ignore[method-assign]

    def trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, each) for name, each in self.trainer.policy.named_parameters() if each.requires_grad]

    def checksums(self) -> dict[str, str]:
        named = self.trainer.policy.named_parameters()
        return {name: checksum([each]) for name, each in named if not each.requires_grad}

    @torch.no_grad()
    def first_margin(self, session: Session) -> Row:
        """Policy and reference on the first batch, before the first update."""
        trainer = self.trainer
        if trainer.reference is None:
            return Row(MARGIN, NOT_RUN, detail="the loss has no reference")
        tolerance = trainer.reference.start_tolerance
        if tolerance == float("inf"):
            return Row(MARGIN, NOT_RUN, detail="policy and reference need not be equal at the start")
        examples = next(iter(trainer.train_batches.from_start())).examples
        largest = 0.0
        trainer.policy.train()
        with trainer.autocast():
            for batch, _, _ in trainer.split_batch(examples):
                logps = response_logps(trainer.policy, batch)
                away = (logps.sums - trainer.reference.logps(batch).sums).abs() / logps.lengths
                largest = max(largest, away.max().item())
        return measured(MARGIN, largest, tolerance, "nats", "per token, the largest of a response")

    def reference_row(self) -> Row:
        reference = self.trainer.reference
        if reference is None:
            return Row(REFERENCE, NOT_RUN, detail="the loss has no reference")
        if isinstance(reference, SyncedReference):
            return Row(REFERENCE, NOT_RUN, detail="sync_reference lets it follow the policy")
        weights = weights_of(reference)
        if not weights:
            return Row(REFERENCE, NOT_RUN, detail=f"it is the policy without its adapter: see {FROZEN}")
        detail = f"checksum of {sum(weight.numel() for weight in weights):,} numbers"
        return measured(REFERENCE, float(checksum(weights) != self.reference), 0, "changed", detail)

    def gradient_row(self) -> Row:
        """Trained tensors whose gradient was always 0 although the log-probabilities depend on them."""
        trainer, trained = self.trainer, dict(self.trained())
        examples = next(iter(trainer.train_batches.from_start())).examples

        def compute() -> Tensor:
            with trainer.autocast():
                parts = trainer.split_batch(examples)
                return torch.cat([response_logps(trainer.policy, one.batch).sums for one in parts])

        unused = {name for name in self.without if not change_logps(trainer.policy, [trained[name]], compute)}
        detail = f"in {UPDATES} updates{f'; {len(unused):,} change no log-probability' if unused else ''}"
        return measured(TRAINED, len(self.without - unused), 0, f"of {len(trained):,} without", detail)

    def frozen_row(self) -> Row:
        if not self.frozen:
            return Row(FROZEN, NOT_RUN, detail="all weights are trained")
        n = sum(self.frozen[name] != now for name, now in self.checksums().items())
        return measured(FROZEN, n, 0, f"of {len(self.frozen):,} changed", "tensors, bit for bit")
