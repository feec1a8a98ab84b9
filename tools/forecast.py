"""dry_run=true: what a run will take, measured on a few of its updates: time, memory, and memory with each remedy."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

import torch

from dpo.data.batches import Batch
from dpo.model.loading import recompute_activations
from dpo.model.packing import PackedBatch
from dpo.model.sampling import distinct_prompts
from dpo.system.console import log_message, prefetch, progress
from dpo.system.devices import peak_memory, reset_peak_memory, total_memory
from dpo.system.files import atomic_write, sha256
from dpo.system.state import copy_to_host, size_of, tensors_in
from dpo.training.references import ModelReference, SyncedReference

if TYPE_CHECKING:
    from trainers import BasicTrainer


T = TypeVar("T")
MEASURED = 20_000  # training examples whose tokens are counted, at most
TIMED_UPDATES, TIMED_SECONDS = 20, 30.0  # updates that are timed, until the first of the two is reached
WRITTEN = 2**28  # bytes that are written to see how long a checkpoint takes


@dataclass(frozen=True)
class Workload:
    """What some training batches hold: counts of examples, tokens and truncated texts, and the batch to fear most."""

    examples: int
    tokens: int
    truncated: Counter[str]
    longest: Batch  # the one with the longest pass
    longest_pass: PackedBatch

    @classmethod
    def of(cls, trainer: "BasicTrainer", n_examples: int) -> "Workload":
        """Look at the first examples of a run's batches."""
        batches, packer = trainer.train_batches.from_start(), replace(trainer.packer, device=torch.device("cpu"))
        n_batches = min(len(batches), max(1, n_examples // batches.batch_size))
        examples = tokens = 0
        truncated: Counter[str] = Counter()
        size, longest, longest_pass = (0, 0), None, None
        for batch in progress(islice(batches, n_batches), "counting tokens", total=n_batches):
            examples += len(batch.examples)
            tokens += count_tokens(batch)
            truncated.update(what for example in batch.examples for what in example.truncated)
            for one in packer(batch.examples, trainer.settings.gradient_accumulation_steps):
                if (one.n_tokens, len(one.targets)) > size:
                    size = (one.n_tokens, len(one.targets))
                    longest, longest_pass = batch, one
        assert longest is not None and longest_pass is not None
        return cls(examples, tokens, truncated, longest, longest_pass)


def count_tokens(batch: Batch) -> int:
    """Return the tokens of a batch's examples."""
    return sum(map(len, batch.examples))


def forecast(trainer: "BasicTrainer") -> None:
    """Print what the run of a new trainer will take; afterwards its weights are no run's."""
    device = trainer.device
    peaks = {"loading": peak_memory(device)}
    workload = Workload.of(trainer, MEASURED)
    trainer.train_step(workload.longest)  # makes the optimizer's state, and whatever is made at a first pass
    saving = time_saving(trainer)
    copied = copy_to_host(trainer.state_dict([]), {}) if holds_copies(trainer) else {}
    reset_peak_memory(device)
    trainer.train_step(workload.longest)
    seconds = time_updates(trainer)
    peaks["an update"] = peak_memory(device)  # of all these: passes of several lengths leave pieces of free memory
    evaluations, peaks["an evaluation"] = measured(device, lambda: time_evaluation(trainer))
    sampling, peaks["sampling"] = measured(device, lambda: time_samples(trainer))
    for line in (
        *workload_lines(trainer, workload),
        *time_lines(trainer, workload, seconds, evaluations, sampling, saving),
        *memory_lines(trainer, workload, peaks, size_of(tensors_in(copied))),
    ):
        log_message(line)


# Time


def time_updates(trainer: "BasicTrainer") -> float:
    """Return the seconds per token of the first updates, with all that the training loop waits for."""
    batches = islice(trainer.train_batches.from_start(), TIMED_UPDATES)
    tokens, start = 0, time.perf_counter()
    for batch in prefetch(batches):
        trainer.train_step(batch)
        tokens += count_tokens(batch)
        if time.perf_counter() - start > TIMED_SECONDS:
            break
    return (time.perf_counter() - start) / tokens


def time_evaluation(trainer: "BasicTrainer") -> tuple[float, float]:
    """Return the seconds per token of the first two evaluation batches, at a run's first evaluation and at later ones.

    A reference that stays computes nothing in the later ones.
    """
    whole = trainer.eval_batches
    few = replace(whole, n_examples=min(2 * whole.batch_size, whole.n_examples or whole.n_items))
    tokens = sum(map(count_tokens, few.from_start()))
    trainer.eval_batches, seconds = few, []
    for _ in range(2):
        start = time.perf_counter()
        trainer.evaluate()
        seconds.append((time.perf_counter() - start) / tokens)
    trainer.eval_batches = whole
    first, later = seconds
    return first, first if trainer.settings.sync_reference else later


def time_samples(trainer: "BasicTrainer") -> float:
    """Return the seconds that one model's samples take at an evaluation, from those of the first batch of prompts."""
    settings = trainer.settings
    if not settings.sample_during_eval:
        return 0.0
    prompts = distinct_prompts(trainer.eval_batches, settings.n_eval_model_samples)
    first, start = prompts[: settings.eval_batch_size], time.perf_counter()
    trainer.sampler.generate(trainer.policy.model, first, "sampling the policy")
    return (time.perf_counter() - start) * -(-len(prompts) // len(first))


def time_saving(trainer: "BasicTrainer") -> float:
    """Return the seconds that the last checkpoint and the export take, from those of writing a part of them.

    0 where the run's folder cannot be written to, which the run itself will refuse.
    """
    config = trainer.run.config
    if config.debug:  # not trainer.settings.debug, which is set in every dry run
        return 0.0
    states = trainer.state_dict([])
    tensors = tensors_in(states)
    sizes_before = accumulate((tensor.nbytes for tensor in tensors), initial=0)
    part = [tensor for tensor, before in zip(tensors, sizes_before, strict=False) if before < WRITTEN]
    exports_all = trainer.settings.lora is None or trainer.settings.lora.export_merged
    exported = trainer.policy.parameters() if exports_all else tensors_in(states["policy"])
    folder = next(folder for folder in Path(config.local_run_dir).absolute().parents if folder.exists())
    seconds, start = 0.0, time.perf_counter()
    with suppress(OSError), TemporaryDirectory(dir=folder, prefix=".dry-run-") as name:
        atomic_write(Path(name, "part.pt"), lambda staging: torch.save(part, staging))
        sha256(Path(name, "part.pt"))
        seconds = time.perf_counter() - start
    return seconds * (size_of(tensors) + size_of(exported)) / size_of(part)


def count_saves(trainer: "BasicTrainer") -> int:
    """Return how many checkpoints a run writes before its last one: of evaluations, and every save_every examples."""
    settings, before_last = trainer.settings, (len(trainer.train_batches) - 1) * trainer.settings.batch_size
    clocks = [every for every in (settings.eval_every, settings.save_every) if every is not None]
    due = (n for every in clocks for n in range(every, before_last + 1, every))
    return len({-(-n // settings.batch_size) for n in due})


def holds_copies(trainer: "BasicTrainer") -> bool:
    """Return whether updates run while a checkpoint is written from a copy in the device's memory."""
    saves = not trainer.run.config.debug and count_saves(trainer) > 0
    return saves and trainer.settings.background_saves and trainer.device.type == "cpu"


def count_evaluations(trainer: "BasicTrainer") -> int:
    """Return how many evaluations a run makes: a first one, those that fall due before an update, and the last."""
    settings, n_updates = trainer.settings, len(trainer.train_batches)
    due = (n_updates - 1) * settings.batch_size // settings.eval_every
    return int(settings.do_first_eval) + min(n_updates - 1, due) + 1


def time_lines(
    trainer: "BasicTrainer",
    workload: Workload,
    update: float,
    evaluations: tuple[float, float],
    sampling: float,
    saving: float,
) -> Iterable[str]:
    """Yield the time of an update and of the run; update and evaluations are in seconds per token."""
    first, later = evaluations
    settings, n_updates, n_evaluations = trainer.settings, len(trainer.train_batches), count_evaluations(trainer)
    per_example = workload.tokens / workload.examples
    each = update * per_example * settings.batch_size
    yield f"Time: {each:.3g} seconds per update, {1 / update:,.0f} tokens per second."
    test = sum(map(count_tokens, trainer.eval_batches.from_start()))
    n_sampled = n_evaluations + (trainer.reference is not None)  # whose samples are made once
    parts = {
        f"{n_updates:,} updates": each * n_updates,
        f"{n_evaluations} evaluations": test * (first + later * (n_evaluations - 1)),
        "samples": sampling * n_sampled,
        "saving": saving * (1 if settings.background_saves else 1 + count_saves(trainer)),
    }
    if trainer.loss.needs_reference and trainer.loss.cached_reference:
        train = trainer.train_batches
        n = min(train.n_items, len(train) * settings.batch_size)
        parts["the reference's log-probabilities"] = first * (n * per_example + test)
    listed = ", ".join(f"{what} {duration(seconds)}" for what, seconds in parts.items() if seconds)
    yield f"Time to the end: {duration(sum(parts.values()))} ({listed}), besides loading and the report."


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    unit, size = next(((u, s) for u, s in (("hours", 3600), ("minutes", 60)) if seconds >= 2 * s), ("seconds", 1))
    return f"{seconds / size:.1f} {unit}"


# Memory


def measured(device: torch.device, work: Callable[[], T]) -> tuple[T, int]:
    """Return what work returns, and the peak memory in bytes while it ran."""
    reset_peak_memory(device)
    return work(), peak_memory(device)


def update_peak(trainer: "BasicTrainer", batch: Batch) -> int:
    """Return the peak memory of an update, in bytes."""
    reset_peak_memory(trainer.device)
    trainer.train_step(batch)
    return peak_memory(trainer.device)


def memory_lines(trainer: "BasicTrainer", workload: Workload, peaks: dict[str, int], copied: int = 0) -> Iterable[str]:
    """Yield the peak memory, and that of an update with each remedy that the run does not use yet.

    copied are the bytes of the copy from which a checkpoint is written meanwhile.
    """
    now, phase = max((peak, phase) for phase, peak in peaks.items())
    n = workload.longest_pass.n_tokens
    yield (
        f"Peak memory: {now / 1e9:.2f} of {total_memory(trainer.device) / 1e9:.1f} GB, in {phase}; an update needs"
        f" {peaks['an update'] / 1e9:.2f} GB, in a pass of {n:,} tokens. An update with ..."
    )
    can_measure = reset_peak_memory(trainer.device)
    found = measured_remedies(trainer, workload) if can_measure else {}
    for setting, peak in found.items():
        yield f"  {setting}: {peak / 1e9:.2f} GB, measured"
    for setting, peak in computed_remedies(trainer, workload, peaks["an update"], copied).items():
        yield f"  {setting}: {peak / 1e9:.2f} GB, computed"


def measured_remedies(trainer: "BasicTrainer", workload: Workload) -> dict[str, int]:
    """Return the peak memory of an update with each setting that can be changed in place, in bytes."""
    found, settings, model, packer = {}, trainer.settings, trainer.policy.model, trainer.packer
    if len(workload.longest_pass.examples) > 1:
        half = workload.longest_pass.n_tokens // 2
        trainer.packer = replace(packer, max_tokens=half)
        found[f"max_tokens_per_pass={half}"] = update_peak(trainer, workload.longest)
        trainer.packer = packer
    if model.supports_gradient_checkpointing and not (settings.activation_checkpointing or settings.compile):
        recompute_activations(model)
        found["activation_checkpointing=true"] = update_peak(trainer, workload.longest)
        recompute_activations(model, on=False)
    return found


def computed_remedies(trainer: "BasicTrainer", workload: Workload, peak: int, copied: int = 0) -> dict[str, int]:
    """Return the peak memory of an update with each setting that needs a run of its own, in bytes, at most.

    Gradients count where a batch is computed in several passes, since all of them then lie beside the activations.
    """
    settings, loss, reference = trainer.settings, trainer.loss, trainer.reference
    several = len(list(trainer.packer(workload.longest.examples, settings.gradient_accumulation_steps))) > 1
    weights = size_of(trainer.policy.parameters())
    trained = size_of(trainer.policy.trained_parameters())
    state = size_of(tensors_in([*trainer.optimizer.state.values()]))
    second = size_of(reference.module.parameters()) if isinstance(reference, ModelReference) else 0
    found = {}
    own_dtype = settings.model.reference_dtype is None
    if second and own_dtype and not isinstance(reference, SyncedReference) and getattr(loss, "ld_alpha", 1) == 1:
        found["loss.precompute_reference=true"] = peak - second
    if settings.lora is None and own_dtype and not settings.sync_reference:
        found["lora=default"] = peak - second - state - trained * several - copied
    in_float32 = settings.model.policy_dtype == "float32" and settings.compute_precision != "float32"
    if in_float32 and settings.optimizer != "Muon":
        own = second - weights // 2 if second and own_dtype else 0  # much of it may be in bfloat16 already
        found["model.policy_dtype=bfloat16"] = peak - own - (weights + state + trained * several + copied) // 2
    return found


# The data


def workload_lines(trainer: "BasicTrainer", workload: Workload) -> Iterable[str]:
    """Yield what will be trained on."""
    n, size = len(trainer.train_batches), trainer.settings.batch_size
    counts = ", ".join(f"{what} {n:,}" for what, n in sorted(workload.truncated.items())) or "none"
    mean = workload.tokens / workload.examples
    of = "" if workload.examples == n * size else f" of the first {workload.examples:,} examples"
    yield f"Updates: {n:,} of {size} examples, {mean * size:,.0f} tokens each; {mean * size * n:,.0f} tokens in all."
    yield f"Truncated{of}: {counts}."
