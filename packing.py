"""How tokenized examples are laid out for one forward pass, and the log-probability of each response."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from utils import UserError, first_line, lacks_memory, say

Head = torch.nn.Module  # turns hidden states into logits


@dataclass(frozen=True)
class Layout:
    """One forward pass over some examples of a batch.

    inputs        input_ids (rows, seq), with attention_mask or, where they restart, position_ids of the same shape
    sources       (n,) flat position in (rows, seq) from whose output each response token is predicted
    targets       (n,) the response tokens, response after response
    lengths       (examples, n_responses) how many of the n belong to each response
    examples      the examples, in this order
    segments      of a row that holds several examples, (2, seq): the number of each token's example, and of its branch
                  in it (0 the prompt, 1 and on the responses), from which the mask is made; else None
    bounds        (start, end) of each example in such a row, beyond which attention need not look
    """

    inputs: dict[str, torch.Tensor]
    sources: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    examples: tuple[Any, ...]
    segments: torch.Tensor | None = None
    bounds: tuple[tuple[int, int], ...] = ()

    def to(self, device: torch.device) -> "Layout":
        """Return the layout on a device."""

        def move(value: torch.Tensor) -> torch.Tensor:
            return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

        moved = {name: move(getattr(self, name)) for name in ("sources", "targets", "lengths")}
        moved["segments"] = None if self.segments is None else move(self.segments)
        return replace(self, inputs={k: move(v) for k, v in self.inputs.items()}, **moved)


# The two layouts


def padded(examples: Sequence[Any]) -> Layout:
    """Lay out one sequence a row, all first responses before all second ones, padded on the right: the original's way.

    Padding is masked by position, so its id does not matter; 0 exists in every vocabulary.
    """
    n, n_responses = len(examples), len(examples[0].responses)
    rows = [example.prompt + example.responses[k] for k in range(n_responses) for example in examples]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    sources = []
    for i, example in enumerate(examples):
        for k, response in enumerate(example.responses):
            start = (n * k + i) * width + len(example.prompt) - 1
            sources.extend(range(start, start + len(response)))
    return make_layout({"input_ids": input_ids, "attention_mask": mask}, sources, examples)


def shared_prefix(examples: Sequence[Any]) -> Layout:
    """Lay out whole examples in one row without padding, each prompt once, its responses after it.

    Position ids restart: every response continues from the end of its prompt.
    """
    tokens, positions, sources, spans = [], [], [], []
    for example in examples:
        start, n_prompt = len(tokens), len(example.prompt)
        tokens += example.prompt
        positions += range(n_prompt)
        span = [n_prompt]
        for response in example.responses:
            sources += [start + n_prompt - 1, *range(len(tokens), len(tokens) + len(response) - 1)]
            tokens += response
            positions += range(n_prompt, n_prompt + len(response))
            span.append(len(response))
        spans.append(span)
    inputs = {"input_ids": torch.tensor([tokens]), "position_ids": torch.tensor([positions])}
    lengths = torch.tensor([length for span in spans for length in span])
    numbers = [[i for i, span in enumerate(spans) for _ in span], [k for span in spans for k in range(len(span))]]
    segments = torch.tensor(numbers).repeat_interleave(lengths, dim=1)
    ends = list(accumulate(map(sum, spans)))
    bounds = tuple(zip([0, *ends], ends, strict=False))
    return replace(make_layout(inputs, sources, examples), segments=segments, bounds=bounds)


def make_layout(inputs: dict[str, torch.Tensor], sources: list[int], examples: Sequence[Any]) -> Layout:
    """Make a layout whose sources follow the responses example by example."""
    targets = [token for example in examples for response in example.responses for token in response]
    lengths = [[len(response) for response in example.responses] for example in examples]
    return Layout(inputs, torch.tensor(sources), torch.tensor(targets), torch.tensor(lengths), tuple(examples))


# From a batch to passes


@dataclass(frozen=True)
class LayoutKind:
    """A way to lay examples out, and how many tokens the model computes for some of them."""

    lay_out: Callable[[Sequence[Any]], Layout]
    cost: Callable[[Sequence[Any]], int]


def padded_cost(examples: Sequence[Any]) -> int:
    """Count the tokens of a padded pass."""
    widest = max(len(example.prompt) + max(map(len, example.responses)) for example in examples)
    return widest * len(examples) * len(examples[0].responses)


LAYOUTS = {
    "shared_prefix": LayoutKind(shared_prefix, lambda examples: sum(map(len, examples))),
    "padded": LayoutKind(padded, padded_cost),
}


def make_passes(examples: Sequence[Any], layout: str, max_tokens: int) -> Iterator[Layout]:
    """Lay examples out in as few passes of at most max_tokens as is easy; an example that is longer passes alone.

    Examples that fit into one pass keep their order; else the longest come first, which packs tightest and pads least.
    """
    kind = LAYOUTS[layout]
    order = list(range(len(examples)))
    if kind.cost(examples) > max_tokens:
        order.sort(key=lambda i: -len(examples[i]))
    bins: list[list[int]] = []
    for i in order:
        fits = (b for b in bins if kind.cost([examples[j] for j in [*b, i]]) <= max_tokens)
        chosen = next(fits, None)
        if chosen is None:
            bins.append(chosen := [])
        chosen.append(i)
    for chosen in bins:
        yield kind.lay_out([examples[i] for i in chosen])


# Attention


def attention_kinds(device: torch.device) -> list[str]:
    """Return the kinds of attention to try for rows that hold several examples, the fastest first."""
    return ["flex_attention", "packed"] if device.type == "cuda" else ["packed"]


def compile_layers(model: Any) -> None:
    """Let a model's layers be compiled, one for all of them and for rows of all lengths, when they first compute.

    Parameters and their names stay as they are. UserError if the model is not made of transformers' layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError("compile=true: this kind of model has no layers that are known to compile; set it to false")
    for layer in layers:
        layer.compile(dynamic=True)


def recompute_activations(model: Any, on: bool = True) -> None:
    """Switch activation checkpointing of a model that supports it on or off."""
    verb = "enable" if on else "disable"
    newer = getattr(model, f"activation_checkpointing_{verb}", None)  # its name in newer versions of transformers
    (newer or getattr(model, f"gradient_checkpointing_{verb}"))()


def use_attention(model: Any, kind: str) -> None:
    """Let a model that uses torch's own attention use another kind; models with their own keep it."""
    if kind == "packed":
        AttentionInterface.register("packed", packed_attention)
        AttentionMaskInterface.register("packed", sdpa_mask)
    if model.config._attn_implementation in ("sdpa", "packed", "flex_attention"):
        model.set_attn_implementation(kind)


@contextmanager
def torch_attention(model: Any) -> Iterator[None]:
    """Use torch's own attention, and nothing that is compiled, which would compile anew for other kinds of inputs."""
    kind = model.config._attn_implementation
    use_attention(model, "sdpa")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        use_attention(model, kind)


def visible(segments: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Tell which keys a query sees: in its example, not later, and in the prompt or in its own response."""
    examples, branches = segments
    shared = (branches[key] == 0) | (branches[key] == branches[query])
    return (examples[key] == examples[query]) & (key <= query) & shared


def additive_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask (1, 1, seq, seq), 0 where a query sees a key and hugely negative elsewhere.

    It is not boolean, since models with eager attention add it, and of the queries' dtype, since torch misreads
    others. It holds no infinities, which some models multiply; all dtypes but float16 hold bfloat16's lowest number.
    """
    order = torch.arange(segments.shape[1], device=segments.device)
    seen = visible(segments, order[:, None], order)
    return torch.where(seen, 0.0, torch.finfo(torch.bfloat16).min).to(dtype)[None, None]


FLEX_ROW = 2048  # tokens: rows are filled up to a multiple of this, so that few lengths are ever compiled


def flex_inputs(inputs: dict[str, torch.Tensor], segments: torch.Tensor) -> dict[str, Any]:
    """Return the inputs with a block mask, filled up by an example that nobody else sees."""
    from torch.nn.attention.flex_attention import create_block_mask  # only a GPU needs it

    missing = -segments.shape[1] % FLEX_ROW
    segments = F.pad(segments, (0, missing), value=-1)
    n = segments.shape[1]
    mask = create_block_mask(lambda b, h, q, k: visible(segments, q, k), None, None, n, n, device=segments.device)
    return {name: F.pad(value, (0, missing)) for name, value in inputs.items()} | {"attention_mask": mask}


@torch.compiler.disable  # compiled, it would be another function for every number of examples
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend example by example: cost grows with the sum of the squared lengths, not with the square of their sum.

    query, key, value are (1, heads, seq, d) and the mask (1, 1, seq, seq); without bounds this is torch's attention.
    """
    bounds = getattr(attention_mask, "bounds", None)
    if bounds is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    attend = cpu_attention if query.device.type == "cpu" else sdpa_attention_forward
    lengths = [end - start for start, end in bounds]
    examples = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), bounds, strict=True)
    parts = [
        attend(module, *states, attention_mask[:, :, start:end, start:end], **kwargs)[0]
        for *states, (start, end) in examples
    ]
    return torch.cat(parts, dim=1), None


def cpu_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in at least float32, with as many key heads as there are; the result is of the values' dtype.

    For sequences of some hundred tokens torch's kernel is slower in bfloat16, and repeated keys would only be stored.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    query, key, mask = (tensor.to(dtype) for tensor in (query, key, attention_mask))
    with torch.autocast("cpu", enabled=False):
        how = {"attn_mask": mask, "dropout_p": dropout, "scale": scaling, "enable_gqa": True}
        out = F.scaled_dot_product_attention(query, key, value.to(dtype), **how)
    return out.transpose(1, 2).to(value.dtype), None


# Log-probabilities

# So many bytes of logits, counted as float32, are kept for the backward pass; of more, all are recomputed there, in
# chunks of this size, but of at least CHUNK_TOKENS tokens, or a large vocabulary's products become slow.
CHUNK_BYTES, CHUNK_TOKENS = 2**28, 128
# Bytes of float32 softmax at a time: what a CPU's cache holds; elsewhere more, so that there are few launches.
FLOAT32_BYTES = {"cpu": 2**22, "mps": 2**25, "cuda": 2**25}


def token_logps(model: Any, layout: Layout, head: Head | None) -> torch.Tensor:
    """Return the log-probability of each response token, (n,), in at least float32.

    head turns the hidden states of model.base_model into logits; without one (see find_head), the model itself does.
    """
    if head is None:
        logps = target_logps(response_logits(model, layout), layout.targets)
    else:
        hidden = model.base_model(**model_inputs(model, layout))[0]
        hidden = hidden.reshape(-1, hidden.shape[-1])[layout.sources]
        size = max(CHUNK_TOKENS, CHUNK_BYTES // (4 * head.weight.shape[0]))
        logps = chunked_logps(hidden, layout.targets, head, size)
    return logps


def sequence_logps(model: Any, layout: Layout, head: Head | None) -> torch.Tensor:
    """Return log pi(response | prompt), summed over tokens, of shape (examples, n_responses), in at least float32."""
    logps = token_logps(model, layout, head)
    return torch.segment_reduce(logps, "sum", lengths=layout.lengths.flatten()).view(layout.lengths.shape)


def model_inputs(model: Any, layout: Layout) -> dict[str, Any]:
    """Return the arguments of a forward pass."""
    inputs: dict[str, Any] = dict(layout.inputs)
    if layout.segments is not None and model.config._attn_implementation == "flex_attention":
        inputs = flex_inputs(inputs, layout.segments)
    elif layout.segments is not None:
        mask = inputs["attention_mask"] = additive_mask(layout.segments, model.dtype)
        mask.bounds = layout.bounds  # for packed_attention; models hand a 4D mask on as it is
    return inputs | {"use_cache": False}


def response_logits(model: Any, layout: Layout) -> torch.Tensor:
    """Return the logits that predict the response tokens, of shape (n, vocabulary), and compute few others."""
    width = layout.inputs["input_ids"].shape[1]
    columns, kept = torch.unique(layout.sources % width, return_inverse=True)
    logits = model(**model_inputs(model, layout), logits_to_keep=columns).logits
    return logits[layout.sources // width, kept]


def chunked_logps(hidden: torch.Tensor, targets: torch.Tensor, head: Head, size: int) -> torch.Tensor:
    """Return the log-probability of each target, (n,), from hidden states (n, d), logits of `size` tokens at a time."""
    if len(hidden) <= size:
        return target_logps(head(hidden), targets)
    parts = [
        checkpoint(lambda h, t: target_logps(head(h), t), h, t, use_reentrant=False)
        for h, t in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(parts)


def target_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return logit minus logsumexp of each target, (n,), from logits (n, vocabulary), in at least float32."""
    return TargetLogps.apply(logits, targets)


class TargetLogps(torch.autograd.Function):
    """The gradient of target_logps is g (1 - softmax) at the target and -g softmax elsewhere.

    Autograd would keep the log-softmax of all tokens in float32, and hold two gradients of that size; this computes in
    float32 a few tokens at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities, and keep the logits in their own dtype."""
        ctx.save_for_backward(logits, targets)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        ctx.size = max(1, FLOAT32_BYTES[logits.device.type] // (4 * logits.shape[1]))
        parts = zip(logits.split(ctx.size), targets.split(ctx.size), strict=True)
        return torch.cat([part.log_softmax(1, dtype=dtype).gather(1, t[:, None])[:, 0] for part, t in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of the logits, in their dtype."""
        logits, targets = ctx.saved_tensors
        result = torch.empty_like(logits)
        columns = (logits, targets[:, None], grad[:, None], result)
        for part, t, g, out in zip(*(column.split(ctx.size) for column in columns), strict=True):
            out.copy_(part.softmax(1, dtype=grad.dtype).mul_(-g).scatter_add_(1, t, g))
        return result, None


class Float32Head(torch.nn.Module):
    """Output embeddings that compute in float32 whatever the body's dtype.

    Most of what sharing a pass with other examples moves a bfloat16 log-probability by is the logits' own rounding.
    """

    def __init__(self, head: Head):
        super().__init__()
        self.weight, self.bias = head.weight, getattr(head, "bias", None)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (n, vocabulary) in float32 from hidden states (n, d)."""
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), bias)


@torch.no_grad()
def find_head(model: Any) -> Head | None:
    """Return the model's output embeddings if they alone turn its last hidden states into logits, else None.

    Some models scale or cap their logits; a forward pass over a few tokens tells.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    logits = model(input_ids=ids, use_cache=False).logits
    return head if torch.equal(head(model.base_model(input_ids=ids, use_cache=False)[0]), logits) else None


# The check that a layout changes nothing

TOLERANCE = 2e-4  # nats a token in float32: rounding stays well below, a key too many or too few lies well above


def check_layout(model: Any, examples: Sequence[Any], layout: str, max_length: int, amp: torch.dtype) -> str | None:
    """Return None if a layout gives the log-probabilities of the padded one, else in a few words why it cannot be used.

    Decided in float32 without TF32, on some real examples and one stretched to max_length tokens (a sliding window
    shows only there). Prints the difference, also with the forward pass computed in dtype amp.
    """
    examples = [*examples, stretch(examples[0], max_length)]
    dtype, device = model.dtype, next(model.parameters()).device
    was_training = model.training
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    kept = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, data in kept:  # buffers such as rotary frequencies are float32 already and must stay so
            parameter.data = data.float()
        worst = layout_difference(model, examples, layout, device)
    except Exception as error:  # a model that takes no such mask or no position ids says so in many ways
        if lacks_memory(error):
            raise
        return f"the model fails with it ({type(error).__name__}: {first_line(error)})"
    finally:
        for parameter, data in kept:
            parameter.data = data
        model.train(was_training)
        torch.set_float32_matmul_precision(precision)
    if not worst <= TOLERANCE:
        return f"log-probabilities differ by up to {worst:.2g} nats a token from those of layout=padded"
    with torch.autocast(device.type, amp, enabled=amp != dtype):
        own = layout_difference(model, examples, layout, device)
    say(f"layout={layout}: within {worst:.1g} nats a token of layout=padded in float32, {own:.1g} in {amp}.")
    return None


@torch.no_grad()
def layout_difference(model: Any, examples: Sequence[Any], layout: str, device: torch.device) -> float:
    """Return the largest difference of a token's log-probability between a layout and the padded one."""
    both = [LAYOUTS[name].lay_out(examples).to(device) for name in (layout, "padded")]
    ours = target_logps(response_logits(model, both[0]), both[0].targets)
    with torch_attention(model):
        theirs = target_logps(response_logits(model, both[1]), both[1].targets)
    return (ours - theirs).abs().max().item()


def stretch(example: Any, max_length: int) -> Any:
    """Return the example with its prompt repeated until it is as long as max_length allows."""
    room = max_length - max(map(len, example.responses))
    prompt = (example.prompt * (room // len(example.prompt) + 1))[:room] or example.prompt
    return replace(example, prompt=prompt)
