"""max_tokens_per_pass=fit: the largest token budget whose passes fit into the device's memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import torch
from torch.optim import Optimizer

from dpo.checkpoints import random_states, set_random_states
from dpo.console import log_message
from dpo.devices import autocast, available_memory, peak_memory, reset_peak_memory
from dpo.errors import UserError, is_out_of_memory
from dpo.examples import BatchIterator, TokenizedExample
from dpo.forecast import size_of, tensors_in
from dpo.logps import ResponseLogps, response_logps
from dpo.models import recompute_activations
from dpo.optimizers import stepped_optimizer
from dpo.packing import LAYOUTS, PackedBatch, Packer
from dpo.settings import Settings

SHARE = {"cuda": 0.9, "cpu": 0.8}  # of the memory that is there: malloc's pieces and sampling need the rest
SEEN = 2_000  # training examples among which the part of a batch with the most tokens is looked for
CLOSE = 1.05  # a budget is not raised by less


def fit_budget(
    settings: Settings, policy: ResponseLogps, packer: Packer, batches: BatchIterator, dtype: torch.dtype
) -> Packer:
    """Return the packer with the largest budget that fits, by passes over the training data; nothing is trained.

    Raises UserError on a device whose peak memory cannot be measured.
    """
    if packer.device.type == "mps" or not reset_peak_memory(packer.device):
        raise UserError("max_tokens_per_pass=fit: the peak memory cannot be measured here; give a number, or auto")
    heaviest = heaviest_part(batches, settings.gradient_accumulation_steps, packer.layout)
    most = LAYOUTS[packer.layout].cost(heaviest)
    limit = int(available_memory(packer.device) * SHARE[packer.device.type])
    log_message(f"max_tokens_per_pass=fit: trying passes of up to {most:,} tokens ...")

    def largest_pass(budget: int) -> PackedBatch:
        return max(replace(packer, max_tokens=budget)(heaviest), key=lambda one: one.n_tokens)

    def measure(budget: int) -> float:
        return peak_of_pass(policy, largest_pass(budget), dtype)

    with training_state(settings, policy, packer.device) as optimizer:
        limit -= copied_bytes(settings, policy, optimizer, packer.device)
        measure(1)  # makes the gradients, which lie beside the activations of all passes but the first
        budget, used = largest_budget(measure, min(packer.max_tokens, most), most, limit)
    budget = min(budget, largest_pass(budget).n_tokens)  # as measured: other examples would fill a pass further
    if used > limit:
        remedy = "set activation_checkpointing=true, lora=default or a smaller max_length"
        log_message(f"max_tokens_per_pass=fit: not even the smallest pass fits into {limit / 1e9:.2f} GB; {remedy}.")
    else:
        log_message(f"max_tokens_per_pass={budget}: its passes need {used / 1e9:.2f} of {limit / 1e9:.2f} GB.")
    return replace(packer, max_tokens=budget)


def largest_budget(measure: Callable[[int], float], start: int, most: int, limit: float) -> tuple[int, float]:
    """Return the largest budget up to most whose measured bytes are within the limit, and those bytes.

    No budget is tried for which a straight line through the two before it leaves the limit, nor more than twice a
    fitting one, so that a CPU's memory is never exceeded by much. The smallest budget is returned even if it does not
    fit: the run then fails with the settings that need less.
    """
    low, used = 0, 0.0
    ceiling, budget = most, max(1, start // 2)
    while True:
        found = measure(budget)
        if found > limit:
            if budget == 1:
                return budget, found
            ceiling = budget - 1
            budget = (low + ceiling) // 2 if low else budget // 2
        else:
            slope = (found - used) / (budget - low) if low else 0.0
            room = int((limit - found) / slope) if slope > 0 else budget
            low, used = budget, found
            budget = min(ceiling, low + min(low, room))
        if low and budget < CLOSE * low:
            return low, used


def copied_bytes(settings: Settings, policy: ResponseLogps, optimizer: Optimizer, device: torch.device) -> int:
    """Return the bytes of a device's memory that the copy takes from which a checkpoint is written."""
    if device.type != "cpu" or not settings.background_saves:
        return 0
    return size_of([*policy.trained_parameters(), *tensors_in([*optimizer.state.values()])])


def heaviest_part(batches: BatchIterator, n_parts: int, layout: str) -> Sequence[TokenizedExample]:
    """Return the part of a training batch that costs the most tokens, among those of the first SEEN examples."""
    size = batches.batch_size // n_parts
    n_batches = -(-SEEN // batches.batch_size)
    parts = (
        batch.examples[start : start + size]
        for batch in islice(batches.from_start(), n_batches)
        for start in range(0, len(batch.examples), size)
    )
    return max(parts, key=LAYOUTS[layout].cost)


def peak_of_pass(policy: ResponseLogps, batch: PackedBatch, dtype: torch.dtype) -> float:
    """Return the peak memory of a forward and a backward pass, in bytes; infinity where it is out of memory."""
    device = batch.targets.device
    reset_peak_memory(device)
    try:
        with autocast(policy.model.dtype, dtype, device):
            response_logps(policy, batch).sums.sum().backward()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return math.inf
    return peak_memory(device)


@contextmanager
def training_state(settings: Settings, policy: ResponseLogps, device: torch.device) -> Iterator[Optimizer]:
    """Hold what lies beside activations in training, an optimizer's state, and compute as in training; undo both.

    Training also adds gradients in place (dpo/accumulation.py), so that it needs a little less.
    """
    states, was_training = random_states(), policy.training
    optimizer = stepped_optimizer(settings, policy)
    policy.train()
    if settings.activation_checkpointing:
        recompute_activations(policy.model)
    try:
        yield optimizer
    finally:
        if settings.activation_checkpointing:
            recompute_activations(policy.model, on=False)
        policy.train(was_training)
        optimizer.zero_grad(set_to_none=True)
        set_random_states(states)
        del optimizer
        reset_peak_memory(device)
