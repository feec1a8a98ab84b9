"""How tokenized examples are laid out for one forward pass, and the log-probability of each response."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Layout:
    """One forward pass over some examples of a batch.

    inputs        what the model is given: input_ids (rows, seq), attention_mask, and position_ids where they restart
    sources       (n,) flat position in (rows, seq) from whose output each response token is predicted
    targets       (n,) the response tokens, response after response
    lengths       (examples, n_responses) how many of the n belong to each response
    indices       which examples of the batch these are, in this order
    n_tokens      prompt and response tokens in all, as useful as they come: padding and repeated prompts not counted
    """

    inputs: dict[str, torch.Tensor]
    sources: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    indices: tuple[int, ...]
    n_tokens: int

    def to(self, device: torch.device) -> "Layout":
        """Return the layout on a device."""
        move = {name: getattr(self, name).to(device) for name in ("sources", "targets", "lengths")}
        return replace(self, inputs={k: v.to(device) for k, v in self.inputs.items()}, **move)


def padded(examples: Sequence[Any], indices: Sequence[int]) -> Layout:
    """Lay out one sequence a row, all first responses before all second ones, padded on the right: the original's way.

    Padding is masked by position, so its id does not matter; 0 exists in every vocabulary.
    """
    n_responses = len(examples[0].responses)
    pairs = [(example, k) for k in range(n_responses) for example in examples]
    rows = [example.prompt + example.responses[k] for example, k in pairs]
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    spans = [(len(examples) * k + i, k) for i in range(len(examples)) for k in range(n_responses)]
    sources = [
        row * width + position
        for row, _ in spans
        for position in range(len(pairs[row][0].prompt) - 1, len(rows[row]) - 1)
    ]
    return make_layout({"input_ids": input_ids, "attention_mask": mask}, sources, examples, indices)


def make_layout(
    inputs: dict[str, torch.Tensor], sources: list[int], examples: Sequence[Any], indices: Sequence[int]
) -> Layout:
    """Make a layout whose sources follow the responses example by example."""
    targets = [token for example in examples for response in example.responses for token in response]
    lengths = [[len(response) for response in example.responses] for example in examples]
    n_tokens = sum(len(example) for example in examples)
    return Layout(inputs, torch.tensor(sources), torch.tensor(targets), torch.tensor(lengths), tuple(indices), n_tokens)


LAYOUTS: dict[str, Callable[[Sequence[Any], Sequence[int]], Layout]] = {"padded": padded}


def make_passes(examples: Sequence[Any], layout: str) -> list[Layout]:
    """Lay a batch out in as many passes as it takes; every example is in exactly one."""
    return [LAYOUTS[layout](examples, range(len(examples)))]


def sequence_logps(model: Any, layout: Layout) -> torch.Tensor:
    """Return log pi(response | prompt), summed over tokens, of shape (examples, n_responses), in at least float32."""
    logps = token_logps(response_logits(model, layout), layout.targets)
    sums = torch.segment_reduce(logps, "sum", lengths=layout.lengths.flatten())
    return sums.view(layout.lengths.shape)


def response_logits(model: Any, layout: Layout) -> torch.Tensor:
    """Return the logits that predict the response tokens, of shape (n, vocabulary), and compute few others."""
    rows, width = layout.inputs["input_ids"].shape
    columns = torch.unique(layout.sources % width)
    logits = model(**layout.inputs, use_cache=False, logits_to_keep=columns).logits
    if rows == 1:
        return logits[0]
    kept = torch.searchsorted(columns, layout.sources % width)
    return logits[layout.sources // width, kept]


def token_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each target, (n,), from logits (n, vocabulary), in at least float32."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return -F.cross_entropy(logits, targets, reduction="none")
