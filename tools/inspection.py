"""What a run would train on, shown before any weights load: examples token by token, lengths, and doubtful pairs."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING

import torch

from dpo.data.batches import BatchIterator
from dpo.data.examples import TextExample, TokenizedExample
from dpo.model.packing import LAYOUTS, make_microbatches
from dpo.settings.schema import Settings
from dpo.system.console import printable, progress, write_text
from dpo.system.devices import compute_dtype, read_facts
from dpo.training.budgets import memory_before_loading, tokens_per_pass
from dpo.training.objectives import Loss
from trainers import Inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MEASURED = 20_000  # examples whose lengths are measured, at most
BINS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
BAR = 40  # characters of the longest bar of a histogram

# How each kind of token is shown: its name, its brackets, and its color on a terminal.
KINDS = {
    "prompt": ("", "", "\033[2m"),
    "trained": ("[", "]", "\033[32m"),
    "end of turn": ("{", "}", "\033[35m"),
    "cut": ("~", "~", "\033[9;31m"),
}


def inspect(train: BatchIterator, test: BatchIterator, n: int, ids: bool, max_tokens: int) -> None:
    """Print n examples of the first batches, and what is known of the lengths and of doubtful pairs."""
    colors = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    legend = ", ".join(paint(f"{left}{name}{right}", name, colors) for name, (left, right, _) in KINDS.items())
    write_text(sys.stdout, f"\nTokens: {legend}\n")
    examples = islice(chain.from_iterable(batch.examples for batch in train.from_start()), n)
    for example in examples:
        write_text(sys.stdout, "\n".join(example_lines(example, train, colors, ids)) + "\n")
    for line in (*length_lines(train, max_tokens), *doubt_lines(train, test)):
        write_text(sys.stdout, f"{printable(line)}\n")


def paint(text: str, kind: str, colors: bool) -> str:
    """Return text in the color of a kind of token."""
    return f"{KINDS[kind][2]}{text}\033[0m" if colors else text


# Examples


def example_lines(example: TokenizedExample, batches: BatchIterator, colors: bool, ids: bool) -> Iterator[str]:
    """Yield the lines that show one example: where it comes from, its prompt, and each response."""
    text, tokenizer = example.text, batches.tokenize.tokenizer
    cut = f"; cut: {', '.join(example.truncated)}" if example.truncated else ""
    sizes = ", ".join(str(len(response)) for response in example.responses)
    counts = f"{len(example.prompt)} tokens of prompt, {sizes} to train on"
    yield f"\n{printable(text.source)}, row {text.row}: {counts}{cut}"
    whole = whole_example(example, batches)
    lost = [] if len(whole.prompt) == len(example.prompt) else lost_tokens(whole.prompt, example.prompt)
    tokens = [("cut", token) for token in lost] + [("prompt", token) for token in example.prompt]
    yield from shown("prompt", tokens, 0, tokenizer, colors, ids)
    for name, kept, response in zip(response_names(text), example.responses, whole.responses, strict=True):
        ends = len(kept) == len(response)
        tokens = [("trained", token) for token in (kept[:-1] if ends else kept)]
        tokens += [("end of turn", kept[-1])] if ends else [("cut", token) for token in response[len(kept) :]]
        yield from shown(name, tokens, len(example.prompt), tokenizer, colors, ids)


def response_names(example: TextExample) -> tuple[str, ...]:
    """Return what the responses of an example are called."""
    if len(example.responses) > 1:
        return "chosen", "rejected"
    return ("target" if example.label is None else "desirable" if example.label else "undesirable",)


def shown(
    name: str,
    tokens: Sequence[tuple[str, int]],
    position: int,
    tokenizer: "PreTrainedTokenizerBase",
    colors: bool,
    ids: bool,
) -> Iterator[str]:
    """Yield the line of some tokens, (kind, id), from a position on; with ids one more for each of them."""
    parts = []
    for kind, group in groupby(tokens, lambda token: token[0]):
        members = [token for _, token in group]
        left, right, _ = KINDS[kind]
        alone = [[token] for token in members] if kind == "trained" else [members]
        texts = (printable(str(tokenizer.decode(part))).replace("\n", "\n  ") for part in alone)
        parts += [paint(f"{left}{text}{right}", kind, colors) for text in texts]
    yield f"{name}: {''.join(parts)}"
    for kind, token in tokens if ids else ():
        at = "" if kind == "cut" else f"{position}"
        position += kind != "cut"
        yield f"  {at:>6} {token:>8} {kind:<11} {printable(repr(tokenizer.decode([token])))}"


def whole_example(example: TokenizedExample, batches: BatchIterator) -> TokenizedExample:
    """Return the example as it would be without any limit of length."""
    unlimited = replace(batches.tokenize, max_length=2**31, max_prompt_length=2**31 - 1)
    return unlimited([example.text])[0] if example.truncated else example


def lost_tokens(whole: list[int], kept: list[int]) -> list[int]:
    """Return the tokens of a prompt that its shorter form lacks, which lie between a common start and a common end."""
    n = len(whole) - len(kept)
    start = next((i for i, pair in enumerate(zip(whole, kept, strict=False)) if pair[0] != pair[1]), len(kept))
    return whole[start : start + n]


# Lengths


def length_lines(batches: BatchIterator, max_tokens: int) -> Iterator[str]:
    """Yield histograms of lengths, how often the chosen response is the longer one, and what a layout computes."""
    lengths: dict[str, list[int]] = {"prompt": []}
    tokens = dict.fromkeys(LAYOUTS, 0)
    longer = equal = 0
    epoch = islice(batches.from_start(), -(-MEASURED // batches.batch_size))
    n_batches = min(len(batches), -(-MEASURED // batches.batch_size))
    for batch in progress(epoch, "measuring lengths", total=n_batches):
        for example in batch.examples:
            lengths["prompt"].append(len(example.prompt))
            for name, response in zip(response_names(example.text), example.responses, strict=True):
                lengths.setdefault(name, []).append(len(response))
            sizes = list(map(len, example.responses))
            longer += len(sizes) > 1 and sizes[0] > sizes[1]
            equal += len(sizes) > 1 and sizes[0] == sizes[1]
        for layout in LAYOUTS:
            passes = make_microbatches(batch.examples, layout, max_tokens)
            tokens[layout] += sum(one.n_tokens for one in passes)
    n = len(lengths["prompt"])
    yield f"\nLengths in tokens, of the first {n:,} training examples:"
    for name, values in lengths.items():
        yield from histogram(name, values)
    if "rejected" in lengths:
        yield f"The chosen response is the longer one in {longer / n:.1%} of the pairs, as long in {equal / n:.1%}."
    packed, padded = tokens["shared_prefix"], tokens["padded"]
    yield f"Tokens computed: {packed:,} packed (layout=shared_prefix), {padded:,} padded, {packed / padded:.0%}."


def histogram(name: str, values: Sequence[int]) -> Iterator[str]:
    """Yield a histogram of lengths, one line per bin that is not empty."""
    edges = [0, *BINS, max(max(values), BINS[-1]) + 1]
    counts = [sum(low <= value < high for value in values) for low, high in zip(edges, edges[1:], strict=False)]
    middle = sorted(values)[len(values) // 2]
    yield f"  {name}: shortest {min(values):,}, median {middle:,}, longest {max(values):,}"
    for low, count in zip(edges, counts, strict=False):
        if count:
            yield f"    from {low:>5,}: {count:>8,} {'#' * max(1, round(BAR * count / max(counts)))}"


# Doubtful pairs


def doubt_lines(train: BatchIterator, test: BatchIterator) -> Iterator[str]:
    """Yield how many examples come twice, contradict each other, or are in the training and in the test split."""
    seen: set[int] = set()
    conflicts, repeated, words = 0, 0, ""
    prompts: set[int] = set()
    for example in examples_of(train, "comparing training examples"):
        key, opposite = (hash(words) for words in same_and_opposite(example))
        repeated += key in seen
        conflicts += opposite != key and opposite in seen
        words = "the same pair the other way round" if example.label is None else "the same response, the other label"
        seen.add(key)
        prompts.add(hash(example.prompt))
    shared = shared_prompts = n_test = 0
    for example in examples_of(test, "comparing test examples"):
        n_test += 1
        shared += hash(same_and_opposite(example)[0]) in seen
        shared_prompts += hash(example.prompt) in prompts
    yield f"Of {train.n_items:,} training examples {repeated:,} repeat an earlier one."
    yield f"{conflicts:,} contradict an earlier one: {words}."
    also = f"{shared:,} are training examples too, {shared_prompts:,} have the prompt of one"
    yield f"Of {n_test:,} test examples {also}."


def same_and_opposite(example: TextExample) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """Return what a repeated example and what one that contradicts it have in common with an example."""
    label = example.label
    opposite = (example.prompt, example.responses[::-1], label if label is None else not label)
    return (example.prompt, example.responses, label), opposite


def examples_of(batches: BatchIterator, title: str) -> Iterator[TextExample]:
    """Yield all examples of an iterator's groups, each read once."""
    return chain.from_iterable(progress(batches.groups, title))


def inspect_inputs(settings: Settings, loss: Loss, inputs: Inputs) -> None:
    """Print what would be trained on."""
    dtype = compute_dtype(settings.compute_precision, getattr(torch, settings.model.policy_dtype), inputs.device)
    estimate = partial(memory_before_loading, inputs.model_config, settings, loss, dtype)
    max_tokens = tokens_per_pass(settings.max_tokens_per_pass, read_facts(inputs.device), estimate)
    inspect(inputs.train_batches, inputs.eval_batches, settings.inspect, settings.inspect_ids, max_tokens)
