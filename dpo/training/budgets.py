"""max_tokens_per_pass: auto, which on a GPU estimates what fits from the model's shape, and fit, which measures it."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from dpo.data.batches import BatchIterator
from dpo.data.examples import TokenizedExample
from dpo.model.layout_check import LayoutChoice
from dpo.model.loading import recompute_activations
from dpo.model.logps import CHUNK_BYTES, CHUNK_TOKENS, ResponseLogps, response_logps
from dpo.model.packing import LAYOUTS, PackedBatch, Packer
from dpo.settings.schema import Settings
from dpo.system.console import log_message
from dpo.system.devices import DeviceFacts, autocast, available_memory, peak_memory, reset_peak_memory
from dpo.system.errors import UserError, is_out_of_memory
from dpo.system.state import random_states, set_random_states, size_of, tensors_in
from dpo.training.objectives import Loss
from dpo.training.optimizers import count_moments, stepped_optimizer

SHARE = {"cuda": 0.9, "cpu": 0.8}  # of the memory that is there: malloc's pieces and sampling need the rest
SEEN = 2_000  # training examples among which the part of a batch with the most tokens is looked for
CLOSE = 1.05  # a budget is not raised by less

# auto: an estimate

# Tokens of a pass at most: measured for a CPU (benchmarks/README.md) and one GPU, an H200, which had reached its full
# rate by then; guessed for MPS.
MOST = {"cpu": 768, "mps": 2048, "cuda": 32_768}
LEAST = 1024  # tokens: a GPU's budget is a multiple of it, so that a few bytes of free memory more do not change it
MARGIN = 1.3  # of activations: what the formula leaves out, and what the allocator cannot use


@dataclass(frozen=True)
class PassMemory:
    """The bytes that training needs in a pass of n tokens: fixed + per_token * n + per_square * n**2."""

    fixed: float
    per_token: float
    per_square: float = 0.0

    def of(self, n_tokens: int) -> float:
        """Return the bytes for a pass of n_tokens."""
        return self.fixed + self.per_token * n_tokens + self.per_square * n_tokens**2

    def most_tokens(self, limit: float) -> int:
        """Return how many tokens fit into a limit of bytes."""
        room = max(0.0, limit - self.fixed)
        return int(2 * room / (self.per_token + math.sqrt(self.per_token**2 + 4 * self.per_square * room)))


def auto_budget(facts: DeviceFacts, memory: PassMemory) -> int:
    """Return how many tokens a pass on a GPU has for max_tokens_per_pass=auto: as many as fit, from LEAST to MOST."""
    return max(LEAST, min(MOST["cuda"], memory.most_tokens(SHARE["cuda"] * facts.memory) // LEAST * LEAST))


def tokens_per_pass(
    setting: int | Literal["auto", "fit"], facts: DeviceFacts, estimate: Callable[[], PassMemory]
) -> int:
    """Resolve max_tokens_per_pass to a number of tokens, with which fit begins its search."""
    if isinstance(setting, int):
        return setting
    if facts.kind != "cuda":
        return MOST[facts.kind]
    memory = estimate()
    budget = auto_budget(facts, memory)
    if setting == "auto":
        log_message(explain_budget(budget, facts, memory))
    return budget


def explain_budget(budget: int, facts: DeviceFacts, memory: PassMemory) -> str:
    """Return the line that says why a GPU's passes have so many tokens."""
    needed, there = memory.of(budget) / 1e9, SHARE["cuda"] * facts.memory / 1e9
    why = f"by an estimate, training needs {needed:.1f} of {there:.1f} GB with them"
    if needed > there:
        why += "; set activation_checkpointing=true, lora=default or a smaller max_length if memory runs out"
    return f"max_tokens_per_pass=auto: passes of up to {budget:,} tokens; {why}."


def has_second_model(settings: Settings, loss: Loss) -> bool:
    """Return whether the reference is a second model: not the policy without its adapter, and no cache."""
    return settings.lora is None and loss.needs_reference and not loss.cached_reference


def pass_memory(
    policy: ResponseLogps, settings: Settings, loss: Loss, dtype: torch.dtype, choice: LayoutChoice, n_shards: int = 1
) -> PassMemory:
    """Estimate the memory of training from a policy's modules, which may be without weights (meta device).

    dtype is that of the computation, n_shards over how many devices weights are divided. Checked against measurements
    in tests/dpo/training/test_budgets.py.
    """
    model = policy.model
    config = model.config.get_text_config()
    vocabulary, width, n_layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
    activations = activation_bytes(model, dtype)
    per_square, heads = 0.0, getattr(config, "num_attention_heads", 1)
    if choice.attention == "eager":  # which keeps each head's weights, (queries, keys), in 8 bytes
        per_square = 8.0 * heads * n_layers
    elif choice.attention == "packed":  # the mask, and each example's part of it, cast in every layer
        per_square = float(model.dtype.itemsize)
        activations += dtype.itemsize * settings.max_length * n_layers
    if choice.layout == "padded":  # queries meet the keys of their own row alone
        activations, per_square = activations + per_square * settings.max_length, 0.0
    if settings.activation_checkpointing:  # the input of each layer, and one layer's own at a time
        activations = activations / n_layers + model.dtype.itemsize * width * n_layers
        per_square /= n_layers if choice.attention == "eager" else 1
    if not policy.separate_head:  # logits of all tokens, scaled or capped in several steps
        activations += 5 * dtype.itemsize * vocabulary
    fixed = weight_bytes(model, settings, loss, dtype, n_shards)
    fixed += 4 * max(CHUNK_BYTES, 4 * CHUNK_TOKENS * vocabulary) + 8 * vocabulary * width  # logits; the head's gradient
    return PassMemory(fixed, MARGIN * activations, per_square)


def memory_before_loading(
    config: PreTrainedConfig, settings: Settings, loss: Loss, dtype: torch.dtype, n_shards: int = 1
) -> PassMemory:
    """Estimate the memory of training on a device from a model's config."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.model.policy_dtype))
    model.requires_grad_(settings.lora is None)
    choice = LayoutChoice(settings.layout, "eager" if model.config._attn_implementation == "eager" else "packed")
    return pass_memory(ResponseLogps(model, separate_head=True), settings, loss, dtype, choice, n_shards)


def activation_bytes(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Estimate the bytes per token that a model's layers keep for the backward pass.

    Counted are inputs and outputs of linear layers, in the dtype of the computation, and what norms keep in that of
    the parameters: their input, where they are made of several operations 2.5 tensors.
    """
    width, own, total = model.config.get_text_config().hidden_size, model.dtype.itemsize, 0.0
    for module in model.base_model.modules():
        if isinstance(module, nn.Linear):
            total += dtype.itemsize * (module.in_features + module.out_features)
        elif isinstance(module, Conv1D):
            total += dtype.itemsize * sum(module.weight.shape)
        elif "Norm" in type(module).__name__:
            total += own * width * (1.0 if isinstance(module, nn.LayerNorm) else 2.5)
        elif isinstance(module, NewGELUActivation):  # of GPT-2 and its relatives: made of several operations too
            total += 4 * dtype.itemsize * 4 * width
    used = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    for parameter in model.base_model.parameters():
        if parameter.dim() == 3:  # experts, which tokens are gathered for, and their outputs are weighted
            total += 2 * dtype.itemsize * (used or parameter.shape[0]) * sum(parameter.shape[1:])
    return total


def weight_bytes(model: PreTrainedModel, settings: Settings, loss: Loss, dtype: torch.dtype, n_shards: int) -> float:
    """Return the bytes of weights, gradients, optimizer state and a second model on a device.

    Where autocast computes in 16 bits, all matrices are kept in them too, during a pass.
    """
    stored = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = (module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)))
    matrices = {id(module.weight): module.weight.numel() for module in linear}
    is_mixed = model.dtype == torch.float32 and dtype.itemsize == 2
    casts = 2 * sum(matrices.values()) * is_mixed
    second, second_model = 0, has_second_model(settings, loss)
    if second_model and settings.model.reference_dtype is not None:
        second = numbers * getattr(torch, settings.model.reference_dtype).itemsize
    elif second_model:  # store_linear_weights keeps in 16 bits what embeddings do not share
        second = stored - 2 * sum(n for key, n in matrices.items() if key not in shared) * is_mixed
    held = stored + second + trained * (1 + max(1, count_moments(settings.optimizer)))
    if n_shards == 1:
        return held + casts
    whole = 0 if settings.reduce_every_pass else trained  # gradients are whole between the passes of an update
    n_layers = model.config.get_text_config().num_hidden_layers
    return held / n_shards + whole + stored * max(1 / n_shards, 3 / n_layers)  # layers are gathered, two ahead


# fit: a measurement


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
    """Hold what lies beside activations in training, an optimizer's state, and compute as in training; undo both."""
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
