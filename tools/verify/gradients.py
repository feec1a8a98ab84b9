"""Log-probabilities, loss and gradient of an update against the plain computation, and other ways to compute them."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dpo.data.examples import TokenizedExample
from dpo.model.loading import recompute_activations
from dpo.model.logps import ResponseLogps, response_logps
from dpo.system.errors import UserError
from tools.verify import plain
from tools.verify.plain import Tokens
from tools.verify.plain_run import PlainRun
from tools.verify.rounding import Rounding
from tools.verify.session import Session, free_memory
from tools.verify.table import NOT_RUN, NotRun, Row, measured
from trainers import BasicTrainer, Inputs

# What is computed in other ways may err this many times as much as the plain computation: measured over seeds, models
# and dtypes, see docs/verify.md.
MULTIPLE = 6.0
MOVE = 0.02  # the noise that moves the policy from the reference, as a share of a tensor's root mean square
MOVE_ZEROS = 0.01  # the noise in a tensor of zeros, as the second matrix of an adapter
UNIT = "x rounding"
# No clipping, no load-balancing loss, a reference that stays; compiled layers have a row of their own.
ONLY_THE_LOSS = {
    "max_grad_norm": 1e30,
    "model.router_loss_weight": 0.0,
    "sync_reference": None,
    "sync_mix": 1.0,
    "compile": False,
}

LOGPS, LOGPS_GRADIENT = "log-probabilities: one sequence at a time", "their gradient: one sequence at a time"
LOSS, GRADIENT = "loss of an update: plain loop", "gradient of an update: plain loop"
ACCUMULATION, BUDGET = "gradient: accumulation", "gradient: small token budget"
CHECKPOINTING, PRECOMPUTED = "gradient: activation checkpointing", "gradient: precomputed or live reference"
COMPILED = "gradient: compiled layers"
PROMISES = (
    *(LOGPS, LOGPS_GRADIENT, LOSS, GRADIENT),
    *(ACCUMULATION, BUDGET, CHECKPOINTING, PRECOMPUTED, COMPILED),
)


@dataclass(frozen=True)
class Update:
    """The loss of a batch and its gradient, as a trainer computes them."""

    loss: float
    gradient: dict[str, Tensor]


class Recorder:
    """Takes the place of optimizer and scheduler: keeps the gradient and changes no weight."""

    def __init__(self, trainer: BasicTrainer):
        self.policy = trainer.policy
        self.gradient: dict[str, Tensor] = {}

    def step(self) -> None:
        self.gradient |= gradient_of(self.policy)

    def zero_grad(self) -> None:
        self.policy.zero_grad()

    def get_last_lr(self) -> list[float]:
        return [0.0]


def gradient_of(policy: ResponseLogps) -> dict[str, Tensor]:
    """The gradient of each trained parameter that has one, on the host."""
    named = policy.model.named_parameters()
    return {name: plain.on_host(each.grad) for name, each in named if each.requires_grad and each.grad is not None}


def move(trainer: BasicTrainer) -> None:
    """Move the policy from the reference by noise, the same for all trainers, so that no two pairs weigh the same."""
    generator = torch.Generator().manual_seed(trainer.settings.seed)
    with torch.no_grad():
        for parameter in trainer.policy.trained_parameters():
            size = MOVE * parameter.float().square().mean().sqrt().item() or MOVE_ZEROS
            noise = size * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device, parameter.dtype))


def compute_update(trainer: BasicTrainer, examples: Sequence[TokenizedExample]) -> Update:
    """An update of a trainer up to the optimizer's step, which is left out."""
    batch = next(iter(trainer.train_batches.from_start()))
    recorder: Any = Recorder(trainer)
    with patch.multiple(trainer, optimizer=recorder, scheduler=recorder, loss_state=trainer.loss_state):
        loss = trainer.train_step(replace(batch, examples=list(examples)))["loss/train"]
    return Update(loss, recorder.gradient)


def packed_logps(
    trainer: BasicTrainer, examples: Sequence[TokenizedExample], slopes: Tokens
) -> tuple[Tokens, dict[str, Tensor]]:
    """The log-probability of each token by the run's layout, and the gradient of their sum weighted by slopes."""
    computed: dict[int, list[Tensor]] = {}
    place = {id(example): i for i, example in enumerate(examples)}
    trainer.policy.train()
    with trainer.autocast():
        for batch in trainer.packer(examples):
            tokens = response_logps(trainer.policy, batch).tokens
            assert tokens is not None
            places = [place[id(example)] for example in batch.examples]
            sizes = [len(slope) for i in places for slope in slopes[i]]
            by_response = iter(tokens.detach().split(sizes))
            for i in places:
                computed[i] = [next(by_response) for _ in slopes[i]]
            weights = torch.cat([slope for i in places for slope in slopes[i]])
            (tokens * weights.to(tokens)).sum().backward()
    gradient = gradient_of(trainer.policy)
    trainer.policy.zero_grad()
    return [computed[i] for i in range(len(examples))], gradient


# The checks


def check_gradients(session: Session, inputs: Inputs) -> Iterator[Row]:
    compiled = session.settings.compile is True
    session = session.alone.with_settings(ONLY_THE_LOSS)
    rounding = yield from check_update(session, inputs)
    free_memory()
    examples = next(iter(inputs.train_batches.from_start())).examples

    def with_change(key: str, value: Any) -> Update:
        changed = session.with_settings({key: value})
        with refused_settings():
            changed.validated  # noqa: B018
        with changed.trainer(inputs) as trainer:
            move(trainer)
            return compute_update(trainer, examples)

    precomputes = getattr(session.loss, "precompute_reference", None)
    if precomputes is None or not session.loss.needs_reference:
        yield Row(PRECOMPUTED, NOT_RUN, detail="this loss precomputes no reference")
    else:
        yield attempt(PRECOMPUTED, rounding, lambda: with_change("loss.precompute_reference", not precomputes))
    free_memory()
    if compiled:
        yield attempt(COMPILED, rounding, lambda: with_change("compile", True))
    else:
        yield Row(COMPILED, NOT_RUN, detail="compiling may take a minute; compile=true checks it")


def check_update(session: Session, inputs: Inputs) -> Generator[Row, None, Rounding]:
    """Compare an update with the plain computation, and with what the same trainer computes in other ways.

    Returns the rounding around the update.
    """
    with session.trainer(inputs) as trainer:
        plain_run = PlainRun(session, trainer)
        examples = next(iter(inputs.train_batches.from_start())).examples
        move(trainer)
        truth = plain_run.compute(examples, plain_run.exact)
        free_memory()
        rounding = Rounding.of(truth, plain_run.compute(examples, plain_run.own))
        kind = f"{trainer.packer.layout}, {trainer.policy.model.config._attn_implementation}"
        tokens, gradient = packed_logps(trainer, examples, truth.slopes)
        yield measured(LOGPS, rounding.of_logps(tokens), MULTIPLE, UNIT, f"{rounding.logps:.1e} nats; {kind}")
        yield of_gradient(LOGPS_GRADIENT, rounding, gradient)
        update = compute_update(trainer, examples)
        yield measured(LOSS, rounding.of_loss(update.loss), MULTIPLE, UNIT, plain_run.remark)
        yield of_gradient(GRADIENT, rounding, update.gradient)
        rounding = rounding.around(update.loss, update.gradient)
        for promise, way in WAYS.items():
            yield attempt(promise, rounding, partial(in_another_way, trainer, examples, way))
    return rounding


def of_gradient(promise: str, rounding: Rounding, gradient: dict[str, Tensor]) -> Row:
    value, name = rounding.of_gradient(gradient)
    return measured(promise, value, MULTIPLE, UNIT, f"most in {name}")


def of_update(promise: str, rounding: Rounding, update: Update) -> Row:
    """The worse of loss and gradient."""
    row = of_gradient(promise, rounding, update.gradient)
    loss = rounding.of_loss(update.loss)
    return row if loss <= row.value else measured(promise, loss, MULTIPLE, UNIT, "the loss")  # type: ignore[operator]


def attempt(promise: str, rounding: Rounding, compute: Callable[[], Update]) -> Row:
    """A row for another way to compute the update; not run if the settings or the machine do not allow it."""
    try:
        return of_update(promise, rounding, compute())
    except NotRun as error:
        return Row(promise, NOT_RUN, detail=str(error))
    except Exception as error:
        if not any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__):
            raise
        return Row(promise, NOT_RUN, detail=f"cannot be compiled here ({str(error).strip().splitlines()[0]})")


@contextmanager
def refused_settings() -> Iterator[None]:
    """A combination of settings that is refused is not run."""
    try:
        yield
    except UserError as error:
        raise NotRun(str(error)) from None


Way = Callable[[BasicTrainer, Sequence[TokenizedExample]], Any]


def in_another_way(trainer: BasicTrainer, examples: Sequence[TokenizedExample], way: Way) -> Update:
    with way(trainer, examples):
        return compute_update(trainer, examples)


@contextmanager
def accumulated(trainer: BasicTrainer, examples: Sequence[TokenizedExample]) -> Iterator[None]:
    """Each example in a microbatch of its own."""
    settings = trainer.settings
    if len(examples) == 1:
        raise NotRun("a batch of one example is one microbatch; raise batch_size")
    trainer.settings = settings.model_copy(update={"gradient_accumulation_steps": len(examples)})
    yield
    trainer.settings = settings


@contextmanager
def divided(trainer: BasicTrainer, examples: Sequence[TokenizedExample]) -> Iterator[None]:
    """Microbatches no longer than the longest example needs."""
    packer = trainer.packer
    trainer.packer = replace(packer, max_tokens=max(map(len, examples)))
    yield
    trainer.packer = packer


@contextmanager
def recomputed(trainer: BasicTrainer, examples: Sequence[TokenizedExample]) -> Iterator[None]:
    """Activation checkpointing, if the run has none, and none if it has it."""
    model, on = trainer.policy.model, not trainer.settings.activation_checkpointing
    if not model.supports_gradient_checkpointing:
        raise NotRun("this kind of model does not support it")
    recompute_activations(model, on)
    yield
    recompute_activations(model, not on)


WAYS: dict[str, Way] = {ACCUMULATION: accumulated, BUDGET: divided, CHECKPOINTING: recomputed}
