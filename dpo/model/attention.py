"""Which tokens attend to which in a row that holds several examples, on CPU and GPU."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo.system.devices import DeviceFacts

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# On a CPU, in examples of at least this many tokens, each response attends apart from the others, so that less of what
# the mask hides is computed; in shorter ones more calls cost as much as that saves (benchmarks/README.md).
BRANCHED = 384


def attention_kinds(facts: DeviceFacts) -> list[str]:
    """Return the kinds of attention to try on a device for rows that hold several examples, the fastest first.

    Flex attention is compiled by Triton; torch tests it from compute capability 8.0 on (test_flex_attention.py).
    """
    flex = facts.kind == "cuda" and facts.capability >= (8, 0) and facts.triton
    return ["flex_attention", "packed"] if flex else ["packed"]


def use_attention(model: PreTrainedModel, kind: str) -> None:
    """Switch a model that uses torch's own attention to another kind; a model with its own keeps it.

    Raises ValueError or ImportError if the model has no attention of this kind.
    """
    if kind == "packed":
        AttentionInterface.register("packed", packed_attention)
        AttentionMaskInterface.register("packed", sdpa_mask)
    if model.config._attn_implementation in ("sdpa", "packed", "flex_attention"):
        model.set_attn_implementation(kind)


@contextmanager
def torch_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use torch's own attention, and no compiled code, which would be recompiled for other kinds of inputs."""
    kind = model.config._attn_implementation
    use_attention(model, "sdpa")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        use_attention(model, kind)


def visible(segments: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return whether a query attends to a key: in its example, not later, and in the prompt or in its own response.

    segments is that of a PackedBatch; query and key are positions in the row that broadcast together.
    """
    examples, branches = segments
    shared = (branches[key] == 0) | (branches[key] == branches[query])
    return (examples[key] == examples[query]) & (key <= query) & shared


def additive_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask (1, 1, seq, seq), 0 where a query attends to a key and hugely negative elsewhere.

    It is not boolean, since models with eager attention add it, and of the queries' dtype, since torch misreads
    others. It holds no infinities, which some models multiply; all dtypes but float16 hold bfloat16's lowest number.
    """
    order = torch.arange(segments.shape[1], device=segments.device)
    seen = visible(segments, order[:, None], order)
    return torch.where(seen, 0.0, torch.finfo(torch.bfloat16).min).to(dtype)[None, None]


FLEX_BLOCK = 128  # tokens: rows are filled to whole blocks of flex attention's mask, so that kernels need no edges


def flex_inputs(inputs: dict[str, torch.Tensor], segments: torch.Tensor) -> dict[str, Any]:
    """Return the inputs with a block mask, filled up by tokens that attend to themselves alone, and nothing to them.

    A token that attends to nothing would depend on how a kernel divides by 0. There are at least two blocks, since one
    alone would be compiled for that shape.
    """
    n = segments.shape[1]
    missing = max(-n % FLEX_BLOCK, 2 * FLEX_BLOCK - n)
    example = torch.full((missing,), n, device=segments.device)  # after all others, each token a branch of its own
    branches = torch.arange(1, missing + 1, device=segments.device)
    segments = torch.cat((segments, torch.stack((example, branches))), dim=1)
    return {name: F.pad(value, (0, missing)) for name, value in inputs.items()} | {
        "attention_mask": flex_mask(segments)
    }


def flex_mask(segments: torch.Tensor) -> "BlockMask":
    """Return the mask of `visible` for flex attention, with nothing of size (seq, seq) on the way.

    Of each block of queries and keys it is known from their first and last examples and branches whether no query
    attends to a key, so that it is skipped, or each one to each, so that it is computed without a mask. Examples, and
    the branches of one, come in ascending order.
    """
    from torch.nn.attention.flex_attention import BlockMask  # only a GPU needs it

    blocks = segments.view(2, -1, FLEX_BLOCK)
    (example, branch), (last_example, last_branch) = blocks.amin(-1), blocks.amax(-1)
    order = torch.arange(len(example), device=segments.device)
    query, key = order[:, None], order
    alone = example == last_example  # blocks with tokens of one example
    same = alone[query] & alone[key] & (example[query] == example[key])
    apart = same & (branch[key] > 0) & (last_branch[key] < branch[query])
    some = (key <= query) & (last_example[key] >= example[query]) & ~apart
    one_branch = (branch[key] == last_branch[query]) & (last_branch[key] == branch[query])
    full = (key < query) & same & ((last_branch[key] == 0) | one_branch)

    def listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many keys' blocks each queries' block has, and their indices, first those that are chosen."""
        chosen = chosen.int()[None, None]
        return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return visible(segments, q, k)

    return BlockMask.from_kv_blocks(*listed(some & ~full), *listed(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod)


@dataclass(frozen=True)
class BranchLengths:
    """The lengths of the prompt and the responses of each example in a row.

    An object, since torch.compile would compile anew for each other tuple.
    """

    examples: tuple[tuple[int, ...], ...]


@torch.compiler.disable  # compiled, it would be another function for every number of examples
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    branch_lengths: BranchLengths | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend example by example: cost grows with the sum of the squared lengths, not with the square of their sum.

    query, key, value are (1, heads, seq, d) and the mask (1, 1, seq, seq). branch_lengths is an
    argument of the model's forward pass, which transformers hands on. Without it this is torch's attention.
    """
    if attention_mask is None or branch_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    sizes = [sum(lengths) for lengths in branch_lengths.examples]
    outputs = []
    split = (states.split(sizes, dim=2) for states in (query, key, value))  # slices' gradients would be whole tensors
    for lengths, end, q, k, v in zip(branch_lengths.examples, accumulate(sizes), *split, strict=True):
        own = slice(end - sum(lengths), end)
        mask = attention_mask[:, :, own, own]
        if query.device.type == "cpu":
            outputs.append(cpu_attention(q, k, v, mask, lengths, **kwargs))
        else:
            outputs.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def cpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    lengths: Sequence[int],
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attend in one example in at least float32, with as many key heads as there are; the result is (1, seq, heads, d).

    lengths are those of its prompt and responses. The result is of the values' dtype. For sequences of some hundred
    tokens torch's kernel is slower in bfloat16, and repeated keys would only be stored.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=True)
    q, k, v, mask = (tensor.to(dtype) for tensor in (query, key, value, mask))
    with torch.autocast("cpu", enabled=False):
        out = branched(attend, q, k, v, mask, lengths) if q.shape[2] >= BRANCHED else attend(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).to(value.dtype)


def branched(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    lengths: Sequence[int],
) -> torch.Tensor:
    """Attend in the prompt and first response causally, then in each other response to the prompt and itself."""
    rows = [lengths[0] + lengths[1], *lengths[2:]]
    queries, masks = query.split(rows, dim=2), mask.split(rows, dim=2)
    keys, values = key.split(lengths, dim=2), value.split(lengths, dim=2)
    parts = [attend(queries[0], torch.cat(keys[:2], 2), torch.cat(values[:2], 2), is_causal=True)]
    for i, (own, seen) in enumerate(zip(queries[1:], masks[1:], strict=True), start=2):
        both = ((keys, 2), (values, 2), (seen.split(lengths, dim=3), 3))  # of the prompt and of the response
        k, v, m = (torch.cat((part[0], part[i]), dim) for part, dim in both)
        parts.append(attend(own, k, v, attn_mask=m))
    return torch.cat(parts, 2)
