"""State in memory: random generators, and the tensors in nested dicts and lists."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

T = TypeVar("T")

STAGING_BYTES = 2**26  # of pinned memory, twice, for copies from a GPU

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


def in_parts(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Divide items, in their order, into lists of sizes up to `limit`, or of a single larger item."""
    part: list[T] = []
    total = 0
    for item in items:
        if part and total + size(item) > limit:
            yield part
            part, total = [], 0
        part.append(item)
        total += size(item)
    if part:
        yield part


# Copies in host memory


def copy_to_host(value: Any, memo: dict[Any, Tensor]) -> Any:
    """Copy nested dicts, lists and tuples, and every tensor in them to the host.

    Tensors that share memory, such as tied weights, share it in the copy too; memo holds those already copied.
    """
    on_gpu: list[tuple[Tensor, Tensor]] = []
    copied = copy_nested(value, memo, on_gpu)
    if on_gpu:
        copy_through_pinned_memory(on_gpu)
    return copied


def copy_nested(value: Any, memo: dict[Any, Tensor], on_gpu: list[tuple[Tensor, Tensor]]) -> Any:
    """Copy as copy_to_host does, but add tensors of a GPU, with their copies that are still empty, to on_gpu."""
    if isinstance(value, dict):
        return {key: copy_nested(each, memo, on_gpu) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_nested(each, memo, on_gpu) for each in value)
    if is_traceable_wrapper_subclass(value):  # a tensor made of others, such as DTensor and torchao's 8-bit tensors
        names, context = value.__tensor_flatten__()
        parts = {name: copy_nested(getattr(value, name), memo, on_gpu) for name in names}
        return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())
    if not isinstance(value, Tensor):
        return value
    key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else id(value)
    if key not in memo:
        if value.is_cuda and value.is_contiguous():
            memo[key] = torch.empty_like(value, device="cpu", requires_grad=False)
            on_gpu.append((value.detach(), memo[key]))
        else:
            memo[key] = value.detach().to("cpu", copy=True)
    return memo[key]


def copy_through_pinned_memory(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy contiguous tensors of a GPU to others on the host, and return when all have arrived.

    A GPU writes to pinned memory while the host computes, and one tensor after another without a wait. Pinning all
    copies would lock the memory of a whole model, rounded up to powers of 2, until the process ends. So they go
    through two buffers, in turn: the host reads one while the GPU writes the other.
    """
    in_bytes = ([each.view(-1).view(torch.uint8).split(STAGING_BYTES) for each in pair] for pair in pairs)
    pieces = (piece for pair in in_bytes for piece in zip(*pair, strict=True))
    buffers = [torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    unload: Callable[[], None] | None = None
    for part, buffer in zip(in_parts(pieces, lambda piece: len(piece[0]), STAGING_BYTES), cycle(buffers)):
        sizes = [len(source) for source, _ in part]
        slots = buffer[: sum(sizes)].split(sizes)
        for slot, (source, _) in zip(slots, part, strict=True):
            slot.copy_(source, non_blocking=True)
        written = torch.cuda.Event()
        written.record()
        if unload is not None:
            unload()
        unload = partial(read_slots, written, slots, [target for _, target in part])
    if unload is not None:
        unload()


def read_slots(written: torch.cuda.Event, slots: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy parts of a buffer to their targets once the GPU has written them."""
    written.synchronize()
    for slot, target in zip(slots, targets, strict=True):
        target.copy_(slot)
