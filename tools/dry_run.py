"""dry_run=true: forecasts a run's time and peak memory from a few of its updates.

For several processes, only the memory is forecast, by an estimate from the model's shape, without loading weights.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from omegaconf import DictConfig

from build import build_trainer
from dpo.data.batches import Batch, BatchIterator
from dpo.distributed.launch import count_processes
from dpo.distributed.process_group import mesh_sizes
from dpo.model.packing import Packer, balance
from dpo.model.sampling import distinct_prompts
from dpo.runs.run_dir import RunDir
from dpo.settings.schema import Settings
from dpo.system.console import log_message, prefetch, progress
from dpo.system.devices import compute_dtype, peak_memory, read_facts, reset_peak_memory, total_memory
from dpo.system.errors import actionable_errors
from dpo.system.signals import Signals
from dpo.training.budgets import copied_bytes, estimate_before_loading, resolve_max_tokens
from dpo.training.objectives import Loss
from trainers import NO_MEMORY, BasicTrainer, Inputs

COUNTED = 20_000  # training examples whose tokens are counted, at most
TIMED_UPDATES, TIMED_SECONDS = 20, 30.0  # updates are timed until either limit is reached


def dry_run(settings: Settings, loss: Loss, inputs: Inputs, config: DictConfig, signals: Signals) -> float | None:
    """Print the forecast of a run, and return its seconds, None for several processes; files are temporary."""
    if settings.trainer != "BasicTrainer":
        log_message(memory_of_processes(settings, loss, inputs))
        return None
    whole = inputs.eval_batches
    two_batches = replace(whole, n_examples=min(2 * whole.batch_size, whole.n_examples or whole.n_items))
    with TemporaryDirectory() as folder, RunDir(Path(folder), config) as run, actionable_errors(NO_MEMORY):
        unsaved = settings.model_copy(update={"debug": True})
        trainer = build_trainer(unsaved, loss, replace(inputs, eval_batches=two_batches), run, signals)
        return forecast(trainer, whole)


# Several processes


def memory_of_processes(settings: Settings, loss: Loss, inputs: Inputs) -> str:
    """Estimate the memory of the process that needs most; UserError if the settings do not fit their number."""
    n = count_processes(settings.n_processes, settings.device)
    replicate, tensor = mesh_sizes(settings, n)
    device = inputs.device
    dtype = compute_dtype(settings.compute_precision, getattr(torch, settings.model.policy_dtype), device)
    estimate = estimate_before_loading(inputs.model_config, settings, loss, dtype, n // replicate, inputs.reference)
    budget = resolve_max_tokens(settings.max_tokens_per_pass, read_facts(device), lambda: estimate)
    packer = Packer(settings.layout, budget, torch.device("cpu"))
    longest = 0
    for batch in first_batches(inputs.train_batches):
        examples = batch.examples
        for share in balance(list(map(len, examples)), n // tensor):
            rank_examples = [examples[i] for i in share]
            microbatches = packer(rank_examples, settings.gradient_accumulation_steps)
            longest = max([longest, *(one.n_tokens for one in microbatches)])
    needed, available, place = estimate.at(longest), total_memory(device), "the memory of a GPU here"
    if device.type != "cuda":
        available, place = available // n, "its share of the memory here"
    verdict = "fits" if needed <= available else "does not fit"
    return (
        f"Estimated peak memory: {needed / 1e9:.2f} GB on each of {n} processes ({estimate.fixed / 1e9:.2f} GB "
        f"without activations), for a microbatch of {longest:,} tokens. That {verdict} into {available / 1e9:.1f} GB, "
        f"{place}."
    )


# One process


@dataclass(frozen=True)
class Workload:
    """Statistics of a run's first training batches: examples, tokens, and the batch with the longest microbatch."""

    examples: int
    tokens: int
    longest: Batch
    longest_microbatch: int  # tokens


@dataclass(frozen=True)
class Seconds:
    """Measured times: per token for updates and evaluations, per evaluation and model for samples."""

    update: float
    first_evaluation: float
    later_evaluation: float
    samples: float


def forecast(trainer: BasicTrainer, eval_batches: BatchIterator) -> float:
    """Print the forecast, and return the seconds to the end; this trains the trainer, which must be new.

    The trainer evaluates on a few examples; eval_batches has all of the run's.
    """
    device, settings = trainer.device, trainer.settings
    peaks = {"loading": peak_memory(device)}
    workload = read_workload(trainer)
    trainer.train_step(workload.longest)  # allocates the optimizer's state
    reset_peak_memory(device)
    trainer.train_step(workload.longest)
    update = time_updates(trainer)
    peaks["an update"] = peak_memory(device)  # after several: microbatches of different lengths fragment memory
    if copied := copied_bytes(settings, trainer.policy, trainer.optimizer, device):
        peaks["an update while a checkpoint is written"] = peaks["an update"] + copied
    reset_peak_memory(device)
    first, later = time_evaluations(trainer)
    peaks["an evaluation"] = peak_memory(device)
    reset_peak_memory(device)
    samples = time_samples(trainer, eval_batches)
    peaks["sampling"] = peak_memory(device)
    parts = time_to_the_end(trainer, eval_batches, workload, Seconds(update, first, later, samples))
    breakdown = ", ".join(f"{what} {duration(seconds)}" for what, seconds in parts.items() if seconds)
    peak, phase = max((peak, phase) for phase, peak in peaks.items())
    n_updates = len(trainer.train_batches)
    tokens = workload.tokens / workload.examples * settings.batch_size
    log_message(
        f"Updates: {n_updates:,} of {settings.batch_size} examples, {tokens:,.0f} tokens each.\n"
        f"Time: {update * tokens:.3g} seconds per update, {1 / update:,.0f} tokens per second.\n"
        f"Time to the end: {duration(sum(parts.values()))} ({breakdown}), plus loading, saving and the report.\n"
        f"Peak memory: {peak / 1e9:.2f} of {total_memory(device) / 1e9:.1f} GB, in {phase}; an update needs"
        f" {peaks['an update'] / 1e9:.2f} GB, its longest microbatch has {workload.longest_microbatch:,} tokens."
    )
    return sum(parts.values())


def first_batches(batches: BatchIterator) -> Iterator[Batch]:
    """Yield the first batches of a run, up to COUNTED examples."""
    n = min(len(batches), max(1, COUNTED // batches.batch_size))
    return progress(islice(batches.from_start(), n), "counting tokens", total=n)


def read_workload(trainer: BasicTrainer) -> Workload:
    packer = replace(trainer.packer, device=torch.device("cpu"))
    examples = tokens = 0
    longest, size = None, (0, 0)
    for batch in first_batches(trainer.train_batches):
        examples += len(batch.examples)
        tokens += count_tokens(batch)
        for one in packer(batch.examples, trainer.settings.gradient_accumulation_steps):
            if (one.n_tokens, len(one.targets)) > size:
                longest, size = batch, (one.n_tokens, len(one.targets))
    assert longest is not None
    return Workload(examples, tokens, longest, size[0])


def count_tokens(*batches: Batch) -> int:
    return sum(len(example) for batch in batches for example in batch.examples)


def time_updates(trainer: BasicTrainer) -> float:
    """Seconds per token of the first updates, including waiting for data."""
    tokens, start = 0, time.perf_counter()
    for batch in prefetch(islice(trainer.train_batches.from_start(), TIMED_UPDATES)):
        trainer.train_step(batch)
        tokens += count_tokens(batch)
        if time.perf_counter() - start > TIMED_SECONDS:
            break
    return (time.perf_counter() - start) / tokens


def time_evaluations(trainer: BasicTrainer) -> tuple[float, float]:
    """Seconds per token of the first evaluation, and of later ones, which reuse the reference's numbers."""
    tokens = count_tokens(*trainer.eval_batches.from_start())
    start = time.perf_counter()
    trainer.evaluate()
    middle = time.perf_counter()
    trainer.evaluate()
    first, later = (middle - start) / tokens, (time.perf_counter() - middle) / tokens
    return first, first if trainer.settings.sync_reference else later  # a synced reference is computed again


def time_samples(trainer: BasicTrainer, eval_batches: BatchIterator) -> float:
    """Seconds for one model's samples at an evaluation, scaled from the first batch of prompts."""
    settings = trainer.settings
    if not settings.sample_during_eval:
        return 0.0
    prompts = distinct_prompts(eval_batches, settings.n_eval_model_samples)
    first = prompts[: settings.eval_batch_size]
    start = time.perf_counter()
    trainer.sampler.generate(trainer.policy.model, first, "sampling the policy")
    return (time.perf_counter() - start) * -(-len(prompts) // len(first))


def time_to_the_end(
    trainer: BasicTrainer, eval_batches: BatchIterator, workload: Workload, seconds: Seconds
) -> dict[str, float]:
    """The seconds of each part of a run."""
    batches = trainer.train_batches
    n_updates, n_evaluations = len(batches), count_evaluations(trainer)
    n_examples = n_updates * trainer.settings.batch_size
    per_example = workload.tokens / workload.examples
    eval_tokens = count_tokens(*eval_batches.from_start())
    evaluations = seconds.first_evaluation + seconds.later_evaluation * (n_evaluations - 1)
    n_samples = n_evaluations + (trainer.reference is not None)  # the reference samples once
    parts = {
        f"{n_updates:,} updates": seconds.update * per_example * n_examples,
        f"{n_evaluations} evaluations": evaluations * eval_tokens,
        "samples": seconds.samples * n_samples,
    }
    if trainer.loss.needs_reference and trainer.loss.cached_reference:
        tokens = per_example * min(batches.n_items, n_examples) + eval_tokens
        parts["the reference's log-probabilities"] = seconds.first_evaluation * tokens
    return parts


def count_evaluations(trainer: BasicTrainer) -> int:
    """The number of a run's evaluations: the first one, those due before an update, and the last."""
    settings, n_updates = trainer.settings, len(trainer.train_batches)
    due = (n_updates - 1) * settings.batch_size // settings.eval_every
    return int(settings.do_first_eval) + min(n_updates - 1, due) + 1


def duration(seconds: float) -> str:
    """Format a time in seconds, minutes or hours."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
