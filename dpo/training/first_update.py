"""What is checked in the first update: that policy and reference start equal, and that every gradient arrives."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from dpo.distributed.ranks import Ranks
from dpo.distributed.sharding import reshard
from dpo.model.logps import Logps, ResponseLogps
from dpo.system.console import log_message
from dpo.system.errors import UserError, summarize_error
from dpo.training.references import OTHER_WAYS, Reference

SHOWN = 5  # names in a message


def has_dropout(policy: nn.Module) -> bool:
    """Return whether a policy computes with random numbers in training, as with an adapter's dropout."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in policy.modules())


def check_first_margin(policy: Logps, logps: Logps, reference: Reference) -> None:
    """Raise UserError unless a policy that has made no update gives the log-probabilities of its reference.

    logps are the reference's of the same batch; its start_tolerance says how far they may be apart.
    """
    apart = (policy.sums.detach() - logps.sums).abs()
    largest, per_token = apart.max().item(), (apart.sum() / policy.lengths.sum()).item()
    if largest > 0 and per_token > reference.start_tolerance:  # NaN is reported by the check of the loss
        raise UserError(
            f"the policy starts up to {largest:.2g} nats per response from its reference, although both have the same"
            f" weights, so no update was made; {reference.mitigation}"
        )


def check_gradients(policy: ResponseLogps, compute_logps: Callable[[], Tensor], ranks: Ranks) -> bool:
    """Check that a backward pass has given every trained parameter a gradient; call it before the optimizer steps.

    A parameter without one is either not used (an expert that no token was routed to, a vision tower) or cut off by an
    operation that has no backward pass. The two are told apart by an experiment: the parameter is changed, and the
    log-probabilities of the same batch are computed again. compute_logps computes them, without a gradient.

    The matrix B of a LoRA adapter also counts as cut off if its gradient is exactly 0.

    Returns False if the whole gradient is 0, which shows nothing: the next update has to be checked.
    Raises UserError that names parameters that change the log-probabilities and have no gradient.
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
        names = shorten(missing)
        if ranks.any(change_logps(policy, missing.values(), compute_logps)):
            raise UserError(
                f"no gradient reaches {len(missing):,} of {len(trained):,} trained tensors, on which the"
                f" log-probabilities depend, so no update was made: {names}; an operation of this model has no backward"
                f" pass here: {OTHER_WAYS}"
            )
        log_message(
            f"Of {len(trained):,} trained tensors, {len(missing):,} have no gradient in the first update: its"
            f" log-probabilities do not seem to depend on {names}."
        )
    return True


def has_gradient(parameter: Parameter) -> bool:
    """Return whether this rank holds a gradient of a parameter that is not exactly 0 everywhere."""
    return parameter.grad is not None and bool(local(parameter.grad).any())


@torch.no_grad()
def change_logps(policy: ResponseLogps, parameters: Iterable[Parameter], compute_logps: Callable[[], Tensor]) -> bool:
    """Return whether log-probabilities change where parameters do, which get their values back."""
    weights = [local(parameter) for parameter in parameters]
    values = [weight.clone() for weight in weights]
    was_training = policy.training
    policy.eval()
    before = compute_logps()
    is_repeatable = torch.equal(before, compute_logps())  # else a change would show nothing
    reshard(policy)
    for weight in weights:
        generator = torch.Generator(weight.device).manual_seed(0)  # training's own generators stay as they are
        weight.add_(torch.randn(weight.shape, generator=generator, device=weight.device))
    changed = is_repeatable and not torch.equal(before, compute_logps())
    reshard(policy)
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
    policy.train(was_training)
    return changed


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return part


def shorten(names: Iterable[str]) -> str:
    """Return names in one line, few of many."""
    names = list(names)
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@contextmanager
def strict_autograd() -> Iterator[None]:
    """Turn torch's warning of an operation without a backward pass, whose gradient would be lost, into a UserError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*an autograd kernel was not registered")
        try:
            yield
        except UserWarning as warning:
            if "autograd kernel" not in str(warning):
                raise
            name = summarize_error(warning).partition(": ")[0]
            raise UserError(f"{name} has no backward pass here, so gradients would be lost; {OTHER_WAYS}") from None
