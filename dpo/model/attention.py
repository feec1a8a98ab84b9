"""Attention in a row of several packed examples, on CPU and GPU."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import repeat_kv
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo.model.varlen import HALF, attention_dtype, refuse_options, varlen_attention
from dpo.system.devices import DeviceFacts

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# On a CPU, each response of an example of at least this many tokens attends in a separate call, so that less is
# computed only to be masked. In shorter examples, the calls cost as much as they save (benchmarks/README.md).
MIN_BRANCHED_TOKENS = 384
FLEX_BLOCK = 128  # tokens in a block of flex attention's mask: rows are padded to whole blocks


def attention_kinds(facts: DeviceFacts) -> list[str]:
    """The kinds of attention to try on a device in every dtype for rows of several examples, fastest first.

    Flex attention is compiled by Triton; torch tests it from compute capability 8.0 on (test_flex_attention.py).
    """
    flex = facts.kind == "cuda" and facts.capability >= (8, 0) and facts.triton
    return ["flex_attention", "packed"] if flex else ["packed"]


def half_precision_kinds(facts: DeviceFacts, dtype: torch.dtype) -> list[str]:
    """The kinds to try before these if dtype, the compute dtype, has 16 bits: torch's kernel for any lengths."""
    return ["varlen"] if facts.kind == "cuda" and facts.capability >= (8, 0) and dtype in HALF else []


def use_attention(model: PreTrainedModel, kind: str) -> None:
    """Switch a model to a kind of attention, or to "sdpa", torch's own. A model with attention of its own keeps it.

    A model whose attention torch cannot compute, such as Gemma 2, computes it itself ("eager") where torch's is asked
    for. Of a composite model only the language model is switched: encoders of images and audio may not support the
    kind. Raises ValueError or ImportError if the model has no attention of this kind.
    """
    current, replaceable = model.config._attn_implementation, [*KINDS, "sdpa"]
    if kind in KINDS:
        AttentionInterface.register(kind, KINDS[kind])
    if kind == "packed":  # without a mask function, transformers makes no mask
        AttentionMaskInterface.register("packed", sdpa_mask)
    if not model._supports_sdpa:
        replaceable.append("eager")
        kind = "eager" if kind in ("packed", "sdpa") else kind
    if current in replaceable and current != kind and model._can_set_attn_implementation():
        text_config = model.config.get_text_config()
        text = [key for key, value in vars(model.config).items() if value is text_config]
        model.set_attn_implementation(dict.fromkeys(["", *text], kind) if text else kind)


@contextmanager
def torch_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use torch's own attention, and no compiled code, which would be recompiled for these inputs."""
    kind = model.config._attn_implementation
    use_attention(model, "sdpa")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        use_attention(model, kind)


def visible(segments: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Whether a query attends to a key: one in its example, not later, and in the prompt or the same response.

    segments is that of a PackedBatch. query and key are positions in the row that broadcast together.
    """
    examples, branches = segments
    shared = (branches[key] == 0) | (branches[key] == branches[query])
    return (examples[key] == examples[query]) & (key <= query) & shared


def additive_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Make the mask, (1, 1, seq, seq): 0 where a query attends to a key, a very large negative number elsewhere.

    It is not boolean, since eager attention adds it. It has the queries' dtype, since torch misreads others. It has no
    infinities, since some models multiply it; all dtypes but float16 can represent bfloat16's lowest number.
    """
    order = torch.arange(segments.shape[1], device=segments.device)
    is_visible = visible(segments, order[:, None], order)
    return torch.where(is_visible, 0.0, torch.finfo(torch.bfloat16).min).to(dtype)[None, None]


def flex_inputs(inputs: dict[str, torch.Tensor], segments: torch.Tensor) -> dict[str, Any]:
    """Pad the inputs to whole blocks and add a block mask. Padding tokens attend only to themselves.

    The result of a token that attends to nothing would depend on how a kernel divides by 0. There are at least two
    blocks, since a single one would be compiled for its own shape.
    """
    n = segments.shape[1]
    n_padding = max(-n % FLEX_BLOCK, 2 * FLEX_BLOCK - n)
    example = torch.full((n_padding,), n, device=segments.device)  # after all others, each token a branch of its own
    branches = torch.arange(1, n_padding + 1, device=segments.device)
    segments = torch.cat((segments, torch.stack((example, branches))), dim=1)
    padded = {name: F.pad(value, (0, n_padding)) for name, value in inputs.items()}
    return padded | {"attention_mask": flex_mask(segments)}


def flex_mask(segments: torch.Tensor) -> "BlockMask":
    """Make the mask of `visible` for flex attention without a tensor of size (seq, seq).

    Examples, and the branches of an example, come in ascending order. The first and last of them in a block of queries
    and in a block of keys therefore show whether no query attends to any key (the pair is skipped), or every query to
    every key (it needs no mask).
    """
    from torch.nn.attention.flex_attention import BlockMask  # needed only on a GPU

    blocks = segments.view(2, -1, FLEX_BLOCK)
    (example, branch), (last_example, last_branch) = blocks.amin(-1), blocks.amax(-1)
    order = torch.arange(len(example), device=segments.device)
    query, key = order[:, None], order
    has_one_example = example == last_example
    same_example = has_one_example[query] & has_one_example[key] & (example[query] == example[key])
    other_responses = same_example & (branch[key] > 0) & (last_branch[key] < branch[query])
    needed = (key <= query) & (last_example[key] >= example[query]) & ~other_responses
    same_branch = (branch[key] == last_branch[query]) & (last_branch[key] == branch[query])
    full = (key < query) & same_example & ((last_branch[key] == 0) | same_branch)

    def list_blocks(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # for each query block: the number of chosen key blocks, and the indices of all key blocks, chosen ones first
        chosen = chosen.int()[None, None]
        return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return visible(segments, q, k)

    masked_blocks, full_blocks = list_blocks(needed & ~full), list_blocks(full)
    return BlockMask.from_kv_blocks(*masked_blocks, *full_blocks, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod)


@cache
def compiled_flex_attention() -> Callable[..., torch.Tensor]:
    """Torch's flex attention, compiled as a whole: otherwise it would hold the scores of all pairs of tokens."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


@cache  # another function would be compiled anew
def soft_cap(limit: float) -> Callable[..., torch.Tensor]:
    """A function of flex attention that caps scores softly."""
    return lambda score, b, h, q, k: limit * torch.tanh(score / limit)


@torch.compiler.disable  # it is compiled on its own, since torch 2.11 fails to compile it within some layers
def flex_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: "BlockMask",
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by a block mask; query, key and value are (1, heads, seq, d), the result (1, seq, heads, d).

    transformers' own function makes an object of torch.compile whenever training and evaluation alternate, may run
    without being compiled once torch has compiled it too often, and is compiled as a part of compiled layers.
    """
    refuse_options("flex", kwargs)
    dtype, n_heads = attention_dtype(value), query.shape[1]
    query, key, value = (states.to(dtype) for states in (query, key, value))
    if n_heads & (n_heads - 1):  # torch's kernel groups queries only if the number of heads is a power of 2
        key, value = (repeat_kv(states, n_heads // states.shape[1]) for states in (key, value))
    out = compiled_flex_attention()(
        query,
        key,
        value,
        score_mod=None if softcap is None else soft_cap(softcap),
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=n_heads != key.shape[1],
    )
    return out.transpose(1, 2), None


@dataclass(eq=False)
class BranchLengths:
    """The lengths of the prompt and the responses of each example in a row.

    An object, since torch.compile would recompile for each tuple of different numbers; in torch 2.11 also for each
    frozen dataclass of them.
    """

    examples: tuple[tuple[int, ...], ...]


@torch.compiler.disable  # would be recompiled for every number of examples
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

    query, key, value are (1, heads, seq, d) and the mask (1, 1, seq, seq). branch_lengths is an argument of the model's
    forward pass that transformers passes on. Without it, this is torch's attention.
    """
    if attention_mask is None or branch_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    refuse_options("packed", kwargs | {"dropout": 0.0})  # which it has
    sizes = [sum(lengths) for lengths in branch_lengths.examples]
    outputs = []
    split = (states.split(sizes, dim=2) for states in (query, key, value))  # slices would have whole gradients
    for lengths, end, q, k, v in zip(branch_lengths.examples, accumulate(sizes), *split, strict=True):
        tokens = slice(end - sum(lengths), end)
        mask = attention_mask[:, :, tokens, tokens]
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
    """Attend in one example, computed in at least float32; the result is (1, seq, heads, d) in the values' dtype.

    lengths has the lengths of the prompt and of each response. For sequences of a few hundred tokens, torch's kernel is
    slower in bfloat16. Keys are not repeated for grouped queries.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=True)
    q, k, v, mask = (tensor.to(dtype) for tensor in (query, key, value, mask))
    with torch.autocast("cpu", enabled=False):
        if q.shape[2] >= MIN_BRANCHED_TOKENS:
            out = attend_by_branch(attend, q, k, v, mask, lengths)
        else:
            out = attend(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).to(value.dtype)


def attend_by_branch(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    lengths: Sequence[int],
) -> torch.Tensor:
    """Attend causally in the prompt and first response, then from each other response to the prompt and itself."""
    rows = [lengths[0] + lengths[1], *lengths[2:]]
    queries, masks = query.split(rows, dim=2), mask.split(rows, dim=2)
    keys, values = key.split(lengths, dim=2), value.split(lengths, dim=2)
    outputs = [attend(queries[0], torch.cat(keys[:2], 2), torch.cat(values[:2], 2), is_causal=True)]
    for i, (response, response_mask) in enumerate(zip(queries[1:], masks[1:], strict=True), start=2):
        columns = response_mask.split(lengths, dim=3)
        k = torch.cat((keys[0], keys[i]), 2)
        v = torch.cat((values[0], values[i]), 2)
        m = torch.cat((columns[0], columns[i]), 3)
        outputs.append(attend(response, k, v, attn_mask=m))
    return torch.cat(outputs, 2)


KINDS = {"varlen": varlen_attention, "flex_attention": flex_attention, "packed": packed_attention}
