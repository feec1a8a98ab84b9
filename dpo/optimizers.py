"""Optimizers: torch.optim's own for float32 parameters, and the same with stochastic rounding for bfloat16 ones.

bfloat16 has 8 significant bits: the distance to the next number (an ulp) is 2^-8 to 2^-7 of a weight. Rounding to
nearest loses every update below half of that, which at usual learning rates is nearly every one. Stochastic rounding
goes to either neighbour with a probability such that the mean of the result is the exact number.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

CHUNK = {"cpu": 2**20, "mps": 2**22, "cuda": 2**24}  # weights stepped at a time, in about seven float32 temporaries
STEP_IS_NOT_LR = ("SGD", "Adadelta")  # the others divide by the size of the gradient, so that lr is the size of a step


def make_optimizer(name: str, parameters: Iterable[Parameter], lr: float) -> Optimizer:
    """Return the optimizer of torch.optim called name, which rounds stochastically if any parameter is in bfloat16."""
    parameters, kind = list(parameters), getattr(torch.optim, name)
    if any(parameter.dtype == torch.bfloat16 for parameter in parameters):
        return StochasticRoundingOptimizer(kind, parameters, lr)
    return kind(parameters, lr=lr)


class StochasticRoundingOptimizer(Optimizer):
    """An elementwise optimizer of torch.optim that computes in float32 and rounds the results stochastically.

    Weights and moments stay in the parameters' dtype; float32 copies exist of one chunk at a time. The noise is drawn
    from the global generator of each parameter's device, so that a run which restores its state goes on bit for bit.
    Parameters in float32 are updated as torch.optim does it.
    """

    def __init__(self, kind: Callable[..., Optimizer], parameters: Iterable[Parameter], lr: float):
        self.make_inner = lambda proxy: kind([proxy], lr=lr)
        super().__init__(parameters, self.make_inner(torch.zeros(1)).defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        """Update the parameters that have a gradient."""
        assert closure is None, "a closure would need gradients in float32"
        for group in self.param_groups:
            options = {key: value for key, value in group.items() if key != "params"}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, options)

    def _step_parameter(self, parameter: Parameter, options: dict[str, Any]) -> None:
        """Update a parameter chunk by chunk, each by a fresh inner optimizer that is handed its part of the state."""
        weights, gradients = torch.atleast_1d(parameter.detach()), torch.atleast_1d(parameter.grad)
        state = self.state[parameter]  # empty before the first step
        moments = {key: value for key, value in state.items() if has_shape(value, weights.shape)}
        counters = {key: value for key, value in state.items() if key not in moments}  # the same for every chunk
        n_rows = max(1, CHUNK[weights.device.type] * len(weights) // max(1, weights.numel()))
        after: dict[str, Any] = {}
        for start in range(0, len(weights), n_rows):
            rows = slice(start, start + n_rows)
            proxy = weights[rows].float()
            proxy.grad = gradients[rows].float()
            inner = self.make_inner(proxy)
            inner.param_groups[0].update(options)
            if state:
                inner.state[proxy] = {key: value[rows].float() for key, value in moments.items()}
                inner.state[proxy] |= copy.deepcopy(counters)
            inner.step()
            weights[rows] = round_to(proxy, weights.dtype)
            for key, value in inner.state[proxy].items():
                if has_shape(value, proxy.shape):
                    after.setdefault(key, moments.get(key, torch.empty_like(weights)))
                    after[key][rows] = round_to(value, weights.dtype)
                else:
                    after[key] = value
        state.update(after)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state without the casts of torch.optim, which would round counters to the parameters' dtype."""
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
    """Return whether a value of an optimizer's state holds one number per weight."""
    return isinstance(value, Tensor) and value.shape == shape


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 values in a parameter's dtype, stochastically rounded if that is bfloat16."""
    return stochastic_round(values) if dtype == torch.bfloat16 else values.to(dtype)


def stochastic_round(values: Tensor) -> Tensor:
    """Round float32 values of any shape to bfloat16, up or down at random such that the mean is the exact value.

    Finite values beyond bfloat16's largest number become that number; infinities and NaN stay.
    """
    # bfloat16 is the upper half of float32's bits: add 16 random bits to the lower half, then cut that off. Where none
    # are added, larger values than the largest are cut down to it, and infinities and NaN (quiet ones) stay.
    bits = torch.empty_like(values, dtype=torch.int32).random_().bitwise_and_(0xFFFF)
    bits.mul_(values.abs() < torch.finfo(torch.bfloat16).max)
    return bits.add_(values.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32).to(torch.bfloat16)


@torch.no_grad()
def movable_share(parameters: Iterable[Tensor], lr: float) -> float:
    """Return the share of weights, 0 to 1, of which half an ulp is at most lr.

    These are the weights that a step of size lr can change when the result is rounded to nearest.
    """
    movable = total = 0
    for parameter in parameters:
        # Half an ulp of w is 2^floor(log2 |w|) times that of 1, so w counts if |w| is below this power of two.
        _, exponent = math.frexp(abs(lr) / (torch.finfo(parameter.dtype).eps / 2))
        chunks = parameter.detach().flatten().split(CHUNK[parameter.device.type])
        movable += sum(int((weights.abs() < 2.0**exponent).count_nonzero()) for weights in chunks)
        total += parameter.numel()
    return movable / total if total else 1.0


def bfloat16_note(parameters: Iterable[Parameter], lr: float, optimizer_name: str) -> str | None:
    """Return a line on what training bfloat16 parameters at lr amounts to, or None if there are none."""
    parameters = [parameter for parameter in parameters if parameter.dtype == torch.bfloat16]
    if not parameters:
        return None
    step = "step" if optimizer_name not in STEP_IS_NOT_LR else "change"
    lost = 1 - movable_share(parameters, lr)
    more = extra_bytes(parameters, optimizer_name) / 1e9
    return (
        f"model.policy_dtype=bfloat16: a {step} of lr={lr:g} is below the rounding of {lost:.1%} of the "
        "weights, so updates are rounded stochastically; "
        f"model.policy_dtype=float32 trains exactly and needs {more:.2g} GB more"
    )


def extra_bytes(parameters: Sequence[Parameter], optimizer_name: str) -> int:
    """Return the bytes that weights, gradients and moments of bfloat16 parameters need more in float32."""
    probe = torch.nn.Parameter(torch.zeros(2))
    probe.grad = torch.ones(2)
    optimizer = getattr(torch.optim, optimizer_name)([probe])
    optimizer.step()
    n_moments = sum(has_shape(value, probe.shape) for value in optimizer.state[probe].values())
    return 2 * (2 + n_moments) * sum(parameter.numel() for parameter in parameters)
