"""Optimizers: those of torch.optim for float32 parameters, and the same with stochastic rounding for bfloat16 ones.

Muon optimizes the layers' matrices and leaves the rest to AdamW. AdamW8bit is from torchao.

bfloat16 has 8 significant bits: the distance to the next number (an ulp) is 2^-8 to 2^-7 of a weight. Rounding to
nearest loses every update below half an ulp, which at usual learning rates is nearly all of them. Stochastic rounding
picks one of the two neighbours so that the mean of the result is the exact number.
"""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, NamedTuple
from weakref import proxy

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dpo.distributed.sharding import local_part
from dpo.model.logps import ResponseLogps
from dpo.settings.schema import Settings
from dpo.system.errors import summarize_error
from dpo.system.state import in_parts

# bfloat16 weights that are updated at a time, with up to 13 float32 temporaries
CHUNK = {"cpu": 2**20, "mps": 2**21, "cuda": 2**23}
# Bytes of float32 parameters that are updated at a time. On a GPU, torch updates lists of tensors with few kernels
# (foreach), and one to three temporaries of each tensor. A kernel takes up to 84 or 587 MB, depending on the version of
# CUDA, so that more at a time would hardly save any.
PART_BYTES = 2**28


@dataclass(frozen=True)
class OptimizerOptions:
    """What an optimizer gets in addition to its learning rate.

    arguments     other arguments of its constructor
    weight_decay  for matrices only; None: the optimizer's default, for all parameters
    embeddings    weights that Muon leaves to AdamW, in addition to all that are not matrices
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    weight_decay: float | None = None
    embeddings: Sequence[Parameter] = ()

    @classmethod
    def of(cls, settings: Settings, policy: torch.nn.Module) -> "OptimizerOptions":
        layers = [module for module in policy.modules() if isinstance(module, torch.nn.Embedding)]
        heads = [policy.head] if isinstance(policy, ResponseLogps) else []
        embeddings = [parameter for module in (*layers, *heads) for parameter in module.parameters()]
        return cls(settings.optimizer_args or {}, settings.weight_decay, embeddings)


PLAIN = OptimizerOptions()


def make_optimizer(
    name: str, parameters: Iterable[Parameter], lr: float, options: OptimizerOptions = PLAIN
) -> Optimizer:
    """Make an optimizer, which rounds stochastically if any parameter is in bfloat16."""
    parameters = list(parameters)
    if name == "Muon":
        return make_muon(parameters, lr, options)
    kind = optimizer_class(name)
    groups = decay_groups(parameters, options.weight_decay)
    if name != "AdamW8bit" and any(parameter.dtype == torch.bfloat16 for parameter in parameters):
        return StochasticRoundingOptimizer(partial(kind, **options.arguments), groups, lr)
    return step_in_parts(kind(groups, lr=lr, **options.arguments))


def stepped_optimizer(settings: Settings, policy: ResponseLogps) -> Optimizer:
    """Make a policy's optimizer and take a step that changes no weight; gradients of 0 remain."""
    parameters = policy.trained_parameters()
    optimizer = make_optimizer(settings.optimizer, parameters, 0.0, OptimizerOptions.of(settings, policy))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def optimizer_class(name: str) -> Callable[..., Optimizer]:
    """Find the class of an optimizer; ImportError for AdamW8bit if torchao is not installed."""
    if name != "AdamW8bit":
        return getattr(torch.optim, name)
    from torchao.optim import AdamW8bit

    return partial(AdamW8bit, bf16_stochastic_round=True)


def decay_groups(parameters: Sequence[Parameter], weight_decay: float | None) -> list[Any]:
    """Parameters for an optimizer's constructor. With weight_decay they are in groups, and only matrices decay."""
    if weight_decay is None:
        return list(parameters)
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    others = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_muon(parameters: Sequence[Parameter], lr: float, options: OptimizerOptions) -> Optimizer:
    """Make Muon for the layers' matrices, with AdamW for embeddings, the head and everything that is not a matrix.

    Muon's steps are scaled to the size of AdamW's, so that one learning rate suits both (arXiv 2502.16982), unless
    adjust_lr_fn is given.
    """
    embeddings = {id(parameter) for parameter in options.embeddings}
    matrices: list[Parameter] = []
    others: list[Parameter] = []
    for parameter in parameters:
        is_matrix = parameter.dim() == 2 and id(parameter) not in embeddings
        (matrices if is_matrix else others).append(parameter)
    arguments = {"adjust_lr_fn": "match_rms_adamw"} | dict(options.arguments)
    muon = torch.optim.Muon(decay_groups(matrices, options.weight_decay), lr=lr, **arguments)
    if not others:  # an adapter has only matrices
        return CombinedOptimizer([muon])
    adamw = torch.optim.AdamW(decay_groups(others, options.weight_decay), lr=lr)
    return CombinedOptimizer([muon, step_in_parts(adamw)])


def step_in_parts(optimizer: Optimizer) -> Optimizer:
    """Let an optimizer, whose updates of parameters do not depend on each other, update PART_BYTES at a time.

    The numbers and the state stay the same. Returns the optimizer.
    """
    step_all = type(optimizer).step

    def step(self: Optimizer, closure: None = None) -> None:
        assert closure is None
        groups = self.param_groups
        try:
            for group in groups:
                for part in in_parts(group["params"], lambda parameter: local_part(parameter).nbytes, PART_BYTES):
                    self.param_groups = [group | {"params": part}]
                    step_all(self)
        finally:
            self.param_groups = groups

    # Its class stays torch's own. Without the proxy, it would refer to itself, so that its state outlives it.
    optimizer.step = MethodType(step, proxy(optimizer))  # type: ignore[method-assign]
    return optimizer


def optimizer_problems(settings: Settings) -> list[str]:
    """Check that the chosen optimizer is installed and takes optimizer_args; one line for each problem."""
    name, arguments = settings.optimizer, dict(settings.optimizer_args or {})
    try:
        kind = optimizer_class(name)
    except ImportError:
        return [f"optimizer={name}: needs torchao; pip install torchao, or use optimizer=AdamW"]
    known = [key for key in inspect.signature(kind).parameters if key not in ("params", "lr", "weight_decay")]
    problems = []
    for key, value in arguments.items():
        if key in ("lr", "weight_decay"):
            problems.append(f"optimizer_args.{key}={value}: is a separate setting; use {key}={value}")
        elif key not in known:
            problems.append(f"optimizer_args.{key}: {name} has no such argument; it takes {', '.join(known)}")
    if not problems:
        try:
            kind([Parameter(torch.zeros(2, 2))], lr=settings.lr, **arguments)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            problems.append(f"optimizer_args={arguments}: {name} does not accept them ({summarize_error(error)})")
    return problems


class CombinedOptimizer(Optimizer):
    """Several optimizers for different parameters, stepped together; a scheduler sees all their groups."""

    def __init__(self, optimizers: Sequence[Optimizer]):
        self.optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]  # the same dict objects
        super().__init__(groups, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        assert closure is None
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["parts"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


class Piece(NamedTuple):
    """A parameter, or some rows of a large one."""

    parameter: Parameter
    rows: slice

    def of(self, values: Tensor) -> Tensor:
        """The rows of a tensor with one number per weight."""
        return torch.atleast_1d(values.detach())[self.rows]

    def size(self) -> int:
        return self.of(self.parameter).numel()


class StochasticRoundingOptimizer(Optimizer):
    """An elementwise optimizer of torch.optim that computes in float32 and rounds the results stochastically.

    Weights and moments stay in the parameters' dtype, with float32 copies of up to CHUNK weights at a time, of rows of
    one parameter or of many parameters. The noise comes from the global generator of each parameter's device, so that a
    run that restores its state continues bit for bit. float32 parameters are updated as by torch.optim.
    """

    def __init__(self, kind: Callable[..., Optimizer], parameters: Iterable[Any], lr: float):
        self.make_inner = lambda copies: kind(copies, lr=lr)
        super().__init__(parameters, self.make_inner([torch.zeros(1)]).defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        assert closure is None, "a closure would need gradients in float32"
        after: dict[Parameter, dict[str, Any]] = defaultdict(dict)
        for group in self.param_groups:
            options = {key: value for key, value in group.items() if key != "params"}
            pieces = [piece for parameter in group["params"] if parameter.grad is not None for piece in cut(parameter)]
            for part in in_parts(pieces, Piece.size, CHUNK[pieces[0].parameter.device.type] if pieces else 0):
                self._step_pieces(part, options, after)
        for parameter, state in after.items():  # not before, since all pieces of a parameter need its old counters
            self.state[parameter].update(state)

    def _step_pieces(
        self, pieces: Sequence[Piece], options: dict[str, Any], after: dict[Parameter, dict[str, Any]]
    ) -> None:
        """Update pieces of parameters by a new inner optimizer of float32 copies; `after` gets the new states."""
        weights = [piece.of(piece.parameter) for piece in pieces]
        copies = in_float32(weights)
        inner = self.make_inner(copies)
        inner.param_groups[0].update(options)
        gradients = in_float32([piece.of(each.grad) for piece in pieces if (each := piece.parameter).grad is not None])
        for copied, gradient in zip(copies, gradients, strict=True):
            copied.grad = gradient
        moments = []
        for piece, copied in zip(pieces, copies, strict=True):
            for key, value in self.state[piece.parameter].items():
                if has_shape(value, torch.atleast_1d(piece.parameter).shape):
                    moments.append((copied, key, piece.of(value)))
                else:
                    inner.state[copied][key] = value.clone() if isinstance(value, Tensor) else value
        for (copied, key, _), value in zip(moments, in_float32([rows for *_, rows in moments]), strict=True):
            inner.state[copied][key] = value
        inner.step()

        targets, values = [], []
        for piece, rows, copied in zip(pieces, weights, copies, strict=True):
            state, new = self.state[piece.parameter], after[piece.parameter]
            targets.append(rows)
            values.append(copied)
            for key, value in inner.state[copied].items():
                if not has_shape(value, copied.shape):
                    new[key] = value
                    continue
                if key not in new:
                    new[key] = state[key] if key in state else torch.empty_like(torch.atleast_1d(piece.parameter))
                targets.append(piece.of(new[key]))
                values.append(value)
        store(values, targets)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state without torch.optim's casts, which would round counters to the parameters' dtype."""
        super().load_state_dict(state_dict | {"state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, values in state_dict["state"].items():
            parameter = parameters[number]
            shape = torch.atleast_1d(parameter).shape
            self.state[parameter] = {
                key: value.to(parameter.device) if has_shape(value, shape) else copy.deepcopy(value)
                for key, value in values.items()
            }


def has_shape(value: Any, shape: torch.Size) -> bool:
    """Whether a value of an optimizer's state holds one number per weight."""
    return isinstance(value, Tensor) and value.shape == shape


def cut(parameter: Parameter) -> Iterator[Piece]:
    """Cut a parameter into pieces of up to CHUNK weights."""
    length = len(torch.atleast_1d(parameter))
    n_rows = max(1, CHUNK[parameter.device.type] * length // max(1, parameter.numel()))
    for start in range(0, length, n_rows):
        yield Piece(parameter, slice(start, start + n_rows))


def in_float32(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to float32, on a GPU by few kernels."""
    copies = [torch.empty_like(tensor, dtype=torch.float32) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


def store(values: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Write float32 values to targets of the same shapes, with stochastic rounding to those in bfloat16."""
    flat = [value.flatten() for value, target in zip(values, targets, strict=True) if target.dtype == torch.bfloat16]
    rounded = iter(stochastic_round(torch.cat(flat)).split([len(each) for each in flat]) if flat else ())
    results = [
        next(rounded).view_as(target) if target.dtype == torch.bfloat16 else value
        for value, target in zip(values, targets, strict=True)
    ]
    torch._foreach_copy_(list(targets), results)


def stochastic_round(values: Tensor) -> Tensor:
    """Round float32 values of any shape to bfloat16, up or down at random so that the mean is the exact value.

    Finite values above bfloat16's largest number become that number; infinities and NaN stay.
    """
    # bfloat16 is the upper half of float32's bits: add 16 random bits to the lower half, then cut that off. No bits are
    # added to values from bfloat16's largest number on, so that they are cut down to it; infinities and NaN stay.
    bits = torch.empty_like(values, dtype=torch.int32).random_().bitwise_and_(0xFFFF)
    bits.mul_(values.abs() < torch.finfo(torch.bfloat16).max)
    return bits.add_(values.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32).to(torch.bfloat16)


def bfloat16_note(parameters: Iterable[Parameter], optimizer_name: str) -> str | None:
    """Describe what training bfloat16 parameters means; None if there are none."""
    n = sum(parameter.numel() for parameter in parameters if parameter.dtype == torch.bfloat16)
    if not n:
        return None
    more = 2 * (2 + count_moments(optimizer_name)) * n / 1e9  # weight, gradient and moments take 2 bytes more each
    return (
        "model.policy_dtype=bfloat16: updates below the rounding of the weights would be lost, so they are rounded"
        f" stochastically; model.policy_dtype=float32 trains exactly and needs {more:.2g} GB more"
    )


def count_moments(optimizer_name: str) -> int:
    """The number of values that an optimizer keeps per weight in the weight's dtype; AdamW8bit's have 8 bits."""
    if optimizer_name == "AdamW8bit":
        return 0
    probe = torch.nn.Parameter(torch.zeros(2, 2))
    probe.grad = torch.ones(2, 2)
    optimizer = getattr(torch.optim, optimizer_name)([probe])
    optimizer.step()
    return sum(has_shape(value, probe.shape) for value in optimizer.state[probe].values())
