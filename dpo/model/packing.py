"""From tokenized examples to microbatches: the two layouts, and the token budget."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dpo.data.examples import TokenizedExample
from dpo.model.attention import flex_inputs
from dpo.model.varlen import Segments, make_segments
from dpo.system.errors import actionable_errors


@dataclass(frozen=True)
class PackedBatch:
    """The tensors of a microbatch: some examples of a batch, computed in one forward pass.

    inputs           input_ids (rows, seq), with attention_mask or, where they restart, position_ids of the same shape
    sources          (n,) flat position in (rows, seq) whose output predicts each trained token
    targets          (n,) the trained tokens, response after response
    lengths          (examples, n_responses) number of trained tokens of each response
    weights          (examples,) the factor of each example's loss
    examples         the examples, in this order
    segments         (2, seq) for a row of several examples: the index of each token's example, and of its branch
                     (0: prompt, 1 and up: responses); they determine the attention mask; else None
    branch_lengths   for such a row, the number of all tokens of each example's prompt and responses; else empty
    """

    inputs: dict[str, torch.Tensor]
    sources: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor
    examples: tuple[TokenizedExample, ...]
    segments: torch.Tensor | None = None
    branch_lengths: tuple[tuple[int, ...], ...] = ()

    @property
    def n_tokens(self) -> int:
        """The number of tokens that a model computes, padding included."""
        return self.inputs["input_ids"].numel()

    @property
    def occurrences(self) -> torch.Tensor:
        """How often each token occurs if every response has its own prompt, (rows * seq,): padding never."""
        if self.segments is None:
            return self.inputs["attention_mask"].flatten().float()
        is_prompt, n_responses = self.segments[1] == 0, self.lengths.shape[1]
        return torch.where(is_prompt, n_responses, 1).float()

    @cached_property  # policy and reference share it
    def flex_inputs(self) -> dict[str, Any]:
        """The inputs of a row of several examples for flex attention."""
        assert self.segments is not None
        return flex_inputs(self.inputs, self.segments)

    @cached_property
    def varlen_segments(self) -> Segments:
        """What varlen attention needs to know of a row of several examples."""
        return make_segments(self.branch_lengths, self.sources.device)

    def to(self, device: torch.device) -> "PackedBatch":
        def move(value: torch.Tensor) -> torch.Tensor:
            return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

        return replace(
            self,
            inputs={name: move(value) for name, value in self.inputs.items()},
            sources=move(self.sources),
            targets=move(self.targets),
            lengths=move(self.lengths),
            weights=move(self.weights),
            segments=None if self.segments is None else move(self.segments),
        )


# The two layouts


def padded(examples: Sequence[TokenizedExample]) -> PackedBatch:
    """Lay out one sequence per row, first responses before second ones, padded on the right, as in the original.

    Padding is masked by position, so its id does not matter; 0 is in every vocabulary.
    """
    n, n_responses = len(examples), len(examples[0].responses)
    rows = [example.prompt + example.responses[k] for k in range(n_responses) for example in examples]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    sources: list[int] = []
    for i, example in enumerate(examples):
        for k, response in enumerate(example.responses):
            start = (n * k + i) * width + len(example.prompt) - 1
            sources.extend(example.trained(k, range(start, start + len(response))))
    return pack({"input_ids": input_ids, "attention_mask": mask}, sources, examples)


def shared_prefix(examples: Sequence[TokenizedExample]) -> PackedBatch:
    """Lay out whole examples in one row without padding: each prompt once, followed by its responses.

    Position ids restart: every response continues from the end of its prompt.
    """
    tokens: list[int] = []
    positions: list[int] = []
    sources: list[int] = []
    branches: list[tuple[int, ...]] = []
    for example in examples:
        start, n_prompt = len(tokens), len(example.prompt)
        branches.append((n_prompt, *map(len, example.responses)))
        tokens += example.prompt
        positions += range(n_prompt)
        for k, response in enumerate(example.responses):
            predicting = [start + n_prompt - 1, *range(len(tokens), len(tokens) + len(response) - 1)]
            sources += example.trained(k, predicting)
            tokens += response
            positions += range(n_prompt, n_prompt + len(response))
    inputs = {"input_ids": int64(tokens)[None], "position_ids": int64(positions)[None]}
    lengths = torch.tensor([length for example in branches for length in example])
    indices = [(i, k) for i, example in enumerate(branches) for k in range(len(example))]
    segments = torch.tensor(indices).T.repeat_interleave(lengths, dim=1)
    return replace(pack(inputs, sources, examples), segments=segments, branch_lengths=tuple(branches))


def pack(inputs: dict[str, torch.Tensor], sources: list[int], examples: Sequence[TokenizedExample]) -> PackedBatch:
    """Make a packed batch; sources are in the order of the examples' responses."""
    trained = [example.trained_responses for example in examples]
    targets = int64([token for responses in trained for response in responses for token in response])
    lengths = torch.tensor([[len(response) for response in responses] for responses in trained])
    weights = torch.tensor([example.text.weight for example in examples])
    return PackedBatch(inputs, int64(sources), targets, lengths, weights, tuple(examples))


def int64(numbers: Sequence[int]) -> torch.Tensor:
    """Make a tensor through NumPy, which reads a list five times as fast as torch: a GPU waits meanwhile."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64))


# From a batch to microbatches


@dataclass(frozen=True)
class Layout:
    """A function that lays out examples (pack), and the number of tokens that the model then computes (cost)."""

    pack: Callable[[Sequence[TokenizedExample]], PackedBatch]
    cost: Callable[[Sequence[TokenizedExample]], int]


def padded_cost(examples: Sequence[TokenizedExample]) -> int:
    widest = max(len(example.prompt) + max(map(len, example.responses)) for example in examples)
    return widest * len(examples) * len(examples[0].responses)


LAYOUTS = {
    "shared_prefix": Layout(shared_prefix, lambda examples: sum(map(len, examples))),
    "padded": Layout(padded, padded_cost),
}


def make_microbatches(examples: Sequence[TokenizedExample], layout: str, max_tokens: int) -> Iterator[PackedBatch]:
    """Yield as few microbatches of at most max_tokens tokens as first-fit finds; a longer example gets its own.

    Examples that fit into one microbatch keep their order. Otherwise the longest come first, which packs most tightly
    and pads least.
    """
    kind = LAYOUTS[layout]
    if kind.cost(examples) > max_tokens:
        examples = sorted(examples, key=len, reverse=True)
    bins: list[list[TokenizedExample]] = []
    for example in examples:
        for chosen in bins:
            if kind.cost([*chosen, example]) <= max_tokens:
                chosen.append(example)
                break
        else:
            bins.append([example])
    for chosen in bins:
        yield kind.pack(chosen)


def balance(lengths: Sequence[int], n_ranks: int) -> list[list[int]]:
    """Assign examples, by index, to ranks so that all ranks have nearly equal numbers of tokens.

    The longest example goes first, each to the rank with the fewest tokens, then the fewest examples. The largest sum
    is at most 4/3 - 1/(3 n) of the optimum (Graham, Bounds on multiprocessing timing anomalies, 1969).
    """
    shares: list[list[int]] = [[] for _ in range(n_ranks)]
    totals = [0] * n_ranks
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = min(range(n_ranks), key=lambda r: (totals[r], len(shares[r]), r))
        shares[rank].append(i)
        totals[rank] += lengths[i]
    return [sorted(share) for share in shares]


@dataclass(frozen=True)
class Packer:
    """Turns batches into microbatches with a layout and a token budget, on a device."""

    layout: str
    max_tokens: int
    device: torch.device

    def __call__(self, examples: Sequence[TokenizedExample], n_equal: int = 1) -> Iterator[PackedBatch]:
        """Yield a batch's microbatches on the device. The batch is first split into n_equal groups of equal size."""
        size = -(-len(examples) // n_equal)
        for start in range(0, len(examples), size):
            for batch in make_microbatches(examples[start : start + size], self.layout, self.max_tokens):
                yield batch.to(self.device)

    def memory_hint(self, batch: PackedBatch) -> AbstractContextManager[None]:
        """A context in which an out-of-memory error names the microbatch and the settings that make it smaller."""
        n = len(batch.examples)
        longest = max(map(len, batch.examples))
        smaller = f"max_tokens_per_pass, which is {self.max_tokens}" if n > 1 else "max_length in a new run"
        size = f"in a microbatch of {batch.n_tokens:,} tokens, {n} examples, the longest of {longest:,} tokens"
        return actionable_errors(f"{size}; lower {smaller}, or set activation_checkpointing=true")
