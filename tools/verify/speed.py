"""The share of the device's matrix rate that an update reaches, what waits for the device, and the peak memory."""

import time
import warnings
from collections.abc import Iterator

import torch

from dpo.data.batches import Batch
from dpo.model.layout_check import LayoutChoice
from dpo.settings.constraints import START
from dpo.system.devices import peak_memory, reset_peak_memory
from dpo.training.budgets import USABLE_SHARE, estimate_memory
from dpo.training.references import ModelReference
from tools.verify.session import Session, free_memory
from tools.verify.table import NOT_RUN, Row, measured
from trainers import BasicTrainer, Inputs

SHARE, SYNCS = "speed: share of the device's matrix rate", "speed: waits for the GPU per pass"
MEMORY = "memory: forecast"
PROMISES = (SHARE, SYNCS, MEMORY)
MAX_SYNCS = 4.0


def check_speed(session: Session, inputs: Inputs) -> Iterator[Row]:
    device = inputs.device
    free_memory()
    can_measure = reset_peak_memory(device)
    before = peak_memory(device)
    with session.alone.trainer(inputs) as trainer:
        batch = next(iter(trainer.train_batches.from_start()))
        trainer.train_step(batch)
        reset_peak_memory(device)
        start = time.perf_counter()
        share = trainer.train_step(batch).get("mfu")
        seconds = time.perf_counter() - start
        peak = peak_memory(device) - before
        if share is None:
            yield Row(SHARE, NOT_RUN, detail="the FLOPs of a mixture of experts are not counted")
        else:
            tokens = sum(map(len, batch.examples))
            detail = f"of {trainer.utilization.rate / 1e9:,.0f} GFLOP/s; {tokens / seconds:,.0f} tokens per second"
            yield measured(SHARE, share, 1.0, "", detail)
        if device.type != "cuda":
            yield Row(SYNCS, NOT_RUN, detail=f"device={device.type} computes while it is called")
        else:
            yield measured(SYNCS, syncs_per_pass(trainer, batch), MAX_SYNCS, "waits")
        if can_measure:
            forecast = forecast_memory(session.alone, trainer, batch)
            detail = f"peak of an update, which is forecast to need {forecast / 1e9:.2f} GB"
            yield measured(MEMORY, peak / 1e9, forecast / USABLE_SHARE[device.type] / 1e9, "GB", detail)
        else:
            yield Row(MEMORY, NOT_RUN, detail="this system cannot measure the peak of a part of a process")
    del trainer
    free_memory()


def syncs_per_pass(trainer: BasicTrainer, batch: Batch) -> float:
    """How often a microbatch makes the host wait for the GPU: of an update with one more microbatch, what is more."""
    n = len(batch.examples)
    counts = [count_syncs(trainer, batch, n_steps) for n_steps in (1, n)]
    return (counts[1] - counts[0]) / max(1, n - 1)


def count_syncs(trainer: BasicTrainer, batch: Batch, n_steps: int) -> int:
    settings = trainer.settings
    trainer.settings = settings.model_copy(update={"gradient_accumulation_steps": n_steps})
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.settings = settings
    return sum("synchronizing" in str(each.message) for each in caught)


def forecast_memory(session: Session, trainer: BasicTrainer, batch: Batch) -> float:
    """The bytes that max_tokens_per_pass=auto and the dry run of several processes expect of an update."""
    choice = LayoutChoice(trainer.packer.layout, trainer.policy.model.config._attn_implementation)
    own = isinstance(trainer.reference, ModelReference) and session.settings.reference != START
    second = trainer.reference.module if own else None  # type: ignore[union-attr]
    estimate = estimate_memory(trainer.policy, session.settings, session.loss, trainer.dtype, choice, 1, second)
    return estimate.at(max(one.n_tokens for one in trainer.packer(batch.examples)))
