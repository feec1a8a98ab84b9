"""Log-probabilities of responses, and the module that computes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dpo.model.attention import BranchLengths, additive_mask, torch_attention
from dpo.model.packing import PackedBatch
from dpo.model.routers import RouterLoss, no_router_logits, recorded_router_logits

# Up to this many bytes of logits, counted as float32, are kept for the backward pass. Beyond that, logits are
# recomputed there in chunks of this size, of at least CHUNK_TOKENS tokens: smaller products with a large vocabulary are
# slow.
CHUNK_BYTES = 2**28
CHUNK_TOKENS = 128
# Bytes of float32 softmax at a time: small enough for a CPU's cache; larger elsewhere, for fewer kernel launches. On
# CUDA, a chunk of logits takes one softmax, which budgets count.
FLOAT32_BYTES = {"cpu": 2**22, "mps": 2**25, "cuda": CHUNK_BYTES}


@dataclass(frozen=True)
class Logps:
    """The log-probabilities of a batch's responses, in at least float32. Tokens are the trained ones.

    sums        (batch, n_responses) log pi(response | prompt)
    lengths     (batch, n_responses) the number of tokens of each response
    tokens      (n,) the log-probability of each token, response after response; None if only the sums are known
    collisions  (n,) the log of the sum of pi^2 over the vocabulary at each token's position; None unless requested
    routers     (2, experts) the sums of RouterLoss over all tokens of the batch; None without such a loss
    sizes       the lengths, flat, as Python integers; None if the tokens are not known
    """

    sums: Tensor
    lengths: Tensor
    tokens: Tensor | None = None
    collisions: Tensor | None = None
    routers: Tensor | None = None
    sizes: Sequence[int] | None = None

    @classmethod
    def from_tokens(cls, tokens: Tensor, lengths: Tensor, sizes: Sequence[int] | None = None) -> "Logps":
        """Sum the tokens' log-probabilities (n,) over responses of the given lengths (batch, n_responses).

        sizes: the same lengths, flat, as Python integers if known, since reading them from a device waits.
        """
        sizes = lengths.flatten().tolist() if sizes is None else list(sizes)
        sums = sum_segments(tokens, lengths.flatten(), max(sizes)).view(lengths.shape)
        return cls(sums, lengths, tokens, sizes=sizes)

    @property
    def means(self) -> Tensor:
        """The mean log-probability per token, (batch, n_responses)."""
        return self.sums / self.lengths


def sum_segments(values: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Sum values (n,) over adjacent segments of the given lengths (segments,), of which `longest` is the largest.

    The values are written to a row per segment, padded with zeros, by as many operations whatever the number of
    segments, each of which gives the same bits at every call on a GPU. segment_reduce does not support MPS.
    """
    n, n_rows = len(values), len(lengths)
    starts = lengths.cumsum(0) - lengths
    shifts = torch.arange(n_rows, device=values.device) * longest - starts  # from a value's place to that in the rows
    places = torch.arange(n, device=values.device) + shifts.repeat_interleave(lengths, output_size=n)
    padded = values.new_zeros(n_rows * longest).index_copy(0, places, values)
    return padded.view(n_rows, longest).sum(1)


class ResponseLogps(torch.nn.Module):
    """Computes the log-probability of each trained token with a causal language model.

    Call the module, never its forward method, so that hooks of a wrapped root (FSDP2, DDP, compile) run. The head is
    looked up at each call and no parameter is stored elsewhere, so parameters can be replaced (fully_shard) and modules
    wrapped (LoRA) at any time.
    """

    def __init__(self, model: PreTrainedModel, separate_head: bool = False, float32_head: bool = False):
        """Wrap a model.

        separate_head: call the head only on the hidden states of trained tokens, in chunks. This is correct if the
        logits are the head's output for the last hidden states (see wrap).
        float32_head: compute logits in float32 whatever the body's dtype. Most of the effect that other examples in a
        microbatch have on a bfloat16 log-probability is the rounding of the logits. On an NVIDIA GPU, hidden states and
        weights are still rounded to bfloat16, as tensor cores need it. No effect without a separate head.
        The attribute with_collisions requests the log of the sum of pi^2 in addition to each token's log-probability,
        and router_loss the sums of a mixture's routers.
        """
        super().__init__()
        self.model = model
        self.separate_head = separate_head
        self.float32_head = float32_head
        self.with_collisions = False
        self.router_loss: RouterLoss | None = None

    @classmethod
    def wrap(cls, model: PreTrainedModel, float32_head: bool = False) -> "ResponseLogps":
        """Wrap a model, with a separate head if a tiny forward pass shows that this gives the model's logits."""
        return cls(model, has_separate_head(model), float32_head)

    @property
    def head(self) -> torch.nn.Module:
        return self.model.get_output_embeddings()

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def set_requires_gradient_sync(self, requires_gradient_sync: bool) -> None:
        """Do nothing; FSDP replaces this method."""

    def forward(self, batch: PackedBatch) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the log-probability of each trained token, (n,), response after response, in at least float32.

        With collisions the result is (2, n), with their log in the second row. With router_loss, the sums of the
        routers follow.
        """
        if self.router_loss is None:
            return self.compute_logps(batch)
        with recorded_router_logits(self.model.base_model) as logits:
            tokens = self.compute_logps(batch)
        return tokens, self.router_loss.sums(logits, batch.occurrences)

    def compute_logps(self, batch: PackedBatch) -> Tensor:
        """The first result of forward."""
        if not self.separate_head:
            return self.token_logps(response_logits(self.model, batch), batch.targets)
        hidden = self.model.base_model(**model_inputs(self.model, batch))[0]
        hidden = hidden.reshape(-1, hidden.shape[-1])[batch.sources]
        size, logits = max(CHUNK_TOKENS, CHUNK_BYTES // (4 * self.head.get_parameter("weight").shape[0])), self.logits()
        if len(hidden) <= size:
            return self.token_logps(logits(hidden), batch.targets)
        chunks = [
            checkpoint(lambda h, t: self.token_logps(logits(h), t), h, t, use_reentrant=False)
            for h, t in zip(hidden.split(size), batch.targets.split(size), strict=True)
        ]
        return torch.cat(chunks, dim=-1)

    def token_logps(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The first result of forward, from logits (n, vocabulary) and targets (n,)."""
        logps = target_logps(logits, targets)
        return torch.stack((logps, log_collisions(logits))) if self.with_collisions else logps

    def logits(self) -> Callable[[Tensor], Tensor]:
        """The function that computes logits (n, vocabulary) from hidden states (n, d)."""
        head = self.head
        if not self.float32_head:
            return head
        if type(head) is torch.nn.Linear and getattr(head, "bias", None) is None and uses_float32_product(head.weight):
            weight = head.weight.bfloat16()  # once per pass, not per chunk
            return lambda hidden: Float32Product.apply(hidden.bfloat16(), weight)
        return self.logits_of_float32

    def logits_of_float32(self, hidden: Tensor) -> Tensor:
        parameters = {name: parameter.float() for name, parameter in self.head.named_parameters()}
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.func.functional_call(self.head, parameters, hidden.float())


def response_logps(module: ResponseLogps, batch: PackedBatch) -> Logps:
    sizes = [len(response) for example in batch.examples for response in example.trained_responses]
    output = module(batch)
    tokens, routers = output if isinstance(output, tuple) else (output, None)
    tokens, collisions = (tokens, None) if tokens.dim() == 1 else (tokens[0], tokens[1].detach())
    return replace(Logps.from_tokens(tokens, batch.lengths, sizes), collisions=collisions, routers=routers)


@torch.no_grad()
def has_separate_head(model: PreTrainedModel) -> bool:
    """Whether the logits are exactly the output embeddings applied to the last hidden states.

    Some models also scale or cap their logits, which a forward pass over a few tokens shows.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    with torch_attention(model):
        logits = model(input_ids=ids, use_cache=False, **no_router_logits(model.config)).logits
        hidden = model.base_model(input_ids=ids, use_cache=False, **no_router_logits(model.config))[0]
    return torch.equal(head(hidden), logits)


def model_inputs(model: PreTrainedModel, batch: PackedBatch) -> dict[str, Any]:
    inputs: dict[str, Any] = dict(batch.inputs)
    kind = model.config._attn_implementation
    if batch.segments is not None and kind == "flex_attention":
        inputs = dict(batch.flex_inputs)
    elif batch.segments is not None and kind == "varlen":
        inputs["segments"] = batch.varlen_segments  # for varlen_attention
    elif batch.segments is not None:
        inputs["attention_mask"] = additive_mask(batch.segments, model.dtype)  # models use a 4D mask as it is
        if kind == "packed":
            inputs["branch_lengths"] = BranchLengths(batch.branch_lengths)  # for packed_attention
    return inputs | no_router_logits(model.config) | {"use_cache": False}


def response_logits(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Compute the model's logits that predict the trained tokens, (n, vocabulary), and few others."""
    width = batch.inputs["input_ids"].shape[1]
    columns, kept = torch.unique(batch.sources % width, return_inverse=True)
    logits = model(**model_inputs(model, batch), logits_to_keep=columns).logits
    if logits.shape[1] != len(columns):  # the model, such as xLSTM, takes this argument and ignores it
        kept = batch.sources % width
    return logits[batch.sources // width, kept]


def uses_float32_product(weight: Tensor) -> bool:
    """Whether Float32Product computes with a weight: a whole one on an NVIDIA GPU, when computing in bfloat16."""
    in_bfloat16 = weight.dtype == torch.bfloat16 or torch.is_autocast_enabled(weight.device.type)
    return (
        weight.device.type == "cuda" and torch.version.hip is None and in_bfloat16 and not isinstance(weight, DTensor)
    )


class Float32Product(torch.autograd.Function):
    """Logits (n, vocabulary) in float32 of hidden states (n, d) and a weight (vocabulary, d), both in bfloat16.

    Products of bfloat16 numbers are exact in float32, where they are added, so only the inputs are rounded. The
    gradient is computed as that of a layer in bfloat16. torch has no gradient for this product.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        grad = grad.to(hidden.dtype)
        of_hidden, of_weight = ctx.needs_input_grad
        return grad @ weight if of_hidden else None, grad.T @ hidden if of_weight else None


def target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute logit minus logsumexp of each target, (n,), from logits (n, vocabulary), in at least float32."""
    return TargetLogps.apply(logits, targets)


@torch.no_grad()
def log_collisions(logits: Tensor) -> Tensor:
    """Compute the log of the sum of squared probabilities, (n,), of logits (n, vocabulary), in at least float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    chunks = logits.split(max(1, FLOAT32_BYTES[logits.device.type] // (4 * logits.shape[1])))
    return torch.cat([(2 * chunk.log_softmax(1, dtype=dtype)).logsumexp(1) for chunk in chunks])


class TargetLogps(torch.autograd.Function):
    """target_logps with less memory. Its gradient is g (1 - softmax) at the target and -g softmax elsewhere.

    Autograd would keep the log-softmax of all tokens in float32, and two gradients of that size. This computes a few
    tokens at a time in float32, and overwrites the logits with their gradient, since nothing needs them afterwards.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        ctx.size = max(1, FLOAT32_BYTES[logits.device.type] // (4 * logits.shape[1]))
        chunks = zip(logits.split(ctx.size), targets.split(ctx.size), strict=True)
        return torch.cat([chunk.log_softmax(1, dtype=dtype).gather(1, t[:, None])[:, 0] for chunk, t in chunks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        for start in range(0, len(logits), ctx.size):
            chunk = logits[start : start + ctx.size]
            t = targets[start : start + ctx.size, None]
            g = grad[start : start + ctx.size, None]
            chunk.copy_(chunk.softmax(1, dtype=grad.dtype).mul_(-g).scatter_add_(1, t, g))
        return logits, None
