"""What a run should compute, by plain calls of transformers: one sequence at a time, with no code of this project."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tokens = list[list[Tensor]]  # the log-probability of each trained token, (tokens,), by example and response


class Text(NamedTuple):
    """A response after its prompt, and which of its tokens are trained."""

    prompt: list[int]
    response: list[int]
    trained: list[bool]


class Precision(NamedTuple):
    """Dtypes: of the weights (None: of those that are given), of autocast (None: without it), of sums and the loss."""

    weights: torch.dtype | None
    autocast: torch.dtype | None
    sums: torch.dtype


@dataclass(frozen=True)
class Result:
    """The loss of a batch with all that leads to it; the gradient is on the host."""

    policy: Tokens
    reference: Tokens | None
    loss: float
    slopes: Tokens  # of the loss, by the policy's log-probabilities
    gradient: dict[str, Tensor]


def open_model(
    model_class: Any, source: Any, dtype: torch.dtype, device: torch.device, n_embeddings: int | None = None
) -> Any:
    """A model in evaluation mode: from its files if the source is a name, else from a config, with random weights."""
    if isinstance(source, str):
        model = model_class.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    else:
        model = model_class.from_config(source, dtype=dtype)
    if n_embeddings is not None and n_embeddings != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(n_embeddings, mean_resizing=False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others compute no float64
    return model.to(device).eval().requires_grad_(False)


def add_adapter(model: Any, config: Any) -> None:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)


def set_weights(model: Any, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Give a model weights by name, in a dtype; None: as they are, without a copy."""
    for name, parameter in model.named_parameters():
        parameter.data = weights[name].detach().to(parameter.device, dtype or weights[name].dtype)
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(weights[name])


def distributions(model: Any, text: Text, precision: Precision) -> tuple[Tensor, Tensor]:
    """The log-probability of every token of the vocabulary for each trained token, in at least float32, and its id."""
    ids = torch.tensor([[*text.prompt, *text.response]], device=model.device)
    with torch.autocast(model.device.type, precision.autocast, enabled=precision.autocast is not None):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    trained = torch.tensor(text.trained, device=model.device)
    logits = output.logits[0, len(text.prompt) - 1 : -1][trained]
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logps, ids[0, len(text.prompt) :][trained]


def token_logps(model: Any, text: Text, precision: Precision) -> Tensor:
    """The log-probability of each trained token."""
    logps, targets = distributions(model, text, precision)
    return logps.gather(1, targets[:, None])[:, 0].to(precision.sums)


@torch.no_grad()
def all_logps(model: Any, examples: Iterable[Sequence[Text]], precision: Precision) -> Tokens:
    return [[token_logps(model, text, precision) for text in texts] for texts in examples]


@torch.no_grad()
def all_collisions(model: Any, examples: Iterable[Sequence[Text]], precision: Precision) -> Tokens:
    """The log of the sum of squared probabilities at each trained token."""

    def collisions(text: Text) -> Tensor:
        logps, _ = distributions(model, text, precision)
        return (2 * logps.to(precision.sums)).logsumexp(-1)

    return [[collisions(text) for text in texts] for texts in examples]


def compute(
    model: Any,
    examples: Sequence[Sequence[Text]],
    reference: Tokens | None,
    loss_of: Callable[[Tokens, Tokens | None], Tensor],
    trained: Iterable[str],
    precision: Precision,
) -> Result:
    """The loss of a batch, and its gradient by the parameters with the names in trained.

    loss_of computes the loss from log-probabilities. A second pass over each sequence carries its slopes to the
    weights, so that the activations of only one sequence are in memory.
    """
    policy = all_logps(model, examples, precision)
    leaves = [[tokens.requires_grad_() for tokens in texts] for texts in policy]
    loss = loss_of(leaves, reference)
    loss.backward()
    slopes = [[torch.zeros_like(t) if t.grad is None else t.grad for t in texts] for texts in leaves]
    policy = [[tokens.detach() for tokens in texts] for texts in leaves]
    parameters = dict(model.named_parameters())
    for name in trained:
        parameters[name].requires_grad_()
    for texts, slopes_of_texts in zip(examples, slopes, strict=True):
        for text, slope in zip(texts, slopes_of_texts, strict=True):
            token_logps(model, text, precision).backward(slope)
    gradient = {name: on_host(parameters[name].grad) for name in trained if parameters[name].grad is not None}
    model.zero_grad()
    return Result(policy, reference, loss.item(), slopes, gradient)


def on_host(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32))
