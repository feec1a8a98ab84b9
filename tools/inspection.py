"""inspect=N: prints what would be trained on, before any weights load: tokens, lengths, and doubtful pairs."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING

import torch

from dpo.data.batches import BatchIterator
from dpo.data.examples import LEFT_OUT_TURNS, TextExample, TokenizedExample
from dpo.model.packing import LAYOUTS, make_microbatches
from dpo.settings.schema import Settings
from dpo.system.console import printable, progress, write_text
from dpo.system.devices import compute_dtype, read_facts
from dpo.training.budgets import estimate_before_loading, resolve_max_tokens
from dpo.training.objectives import Loss
from trainers import Inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MEASURED = 20_000  # maximum examples that are measured
BINS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
BAR = 40  # characters of the longest bar of a histogram

# Each kind of token: its brackets, and its color on a terminal.
KINDS = {
    "prompt": ("", "", "\033[2m"),
    "context": ("", "", "\033[36m"),
    "trained": ("[", "]", "\033[32m"),
    "end of turn": ("{", "}", "\033[35m"),
    "cut": ("~", "~", "\033[9;31m"),
}


def inspect_inputs(settings: Settings, loss: Loss, inputs: Inputs) -> None:
    """Print the first examples token by token, then statistics of lengths and doubtful pairs."""
    printer = TokenPrinter(
        inputs.tokenizer, with_ids=settings.inspect_ids, in_color=sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    dtype = compute_dtype(settings.compute_precision, getattr(torch, settings.model.policy_dtype), inputs.device)
    estimate = partial(estimate_before_loading, inputs.model_config, settings, loss, dtype, reference=inputs.reference)
    max_tokens = resolve_max_tokens(settings.max_tokens_per_pass, read_facts(inputs.device), estimate)
    train = inputs.train_batches
    print_text(*legend(settings, printer))
    for example in islice(chain.from_iterable(batch.examples for batch in train.from_start()), settings.inspect):
        print_text(*example_lines(example, train, printer))
    print_text(*(printable(line) for line in length_lines(train, max_tokens)))
    print_text(*(printable(line) for line in doubt_lines(train, inputs.eval_batches)))


def print_text(*lines: str) -> None:
    write_text(sys.stdout, "\n".join(lines) + "\n")


# Examples


@dataclass(frozen=True)
class TokenPrinter:
    """Formats tokens so that their kinds can be distinguished."""

    tokenizer: "PreTrainedTokenizerBase"
    in_color: bool
    with_ids: bool

    def paint(self, text: str, kind: str) -> str:
        """Put the brackets and the color of a kind of token around text."""
        left, right, color = KINDS[kind]
        return f"{color}{left}{text}{right}\033[0m" if self.in_color else f"{left}{text}{right}"

    def lines(self, name: str, tokens: Sequence[tuple[str, int]], position: int) -> Iterator[str]:
        """Yield a line with tokens, (kind, id); with_ids adds a line per token, counted from position."""
        line = f"{name}: "
        for kind, group in groupby(tokens, lambda token: token[0]):
            ids = [token for _, token in group]
            parts = [[token] for token in ids] if kind == "trained" else [ids]
            for part in parts:
                text = printable(str(self.tokenizer.decode(part))).replace("\n", "\n  ")
                line += self.paint(text, kind)
        yield line
        if self.with_ids:
            for kind, token in tokens:
                number = "" if kind == "cut" else str(position)
                position += kind != "cut"
                yield f"  {number:>6} {token:>8} {kind:<11} {printable(repr(self.tokenizer.decode([token])))}"


def legend(settings: Settings, printer: TokenPrinter) -> Iterator[str]:
    """Yield the lines above the examples: how kinds of tokens look, and the chat template's time, if one is set."""
    yield f"\nTokens: {', '.join(printer.paint(name, name) for name in KINDS)}"
    if settings.chat_template_time is not None:
        yield f"The time that the chat template sees: {settings.chat_template_time}"


def example_lines(example: TokenizedExample, batches: BatchIterator, printer: TokenPrinter) -> Iterator[str]:
    """Yield the lines for an example: its source and facts, its prompt, and each response."""
    text = example.text
    facts = "; ".join(example_facts(example))
    yield f"\n{printable(text.source)}, row {text.row}: {printable(facts)}"
    whole = without_limits(example, batches)
    cut = lost_tokens(whole.prompt, example.prompt)
    tokens = [("cut", token) for token in cut] + [("prompt", token) for token in example.prompt]
    yield from printer.lines("prompt", tokens, 0)
    for k, name in enumerate(response_names(text)):
        n_kept = len(example.responses[k])
        kinds = token_kinds(whole, k)[:n_kept] + ["cut"] * (len(whole.responses[k]) - n_kept)
        yield from printer.lines(name, list(zip(kinds, whole.responses[k], strict=True)), len(example.prompt))


def example_facts(example: TokenizedExample) -> Iterator[str]:
    """Yield an example's numbers of tokens, scores, weight, warnings and cuts."""
    text = example.text
    sizes = ", ".join(str(len(response)) for response in example.trained_responses)
    yield f"{len(example.prompt)} tokens of prompt, {sizes} to train on"
    if example.loss_masks:
        yield f"{', '.join(str(mask.count(False)) for mask in example.loss_masks)} of context"
    if text.scores:
        yield f"scores: {', '.join(f'{score:g}' for score in text.scores)}"
    if text.weight != 1:
        yield f"weight: {text.weight:g}"
    yield from text.warnings
    if example.truncated:
        yield f"cut: {', '.join(example.truncated)}"


def token_kinds(example: TokenizedExample, k: int) -> list[str]:
    """The kind of each token of response k; the last token of each trained turn is its end."""
    mask = example.loss_masks[k] if example.loss_masks else [True] * len(example.responses[k])
    kinds = []
    for is_trained, next_is_trained in zip(mask, [*mask[1:], False], strict=True):
        kind = "trained" if next_is_trained else "end of turn"
        kinds.append(kind if is_trained else "context")
    return kinds


def response_names(example: TextExample) -> tuple[str, ...]:
    if len(example.responses) > 1:
        return "chosen", "rejected"
    if example.label is None:
        return ("target",)
    return ("desirable" if example.label else "undesirable",)


def without_limits(example: TokenizedExample, batches: BatchIterator) -> TokenizedExample:
    """The training example as it is without max_length and max_prompt_length."""
    if not example.truncated:
        return example
    rules = replace(batches.tokenize, max_length=2**31, max_prompt_length=2**31 - 1)
    whole: TokenizedExample = batches.examples.with_rules(rules)[example.index]
    if LEFT_OUT_TURNS in example.truncated:
        whole = replace(whole, prompt=rules.with_bos(rules.ids([whole.text.prompt])[0]))
    return whole


def lost_tokens(whole: list[int], kept: list[int]) -> list[int]:
    """The tokens that a truncated prompt lacks; they stand together, at the start, in the middle or at the end."""
    n = len(whole) - len(kept)
    start = next((i for i, (a, b) in enumerate(zip(whole, kept, strict=False)) if a != b), len(kept))
    return whole[start : start + n]


# Lengths


def length_lines(batches: BatchIterator, max_tokens: int) -> Iterator[str]:
    """Yield histograms of lengths, how often the chosen response is longer, and the tokens of each layout."""
    lengths: dict[str, list[int]] = {"prompt": []}
    tokens = dict.fromkeys(LAYOUTS, 0)
    longer = equal = 0
    n_batches = min(len(batches), -(-MEASURED // batches.batch_size))
    for batch in progress(islice(batches.from_start(), n_batches), "measuring lengths", total=n_batches):
        for example in batch.examples:
            lengths["prompt"].append(len(example.prompt))
            sizes = list(map(len, example.trained_responses))
            for name, size in zip(response_names(example.text), sizes, strict=True):
                lengths.setdefault(name, []).append(size)
            longer += len(sizes) > 1 and sizes[0] > sizes[1]
            equal += len(sizes) > 1 and sizes[0] == sizes[1]
        for layout in LAYOUTS:
            tokens[layout] += sum(one.n_tokens for one in make_microbatches(batch.examples, layout, max_tokens))
    n = len(lengths["prompt"])
    yield f"\nLengths in tokens, of the first {n:,} training examples (of responses, the trained tokens):"
    for name, values in lengths.items():
        yield from histogram(name, values)
    if "rejected" in lengths:
        yield f"The chosen response is longer in {longer / n:.1%} of the pairs, equally long in {equal / n:.1%}."
    packed, padded = tokens["shared_prefix"], tokens["padded"]
    yield f"Tokens computed: {packed:,} packed (layout=shared_prefix), {padded:,} padded, {packed / padded:.0%}."


def histogram(name: str, values: Sequence[int]) -> Iterator[str]:
    """Yield a histogram of lengths, a line per bin that is not empty."""
    edges = [0, *BINS, max(max(values), BINS[-1]) + 1]
    counts = [sum(low <= value < high for value in values) for low, high in zip(edges, edges[1:], strict=False)]
    median = sorted(values)[len(values) // 2]
    yield f"  {name}: shortest {min(values):,}, median {median:,}, longest {max(values):,}"
    for low, count in zip(edges, counts, strict=False):
        if count:
            yield f"    from {low:>5,}: {count:>8,} {'#' * max(1, round(BAR * count / max(counts)))}"


# Doubtful pairs


def doubt_lines(train: BatchIterator, test: BatchIterator) -> Iterator[str]:
    """Yield how many examples repeat or contradict an earlier one, and how many test examples are also trained on."""
    known: set[int] = set()
    prompts: set[int] = set()
    contradictions = repeated = 0
    opposite = ""
    for example in texts_of(train, "comparing training examples"):
        has_label = example.label is not None
        opposite = "the same response, the other label" if has_label else "the same pair in the opposite order"
        opposite_label = not example.label if has_label else None
        key = hash((example.prompt, example.responses, example.label))
        opposite_key = hash((example.prompt, example.responses[::-1], opposite_label))
        repeated += key in known
        contradictions += opposite_key != key and opposite_key in known
        known.add(key)
        prompts.add(hash(example.prompt))
    n_test = shared = shared_prompts = 0
    for example in texts_of(test, "comparing test examples"):
        n_test += 1
        shared += hash((example.prompt, example.responses, example.label)) in known
        shared_prompts += hash(example.prompt) in prompts
    yield f"Of {train.n_items:,} training examples {repeated:,} repeat an earlier one."
    yield f"{contradictions:,} contradict an earlier one: {opposite}."
    overlap = f"{shared:,} are also training examples, {shared_prompts:,} share a prompt with one"
    yield f"Of {n_test:,} test examples {overlap}."


def texts_of(batches: BatchIterator, title: str) -> Iterator[TextExample]:
    return (example.text for example in progress(batches.examples, title))
