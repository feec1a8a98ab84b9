"""max_tokens_per_pass: auto estimates on a GPU how many tokens fit, from the model's shape; fit measures it."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from dpo.data.batches import BatchIterator
from dpo.data.examples import TokenizedExample
from dpo.model.layout_check import LayoutChoice
from dpo.model.loading import recompute_activations
from dpo.model.logps import CHUNK_BYTES, CHUNK_TOKENS, ResponseLogps, response_logps
from dpo.model.packing import LAYOUTS, PackedBatch, Packer
from dpo.model.pretrained import auto_class
from dpo.model.reference_weights import ReferenceWeights
from dpo.settings.schema import Settings
from dpo.system.console import log_message
from dpo.system.devices import DeviceFacts, autocast, available_memory, peak_memory, reset_peak_memory
from dpo.system.errors import UserError, is_out_of_memory
from dpo.system.state import random_states, set_random_states, size_of, tensors_in
from dpo.training.objectives import Loss
from dpo.training.optimizers import count_moments, stepped_optimizer

USABLE_SHARE = {"cuda": 0.9, "cpu": 0.8}  # of available memory: fragmentation and sampling need the rest
EXAMPLES_SEARCHED = 2_000  # training examples that are searched for the largest microbatch
MIN_GAIN = 1.05  # a budget is not raised by a smaller factor

# auto: an estimate

# The most tokens of a microbatch: measured on a CPU (benchmarks/README.md) and on an H200, which reached its full rate
# before that; a guess for MPS.
MAX_AUTO_TOKENS = {"cpu": 768, "mps": 2048, "cuda": 32_768}
TOKEN_STEP = 1024  # a GPU's budget is a multiple of this, so that a few bytes of free memory do not change it
ACTIVATION_MARGIN = 1.3  # for what the formula omits, and for fragmentation


@dataclass(frozen=True)
class MemoryEstimate:
    """The bytes that training needs with microbatches of n tokens: fixed + per_token * n + per_square * n**2."""

    fixed: float
    per_token: float
    per_square: float = 0.0

    def at(self, n_tokens: int) -> float:
        return self.fixed + self.per_token * n_tokens + self.per_square * n_tokens**2

    def max_tokens(self, limit: float) -> int:
        room = max(0.0, limit - self.fixed)
        return int(2 * room / (self.per_token + math.sqrt(self.per_token**2 + 4 * self.per_square * room)))


def auto_budget(facts: DeviceFacts, memory: MemoryEstimate) -> int:
    """max_tokens_per_pass=auto on a GPU: as many tokens as fit, from TOKEN_STEP to MAX_AUTO_TOKENS."""
    fitting = memory.max_tokens(USABLE_SHARE["cuda"] * facts.memory)
    return max(TOKEN_STEP, min(MAX_AUTO_TOKENS["cuda"], fitting // TOKEN_STEP * TOKEN_STEP))


def resolve_max_tokens(
    setting: int | Literal["auto", "fit"], facts: DeviceFacts, estimate: Callable[[], MemoryEstimate]
) -> int:
    """Resolve max_tokens_per_pass to a number of tokens; fit begins its search with it."""
    if isinstance(setting, int):
        return setting
    if facts.kind != "cuda":
        return MAX_AUTO_TOKENS[facts.kind]
    memory = estimate()
    budget = auto_budget(facts, memory)
    if setting == "auto":
        needed = memory.at(budget) / 1e9
        usable = USABLE_SHARE["cuda"] * facts.memory / 1e9
        advice = "; set activation_checkpointing=true, lora=default or a smaller max_length if memory runs out"
        log_message(
            f"max_tokens_per_pass=auto: microbatches of up to {budget:,} tokens; training is estimated to need"
            f" {needed:.1f} of {usable:.1f} GB{advice if needed > usable else ''}."
        )
    return budget


def has_second_model(settings: Settings, loss: Loss) -> bool:
    """Whether the reference at the start is a second model, rather than the policy without its adapter or a cache."""
    return settings.lora is None and loss.needs_reference and not loss.cached_reference


def estimate_memory(
    policy: ResponseLogps,
    settings: Settings,
    loss: Loss,
    dtype: torch.dtype,
    choice: LayoutChoice,
    n_shards: int = 1,
    second: nn.Module | None = None,
) -> MemoryEstimate:
    """Estimate the memory of training from a policy's modules, which may be on the meta device.

    dtype is the compute dtype, n_shards the number of devices that share the weights. second is the reference's model
    if `reference` names one.
    tests/dpo/training/test_budgets.py compares estimates with measurements.
    """
    model = policy.model
    config = model.config.get_text_config()
    vocabulary, width, n_layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
    activations = activation_bytes(model, dtype)
    per_square, heads = 0.0, getattr(config, "num_attention_heads", 1)
    if choice.attention == "eager":  # keeps the attention weights of each head, (queries, keys), in 8 bytes
        per_square = 8.0 * heads * n_layers
    elif choice.attention == "packed":  # the mask, and each example's slice of it, cast in every layer
        per_square = float(model.dtype.itemsize)
        activations += dtype.itemsize * settings.max_length * n_layers
    elif choice.attention == "varlen":  # gathers keys and values, a prompt's once more for the second response
        activations += 2 * dtype.itemsize * key_value_width(config) * n_layers
    if choice.layout == "padded":  # queries only attend to keys of their own row
        activations, per_square = activations + per_square * settings.max_length, 0.0
    if settings.activation_checkpointing:  # the input of each layer, and the activations of one layer at a time
        activations = activations / n_layers + model.dtype.itemsize * width * n_layers
        per_square /= n_layers if choice.attention == "eager" else 1
    if not policy.separate_head:  # logits of all tokens, scaled or capped in several steps
        activations += 5 * dtype.itemsize * vocabulary
    fixed = weight_bytes(model, settings, loss, dtype, n_shards, second)
    # Of a chunk: logits, their softmax and gradient, all of them in float32 at most. And the head's gradient.
    fixed += 4 * max(CHUNK_BYTES, 4 * CHUNK_TOKENS * vocabulary) + 8 * vocabulary * width
    return MemoryEstimate(fixed, ACTIVATION_MARGIN * activations, per_square)


def estimate_before_loading(
    config: PreTrainedConfig,
    settings: Settings,
    loss: Loss,
    dtype: torch.dtype,
    n_shards: int = 1,
    reference: ReferenceWeights | None = None,
) -> MemoryEstimate:
    """Estimate the memory of training on a device from a model's config."""
    second, stored = None, getattr(torch, settings.model.policy_dtype)
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=stored)
        if reference is not None and not (settings.lora and reference.is_adapter):
            own = reference.config or config
            second = auto_class(own).from_config(own, dtype=stored)
    model.requires_grad_(settings.lora is None)
    choice = LayoutChoice(settings.layout, "eager" if model.config._attn_implementation == "eager" else "packed")
    return estimate_memory(ResponseLogps(model, separate_head=True), settings, loss, dtype, choice, n_shards, second)


def key_value_width(config: PreTrainedConfig) -> int:
    """The number of features of a token's keys and values together, in one layer."""
    heads: int = getattr(config, "num_attention_heads", 1)
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim


def activation_bytes(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Estimate the bytes per token that a model's layers keep for the backward pass.

    Linear layers keep inputs and outputs in the compute dtype. Norms keep their input in the parameters' dtype, or 2.5
    such tensors if they consist of several operations.
    """
    width = model.config.get_text_config().hidden_size
    total = 0.0
    for module in model.base_model.modules():
        if isinstance(module, nn.Linear):
            total += dtype.itemsize * (module.in_features + module.out_features)
        elif isinstance(module, Conv1D):
            total += dtype.itemsize * sum(module.weight.shape)
        elif "Norm" in type(module).__name__:
            total += model.dtype.itemsize * width * (1.0 if isinstance(module, nn.LayerNorm) else 2.5)
        elif isinstance(module, NewGELUActivation):  # GPT-2's, which consists of several operations too
            total += 4 * dtype.itemsize * 4 * width
    n_active = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    for parameter in model.base_model.parameters():
        if parameter.dim() == 3:  # experts: their tokens are gathered, and their outputs weighted
            total += 2 * dtype.itemsize * (n_active or parameter.shape[0]) * sum(parameter.shape[1:])
    return total


def weight_bytes(
    model: PreTrainedModel,
    settings: Settings,
    loss: Loss,
    dtype: torch.dtype,
    n_shards: int,
    second: nn.Module | None = None,
) -> float:
    """Estimate the bytes of weights, gradients, optimizer state and a second model on a device.

    If autocast computes in 16 bits, it also keeps 16-bit copies of all matrices.
    """
    stored = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    is_mixed = model.dtype == torch.float32 and dtype.itemsize == 2
    casts = 2 * sum(matrix_sizes(model).values()) * is_mixed
    if loss.cached_reference:
        second = None
    elif second is None and has_second_model(settings, loss):
        second = model  # a copy of it
    of_second = 0 if second is None else second_model_bytes(second, settings, is_mixed)
    held = stored + of_second + trained * (1 + max(1, count_moments(settings.optimizer)))
    if n_shards == 1:
        return held + casts
    whole = 0 if settings.reduce_every_pass else trained  # gradients are whole until the last microbatch of an update
    n_layers = model.config.get_text_config().num_hidden_layers
    return held / n_shards + whole + stored * max(1 / n_shards, 3 / n_layers)  # layers are gathered, two ahead


def second_model_bytes(model: nn.Module, settings: Settings, is_mixed: bool) -> int:
    if settings.model.reference_dtype is not None:
        numbers = sum(parameter.numel() for parameter in model.parameters())
        return numbers * getattr(torch, settings.model.reference_dtype).itemsize
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    halved = sum(n for key, n in matrix_sizes(model).items() if key not in shared) * is_mixed  # by store_linear_weights
    return sum(parameter.nbytes for parameter in model.parameters()) - 2 * halved


def matrix_sizes(model: nn.Module) -> dict[int, int]:
    """The numbers of weights of linear layers, by the id of the weight."""
    linear = (module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)))
    return {id(module.weight): module.weight.numel() for module in linear}


# fit: a measurement


def fit_budget(
    settings: Settings, policy: ResponseLogps, packer: Packer, batches: BatchIterator, dtype: torch.dtype
) -> Packer:
    """Find the largest budget that fits, by forward and backward passes over training data; nothing is trained.

    UserError on a device whose peak memory cannot be measured.
    """
    if packer.device.type == "mps" or not reset_peak_memory(packer.device):
        raise UserError("max_tokens_per_pass=fit: the peak memory cannot be measured here; give a number, or auto")
    heaviest = heaviest_examples(batches, settings.gradient_accumulation_steps, packer.layout)
    most = LAYOUTS[packer.layout].cost(heaviest)
    limit = int(available_memory(packer.device) * USABLE_SHARE[packer.device.type])
    log_message(f"max_tokens_per_pass=fit: trying microbatches of up to {most:,} tokens ...")

    def largest_microbatch(budget: int) -> PackedBatch:
        return max(replace(packer, max_tokens=budget)(heaviest), key=lambda batch: batch.n_tokens)

    def measure(budget: int) -> float:
        return peak_of_microbatch(policy, largest_microbatch(budget), dtype)

    with training_state(settings, policy, packer.device) as optimizer:
        limit -= copied_bytes(settings, policy, optimizer, packer.device)
        measure(1)  # allocates the gradients, which all microbatches but the first have in addition to activations
        budget, used = largest_budget(measure, min(packer.max_tokens, most), most, limit)
    budget = min(budget, largest_microbatch(budget).n_tokens)  # the measured size
    if used > limit:
        log_message(
            f"max_tokens_per_pass=fit: not even the smallest microbatch fits into {limit / 1e9:.2f} GB;"
            " set activation_checkpointing=true, lora=default or a smaller max_length."
        )
    else:
        log_message(f"max_tokens_per_pass={budget}: its microbatches need {used / 1e9:.2f} of {limit / 1e9:.2f} GB.")
    return replace(packer, max_tokens=budget)


def largest_budget(measure: Callable[[int], float], start: int, most: int, limit: float) -> tuple[int, float]:
    """Find the largest budget, up to most, that needs at most limit bytes; return it with the bytes that it needs.

    A budget is not tried if a straight line through the last two measurements exceeds the limit there, or if it is more
    than twice a budget that fits, so that a CPU's memory is never exceeded by much. The smallest budget is returned
    even if it does not fit: the run then fails with a message that names settings that need less.
    """
    low, used = 0, 0.0
    ceiling, budget = most, max(1, start // 2)
    while True:
        needed = measure(budget)
        if needed > limit:
            if budget == 1:
                return budget, needed
            ceiling = budget - 1
            budget = (low + ceiling) // 2 if low else budget // 2
        else:
            slope = (needed - used) / (budget - low) if low else 0.0
            room = int((limit - needed) / slope) if slope > 0 else budget
            low, used = budget, needed
            budget = min(ceiling, low + min(low, room))
        if low and budget < MIN_GAIN * low:
            return low, used


def copied_bytes(settings: Settings, policy: ResponseLogps, optimizer: Optimizer, device: torch.device) -> int:
    """The bytes on a device that a background save needs for its copy of weights and optimizer state."""
    if device.type != "cpu" or not settings.background_saves:
        return 0
    return size_of([*policy.trained_parameters(), *tensors_in([*optimizer.state.values()])])


def heaviest_examples(batches: BatchIterator, n_equal: int, layout: str) -> Sequence[TokenizedExample]:
    """The microbatch, of n_equal per batch, with the most tokens among the first EXAMPLES_SEARCHED examples."""
    size = batches.batch_size // n_equal
    n_batches = -(-EXAMPLES_SEARCHED // batches.batch_size)
    groups = (
        batch.examples[start : start + size]
        for batch in islice(batches.from_start(), n_batches)
        for start in range(0, len(batch.examples), size)
    )
    return max(groups, key=LAYOUTS[layout].cost)


def peak_of_microbatch(policy: ResponseLogps, batch: PackedBatch, dtype: torch.dtype) -> float:
    """Measure the peak memory in bytes of a forward and backward pass; infinity if it runs out of memory."""
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
    """Allocate the optimizer's state and use training mode; undo both at the end.

    Training needs a little less memory, since it adds gradients in place (dpo/model/accumulation.py).
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
