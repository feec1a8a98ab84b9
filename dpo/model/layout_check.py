"""Checks, before a run uses a layout, that it gives the same log-probabilities as the padded one."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from dpo.data.examples import TokenizedExample
from dpo.model.attention import (
    KINDS,
    attention_kinds,
    half_precision_kinds,
    torch_attention,
    use_attention,
    visible,
)
from dpo.model.logps import ResponseLogps, model_inputs
from dpo.model.packing import LAYOUTS
from dpo.model.varlen import attention_dtype
from dpo.system.console import log_message
from dpo.system.devices import autocast, platform, read_facts
from dpo.system.errors import is_out_of_memory, summarize_error

TOLERANCE = 2e-4  # nats per token in float32: rounding is well below, a wrongly visible or hidden key well above
KERNELS = ("varlen", "flex_attention")  # kinds of attention that compute 16 bits by kernels of their own
PROBED_TOKENS = 512  # of the long example on which such a kernel is compared with exact attention


@dataclass(frozen=True)
class LayoutChoice:
    """The layout and the kind of attention that a run uses."""

    layout: str
    attention: str


def choose_layout(
    policy: ResponseLogps,
    examples: Sequence[TokenizedExample],
    layout: str,
    max_length: int,
    dtype: torch.dtype,
    known: LayoutChoice | None = None,
) -> LayoutChoice:
    """Choose `layout`, or "padded" if the policy's log-probabilities differ with it.

    Tries the device's kinds of attention, fastest first, and leaves the policy with the chosen one. The check takes its
    tokens from the examples; dtype is the compute dtype of training. known is the result of an earlier check of the
    same model, layout, max_length, device and versions; it is not repeated.
    """
    model = policy.model
    if known is not None:
        use_attention(model, known.attention)
        return known
    if layout == "padded":
        return LayoutChoice("padded", model.config._attn_implementation)
    check = LayoutCheck(policy, examples, layout, max_length)
    facts = read_facts(check.device)
    for kind in [*half_precision_kinds(facts, dtype), *attention_kinds(facts)]:
        try:
            use_attention(model, kind)
        except (ValueError, ImportError) as error:  # the model does not support this kind
            log_message(f"{kind} attention is not available: {summarize_error(error)}")
            continue
        problem = check.find_problem(dtype)
        if problem is None:
            return LayoutChoice(layout, model.config._attn_implementation)
        log_message(f"layout={layout} cannot be used with {kind} attention: {problem}.")
    log_message("Using layout=padded.")
    use_attention(model, "sdpa")
    return LayoutChoice("padded", model.config._attn_implementation)


def recorded_layout(environment: Mapping[str, Any], device: torch.device) -> LayoutChoice | None:
    """The layout that a run recorded, if it ran on the same kind of device and versions."""
    layout, attention = str(environment.get("layout")), str(environment.get("attention"))
    unchanged = all(environment.get(name) == value for name, value in platform(device).items())
    facts = read_facts(device)
    kinds = [*half_precision_kinds(facts, torch.bfloat16), *attention_kinds(facts)]
    is_known = layout in LAYOUTS and attention in (*kinds, "sdpa", "eager")
    return LayoutChoice(layout, attention) if unchanged and is_known else None


class LayoutCheck:
    """Compares the log-probabilities of a layout with those of the padded one, which it computes once.

    The comparison is in float32 without TF32, on two short examples and a long one in one microbatch. The long one has
    max_length tokens, since a sliding window shows only there. Only its last response is compared, so that the padded
    layout computes it once. Then the short examples run forward and backward as in training. In 16 bits, rounding of
    log-probabilities could hide a key; so kernels of 16 bits are compared with exact attention on made-up inputs.
    """

    def __init__(self, policy: ResponseLogps, examples: Sequence[TokenizedExample], layout: str, max_length: int):
        self.policy, self.layout = policy, layout
        self.device = next(policy.parameters()).device
        self.short = [resize(example, 16, max_length) for example in examples[:2]]
        self.long = resize(examples[0], max_length, max_length)
        n_tokens = sum(map(len, [*self.short, self.long]))
        log_message(f"Checking layout={layout} against layout=padded, on {n_tokens:,} tokens ...")
        last = replace(self.long, responses=self.long.responses[-1:])
        with float32_parameters(policy.model):
            self.expected = torch.cat([self.padded(self.short), self.padded([last])])

    def find_problem(self, dtype: torch.dtype) -> str | None:
        """Return why the layout cannot be used, or None after logging how far it rounds in float32 and in dtype."""
        step = "in float32"
        try:
            worst = self.difference_in_float32(dtype)
            if not worst <= TOLERANCE:
                return f"log-probabilities differ by up to {worst:.2g} nats per token from those of layout=padded"
            agreement = f"layout={self.layout}: within {worst:.1g} nats per token of layout=padded in float32"
            step = f"in {dtype}, forward and backward"
            with recorded_call(self.policy.model.config._attn_implementation) as calls:
                rounding = self.try_training(dtype)
            if dtype != torch.float32:
                agreement += f", {rounding:.1g} in {dtype}"
                if calls and (problem := self.find_wrong_kernel(calls[0])):
                    return f"{problem} in {dtype}"
        except Exception as error:  # a model without support for the mask or for position ids fails in many ways
            if is_out_of_memory(error):
                raise
            return f"the model fails {step} ({type(error).__name__}: {summarize_error(error)})"
        log_message(f"{agreement}.")
        return None

    def difference_in_float32(self, dtype: torch.dtype) -> float:
        """Compute the largest difference from the padded layout, without TF32.

        On a small GPU a kernel that Triton makes may not fit in float32 and fit in 16 bits. Then another kind of
        attention shows that the layout is right, and find_wrong_kernel that the kernel is.
        """
        model, examples = self.policy.model, [*self.short, self.long]
        kind = model.config._attn_implementation
        with float32_parameters(model):
            try:
                return self.difference(examples, self.expected)
            except Exception as error:
                if kind not in KERNELS or dtype == torch.float32 or not exceeds_shared_memory(error):
                    raise
                reason = summarize_error(error)
            log_message(f"{kind} attention does not fit here in float32 ({reason}); checking in {dtype} alone.")
            use_attention(model, "packed")
            try:
                return self.difference(examples, self.expected)
            finally:
                use_attention(model, kind)

    def try_training(self, dtype: torch.dtype) -> float:
        """Run the short examples forward and backward in dtype; return the difference from the padded layout.

        Only the gradient of the second parameter is computed. That parameter is in the first layer or before it, so the
        gradient passes through the attention of all layers, at half the cost of the embeddings' gradient. It is not
        kept, and evaluation mode draws no random numbers.
        """
        was_training, model = self.policy.training, self.policy.model
        self.policy.eval()
        try:
            with autocast(model.dtype, dtype, self.device):
                actual = self.policy(LAYOUTS[self.layout].pack(self.short).to(self.device))
                rounding = 0.0 if dtype == torch.float32 else largest_difference(actual, self.padded(self.short))
            torch.autograd.grad(actual.sum(), self.policy.trained_parameters()[:2][-1:], allow_unused=True)
        finally:
            self.policy.train(was_training)
        return rounding

    def find_wrong_kernel(self, call: "AttentionCall") -> str | None:
        """Compare a call's kernel with exact attention, forward and backward, on inputs that show each key.

        Each value and each token's gradient has a single 1, in the column of its position modulo the head's size, and
        all scores are small. So output and values' gradients are sums of positive weights of about one size. Weights
        are rounded once and sums once, those over grouped heads and over copies of a prompt once more each: at most
        four times, each by half of eps. The bound is 3 eps, 2% in bfloat16. A key too many or too few changes a sum by
        its share: about an eighth (512 tokens, heads of 64). Terms of the gradients of queries and keys cancel; their
        error is bounded as a whole.
        """
        model = self.policy.model
        n = len(self.long.prompt) + len(self.long.responses[0])
        long = resize(self.long, min(PROBED_TOKENS, n), n)
        batch = LAYOUTS[self.layout].pack([*self.short, long]).to(self.device)
        assert batch.segments is not None
        inputs, n = model_inputs(model, batch), batch.n_tokens
        states, upstream = make_probe(call, inputs["input_ids"].shape[1], n, self.device)
        options = call.options | {name: value for name, value in inputs.items() if name in call.options}
        out, _ = KINDS[model.config._attn_implementation](call.module, *states, inputs.get("attention_mask"), **options)
        found = [out[:, :n], *(g[:, :, :n] for g in torch.autograd.grad(out, states, upstream))]
        order = torch.arange(n, device=self.device)
        real = [state[:, :, :n].detach().double().requires_grad_() for state in states]
        exact_out = exact_attention(real, visible(batch.segments, order[:, None], order), call)
        exact = [exact_out, *torch.autograd.grad(exact_out, real, upstream[:, :n].double())]
        eps = torch.finfo(call.dtype).eps
        parts = ("output", "queries' gradient", "keys' gradient", "values' gradient")
        for part, a, e, is_sum in zip(parts, found, exact, (True, False, False, True), strict=True):
            error = (a.double() - e).abs()
            is_right = (error <= 3 * eps * e + 1e-6).all() if is_sum else error.norm() <= 8 * eps * e.norm()
            if not is_right:  # nor if it is not a number
                return f"the {part} of its kernel differs from that of exact attention by more than rounding"
        return None

    @torch.no_grad()
    def padded(self, examples: Sequence[TokenizedExample]) -> Tensor:
        """Compute the log-probability of each response token, (n,), in the padded layout with torch's own attention."""
        with torch_attention(self.policy.model):
            return self.policy(LAYOUTS["padded"].pack(examples).to(self.device))

    @torch.no_grad()
    def difference(self, examples: Sequence[TokenizedExample], expected: Tensor) -> float:
        """Compute the largest difference, in nats, of a token's log-probability in the layout from the expected one.

        In the last example, only the tokens at its end have expected values and are compared.
        """
        actual = self.policy(LAYOUTS[self.layout].pack(examples).to(self.device))
        skipped = len(actual) - len(expected)
        n_before = len(actual) - sum(map(len, examples[-1].responses))
        return largest_difference(torch.cat([actual[:n_before], actual[n_before + skipped :]]), expected)


@dataclass(frozen=True)
class AttentionCall:
    """A call of an attention function by a model.

    n_heads and sizes are those of queries, keys and values, dtype is what attention computes in.
    """

    module: torch.nn.Module
    n_heads: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    options: dict[str, Any]

    @property
    def scale(self) -> float:
        scale = self.options.get("scaling")
        return self.sizes[0] ** -0.5 if scale is None else float(scale)


@contextmanager
def recorded_call(kind: str) -> Iterator[list[AttentionCall]]:
    """Give a list in which the first call of attention of a kind is found, if the kind has kernels of its own."""
    calls: list[AttentionCall] = []

    def record(module: torch.nn.Module, *inputs: Tensor, **options: Any) -> tuple[Tensor, None]:
        if not calls:
            *states, _ = inputs
            n_heads, sizes = zip(*((state.shape[1], state.shape[3]) for state in states), strict=True)
            calls.append(AttentionCall(module, n_heads, sizes, attention_dtype(states[2]), options))
        return KINDS[kind](module, *inputs, **options)

    if kind in KERNELS:
        AttentionInterface.register(kind, record)
    try:
        yield calls
    finally:
        if kind in KERNELS:
            AttentionInterface.register(kind, KINDS[kind])


def make_probe(call: AttentionCall, seq: int, n: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Make queries, keys and values (1, heads, seq, d) like a call's, and a gradient (1, seq, heads, d) of n tokens."""
    random = torch.Generator().manual_seed(0)
    deviation = (0.25 / (call.sizes[0] ** 0.5 * call.scale)) ** 0.5  # scores deviate by 0.25
    query, key = (deviation * torch.randn(1, heads, seq, call.sizes[0], generator=random) for heads in call.n_heads[:2])
    order, d = torch.arange(seq), call.sizes[2]
    value, upstream = (F.one_hot((order + torch.arange(call.n_heads[i])[:, None]) % d, d)[None] for i in (2, 0))
    states = [state.to(device, call.dtype).requires_grad_() for state in (query, key, value)]
    return states, (upstream.transpose(1, 2) * (order < n)[:, None, None]).to(device, call.dtype)


def exact_attention(states: Sequence[Tensor], seen: Tensor, call: AttentionCall) -> Tensor:
    """Attend where seen (seq, seq) is true, with all weights in memory, to (1, seq, heads, d)."""
    query = states[0]
    key, value = (state.repeat_interleave(query.shape[1] // state.shape[1], 1) for state in states[1:])
    scores = query @ key.mT * call.scale
    if (cap := call.options.get("softcap")) is not None:
        scores = cap * (scores / cap).tanh()
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def exceeds_shared_memory(error: Exception) -> bool:
    """Whether a kernel that Triton made needs more shared memory than the GPU has."""
    return re.search("out of resource|shared memory", str(error), re.IGNORECASE) is not None


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    return (actual.detach() - expected).abs().max().item()


def resize(example: TokenizedExample, n_tokens: int, max_length: int) -> TokenizedExample:
    """Resize an example: 8, 7, ... tokens per response, n_tokens for the prompt with the first response.

    Tokens are repeated if there are too few: a response of one token would be predicted only from its prompt.
    Loss masks are left out, so that all tokens are compared.
    """
    longest = max(1, max_length // 2)
    responses = tuple(cycle(response, min(8 - k, longest)) for k, response in enumerate(example.responses))
    n_prompt = max(1, min(n_tokens, max_length) - len(responses[0]))
    return replace(example, prompt=cycle(example.prompt, n_prompt), responses=responses, loss_masks=())


def cycle(tokens: list[int], n: int) -> list[int]:
    return (tokens * (n // len(tokens) + 1))[:n]


@contextmanager
def float32_parameters(model: PreTrainedModel) -> Iterator[None]:
    """Evaluate a model in float32, without TF32.

    Only parameters are converted: buffers such as rotary frequencies are already in float32 and must stay so.
    """
    was_training, precision = model.training, torch.get_float32_matmul_precision()
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.is_floating_point()]
    torch.set_float32_matmul_precision("highest")
    try:
        model.eval()
        for parameter, data in kept:
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
        model.train(was_training)
        torch.set_float32_matmul_precision(precision)
