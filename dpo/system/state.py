"""State in memory: random generators, and the tensors in nested dicts and lists."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Random generators


def random_states() -> dict[str, Any]:
    """Read the states of all random generators, as numbers and tensors that torch.load(weights_only=True) accepts."""
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    name, keys, *rest = state
    states = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Restore what random_states read."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


# Tensors


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Count the bytes of tensors, each storage once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Collect the tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def copy_to_host(value: Any, memo: dict[Any, Tensor]) -> Any:
    """Copy nested dicts, lists and tuples, and every tensor in them to the host.

    Tensors that share memory, such as tied weights, share it in the copy too; memo holds those already copied.
    """
    if isinstance(value, dict):
        return {key: copy_to_host(each, memo) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_to_host(each, memo) for each in value)
    if is_traceable_wrapper_subclass(value):  # a tensor made of others, such as DTensor and torchao's 8-bit tensors
        names, context = value.__tensor_flatten__()
        parts = {name: copy_to_host(getattr(value, name), memo) for name in names}
        return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())
    if not isinstance(value, Tensor):
        return value
    key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else id(value)
    if key not in memo:
        memo[key] = value.detach().to("cpu", copy=True)
    return memo[key]
