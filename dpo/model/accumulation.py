"""Gradients of the token embeddings and the head, added in place to those of earlier microbatches.

A matrix of the vocabulary's size is the largest parameter of a small model. Autograd allocates one for the gradient of
the head in every microbatch, one of zeros for that of the embeddings, and one for the sum of tied weights. Here, one is
allocated per update, if the head computes in its weight's dtype and the embeddings are on a CPU.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpo.model.logps import ResponseLogps


def accumulate_in_place(module: ResponseLogps) -> ResponseLogps:
    """Let a module's head and embeddings, if they are torch's own types, add to their gradients in place.

    These gradients bypass autograd, so its hooks (FSDP, DDP) and torch.autograd.grad miss them. Use it for a module on
    one device, with backward(). Returns the module.
    """
    head, embeddings = module.head, module.model.get_input_embeddings()
    if type(head) is nn.Linear and getattr(head, "bias", None) is None and not module.float32_head:
        head.register_forward_hook(with_head_gradient)
    if type(embeddings) is nn.Embedding and not embeddings.scale_grad_by_freq:
        if embeddings.weight.device.type == "cpu":  # elsewhere index_add_ adds equal tokens' rows in no certain order
            embeddings.register_forward_hook(with_embedding_gradient)
    return module


def with_head_gradient(head: nn.Linear, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
    """Use HeadGradient, unless the weight is frozen or autocast computes in another dtype."""
    weight = head.weight
    if not (logits.requires_grad and weight.requires_grad and logits.dtype == weight.dtype):
        return logits
    return HeadGradient.apply(inputs[0], weight, logits.detach())


def with_embedding_gradient(embeddings: nn.Embedding, inputs: tuple[Tensor, ...], hidden: Tensor) -> Tensor:
    """Use EmbeddingGradient, unless the weight is frozen."""
    if not (hidden.requires_grad and embeddings.weight.requires_grad):
        return hidden
    return EmbeddingGradient.apply(embeddings.weight, inputs[0], hidden.detach(), embeddings.padding_idx)


class HeadGradient(torch.autograd.Function):
    """Logits (..., vocabulary) of hidden states (..., d) and a weight (vocabulary, d); they are computed already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.weight = weight  # itself: what is recomputed (checkpoint) unpacks another tensor
        ctx.mark_dirty(logits)  # else they would be a view, which a model could not change in place
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (hidden,) = ctx.saved_tensors
        weight = ctx.weight
        flat = grad.flatten(0, -2)
        rows = hidden.flatten(0, -2)
        if weight.grad is None:
            weight.grad = flat.T @ rows
        else:
            weight.grad.addmm_(flat.T, rows)
        return grad @ weight, None, None


class EmbeddingGradient(torch.autograd.Function):
    """Embeddings (..., d) of token ids (...) by a weight (vocabulary, d); they are looked up already."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, hidden: Tensor, padding_id: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_id = weight, padding_id
        ctx.mark_dirty(hidden)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        (ids,) = ctx.saved_tensors
        weight = ctx.weight
        if ctx.padding_id is not None:
            grad = grad.masked_fill((ids == ctx.padding_id)[..., None], 0)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids.flatten(), grad.flatten(0, -2))
        return None, None, None, None
