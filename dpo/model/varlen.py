"""Attention in a row of several examples by torch's kernel for sequences of any lengths: no mask, no padding.

Queries stay as they lie in the row. Keys and values are gathered once, so that those that a segment of queries sees lie
together: [prompt, first response][prompt, second response] ... of each example.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

HALF = (torch.bfloat16, torch.float16)  # what the kernel computes in
MAX_HEAD_DIM = 256
# torch 2.11's function has no such argument, and hands fewer heads of keys to the same kernel.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


@dataclass(frozen=True, eq=False)
class Segments:
    """Which queries of a row see which keys: a segment for each prompt with its first response, and for each other one.

    The queries of a segment are the last of its keys, and see them causally.

    query_starts  (segments + 1,) where each segment begins in the row
    key_starts    (segments + 1,) where its keys begin among the gathered ones
    keys          (gathered,) the token of each gathered key
    places        (seq,) where each token is gathered first
    prompts       (n,) the tokens that are gathered more than once
    copies        (n,) for each further response: where else they are gathered
    lengths       the number of queries and of keys of each segment, and the largest of each
    """

    query_starts: Tensor
    key_starts: Tensor
    keys: Tensor
    places: Tensor
    prompts: Tensor
    copies: tuple[Tensor, ...]
    lengths: tuple[tuple[int, int], ...]
    longest_query: int
    longest_key: int


def make_segments(branch_lengths: Sequence[Sequence[int]], device: torch.device) -> Segments:
    """Make the segments of a row from its branch_lengths (see PackedBatch), on the host, and copy them in one piece."""
    pieces: list[tuple[int, int, int]] = []  # the first token of what is gathered, its length, the number of its copy
    lengths: list[tuple[int, int]] = []
    end = 0
    for n_prompt, first, *others in branch_lengths:
        start, end = end, end + n_prompt + first
        pieces.append((start, n_prompt + first, 0))
        lengths.append((n_prompt + first, n_prompt + first))
        for k, n in enumerate(others, start=1):
            pieces += [(start, n_prompt, k), (end, n, 0)]
            lengths.append((n, n_prompt + n))
            end += n
    starts, sizes, copy_numbers = torch.tensor(pieces).T
    n_queries, n_keys = torch.tensor(lengths).T
    place = torch.arange(int(sizes.sum()))
    keys = place + (starts - sizes.cumsum(0) + sizes).repeat_interleave(sizes)
    copy_number = copy_numbers.repeat_interleave(sizes)
    places = torch.empty(end, dtype=torch.int64)
    places[keys[copy_number == 0]] = place[copy_number == 0]
    n_copies = int(copy_numbers.max())
    indices = [F.pad(n_queries.cumsum(0), (1, 0)), F.pad(n_keys.cumsum(0), (1, 0)), keys, places]
    indices += [keys[copy_number == 1], *(place[copy_number == k] for k in range(1, n_copies + 1))]
    query_starts, key_starts, keys, places, prompts, *copies = to_device(indices, device)
    return Segments(
        query_starts,
        key_starts,
        keys,
        places,
        prompts,
        tuple(copies),
        tuple(lengths),
        longest_query=int(n_queries.max()),
        longest_key=int(n_keys.max()),
    )


def to_device(indices: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy indices as int32, in one piece and without waiting; each begins at 16 bytes, as compiled kernels want it."""
    padded = [F.pad(index, (0, -len(index) % 4)) for index in indices]
    joined = torch.cat(padded).int()
    if device.type == "cuda":
        joined = joined.pin_memory()
    parts = joined.to(device, non_blocking=True).split([*map(len, padded)])
    return [part[: len(index)] for part, index in zip(parts, indices, strict=True)]


class Gathered(torch.autograd.Function):
    """Rows of (seq, ...) in the order of Segments.keys. Gradients are added in a fixed order: index_select's own
    backward adds with atomic operations.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:  # one name: of more, Dynamo takes 3 responses for no ctx
        states, keys, places, prompts, *copies = tensors
        ctx.save_for_backward(places, prompts, *copies)
        return states.index_select(0, keys)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        places, prompts, *copies = ctx.saved_tensors
        total = grad.index_select(0, places)
        shared = total.index_select(0, prompts).to(torch.promote_types(total.dtype, torch.float32))
        for copy in copies:
            shared = shared + grad.index_select(0, copy)
        total.index_copy_(0, prompts.long(), shared.to(total.dtype))
        return total, None, None, None, *[None] * len(copies)


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend in the segments of a row; query, key and value are (1, heads, seq, d), the result (1, seq, heads, d).

    segments is an argument of the model's forward pass that transformers passes on. In 16 bits, torch's kernel computes
    it; in float32, which the kernel does not have, exact_attention. ValueError for what neither computes.
    """
    if segments is None or attention_mask is not None:
        raise ValueError("varlen attention needs a row of several examples, and no mask")
    refuse_options("varlen", kwargs)
    d = query.shape[-1]
    if d > MAX_HEAD_DIM or d % 8 or value.shape[-1] != d:
        raise ValueError(f"varlen attention needs heads of 8, 16, ... or {MAX_HEAD_DIM} dimensions, not {d}")
    if sliding_window is not None and sliding_window < segments.longest_key:
        raise ValueError("varlen attention has no sliding window")
    dtype = attention_dtype(value)
    q, k, v = (states[0].transpose(0, 1).to(dtype).contiguous() for states in (query, key, value))
    if segments.copies:
        index = segments.keys, segments.places, segments.prompts, *segments.copies
        k, v = Gathered.apply(k, *index), Gathered.apply(v, *index)
    if dtype not in HALF:
        return exact_attention(q, k, v, segments, scaling)[None], None
    out: Tensor = varlen_attn(  # type: ignore[assignment]
        q,
        k,
        v,
        segments.query_starts,
        segments.key_starts,
        segments.longest_query,
        segments.longest_key,
        scale=scaling,
        window_size=(-1, 0),
        **GROUPED,
    )
    return out[None], None


@torch.compiler.disable  # would be recompiled for all lengths
def exact_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """Attend segment by segment with torch's own attention, from the lengths alone, (seq, heads, d)."""
    n_queries, n_keys = map(list, zip(*segments.lengths, strict=True))
    group = query.shape[1] // key.shape[1]
    k, v = (states.repeat_interleave(group, 1).transpose(0, 1).split(n_keys, 1) for states in (key, value))
    outputs = []
    for q, own_k, own_v in zip(query.transpose(0, 1).split(n_queries, 1), k, v, strict=True):
        mask = q.new_ones(q.shape[1], own_k.shape[1], dtype=torch.bool).tril(own_k.shape[1] - q.shape[1])
        outputs.append(F.scaled_dot_product_attention(q, own_k, own_v, attn_mask=mask, scale=scaling))
    return torch.cat(outputs, 1).transpose(0, 1)


def attention_dtype(value: Tensor) -> torch.dtype:
    """What attention computes in: autocast's dtype, which only torch's own functions know, or that of the values."""
    kind = value.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype


def refuse_options(kind: str, options: dict[str, Any]) -> None:
    """Raise ValueError for what a model asks of its attention and a kind of attention does not compute."""
    asked = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if options.get("dropout", 0.0) > 0:  # a symbol while torch 2.11 compiles a layer in training mode
        asked.append("dropout")
    if asked:
        raise ValueError(f"{kind} attention has no {' and '.join(asked)}")
