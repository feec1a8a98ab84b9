"""Checks, before a run uses a layout, that it gives the same log-probabilities as the padded one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo.data.examples import TokenizedExample
from dpo.model.attention import attention_kinds, torch_attention, use_attention
from dpo.model.logps import ResponseLogps
from dpo.model.packing import LAYOUTS
from dpo.system.console import log_message
from dpo.system.devices import autocast, platform, read_facts
from dpo.system.errors import is_out_of_memory, summarize_error

TOLERANCE = 2e-4  # nats per token in float32: rounding is well below, a wrongly visible or hidden key well above


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
    for kind in attention_kinds(read_facts(check.device)):
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
    is_known = layout in LAYOUTS and attention in (*attention_kinds(read_facts(device)), "sdpa", "eager")
    return LayoutChoice(layout, attention) if unchanged and is_known else None


class LayoutCheck:
    """Compares the log-probabilities of a layout with those of the padded one, which it computes once.

    The comparison is in float32 without TF32, on two short examples and a long one in one microbatch. The long one has
    max_length tokens, since a sliding window shows only there. Only its last response is compared, so that the padded
    layout computes it once. Then the short examples run forward and backward as in training.
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
            with float32_parameters(self.policy.model):
                worst = self.difference([*self.short, self.long], self.expected)
            if not worst <= TOLERANCE:
                return f"log-probabilities differ by up to {worst:.2g} nats per token from those of layout=padded"
            agreement = f"layout={self.layout}: within {worst:.1g} nats per token of layout=padded in float32"
            step = f"in {dtype}, forward and backward"
            rounding = self.try_training(dtype)
            if dtype != torch.float32:
                agreement += f", {rounding:.1g} in {dtype}"
        except Exception as error:  # a model without support for the mask or for position ids fails in many ways
            if is_out_of_memory(error):
                raise
            return f"the model fails {step} ({type(error).__name__}: {summarize_error(error)})"
        log_message(f"{agreement}.")
        return None

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
