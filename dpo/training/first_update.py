"""Checks of the first update: policy and reference start equal, and every trained parameter gets a gradient."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dpo.distributed.ranks import Ranks
from dpo.distributed.sharding import local_part, reshard
from dpo.model.logps import Logps, ResponseLogps
from dpo.system.console import log_message
from dpo.system.errors import UserError, join_names, summarize_error
from dpo.training.references import OTHER_WAYS, Reference

MAX_NAMES = 5  # in a message


def has_dropout(policy: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in policy.modules())


def check_first_margin(policy: Logps, logps: Logps, reference: Reference) -> None:
    """Raise UserError unless the policy gives the reference's log-probabilities before its first update.

    logps are the reference's, for the same batch. They may differ by reference.start_tolerance.
    """
    differences = (policy.sums.detach() - logps.sums).abs()
    largest = differences.max().item()
    per_token = (differences.sum() / policy.lengths.sum()).item()
    if largest > 0 and per_token > reference.start_tolerance:  # NaN is reported by the check of the loss
        raise UserError(
            f"policy and reference differ by up to {largest:.2g} nats per response before the first update, although"
            f" they have the same weights, so no update was made; {reference.mitigation}"
        )


class FirstMargin:
    """Compares policy and reference before the first update: checks that they are equal, or logs how they differ."""

    def __init__(self, reference: Reference, name: str):
        """Compare with a reference; name is the setting that names it."""
        self.reference, self.name = reference, name
        self.difference, self.n_tokens = 0.0, 0
        self.is_open = True

    def compare(self, policy: Logps, logps: Logps) -> None:
        """Compare the log-probabilities of the same responses; UserError if they differ but must not."""
        check_first_margin(policy, logps, self.reference)
        self.difference += (policy.sums.detach() - logps.sums).abs().sum().item()
        self.n_tokens += int(policy.lengths.sum())

    def close(self, ranks: Ranks) -> None:
        """End the comparison, and log the difference if it need not be 0; every rank must call it."""
        if self.is_open and math.isinf(self.reference.start_tolerance):
            differences, counts = zip(*ranks.gather_shares((self.difference, self.n_tokens)), strict=True)
            per_token = sum(differences) / max(1, sum(counts))
            log_message(
                f"First margin: before its first update, the policy differs from {self.name} by {per_token:.4g} nats"
                f" per token, the mean over {sum(counts):,} tokens."
            )
        self.is_open = False


def check_gradients(policy: ResponseLogps, compute_logps: Callable[[], Tensor], ranks: Ranks) -> bool:
    """Check that every trained parameter has a gradient; call it before the optimizer steps.

    A parameter without one is either not used (an expert that no token was routed to, a vision tower) or cut off by an
    operation without a backward pass. To tell which, the parameter is changed, and compute_logps computes the
    log-probabilities of the same batch again. Matrix B of a LoRA adapter also counts as cut off if its gradient is 0.

    Returns False if the whole gradient is 0, which proves nothing: the next update must be checked. Raises UserError
    with the names of parameters that change the log-probabilities but have no gradient.
    """
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    with_gradient = set().union(*ranks.gather({name for name, each in trained.items() if has_gradient(each)}))
    absent = set().union(*ranks.gather({name for name, each in trained.items() if each.grad is None}))
    if not with_gradient and len(absent) < len(trained):
        return False
    missing = {
        name: parameter
        for name, parameter in trained.items()
        if name not in with_gradient and (name in absent or ".lora_B." in name)
    }
    if missing:
        names = join_names(list(missing), MAX_NAMES)
        if ranks.any(change_logps(policy, missing.values(), compute_logps)):
            raise UserError(
                f"no gradient reaches {len(missing):,} of {len(trained):,} trained tensors that affect the"
                f" log-probabilities, so no update was made: {names}; an operation of this model has no backward"
                f" pass here: {OTHER_WAYS}"
            )
        log_message(
            f"Of {len(trained):,} trained tensors, {len(missing):,} have no gradient in the first update: its"
            f" log-probabilities do not seem to depend on {names}."
        )
    return True


def has_gradient(parameter: Parameter) -> bool:
    """Whether this rank holds a gradient of the parameter that is not 0 everywhere."""
    return parameter.grad is not None and bool(local_part(parameter.grad).any())


@torch.no_grad()
def change_logps(policy: ResponseLogps, parameters: Iterable[Parameter], compute_logps: Callable[[], Tensor]) -> bool:
    """Whether changing the parameters changes the log-probabilities; their values are restored."""
    weights = [local_part(parameter) for parameter in parameters]
    values = [weight.clone() for weight in weights]
    was_training = policy.training
    policy.eval()
    before = compute_logps()
    is_repeatable = torch.equal(before, compute_logps())  # otherwise a change would prove nothing
    reshard(policy)
    for weight in weights:
        generator = torch.Generator(weight.device).manual_seed(0)  # leaves training's generators alone
        weight.add_(torch.randn(weight.shape, generator=generator, device=weight.device))
    is_changed = is_repeatable and not torch.equal(before, compute_logps())
    reshard(policy)
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
    policy.train(was_training)
    return is_changed


@contextmanager
def strict_autograd() -> Iterator[None]:
    """Turn torch's warning about an operation without a backward pass, which loses gradients, into a UserError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*an autograd kernel was not registered")
        try:
            yield
        except UserWarning as warning:
            if "autograd kernel" not in str(warning):
                raise
            name = summarize_error(warning).partition(": ")[0]
            raise UserError(f"{name} has no backward pass here, so gradients would be lost; {OTHER_WAYS}") from None
